"""Pretraining on a real SLURM of two nodes: what clusters do to a job, and that nothing is lost.
See scenarios.py for what each does.

make test-slurm        all of it;  MOCO_ISL_SLURM_TABLE=FILE keeps the table
"""

import pytest

import tests.slurm.scenarios  # noqa: F401 (it registers them)
from tests.slurm.board import SCENARIOS

pytestmark = pytest.mark.slurm


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slurm_smoke] if s.smoke else [])
        for name, s in SCENARIOS.items()
    ],
)
def test_scenario(name, board):
    board.result(name)
