"""The script of the experiment: its parts are ladders that can be planned, and its tables say the best rates."""

import pytest

from hybridlm.config.serialization import to_dict
from hybridlm.files import write_json
from hybridlm.ladder.pilot import pilot_request, plan_rates
from hybridlm.ladder.pilot_report import PILOT_FILE
from hybridlm.ladder.plan import architecture_config, make_ladder_plan
from hybridlm.ladder.request import read_ladder_request
from hybridlm.ladder.rungs import RUNGS
from tests.support.experiment_scripts import load_experiment


@pytest.fixture
def script(monkeypatch):
    return load_experiment("ladder", monkeypatch)


def write_pilot(folder, losses, best):
    """A pilot of `ladder=bytes` with the same losses for all architectures."""
    folder.mkdir(parents=True, exist_ok=True)
    request = read_ladder_request(["ladder=bytes", f"ladder.dir={folder / 'none'}"])
    found = []
    for name in request.ladder.architectures:
        optimizer = to_dict(architecture_config(request, name).optimizer)
        centre = optimizer.pop("lr")
        rates = [{"lr": rate, "loss": loss, "losses": [], "diverged": 0 if loss else 1}
                 for rate, loss in losses.items()]
        found.append((name, {"optimizer": optimizer, "centres": [centre], "rates": rates, "best": best,
                             "at_edge": False, "missing": []}))
    write_json(folder / PILOT_FILE, {
        "rung": to_dict(RUNGS["r0"]), "base": to_dict(RUNGS["r0"]), "parametrization": request.ladder.parametrization,
        "seeds": [0], "architectures": dict(found), "warnings": []})


def test_every_part_is_a_ladder(script, tmp_path):
    sizes = script.Sizes()
    with pytest.raises(SystemExit, match="pilot has not finished"):
        script.check_parts(tmp_path, sizes)
    write_pilot(tmp_path / "ladder", {8e-3: None, 1.6e-2: None}, None)
    with pytest.raises(SystemExit, match="the pilot has no learning rate at which full trains"):
        script.check_parts(tmp_path, sizes)
    write_pilot(tmp_path / "ladder", {8e-3: 2.5, 1.6e-2: 2.4}, 1.6e-2)
    parts = [*script.pilot_parts(tmp_path, sizes), *script.check_parts(tmp_path, sizes),
             *script.transfer_parts(tmp_path, sizes), *script.ladder_parts(tmp_path, sizes, "0,1")]
    assert len(parts) == 1 + 3 + 6 + 1
    requests = {part.name: read_ladder_request([word for word in part.words if word != "--pilot"]) for part in parts}
    assert len(requests) == len(parts) - 1  # the pilot is in the folder of the ladder
    twice = requests["check-2"]
    assert twice.ladder.architectures["kda"]["optimizer.lr"] == 3.2e-2
    assert twice.ladder.base_size.name == "r0"
    assert [rung.name for rung in twice.ladder.sizes] == ["r1"]
    ladder = requests["ladder"].ladder
    assert [task.label for task in ladder.probes] == ["recall", "updates", "tracking"]
    points = {}
    for width in sizes.widths:
        request = requests[f"transfer-mup-{width}"]
        assert request.ladder.base_size.hidden_size == 32
        tried = plan_rates(request.ladder, {"full": 8e-3, "kda": 8e-3})
        assert [each.rate for each in tried[:5]] == [2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
        points[width] = make_ladder_plan(pilot_request(request, tried)).sweep.points
    assert [points[width][0].config.model.logit_multiplier for width in sizes.widths] == [1.0, 0.5, 0.25]
    assert len({points[width][0].tokens for width in sizes.widths}) == 1
    assert {points[width][0].stages[0].lr for width in sizes.widths} == {2e-3}


def test_tables_have_every_rate_and_the_best(script, tmp_path):
    sizes = script.Sizes()
    write_pilot(tmp_path / "ladder", {8e-3: 2.5, 1.6e-2: 2.4}, 1.6e-2)
    write_pilot(tmp_path / "transfer-mup-64", {8e-3: 2.25, 1.6e-2: 2.5}, 8e-3)
    rates = script.tabulate_rates(tmp_path)
    assert "| r0 | kda | 0.008 | 2.5000 |  |" in rates
    assert "| r0 | kda | 0.016 | 2.4000 | best |" in rates
    pilots = script.read_transfer(tmp_path, sizes)
    assert list(pilots) == [("mup", 64)]
    transfer = script.tabulate_transfer(pilots)
    assert "| mup | full | 64 | **2.250** | 2.500 | 0.008 |" in transfer


def test_figure_of_transfer(script, tmp_path):
    sizes = script.Sizes()
    for kind, width in (("standard", 32), ("standard", 64), ("mup", 64)):
        write_pilot(tmp_path / f"transfer-{kind}-{width}", {8e-3: 2.25, 1.6e-2: 2.5}, 8e-3)
    figure = tmp_path / "transfer.png"
    script.draw_transfer(script.read_transfer(tmp_path, sizes), figure)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("piloting", [True, False])
def test_a_part_that_was_stopped_does_not_go_on_to_the_next(script, tmp_path, monkeypatch, piloting):
    sizes = script.Sizes()
    part = (script.pilot_parts(tmp_path, sizes) if piloting else script.transfer_parts(tmp_path, sizes))[0]
    part.folder.mkdir(parents=True)
    monkeypatch.setattr(script, "hybridlm", lambda words: 0)  # the exit code of a ladder that was asked to stop
    for status, stops in (("waiting", True), ("interrupted", True), ("failed", False), ("finished", False)):
        write_json(part.folder / "results.json", {"points": [{"point": "kda_r0_seed-0", "status": status}]})
        if stops:
            with pytest.raises(SystemExit, match="did not finish; the same command goes on"):
                script.run(part, jobs=1)
        else:
            script.run(part, jobs=1)


def test_tables_of_losses_and_scores(script):
    cells = [{"rung": "r0", "architecture": name, "losses": {"0": loss}, "mean": loss, "tokens_per_second": 1234.5,
              "decode_milliseconds_per_token": None} for name, loss in (("full", 2.5), ("kda", 2.25), ("late", None))]
    cells[2]["losses"] = {}
    comparison = {"rung": "r0", "difference": -0.25, "difference_interval": [-0.5, 0.0], "gain": 2.0,
                  "gain_interval": None}
    points = [{"architecture": "kda", "scores": {"recall/accuracy": score}} for score in (1.0, 0.5)]
    points.append({"architecture": "full", "scores": {"updates/accuracy@72": 0.25}})
    report = {"cells": cells, "comparisons": {"kda": [comparison]}, "points": points}
    assert script.tabulate_losses(report).splitlines()[2:] == [
        "| r0 | full | 2.500 | 2.500 |  |  | 1,234 | - |",
        "| r0 | kda | 2.250 | 2.250 | -0.250 (-0.500 to +0.000) | 2.00 | 1,234 | - |",
        "| r0 | late | - |  |  |  | 1,234 | - |"]
    assert script.tabulate_scores(report).splitlines() == [
        "| architecture | recall | updates@72 |", "|---|---|---|", "| kda | 0.75 (1.00 0.50) | - |",
        "| full | - | 0.25 (0.25) |"]
