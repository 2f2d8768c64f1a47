"""The script of the sparse experiment: its pieces are sweeps that the configs allow, its figure is drawn."""

import pytest

from hybridlm.sweep.plan import make_plan
from tests.support.experiment_scripts import load_experiment


@pytest.fixture
def script(monkeypatch):
    return load_experiment("sparse", monkeypatch)


@pytest.mark.parametrize(("piece", "points"), [("scratch", 16), ("warmup", 8), ("residual", 6)])
def test_pieces_are_sweeps(script, piece, points, tmp_path):
    plan = make_plan([f"sweep.dir={tmp_path}", *script.PIECES[piece]])
    assert len(plan.points) == points
    assert {point.config.training.seed for point in plan.points} == {0, 1}


def test_losses_by_position(script, tmp_path):
    losses = {"6 kda + 2 full": {(0, 1): [5.0, 5.2], (1, 2): [4.0, 4.0]},
              "6 kda + 2 dsa": {(0, 1): [5.0, 5.3], (1, 2): [4.25, 4.75]}}
    table = script.tabulate_positions({"scratch": losses})
    assert "| 6 kda + 2 dsa | 5.150 (5.000-5.300) | 4.500 (4.250-4.750) |" in table.splitlines()
    assert "| layers | 0-0 | 1-1 |" in table.splitlines()
    script.draw_positions(losses, tmp_path / "positions.png")
    assert (tmp_path / "positions.png").read_bytes().startswith(b"\x89PNG")
