"""The pack for a GPU: what it writes survives a cut, its parts cannot hurt each other, and a CPU
can rehearse all of it.
"""

import json
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks.pack import __main__ as pack
from benchmarks.pack import proof, science
from benchmarks.pack.record import Context, Record, TimeUp, alarm
from moco_isl.run.backbone import load_backbone

ROOT = Path(__file__).parent.parent


def record(folder, **plan) -> Record:
    return Record(folder, time.time(), plan)


# ---------------------------------------------------------------- what is written


def test_the_table_has_every_row_and_names_what_is_missing(tmp_path):
    rows = record(tmp_path, figures=["a step", "a round"], science=["none"])
    rows.add("figures", "a step", value=1.5, unit="ms", low=1.0, high=float("nan"), n=3)
    rows.add("proof", "kernels", ok=False, said="off by 1")
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"part": "figures", "what": "cut o')  # the machine was taken away
    table = (tmp_path / "table.txt").read_text()
    assert "not done: a round" in table and "not done: none" in table and "a step" in table
    assert "NO" in next(line for line in table.splitlines() if "off by 1" in line)
    assert [row["what"] for row in rows.rows()] == ["a step", "kernels"] and rows.rows("figures")[
        0
    ]["high"] is None


def test_processes_that_write_at_once_lose_no_row(tmp_path):
    code = (
        "import pathlib, time; from benchmarks.pack.record import Record; r ="
        f" Record(pathlib.Path({str(tmp_path)!r}), time.time(), {{}})\n"
    )
    code += "for i in range(20): r.add('figures', f'{__import__(\"os\").getpid()} {i}', value=1.0)"
    with ThreadPoolExecutor(2) as pool:
        codes = list(
            pool.map(
                lambda _: (
                    subprocess.run(
                        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL
                    ).returncode
                ),
                range(2),
            )
        )
    rows = record(tmp_path)
    assert codes == [0] * 2 and len({row["what"] for row in rows.rows()}) == 40
    assert rows.table() == (tmp_path / "table.txt").read_text()


def test_the_archive_is_replaced_whole(tmp_path):
    work, rows = tmp_path / "work", record(tmp_path / "out")
    (work / "scripts" / "run").mkdir(parents=True)
    (work / "a.log").write_text("x" * (2 << 20) + "the end")
    (work / "scripts" / "run" / "metrics.jsonl").write_text("{}\n")
    rows.add("proof", "one", ok=True)
    for _ in range(2):
        rows.archive(work)
        with tarfile.open(tmp_path / "out" / "results.tgz") as tar:
            assert tar.getnames() == [
                "rows.jsonl",
                "table.txt",
                "a.log",
                "scripts/run/metrics.jsonl",
            ]
            log = tar.extractfile("a.log").read()
    assert len(log) == 1 << 20 and log.endswith(b"the end")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.tgz",
        "rows.jsonl",
        "table.txt",
    ]


def test_a_process_that_was_stopped_while_it_wrote_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.pack.record.LOCKED", 0.2)
    rows = record(tmp_path)
    with rows.alone():  # for good
        rows.add("proof", "one", ok=True)
        rows.archive(tmp_path)
    assert [row["what"] for row in rows.rows()] == ["one"]


def test_a_full_disk_costs_the_table_of_the_folder_but_not_that_of_the_screen(
    tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pack, "conduct", lambda args, rows: rows.add("proof", "kernels", ok=True))
    monkeypatch.setattr(Record, "archive", full)
    monkeypatch.setattr(pack, "write_results", full)
    assert pack.main(["--quick", "--only", "warm-gan", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("could not be written: OSError") == 2 and "yes" in said.splitlines()[-2]


def test_a_slower_way_taken_instead_is_a_note(tmp_path, capsys):
    rows = record(tmp_path)
    pack.fall_back(
        rows,
        "mining",
        "fused kernels are left out, plain ones used instead: RuntimeError: no ptxas",
    )
    pack.fall_back(rows, "mining", "a library will change something")
    assert [row["what"] for row in rows.rows("note")] == [
        "mining: fused kernels are left out, plain ones used instead: RuntimeError: no ptxas"
    ]
    assert "will change something" in capsys.readouterr().out


# ---------------------------------------------------------------- the clock


def test_an_alarm_passes_whoever_catches_exceptions():
    with pytest.raises(TimeUp, match="not done"), alarm(0.05):
        try:
            time.sleep(5)
        except Exception:  # as a library that tries something out
            pass


def test_an_alarm_inside_leaves_that_outside_set():
    with pytest.raises(TimeUp), alarm(0.3):
        with pytest.raises(TimeUp), alarm(0.05):
            time.sleep(5)
        time.sleep(5)


def context(folder, **more) -> Context:
    return Context(record(folder), torch.device("cpu"), None, folder, True, True, **more)


def test_a_row_that_fails_or_takes_too_long_says_so_and_the_next_one_comes(tmp_path):
    here = context(tmp_path, until=time.time() + 30)
    with here.row("proof", "broken") as row:
        raise ArithmeticError("lse is off by 3")
    with here.row("figures", "slow", 0.05) as row:
        row["value"] = 1.0
        time.sleep(5)
    with here.row("proof", "good") as row:
        row["ok"] = True
    broken, slow, good = here.record.rows()
    assert (
        broken["ok"] is False
        and broken["failed"]
        and broken["said"] == "ArithmeticError: lse is off by 3"
    )
    assert slow["failed"] and slow["said"].startswith("TimeUp") and slow["value"] == 1.0
    assert good["ok"] is True and "failed" not in good


# ---------------------------------------------------------------- parts are processes


def process(tmp_path, name: str, code: str, seconds: float = 20) -> pack.Process:
    found = pack.Process(
        name,
        [sys.executable, "-c", f"import sys, time; sys.stdin.readline()\n{code}"],
        tmp_path / f"{name}.log",
    )
    found.go(time.time() + seconds)
    return found


def test_a_part_that_fails_or_hangs_is_named_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "GRACE", 0.5)
    assert process(tmp_path, "good", "print('done')").end() == ""
    assert (
        process(tmp_path, "bad", "print('no kernel'); sys.exit(3)").end()
        == "bad ended with exit code 3; its log ends: no kernel"
    )
    slow = process(tmp_path, "slow", "while True: time.sleep(1)", 0.1)
    assert "slow was killed when its time was over" in slow.end() and slow.ended()


def test_a_paused_part_stands_still(tmp_path):
    part = process(tmp_path, "trainer", "while True: pass")
    state = lambda: Path(f"/proc/{part.process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def comes(wanted: str) -> bool:
        return any(state() in wanted or time.sleep(0.01) for _ in range(500))

    try:
        part.pause(True)
        assert comes("T")
        part.pause(False)
        assert comes("RS")
    finally:
        part.kill()
    part.pause(True)  # of one that has ended: nothing


# ---------------------------------------------------------------- pieces


def test_every_test_of_a_gpu_is_in_the_suite_of_the_pack():
    """Those that are skipped without one: their files are listed, and their names are chosen by
    -k.
    """
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if "skipif(not torch.cuda.is_available()" in line and path.name != Path(__file__).name:
                name = next(x for x in lines[number:] if x.startswith("def "))
                assert f"tests/{path.name}" in proof.TESTS and (
                    "gpu" in name or "captured" in name
                ), f"{path.name}: {name}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--quick --only science --data {tmp}/nowhere", "expected a folder with train/ and val/"),
        ("--only science", "no GPU is here"),
        ("--quick --only numbers", "invalid choice"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, flags, said):
    if torch.cuda.is_available() and "GPU" in said:
        pytest.skip("here is a GPU")
    with pytest.raises(SystemExit) as ended:
        pack.main([*flags.format(tmp=tmp_path).split(), "--out", str(tmp_path / "out")])
    assert (
        ended.value.code == 2
        and said in capsys.readouterr().err.splitlines()[-1]
        and not (tmp_path / "out").exists()
    )


def test_the_shell_says_what_it_expects(tmp_path):
    run = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", tmp_path / "nowhere.tgz", tmp_path / "out"],
        capture_output=True,
        text=True,
    )
    assert (
        run.returncode == 2
        and "expected an archive of images" in run.stderr
        and not (tmp_path / "out").exists()
    )


# ---------------------------------------------------------------- the rehearsal


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU: run the pack itself")
def test_a_rehearsal_does_all_of_it(tmp_path):
    """Every planned row comes, none fails, and the four files are whole. Without the suite, whose
    tests run here anyway, and without the compilers of photos, which are those of width 64 with
    another name.
    """
    out = tmp_path / "out"
    only = [part for part in pack.PARTS if part not in ("suite", "warm-photos")]
    command = [
        sys.executable,
        *"-m benchmarks.pack --quick --minutes 8 --out".split(),
        str(out),
        "--only",
        *only,
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert run.returncode == 0 and not [
        row for row in rows if row.get("failed") or row.get("ok") is False
    ], run.stdout[-6000:]
    names = {
        table: [row["what"] for row in rows if row["part"] == table]
        for table in ("proof", "figures", "science")
    }
    assert all(
        sorted(names[table]) == sorted(planned) for table, planned in pack.plan(only).items()
    )
    assert "not done" not in run.stdout and "a CPU stands in for the GPU" in run.stdout
    assert run.stdout.endswith((out / "table.txt").read_text() + "\n")
    assert sorted(path.name for path in out.iterdir()) == [
        "encoder_fp16.pth.tar",
        "results.tgz",
        "rows.jsonl",
        "table.txt",
    ]
    _, info = load_backbone(out / "encoder_fp16.pth.tar")
    assert info["arch"] == "resnet18w8" and not info["left"]
    mined = [
        row for row in rows if row["part"] == "science" and row["what"] not in ("MoCo v2", "+ none")
    ]
    assert all(row["knn"] > 0 and row["linear"] > 0 and row["size"] is not None for row in mined)
    assert [row["what"] for row in rows if row["part"] == "science"] == ["MoCo v2", *science.ROWS]
