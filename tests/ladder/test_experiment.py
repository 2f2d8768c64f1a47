"""The script of the experiment: its parts are ladders that can be planned, and its tables say the best rates."""

import importlib.util
import sys
from pathlib import Path

import pytest

from hybridlm.files import write_json
from hybridlm.ladder.plan import make_ladder_plan
from hybridlm.ladder.request import read_ladder_request

SCRIPT = Path(__file__).parents[2] / "scripts" / "experiments" / "ladder.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("ladder_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ladder_experiment", module)
    spec.loader.exec_module(module)
    return module


def finish(out, part, losses):
    (out / part.name).mkdir(parents=True)
    cells = [{"architecture": name, "rung": rung, "mean": loss} for (name, rung), loss in losses.items()]
    write_json(out / part.name / "ladder.json", {"cells": cells})


def test_every_part_is_a_ladder(script, tmp_path):
    rates = {"full": 8e-3, "kda": 1.6e-2}
    parts = [*script.pilot_parts(tmp_path), *script.check_parts(tmp_path, 8e-3), *script.transfer_parts(tmp_path),
             *script.ladder_parts(tmp_path, rates, "0,1")]
    requests = {part.name: read_ladder_request(part.words) for part in parts}
    assert len(requests) == len(parts) == 4 + 3 + 10 + 1
    assert len({request.ladder.folder for request in requests.values()}) == len(parts)
    narrow, *_, wide = make_ladder_plan(requests["transfer-mup-0.008"]).sweep.points
    assert (narrow.config.model.logit_multiplier, wide.config.model.logit_multiplier) == (1.0, 0.25)
    assert narrow.tokens == wide.tokens
    assert narrow.stages[0].lr == wide.stages[0].lr == 8e-3
    ladder = requests["ladder"].ladder
    assert ladder.architectures["gdn"]["optimizer.lr"] == 1.6e-2
    assert [task.label for task in ladder.probes] == ["recall", "updates", "tracking"]


def test_rates_are_chosen_from_the_pilot_and_an_edge_is_marked(script, tmp_path):
    with pytest.raises(SystemExit, match="pilot has not finished"):
        script.choose_rates(tmp_path)
    for index, part in enumerate(script.pilot_parts(tmp_path)):
        finish(tmp_path, part, {("full", "r0"): 3.0 - 0.1 * index, ("kda", "r0"): 3.0 + 0.1 * abs(index - 1)})
    assert script.choose_rates(tmp_path) == {"full": 3.2e-2, "kda": 8e-3}
    table = script.tabulate_pilot(tmp_path)
    assert "| full | r0 | 3.0000 | 2.9000 | 2.8000 | 2.7000 | 0.032 (at the edge) |" in table
    assert "| kda | r0 | 3.1000 | 3.0000 | 3.1000 | 3.2000 | 0.008 |" in table
    first, *_ = script.transfer_parts(tmp_path)
    finish(tmp_path, first, {("full", "32x4"): 2.5})
    assert "| standard | full | 32 | 2.5000 | - | - | - | - | 0.002 |" in script.tabulate_transfer(tmp_path)
