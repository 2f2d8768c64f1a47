"""The command, with points whose results are known: running, stopping, going on, fitting again, the page."""

import json
from pathlib import Path

import pytest

from hybridlm.cli import main
from hybridlm.files import write_json
from hybridlm.ladder.plan import make_ladder_plan
from hybridlm.ladder.request import read_ladder_request
from hybridlm.model.cost import training_flops
from hybridlm.sweep import estimate, execute
from hybridlm.sweep.folder import point_outcome, prepare_point
from tests.support.ladder_folders import finish_point

WORDS = ["ladder=tiny", "ladder.fit.bootstrap=8", "ladder.seeds=0,1,2",
         "ladder.rungs=[{name: t0, hidden_size: 32, num_layers: 4}, {name: t1, hidden_size: 48, num_layers: 4}, "
         "{name: t2, hidden_size: 64, num_layers: 4}]"]


class Machine:
    """Stands for the processes of points: each finishes at once with the loss of its architecture's law."""

    def __init__(self):
        self.started: list[str] = []
        self.stop_after = 1000
        self.broken: set[str] = set()

    def __call__(self, points, *, jobs, retry_failed, say, imports, progress):
        for point in points:
            if point_outcome(point)["status"] == "finished":
                continue
            if len(self.started) >= self.stop_after:
                return "SIGTERM"
            self.started.append(point.name)
            self._finish(point)
        return None

    def _finish(self, point):
        if point.name in self.broken:
            write_json(prepare_point(point) / "outcome.json", {"status": "failed", "reason": "the loss is not finite"})
        else:
            flops = training_flops(point.config.model, point.config.training.sequence_length)
            finish_point(point, flops * point.tokens)


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(execute, "run_points", made)
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1e9, "made up"))
    return made


def ladder(folder, *more):
    return ["ladder", *WORDS, f"ladder.dir={folder}", "--no-measure", *more]


def read(folder: Path):
    return json.loads((folder / "ladder.json").read_text())


def test_a_ladder_runs_stops_goes_on_and_says_what_it_found(machine, tmp_path, capsys):
    machine.stop_after = 7
    largest = max(cost.compute for cost in make_ladder_plan(read_ladder_request(WORDS)).costs.values())
    assert main(ladder(tmp_path, f"ladder.gate.project={99 * largest}")) == 0
    out = capsys.readouterr().out
    assert "SIGTERM: go on with: hybridlm ladder ladder=tiny" in out
    assert "7 of 18 points have a result" in out
    assert "times beyond the largest compute with results" in out
    assert "without a result: kda_t2_seed-2: waiting" in out
    machine.stop_after = 1000
    assert main(ladder(tmp_path, "--json")) == 0
    assert len(machine.started) == len(set(machine.started)) == 18
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report == read(tmp_path)
    assert report["law"]["form"] == "pinned"
    [verdict] = report["verdicts"]
    assert (verdict["architecture"], verdict["verdict"]) == ("kda", "passes")
    assert [criterion["name"] for criterion in verdict["criteria"]] == ["loss", "speed-up"]
    assert len(report["comparisons"]["kda"]) == 3
    assert all(len(row["differences"]) == 3 for row in report["comparisons"]["kda"])
    assert {cell["decode_milliseconds_per_token"] for cell in report["cells"]} == {2.5}
    assert any("5.0 times" in warning for warning in report["warnings"])
    assert any("pinned at 0" in warning for warning in report["warnings"])
    csv = (tmp_path / "results.csv").read_text()
    assert "kda_t2_seed-2,kda,t2,2" in csv
    assert main(ladder(tmp_path, "ladder.fit.bootstrap=0")) == 0  # nothing is left to run
    assert len(machine.started) == 18
    out = capsys.readouterr().out
    assert "kda passes: loss:" in out
    assert f"try: hybridlm report {tmp_path}" in out


def test_fitting_again_takes_other_settings_of_fit_and_gate_alone(machine, tmp_path, capsys):
    assert main(ladder(tmp_path)) == 0
    before = read(tmp_path)
    capsys.readouterr()
    assert main(["ladder", f"ladder.dir={tmp_path}", "--fit-only"]) == 0
    assert read(tmp_path) == before
    largest = max(row["compute"] for row in before["points"])
    more = ["+ladder.gate.level=0.8", f"ladder.gate.project={10 * largest}", "ladder.reference=kda"]
    assert main(["ladder", f"ladder.dir={tmp_path}", "--fit-only", "--json", *more]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ladder"]["gate"]["level"] == 0.8
    assert [row["compute"] for row in report["projections"]["full"]] == [10 * largest]
    assert report["verdicts"][0]["verdict"] == "fails"
    assert len(machine.started) == 18
    for words, said in (
            ([f"ladder.dir={tmp_path}", f"ladder.gate.project={1000 * largest}"], "project: lies more than 100"),
            ([f"ladder.dir={tmp_path}", "ladder.fit.asymptote=99"], "is not below every loss"),
            ([f"ladder.dir={tmp_path}", "ladder.fit.form=free"], "ladder.fit.form: needs more points"),
            ([f"ladder.dir={tmp_path}", "ladder.seeds=4"], "ladder.seeds: cannot change without new runs"),
            ([f"ladder.dir={tmp_path / 'none'}"], "holds no ladder")):
        assert main(["ladder", "--fit-only", *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    words = [f"ladder.gate.project={1000 * largest}", "ladder.gate.extrapolate=true"]
    assert main(["ladder", f"ladder.dir={tmp_path}", "--fit-only", *words]) == 0


def test_a_failed_point_is_named_and_left_out(machine, tmp_path, capsys):
    machine.broken = {"kda_t1_seed-1"}
    assert main(ladder(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "failed: kda_t1_seed-1: the loss is not finite" in out
    report = read(tmp_path)
    assert report["missing"] == ["kda_t1_seed-1: failed"]
    assert [len(row["differences"]) for row in report["comparisons"]["kda"]] == [3, 2, 3]


def test_probes_of_the_largest_rung_do_not_hold_the_others_back(machine, tmp_path):
    assert main(ladder(tmp_path, "ladder.seeds=0", "ladder.probes=parity")) == 1  # nobody has trained on it
    assert {row["rung"]: row["status"] for row in read(tmp_path)["points"]} == {
        "t0": "finished", "t1": "finished", "t2": "waiting"}


def test_a_dry_run_writes_nothing_and_its_counts_are_those_of_the_run(machine, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "ladder"
    assert main(ladder(folder, "--dry-run", "--json")) == 0
    shown = json.loads(capsys.readouterr().out)
    assert not folder.exists()
    assert main(ladder(folder)) == 0
    capsys.readouterr()
    for row in read(folder)["points"]:
        cost = shown["ladder"]["costs"][row["point"]]
        assert {key: row[key] for key in cost} == cost
    assert main(ladder(folder, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "18 of 18 points finished" in out
    assert "3 kda + 1 full" in out
    assert " rung  architecture " in out, "what is piped is not folded"


def test_the_page_of_a_ladder_has_its_figures(machine, tmp_path, capsys):
    pytest.importorskip("plotly")
    assert main(ladder(tmp_path)) == 0
    assert main(["report", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["kind"] == "ladder"
    figures = {figure["id"]: figure for figure in report["figures"]}
    assert set(figures) == {"loss-over-compute", "differences", "residuals", "speed-up"}
    assert figures["differences"]["points"] == 3
    assert figures["loss-over-compute"]["series"] == ["full", "kda"]
    page = (tmp_path / "report.html").read_text()
    assert "passes" in page
    assert "Verdicts" in page


@pytest.mark.parametrize(("words", "said"), [
    (["--fit-only", "--dry-run"], "--fit-only: cannot stand beside --dry-run"),
    (["--fit-only", "--pilot"], "--pilot: cannot stand beside --fit-only"),
    (["--pilot", "ladder.pilot.factors=2"], "ladder.pilot.factors: has nothing to compare"),
    (["--pilot", "ladder.pilot.factors=1,0"], "ladder.pilot.factors: must be positive"),
    (["--pilot", "ladder.pilot.factors=1,1"], "ladder.pilot.factors: has nothing to compare"),
    (["--pilot", "ladder.pilot.factors=Infinity,1"], "ladder.pilot.factors: must be positive and finite"),
    (["--pilot", "ladder.pilot.seeds=1,1"], "ladder.pilot.seeds: has a seed twice"),
    (["--dry-run", "--check-seeds", "-5"], "--check-seeds: goes with --check-coordinates"),
    (["--dry-run", "--widths", "64,128"], "--widths: goes with --check-coordinates"),
    (["ladder.decode_context=0"], "ladder.decode_context: must be positive"),
    (["--jobs", "0"], "--jobs: must be positive"),
    (["--jobs", "2", "ladder.launcher=slurm"], "--jobs: goes with ladder.launcher=local"),
    (["--dry-run", "ladder.probes=[{name: mqar, steps: x}]"], "ladder.probes"),
    (["--check-coordinates", "--widths", "64"], "--widths: must ascend"),
    (["--check-coordinates", "ladder.parametrization=standard"], "carries nothing that could be checked")])
def test_options_that_do_not_fit_are_refused(words, said, capsys):
    assert main(["ladder", "ladder=tiny", *words]) == 2
    assert said in capsys.readouterr().err
