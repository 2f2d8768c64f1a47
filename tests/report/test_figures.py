"""What figures show: the numbers of the files, thinned honestly, with a front that nothing beats."""

import math
import statistics

import pytest

from hybridlm.report.document import document
from hybridlm.report.figures import Axis, Chart, Panel, Series, extent, log_ticks, number, spaced, thinned, unit_of
from hybridlm.report.palette import TRAINING
from hybridlm.report.read import read
from hybridlm.report.sweep_axes import Axes
from hybridlm.report.sweep_figures import front
from tests.support import report_folders as folders


def by_id(page):
    return {figure.id: figure for figure in page.figures}


def lines(panel):
    return {series.name: series for series in panel.series}


def test_a_run_with_everything_has_every_figure(tmp_path):
    page = document(read(folders.run_folder(tmp_path / "run", dsa=True)))
    figures = by_id(page)
    assert list(figures) == ["loss", "learning-rate", "gradient-norm", "speed", "memory", "expert-overload", "experts",
                             "indexer-recall", "indexer-recall-layers", "indexer-kl", "indexer-kl-layers"]
    assert page.notes == []
    loss = lines(figures["loss"].panels[0])
    assert loss["training"].y == [6 - math.log(step) for step in range(1, 21)]
    assert loss["validation"].x == [5, 10, 15, 20]
    assert figures["loss"].borders == [(0.0, "first"), (10.0, "second")]
    assert figures["experts"].z == [[4.0, 0.0, 0.0, 0.0]] * 2
    assert figures["expert-overload"].z[1][3] == 0.75
    recall = lines(figures["indexer-recall-layers"].panels[0])
    assert recall["recall"].y == [0.25, 0.75]
    assert recall["attainable"].y == [0.7, 0.9]
    facts = dict(page.facts)
    assert facts["layers"] == "5 kda + 2 full"
    assert facts["validation loss"] == number(6.5 - math.log(20))
    assert facts["peak memory"] == "420 MiB"


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    folders.write_records(tmp_path / "run", [{"step": 1, "loss": 2.0}])
    page = document(read(tmp_path / "run"))
    assert [figure.id for figure in page.figures] == ["loss"]
    assert page.notes == [
        "there is no config.yaml",
        "not drawn because there is no data: learning rate, norm of the gradient, tokens/s, memory, expert load over "
        "time, load of each expert, DSA recall, DSA recall by layer, DSA KL, DSA KL by layer"]


def test_any_metric_can_be_drawn(tmp_path):
    run = folders.run_folder(tmp_path / "run", steps=5)
    page = document(read(run, ["grad_norm"]), ["grad_norm"])
    assert page.figures[-1].title == "grad_norm"
    assert page.figures[-1].panels[0].series[0].y == [1 / step for step in range(1, 6)]


def test_points_lie_on_the_line_of_their_mixer_and_the_full_model_on_all(sweep):
    axes = Axes(read(sweep))
    assert axes.x == ("0", "∞")
    assert axes.lines == ["kda", "gdn"]
    assert [group.name for group in axes.groups] == ["full", "kda only", "gdn only"]
    assert axes.at("kda", "0") is axes.at("gdn", "0")
    assert axes.style("kda").colour != axes.style("gdn").colour


def test_losses_are_means_over_seeds_of_finished_points(sweep):
    losses = lines(by_id(document(read(sweep)))["validation-loss"].panels[0])
    base = 6.5 - math.log(20)
    assert losses["kda"].y == pytest.approx([base + 0.005, base + 1.005])
    assert losses["gdn"].y[1] == pytest.approx(base + 1.0)  # the other seed is half done
    assert losses["kda"].high[0] == pytest.approx(base + 0.005 + statistics.stdev([0, 0.01]))
    assert losses["gdn"].high[1] is None


def test_a_line_has_a_gap_where_no_point_has_finished(tmp_path):
    folder = folders.sweep_folder(tmp_path / "sweep", {"model.schedule.ratio": [0, 1, 3]}, steps=5,
                                  unfinished=["ratio-1"])
    page = document(read(folder))
    (line,) = by_id(page)["validation-loss"].panels[0].series
    assert line.x == ["0", "1", "3"]
    assert [value is None for value in line.y] == [False, True, False]


def test_each_probe_is_drawn_against_ratio_and_against_length(sweep):
    figures = by_id(document(read(sweep)))
    ratio, length = figures["probe-mqar"], figures["probe-mqar-length"]
    assert [panel.title for panel in ratio.panels] == ["length 32", "length 64"]
    assert lines(ratio.panels[1])["kda"].y == pytest.approx([0.8, 0.35])
    assert [panel.title for panel in length.panels] == ["ratio 0", "ratio ∞"]
    assert lines(length.panels[1])["gdn"].y == pytest.approx([0.45, 0.35])
    assert ratio.panels[0].level == (pytest.approx(1 / 64), "chance")


def test_the_front_is_what_nothing_beats(sweep):
    chart = by_id(document(read(sweep)))["pareto"]
    assert [panel.title for panel in chart.panels] == ["mean of all probes", "mqar", "parity"]
    line = lines(chart.panels[1])["front"]
    assert line.y == [0.45, 0.45, 0.9]  # two models at the same cost
    rows = [row for row in chart.table().rows if row[0] == "mqar"]
    assert [row[1] for row in rows if row[4] == "yes"][-1] == "full"
    assert len(rows) == 3
    assert front([(1, 0.5), (2, 0.5), (2, 0.9), (3, 0.2), (1, 0.5)], larger=True) == {0, 2, 4}
    assert front([(1, 0.5), (2, 0.4), (3, 0.4)], larger=False) == {0, 1}


def test_curves_of_points_that_still_run_are_drawn_with_their_spread(sweep):
    panel = by_id(document(read(sweep)))["curves-loss"].panels[1]
    gdn = lines(panel)["gdn"]
    assert len(gdn.x) == 20
    assert gdn.high[4] - gdn.low[4] == pytest.approx(0.01)
    assert gdn.high[14] == gdn.low[14]  # one seed has come so far


def test_a_sweep_without_a_ratio_has_its_own_axis(tmp_path):
    folder = folders.sweep_folder(tmp_path / "sweep", {"optimizer.lr": [0.001, 0.002]}, steps=5)
    axes = Axes(read(folder))
    assert (axes.title, axes.x, axes.lines) == ("optimizer.lr", ("0.001", "0.002"), ["all points"])
    page = document(read(folder))
    assert len(by_id(page)["validation-loss"].panels[0].series) == 1
    assert "probes" in page.notes[-1]


def test_two_lists_beside_the_mixer_make_lines_of_their_own(tmp_path):
    folder = folders.sweep_folder(tmp_path / "sweep", {"model.schedule.ratio": [0, 1], "optimizer.lr": [0.001, 0.002]},
                                  steps=5)
    axes = Axes(read(folder))
    assert axes.lines == ["lr 0.001", "lr 0.002"]
    assert axes.style(axes.lines[0]) != axes.style(axes.lines[1])


def test_long_lines_are_averaged_and_keep_their_mean():
    x, y, n = thinned(list(range(1, 1001)), [float(value) for value in range(1000)], most=100)
    assert (len(x), n, x[-1]) == (100, 10, 1000)
    assert statistics.fmean(y) == statistics.fmean(range(1000))
    assert thinned([1, 2], [3.0, 4.0]) == ([1, 2], [3.0, 4.0], 1)
    assert thinned([], []) == ([], [], 1)


def test_tables_say_how_many_rows_they_leave_out():
    series = Series("loss", TRAINING, list(range(100)), [float(value) for value in range(100)])
    table = Chart("id", "title", "", Axis("step"), Axis("loss"), [Panel("", [series])]).table()
    assert (len(table.rows), table.note) == (40, "40 of 100 rows")
    assert table.rows[0] == ["0", "0"]
    assert table.rows[-1] == ["99", "99"]
    assert spaced(5, 10) == [0, 1, 2, 3, 4]


def test_numbers_and_axes():
    assert [number(value) for value in (None, "inf", 3.0, 0.123456, 123456.7)] == ["-", "inf", "3", "0.1235", "123,457"]
    assert number(3 << 20, "bytes") == "3 MiB"
    assert unit_of(Axis("memory", "bytes"), [5 << 30, 1]) == (1024.0**3, "memory (GiB)")
    assert extent(Axis("KL", log=True), [0.0, 1.0])[2] is False, "zero has no place on a logarithmic axis"
    assert extent(Axis("KL", log=True), [0.1, 1.0])[2] is True
    low, high, _ = extent(Axis("loss"), [2.0, 2.0])
    assert low < 2 < high
    assert log_ticks(0.3, 4) == [0.5, 1.0, 2.0]
    assert log_ticks(1.26, 3.7) == [1.5, 2.0, 2.5, 3.0, 3.5]
    assert log_ticks(1.9, 2.1) == [1.9, 2.0, 2.1]
    assert log_ticks(2.0, 2.0) == [2.0]
    assert log_ticks(0.3, 4000) == [1.0, 10.0, 100.0, 1000.0]
