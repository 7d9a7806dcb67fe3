"""The launcher without SLURM: command lines, sbatch file, reports, waiting, sweeps, rendezvous, and
jobs on this machine. With SLURM: tests/slurm.
"""

import ast
import dataclasses
import json
import os
import pickle
import random
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import (
    executors,
    job,
    options,
    rendezvous,
    report,
    slurm,
    status,
    submit,
    sweep,
    tables,
    watch,
)
from launch.job import Task
from launch.report import Entry
from launch.slurm import JobState
from moco_isl.errors import BadInput
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
DIGITS = shlex.split(
    "--dataset digits -a digits --mlp --moco-dim 32 --moco-k 256 --epochs 1 -b 128 -j 0 --device"
    " cpu --seed 1 -p 1 --max-steps 3"
)
CPU = shlex.split("--gpus-per-node 0 --tasks-per-node 2")


@pytest.fixture
def no_environment_left(monkeypatch):
    """What a launcher in this process sets is gone afterwards."""
    old = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(old)


# ---- command lines


def dry(capsys, *argv: str) -> str:
    assert submit.main([argv[0], "--dry-run", *argv[1:]]) == 0
    return capsys.readouterr().out


def test_a_dry_run_shows_all_and_touches_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = shlex.split(
        "pretrain --nodes 4 --gpus-per-node 8 --partition gpu --timeout 2880 --account a --qos q"
        " --constraint c --comment 'two words' --mem-gb 320 --cpus-per-task 12 --exclude n7 --setup"
        " 'module load cuda' --env A=b --sbatch gres=gpu:8 --container 'apptainer exec --nv x.sif'"
        " --srun=--mpi=none --signal-delay 90 --job-dir runs/%j"
    )
    text = dry(
        capsys,
        *asked,
        "--then",
        "knn",
        "--knn",
        "DIR --k 20",
        "--",
        "--mlp",
        "--lr",
        "0.12",
        "--batch-size",
        "1024",
        "DIR",
    )
    for line in (
        "nodes=4",
        "gpus-per-node=8",
        "ntasks-per-node=8",
        "partition=gpu",
        "time=2880",
        "account=a",
        "qos=q",
        "constraint=c",
        "comment='two words'",
        "mem=327680MB",
        "cpus-per-task=12",
        "exclude=n7",
        "gres=gpu:8",
        "signal=USR2@90",
        "requeue",
        f"output={tmp_path}/runs/%j/%j_0_log.out",
        "dependency=afterok:JOB_OF_PRETRAIN",
        "kill-on-invalid-dep=yes",
    ):
        assert f"#SBATCH --{line}\n" in text, line
    assert "module load cuda\n" in text and "export A=b\n" in text
    assert (
        '--mpi=none sh -c \'trap "" USR2; exec "$@"\' sh apptainer exec --nv x.sif python -u -m'
        " submitit.core._submit" in text
    )
    assert (
        "# lr: 0.12\n" in text
        and "# resume: auto\n" in text
        and f"# pretrained: {tmp_path}/runs/%j/checkpoint_last.pth.tar\n" in text
        and "# k: [20]\n" in text
    )
    assert list(tmp_path.iterdir()) == []


def test_older_names_and_a_command_of_moco_without_the_dashes(capsys):
    text = dry(
        capsys,
        *shlex.split(
            "pretrain --ngpus 2 --job_dir there/%j --use_volta32 -a resnet50 --lr 0.03 --batch-size"
            " 256 --dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1"
            " --rank 0 DIR"
        ),
    )
    assert (
        "#SBATCH --constraint=volta32gb\n" in text
        and "#SBATCH --gpus-per-node=2\n" in text
        and f"run folder {Path.cwd()}/there/%j" in text
    )
    assert "# lr: 0.03\n" in text and "# data: DIR\n" in text


def test_help_of_both(capsys):
    assert submit.main(["knn", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--gpus-per-node" in text and "--pretrained" in text and "%%" not in text


def test_launcher_and_scripts_share_no_flag():
    own = {s for a in submit.get_parser()._actions for s in a.option_strings} - {
        "-h",
        "--help",
        "--version",
    }
    for script in job.SCRIPTS:
        shared = own & {s for a in options.script_parser(script)._actions for s in a.option_strings}
        assert not shared, f"{script}: {shared} would be taken by the launcher when given before --"


@pytest.mark.parametrize(
    "argv, words",
    [
        ("walk", "expected pretrain, lincls, knn or detect"),
        ("pretrain --epohcs 3 DIR", "did you mean --epochs?"),
        ("pretrain", "no data"),
        ("pretrain --partitoin gpu DIR", "--partitoin"),
        ("pretrain --out x DIR", "say --job-dir x"),
        ("pretrain --resume nowhere.pth DIR", "no file at --resume 'nowhere.pth'"),
        (
            "pretrain --nodes 3 --gpus-per-node 8 DIR",
            "--batch-size 256 does not divide into 24 ranks",
        ),
        ("pretrain --nodes 0 DIR", "--nodes 0"),
        ("pretrain --tasks-per-node 2 --gpus-per-node 8 DIR", "one process a GPU"),
        ("pretrain --timeout 1 --signal-delay 60 DIR", "--signal-delay 60"),
        ("pretrain --cluster local --nodes 2 DIR", "--cluster slurm"),
        ("pretrain --cluster debug --gpus-per-node 0 --tasks-per-node 2 DIR", "--cluster local"),
        ("pretrain --env A DIR", "NAME=VALUE"),
        ("pretrain --then probe DIR", "lincls, knn"),
        ("pretrain --knn '--k 5' DIR", "--then does not name knn"),
        ('pretrain --then knn --knn "--k \'5" DIR', "No closing quotation"),
        ("pretrain --then knn --knn '--kk 5' DIR", "did you mean --k?"),
        ("lincls --then knn --pretrained x DIR", "--then follows a pretraining"),
        ("pretrain --cluster slurm --gpus-per-node 1 DIR", "no sbatch here"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(shlex.split(argv)) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err.startswith("error: ")
        and said.err.count("\n") == 1
        and words in said.err
    ), said
    assert list(tmp_path.iterdir()) == []


# ---- what reaches a shell

TEXTS = (
    "--name",
    "--partition",
    "--account",
    "--qos",
    "--comment",
    "--constraint",
    "--exclude",
    "--job-dir",
)
KEYED = ("--srun=--comment=", "--sbatch=comment=", "--env=A=")
SHELL = "a'b\"c $(touch X) `touch X`; touch X & touch X | touch X > X \\ # ${HOME} é"


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs a text by bash in an empty folder, srun being a stub: (the words srun was given, $A,
    what is there now).
    """
    tools, folder = tmp_path / "tools", tmp_path / "here"
    tools.mkdir()
    folder.mkdir()
    (tools / "srun").write_text(
        f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path}/words; printf %s "$A" > {tmp_path}/A\n'
    )
    (tools / "srun").chmod(0o755)
    monkeypatch.chdir(folder)

    def run(text: str) -> tuple[list[str], str, list[str]]:
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-e", "-c", text], env=env, cwd=folder, check=True, timeout=60)
        words = (tmp_path / "words").read_text().split("\0")[:-1]
        return words, (tmp_path / "A").read_text(), [p.name for p in folder.iterdir()]

    return run


def test_no_text_of_an_option_is_run(ran, tmp_path, capsys):
    argv = [word for flag in TEXTS for word in (flag, SHELL)] + [flag + SHELL for flag in KEYED]
    text = dry(
        capsys,
        "pretrain",
        *argv,
        "--gpus-per-node",
        "0",
        "--",
        *DIGITS,
        "--dist-url",
        "x\ntouch X\n",
    )
    for flag in (*TEXTS[1:-1], "--job-name"):
        assert f"#SBATCH {flag}={shlex.quote(SHELL)}\n" in text
    words, A, left = ran(text)  # also with the resolved flags that stand below it
    assert A == SHELL and left == []
    assert f"--comment={SHELL}" in words and words[-1] == f"{tmp_path}/here/{SHELL}"


@pytest.mark.parametrize("flag", [*TEXTS, *KEYED, "--container", "--python", "--sbatch", "--srun"])
@pytest.mark.parametrize("end", ["\n", "\r", "\0", "\x1b", "\x85", "\u2028", "\udcff"], ids=ascii)
def test_a_text_that_ends_its_line_is_refused(flag, end, capsys):
    given = [f"{flag}a{end}touch X"] if "=" in flag else [flag, f"a{end}touch X"]
    on_slurm = ["nofile", "--cluster", "slurm"]
    for main, argv in ((submit.main, ["pretrain", "--dry-run", *DIGITS]), (sweep.main, on_slurm)):
        assert main([*argv, *given]) == 2
        said = capsys.readouterr()
        assert (
            said.out == ""
            and said.err.count("\n") == 1
            and "in one line" in said.err
            and flag[:5] in said.err
        )


def test_a_name_that_is_no_utf_8_is_for_this_machine_alone(tmp_path, capsys):
    """sbatch takes a file of UTF-8."""
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    (tmp_path / "s.yaml").write_text("base: {dataset: digits}\npoints: [{name: a, seed: 1}]")
    argv = [str(tmp_path / "s.yaml"), "--dry-run", "--job-dir", folder]
    assert sweep.main(argv) == 0 and sweep.main([*argv, "--cluster", "local"]) == 0
    capsys.readouterr()
    assert sweep.main([*argv, "--cluster", "slurm"]) == 2
    assert "holds \\udcff: expected UTF-8 text" in capsys.readouterr().err


def test_a_folder_above_that_ends_its_line_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "a\ntouch X\n").mkdir()
    monkeypatch.chdir(tmp_path / "a\ntouch X\n")
    (Path.cwd() / "s.yaml").write_text("base: {dataset: digits}\npoints: [{name: a, seed: 1}]")
    assert submit.main(["pretrain", "--dry-run", *DIGITS]) == 2
    assert sweep.main(["s.yaml", "--dry-run", "--cluster", "slurm"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 2 and said.err.count("error: --job-dir") == 2


@pytest.mark.parametrize(
    "pair", ["A;touch X;B=1", "=1", "A", "1A=2", "A B=1", "$(touch X)=1", "Ä=1", "A-B=1", "A[0]=1"]
)
def test_a_name_of_the_environment_is_a_name(pair, capsys):
    assert submit.main(["pretrain", "--dry-run", f"--env={pair}", *DIGITS]) == 2
    assert capsys.readouterr().err.startswith(f"error: --env '{pair}': expected NAME=VALUE")


@pytest.mark.parametrize("pair", ["=1", "-x=1", "a b", "aé=1", "$(touch X)=1", ""])
def test_an_option_of_sbatch_has_a_name(pair, capsys):
    assert submit.main(["pretrain", "--dry-run", f"--sbatch={pair}", *DIGITS]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: --sbatch '{pair}': expected an option of sbatch"
    )


def test_setup_is_shell_and_runs_before_the_job(ran, capsys):
    setup = "if true\nthen\tA=$(echo from $HOME)\nfi; export A; touch X"
    _, A, left = ran(dry(capsys, "pretrain", "--setup", setup, *DIGITS))
    assert A == f"from {os.environ['HOME']}" and left == ["X"]


def test_the_commands_of_a_sweep_are_as_quoted_as_a_shell_needs_them(ran, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(
        yaml.safe_dump({"base": {"dataset": "digits"}, "points": [{"dist-url": SHELL}]})
    )
    assert sweep.main([str(tmp_path / "s.yaml"), "--dry-run"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line[0] != "#")
    words, _, left = ran(f"srun {line}")
    assert f"--dist-url={SHELL}" in words and left == []


@pytest.mark.parametrize(
    "given",
    [
        "--nodes -1",
        "--nodes 100001",
        f"--nodes {'9' * 400}",
        "--nodes " + "9" * 5000,
        "--tasks-per-node 0",
        "--poll 0",
    ]
    + [
        "--cpus-per-task 0",
        "--mem-gb nan",
        "--mem-gb inf",
        "--mem-gb 0",
        "--mem-gb -1",
        "--join-timeout nan",
    ]
    + [
        "--poll -1",
        "--poll nan",
        "--max-restarts -1",
        "--timeout 1e3",
        "--array-parallelism 0",
        "--nodes ²",
    ],
)
def test_a_number_out_of_range_is_one_line(given, capsys):
    flag, value = given.split()
    assert submit.main(["pretrain", "--dry-run", flag, value, *DIGITS]) == 2
    said = capsys.readouterr()
    assert flag in said.err and said.err.count("\n") == 1 and len(said.err) < 400 and said.out == ""
    if flag == "--poll":
        assert status.main(["nowhere", flag, value]) == 2 and flag in capsys.readouterr().err


def test_more_gpus_than_this_shell_may_see_are_refused(
    monkeypatch, tmp_path, capsys, no_environment_left
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    argv = [
        *"pretrain --cluster local --gpus-per-node 2 --job-dir".split(),
        str(tmp_path / "x"),
        *DIGITS,
    ]
    assert submit.main(argv) == 2 and "CUDA_VISIBLE_DEVICES shows 1" in capsys.readouterr().err


def test_a_job_folder_of_nobody_is_one_line(capsys):
    assert (
        submit.main(["pretrain", "--dry-run", "--job-dir", "~nobody-of-this-name/x", *DIGITS]) == 2
    )
    assert capsys.readouterr().err.startswith("error: --job-dir '~nobody-of-this-name/x': ")


def test_a_job_folder_that_cannot_be_is_one_line(tmp_path, capsys, no_environment_left):
    (tmp_path / "file").touch()
    argv = [
        *"pretrain --cluster local".split(),
        *CPU,
        "--job-dir",
        str(tmp_path / "file" / "run"),
        "--",
        *DIGITS,
    ]
    assert submit.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write into") and said.count("\n") == 1


def test_the_shell_of_another_job_is_not_submitted(monkeypatch):
    names = ["RANK", "MASTER_PORT", "CUDA_VISIBLE_DEVICES"]
    names += ["SLURM_NTASKS", "SLURM_CONF", "SBATCH_ACCOUNT"]
    for name in names:
        monkeypatch.setenv(name, "1")
    with options.clean_environment():
        left = {name for name in names if name in os.environ}
    assert left == {"SLURM_CONF", "SBATCH_ACCOUNT"} and os.environ["RANK"] == "1"


# ---- what became of a job


@pytest.fixture
def entry(tmp_path) -> Entry:
    return Entry(
        job="7",
        cluster="slurm",
        script="pretrain",
        folder=str(tmp_path),
        out=str(tmp_path),
        tasks=3,
        command=["submit.py"],
    )


def ends(entry: Entry, rank: int, facts: dict | None = None) -> None:
    """Leaves the record of a rank that has ended."""
    facts = {"rank": rank, "node": f"n{rank}", **(facts or {})}
    record = {"state": "succeeded", "time": 1.0, "code": 0, "error": "", **facts}
    job.end_file(Path(entry.folder), entry.job, rank).write_text(json.dumps(record))


def fails(entry: Entry, rank: int, error: str, when: float, code: int = 1) -> None:
    ends(entry, rank, {"state": "failed", "time": when, "code": code, "error": error})


def test_the_cause_comes_before_what_followed_from_it(entry):
    # noticed, and recorded, first
    fails(entry, 0, "RuntimeError: [..] Connection closed by peer [10.0.0.2]:1", 1.0)
    fails(entry, 1, "ValueError: boom", 2.0)
    entry.log(0).write_text(
        "srun: launch/slurm: Terminating StepId=7.0\nsrun: error: n2: task 2: Killed\n"
    )
    # rank 2 was only ended with the others
    assert [f.rank for f in report.failures(entry)] == [1, 2, 0]
    text = "\n".join(report.explain(entry, JobState("FAILED", exit_code="1:0")))
    assert text.index("rank 0 on n0") > text.index("ValueError: boom")


def test_a_rank_that_left_no_word_is_named_with_its_end(entry):
    fails(entry, 0, "DistBackendError: NCCL watchdog", 1.0)
    entry.log(0).write_text(
        "srun: error: n2: task 1: Killed\nsrun: error: n3: tasks 2: Exited with exit code 3\n"
    )
    first, second, third = report.failures(entry)
    assert (
        (first.rank, first.node) == (1, "n2")
        and "exit code 137, signal 9" in first.word
        and second.word == "ended with exit code 3"
        and third.rank == 0
    )


def test_what_an_earlier_life_left_in_the_log_is_no_cause(entry):
    entry.log(0).write_text("srun: error: n2: task 1: Killed\n=> life 2 of job 7\nfine\n")
    assert report.failures(entry) == []
    entry.log(0).write_text(
        "=> life 2 of job 7\n*** STEP 7.0 ON n1 CANCELLED AT 2026-11-21T08:45:50 DUE TO TIME LIMIT"
        " ***\nsrun: error: n2: task 1: Killed\n"
    )
    assert report.failures(entry) == []
    text = "\n".join(report.explain(entry, JobState("TIMEOUT")))
    assert "--signal-delay" in text and f"--job-dir {entry.folder}" in text


def test_the_rank_that_says_why_comes_first_of_those_that_end_with_a_code(entry):
    fails(entry, 1, "", 1.0, code=3)
    fails(entry, 0, "", 2.0, code=3)
    entry.log(0).write_text("Epoch 1\nerror: cannot write metrics.jsonl: No space left on device\n")
    assert [(f.rank, f.word) for f in report.failures(entry)] == [
        (0, "error: cannot write metrics.jsonl: No space left on device"),
        (1, "ended with exit code 3"),
    ]


@pytest.fixture
def forgotten(entry, monkeypatch) -> Entry:
    """A job that SLURM does not know any more."""
    monkeypatch.setattr(slurm, "ask", lambda job_id: None)
    report.write_entry(entry, entry.folder)
    return entry


def test_a_job_that_slurm_forgot_is_judged_by_how_its_ranks_ended(forgotten):
    assert report.state(forgotten).state == "UNKNOWN"
    for rank in range(3):
        assert report.state(forgotten).state == "UNKNOWN"
        ends(forgotten, rank)
    assert report.state(forgotten).state == "COMPLETED"
    for rank in range(3):
        ends(forgotten, rank, {"state": "interrupted", "code": 75})
    assert report.state(forgotten).state == "INTERRUPTED" and report.state(forgotten).final
    assert "saved and left" in report.explain(forgotten, report.state(forgotten))[0]
    fails(forgotten, 1, "ValueError: boom", 1.0)
    assert report.state(forgotten).state == "FAILED"


def test_a_job_whose_records_were_refused_is_judged_by_its_logs(forgotten):
    """As a full disk refuses them."""
    start = (
        "submitit INFO (2026-11-01 10:00:00,000) - Starting with JobEnvironment(job_id=7,"
        " global_rank=0(3))\n"
    )
    success = "submitit INFO (2026-11-01 10:05:00,000) - Job completed successfully\n"
    for rank in range(3):
        forgotten.log(rank, "out").write_text(start + "Epoch 0\n" + success)
    assert report.state(forgotten).state == "COMPLETED"
    # the last life did not come to its end
    forgotten.log(1, "out").write_text(start + success + start + "Epoch 0\n")
    assert report.state(forgotten).state == "UNKNOWN"


class Evil:
    """What makes a file when somebody unpickles it."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_no_pickle_of_a_job_folder_is_loaded(forgotten, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "UNKNOWN_FOR", 0)
    evil = pickle.dumps(Evil(tmp_path / "sprung"))
    for name in (
        "7_0_result.pkl",
        "7_1_result.pkl",
        "7_2_result.pkl",
        "7_submitted.pkl",
        "999999_0_result.pkl",
    ):
        (tmp_path / name).write_bytes(evil)
    for cluster in ("slurm", "local"):
        told = dataclasses.replace(forgotten, cluster=cluster, job="999999")
        report.write_entry(told, told.folder)
        assert status.main([str(tmp_path)]) == (cluster == "local") and status.main(
            [str(tmp_path), "--all"]
        ) in (0, 1)
        assert watch.outcome([told], watch.wait([told], 0)) == 1
    assert "UNKNOWN" in capsys.readouterr().out and not (tmp_path / "sprung").exists()
    pickle.loads(evil)
    assert (tmp_path / "sprung").exists()  # the trap was armed


def test_of_a_refused_submission_only_its_own_files_go_and_no_pickle_is_loaded(
    tmp_path, monkeypatch, capsys
):
    """Another one's pickle, and its sbatch file, come into the folder in that moment."""
    folder, tools = tmp_path / "runs", tmp_path / "tools"
    tools.mkdir()
    (tmp_path / "evil").write_bytes(pickle.dumps(Evil(tmp_path / "sprung")))
    refuse = (
        f"#!/bin/sh\ncp {tmp_path}/evil {folder}/other.pkl; touch"
        f" {folder}/.submission_file_other.sh\n"
    )
    (tools / "sbatch").write_text(refuse + "echo 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tools / "srun").touch()
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert (
        submit.main(
            ["pretrain", "--gpus-per-node", "0", "--job-dir", str(folder / "%j"), "--", *DIGITS]
        )
        == 2
    )
    assert "SLURM refused the job" in capsys.readouterr().err
    assert sorted(p.name for p in folder.iterdir()) == [".submission_file_other.sh", "other.pkl"]
    assert not (tmp_path / "sprung").exists()


def record(**changes) -> str:
    """The line of a submission as JSON, with some values changed; ... leaves one out."""
    good = {
        "job": "7",
        "cluster": "slurm",
        "script": "knn",
        "folder": "F",
        "out": "F",
        "tasks": 1,
        "command": ["c"],
    }
    return json.dumps({k: v for k, v in {**good, **changes}.items() if v is not ...})


BAD_RECORDS = {
    "": "no JSON",
    "{": "no JSON",
    "[" * 100_000: "no JSON",
    "[]": "expected names with values",
    record(tasks=...): "has no 'tasks'",
    record(tasks="2"): "tasks is '2'",
    record(tasks=0): "tasks is 0",
    record(tasks=10**400): "tasks is 1000",
    record(tasks=1.5): "tasks is 1.5",
    record(tasks=True): "tasks is True",
    record(job="--help"): "job is '--help'",
    record(job="../7"): "job is '../7'",
    record(job="7_1", cluster="local"): "job is '7_1'",
    record(job="0", cluster="local"): "job is '0'",
    record(job=7): "job is 7",
    record(cluster="debug"): "cluster is 'debug'",
    record(script="walk"): "script is 'walk'",
    record(folder=None): "folder is None",
    record(folder="a\0"): "folder is 'a\\x00'",
    record(out="a\0"): "out is 'a\\x00'",
    record(out="a\ud800"): "out is 'a\\ud800'",
    record(command="c"): "command is 'c'",
    record(command=[1]): "command[0] is 1",
    record(more=1): "more is unknown",
    record(**{"x\n": 1}): "is unknown",
}


@pytest.mark.parametrize("line", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_a_record_of_submissions_that_is_not_ours_is_one_line(line, tmp_path, capsys):
    (tmp_path / "launch.jsonl").write_text(f"{record()}\n{line}\n")
    assert status.main([str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == ""
    assert "launch.jsonl', line 2" in said.err and BAD_RECORDS[line] in said.err


@pytest.mark.parametrize("ranks", ["0-,", "--", ",", "0-30000000000", "0-9" + "9" * 5000])
def test_a_log_that_names_impossible_ranks_does_not_end_the_status(forgotten, ranks):
    forgotten.log(0).write_text(f"srun: error: n1: tasks {ranks}: Exited with exit code 1\n")
    forgotten.log(0, "out").write_text(f"life {'9' * 5000} of job 7\n")
    assert report.state(forgotten).state == "UNKNOWN" and report.failures(forgotten) == []
    assert report.restarts(forgotten, JobState("UNKNOWN")) == 0


def test_a_log_tells_only_of_ranks_that_the_job_has(forgotten):
    forgotten.log(0).write_text("srun: error: n1: tasks 0,2-999999: Exited with exit code 1\n")
    assert [failure.rank for failure in report.failures(forgotten)] == [0, 2]


def test_records_that_are_no_files_do_not_hold_the_status_up(forgotten, tmp_path, capsys):
    os.mkfifo(tmp_path / "metrics.jsonl")
    os.mkfifo(forgotten.log(0))
    os.mkfifo(job.end_file(tmp_path, "7", 0))
    assert (
        status.main([str(tmp_path)]) == 1 and "7_0_end.json' is a pipe" in capsys.readouterr().out
    )
    (tmp_path / "launch.jsonl").unlink()
    os.mkfifo(tmp_path / "launch.jsonl")
    assert status.main([str(tmp_path)]) == 2 and "is a pipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "facts",
    [
        {"state": "fine"},
        {"state": None},
        {"time": "now"},
        {"time": float("nan")},
        {"code": "1"},
        {"code": 10**30},
    ]
    + [{"node": 1}, {"error": ["x"]}, {"rank": -1}, {"rank": 0.5}, {"more": 1}],
)
def test_a_damaged_record_of_a_rank_counts_as_no_success_and_is_named(forgotten, facts):
    for rank in range(3):
        ends(forgotten, rank, facts if rank == 1 else {})
    found = report.state(forgotten)
    assert found.state == "FAILED"
    told = [line for line in report.explain(forgotten, found) if "7_1_end.json" in line]
    assert len(told) == 1 and next(iter(facts)) in told[0] and "\n" not in told[0]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "nan", "\ud800", '{"state": "succeeded"}', "[" * 100_000, "9" * 5000]
)
def test_a_record_of_a_rank_that_is_no_record_is_named(forgotten, text):
    job.end_file(Path(forgotten.folder), "7", 1).write_bytes(text.encode(errors="surrogatepass"))
    assert report.state(forgotten).state == "FAILED"
    assert "7_1_end.json" in report.explain(forgotten, JobState("FAILED"))[1]


def test_what_a_job_left_is_shown_without_its_control_characters(forgotten, tmp_path):
    fails(forgotten, 1, "ValueError: \x1b[2J\x07boom", 1.0)
    forgotten.log(1).write_bytes(b"\x1b]0;title\x07 \xff\n")
    text = report.explain(forgotten, JobState("FAILED")) + status.describe(
        forgotten, JobState("FAILED")
    )
    assert all(line.isprintable() for line in text) and any("\\x1b[2J" in line for line in text)


def test_odd_metrics_are_passed_over(tmp_path):
    odd = [
        {"epoch": "1"},
        {"loss": None},
        {"loss": float("nan")},
        {"loss": 10**400},
        {"knn": True},
        {"total": []},
    ]
    lines = [
        json.dumps({"kind": "step", "epoch": 1, "loss": 2.5}),
        "[]",
        "3",
        "[" * 10_000,
        "9" * 5000,
        '{"kind": []}',
    ]
    lines += [json.dumps({"kind": "step", **facts}) for facts in odd]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert report.progress(str(tmp_path)) == {"epoch": 1, "loss": 2.5}


def test_scontrol_and_sacct_are_read(tmp_path, monkeypatch):
    tools = {
        "scontrol": (
            "JobId=8 Restarts=2 JobState=NODE_FAIL Reason=None Requeue=1 ExitCode=0:9"
            " NodeList=n[1-2] ReqNodeList=(null) Comment=\\377 JobState=COMPLETED Restarts=x"
        ),
        "sacct": "9_1|CANCELLED by 0|0:15|n1",
    }
    for name, text in tools.items():
        job_id = "8" if name == "scontrol" else "9_1"
        (tmp_path / name).write_text(
            f"#!/bin/sh\ncase \"$*\" in *{job_id}*) printf '{text}\\n';; *) exit 1;; esac\n"
        )
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = slurm.ask("8")
    assert found == JobState("NODE_FAIL", "", 2, "0:9", "n[1-2]", True) and found.may_return
    assert (
        slurm.ask("9_1") == JobState("CANCELLED", "", None, "0:15", "n1") and slurm.ask("5") is None
    )


def test_waiting_sees_through_a_failed_node_and_ends_when_slurm_has_forgotten(
    entry, monkeypatch, capsys
):
    clock = iter(range(0, 10_000, 5))
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    states = [
        JobState("RUNNING"),
        JobState("NODE_FAIL", requeue=True),
        JobState("PENDING", "BeginTime", 1),
        JobState("RUNNING", "", 1),
        JobState("COMPLETED", "", 1),
    ]
    told = iter(states)
    monkeypatch.setattr(report, "state", lambda e: next(told))
    assert watch.outcome([entry], watch.wait([entry], 1)) == 0
    monkeypatch.setattr(report, "state", lambda e: JobState("NODE_FAIL", requeue=True))
    assert watch.wait([entry], 1)["7"].state == "NODE_FAIL"
    monkeypatch.setattr(report, "state", lambda e: JobState("UNKNOWN"))
    assert watch.outcome([entry], watch.wait([entry], 1)) == 1
    assert "neither a result nor an error" in capsys.readouterr().out


def test_status_without_a_job_is_one_line(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no launch.jsonl")


# ---- ranks find each other


def meet(rank: int, world: int, name: str, life: int, expected: int, seconds: float):
    old = dict(os.environ)
    place = rendezvous.Place(
        job=name,
        life=life,
        rank=rank,
        world=expected,
        local_rank=rank,
        local_world=expected,
        node=f"n{rank}",
        first_node="127.0.0.1",
    )
    try:
        store = rendezvous.join(place, seconds, lambda: False)
        found = {
            k: os.environ[k]
            for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        }
        store.set(f"bye{rank}", "1")
        store.wait([f"bye{r}" for r in range(world)])  # rank 0's store goes with its last holder
        return found, None
    except rendezvous.CannotJoin as error:
        return None, str(error)
    finally:
        os.environ.clear()
        os.environ.update(old)


def test_ranks_meet_past_ports_that_others_hold():
    ports = rendezvous.Place("test", 1, 0, 2, 0, 2, "n0", "127.0.0.1").ports
    with socket.create_server(("", ports[0])):  # takes connections, and is mute
        (first, _), (second, _) = run_ranks(2, meet, "test", 1, 2, 60.0)
    assert first["MASTER_PORT"] == second["MASTER_PORT"] == str(ports[1])
    assert (first["RANK"], second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == (
        "0",
        "1",
        "1",
        "2",
    )


def test_a_missing_rank_is_named_by_all_within_the_time():
    answers = run_ranks(2, meet, "missing", 0, 3, 1.0)
    assert all(
        found is None and "did not join within 1 s: rank 2." in error or "rank 0 ended" in error
        for found, error in answers
    )
    assert "rank 2" in answers[0][1]


def test_ports_differ_between_jobs_and_lives():
    ports = {
        (name, life): rendezvous.Place(name, life, 0, 1, 0, 1, "n", "n").ports[0]
        for name in ("41", "42", "43")
        for life in (0, 1, 2)
    }
    assert len(set(ports.values())) == len(ports) and all(
        10_000 <= port < 32_768 for port in ports.values()
    )


# ---- one life of a task


class FakeMain:
    """A script whose main does what it is told, in place of the real one."""

    def __init__(self, monkeypatch, act):
        self.calls, self.act = [], act
        monkeypatch.setattr(job.importlib, "import_module", lambda name: self)

    def main(self, flags, stop):
        self.calls.append(flags)
        return self.act(stop)


def in_debug(tmp_path, **settings) -> tuple[int, Task]:
    run = Task("pretrain", ["--lr", "1"], str(tmp_path / "debug"), **settings)
    old = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        return submit.debug(run), run
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("code", [0, 2, 3])
def test_mains_exit_code_is_the_jobs(code, tmp_path, monkeypatch, no_environment_left):
    fake = FakeMain(monkeypatch, lambda stop: code)
    assert in_debug(tmp_path)[0] == code
    assert fake.calls == [["--lr", "1", "--out", str(tmp_path / "debug"), "--resume", "auto"]]
    (record,) = (json.loads(file.read_text()) for file in tmp_path.rglob("*_end.json"))
    assert (record["state"], record["code"], record["error"]) == (
        "failed" if code else "succeeded",
        code,
        "",
    )
    assert not list(tmp_path.rglob("*.half-written"))


def test_a_run_that_was_asked_to_stop_leaves_that_on_record(
    tmp_path, monkeypatch, no_environment_left
):
    FakeMain(monkeypatch, lambda stop: 75)
    assert in_debug(tmp_path)[0] == 75
    (record,) = tmp_path.rglob("*_end.json")
    assert json.loads(record.read_text())["state"] == "interrupted"


def test_a_new_life_forgets_how_the_last_one_ended(tmp_path, monkeypatch, no_environment_left):
    seen = []

    def act(stop):
        env = job.submitit.JobEnvironment()
        seen.append(job.end_file(env.paths.folder, env.job_id, 0).exists())
        return 0

    FakeMain(monkeypatch, act)
    # the id of a job in this process is not known before: any such file is its own
    monkeypatch.setattr(job, "end_file", lambda folder, job_id, rank: folder / "0_end.json")
    (tmp_path / "debug").mkdir()
    (tmp_path / "debug" / "0_end.json").write_text("{}")
    assert in_debug(tmp_path)[0] == 0 and seen == [False]


def test_a_full_disk_leaves_no_half_a_record_and_does_not_change_the_end(
    tmp_path, monkeypatch, no_environment_left
):
    FakeMain(monkeypatch, lambda stop: 0)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job.os, "fsync", full)
    assert in_debug(tmp_path)[0] == 0
    assert not list(tmp_path.rglob("*_end.json"))


def test_signals_are_told_to_main_and_an_exception_is_recorded(
    tmp_path, monkeypatch, capsys, no_environment_left
):
    seen = []

    def act(stop):
        seen.append(stop())
        os.kill(os.getpid(), signal.SIGUSR2)
        seen.append(stop())
        raise ValueError("boom")

    FakeMain(monkeypatch, act)
    assert in_debug(tmp_path)[0] == 1 and seen == [False, True]
    (record,) = tmp_path.rglob("*_end.json")
    assert (
        json.loads(record.read_text())["error"] == "ValueError: boom"
        and "ValueError: boom" in capsys.readouterr().err
    )


def test_a_file_to_resume_from_gives_way_to_the_runs_own_checkpoint(
    tmp_path, monkeypatch, no_environment_left
):
    fake = FakeMain(monkeypatch, lambda stop: 0)
    in_debug(tmp_path, resume="old.pth.tar")
    (tmp_path / "debug" / "checkpoint_last.pth.tar").touch()
    in_debug(tmp_path, resume="old.pth.tar")
    in_debug(tmp_path, resume=None)
    assert [flags[4:] for flags in fake.calls] == [
        ["--resume", "old.pth.tar"],
        ["--resume", "auto"],
        [],
    ]


def test_the_next_life_is_made_of_what_the_constructor_set():
    run = Task("pretrain", ["--lr", "1"], "runs/%j", restarts=2)
    following = run.checkpoint().function
    assert (
        following.restarts == 3
        and following.out == "runs/%j"
        and pickle.loads(pickle.dumps(following)) == following
    )


def test_a_restart_waits_for_the_lock_of_its_last_life(tmp_path):
    (tmp_path / ".lock").touch()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        asked = iter([False, True])
        # looks once, finds it held, is asked to stop
        job._wait_for_lock(tmp_path, lambda: next(asked))
        with pytest.raises(StopIteration):
            next(asked)
        holder.stdin.close()
    job._wait_for_lock(tmp_path, lambda: False)


# ---- this machine in place of a cluster


def test_two_tasks_of_this_machine_train_together_and_status_tells(
    tmp_path, capfd, no_environment_left
):
    code = submit.main(
        [
            *"pretrain --cluster local".split(),
            *CPU,
            *"--timeout 5 --wait --poll 0.5 --job-dir".split(),
            str(tmp_path / "%j"),
            "--",
            *DIGITS,
        ]
    )
    said = capfd.readouterr().out
    assert code == 0, said
    (folder,) = tmp_path.iterdir()
    (entry,) = report.read_entries(folder)
    assert f"job {entry.job} COMPLETED" in said and "rank 1 of 2" in entry.log(1, "out").read_text()
    assert (folder / "checkpoint_last.pth.tar").exists() and "%j" not in folder.name
    assert status.main([str(folder)]) == 0
    assert "COMPLETED, restarts 0, epoch 0, loss" in capfd.readouterr().out


def test_a_job_of_this_machine_is_said_to_run_on_in_the_background(
    entry, monkeypatch, tmp_path, capsys
):
    """Submitting returns at once; the last line says so, and how to wait and to end the job."""
    here = dataclasses.replace(entry, cluster="local")
    monkeypatch.setattr(executors, "submit", lambda *_, **__: [here])
    monkeypatch.setattr(watch, "wait", lambda entries, poll: {"7": JobState("COMPLETED")})
    for started, state in (
        ("launch/submit.py", "python launch/status.py"),
        ("/home/x/bin/moco-isl", "moco-isl status"),
    ):
        monkeypatch.setattr(sys, "argv", [started])
        flags = ["pretrain", "--cluster", "local", *CPU, "--job-dir", str(tmp_path), "--", *DIGITS]
        assert submit.main(flags) == 0
        said = capsys.readouterr().out
        assert f"logs    {here.log(0, 'out')}" in said
        assert said.splitlines()[-1] == (
            f"=> the job runs on in the background: {state} {tmp_path} --wait stays until its end,"
            " kill 7 saves and ends it"
        )
        assert submit.main(["pretrain", "--wait", *flags[1:]]) == 0
        assert "background" not in capsys.readouterr().out


# ---- sweeps


def write(tmp_path, **plan) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(plan, sort_keys=False))
    return file


def test_the_points_of_a_sweep(tmp_path):
    plan = sweep.read_plan(
        write(
            tmp_path,
            base={"data": "DIR", "mlp": True, "lr": 0.1},
            grid={"moco-t": [0.1, 0.2], "cos": [True, False]},
            points=[{"name": "a b/c", "lr": 3}],
        )
    )
    assert list(plan["points"]) == [
        "moco-t=0.1,cos=True",
        "moco-t=0.1,cos=False",
        "moco-t=0.2,cos=True",
        "moco-t=0.2,cos=False",
        "a_b_c",
    ]
    flags = sweep.flags_of("pretrain", plan["points"]["moco-t=0.2,cos=False"])
    assert flags == ["DIR", "--mlp", "--lr=0.1", "--moco-t=0.2", "--no-cos"]
    assert plan["points"]["a_b_c"]["lr"] == "3"
    (tmp_path / "sweep.yaml").write_text(
        "base: {config: c.yaml, data: DIR, mlp: null, amp: off, schedule: [6, 8], wd: 1e-3,"
        " isl_hpe: 0}\npoints: [{cos: yes, seed: 010}, {name: b, amp: bf16, wd: null, schedule:"
        " [9]}]"
    )
    plan = sweep.read_plan(tmp_path / "sweep.yaml")
    first, second = (
        sweep.flags_of("pretrain", plan["points"][name]) for name in ("cos=True,seed=010", "b")
    )
    assert first == shlex.split(
        "DIR --config=c.yaml --amp=off --schedule 6 8 --wd=1e-3 --isl-hpe=0 --cos --seed=010"
    )
    assert second == shlex.split("DIR --config=c.yaml --amp=bf16 --schedule 9 --isl-hpe=0")


def test_every_point_of_a_sweep_is_run_with_each_seed(tmp_path):
    base = {"dataset": "digits", "init": "runs/start/moco,seed={seed}/last.pth.tar"}
    points = [{"name": "none", "miner": "none"}, {"miner": "knn"}]
    plan = sweep.read_plan(write(tmp_path, base=base, points=points, seeds=[0, 1]))
    names = ["none,seed=0", "none,seed=1", "miner=knn,seed=0", "miner=knn,seed=1"]
    assert list(plan["points"]) == names
    assert plan["points"]["miner=knn,seed=1"] == {
        "dataset": "digits",
        "init": "runs/start/moco,seed=1/last.pth.tar",
        "miner": "knn",
        "seed": "1",
    }


BAD_SWEEPS = [
    (
        "grids: {}",
        "grids is unknown: expected script, base, grid, points, seeds, columns, figures, judge",
    ),
    ("base: {lr: 1}", "neither grid nor points"),
    ("grid: {lr: 1}", "grid.lr is '1': expected a list"),
    ("grid: {lr: []}", "grid.lr is an empty list"),
    ("grid: [lr]", "grid is ['lr']: expected names with values"),
    ("grid: {lr: [{a: 1}]}", "grid.lr[0] is"),
    ("grid: {lr: [[[1]]]}", "grid.lr[0] is"),
    ("base: [1]", "base is ['1']: expected names with values"),
    ("base: {lr: {a: 1}}", "base.lr is"),
    ("points: {lr: 1}", "points is {'lr': '1'}: expected a list"),
    ("points: [lr]", "points[0] is 'lr': expected names with values"),
    ("points: [{lr: [[1]]}]", "points[0].lr is"),
    ("points: [{name: [a], lr: 1}]", "the name of point 1 is a list"),
    ("points: [{lr: 1}]\nfigures: {x: lr, y: knn}", "figures is"),
    ("points: [{lr: 1}]\nfigures: [{x: lr}]", "figures[0] has no 'y'"),
    ("points: [{lr: 1}]\nfigures: [{x: ../../lr, y: knn}]", "'../../lr' is no name"),
    ("points: [{lr: 1}]\nfigures: [{x: lr, y: $x$}]", "'$x$' is no name"),
    ("points: [{lr: 1}]\ncolumns: knn", "columns is 'knn': expected a list"),
    ("points: [{lr: 1}]\ncolumns: [[knn]]", "columns[0] is ['knn']: expected a text"),
    ("points: [{lr: 1}]\ncolumns: ['a|b']", "'a|b' is no name"),
    (
        "script: walk\npoints: [{lr: 1}]",
        "script is 'walk': expected one of detect, knn, lincls, pretrain",
    ),
    ("script: [knn]\npoints: [{lr: 1}]", "script is ['knn']"),
    ("points: [{name: a}, {name: a}]", "two points are named 'a'"),
    ("points: [{name: a b}, {name: a/b}]", "two points are named 'a_b'"),
    ("points: [{}]", "point 1 is named ''"),
    ("points: [{name: ..}]", "point 1 is named '..'"),
    ("points: [{name: jobs}]", "point 1 is named 'jobs'"),
    ("points: [{name: table.json}]", "point 1 is named 'table.json'"),
    (f"points: [{{name: {'a' * 201}}}]", "point 1 has a name of 201 characters"),
    ("points: [{learning: 1}]\nbase: {dataset: digits}", "no flag named 'learning'"),
    ("points: [{lr: 1}]\nseeds: 3", "seeds is '3': expected a list"),
    ("points: [{name: a, lr: 1}]\nseeds: [1, 1]", "two points are named 'a,seed=1'"),
    ("points: [{--lr: 1}]", "'--lr' is no name"),
    ("points: [{'l r': 1}]", "'l r' is no name"),
    ('points: [{"a\\nb": 1}]', "'a\\nb' is no name"),
    ("points: [{out: x}]", "out is not a setting"),
    ("base: {resume: x}\npoints: [{lr: 1}]", "resume is not a setting"),
    ("points: [{help: true}]", "no flag named 'help'"),
    ("points: [{mlp: maybe}]", "mlp is a switch: expected true or false"),
    ("points: [{data: --download}]", "data is '--download'"),
    ("points: [{data: {a: b}}]", "points[0].data is {'a': 'b'}"),
    ("points: [{config: [a, b]}]", "config: expected one path"),
    ("points: [{data: DIR, wd: 1, weight-decay: 2}]", "wd and weight-decay are one flag"),
    ('points: [{name: a, dist-url: "x\\ny"}]', "holds \\n: expected UTF-8 text in one line"),
    ("points: [{lr: x, dataset: digits}]", "--lr x: expected a number"),
    (f"grid: {{{', '.join(f'a{i}: [1, 2]' for i in range(60))}}}", "more than 10000 combinations"),
    ("a: &a [1, 1]\nb: &b [*a, *a]", "anchors (&) and aliases (*) are not taken"),
    ("- a", "it is ['a']: expected names with values"),
    ("", "it is None: expected names with values"),
    ("points: [", "cannot read"),
    ("x" * (2**20 + 1), "more than 1048576 bytes"),
]


@pytest.mark.parametrize(("text", "words"), BAD_SWEEPS, ids=range(len(BAD_SWEEPS)))
def test_a_bad_sweep_is_one_line(text, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(text)
    assert sweep.main(["sweep.yaml"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.out == "", said
    assert words in said.err and len(said.err) < 400, said.err
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_sweep_whose_folder_cannot_be_made_starts_nothing(tmp_path, capsys, no_environment_left):
    (tmp_path / "file").touch()
    sweep_of = write(tmp_path, base={"dataset": "digits"}, points=[{"name": "a", "seed": 1}])
    for more in ([], ["--cluster", "local"], ["--cluster", "slurm"]):
        assert sweep.main([str(sweep_of), "--job-dir", str(tmp_path / "file"), *more]) == 2
        said = capsys.readouterr()
        assert "file is a file" in said.err and said.err.count("\n") == 1 and said.out == ""
    argv = [
        *"pretrain --cluster debug --gpus-per-node 0 --job-dir".split(),
        str(tmp_path / "file"),
        *DIGITS,
    ]
    assert submit.main(argv) == 2 and "file is a file" in capsys.readouterr().err


def test_a_job_that_could_not_be_noted_is_told_and_runs_on(entry, tmp_path, capsys):
    (tmp_path / "launch.jsonl").mkdir()
    executors.note(entry, str(tmp_path))
    assert capsys.readouterr().err.startswith("warning: job 7 is submitted, but not noted in ")


def test_a_sweep_that_is_no_file_is_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "nowhere", "n" * 300):
        assert sweep.main([str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def test_of_linear_classifiers_the_chosen_one_is_shown(tmp_path):
    """Not the best on the images that judge it."""
    rows = [{"layer": "backbone", "lr": 1.0, "top1": 9.0, "chosen": True}]
    rows += [{"layer": "backbone", "lr": 30.0, "top1": 11.0, "chosen": False}]
    (tmp_path / "results.json").write_text(json.dumps({"classifiers": rows, "few_labels": []}))
    assert tables.results("lincls", tmp_path) == {"layer": "backbone", "lr": 1.0, "top1": 9.0}


@pytest.mark.parametrize(
    "argv",
    [
        "pretrain -- --dataset digits",
        "lincls -- --pretrained x --dataset digits --lr 1 3",
        "knn -- --pretrained x --dataset digits",
        "detect -- x --data digits",
    ],
)
def test_every_script_can_be_submitted(argv, capsys):
    script, _, flags = argv.partition(" ")
    assert submit.main([script, "--dry-run", "--gpus-per-node", "2", *flags.split()]) == 0
    said = capsys.readouterr().out
    assert f"# ---- {job.SCRIPTS[script]}, 1 x 2 tasks" in said


def test_of_a_detector_its_ap_is_shown(tmp_path):
    facts = {"AP": 41.5, "AP50": 70.0, "AP75": None, "classes": [{"class": "cat", "AP": 41.5}]}
    (tmp_path / "results.json").write_text(json.dumps(facts))
    assert tables.results("detect", tmp_path) == {"AP": 41.5, "AP50": 70.0}


def test_a_point_whose_results_are_none_of_ours_is_one_line(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(
        "script: knn\nbase: {dataset: digits}\npoints: [{name: a, k: 5}]"
    )
    out = tmp_path / "all" / "a"
    out.mkdir(parents=True)
    command = [str(tmp_path / "s.yaml"), "--job-dir", str(tmp_path / "all"), "--table"]
    odd = (
        {"top1": "x"},
        {"top1": None},
        {"top1": 10**400},
        {"top1": 5.0, "feature": "a|b\x1b", "k": [1]},
    )
    (out / "results.json").write_text(json.dumps({"results": odd}))
    assert sweep.main(command) == 0 and "| a | 5 | 5 | a\\|b\\x1b |" in capsys.readouterr().out
    for text in ("[]", "{", '{"results": 1}', '{"results": [1]}', "9" * 5000, "[" * 100_000):
        (out / "results.json").write_text(text)
        assert sweep.main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and "results.json" in said


def test_a_sweep_on_this_machine_writes_a_folder_a_point_and_one_table(
    tmp_path, monkeypatch, capsys
):
    script = (
        "import json, sys; out, T = sys.argv[1:]; line = {'kind': 'epoch', 'epoch': 0, 'loss':"
        " float(T), 'knn': 50}; "
    )
    script += "open(out + '/metrics.jsonl', 'a').write(json.dumps(line) + '\\n'); "
    script += "sys.exit(float(T) > 0.2)"
    monkeypatch.setattr(
        sweep,
        "_command",
        lambda name, flags, out: [
            sys.executable,
            "-c",
            script,
            str(out),
            flags[-1].removeprefix("--moco-t="),
        ],
    )
    file = write(
        tmp_path,
        base={"dataset": "digits", "batch-size": 128},
        grid={"moco-t": [0.1, 0.2, 0.3]},
        figures=[{"x": "moco-t", "y": "loss"}],
    )
    # the last point failed, the others ran
    assert sweep.main([str(file), "--job-dir", str(tmp_path / "all")]) == 1
    said = capsys.readouterr()
    assert (
        "moco-t=0.3 ended with exit code 1" in said.err
        and "| moco-t=0.1 | 0.1 | 0 | 0.1 | 50 |" in said.out
    )
    assert [row["loss"] for row in json.loads((tmp_path / "all" / "table.json").read_text())] == [
        0.1,
        0.2,
        0.3,
    ]
    assert (tmp_path / "all" / "curve_0_moco-t.svg").stat().st_size > 1000


def test_a_table_is_written_over_tables_only_and_whole(tmp_path, monkeypatch, capsys):
    file = write(
        tmp_path,
        points=[{"name": "a", "lr": 1}],
        base={"dataset": "digits"},
        figures=[{"x": "lr", "y": "loss"}],
    )
    (tmp_path / "all" / "a").mkdir(parents=True)
    (tmp_path / "all" / "a" / "metrics.jsonl").write_text(
        '{"kind": "epoch", "epoch": 0, "loss": 0.5}\n'
    )
    argv = [str(file), "--job-dir", str(tmp_path / "all"), "--table"]
    assert sweep.main(argv) == sweep.main(argv) == 0
    written = {
        path.name: path.read_bytes() for path in (tmp_path / "all").iterdir() if path.is_file()
    }
    assert set(written) == {"table.md", "table.json", "curve_0_lr.svg"}
    with monkeypatch.context() as patched:
        patched.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert sweep.main(argv) == 3 and "No space left on device" in capsys.readouterr().err
    assert written == {
        path.name: path.read_bytes() for path in (tmp_path / "all").iterdir() if path.is_file()
    }
    monkeypatch.setattr(sweep, "run_here", lambda *_: pytest.fail("it has begun"))
    for name in written:
        (tmp_path / "all" / name).write_text("<?xml the user's own")
        assert (
            sweep.main(argv[:-1]) == 2
            and f"{name}' is there already and is none of this command's" in capsys.readouterr().err
        )
        (tmp_path / "all" / name).write_bytes(written[name])


def test_a_curve_has_the_mean_and_spread_of_equal_settings():
    rows = [
        {"r": 1, "y": 2.0},
        {"r": 1, "y": 4.0},
        {"r": 0.5, "y": 1.0},
        {"y": 9.0},
        {"r": 2, "y": None},
    ]
    assert tables.points_of(rows, "r", "y") == [(0.5, 1.0, 0.0), (1, 3.0, pytest.approx(2**0.5))]


# ---- files that somebody damaged

SWEEP = """script: pretrain
base: {dataset: digits, mlp: true, config: c.yaml, schedule: [6, 8]}
grid: {lr: [0.1, 1e-2], seed: [0, 1]}
points: [{name: a b, cos: off, wd: null}]
columns: [loss, knn]
figures: [{x: lr, y: knn}]
"""
PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"\n",
    b"[",
    b"{",
    b'"',
    b"'",
    b"-",
    b":",
    b"&a ",
    b"*a",
    b"!x ",
    b"null",
    b"[]",
    b"{}",
]
PIECES += [b"true", b"-1", b"1e999", b"NaN", b"..", b"\\ud800", "\u2028".encode(), b"9" * 400]


def mutations(text: str, count: int):
    """`count` versions of a file, each with one to three pieces of it replaced."""
    draw = random.Random(0)
    for _ in range(count):
        content = text.encode()
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(content) + 1)
            content = (
                content[:start]
                + draw.choice(PIECES)
                + content[start + draw.choice([0, 0, 1, 4, 30]) :]
            )
        yield content


def read_sweep(file: Path) -> None:
    plan = sweep.read_plan(file)
    for settings in plan["points"].values():
        options.script_parser(plan["script"]).parse_args(sweep.flags_of(plan["script"], settings))


@pytest.mark.parametrize("what", ["sweep", "submissions", "end", "results", "metrics"])
def test_a_damaged_file_is_read_or_refused_in_one_line(what, entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "ask", lambda job_id: None)
    (tmp_path / "c.yaml").write_text("epochs: 3")
    row = {"feature": "fc", "k": 20, "top1": 50.5}
    step = {"kind": "epoch", "epoch": 1, "loss": 2.5, "knn": 50.0}
    (tmp_path / "s.yaml").write_text(SWEEP)
    (tmp_path / "results.json").write_text(json.dumps({"results": [row] * 2}))
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(step)}\n" * 3)
    report.write_entry(entry, tmp_path)
    ends(entry, 0)
    name, read = {
        "sweep": ("s.yaml", read_sweep),
        "submissions": ("launch.jsonl", lambda file: status.find(tmp_path, False)),
        "end": ("7_0_end.json", lambda file: status.describe(entry, report.state(entry))),
        "results": ("results.json", lambda file: tables.results("knn", tmp_path)),
        "metrics": ("metrics.jsonl", lambda file: status.describe(entry, JobState("RUNNING"))),
    }[what]
    file = tmp_path / name
    read(file)
    refused = 0
    for content in mutations(file.read_text(), 200):
        file.write_bytes(content)
        try:
            read(file)
        except BadInput as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500, content
    assert refused == 0 if what in ("end", "metrics") else 50 < refused < 200


# ---- the house


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "launch" / "recipes").glob("queue_*.yaml")), ids=lambda p: p.stem
)
def test_recipes_are_command_lines_of_the_script(recipe):
    as_typed = lambda value: [str(x) for x in value] if isinstance(value, list) else value
    args = options.parse_script(
        "pretrain", ["--config", str(recipe), "DIR"], nodes=1, tasks_per_node=8
    )
    content = yaml.safe_load(recipe.read_text())
    assert (
        all(
            as_typed(getattr(args, name.replace("-", "_"))) == as_typed(value)
            for name, value in content.items()
            if name not in ("wd", "config")
        )
        and args.data == "DIR"
    )


def test_the_launcher_has_no_means_to_unpickle():
    """submitit itself does, on the nodes.

    Of its objects here, what loads a pickle is not called.
    """
    unpickling = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    loading = {"load", "pickle_load", "submission", "result", "wait", "done"}
    for file in (ROOT / "launch").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else []
            )
            assert not unpickling & {*names, getattr(node, "module", None)}, file
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in loading
            ):
                assert ast.unparse(node.func) in {
                    "watch.wait",
                    "child.wait",
                }, f"{file}: {ast.unparse(node)}"


def test_nothing_imports_the_launcher():
    for file in [*(ROOT / "moco_isl").rglob("*.py"), *ROOT.glob("main_*.py")]:
        names = set()
        for node in ast.walk(ast.parse(file.read_text())):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        assert not {name for name in names if name.split(".")[0] == "launch"}, file


@pytest.mark.parametrize("command", ["status", "submit"])
def test_a_command_for_the_head_node_does_not_load_torch(command):
    """It takes seconds. What reads records and checks shapes has to do without."""
    code = f"import sys, launch.{command}, launch.report; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode
        == 0
    )
