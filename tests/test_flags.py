"""The command line: MoCo's own, config files, and ours."""

import argparse
import os

import pytest
import torch

import main_knn
import main_lincls
import main_moco_isl
from moco_isl import builder, export
from moco_isl.encoders import build_encoder
from moco_isl.errors import BadInput
from moco_isl.options import LARGEST
from moco_isl.report import __main__ as report
from moco_isl.run import checkpoint, devices

# every flag of main_moco.py: dest -> default
MOCO = {
    "data": None,
    "arch": "resnet50",
    "workers": 32,
    "epochs": 200,
    "start_epoch": 0,
    "batch_size": 256,
    "lr": 0.03,
    "schedule": [120, 160],
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "print_freq": 10,
    "resume": "",
    "world_size": -1,
    "rank": -1,
    "dist_url": "tcp://224.66.41.62:23456",
    "dist_backend": "nccl",
    "seed": None,
    "gpu": None,
    "multiprocessing_distributed": False,
    "moco_dim": 128,
    "moco_k": 65536,
    "moco_m": 0.999,
    "moco_t": 0.07,
    "mlp": False,
    "aug_plus": False,
    "cos": False,
}
V1 = (
    "-a resnet50 --lr 0.03 --batch-size 256 --dist-url tcp://localhost:10001"
    " --multiprocessing-distributed --world-size 1 --rank 0 imagenet"
)
V2 = V1.replace(" imagenet", " --mlp --moco-t 0.2 --aug-plus --cos imagenet")


def parse(line):
    return main_moco_isl.get_parser().parse_args(line.split() if isinstance(line, str) else line)


def test_defaults_are_mocos():
    found = vars(parse(""))
    assert {name: found[name] for name in MOCO} == MOCO
    assert found["miner"] == "none" and found["objective"] == "queue", "a bare run is MoCo"


@pytest.mark.parametrize(
    ("line", "own"), [(V1, {}), (V2, {"mlp": True, "moco_t": 0.2, "aug_plus": True, "cos": True})]
)
def test_published_command_lines(line, own):
    given = {
        "data": "imagenet",
        "dist_url": "tcp://localhost:10001",
        "multiprocessing_distributed": True,
        "world_size": 1,
        "rank": 0,
    }
    found = vars(parse(line))
    assert {name: found[name] for name in MOCO} == MOCO | given | own


def test_short_and_old_names():
    args = parse("-a resnet18 -j 4 -b 64 -p 5 --learning-rate 0.1 --weight-decay 0.001 DIR")
    assert (
        args.arch,
        args.workers,
        args.batch_size,
        args.print_freq,
        args.lr,
        args.weight_decay,
    ) == ("resnet18", 4, 64, 5, 0.1, 0.001)


def test_config_file(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "arch: resnet18\nmoco_k: 4096\nisl-budget: 2.5\nmlp: true\ncos: true\nschedule: [3,"
        " 4]\ndata: here\nepochs: 7\n"
    )
    args = parse(["--config", str(config), "--epochs", "9", "--no-cos"])
    assert (args.arch, args.moco_k, args.isl_budget, args.mlp, args.schedule, args.data) == (
        "resnet18",
        4096,
        ["2.5"],
        True,
        [3, 4],
        "here",
    )
    assert args.epochs == 9 and not args.cos, "the command line wins"
    assert parse(["--config", str(config), "there"]).data == "there"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("moco_kk: 3", ["moco_kk", "--moco-k"]),
        ("mlp: 3", ["mlp", "true or false"]),
        ("- a\n- b", ["list"]),
        ("a: [", ["cannot read"]),
        ("epochs: many", ["epochs"]),
    ],
)
def test_bad_config(tmp_path, text, words):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(BadInput) as error:
        parse(["--config", str(config)])
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value).splitlines()) == 1


def test_a_config_starts_from_another_one_beside_it(tmp_path):
    """Its values replace those of the other; so does its miner, whose flags go with it."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "least.yaml").write_text("epochs: 7\nlr: 0.5\nmlp: true\nmoco-k: 64\n")
    (tmp_path / "base.yaml").write_text(
        "config: least.yaml\nlr: 0.25\nminer: gan\nisl-radius: 0.4\nisl-keep: true\n"
    )
    row = tmp_path / "sub" / "row.yaml"
    row.write_text("config: ../base.yaml\nminer: entropy\nisl-keep: false\nmlp: false\n")
    args = parse(["--config", str(row), "--epochs", "9"])
    assert (args.epochs, args.lr, args.moco_k) == (9, 0.25, 64)
    assert (args.miner, args.isl_keep, args.mlp) == ("entropy", False, False)
    assert args.config == str(row)
    args = parse(["--config", str(tmp_path / "base.yaml")])
    assert (args.miner, args.isl_radius, args.isl_keep, args.mlp) == ("gan", 0.4, True, True)
    assert parse(["--config", str(row), "--miner", "gan"]).isl_radius == 0.4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config: run.yaml", "run.yaml leads back here"),
        ("config: other.yaml", "run.yaml leads back here"),
        ("config: nowhere.yaml", "nowhere.yaml': no such file"),
        ("config: [a, b]", "config: expected one file to start from"),
        ("config: ''", "config: expected one file to start from"),
    ],
)
def test_a_config_that_starts_from_none(tmp_path, text, words):
    (tmp_path / "other.yaml").write_text("config: run.yaml\n")
    with pytest.raises(BadInput, match=words):
        parse(config(tmp_path, text))


def config(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def test_a_config_says_what_is_written_there(tmp_path):
    """YAML's own reading makes False of `off`, a text of `1e-3`, 8 of `010`, 90 of `1:30` and a
    date of 2024-01-01.
    """
    text = (
        "amp: off\nisl-trust: off\nlr: 1e-3\nepochs: 010\nout: 1:30\ninit: 2024-01-01\nresume:"
        " null\narch: no\nseed: -5\nschedule: [010, 1_0]"
    )
    args = parse(config(tmp_path, text))
    assert (args.amp, args.isl_trust, args.lr, args.epochs, args.seed) == (
        "off",
        "off",
        1e-3,
        10,
        -5,
    )
    assert (args.out, args.init, args.resume, args.arch, args.schedule) == (
        "1:30",
        "2024-01-01",
        "",
        "no",
        [10, 10],
    )
    given = parse(
        "--amp off --isl-trust off --lr 1e-3 --epochs 10 --out 1:30 --init 2024-01-01 -a no --seed"
        " -5 --schedule 10 10"
    )
    assert vars(args) | {"config": None} == vars(given)


@pytest.mark.parametrize(
    "word, on",
    [(w, True) for w in "true on yes True YES 'on'".split()]
    + [(w, False) for w in "false off no Off".split()],
)
def test_a_switch_in_a_config(tmp_path, word, on):
    argv = config(tmp_path, f"cos: {word}\nmlp: {word}\nmultiprocessing-distributed: {word}")
    args = parse(argv)
    assert args.cos is args.mlp is args.multiprocessing_distributed is on
    assert parse([*argv, "--no-cos"]).cos is False and parse([*argv, "--cos"]).cos is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mlp:", "mlp is a switch: expected true or false, got nothing"),
        ("mlp: [true]", "got more than a word"),
        ("mlp: 1", "got '1'"),
        ("lr: 1\nlr: 2", "line 2: 'lr' stands there twice"),
        ("moco-k: 1\nmoco_k: 2", "moco-k and moco_k are one flag"),
        ("wd: 1\nweight-decay: 2", "wd and weight-decay are one flag"),
        ("epochs: [1, 2]", "epochs: expected one value"),
        ("data: {a: b}", "data: expected a path, or a list of them"),
        ("schedule: {a: 1}", "schedule: expected a value, or a list of them"),
        ("schedule: [[1]]", "schedule: expected a value, or a list of them"),
        ("schedule: [1, --download]", "'--download' looks like a flag"),
        ("help: true", "no flag named 'help'"),
        ("arch: &a x\nout: *a", "anchors (&) and aliases (*) are not taken"),
        ("lr: !!float 1", "tags (!)"),
        ("just words", "holds a text: expected lines"),
        ("miner: --download", "--miner --download: expected one of"),
    ],
)
def test_a_config_that_is_wrong_is_one_line(tmp_path, text, words):
    with pytest.raises(BadInput) as error:
        parse(config(tmp_path, text))
    assert words in str(error.value) and "\n" not in str(error.value)


def parsers():
    return [m.get_parser() for m in (main_moco_isl, main_knn, main_lincls, export, report)]


def test_a_flag_of_several_values_leaves_the_folder_alone():
    """Whatever stands after its values and is none of their kind is the DIR or FILE, for every such
    flag of every command.
    """
    values = {
        int: ["3", "4"],
        float: ["1e-3", "-2", "3"],
        "layers": ["all", "conv2"],
        "isl_budget": ["1.5", "3"],
        "results": ["a.json", "b/c.json"],
    }
    tried = 0
    for parser in parsers():
        needed = ["--to", "timm", "--out", "x"] if "--to" in parser._option_string_actions else []
        place = next(action.dest for action in parser._actions if not action.option_strings)
        for action in parser._actions:
            if action.option_strings and action.nargs in ("*", "+"):
                texts = values.get(action.dest) or values[action.type]
                args = parser.parse_args([*needed, action.option_strings[-1], *texts, "DIR"])
                assert getattr(args, action.dest) == [action.type(x) for x in texts]
                assert getattr(args, place) == "DIR"
                tried += 1
    assert tried == 14


def test_a_value_of_the_wrong_kind_is_named(tmp_path):
    for parse_, line, words in (
        (
            main_lincls,
            "--layers conv9x DIR",
            "--layers: 'conv9x' is no layer: expected backbone, output, conv1 ... conv5, or all",
        ),
        (main_lincls, "--lr fast DIR", "--lr fast: expected a number"),
        (main_knn, "--k few DIR", "--k few: expected a whole number"),
        (export, "--to timm --out x --results r.txt FILE", "--results: 'r.txt' is no .json file"),
        (export, "--to timm --out x --config c.yaml FILE", "no flag --config"),
        (
            export,
            "--to timm --out x FILE more",
            "'more' is one argument too many: expected flags and FILE",
        ),
    ):
        with pytest.raises(BadInput) as error:
            parse_.get_parser().parse_args(line.split())
        assert words in str(error.value)
    with pytest.raises(BadInput, match="'' is one argument too many"):
        export.get_parser().parse_args([*"--to timm --out x FILE".split(), ""])


def test_several_folders_stand_anywhere_and_keep_their_order(tmp_path):
    for line in (
        "a b c --mlp -j 4",
        "--mlp a -j 4 b c",
        "a --schedule 3 4 b -j=4 --mlp c",
        "-j 4 a b --no-cos c --mlp",
    ):
        args = parse(line.split())
        assert (args.data, args.mlp, args.workers) == (["a", "b", "c"], True, 4), line
    assert parse(["a"]).data == "a" and parse([]).data is None
    argv = config(tmp_path, "data: [a, b]")
    assert parse(argv).data == ["a", "b"] and parse([*argv, "c"]).data == "c"


def test_a_list_in_a_config_takes_nothing_of_the_command_line(tmp_path):
    argv = config(tmp_path, "schedule: [3, 4]")
    for line in (["2024", *argv], [*argv, "2024"]):
        args = parse(line)
        assert (args.data, args.schedule) == ("2024", [3, 4])


HUGE = "1" + "0" * 400  # a whole number that no float can hold
NO_NUMBERS = {
    int: (HUGE, "-" + HUGE, "1" + "0" * 5000, "1.5", ""),
    float: (HUGE + "0", "1e400", "-inf", "nan", "1" + "0" * 5000, ""),
}


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The flags of a judgement of an encoder."""
    path = tmp_path_factory.mktemp("judged") / "moco.pth"
    model = builder.MoCo(lambda num_classes: build_encoder("digits", num_classes), 8, 16, mlp=True)
    checkpoint.save(
        {"epoch": 1, "arch": "digits", "state_dict": checkpoint.model_state(model)}, path
    )
    return ["--dataset", "digits", "-j", "0", "--device", "cpu", "--pretrained", str(path)]


@pytest.mark.parametrize("script", [main_moco_isl, main_knn, main_lincls])
def test_no_flag_takes_a_number_without_bounds(script, judged, tmp_path, monkeypatch, capsys):
    """Numbers of hundreds of digits, infinite ones and those that are none: one short line each,
    from the command line and from a config.
    """
    monkeypatch.chdir(tmp_path)
    base = (
        "--dataset digits -a digits -j 0 --device cpu --max-steps 1".split()
        if script is main_moco_isl
        else judged
    )
    tried = 0
    for action in script.get_parser()._actions:
        for value in NO_NUMBERS.get(action.type, ()):
            flag = max(action.option_strings, key=len)
            assert script.main([*base, f"{flag}={value}"]) == 2, (flag, value[:9])
            said = capsys.readouterr().err
            assert (
                said.count("\n") == 1
                and len(said) < 300
                and any(name in said for name in action.option_strings)
            ), said
            tried += 1
    assert tried > (250 if script is main_moco_isl else 50)
    assert script.main([*base, *config(tmp_path, f"batch-size: {HUGE}")]) == 2
    assert "--batch-size 1000" in capsys.readouterr().err


def test_the_largest_numbers_end_in_a_line(tmp_path, monkeypatch, capsys):
    """A queue that no memory holds; and sizes above that of the data set, which stand for all of
    it.
    """
    monkeypatch.chdir(tmp_path)
    base = (
        "--dataset digits -a digits -j 0 --device cpu --mlp --moco-dim 16 --knn-holdout 1300 -b 16"
        " --moco-k 64 --epochs 1 --max-steps 2".split()
    )
    assert (
        main_moco_isl.main(
            [*base, "--moco-k", str(LARGEST), "--moco-dim", str(LARGEST), "--out", "a"]
        )
        == 3
    )
    said = capsys.readouterr().err
    assert (
        said.startswith("error: the memory is full")
        and said.count("\n") == 1
        and not os.path.exists("a")
    )
    most = str(LARGEST)
    for name, argv in {
        "knn": ["--isl-neighbors", most],
        "diffusion": ["--isl-budget", most],
        "entropy": ["--isl-budget", "1", most],
    }.items():
        argv = [
            *base,
            "--miner",
            name,
            "--isl-start",
            "0",
            "--isl-max-positives",
            most,
            "--out",
            name,
        ]
        assert main_moco_isl.main([*argv, *argv]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["mps", "meta", "xla", "cuda:-1", "cpu:3", "", "CUDA", "cuda:", "cpu\n", "auto:1"]
)
def test_a_device_that_is_none(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main_moco_isl.main(
            ["--dataset", "digits", "-a", "digits", f"--device={name}", "--max-steps", "1"]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is no device: expected auto, cpu, cuda or cuda:i" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, words",
    [
        ("cuda:2", "GPU 2 was asked for, but there are 2"),
        ("cuda:99999999999999999999", "was asked for, but there are 2"),
    ],
)
def test_a_gpu_that_is_not_there(name, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    of = lambda device, gpu=None: devices.resolve_device(argparse.Namespace(device=device, gpu=gpu))
    with pytest.raises(BadInput, match=words):
        of(name)
    assert (of("cuda:1"), of("cuda", 1), of("auto"), of("cpu")) == (
        torch.device("cuda:1"),
        torch.device("cuda:1"),
        torch.device("cuda:0"),
        torch.device("cpu"),
    )


@pytest.mark.parametrize(
    "slurm, workers",
    [
        ({}, 2),
        ({"SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "8"}, 8),
        ({"SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "8"}, 2),
    ],
)
def test_workers_are_capped_at_the_cores_of_a_rank(monkeypatch, slurm, workers):
    """Eight cores and four ranks here; where each rank is a task of SLURM with cores of its own,
    these are not divided.
    """
    monkeypatch.setattr(devices.dist, "world_size", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    for name in ("SLURM_NTASKS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert devices.usable_workers(32, processes=4) == workers
