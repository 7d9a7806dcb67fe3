"""The benchmarks measure what they say: the published form is MoCo, every script runs and writes
the common form, and the page is written from it.
"""

import json
import os
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import (
    bank_loss,
    bench,
    common,
    floor,
    growth,
    index,
    knn,
    mining,
    profiling,
    published,
    results,
    start,
    step,
)
from benchmarks import input as photos
from moco_isl.builder import MoCo
from moco_isl.encoders import build_encoder
from moco_isl.isl import ISL
from tests import runs

CPU = torch.device("cpu")

# ---------------------------------------------------------------- the published form


def test_the_published_form_trains_as_our_moco():
    """Losses, weights of both encoders, their statistics and the queue over four steps; K is used
    up in three.
    """
    arch, size, K = "resnet18w16", 16, 24
    torch.manual_seed(0)
    theirs = published.PublishedMoCo(arch, size, dim=16, K=K, m=0.9)
    mine = MoCo(
        lambda num_classes: build_encoder(arch, num_classes, image_size=size),
        16,
        K,
        0.9,
        0.2,
        mlp=True,
    )
    mine.encoder_q.load_state_dict(theirs.query.state_dict())
    mine.copy_query_to_key()
    mine.queue.copy_(theirs.queue)
    isl = ISL(mine, 100, active=False)
    optimizer = torch.optim.SGD(mine.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    step_theirs = published.published_step(theirs, lr=0.1)
    g = torch.Generator().manual_seed(1)
    losses = []
    for i in range(4):
        im_q, im_k = torch.randn(2, 8, 3, size, size, generator=g)
        loss = isl(im_q, im_k, torch.arange(8) + 8 * i)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), step_theirs(im_q, im_k)))
    assert [a for a, _ in losses] == pytest.approx([b for _, b in losses], abs=1e-4)
    assert abs(losses[0][0] - losses[-1][0]) > 1e-3, "it must have trained for this to say anything"
    for ours, other in ((mine.encoder_q, theirs.query), (mine.encoder_k, theirs.key)):
        for (name, x), y in zip(ours.state_dict().items(), other.state_dict().values()):
            assert torch.allclose(x, y, atol=1e-4), name
    assert torch.allclose(mine.queue, theirs.queue, atol=1e-4)


# ---------------------------------------------------------------- every script, at its smallest


def in_common_form(facts: dict) -> None:
    """What benchmarks/common.py says of a file."""
    assert {
        "name",
        "title",
        "command",
        "date",
        "device",
        "versions",
        "rows",
        "notes",
    } <= facts.keys()
    assert (
        facts["device"]["kind"] == "cpu"
        and torch.__version__.startswith(facts["versions"]["torch"])
        and facts["rows"]
    )
    assert all(isinstance(note, str) for note in facts["notes"])
    for row in facts["rows"]:
        assert all(
            value is None or isinstance(value, (str, int, float, list)) for value in row.values()
        )
        if facts.get("columns") is None:
            assert row["what"] and isinstance(row["unit"], str) and row["value"] == row["value"]
            assert row.get("n", 1) == 1 or row["low"] <= row["value"] <= row["high"]
        else:
            assert {key for key, _ in facts["columns"]} & row.keys()


def written(main, tmp_path, line: str) -> dict[str, dict]:
    """Files that a benchmark writes, by name."""
    main([*line.split(), "--quick", "--device", "cpu", "--repeats", "2", "--out", str(tmp_path)])
    files = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    for name, facts in files.items():
        in_common_form(facts)
        assert facts["title"] in results.section(facts), name
    return files


def rows(facts: dict) -> dict[str, dict]:
    return {row["what"]: row for row in facts["rows"]}


def test_step_has_all_forms_and_the_floor(tmp_path):
    pytest.importorskip("lightly")
    files = written(step.main, tmp_path, "--rows photos --profile")
    assert set(files) == {"step-photos-cpu.json", "profile-photos-cpu.json"}
    found = rows(files["step-photos-cpu.json"])
    forms = [
        "as published",
        "lightly, MoCo",
        "lightly, NNCLR",
        "ours, plain",
        "ours, fast",
        "ours, fast, ISL on",
        "what ISL adds",
    ]
    assert (
        list(found)[:7] == forms
        and all(name.startswith("floor: ") for name in list(found)[7:])
        and len(found) == 9
    )
    assert found["ours, fast"]["of"] == "as published"
    assert 0 < found["ours, fast"]["floor"] < found["ours, fast"]["value"]
    assert len(files["profile-photos-cpu.json"]["rows"]) == 6


def test_step_says_that_lightly_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightly", None)
    files = written(step.main, tmp_path, "--rows w32 --no-floor")
    assert (
        "lightly, MoCo" not in rows(files["step-w32-cpu.json"])
        and "pip install lightly" in capsys.readouterr().out
    )


def test_a_form_that_fails_costs_no_other(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such device\nand a long story")

    monkeypatch.setattr(step, "published_step", fails)
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(RuntimeError, match="could not be had: as published"):
        written(step.main, tmp_path, "--rows w32 --no-floor")
    facts = json.loads((tmp_path / "step-w32-cpu.json").read_text())
    assert (
        list(rows(facts))[:2] == ["ours, plain", "ours, fast"]
        and "as published is left out, RuntimeError: no such device" in facts["notes"]
    )


def test_a_form_of_the_loss_that_fails_costs_no_other(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setattr(bank_loss, "streamed", lambda fused: fails)
    with pytest.raises(
        RuntimeError, match="streamed, M = 300, is left out, RuntimeError: out of memory"
    ):
        written(bank_loss.main, tmp_path, "--half")
    facts = json.loads((tmp_path / "bank-loss-cpu.json").read_text())
    assert {row["form"] for row in facts["rows"]} == {"half whole", "plain"} and sum(
        "is left out" in note for note in facts["notes"]
    ) == 4


def test_the_table_is_there_before_its_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "floor_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        written(step.main, tmp_path, "--rows bank")
    assert json.loads((tmp_path / "step-bank-cpu.json").read_text())["rows"]


def test_step_of_the_bank_objective(tmp_path):
    assert list(rows(written(step.main, tmp_path, "--rows bank --no-floor")["step-bank-cpu.json"]))[
        :3
    ] == ["ours, plain", "ours, fast", "ours, fast, ISL on"]


def test_growth(tmp_path):
    files = written(growth.main, tmp_path, "")
    assert set(files) == {"growth-gan-cpu.json", "growth-mining-cpu.json", "growth-loss-cpu.json"}
    assert any("seconds ~ M^b" in name for name in rows(files["growth-mining-cpu.json"]))
    assert rows(files["growth-gan-cpu.json"])["GAN, 40 iterations, M = 500"]["value"] > 0


def test_start_counts_to_the_first_step(tmp_path, monkeypatch):
    (row,) = written(start.main, tmp_path, "")["start-cpu.json"]["rows"]
    assert 0.5 < row["value"] < 120
    monkeypatch.setattr(start, "ROOT", tmp_path)
    script = tmp_path / "main_moco_isl.py"
    script.write_text("print('Epoch: [0][ 2/12]'); raise SystemExit(0)")
    with pytest.raises(RuntimeError, match="no first step"):
        start.seconds_to_first_step([], tmp_path)
    script.write_text("print('Epoch: [0][ 1/12]'); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit code 3"):
        start.seconds_to_first_step([], tmp_path)


@pytest.mark.long
def test_start_with_and_without_a_cache(tmp_path):
    runs.photos(tmp_path / "small", 64, side=16)
    found = rows(
        written(start.main, tmp_path / "results", f"--small {tmp_path / 'small'}")[
            "start-cache-cpu.json"
        ]
    )
    forms = ["without --cache", "empty cache", "full cache"]
    assert list(found) == [
        name for form in forms for name in (form, f"{form}: CPU time of the run")
    ]


def test_input(tmp_path):
    found = rows(written(photos.main, tmp_path, "")["input-cpu.json"])
    assert {"224 px, published: PIL", "500 px, ours, fast, all on the CPU"} <= set(found)


@pytest.mark.parametrize(
    ("main", "name", "count"),
    [(knn.main, "knn-cpu.json", 1), (bank_loss.main, "bank-loss-cpu.json", 4)],
)
def test_tables_of_other_columns(main, name, count, tmp_path):
    assert len(written(main, tmp_path, "")[name]["rows"]) == count


def test_index_beside_exact_search(tmp_path):
    pytest.importorskip("faiss")
    exact, approximate = written(index.main, tmp_path, "")["index-cpu.json"]["rows"]
    assert (exact["search"], approximate["search"]) == ("exact", "ivf")
    assert exact["recall"] == 1 and approximate["recall"] > 0.9
    assert (
        index.grown(F.normalize(torch.randn(50, 8), dim=1), 120)
        .norm(dim=1)
        .allclose(torch.ones(120))
    )


def test_index_without_faiss_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(index, "installed", lambda: False)
    assert (
        index.main(["--quick"]) == 2 and "pip install 'moco_isl[faiss]'" in capsys.readouterr().err
    )


def test_table_of_mining(tmp_path, capsys):
    found = rows(written(mining.main, tmp_path, "--sizes 1 5")["mining-cpu.json"])
    assert list(found)[:3] == ["round 0", "own nearest", "all pairs"]
    assert found["round 0"]["seconds"] > 0 and 0 < found["own nearest"]["at_5"] <= 1
    assert mining.main([]) == 2 and "give a feature file or --size M" in capsys.readouterr().err


# ---------------------------------------------------------------- what they are made of


def test_exponent_of_closed_forms():
    sizes = [100, 1000, 30_000]
    assert common.exponent(sizes, [3e-6 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert common.exponent(sizes, [7.0] * 3) == pytest.approx(0, abs=1e-12)


def test_work_of_products_is_counted_by_hand():
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    assert floor.work_of(lambda: (a @ b).relu()) == (2 * 3 * 5 * 7, 15 + 35 + 21)
    # and the gradient of a, [3, 7] times [7, 5]
    flops, elements = floor.work_of(lambda: (a @ b).sum().backward())
    assert flops == 2 * 2 * 3 * 5 * 7 and elements == 2 * (15 + 35 + 21)
    x, w = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    assert floor.work_of(lambda: F.conv2d(x, w))[0] == 2 * (2 * 8 * 4 * 4) * (4 * 9)


def test_turns_alternate_and_the_warm_up_is_left_out():
    seen = []
    timings = common.in_turns(
        {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, CPU, repeats=3, warmup=2
    )
    assert "".join(seen) == "aabb" + "ababab" and [len(t.seconds) for t in timings.values()] == [
        3,
        3,
    ]
    row = common.Timing([0.003, 0.001, 0.005]).row("x")
    assert (row["value"], row["low"], row["high"], row["n"]) == pytest.approx((3, 1, 5, 3))


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_red_fused_native_batch_norm_0", "joined by the compiler"),
        ("sm90_xmma_fprop_implicit_gemm_bf16", "convolutions and products"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW", "batch norm"),
        ("void at::native::vectorized_elementwise_kernel<4>", "one operation an element"),
        ("void cudnn::ops::nchwToNhwcKernel", "copies and layouts"),
        ("void at::native::multi_tensor_apply_kernel", "optimizer and averages"),
    ],
)
def test_kernels_are_put_together_by_what_they_do(kernel, kind):
    assert profiling.kind_of(kernel) == kind


def test_parts_that_fail_or_hang_cost_no_other(tmp_path, monkeypatch, capfd):
    (tmp_path / "part_good.py").write_text("print('a part that ran')")
    (tmp_path / "part_bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "part_slow.py").write_text(
        "import signal\ntry:\n    signal.pause()\nfinally:\n    print('written in time')"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(
        bench, "CPU", {"slow": ("part_slow", 5), "bad": ("part_bad", 60), "good": ("part_good", 60)}
    )
    assert bench.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    said = capfd.readouterr().out
    assert (
        "a part that ran" in said
        and "good: done" in said
        and "bad: exit code 3" in said
        and "slow: not done after 5 s" in said
        and "written in time" in said
    )
    assert bench.main(["--device", "cpu", "--out", str(tmp_path), "--only", "good"]) == 0
    assert (
        bench.main(["--device", "cpu", "--out", str(tmp_path), "--minutes", "0"]) == 1
        and "left out: no time" in capfd.readouterr().out
    )


# ---------------------------------------------------------------- the page

FACTS = {
    "title": "A table",
    "command": "python -m x",
    "date": "2026-01-02",
    "versions": {"torch": "2"},
    "notes": ["a note"],
    "device": {"name": "a machine", "kind": "cpu", "cores": 2, "threads": 1, "load": 0.5},
}


def test_page_of_timings_and_of_any_columns(tmp_path):
    (tmp_path / "results").mkdir()
    keep = lambda name, facts: (tmp_path / "results" / name).write_text(common.as_text(facts))
    timing = common.Timing([0.002, 0.001, 0.004])
    row = timing.row("fast", images_per_s=5000.0, ratio=3.21, of="slow")
    keep("a.json", {**FACTS, "rows": [{"what": "slow", "value": 6.42, "unit": "ms"}, row]})
    columns = [["m", "miner"], ["p", "precision"]]
    rows = [{"m": "knn | gan", "p": 0.5, "other": 1}, {"m": "none", "p": None}]
    text = {"device": "some text", "versions": "torch 2", "n": 3}
    keep("b.json", {**FACTS, **text, "columns": columns, "rows": rows})
    keep("c.json", {"seeds": []})
    page = results.page(tmp_path)
    assert "| fast | 2 ms | 1 to 4 | 3 | 3.21 | slow | 5,000 |" in page
    assert "| slow | 6.42 ms |  |  |  |  |  |" in page
    assert "| miner | precision |" in page
    assert "| knn \\| gan | 0.5 |" in page and "| none |  |" in page
    assert "a machine, 2 cores, 1 threads used, load 0.5 at the end; torch 2; 2026-01-02" in page
    assert "some text; torch 2; 2026-01-02; n = 3" in page and "- a note" in page
    assert page.endswith("Of another form, and so not shown: c.json.\n")


def test_a_file_of_results_has_a_row_a_line_and_nothing_that_is_none():
    facts = {"name": "x", "rows": [{"a": 1 / 3, "b": None}, {"a": [1 / 3, 2]}], "notes": []}
    text = common.as_text(facts)
    rows = [{"a": 0.333333}, {"a": [1 / 3, 2]}]
    assert json.loads(text) == {"name": "x", "rows": rows, "notes": []}
    assert text.splitlines()[2:5] == [
        ' "rows": [',
        '  {"a": 0.333333},',
        f'  {{"a": [{1 / 3}, 2]}}',
    ]


def test_the_files_of_results_are_what_is_written_and_the_pages_are_made_from_them():
    for folder in results.FOLDERS:
        assert results.page(folder) == (folder / "RESULTS.md").read_text(), (
            "run python -m benchmarks.results"
        )
        for path in (folder / "results").iterdir():
            assert common.as_text(json.loads(path.read_text())) == path.read_text(), path.name


def test_a_page_of_somebody_else_stays(tmp_path):
    (tmp_path / "RESULTS.md").write_text("# What was said")
    with pytest.raises(SystemExit, match="is there already and is none of this command's files"):
        results.main([str(tmp_path)])
    assert (tmp_path / "RESULTS.md").read_text() == "# What was said"
    (tmp_path / "RESULTS.md").unlink()
    results.main([str(tmp_path)])
    results.main([str(tmp_path)])
    assert (tmp_path / "RESULTS.md").read_text() == results.page(tmp_path)


def test_the_command_says_what_was_typed_but_not_where_things_lie(monkeypatch):
    monkeypatch.setattr(
        "sys.argv",
        [
            "x.py",
            "/data/of/mine/features.safetensors",
            "--gan",
            "3",
            "--out",
            "/tmp/results",
            "--folder",
            "runs/here",
        ],
    )
    assert common._command().endswith(" features.safetensors --gan 3 --folder runs/here")
