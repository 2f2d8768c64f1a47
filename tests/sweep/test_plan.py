"""From words to points: lists, what collapses, names, and what a mistake is told."""

import json

import pytest

from hybridlm.cli import main
from hybridlm.errors import ConfigError
from hybridlm.model.cost import count_parameters, decode_state_bytes, training_flops
from hybridlm.sweep import estimate
from hybridlm.sweep.plan import make_plan
from hybridlm.sweep.request import read_request, to_table_value
from hybridlm.training.stage_flops import run_flops

BASE = ["model=hybrid_tiny"]


def test_lists_are_multiplied_in_the_order_they_are_written():
    plan = make_plan([*BASE, "model.schedule.linear=kda,gdn", "training.seed=range(0,2)", "training.steps=7"])
    assert [point.name for point in plan.points] == ["linear-kda_seed-0", "linear-kda_seed-1", "linear-gdn_seed-0",
                                                     "linear-gdn_seed-1"]
    assert [point.config.training.seed for point in plan.points] == [0, 1, 0, 1]
    assert [point.config.model.layers()[0] for point in plan.points] == ["kda", "kda", "gdn", "gdn"]
    assert {point.config.training.steps for point in plan.points} == {7}
    assert {point.config.training.resume for point in plan.points} == {"auto"}
    assert len({point.config.run_dir for point in plan.points}) == 4
    assert plan.points[2].settings == {"model.schedule.linear": "gdn", "training.seed": 0}
    assert plan.points[2].group == {"model.schedule.linear": "gdn"}


def test_settings_that_name_one_model_are_one_point_and_the_plan_says_so():
    plan = make_plan([*BASE, "model.schedule.linear=kda,gdn", "model.schedule.ratio=0,7,inf"])  # four layers
    settings = [tuple(point.settings.values()) for point in plan.points]
    assert settings == [("kda|gdn", 0), ("kda", "7|inf"), ("gdn", "7|inf")]
    assert plan.points[0].same_as == [{"model.schedule.linear": "kda", "model.schedule.ratio": 0},
                                      {"model.schedule.linear": "gdn", "model.schedule.ratio": 0}]
    assert "6 combinations are 3 different runs" in plan.notes[0]


def test_points_that_read_other_data_are_pointed_out():
    other, same = (make_plan([*BASE, words]).notes for words in ("training.batch_size=2,4", "optimizer.lr=1e-3,2e-3"))
    assert any("do not read the same data" in note for note in other)
    assert "data order: the same in all points" in same


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("overrides: [model=hybrid_tiny, training.steps=3]\n"
                    "vary: {model.schedule.ratio: [0, .inf], training.seed: [0, 1]}\n")
    request = read_request([f"sweep={file}", "training.seed=4", "training.steps=9"])
    assert (request.sweep.name, request.vary) == ("mine", {"model.schedule.ratio": ["0", "inf"]})
    assert request.fixed == ["model=hybrid_tiny", "training.steps=9", "training.seed=4"]
    assert read_request([f"sweep={file}", "training.seed=7,8"]).vary["training.seed"] == ["7", "8"]


def test_the_sweeps_that_ship_compose():
    tiny = make_plan(["sweep=hybrid_ratio_tiny", "model.schedule.linear=kda,lightning", "model.schedule.ratio=0,inf"])
    assert (len(tiny.points), tiny.points[0].settings["model.schedule.linear"]) == (3, "kda|lightning")
    assert tiny.points[2].changed
    assert str(tiny.folder) == "runs/sweeps/hybrid_ratio_tiny"
    large = read_request(["sweep=hybrid_ratio"])
    assert (large.sweep.match, large.vary["model.schedule.ratio"]) == ("params", ["0", "1", "3", "7", "inf"])


def test_values_are_numbers_where_json_has_them():
    assert [to_table_value(text) for text in ("3", "1e-3", "inf", "kda")] == [3, 0.001, "inf", "kda"]


@pytest.mark.parametrize(("words", "says"), [
    (["sweep=hybrid_rato"], ["no such sweep", "did you mean 'hybrid_ratio'"]),
    (["sweep=nowhere.yaml"], ["nowhere.yaml"]),
    ([*BASE, "model.schedule.liner=kda,gdn"], ["model.schedule.liner", "did you mean 'linear'"]),
    ([*BASE, "training.seed="], ["training.seed", "empty list"]),
    ([*BASE, "training.seed=0,,1"], ["training.seed", "empty value"]),
    ([*BASE, "training.seed=[]"], ["training.seed", "empty list"]),
    ([*BASE, "training.seed=range(3,1)"], ["training.seed", "empty list"]),
    ([*BASE, "training.seed=interval(0,1)"], ["training.seed", "cannot be listed"]),
    ([*BASE, "training.seed=0"], ["varies nothing"]),
    ([*BASE, "run_dir=a,b"], ["run_dir", "cannot be varied"]),
    ([*BASE, "training.seed=0,1", "sweep.mach=params"], ["sweep.mach", "did you mean 'match'"]),
    ([*BASE, "training.seed=0,1", "sweep.match=width"], ["sweep.match", "none, params, active, flops, state"]),
    ([*BASE, "training.seed=0,1", "sweep.reference=seed-2"], ["sweep.reference", "did you mean 'seed-"]),
    ([*BASE, "training.seed=0,one"], ["training.seed", "'one'", "a whole number"]),
])
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *words]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(part in line for part in says), line
    assert list(tmp_path.iterdir()) == []


def test_an_empty_list_in_a_file_is_refused(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "bad.yaml").write_text("vary: {training.seed: []}\n")
    with pytest.raises(ConfigError, match=r"sweep\.vary\.training\.seed: is an empty list"):
        read_request(["sweep=bad"], str(tmp_path))


def test_an_estimate_by_flops_counts_what_each_stage_computes(monkeypatch):
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1e9, "made up"))
    points = make_plan(["model=kda_dsa_tiny", "recipe=dsa_scratch", "training.seed=0,1"]).points
    expected = sum(flops * stage.steps * stage.tokens_per_step for flops, stage in
                   zip(run_flops(points[0].config), points[0].stages, strict=True)) / 1e9
    assert estimate.estimate_by_flops(points)[0] == pytest.approx([expected, expected])
    dense, sparse = (training.model.mixers["dsa"].indexer.mode for training in estimate._trainings(points[0]))
    assert (dense, sparse) == ("dense", "sparse")


def test_a_dry_run_shows_every_cost_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*BASE, "model.schedule.ratio=0,1", "training.steps=2", "training.batch_size=1",
             "training.sequence_length=16"]
    assert main(["sweep", *words, "--dry-run", "--json", "--measure"]) == 0
    shown = json.loads(capsys.readouterr().out)
    for row, point in zip(shown["points"], make_plan(words).points, strict=True):
        model = point.config.model
        assert row["parameters"] == count_parameters(model).total_with_mtp
        assert row["active_parameters"] == count_parameters(model).active_with_head
        assert row["training_flops_per_token"] == training_flops(model, 16)
        assert row["decode_state_bytes"] == {str(n): decode_state_bytes(model, n) for n in (1 << 15, 1 << 20)}
        assert (row["tokens"], row["layers"]) == (32, model.layers())
        assert row["estimated_seconds"] > 0
    assert shown["estimated_by"].startswith("measured")
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1e9, "made up"))
    assert main(["sweep", *words, "--dry-run", "--no-measure"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(text in out for text in ("4 full", "2 kda + 2 full", "32K", "1M", "at least: training FLOPs"))
    assert list(tmp_path.iterdir()) == []
