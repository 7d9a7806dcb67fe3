"""From pretraining through both judges to another library, with networks of other kinds than
ResNets; and what is said at the start.
"""

import json

import pytest
import torch
import torchvision
from PIL import Image

import main_knn
import main_lincls
import main_moco_isl
from moco_isl import export
from moco_isl.run import devices
from moco_isl.run.backbone import load_backbone
from tests.test_load_backbone import thin_transformers

CPU = ["--device", "cpu", "-j", "0", "--seed", "0"]
SMALL = [*CPU, "--moco-k", "4", "--moco-dim", "8", "-b", "4", "--epochs", "1", "--max-steps", "1"]


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Three images of side 32 of each of two classes, one of each in val."""
    folder = tmp_path_factory.mktemp("two_classes")
    for split, name, number in (
        ("train", "black", 3),
        ("train", "white", 3),
        ("val", "black", 1),
        ("val", "white", 1),
    ):
        (folder / split / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.new("RGB", (32, 32), (i * 20 + 200 * (name == "white"),) * 3).save(
                folder / split / name / f"{i}.png"
            )
    return str(folder)


def thin_regnets(monkeypatch):
    """torchvision's RegNets of four blocks, for the time that they take."""
    params = torchvision.models.regnet.BlockParams
    whole, thin = params.from_init_params, {"depth": 4, "w_0": 16, "w_a": 16.0, "w_m": 2.0}
    monkeypatch.setattr(params, "from_init_params", lambda **options: whole(**{**options, **thin}))


@pytest.mark.parametrize(
    "arch, to", [("regnet_y_400mf", "torchvision"), ("vit_b_16", "safetensors")]
)
def test_a_regnet_and_a_transformer_go_all_the_way(
    two_classes, tmp_path, monkeypatch, capsys, arch, to
):
    thin_transformers(monkeypatch)
    thin_regnets(monkeypatch)
    out = tmp_path / "run"
    assert main_moco_isl.main([two_classes, "-a", arch, "--mlp", *SMALL, "--out", str(out)]) == 0
    warned = (
        f"=> warning: torchvision has no {arch} of this shape (--stem auto, side 32)"
        in capsys.readouterr().out
    )
    # a transformer of 32 pixels is none of torchvision's, a regnet is
    assert warned == (to == "safetensors")
    file = str(out / "checkpoint_last.pth.tar")
    trained, info = load_backbone(file)
    assert (info["arch"], info["head"], info["dim"], info["image_size"]) == (arch, "mlp", 8, 32)
    results = tmp_path / "judged"
    assert (
        main_knn.main(
            [two_classes, "--pretrained", file, "--k", "1", *CPU[:-2], "--out", str(results)]
        )
        == 0
    )
    rows = json.loads((results / "results.json").read_text())["results"]
    assert [(row["feature"], row["dim"]) for row in rows] == [
        ("output", 8),
        ("backbone", info["feature_dim"]),
    ]
    written = tmp_path / ("backbone.pth" if to == "torchvision" else "backbone.safetensors")
    assert export.main([file, "--to", to, "--out", str(written)]) == 0
    again = load_backbone(written, arch)[0].state_dict()
    kept = {
        name: x
        for name, x in trained.state_dict().items()
        if name in again and "head" not in name and not name.startswith("fc.")
    }
    assert len(kept) >= len(again) - 2 and all(
        torch.equal(x, again[name]) for name, x in kept.items()
    )
    if to == "safetensors":
        assert export.main([file, "--to", "torchvision", "--out", str(tmp_path / "x.pth")]) == 2


def test_every_script_says_that_half_precision_is_slow_here(
    two_classes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(devices, "_cpu_has", lambda amp: False)
    line = (
        "=> warning: torch has no fast --amp fp16 on this CPU: it takes some ten times as long as"
        " --amp off\n"
    )
    run = tmp_path / "run"
    assert (
        main_moco_isl.main(
            [
                two_classes,
                "-a",
                "digits",
                "--image-size",
                "16",
                *SMALL,
                "--amp",
                "fp16",
                "--out",
                str(run),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith(line)
    judged = [two_classes, "--pretrained", str(run / "checkpoint_last.pth.tar"), "--amp", "fp16"]
    assert main_knn.main([*judged, "--k", "1", *CPU[:-2]]) == 0
    assert line in capsys.readouterr().out
    probe = [
        "--cache-features",
        "--epochs",
        "1",
        "-b",
        "2",
        "--schedule",
        "--lr",
        "0.1",
        "--out",
        str(tmp_path / "probe"),
    ]
    assert main_lincls.main([*judged, *CPU, *probe]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "amp, has, trains, said",
    [
        ("off", False, True, ""),
        ("bf16", True, True, ""),
        ("fp16", True, False, ""),
        ("fp16", True, True, "trains ten to a hundred times as slowly"),
        ("bf16", False, False, "torch has no fast --amp bf16 on this CPU"),
    ],
)
def test_when_half_precision_is_slow(monkeypatch, capsys, amp, has, trains, said):
    monkeypatch.setattr(devices, "_cpu_has", lambda _: has)
    devices.warn_of_slow_amp(amp, torch.device("cuda"), trains)
    assert capsys.readouterr().out == ""
    devices.warn_of_slow_amp(amp, torch.device("cpu"), trains)
    out = capsys.readouterr().out
    assert said in out and out.count("=> warning: ") == out.count("\n") == bool(said)


def test_what_a_cpu_has_is_asked_of_torch():
    assert devices._cpu_has("bf16") is torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert devices._cpu_has("fp8") is False  # nothing is known of it
