"""moco_isl.transfer: its figures are those of the scripts, and each is made once."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import main_knn
import main_lincls
from moco_isl import data, transfer
from moco_isl.builder import MoCo
from moco_isl.encoders import build_encoder
from moco_isl.run import checkpoint
from moco_isl.run.backbone import load_backbone
from studies import transfer as study

SHORT = ["--linear", "--epochs 2", "--finetune", "--epochs 1 --lr 0.02 -b 64"]
SHARED = ["--device", "cpu", "-j", "0", "--image-size", "16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with two encoders, a.pth.tar and b.pth.tar, and images of four digits."""
    folder = tmp_path_factory.mktemp("transfer")
    for seed, name in enumerate("ab", 5):
        write_encoder(folder / f"{name}.pth.tar", seed)
    for split, n in (("train", 12), ("val", 6)):
        digits = data.build_dataset("digits", split=split)
        for label in range(4):
            (folder / "photos" / split / f"{label}").mkdir(parents=True)
            for i in (digits.labels == label).nonzero()[:n, 0].tolist():
                to_pil_image(digits[i][0]).save(folder / "photos" / split / f"{label}" / f"{i}.png")
    return folder


def write_encoder(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    model = MoCo(lambda **given: build_encoder("digits", **given), dim=16, K=32, mlp=True)
    state = {f"module.{name}": x for name, x in model.state_dict().items()}
    args = {"dataset": "digits", "mlp": True}
    torch.save({"epoch": 3, "arch": "digits", "state_dict": state, "args": args}, path)


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def rows(out: str) -> dict[tuple[str, str, str], dict]:
    found = json.loads((Path(out) / "results.json").read_text())["transfer"]
    return {(row["encoder"], row["to"], row["by"]): row for row in found}


def works(*argv) -> None:
    assert transfer.main(list(argv)) == 0


def table(text: str) -> list[list[str]]:
    """The cells of the table that ends what was printed."""
    lines = text.splitlines()
    first = max(i for i, line in enumerate(lines) if line.startswith("encoder "))
    return [re.split(r"  +", line) for line in lines[first:-1]]


def test_figures_are_those_of_the_scripts_and_are_made_once(here, capsys, monkeypatch):
    given = ["a.pth.tar", "b.pth.tar", "--to", "digits", "photos", *SHARED, *SHORT, "--out", "all"]
    works(*given)
    found = rows("all")
    assert len(found) == 2 * 2 * 3
    photos = ["photos", "--pretrained", "b.pth.tar", *SHARED]
    assert main_knn.main([*photos, "--out", "knn"]) == 0
    results = json.loads(Path("knn/results.json").read_text())["results"]
    (knn,) = [row["top1"] for row in results if row["feature"] == "backbone"]
    assert found["b.pth.tar", "photos", "knn"]["top1"] == knn
    linear = ["--cache-features", *"--lr 1 3 10 30 --epochs 2 --seed 0 --out linear".split()]
    tuned = "--finetune --lr 0.02 --epochs 1 -b 64 --seed 0 --out tuned".split()
    for way, flags in (("linear", linear), ("finetune", tuned)):
        assert main_lincls.main([*photos, *flags]) == 0
        by_hand = json.loads((Path(flags[-1]) / "results.json").read_text())["classifiers"]
        (chosen,) = [row for row in by_hand if row["chosen"]]
        mine = found["b.pth.tar", "photos", way]
        assert (mine["top1"], mine["lr"]) == (chosen["top1"], chosen["lr"]), way

    capsys.readouterr()
    ran = []
    for script in (main_knn, main_lincls):
        real = script.run
        spy = lambda argv, stop, real=real: (ran.append(argv), real(argv, stop))
        monkeypatch.setattr(script, "run", spy)
    works(*given)
    assert ran == [] and rows("all") == found
    shown = table(capsys.readouterr().out)
    assert shown[0] == ["encoder", "judged on", "epoch", "kNN", "linear", "fine-tuned"]
    last = [found["b.pth.tar", "photos", way]["top1"] for way in transfer.WAYS]
    assert shown[-1] == ["b.pth.tar", "photos", "3", *(f"{x:.2f}" for x in last)]

    works("a.pth.tar", "--to", "folder:photos", "digits", *SHARED, "--by", "knn", "--out", "all")
    assert len(ran) == 1, "digits were known"
    assert len(rows("all")) == len(found) + 1, "what others have found is kept"
    (top1,) = (rows("all")["a.pth.tar", name, "knn"]["top1"] for name in ("folder:photos",))
    assert top1 == found["a.pth.tar", "photos", "knn"]["top1"]
    works("a.pth.tar", "--to", "digits", *SHARED, "--by", "knn", "--knn", "--k 3", "--out", "all")
    assert len(ran) == 2 and len(rows("all")) == len(found) + 1
    assert rows("all")["a.pth.tar", "digits", "knn"]["k"] == 3, "in the place of k 200"


@pytest.mark.parametrize("way, stops_at", [("linear", 5), ("finetune", 7)])
def test_a_stopped_transfer_goes_on_and_ends_as_the_unbroken_one(here, way, stops_at, tmp_path):
    more = [*SHARED, *(SHORT[:2] if way == "linear" else SHORT[2:]), "--by", way]
    given = ["a.pth.tar", "--to", "digits", *more, "--out"]
    works(*given, str(tmp_path / "whole"))
    calls = iter(range(1000))
    stopped = transfer.main([*given, str(tmp_path / "cut")], stop=lambda: next(calls) == stops_at)
    assert stopped == 75 and not (tmp_path / "cut" / "results.json").exists()
    works(*given, str(tmp_path / "cut"))
    key = "a.pth.tar", "digits", way
    assert rows(tmp_path / "cut")[key] == rows(tmp_path / "whole")[key]


def test_another_file_at_the_same_path_is_judged_anew(here, tmp_path):
    file = tmp_path / "c.pth.tar"
    write_encoder(file, 0)
    given = [str(file), "--to", "photos", *SHARED, *SHORT[:2], "--out", str(tmp_path / "out")]
    given += ["--by", "linear", "knn"]
    works(*given)
    before = rows(tmp_path / "out")
    write_encoder(file, 1)
    works(*given)
    now = rows(tmp_path / "out")[str(file), "photos", "knn"]
    assert now["sha256"] != before[str(file), "photos", "knn"]["sha256"]
    key = str(file), "photos", "linear"
    assert rows(tmp_path / "out")[key]["sha256"] != before[key]["sha256"]
    probes = list((tmp_path / "out").glob("*/photos/linear-*/results.json"))
    assert len(probes) == 2, "the probe of the file before stays"


def test_other_flags_are_judged_anew(here, tmp_path):
    given = ["a.pth.tar", "--to", "photos", *SHARED, "--by", "linear", "--out", str(tmp_path)]
    works(*given, "--linear", "--epochs 1")
    works(*given, "--linear", "--epochs 1 --wd 0.1")
    key = "a.pth.tar", "photos", "linear"
    assert rows(tmp_path)[key]["flags"][-2:] == ["--wd", "0.1"]
    works(*given, "--linear", "--epochs 1")
    assert rows(tmp_path)[key]["flags"][-2:] == ["--epochs", "1"]
    runs = set(tmp_path.glob("*/photos/*"))
    works(*given, "--linear", "--epochs 1", "--cache", str(tmp_path / "cache"), "-j", "1")
    assert set(tmp_path.glob("*/photos/*")) == runs, "these flags change no figure"


def test_rows_that_another_process_adds_meanwhile_stay(here, tmp_path, monkeypatch):
    given = [*SHARED, "--by", "knn", "--to", "photos", "--out", str(tmp_path)]
    real = main_knn.run

    def judge(argv, stop):
        monkeypatch.setattr(main_knn, "run", real)
        works("b.pth.tar", *given)
        return real(argv, stop)

    monkeypatch.setattr(main_knn, "run", judge)
    works("a.pth.tar", *given)
    assert {name for name, *_ in rows(tmp_path)} == {"a.pth.tar", "b.pth.tar"}


def test_a_table_is_of_its_own_command_whatever_others_do(here, tmp_path, monkeypatch, capsys):
    """Another process judges the same with other flags, and takes the row's place."""
    given = ["a.pth.tar", *SHARED, "--by", "knn", "--to", "photos", "--out", str(tmp_path)]
    real = transfer.write

    def write(rows, out):
        real(rows, out)
        monkeypatch.setattr(transfer, "write", real)
        works(*given, "--knn", "--k 3", "--linear", "--epochs 1")

    monkeypatch.setattr(transfer, "write", write)
    works(*given)
    said = capsys.readouterr().out
    assert "=> --linear does nothing here: --by leaves it out" in said
    assert table(said)[1][:2] == ["a.pth.tar", "photos"]


def test_an_untrained_network_is_the_first_files_drawn_by_the_seed(here, tmp_path):
    out = tmp_path / "out"
    given = [
        "a.pth.tar",
        "--to",
        "photos",
        *SHARED,
        "--by",
        "knn",
        "--untrained",
        "--out",
        str(out),
    ]
    works(*given)
    name = "untrained,seed=0"
    first, info = load_backbone(out / f"{name}.pth.tar")
    of_a, _ = load_backbone(here / "a.pth.tar")
    assert info["arch"] == "digits" and info["epoch"] == 0
    plain = {n: x for n, x in of_a.state_dict().items() if not n.startswith("fc.")}
    drawn = first.state_dict()
    assert all(drawn[n].shape == x.shape for n, x in plain.items())
    assert not torch.equal(drawn["conv1.0.weight"], plain["conv1.0.weight"])
    torch.manual_seed(0)
    assert torch.equal(drawn["conv1.0.weight"], build_encoder("digits").conv1[0].weight)
    works(*given, "--seed", "1")
    second, _ = load_backbone(out / "untrained,seed=1.pth.tar")
    assert not torch.equal(second.conv1[0].weight, first.conv1[0].weight)
    assert {encoder for encoder, *_ in rows(out)} == {"a.pth.tar", name, "untrained,seed=1"}
    before = (out / f"{name}.pth.tar").stat().st_mtime_ns
    works(*given)
    assert (out / f"{name}.pth.tar").stat().st_mtime_ns == before
    content = checkpoint.load(here / "a.pth.tar")
    content["args"] |= {"mean": [0.1, 0.1, 0.1], "std": [0.2, 0.2, 0.2]}
    torch.save(content, tmp_path / "other_mean.pth.tar")
    works(str(tmp_path / "other_mean.pth.tar"), *given[1:])
    assert load_backbone(out / f"{name}.pth.tar")[1]["args"]["mean"] == [0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "nothing to judge: give one FILE or several"),
        (["a.pth.tar"], "no images to judge on: give --to DIR, or --to cifar10:DIR"),
        (["none.pth.tar", "--to", "digits"], "no file at 'none.pth.tar'"),
        (["a.pth.tar", "--to", "nowhere"], "no such folder: nowhere"),
        (["a.pth.tar", "--to", "nowhere", "--untrained"], "no such folder: nowhere"),
        (["a.pth.tar", "--to", "digits", "--linear", "--layers conv1 conv2"], "several --layers"),
        (["a.pth.tar", "--to", "digits", "--knn", "--k 5 20"], "--knn has several --k, and"),
        (["a.pth.tar", "--to", "digits", "--linear", "--layers all"], "--linear has several"),
        (["a.pth.tar", "--to", "cifar10"], "expected cifar10:DIR"),
        (["a.pth.tar", "--to", "cifar10:photos"], "cifar10 is not in photos"),
        (["a.pth.tar", "--to", "no.module:images"], "no.module"),
        (["a.pth.tar", "--to", "photos/train/0"], "have no labels"),
        (["a.pth.tar", "--to", "photos", "photos"], "names one thing twice"),
        (["a.pth.tar", "--to", "digits", "--by", "magic"], "--by magic: expected one of knn"),
        (["a.pth.tar", "--to", "digits", "--knn=--k=x"], "--knn: --k x: expected a whole number"),
        (["a.pth.tar", "--to", "digits", "--linear", "--lrr 1"], "--linear: .*--lrr"),
        (["a.pth.tar", "--to", "digits", "--linear", "--out x"], "--linear has out, which is"),
        (["a.pth.tar", "--to", "digits", "--finetune", "--workers 2"], "--finetune has workers"),
        (["a.pth.tar", "--to", "digits", "--knn", '"'], "No closing quotation"),
        (["a.pth.tar", "--to", "digits", "--finetune", "--lr 1 2"], "--finetune trains one"),
        (["a.pth.tar", "--to", "digits", "--linear", "--epochs 0"], "--epochs 0 is out of"),
        (["a.pth.tar", "--to", "digits", "--out", "theirs"], "is none of this command's files"),
        (["a.pth.tar", "--to", "digits", "--out", "a.pth.tar"], "a.pth.tar is a file"),
        (["a.pth.tar", "--to", "digits", "--device", "gpu"], "--device"),
        (["a.pth.tar", "--to", "digits", "--image-size", "-1"], "--image-size -1 is out of range"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_judged(here, capsys, monkeypatch, flags, said):
    Path("theirs").mkdir(exist_ok=True)
    Path("theirs/results.json").write_text('{"mine": 1}')
    judged = lambda *_: pytest.fail("judged")
    monkeypatch.setattr(main_knn, "worker", judged)
    monkeypatch.setattr(main_lincls, "worker", judged)
    small = [] if "--out" in flags else ["--out", "new"]
    assert transfer.main([*flags, *small]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1
    assert not Path("new").exists()
    assert Path("theirs/results.json").read_text() == '{"mine": 1}'


def test_several_processes_are_refused(here, capsys, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert transfer.main(["a.pth.tar", "--to", "digits"]) == 2
    monkeypatch.setenv("RANK", "0")
    assert transfer.main(["a.pth.tar", "--to", "digits"]) == 2
    assert "start it without torchrun" in capsys.readouterr().err


def test_the_study_keeps_encoders_of_one_name_apart():
    files = {"runs/a/moco/last": 10.0, "runs/b/moco/last": 90.0, "runs/c/isl,seed=1/last": 50.0}
    files |= {"runs/a/moco/last/": 30.0, "./runs/a/moco/last": 30.0}  # the first once more
    found = [
        {"encoder": name, "to": "x", "by": "knn", "top1": top1, "epoch": 1}
        for name, top1 in files.items()
    ]
    assert list(study.kinds(found)) == [
        ("x", "a/moco/last"),
        ("x", "b/moco/last"),
        ("x", "c/isl/last"),
    ]


def test_the_study_groups_seeds(tmp_path, capsys):
    known = {"flags": [], "sha256": "x", "data_sha256": "y", "epoch": 25}
    figures = {"runs/start/moco,seed=0": 40.0, "runs/start/moco,seed=1": 42.0, "runs/isl": 50.0}
    found = [
        {"encoder": name, "to": to, "by": "linear", "top1": top1 + 10 * (to == "b"), **known}
        for to in "ab"
        for name, top1 in figures.items()
    ]
    transfer.write(found, tmp_path)
    flags = [str(tmp_path), "--out", str(tmp_path / "out"), "--title", "t", "--note", "As it was."]
    assert study.main(flags) == 0
    (path,) = (tmp_path / "out").glob("*.json")
    kept = json.loads(path.read_text())
    assert [(row["to"], row["row"], row["n"]) for row in kept["rows"]] == [
        *(("a", "runs/isl", 1), ("a", "start/moco", 2)),
        *(("b", "runs/isl", 1), ("b", "start/moco", 2)),
    ]
    expected = f"{statistics.fmean([40, 42]):.1f} ± {statistics.stdev([40, 42]):.1f}"
    assert kept["rows"][1]["linear"] == expected and kept["rows"][2]["linear"] == "60.0"
    assert [key for key, _ in kept["columns"]] == ["to", "row", "epoch", "linear", "n"]
    assert kept["notes"] == ["As it was."]
    assert study.main([str(tmp_path / "none")]) == 2
    assert "no results.json" in capsys.readouterr().err
