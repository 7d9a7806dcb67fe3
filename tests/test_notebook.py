"""docs/first_steps.ipynb: it has been executed from top to bottom, and still runs.

python -m tests.test_notebook       execute it and store what it gives
"""

import re
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"
KEPT = ("image/png", "text/plain")


def read():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook, folder):
    """The notebook with the outputs of a kernel of this Python, started in `folder`."""
    from ipykernel.kernelspec import write_kernel_spec
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    specs = Path(folder, "kernels")
    specs.mkdir()
    write_kernel_spec(specs / "python3")
    manager = AsyncKernelManager(
        kernel_name="python3",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(specs)]),
    )
    NotebookClient(
        notebook, km=manager, timeout=600, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def texts(cell):
    """All that a code cell has printed or shown as text."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from (str(x) for kind, x in output.get("data", {}).items() if "image" not in kind)


def test_it_is_valid_and_small():
    nbformat.validate(read())
    assert NOTEBOOK.stat().st_size < 300_000


def test_every_cell_was_executed_in_order_and_none_failed():
    cells = code(read())
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output.output_type for cell in cells for output in cell.outputs]
    assert "error" not in kinds and kinds.count("display_data") == 1  # the grid of sets
    warned = [o for cell in cells for o in cell.outputs if o.get("name") == "stderr"]
    assert not warned


def test_outputs_name_no_place_of_a_machine():
    path = re.compile(r"(?<![\w.])/(?:home|work|tmp|root|usr|Users|var|opt|mnt)\b|\w:\\")
    for cell in code(read()):
        for text in texts(cell):
            assert not path.search(text) and "site-packages" not in text


def test_what_it_says_is_what_it_found():
    """The sentences about this run, read off the figures that are stored beside them."""
    said = "".join(text for cell in code(read()) for text in texts(cell))
    rows = {
        name: [float(x) for x in re.search(rf"{name} +([\d.]+) % +([\d.]+) %", said).groups()]
        for name in ("before", "12 more of MoCo v2", "12 with sets")
    }
    for place, name in enumerate(("kNN", "1-shot")):
        gain = rows["12 with sets"][place] - rows["12 more of MoCo v2"][place]
        word, stored = re.search(
            rf"{name}: mining (.*) in this run \(([-+.\d]+) points", said
        ).groups()
        assert float(stored) == pytest.approx(gain, abs=0.11)
        assert word == (
            "helped" if gain > 2.5 else "harmed" if gain < -2.5 else "made no clear difference"
        )
    assert re.search(r"Round 1 by average: [1-9][\d.]* positives an image", said)


@pytest.mark.long
def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = execute(read(), tmp_path)
    assert all(cell.execution_count for cell in code(notebook))
    assert any("Round 1 by average" in text for cell in code(notebook) for text in texts(cell))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        done = execute(read(), place)
    for cell in code(done):
        cell.metadata.clear()  # when it ran
        for output in cell.outputs:
            if "data" in output:
                output.data = {kind: output.data[kind] for kind in KEPT if kind in output.data}
    nbformat.write(done, NOTEBOOK)
    sys.exit()
