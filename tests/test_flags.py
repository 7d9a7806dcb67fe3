"""The command line: MoCo's own, config files, and ours."""

import os

import pytest

import main_moco_isl
from moco_isl.errors import BadInput
from moco_isl.training import cli

# every flag of main_moco.py: dest -> default
MOCO = {
    "data": None, "arch": "resnet50", "workers": 32, "epochs": 200, "start_epoch": 0, "batch_size": 256, "lr": 0.03, "schedule": [120, 160], "momentum": 0.9,
    "weight_decay": 1e-4, "print_freq": 10, "resume": "", "world_size": -1, "rank": -1, "dist_url": "tcp://224.66.41.62:23456", "dist_backend": "nccl",
    "seed": None, "gpu": None, "multiprocessing_distributed": False, "moco_dim": 128, "moco_k": 65536, "moco_m": 0.999, "moco_t": 0.07, "mlp": False,
    "aug_plus": False, "cos": False,
}  # fmt: skip
V1 = "-a resnet50 --lr 0.03 --batch-size 256 --dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0 imagenet"
V2 = V1.replace(" imagenet", " --mlp --moco-t 0.2 --aug-plus --cos imagenet")


def parse(line):
    return main_moco_isl.get_parser().parse_args(line.split() if isinstance(line, str) else line)


def test_defaults_are_mocos():
    found = vars(parse(""))
    assert {name: found[name] for name in MOCO} == MOCO
    assert found["miner"] == "none" and found["objective"] == "queue", "a bare run is MoCo"


@pytest.mark.parametrize(("line", "own"), [(V1, {}), (V2, {"mlp": True, "moco_t": 0.2, "aug_plus": True, "cos": True})])
def test_published_command_lines(line, own):
    given = {"data": "imagenet", "dist_url": "tcp://localhost:10001", "multiprocessing_distributed": True, "world_size": 1, "rank": 0}
    found = vars(parse(line))
    assert {name: found[name] for name in MOCO} == MOCO | given | own


def test_short_and_old_names():
    args = parse("-a resnet18 -j 4 -b 64 -p 5 --learning-rate 0.1 --weight-decay 0.001 DIR")
    assert (args.arch, args.workers, args.batch_size, args.print_freq, args.lr, args.weight_decay) == ("resnet18", 4, 64, 5, 0.1, 0.001)


def test_config_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("arch: resnet18\nmoco_k: 4096\nisl-budget: 2.5\nmlp: true\ncos: true\nschedule: [3, 4]\ndata: here\nepochs: 7\n")
    args = parse(["--config", str(config), "--epochs", "9", "--no-cos"])
    assert (args.arch, args.moco_k, args.isl_budget, args.mlp, args.schedule, args.data) == ("resnet18", 4096, 2.5, True, [3, 4], "here")
    assert args.epochs == 9 and not args.cos, "the command line wins"
    assert parse(["--config", str(config), "there"]).data == "there"


@pytest.mark.parametrize(
    ("text", "words"),
    [("moco_kk: 3", ["moco_kk", "--moco-k"]), ("mlp: 3", ["mlp", "true or false"]), ("- a\n- b", ["list"]), ("a: [", ["cannot read"]), ("epochs: many", ["epochs"])],
)
def test_bad_config(tmp_path, text, words):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(BadInput) as error:
        parse(["--config", str(config)])
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value).splitlines()) == 1


def test_every_flag_is_used():
    """No option that is parsed and ignored: each dest is read somewhere beyond the parser."""
    from pathlib import Path

    root = Path(__file__).parent.parent
    code = "".join(p.read_text() for p in [root / "main_moco_isl.py", *(p for p in (root / "moco_isl" / "training").glob("*.py") if p.name != "options.py")])
    for action in main_moco_isl.get_parser()._actions:
        if action.dest not in ("help", "config"):
            assert f"args.{action.dest}" in code or f'"{action.dest}"' in code.split("MAY_CHANGE = {")[0] + code.split("}  # fmt: skip")[-1], action.dest


@pytest.mark.parametrize("slurm, workers", [({}, 2), ({"SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "8"}, 8), ({"SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "8"}, 2)])
def test_workers_are_capped_at_the_cores_of_a_rank(monkeypatch, slurm, workers):
    """Eight cores and four ranks here; where each rank is a task of SLURM with cores of its own, these are not divided."""
    monkeypatch.setattr(cli.dist, "world_size", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    for name in ("SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert cli.usable_workers(32, processes=4) == workers
