"""One number a run and metric, mean and spread over seeds, and what damaged files cost."""

import csv
import json
import math
import shutil
import statistics
import sys
from pathlib import Path

import pytest

from hybridlm.cli import main
from hybridlm.sweep import process
from hybridlm.sweep.collect import read_metrics, spread_over_seeds, summarize

SUPPORT = Path(__file__).parents[1] / "support"


def stand_in_command(file, imports):
    return [sys.executable, str(SUPPORT / "fake_train.py"), str(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep of two ratios and two seeds, run by the stand-in for training."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    words = ["model=hybrid_tiny", "training.steps=20", "model.schedule.ratio=0,1", "training.seed=0,4",
             f"sweep.dir={folder}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "point_command", stand_in_command)
        assert main(["sweep", *words]) == 0
    return folder


@pytest.fixture
def sweep(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "sweep"))


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_results_have_a_row_a_point_and_metric_and_mean_and_spread_over_seeds(sweep):
    with (sweep / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = {(row["model.schedule.ratio"], row["training.seed"], row["metric"]): float(row["value"]) for row in rows}
    assert values[("1", "4", "validation_loss")] == 2 + 4 + 1
    assert values[("0", "0", "loss")] == 10 - 19.5  # the mean of the last two of twenty steps
    assert values[("0", "0", "tokens_per_second")] == 1050  # the median
    assert values[("0", "4", "peak_memory_bytes")] == 6  # the most
    assert {row["metric"] for row in rows} == {"loss", "validation_loss", "tokens_per_second", "peak_memory_bytes",
                                               "seconds"}
    assert len(rows) == 4 * 5
    data = results(sweep)
    assert all(int(row["parameters"]) == data["points"][i // 5]["parameters"] for i, row in enumerate(rows))
    groups = {group["settings"]["model.schedule.ratio"]: group for group in data["groups"]}
    assert list(groups) == [0, 1]
    assert groups[1]["metrics"]["validation_loss"] == {"mean": 5.0, "std": math.sqrt(8), "min": 3.0, "max": 7.0,
                                                       "seeds": 2}
    assert groups[1]["layers"] == ["kda", "full", "kda", "full"]


def test_corrupt_lines_are_skipped_counted_and_said(sweep, capsys):
    before = results(sweep)["groups"]
    file = sweep / "points" / "ratio-0_seed-0" / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"{\"step\": 2, \xff\n", b"[]\n", *lines[1:], b'{"step": 21, "lo']))
    assert main(["sweep", f"sweep.dir={sweep}", "--collect"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "ratio-0_seed-0/metrics.jsonl: 3 corrupt lines skipped" in out
    assert results(sweep)["corrupt_lines"] == 3
    assert results(sweep)["groups"] == before


def test_a_metric_no_run_has_is_one_line_and_results_stay(sweep, capsys):
    before = (sweep / "results.csv").read_text()
    assert main(["sweep", f"sweep.dir={sweep}", "sweep.metrics=validation_lose", "--collect"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "sweep.metrics: no run has this metric; got 'validation_lose'" in line
    assert "did you mean 'validation_loss'?" in line
    assert (sweep / "results.csv").read_text() == before
    assert main(["sweep", f"sweep.dir={sweep}", "sweep.metrics=validation_loss", "--collect", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["points"][0]["metrics"]) == {"validation_loss"}


def test_unfinished_points_are_named_but_do_not_count(sweep, capsys):
    (sweep / "points" / "ratio-1_seed-4" / "outcome.json").unlink()
    assert main(["sweep", f"sweep.dir={sweep}", "--collect"]) == 0
    assert "3 of 4 points are finished" in capsys.readouterr().out
    data = results(sweep)
    assert [point["status"] for point in data["points"]] == ["finished", "finished", "finished", "waiting"]
    assert data["groups"][1]["metrics"]["validation_loss"] == {"mean": 3.0, "std": None, "min": 3.0, "max": 3.0,
                                                               "seeds": 1}


@pytest.mark.parametrize(("text", "says"), [(None, "holds no sweep"), ("{", "cannot be read"),
                                            ("[]", "cannot be read")])
def test_a_folder_without_a_sweep_is_one_line(tmp_path, capsys, text, says):
    if text is not None:
        (tmp_path / "sweep.json").write_text(text)
    assert main(["sweep", f"sweep.dir={tmp_path}", "--collect"]) == 2
    line = capsys.readouterr().err
    assert says in line
    assert line.count("\n") == 1


def test_summaries_leave_out_what_is_no_number(tmp_path):
    records = [{"step": 1, "loss": None, "stage": "a", "skipped": True, "lr": 0.1, "tokens": 5},
               {"step": 2, "loss": 3.0, "stage": "a", "skipped": False, "lr": 0.1, "tokens": 10}]
    assert summarize(records) == {"loss": 3.0, "tokens": 10.0}
    assert summarize([]) == {}
    assert read_metrics(tmp_path / "none.jsonl") == ([], 0)
    assert spread_over_seeds([1.0, 2.0, 6.0])["std"] == statistics.stdev([1, 2, 6])
