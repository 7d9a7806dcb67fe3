"""Signals set a flag, ranks agree on the step, what was reached is saved, 75 comes out; and nothing
hangs when somebody dies.
"""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moco_isl.errors import BadInput, Interrupted, RunFailed
from moco_isl.run import exits, ranks, signals
from moco_isl.run.signals import SIGNALS, Stop
from tests.kill_and_resume import setting
from tests.ranks import run_ranks
from tests.runs import DIGITS, SERVER, Kill, Running, children, differences, photos, run, wait_until
from tests.test_bad_input import ask

ROOT = Path(__file__).parent.parent
LONG = [*DIGITS, "--epochs", "1000", "--save-every", "5"]


# ---- the flag ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_only_sets_a_flag_and_the_old_handler_comes_back(number, capfd):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.here() and stop.agreed()
        with pytest.raises(Interrupted):
            stop.tick()
        with pytest.raises(Interrupted):
            list(stop.watch([1, 2], 2))
        assert f"=> {number.name}: saving and leaving at the next step" in capfd.readouterr().out
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            stop.here()


def test_a_launchers_own_question_takes_no_handlers():
    before, asked = signal.getsignal(signal.SIGTERM), []
    with Stop(lambda: len(asked) > 2) as stop:
        assert signal.getsignal(signal.SIGTERM) is before
        assert list(stop.watch([1, 2], 2)) == [1, 2]
        asked += [1, 2, 3]
        assert stop.agreed()


def test_signals_blocked_before_are_let_in():
    """As in a rank just spawned: one that came meanwhile is neither lost nor deadly."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # sent to the process, a thread that some other test left would take it, and die
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
    with Stop() as stop:
        assert stop.here()


def test_a_signal_while_ranks_are_being_started_is_passed_on(monkeypatch):
    """Though the main thread blocks it, so that any other thread may be the one that takes it."""
    done, sent, kill = threading.Event(), [], os.kill
    other = threading.Thread(target=done.wait)
    other.start()

    def start(*_, **__):
        kill(os.getpid(), signal.SIGUSR1)
        return SimpleNamespace(processes=[SimpleNamespace(pid=12, is_alive=lambda: True)])

    monkeypatch.setattr(torch.multiprocessing, "start_processes", start)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(ranks, "_ends", lambda *_: [])
    monkeypatch.setattr(ranks, "_judge_ends", lambda *_: None)
    before = signal.getsignal(signal.SIGUSR1)
    try:
        ranks._spawn(
            None,
            SimpleNamespace(
                multiprocessing_distributed=True,
                nproc_per_node=1,
                gpu=None,
                dist_url="env://",
                device="cpu",
            ),
            (),
            None,
        )
    finally:
        done.set()
        other.join()
    assert sent == [(12, signal.SIGUSR1)] and signal.getsignal(signal.SIGUSR1) is before


def _one_was_asked(rank, world):
    with Stop(lambda: rank == 1) as stop:
        agreed = stop.agreed()
    seen, polls = [], [0]

    def later():
        polls[0] += 1
        return rank == 0 and polls[0] > 3

    with Stop(later) as stop:
        try:
            # rank 0 has fewer, and goes on asking
            for batch in stop.watch(range(2 if rank == 0 else 5), 5):
                seen.append(batch)
            seen.append("end")
        except Interrupted:
            seen.append("interrupted")
    return agreed, seen


def test_ranks_agree_though_one_was_asked_and_has_fewer_batches():
    assert run_ranks(2, _one_was_asked) == [
        (True, [0, 1, "interrupted"]),
        (True, [0, 1, 2, "interrupted"]),
    ]


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.here() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_said_to_a_terminal_that_has_gone_goes_nowhere():
    master, slave = pty.openpty()
    waits, gone = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            os.close(gone)
            os.close(master)
            # until the parent has closed the other end of the terminal too: writing raises EIO from
            # then on
            os.read(waits, 1)
            os.dup2(slave, 1)
            os.dup2(slave, 2)
            signals.say("=> SIGHUP")
            os.write(1, b"more")
            os.write(2, b"more")
            os._exit(0)
        os._exit(1)
    for descriptor in (slave, master, waits, gone):
        os.close(descriptor)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, stage, number, rank",
    [
        ("one process", "epoch", signal.SIGTERM, 0),
        ("one process", "GAN", signal.SIGHUP, 0),
        ("one process", "mining", signal.SIGINT, 0),
        ("one process", "save", signal.SIGUSR2, 0),
        ("two ranks", "epoch", signal.SIGTERM, 1),
        ("two ranks", "GAN", signal.SIGUSR2, 0),
        ("two ranks", "mining", signal.SIGUSR1, 1),
    ],
)
def test_a_signal_saves_leaves_with_75_and_the_run_goes_on_exactly(
    tmp_path, name, stage, number, rank
):
    way, out, log = setting(name), tmp_path / "out", tmp_path / "log"
    stopped = Running(
        [*way.argv, "--out", out], log, ranks=way.ranks, kill=(rank, Kill(stage, 2, 0.005, number))
    )
    assert set(stopped.codes()) == {75}, stopped.said()
    assert (
        len(re.findall("=> interrupted: saved (at|before)", stopped.said())) == 1
        and "Traceback" not in stopped.said()
    )
    run([*way.argv, "--out", out, "--resume", "auto"], log, ranks=way.ranks)
    assert differences(way.whole, out) == []


def test_what_is_said_with_stdout_closed_goes_into_no_file(tmp_path):
    """The lowest free descriptor is 1, which the next file to be opened would get."""
    flags = [*LONG, "--knn-every", "0", "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        ["sh", "-c", 'exec "$0" "$@" >&- 2>&-', sys.executable, "main_moco_isl.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        metrics = tmp_path / "out" / "metrics.jsonl"
        wait_until(
            lambda: (metrics.exists() and metrics.stat().st_size) or process.poll() is not None
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert all(json.loads(line)["kind"] for line in metrics.read_text().splitlines())
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "checkpoint_last.pth.tar",
        "metrics.jsonl",
    }


def test_a_second_run_on_a_live_folder_refuses(tmp_path):
    first = Running([*LONG, "--out", tmp_path / "out"], tmp_path / "log")
    first.wait_for("Epoch: [0]")
    for more in ([], ["--resume", "auto"]):
        code, _, err = ask([*LONG, "--out", str(tmp_path / "out"), *more])
        assert code == 2 and (
            "in use by a run that is alive" in err or "holds a run already" in err
        )
    first.signal(signal.SIGTERM)
    assert first.codes() == [75]
    assert (
        ask([*LONG, "--out", str(tmp_path / "out"), "--resume", "auto", "--max-steps", "1"])[0] == 0
    )


def test_the_lock_dies_with_the_main_process_and_not_with_its_workers(tmp_path):
    """Workers whose parent was killed look up only every few seconds; here they cannot look up at
    all.
    """
    flags = [
        *photos(tmp_path / "photos"),
        *"--epochs 1000 -j 1 --out".split(),
        tmp_path / "out",
        "--save-every",
        "1",
    ]
    first = Running(flags, tmp_path / "log")
    first.wait_for("Epoch: [0]")
    worker = first.children()[0]
    os.kill(worker, signal.SIGSTOP)
    try:
        first.signal(signal.SIGKILL)
        assert first.codes() == [-9] and Path(f"/proc/{worker}").exists()
        run([*flags, "--resume", "auto", "--max-steps", "1"], tmp_path / "log2")
    finally:
        os.kill(worker, signal.SIGKILL)
    assert "already finished" in (tmp_path / "log2").read_text()


# ---- who ended, and who was the cause ------------------------------------------------------------


def _end(how):
    if how == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        signal.pause()
    os._exit(how) if how >= 0 else os.kill(os.getpid(), -how)


def _started(*hows):
    processes = [SERVER.Process(target=_end, args=(how,)) for how in hows]
    for process in processes:
        process.start()
    return processes


def test_once_one_has_failed_the_others_are_ended(monkeypatch):
    monkeypatch.setattr(ranks, "GRACE", 0.1)
    ends = ranks._ends(_started("hang", 3, "hang"), None, None)
    assert ends[0] == (1, 3) and sorted(ends[1:]) == [(0, -9), (2, -9)]


def test_a_launchers_stop_reaches_the_ranks():
    passed, processes = [], _started("hang", "hang")

    def pass_on(number):
        passed.append(number)
        for process in processes:
            process.kill()

    assert sorted(ranks._ends(processes, lambda: True, pass_on)) == [
        (0, -9),
        (1, -9),
    ] and passed == [signal.SIGTERM]


@pytest.mark.parametrize(
    "ends, error, words",
    [
        ([(0, 0), (1, 0)], None, ""),
        (
            [(0, ranks.LOST), (1, -9)],
            RunFailed,
            "process 1 of 2 was ended by SIGKILL, and the others were stopped",
        ),
        ([(1, 1), (0, -9)], RunFailed, "process 1 of 2 ended with exit code 1"),
        ([(0, ranks.LOST), (1, ranks.LOST)], RunFailed, "process 0 of 2 lost the others"),
        ([(0, ranks.LOST), (1, 3)], RunFailed, "^$"),
        ([(1, 2), (0, 2)], BadInput, "^$"),
        ([(0, 75), (1, 75)], Interrupted, "^$"),
        ([(0, 130), (1, 130)], KeyboardInterrupt, "^$"),
    ],
)
def test_the_first_to_fail_is_the_cause_unless_it_only_lost_another(ends, error, words):
    if error is None:
        return ranks._judge_ends(ends, 2)
    with pytest.raises(error, match=words):
        ranks._judge_ends(ends, 2)


def _one_fails(rank, world):
    def fails():
        if rank == 1:
            raise BadInput("only rank 1 has it wrong")
        return rank

    try:
        return ranks.together(fails)
    except BadInput as error:
        said = str(error)
    return said, ranks.together(lambda: rank), ranks.on_main(lambda: f"of rank {rank}")


def test_what_one_rank_has_wrong_is_said_by_rank_0_for_all():
    assert run_ranks(2, _one_fails) == [("only rank 1 has it wrong", 0, "of rank 0"), ("", 1, None)]


def test_ctrl_c_twice_ends_with_130_and_a_line(capsys):
    def script(argv, stop):
        raise KeyboardInterrupt

    assert exits.exit_code(script) == 130
    assert (
        capsys.readouterr().err
        == "=> interrupted: at once, without saving; --resume auto goes on from the last"
        " checkpoint\n"
    )


def test_a_defect_keeps_its_traceback():
    def script(argv, stop):
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        exits.exit_code(script)


# ---- ranks started by the script, and by torchrun ------------------------------------------------


def test_ranks_that_the_script_starts(tmp_path):
    """Ctrl-C as a terminal sends it, to all at once and so early that the ranks are still
    importing: they save and 75 comes out. Then one is killed.
    """
    flags = [
        *LONG,
        *"--multiprocessing-distributed --nproc-per-node 2 --out".split(),
        tmp_path / "out",
        "--resume",
        "auto",
    ]
    early = Running(flags, tmp_path / "early")
    early.wait_until(lambda: len(early.children()) == 2)
    for pid in (*early.children(), early.processes[0].pid):
        os.kill(pid, signal.SIGINT)
    assert early.codes() == [75], early.said()
    assert [line for line in early.said().splitlines() if "=> interrupted" in line] == [
        "=> interrupted: saved at epoch 0, step 1 of 7: go on with --resume auto"
    ]

    late = Running(flags, tmp_path / "late")
    late.wait_for("Epoch: [0]")
    os.kill(late.children()[1], signal.SIGKILL)
    assert late.codes(timeout=60) == [3]
    errors = [line for line in late.said().splitlines() if not line.startswith(("=> ", "Epoch:"))]
    assert errors == [
        "error: process 1 of 2 was ended by SIGKILL, and the others were stopped. Resume with"
        " --resume auto"
    ]


def test_a_rank_of_torchrun_is_killed(tmp_path):
    log = tmp_path / "log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        *"-m torch.distributed.run --standalone --nproc-per-node 2 main_moco_isl.py".split(),
        *LONG,
        "--out",
        tmp_path / "out",
    ]
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*map(str, command)], stdout=file, stderr=file, env=environment, cwd=ROOT
        )
    try:
        wait_until(lambda: "Epoch: [0]" in log.read_text() or process.poll() is not None)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        assert process.wait(90) != 0
    finally:
        for pid in (*children(process.pid), process.pid) if process.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
    said = log.read_text()
    assert "error: rank 0 lost another rank, which has ended" in said
    assert "Signal 9 (SIGKILL) received by PID" in said
    assert (
        ask([*LONG, "--out", str(tmp_path / "out"), "--resume", "auto", "--max-steps", "1"])[0] == 0
    )
