"""The cluster of the suite: brought up once, taken down at the end; skipped where there can be
none, unless MOCO_ISL_REQUIRE_SLURM=1.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm.board import Board
from tests.slurm.cluster import Cluster, ClusterError, install

_boards = []


@pytest.fixture(scope="session")
def board(request):
    chosen = [
        item.callspec.params["name"]
        for item in request.session.items
        if "board" in getattr(item, "fixturenames", ())
    ]
    folder = Path(tempfile.mkdtemp(prefix="moco_isl_slurm_"))
    folder.chmod(0o755)  # the database's user has to pass
    cluster = Cluster(folder / "cluster")
    try:
        install()
        cluster.up()
    except ClusterError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if os.environ.get("MOCO_ISL_REQUIRE_SLURM") == "1":
            pytest.fail(f"MOCO_ISL_REQUIRE_SLURM=1, but there is no cluster: {error}")
        pytest.skip(str(error))
    board = Board(cluster, folder, chosen)
    _boards.append(board)
    try:
        yield board
    finally:
        board.close()
        cluster.down()
        if not request.session.testsfailed:
            shutil.rmtree(folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter):
    for board in _boards:
        terminalreporter.write_line("\n" + board.table())
        if file := os.environ.get("MOCO_ISL_SLURM_TABLE"):
            Path(file).write_text(board.table() + "\n")
        if board.folder.exists():
            terminalreporter.write_line(
                f"\nsomething failed: all folders and logs are kept in {board.folder}"
            )
