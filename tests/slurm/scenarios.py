"""What clusters do to a job, one function each: it does it to a real one, and returns (what
happened, were losses and weights equal).

The twenty acceptance checks come first, by number; then what else a run has to survive. A run of
`KNN` flags has four epochs of twelve steps and mines before the epochs 2 and 3; step 18 is the
middle of epoch 1. Every resumed run is held against the unbroken one, bit for bit.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from launch import report
from launch.rendezvous import Place
from moco_isl.run import checkpoint
from tests.slurm.board import Board, scenario
from tests.slurm.cluster import Cluster, _environ
from tests.slurm.lab import GAN, KNN, ROOT, SINGLE, TWO_NODES, Job, Lab, same_run, small_disk

# the two pretended GPUs of a node: who takes or preempts them does so alone
gpus = threading.Lock()
HOLD = {"at": "step", "poll": 18, "rank": 0, "life": 0, "do": "hold"}
ONE_NODE = shlex.split("--nodes 1 --gpus-per-node 0 --timeout 20")


def interrupted_once(job: Job) -> None:
    """One checkpoint call, one requeue, two lives, and in the second the run went on where it
    was.
    """
    said = job.log() + job.log(0, "err")
    assert said.count("Calling checkpoint method") == 1 and said.count("Requeued job") == 1, said
    assert job.lives() == 2 and "epoch 1, step 6 of 12" in said, said
    assert "=> loaded" in said


def digest(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted([*folder.glob("checkpoint_*"), folder / "metrics.jsonl"])
    }


# ---- 1 to 20


@scenario(smoke=True)
def c01_plain_run(lab: Lab, board: Board):
    """1 plain run on two nodes"""
    board.reference()
    job, said = board.references["knn"].result()
    assert (
        job.folder.name == job.id and f"logs    {job.folder}" in said and "follow  tail -F" in said
    )
    assert f"job {job.id} COMPLETED" in said
    lab.until(
        lambda: "COMPLETED" in lab.cluster.run("sacct", "-X", "-n", "-o", "State", "-j", job.id),
        "COMPLETED in sacct",
        30,
    )
    assert (
        "rank 0 of 2 on n1" in job.log(0)
        and "rank 1 of 2 on n2" in job.log(1)
        and "2 x cpu" in job.log(0)
    )
    lab.complete(job, None)
    call = lab.command("status", job.folder)
    assert (
        call.end() == 0
        and "COMPLETED, restarts 0" in call.text
        and "epoch 3, loss" in call.text
        and "images/s" in call.text
    )
    return "both ranks in one group, COMPLETED, status shows epoch, loss, images/s", None


@scenario()
def c02_what_was_asked(lab: Lab, board: Board):
    """2 every option in the sbatch file"""
    asked = shlex.split(
        "--nodes 1 --ngpus 2 --cpus-per-task 3 --mem-gb 1.5 --timeout 33 --partition low --comment"
        " remember --use_volta32 --account root --qos normal --exclude n2 --signal-delay 77 --env"
        " A='x y' --setup true --sbatch hold --sbatch nice=5 --name mine --array-parallelism 7"
    )
    call = lab.command("submit", "pretrain", *asked, "--job_dir", lab.folder / "%j", "--", *KNN)
    assert call.end() == 0, call.text
    job = Job(lab, call)
    lines = (job.folder / f"{job.id}_submission.sh").read_text().splitlines()
    wanted = {
        "nodes=1",
        "ntasks-per-node=2",
        "gpus-per-node=2",
        "cpus-per-task=3",
        "mem=1536MB",
        "time=33",
        "partition=low",
        "comment=remember",
        "constraint=volta32gb",
        "account=root",
        "qos=normal",
        "exclude=n2",
        "signal=USR2@77",
        "requeue",
        "hold",
        "nice=5",
        "job-name=mine",
    }
    assert {f"#SBATCH --{w}" for w in wanted} <= set(lines), wanted - {
        line.removeprefix("#SBATCH --") for line in lines
    }
    assert (
        "export A='x y'" in lines
        and "true" in lines
        and "--cpus-per-task=3 --kill-on-bad-exit=1" in lines[-1]
    )
    shown = lab.cluster.run("scontrol", "show", "job", job.id)
    for fact in (
        "Features=volta32gb",
        "ExcNodeList=n2",
        "TimeLimit=00:33:00",
        "Requeue=1",
        "Comment=remember",
        "NumTasks=2",
    ):
        assert fact in shown, fact
    lab.cluster.run("scancel", job.id)
    lab.until(
        lambda: (
            "remember" in lab.cluster.run("sacct", "-X", "-n", "-P", "-o", "Comment", "-j", job.id)
        ),
        "the comment in sacct",
        30,
    )
    assert not list(lab.folder.rglob("*%j*"))
    return "sbatch file, scontrol and sacct agree; no folder named %j", None


@scenario()
def c03_devices(lab: Lab, board: Board):
    """3 two GPUs a node, and a second job beside it"""
    with gpus:
        four = lab.submit(
            "--partition",
            "debug",
            flags=[*KNN, "--epochs", "1"],
            nodes=shlex.split("--nodes 2 --ngpus 2 --cpus-per-task 1 --timeout 20"),
        )
        four.end()
        seen = [
            re.search(
                r"rank (\d) of 4 on (n\d), local rank (\d), CUDA_VISIBLE_DEVICES=(\S*),",
                four.log(rank),
            ).groups()
            for rank in range(4)
        ]
        devices = [
            (node, visible.split(",")[int(local) % len(visible.split(","))])
            for _, node, local, visible in seen
        ]
        assert sorted(devices) == [("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1")], seen
        one = shlex.split("--nodes 1 --ngpus 1 --cpus-per-task 1 --timeout 20 --sbatch nodelist=n1")
        first = lab.submit(nodes=one, flags=SINGLE, faults=[{**HOLD, "poll": 1}])
        first.at("hold")
        second = lab.submit(nodes=one, flags=[*SINGLE, "--epochs", "1"])
        second.end()
        first.go("hold")
        first.end()
        cards = [re.search(r"CUDA_VISIBLE_DEVICES=(\S*),", job.log())[1] for job in (first, second)]
        assert sorted(cards) == ["0", "1"], cards
    lab.no_orphans(four, first, second)
    return (
        (
            f"4 tasks saw {', '.join(f'{n}:{d}' for n, d in devices)}; the second job kept GPU"
            f" {cards[1]}"
        ),
        None,
    )


@scenario(smoke=True)
def c04_usr2(lab: Lab, board: Board):
    """4, 15 scancel --signal USR2; and the finished run again"""
    job = lab.submit(faults=[HOLD])
    job.at("hold")
    job.signal()
    said = job.end()
    interrupted_once(job)
    assert "restarted 1x" in said and "SIGUSR2: asked to stop" in job.log()
    lab.complete(job, board.reference())
    c15_again(lab, board, job)
    return (
        (
            "one checkpoint, one requeue, went on at step 7 of epoch 1; requeued and relaunched"
            " when done: nothing done"
        ),
        True,
    )


def c15_again(lab: Lab, board: Board, job: Job) -> None:
    """A finished run that is requeued, and one that is submitted again, does nothing."""
    before = digest(job.folder)
    lab.cluster.run("scontrol", "requeue", job.id)
    lab.until(
        lambda: job.log().count("already finished") == 1 and job.state() == "COMPLETED",
        "the end of the requeued job",
        120,
    )
    again = lab.submit(folder=job.folder)
    again.end()
    assert "already finished" in again.log() and digest(job.folder) == before


@scenario()
def c05_workers_and_term(lab: Lab, board: Board):
    """5 TERM and USR2 together, with loading workers, in a container's place"""
    container = ["--container", "env INSIDE=a_container", "--python", sys.executable]
    job = lab.submit("--cpus-per-task", "2", *container, flags=[*KNN, "-j", "2"], faults=[HOLD])
    assert _environ(job.at("hold"))["INSIDE"] == "a_container"
    job.signal("TERM")
    job.signal()
    assert "Error" not in job.end()
    interrupted_once(job)
    lab.complete(job, board.reference())
    return "as 4: the workers took no part", True


def preempt(lab: Lab, board: Board, partition: str) -> Job:
    """A job with GPUs in a low partition gives way to one in debug that wants them all."""
    with gpus:
        nodes = shlex.split(
            f"--nodes 2 --ngpus 1 --cpus-per-task 1 --timeout 20 --partition {partition}"
        )
        job = lab.submit(nodes=nodes, faults=[HOLD])
        job.at("hold")
        other = lab.cluster.run(
            "sbatch",
            "--parsable",
            "-p",
            "debug",
            "-N",
            "2",
            "--gpus-per-node=2",
            "-t",
            "5",
            "-o",
            "/dev/null",
            "--wrap",
            "srun sleep 4",
        ).strip()
        lab.until(lambda: job.lives() == 2, "second life", 240, job.call)
        assert "JobState=COMPLETED" in lab.cluster.run("scontrol", "show", "job", other)
        said = job.end()
        assert f"job {job.id} COMPLETED" in said and "FAILED" not in said
    assert "epoch 1, step 6 of 12" in job.log(0, "err")
    lab.complete(job, board.reference())
    return job


@scenario()
def c06_preempted(lab: Lab, board: Board):
    """6 preempted, 20 s of grace"""
    interrupted_once(preempt(lab, board, "low"))
    return "saved and requeued itself, went on after the other job", True


@scenario()
def c07_preempted_without_grace(lab: Lab, board: Board):
    """7 preempted, no grace"""
    preempt(lab, board, "lownograce")
    return "saved while SLURM requeued it; the submitter saw success only", True


@scenario()
def c08_time_limit(lab: Lab, board: Board):
    """8 time limit, short work"""
    job = lab.submit("--timeout", "2", "--signal-delay", "30", faults=[HOLD])
    said = job.end()
    assert (
        job.lives() > 1
        and f"restarted {job.lives() - 1}x" in said
        and "has timed out" in job.log() + job.log(0, "err")
    )
    lab.complete(job, board.reference())
    return "saved before the limit, requeued, completed", True


@scenario()
def c08_too_many_restarts(lab: Lab, board: Board):
    """8 time limit, more work than --max-restarts 1 allows"""
    job = lab.submit(
        "--timeout",
        "1",
        "--signal-delay",
        "20",
        "--max-restarts",
        "1",
        faults=[{**HOLD, "poll": 14, "life": life, "name": f"l{life}"} for life in (0, 1)],
    )
    said = job.end(75)
    assert (
        job.lives() == 2
        and "restarted 1 times already (--max-restarts)" in said
        and f"--job-dir {job.folder}" in said
    ), said
    again = lab.submit(folder=job.folder)
    again.end()
    lab.complete(again, board.reference())
    return (
        "ended after exactly 1 restart with the command that goes on; that one completed it",
        True,
    )


@scenario(smoke=True)
def c09_requeued_by_the_admin(lab: Lab, board: Board):
    """9 scontrol requeue, of a rank that does not listen"""
    job = lab.submit(flags=[*KNN, "--save-every", "5"], faults=[{**HOLD, "do": "deaf"}])
    job.at("deaf")
    assert checkpoint.load(job.folder / "checkpoint_last.pth.tar")["isl"]["total"] == 15
    lab.cluster.run("scontrol", "requeue", job.id)
    job.end()
    assert job.lives() == 2 and "Calling checkpoint method" not in job.log() + job.log(0, "err")
    ports = [re.search(r"ranks met at \S+:(\d+)", line) for line in job.log().splitlines()]
    assert len({match[1] for match in ports if match}) == 2, "the port was not renewed"
    lab.complete(job, board.reference())
    return (
        (
            "killed after KillWait, went on from the last periodic checkpoint (step 15, not 0), at"
            " another port"
        ),
        True,
    )


def node_failure(lab: Lab, board: Board, node: str) -> None:
    job = lab.submit(flags=[*KNN, "--save-every", "5"], faults=[HOLD])
    job.at("hold")
    lab.cluster.kill_node(node)
    lab.until(lambda: job.state() != "RUNNING", "end of the first life", 120, job.call)
    time.sleep(2)
    lab.cluster.start_node(node)
    said = job.end(seconds=240)
    assert "FAILED" not in said and "CANCELLED" not in said and job.lives() == 2, said
    assert "=> loaded" in job.log()
    lab.complete(job, board.reference())


@scenario(alone=True)
def c10_node_failure(lab: Lab, board: Board):
    """10 the second node dies and comes back"""
    node_failure(lab, board, "n2")
    return (
        "requeued when the node was missed, waited for it, went on; --wait never spoke of failure",
        True,
    )


@scenario(alone=True)
def c10_first_node_failure(lab: Lab, board: Board):
    """10 the same with the first node, where the batch script and rank 0 are"""
    node_failure(lab, board, "n1")
    return "as before", True


@scenario()
def c11_stale_results(lab: Lab, board: Board):
    """11 an old error of rank 1, which is slower after the restart"""
    job = lab.submit(faults=[HOLD, {"at": "end", "rank": 1, "life": 1, "do": "sleep:6"}])
    job.at("hold")
    (job.folder / f"{job.id}_1_result.pkl").write_bytes(b"of the last life")
    stale = {"time": 0, "rank": 1, "node": "n2", "code": 1, "error": "Connection closed by peer"}
    (job.folder / f"{job.id}_1_end.json").write_text(json.dumps({"state": "failed", **stale}))
    job.signal()
    assert "Connection" not in job.end()
    assert all(report.succeeded(job.entry, rank) for rank in (0, 1))
    lab.complete(job, board.reference())
    return "what the last life left was removed; success", True


@scenario(smoke=True)
def c12_a_rank_raises(lab: Lab, board: Board):
    """12 rank 1 raises ValueError"""
    job = lab.submit(faults=[{"at": "step", "poll": 18, "rank": 1, "do": "raise"}])
    said = job.end(1)
    report_lines = said[said.index(f"job {job.id} FAILED") :].splitlines()
    assert (
        report_lines[1] == "rank 1 on n2: ValueError: boom, on purpose"
        and str(job.folder / f"{job.id}_1_log.err") in report_lines[2]
    ), said
    assert "then rank 0 on n1: " in said and job.lives() == 1
    lab.no_orphans(job)
    return (
        "not requeued; rank 1's ValueError first, with its log, then rank 0's broken connection",
        None,
    )


@scenario()
def c12_a_rank_is_killed(lab: Lab, board: Board):
    """12 kill -9 of rank 1"""
    job = lab.submit(faults=[{"at": "step", "poll": 18, "rank": 1, "do": "kill"}])
    job.at("kill")
    start = time.monotonic()
    said = job.end(1)
    seconds = time.monotonic() - start
    assert re.search(
        rf"^job {job.id} FAILED.*\nrank 1 on n2: was killed: exit code 137, signal 9", said, re.M
    ), said
    assert seconds < 60, (seconds, said)
    assert job.lives() == 1
    again = lab.submit(folder=job.folder)  # the job is not requeued, but the run is not lost
    again.end()
    lab.complete(again, board.reference(), job.folder)
    return f"named after {seconds:.0f} s: rank 1, exit code 137; relaunched, it completed", True


@scenario(smoke=True)
def c13_signal_at_the_start(lab: Lab, board: Board):
    """13 USR2 in the first second"""
    job = lab.submit(
        faults=[
            {"at": "start", "rank": r, "life": 0, "do": "deaf", "name": f"start{r}"} for r in (0, 1)
        ]
    )
    for name in ("start0", "start1"):
        job.at(name)
    job.signal()
    time.sleep(1)
    for name in ("start0", "start1"):
        job.go(name)
    job.end()
    lab.complete(job, board.reference())
    return "the job ran on", True


@scenario()
def c14_signal_while_a_rank_stalls(lab: Lab, board: Board):
    """14 USR2 while rank 1 stalls"""
    job = lab.submit(faults=[{"at": "step", "poll": 18, "rank": 1, "life": 0, "do": "sleep:10"}])
    job.at("sleep")
    job.signal()
    job.end()
    interrupted_once(job)
    lab.complete(job, board.reference())
    return "saved after the stall, requeued", True


@scenario()
def c14_killed_while_saving(lab: Lab, board: Board):
    """14 kill -9 in the middle of a save"""
    job = lab.submit(
        flags=[*KNN, "--save-every", "5"],
        faults=[{"at": "save", "poll": 4, "rank": 0, "do": "kill"}],
    )
    said = job.end(1)
    assert "rank 0 on n1: was killed" in said
    assert (job.folder / f"checkpoint_last.pth.tar{checkpoint.TEMPORARY}").exists()
    reached = checkpoint.load(job.folder / "checkpoint_last.pth.tar")["isl"]["total"]
    again = lab.submit(folder=job.folder, flags=[*KNN, "--save-every", "5"])
    again.end()
    assert reached == 12
    lab.complete(again, board.reference(), job.folder)
    return f"the file before it was whole (step {reached}); relaunched, it completed", True


@scenario()
def c16_sweep(lab: Lab, board: Board):
    """16 a sweep of three points as a job array"""
    settings = {
        "dataset": "digits",
        "arch": "digits",
        "mlp": True,
        "moco-dim": 32,
        "moco-k": 256,
        "moco-t": 0.1,
        "epochs": 4,
        "batch-size": 128,
        "workers": 0,
        "device": "cpu",
        "seed": 1,
        "print-freq": 1,
        "miner": "knn",
        "isl-start": 2,
        "isl-every": 1,
    }
    file = lab.folder / "three.yaml"
    file.write_text(
        json.dumps(
            {"base": settings, "points": [{"name": "as_it_is"}, {"moco-t": 0.2}, {"isl-budget": 2}]}
        )
    )
    folder = lab.folder / "sweep"
    fault = {**HOLD, "at": "mining", "poll": 1}
    call = lab.command(
        "sweep",
        file,
        "--cluster",
        "slurm",
        *TWO_NODES,
        "--wait",
        "--poll",
        "1",
        "--job-dir",
        folder,
        faults=[fault],
    )
    lab.until(lambda: call.text.count("\n  logs") == 3, "three elements", call=call)
    ids = re.findall(r"^job (\d+_\d): (\S+)\n  logs", call.text, re.M)
    assert [name for _, name in ids] == ["as_it_is", "moco-t=0.2", "isl-budget=2"] and {
        i.split("_")[1] for i, _ in ids
    } == {"0", "1", "2"}
    lab.until(lambda: (lab.marks / "hold_0.at").exists(), "the first element in mining", call=call)
    lab.cluster.run("scancel", "--signal", "USR2", ids[0][0])
    (lab.marks / "hold.go").touch()
    assert call.end() == 0, call.text
    lives = [
        len(
            re.findall(r"life \d+ of job", (folder / "jobs" / job / f"{job}_0_log.out").read_text())
        )
        for job, _ in ids
    ]
    assert lives == [2, 1, 1], lives
    assert (
        all((folder / name / "checkpoint_0003.pth.tar").exists() for _, name in ids)
        and "| as_it_is |" in call.text
    )
    same_run(board.reference(), folder / "as_it_is")
    assert len(json.loads((folder / "table.json").read_text())) == 3 and not list(
        folder.rglob("*%*")
    )
    return "3 folders, 3 results, one table; only the signalled element restarted", True


@scenario(smoke=True)
def c17_refused(lab: Lab, board: Board):
    """17 what SLURM refuses"""
    said = {}
    for name, wrong in {
        "partition": ["--partition", "nope"],
        "feature": ["--constraint", "nope"],
        "memory": ["--mem-gb", "9999"],
        "GPUs": ["--ngpus", "5", "--cpus-per-task", "1"],
        "nodes": ["--nodes", "3", "--gpus-per-node", "0", "--timeout", "5"],
    }.items():
        call = lab.command(
            "submit",
            "pretrain",
            *([] if name in ("GPUs", "nodes") else TWO_NODES),
            *wrong,
            "--job-dir",
            lab.folder / name / "%j",
            "--",
            *KNN,
            "-b",
            "120",
        )
        said[name] = (call.end(), call.text)
    for name, words in {
        "partition": "invalid partition",
        "feature": "Invalid feature",
        "memory": "Memory specification",
        "GPUs": "node configuration",
    }.items():
        code, text = said[name]
        assert (
            code == 2
            and text.startswith("error: SLURM refused the job: ")
            and words in text
            and "Traceback" not in text
        ), (name, text)
        assert text.count("\n") == 1 and not any(
            p.is_file() for p in (lab.folder / name).rglob("*")
        ), (name, text)
    code, text = said["nodes"]
    assert (
        code == 0 and re.search(r"PartitionNodeLimit|PartitionConfig", text) and "scancel" in text
    ), text
    lab.cluster.run("scancel", re.search(r"^job (\d+)", text, re.M)[1])
    return (
        (
            "exit 2 at once, one line with SLURM's reason, nothing left behind; 3 nodes: the reason"
            " why it pends"
        ),
        None,
    )


@scenario()
def c18_foreign_shell(lab: Lab, board: Board):
    """18 from another folder, out of a shell with RANK and the like"""
    elsewhere = lab.folder / "elsewhere"
    elsewhere.mkdir()
    env = lab.env(
        RANK="3",
        WORLD_SIZE="7",
        LOCAL_RANK="3",
        MASTER_PORT="1",
        MASTER_ADDR="nowhere",
        CUDA_VISIBLE_DEVICES="5",
        SLURM_NTASKS="9",
        SLURM_JOB_ID="987654",
    )
    del env["PYTHONPATH"]
    command = [
        sys.executable,
        str(ROOT / "launch" / "submit.py"),
        "pretrain",
        *TWO_NODES,
        "--wait",
        "--poll",
        "1",
        "--job-dir",
        "runs/%j",
        "--",
        *KNN,
    ]
    done = subprocess.run(
        command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (path for path in (elsewhere / "runs").iterdir() if path.is_dir())
    assert "CUDA_VISIBLE_DEVICES=, life" in (folder / f"{folder.name}_0_log.out").read_text()
    same_run(board.reference(), folder)
    return "as if the shell were clean", True


@scenario()
def c19_local(lab: Lab, board: Board):
    """19 --cluster local, two tasks, USR2 to the tasks"""
    nodes = shlex.split("--cluster local --gpus-per-node 0 --tasks-per-node 2 --timeout 20")
    job = lab.submit(nodes=nodes, faults=[{**HOLD, "rank": r, "name": f"hold{r}"} for r in (0, 1)])
    pids = [job.at("hold0"), job.at("hold1")]
    for rank in (0, 1):
        job.go(f"hold{rank}")
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    job.end()
    assert job.lives() == 2 and "asked to stop" in job.log()
    lab.complete(job, board.reference())
    return "restarted by submitit's controller; the same numbers as on SLURM", True


@scenario()
def c19_debug(lab: Lab, board: Board):
    """19 --cluster debug, one task in the process"""
    call = lab.command(
        "submit",
        "pretrain",
        "--cluster",
        "debug",
        "--gpus-per-node",
        "0",
        "--job-dir",
        lab.folder / "%j",
        "--",
        *SINGLE,
    )
    assert call.end() == 0, call.text
    same_run(board.reference("single"), lab.folder / "debug")
    call = lab.command(
        "submit",
        "pretrain",
        "--cluster",
        "debug",
        "--gpus-per-node",
        "0",
        "--job-dir",
        lab.folder / "%j",
        "--",
        *SINGLE,
        "--lr",
        "0.1",
    )
    assert call.end() == 2 and "(Pdb)" not in call.text and "--lr was" in call.text, call.text
    return "the same numbers as one task on SLURM; no debugger without a terminal", True


@scenario()
def c20_no_accounting(lab: Lab, board: Board):
    """20 a cluster without slurmdbd"""
    cluster = Cluster(lab.folder / "cluster", accounting=False).up()
    try:
        plain = Lab(cluster, lab.folder / "work")
        job = plain.submit(faults=[HOLD])
        job.at("hold")
        job.signal()
        job.end()
        interrupted_once(job)
        plain.complete(job, board.reference())
        doomed = plain.submit(faults=[{**HOLD, "do": "deaf", "name": "doomed"}])
        doomed.at("doomed")
        cluster.run("scancel", doomed.id)
        start = time.monotonic()
        said = doomed.end(1)
        seconds = time.monotonic() - start
        assert f"job {doomed.id} CANCELLED" in said and seconds < 60, (seconds, said)
    finally:
        cluster.down()
    return f"ran, requeued, resumed; --wait spoke of the scancel after {seconds:.0f} s", True


# ---- beyond them


@scenario()
def in_gan_training(lab: Lab, board: Board):
    """USR2 while the GAN is trained"""
    job = lab.submit(flags=GAN, faults=[{**HOLD, "at": "gan", "poll": 40}])
    job.at("hold")
    job.signal()
    job.end()
    assert job.lives() == 2 and "saved before the mining of epoch 2" in job.log(0, "err")
    lab.complete(job, board.reference("gan"))
    return "the round was given up, saved as before it, and made anew", True


@scenario()
def in_mining(lab: Lab, board: Board):
    """USR2 in mining, in the second round"""
    job = lab.submit(
        faults=[
            {**HOLD, "at": "mining", "poll": 1, "life": 1, "name": "second"},
            {**HOLD, "poll": 30},
        ]
    )
    job.at("hold")
    job.signal()
    job.at("second")
    job.signal()
    job.end()
    assert job.lives() == 3 and "saved before the mining of epoch 3" in job.log(0, "err")
    lab.complete(job, board.reference())
    return "interrupted in epoch 2, and again in the mining before epoch 3", True


@scenario()
def twice_in_a_row(lab: Lab, board: Board):
    """USR2 twice, the second before the first step"""
    job = lab.submit(faults=[HOLD, {**HOLD, "poll": 1, "life": 1, "name": "again"}])
    job.at("hold")
    job.signal()
    job.at("again")
    job.signal()
    said = job.end()
    assert job.lives() == 3 and "restarted 2x" in said
    lab.complete(job, board.reference())
    return "two requeues, went on at the next step each time", True


@scenario()
def full_folder(lab: Lab, board: Board):
    """the disk of the run folder is full"""
    folder = lab.folder / "disk"
    with small_disk(folder, 4):
        job = lab.submit(folder=folder)
        said = job.end(None)
        assert (
            "rank 0 on n1: error: " in said and "No space left" in said and f"log: {folder}" in said
        ), said
        assert job.lives() == 1 and not list(folder.glob("*" + checkpoint.TEMPORARY))
        reached = checkpoint.load(folder / "checkpoint_last.pth.tar")["isl"]["total"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        again = lab.submit(folder=folder)
        again.end()
        lab.complete(again, board.reference(), folder)
        assert reached >= 12
    return (
        (
            f"exit code 3, not requeued, the last file whole (step {reached}); with more room the"
            " same command completed it"
        ),
        True,
    )


@scenario()
def second_job(lab: Lab, board: Board):
    """a second job on a run folder that is in use"""
    job = lab.submit(faults=[HOLD])
    job.at("hold")
    second = lab.submit(folder=job.folder)
    said = second.end(2)
    assert "is in use by a run that is alive" in said and second.lives() == 1
    assert job.state() == "RUNNING"
    job.go("hold")
    job.end()
    lab.complete(job, board.reference())
    return "the second was refused with exit code 2, the first was not disturbed", True


@scenario()
def pipeline(lab: Lab, board: Board):
    """--then lincls,knn, the pretraining interrupted"""
    evaluations = [
        "--then",
        "lincls,knn",
        "--lincls",
        "--dataset digits --epochs 2 --lr 1 -j 0 --device cpu -b 128",
        "--knn",
        "--dataset digits --k 20 -j 0 --device cpu",
    ]
    job = lab.submit(*evaluations, faults=[HOLD])
    job.at("hold")
    later = [Job(lab, job.call, number) for number in (1, 2)]
    assert all(
        "Dependency" in lab.cluster.run("squeue", "-h", "-o", "%r", "-j", other.id)
        for other in later
    )
    job.signal()
    said = job.end()
    assert job.lives() == 2 and [other.folder for other in later] == [
        job.folder / "lincls",
        job.folder / "knn",
    ]
    assert all(
        f"job {other.id} COMPLETED" in said and (other.folder / "results.json").exists()
        for other in later
    ), said
    lab.complete(job, board.reference())
    lab.no_orphans(*later)
    return "both waited for the final success, then ran on its checkpoint", True


@scenario()
def pipeline_of_a_failure(lab: Lab, board: Board):
    """--then knn after a pretraining that fails"""
    job = lab.submit(
        "--then",
        "knn",
        nodes=ONE_NODE,
        flags=SINGLE,
        faults=[{"at": "step", "poll": 3, "do": "raise"}],
    )
    said = job.end(1)
    later = Job(lab, job.call, 1)
    assert f"job {job.id} FAILED" in said and f"job {later.id} CANCELLED" in said
    return "the evaluation was cancelled by SLURM, --wait ended", None


@scenario()
def cancelled(lab: Lab, board: Board):
    """scancel, and the same command again"""
    job = lab.submit(faults=[HOLD])
    job.at("hold")
    lab.cluster.run("scancel", job.id)
    said = job.end(None)
    assert (
        f"job {job.id} CANCELLED" in said and f"--job-dir {job.folder}" in said and job.lives() == 1
    ), said
    lab.no_orphans(job)
    assert checkpoint.load(job.folder / "checkpoint_last.pth.tar")["isl"]["total"] == 18
    again = lab.submit(folder=job.folder)
    again.end()
    lab.complete(again, board.reference(), job.folder)
    return "saved when TERM came, not requeued; the same command went on at step 19", True


@scenario()
def a_rank_that_does_not_come(lab: Lab, board: Board):
    """rank 1 does not join within --join-timeout 8"""
    job = lab.submit("--join-timeout", "8", faults=[{"at": "join", "rank": 1, "do": "sleep:100"}])
    start = time.monotonic()
    said = job.end(1)
    assert "\nrank 0 on n1: CannotJoin: 1 of 2 ranks did not join within 8 s: rank 1." in said, said
    lab.no_orphans(job)
    return (
        (
            f"one message that names rank 1; all ended within {time.monotonic() - start:.0f} s of"
            " the submission"
        ),
        None,
    )


@scenario()
def ports_in_use(lab: Lab, board: Board):
    """the job's first two ports belong to others"""
    job = lab.submit(
        faults=[{"at": "join", "rank": r, "do": "deaf", "name": f"join{r}"} for r in (0, 1)]
    )
    job.at("join0")
    ports = Place(job.id, 0, 0, 2, 0, 1, "n1", "n1").ports[:2]
    with (
        socket.create_server(("", ports[0])),
        socket.create_server(("", ports[1])),
    ):  # they take connections and say nothing
        for name in ("join0", "join1"):
            job.go(name)
        job.end()
    lab.complete(job, board.reference())
    return "the ranks met at the third", True
