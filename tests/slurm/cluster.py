"""A real SLURM cluster of two nodes on this host: private folder, sockets, ports and database.

    python tests/slurm/cluster.py install            # Debian's packages, as root; starts no service
    python tests/slurm/cluster.py up DIR [--no-accounting]
    python tests/slurm/cluster.py status DIR         # its processes
    python tests/slurm/cluster.py down DIR           # ends them; DIR stays

Two slurmd play the nodes n1 and n2 (two lines in /etc/hosts), each with 16 pretended cores and two
pretended GPUs. Partitions: debug (default, high priority), low (preempted after 20 s of grace),
lownograce (preempted at once). `export SLURM_CONF=DIR/slurm.conf` uses it.
"""

import argparse
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = ["munge", "slurmctld", "slurmd", "slurm-client", "slurmdbd", "mariadb-server"]
PROGRAMS = ["munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd"]
NODES = ["n1", "n2"]
SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={D}/run/munge.sock,cred_expire=5
{accounting}
StateSaveLocation={D}/state
SlurmdSpoolDir={D}/spool/%n
SlurmctldPidFile={D}/run/slurmctld.pid
SlurmdPidFile={D}/run/slurmd.%n.pid
SlurmctldLogFile={D}/log/slurmctld.log
SlurmdLogFile={D}/log/slurmd.%n.log
SlurmctldPort={port}
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
JobRequeue=1
ReturnToService=2
KillWait=5
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=15
GresTypes=gpu
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_ports}] CPUs=16 Boards=1 \
SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:2 \
Feature=volta32gb State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=lownograce Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={D}/run/munge.sock
AccountingStoreFlags=job_comment"""
SLURMDBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={D}/run/munge.sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
LogFile={D}/log/slurmdbd.log
PidFile={D}/run/slurmdbd.pid
"""
DATABASE = "create database if not exists slurm_acct; " + " ".join(
    f"create user if not exists slurm@{h} identified by 'slurm'; grant all on slurm_acct.* to"
    f" slurm@{h};"
    for h in ("127.0.0.1", "localhost")
)


class ClusterError(RuntimeError):
    """The cluster cannot be had here; the message says why."""


def install() -> None:
    """Debian's packages, unless they are there. A policy forbids their services to start; one that
    was there before stays as it was.
    """
    if not missing():
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ClusterError(
            f"SLURM is not installed ({', '.join(missing())}) and cannot be: that takes root and"
            " apt-get"
        )
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = {
            "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        # an old list may do; the installation says if not
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        done = subprocess.run(
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], **quiet
        )
    finally:
        if ours:
            policy.unlink()
    if done.returncode or missing():
        raise ClusterError(
            "apt-get could not install SLURM: " + " | ".join(done.stdout.strip().splitlines()[-3:])
        )


def missing() -> list[str]:
    path = os.environ.get("PATH", "") + SBIN
    return [name for name in PROGRAMS if not shutil.which(name, path=path)]


def _wait(what: str, ready, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise ClusterError(f"{what} did not come up in {seconds:.0f} s")
        time.sleep(0.1)


def _free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that nobody holds."""
    # two clusters started together look in different places first
    first = 21000 + os.getpid() % 400 * 20
    for base in [*range(first, 32000, 20), *range(21000, first, 20)]:
        holders = []
        try:
            for port in range(base, base + count):
                holders.append(socket.socket())
                holders[-1].bind(("127.0.0.1", port))
            return base
        except OSError:
            continue
        finally:
            for holder in holders:
                holder.close()
    raise ClusterError("no block of free ports between 21000 and 32000")


class Cluster:
    """The daemons under one folder.

    `env` is the environment in which sbatch and its like talk to them.
    """

    def __init__(self, folder: str | Path, accounting: bool = True) -> None:
        self.D = Path(folder).absolute()
        self.accounting = accounting
        self.env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM", "SBATCH_", "SUBMITIT_"))
        }
        self.env |= {
            "SLURM_CONF": str(self.D / "slurm.conf"),
            "PATH": os.environ.get("PATH", "") + SBIN,
        }

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if check and done.returncode:
            raise ClusterError(
                f"{' '.join(command)} ended with {done.returncode}: {done.stdout.strip()}"
            )
        return done.stdout

    def _answers(self, *command: str) -> bool:
        return subprocess.run(command, env=self.env, capture_output=True).returncode == 0

    # ---- up

    def up(self) -> "Cluster":
        if missing():
            raise ClusterError(f"SLURM is not installed: {', '.join(missing())} not found")
        if os.geteuid() != 0:
            raise ClusterError(
                "starting the two nodes takes root: device files, /etc/hosts, the database's user"
            )
        for name in ("log", "state", "spool", "run", "munge", "dev"):
            (self.D / name).mkdir(parents=True, exist_ok=True)
        self.D.chmod(0o755)
        (self.D / "run").chmod(0o755)
        self._name_nodes()
        try:
            self._start_munge()
            self._write_config()
            if self.accounting:
                self._start_database()
                self.run("slurmdbd")
                _wait("slurmdbd", lambda: self._answers("sacctmgr", "-n", "-i", "list", "cluster"))
            self.run("slurmctld")
            _wait("slurmctld", lambda: self._answers("scontrol", "ping"))
            for node in NODES:
                self.start_node(node)
            _wait(
                "the nodes",
                lambda: (
                    self.run("sinfo", "-h", "-N", "-p", "debug", "-t", "idle", "-o", "%N").split()
                    == NODES
                ),
            )
        except ClusterError:
            self.down()
            raise
        return self

    def _name_nodes(self) -> None:
        hosts = Path("/etc/hosts")
        for node in NODES:
            try:
                if not socket.gethostbyname(node).startswith("127."):
                    raise ClusterError(f"{node} is the name of another machine here")
            except socket.gaierror:
                text = hosts.read_text()
                hosts.write_text(
                    text + ("" if text.endswith("\n") or not text else "\n") + f"127.0.0.1 {node}\n"
                )

    def _start_munge(self) -> None:
        D, key = self.D, self.D / "munge" / "key"
        if not key.exists():
            key.write_bytes(os.urandom(128))
        key.parent.chmod(0o700)
        key.chmod(0o600)
        self.run(
            "munged",
            "--force",
            f"--key-file={key}",
            f"--socket={D}/run/munge.sock",
            f"--pid-file={D}/run/munged.pid",
            f"--log-file={D}/munge/log",
            f"--seed-file={D}/munge/seed",
        )

    def _write_config(self) -> None:
        port = _free_ports(5)
        names = {
            "D": self.D,
            "host": socket.gethostname().split(".")[0],
            "port": port,
            "dbd_port": port + 1,
            "sql_port": port + 2,
            "node_ports": f"{port + 3}-{port + 4}",
        }
        self.sql_port = port + 2
        accounting = (
            ACCOUNTING.format(**names)
            if self.accounting
            else "AccountingStorageType=accounting_storage/none"
        )
        (self.D / "slurm.conf").write_text(SLURM_CONF.format(accounting=accounting, **names))
        # unused, but stops slurmd from looking for /sys/fs/cgroup
        (self.D / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for gpu in ("gpu0", "gpu1"):
            if not (self.D / "dev" / gpu).exists():
                os.mknod(self.D / "dev" / gpu, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.D / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.D}/dev/gpu[0-1]\n")
        if self.accounting:
            dbd = self.D / "slurmdbd.conf"
            dbd.write_text(SLURMDBD_CONF.format(**names))
            dbd.chmod(0o600)

    def _start_database(self) -> None:
        D, sql = self.D, self.D / "sql"
        for folder in (sql, D / "run" / "sql"):
            folder.mkdir(exist_ok=True)
            shutil.chown(folder, "mysql")
        if not (sql / "mysql").exists():
            self.run(
                "mariadb-install-db",
                "--no-defaults",
                "--user=mysql",
                f"--datadir={sql}",
                "--skip-test-db",
            )
        sock = D / "run" / "sql" / "sock"
        with open(D / "log" / "mariadbd.log", "ab") as log:
            subprocess.Popen(
                [
                    "mariadbd",
                    "--no-defaults",
                    "--user=mysql",
                    f"--datadir={sql}",
                    f"--socket={sock}",
                    f"--pid-file={sock.with_name('pid')}",
                    "--bind-address=127.0.0.1",
                    f"--port={self.sql_port}",
                    "--innodb-buffer-pool-size=64M",
                    "--innodb-flush-log-at-trx-commit=0",
                    "--innodb-lock-wait-timeout=900",
                    "--performance-schema=OFF",
                    "--skip-log-bin",
                ],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        client = ["--no-defaults", "-uroot", "-S", str(sock)]
        _wait("mariadbd", lambda: self._answers("mariadb-admin", *client, "ping"))
        self.run("mariadb", *client, "-e", DATABASE)

    # ---- while it runs

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """What a power cut does: the daemon, its step daemons and everything they started are gone
        at once; nobody is left to tell.
        """
        tasks = [
            pid
            for pid, _ in _proc("stat")
            if (env := _environ(pid)).get("SLURMD_NODENAME") == node
            and env.get("SLURM_CONF") == self.env["SLURM_CONF"]
        ]
        parents = {pid: int(text.rpartition(")")[2].split()[1]) for pid, text in _proc("stat")}
        daemons = dict(_proc("cmdline"))
        steps = {
            parents[pid]
            for pid in tasks
            if daemons.get(parents.get(pid), "").startswith("slurmstepd")
        }
        for pid in [self._pid(self.D / "run" / f"slurmd.{node}.pid"), *steps, *tasks]:
            if pid:
                _kill(pid, signal.SIGKILL)

    def processes(self) -> dict[str, int]:
        """The cluster's own daemons that live, by name, in the order in which they should end."""
        files = [
            *sorted(self.D.glob("run/slurmd.n*.pid")),
            *(
                self.D / "run" / f
                for f in ("slurmctld.pid", "slurmdbd.pid", "sql/pid", "munged.pid")
            ),
        ]
        return {
            f.name.removesuffix(".pid").replace("pid", "mariadbd"): pid
            for f in files
            if (pid := self._pid(f))
        }

    def _pid(self, file: Path) -> int | None:
        """The process of a pid file, if it lives and is a daemon of this folder (its number may
        long belong to somebody else).
        """
        try:
            pid = int(file.read_text())
            ours = (
                Path(f"/proc/{pid}/environ").read_bytes()
                + Path(f"/proc/{pid}/cmdline").read_bytes()
            ).find(bytes(self.D)) >= 0
            return pid if ours else None
        except (OSError, ValueError):
            return None

    def down(self) -> None:
        pids = self.processes()
        end = time.monotonic() + 15
        if "slurmctld" in pids and self._answers("scontrol", "ping"):
            self.run("scancel", "--me", check=False)
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < end:
                time.sleep(0.2)
        for pid in pids.values():
            _kill(pid, signal.SIGTERM)
        while any(_lives(pid) for pid in pids.values()) and time.monotonic() < end + 15:
            time.sleep(0.1)
        for pid in self.processes().values():
            _kill(pid, signal.SIGKILL)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _lives(pid: int) -> bool:
    """Whether a process is there, and more than a child of ours that has ended: such a one is let
    go.
    """
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return Path(f"/proc/{pid}").exists()


def _proc(name: str):
    """(pid, text of /proc/pid/name) of every process that can be read; a cmdline's words are joined
    by spaces.
    """
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield (
                    int(folder.name),
                    (folder / name).read_bytes().replace(b"\0", b" ").decode(errors="replace"),
                )
            except OSError:
                continue


def _environ(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["install", "up", "down", "status"])
    parser.add_argument(
        "folder",
        nargs="?",
        help=(
            "where the cluster lives: a folder the database's user can reach, such as /tmp/cluster"
        ),
    )
    parser.add_argument(
        "--no-accounting", action="store_true", help="without slurmdbd and its database"
    )
    args = parser.parse_args()
    if args.command != "install" and not args.folder:
        parser.error(f"{args.command} needs a folder")
    try:
        if args.command == "install":
            install()
            return 0
        cluster = Cluster(args.folder, accounting=not args.no_accounting)
        if args.command == "up":
            start = time.monotonic()
            cluster.up()
            print(
                f"both nodes idle after {time.monotonic() - start:.1f} s: export"
                f" SLURM_CONF={cluster.D}/slurm.conf"
            )
        elif args.command == "down":
            cluster.down()
        else:
            print(
                "\n".join(f"{name} {pid}" for name, pid in cluster.processes().items())
                or "nothing runs"
            )
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
