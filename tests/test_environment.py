"""Variables that say which rank a process is: what is sound is taken, the rest is one line."""

import pytest

import main_knn
import main_lincls
import main_moco_isl
from launch import submit, sweep
from moco_isl import dist
from moco_isl.run import devices, environment
from moco_isl.run.environment import BadEnvironment, Ranks

NAMES = (*environment.PLACE, "MASTER_ADDR", "MASTER_PORT", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK")
DIGITS = (
    "--dataset digits -a digits --moco-dim 8 --moco-k 128 -b 64 --epochs 1 --max-steps 1 -j 0"
    " --device cpu --seed 1"
)


@pytest.fixture
def given(monkeypatch):
    """Sets the variables of a text such as "RANK=0 WORLD_SIZE=2", and no others."""

    def set_all(text: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for pair in text.split(";"):
            name, _, value = pair.partition("=")
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("RANK=;WORLD_SIZE=;LOCAL_RANK=", None),
        ("RANK=0;WORLD_SIZE=1", Ranks(0, 1, 0, 1)),
        ("RANK=3;WORLD_SIZE=4;LOCAL_RANK=1;LOCAL_WORLD_SIZE=2", Ranks(3, 4, 1, 2)),
        ("RANK=3;WORLD_SIZE=4;LOCAL_RANK=3", Ranks(3, 4, 3, 1)),
        ("RANK=3;WORLD_SIZE=4;LOCAL_RANK=;LOCAL_WORLD_SIZE=", Ranks(3, 4, 0, 1)),
    ],
)
def test_a_place_among_others(given, text, expected):
    given(text)
    assert environment.ranks() == expected


BAD = [
    ("RANK=0", "RANK=0, but no WORLD_SIZE"),
    ("RANK=1;WORLD_SIZE=", "RANK=1, but no WORLD_SIZE"),
    ("WORLD_SIZE=2", "WORLD_SIZE=2, but no RANK"),
    ("LOCAL_RANK=1", "LOCAL_RANK=1, but no RANK"),
    ("LOCAL_WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2, but no RANK"),
    ("RANK=one;WORLD_SIZE=2", "RANK=one: expected a whole number from 0 to 1"),
    ("RANK=1;WORLD_SIZE=two", "WORLD_SIZE=two: expected a whole number from 1 to"),
    ("RANK=1;WORLD_SIZE=2.0", "WORLD_SIZE=2.0: expected"),
    ("RANK=0;WORLD_SIZE=0", "WORLD_SIZE=0: expected"),
    ("RANK=2;WORLD_SIZE=2", "RANK=2: expected a whole number from 0 to 1"),
    ("RANK=-1;WORLD_SIZE=2", "RANK=-1: expected"),
    ("RANK=²;WORLD_SIZE=4", "RANK=²: expected"),
    ("RANK=1\n;WORLD_SIZE=2", "RANK=1\\n: expected"),
    (f"RANK={'9' * 5000};WORLD_SIZE=2", "99...: expected"),
    ("RANK=1;WORLD_SIZE=2;LOCAL_RANK=x", "LOCAL_RANK=x: expected a whole number from 0 to 1"),
    (
        "RANK=1;WORLD_SIZE=2;LOCAL_RANK=1;LOCAL_WORLD_SIZE=1",
        "LOCAL_RANK=1: expected a whole number from 0 to 0",
    ),
    (
        "RANK=1;WORLD_SIZE=2;LOCAL_RANK=1;LOCAL_WORLD_SIZE=3",
        "LOCAL_WORLD_SIZE=3: expected a whole number from 1 to 2",
    ),
    ("RANK=1;WORLD_SIZE=2;MASTER_PORT=1234", "no MASTER_ADDR"),
    ("RANK=1;WORLD_SIZE=2;MASTER_ADDR=;MASTER_PORT=1234", "no MASTER_ADDR"),
    ("RANK=1;WORLD_SIZE=2;MASTER_ADDR=localhost", "no MASTER_PORT"),
    (
        "RANK=1;WORLD_SIZE=2;MASTER_ADDR=localhost;MASTER_PORT=x",
        "MASTER_PORT=x: expected a whole number from 1 to 655",
    ),
    ("RANK=1;WORLD_SIZE=2;MASTER_ADDR=localhost;MASTER_PORT=65536", "MASTER_PORT=65536: expected"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_an_unsound_environment_is_one_line_whatever_the_rank(given, text, words, tmp_path, capsys):
    given(text)
    assert main_moco_isl.main([*DIGITS.split(), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert (
        said.err.startswith("error: the environment has ")
        and words in said.err
        and said.err.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A file of an encoder of digits."""
    out = tmp_path_factory.mktemp("encoder")
    assert main_moco_isl.main([*DIGITS.split(), "--out", str(out / "run")]) == 0
    return str(out / "run" / "checkpoint_last.pth.tar")


@pytest.mark.parametrize("script", [main_knn, main_lincls])
@pytest.mark.parametrize(
    "text",
    ["RANK=1", "RANK=x;WORLD_SIZE=2", "RANK=1;WORLD_SIZE=2;LOCAL_RANK=9", "RANK=1;WORLD_SIZE=2"],
)
def test_the_scripts_that_judge_say_it_too(given, script, text, encoder, tmp_path, capsys):
    given(text)
    argv = f"--dataset digits --pretrained {encoder} -j 0 --device cpu".split()
    argv += ["--out", str(tmp_path / "out")]
    assert script.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the environment has ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_wrong_flag_is_said_where_the_rank_cannot_be_told(given, capsys):
    given("RANK=x;WORLD_SIZE=2")
    assert main_moco_isl.main(["--epohcs", "3"]) == 2
    assert "did you mean --epochs?" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_ranks_in_a_sound_environment_the_first_speaks_for_all(given, rank, lines, capsys):
    given(f"RANK={rank};WORLD_SIZE=2;MASTER_ADDR=localhost;MASTER_PORT=1234")
    assert main_moco_isl.main(["--epohcs", "3"]) == 2
    assert capsys.readouterr().err.count("\n") == lines


@pytest.mark.parametrize("cpus", ["x", "0", "-2", "1.5", "4(x2)"])
def test_slurms_cores_of_a_task_have_to_be_a_number(given, monkeypatch, cpus):
    given(f"SLURM_NTASKS=1;SLURM_CPUS_PER_TASK={cpus}")
    monkeypatch.setattr(dist, "world_size", lambda: 1)
    with pytest.raises(
        BadEnvironment, match="SLURM_CPUS_PER_TASK=.*: expected a whole number from 1"
    ):
        devices.usable_workers(2)
    given("SLURM_NTASKS=1;SLURM_CPUS_PER_TASK=")
    assert devices.usable_workers(1) == 1


def test_the_launcher_is_not_led_astray_by_its_own_shell(given, tmp_path, monkeypatch, capsys):
    given("RANK=x;LOCAL_RANK=7;MASTER_PORT=no;SLURM_CPUS_PER_TASK=x")
    monkeypatch.chdir(tmp_path)
    assert submit.main(["pretrain", "--dry-run", "--gpus-per-node", "0", *DIGITS.split()]) == 0
    (tmp_path / "s.yaml").write_text("base: {dataset: digits}\npoints: [{name: a, seed: 1}]")
    assert sweep.main(["s.yaml", "--dry-run"]) == 0
    capsys.readouterr()
