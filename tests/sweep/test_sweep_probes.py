"""Probes of a sweep: what is asked, what stays finished, and how results read."""

import csv
import json
from contextlib import closing

import pytest

from hybridlm.cli import main
from hybridlm.errors import ConfigError
from hybridlm.files import write_json
from hybridlm.sweep import run_point as point_process
from hybridlm.sweep.collect import collect
from hybridlm.sweep.folder import OUTCOME_FILE, POINT_FILE, check_owner, point_outcome, prepare_point
from hybridlm.sweep.plan import make_plan
from hybridlm.sweep.process import point_command
from hybridlm.sweep.request import read_request
from hybridlm.sweep.table import cost_row, describe_plan
from hybridlm.training.run_folder import RunFolder

MQAR = "{name: mqar, label: recall, parameters: {num_pairs: 1, key_vocab: 2, value_vocab: 2}, length: 4, " \
       "lengths: [4, 6], steps: 2, batch_size: 2, examples: 2}"
PARITY = "{name: parity, length: 3, lengths: [3], steps: 2, batch_size: 2, examples: 2}"
MODEL = ["model=hybrid_tiny", "model.num_layers=1", "model.hidden_size=16", "model.mtp.depth=0",
         "model.feed_forward={kind: dense, intermediate_size: 8}", "model.schedule.ratio=inf", "training.seed=0,1"]


def words(folder, *tasks):
    return [*MODEL, f"sweep.dir={folder}", "sweep.language_model=false", f"sweep.probes=[{', '.join(tasks)}]"]


def run(plan, names=None):
    """Run each point in this process, as the sweep does in others."""
    write_json(plan.folder / "sweep.json", describe_plan(plan, [0.0] * len(plan.points), "", ["waiting"] * 2, 1))
    for point in plan.points:
        if names is None or point.name in names:
            folder = prepare_point(point)
            code = point_process.run_point(folder)
            write_json(folder / OUTCOME_FILE, {"status": "failed" if code else "finished", "step": 0, "seconds": 1.0,
                                               "reason": "a probe failed"})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sweep").mkdir()
    return tmp_path / "sweep"


def test_a_probe_gives_rows_at_every_length_with_mean_and_spread_over_seeds(folder, capsys):
    plan = make_plan(words(folder, MQAR, PARITY))
    run(plan)
    assert {point_outcome(point)["status"] for point in plan.points} == {"finished"}
    results = collect(folder)
    with (folder / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["point"] == "seed-1"]
    values = {row["metric"]: float(row["value"]) for row in rows}
    saved = json.loads((folder / "points" / "seed-1" / "probes" / "recall.json").read_text())["result"]
    assert values["probe/recall/accuracy"] == saved["accuracy"]["4"]["token"]
    assert values["probe/recall/accuracy@6"] == saved["accuracy"]["6"]["token"]
    assert {"probe/parity/accuracy", "probe/parity/loss", "probe/parity/exact"} <= set(values)
    described = json.loads(next(row["probe"] for row in rows if row["metric"] == "probe/recall/accuracy"))
    assert (described["parameters"]["num_pairs"], described["steps"], described["chance"]) == (1, 2, 0.5)
    group = results["groups"][0]["metrics"]["probe/parity/accuracy"]
    assert (group["seeds"], group["max"] >= group["mean"] >= group["min"]) == (2, True)
    assert results["probes"]["recall"]["lengths"] == [4, 6]
    assert main(["sweep", f"sweep.dir={folder}", "--collect"]) == 0
    shown = capsys.readouterr().out
    assert "recall" in shown
    assert "accuracy" in shown


def test_finished_probes_stay_and_a_longer_list_trains_only_the_new_ones(folder, monkeypatch):
    run(make_plan(words(folder, MQAR)))
    trained = []
    monkeypatch.setattr(point_process, "train_on_probe",
                        lambda model, probe, *rest, **options: trained.append(probe.task) or _fail(probe))
    plan = make_plan(words(folder, MQAR, PARITY))
    check_owner(plan)
    assert [point_outcome(point)["status"] for point in plan.points] == ["waiting"] * 2
    run(plan, ["seed-0"])
    assert trained == ["parity"]
    results = collect(folder)
    assert results["points"][0]["status"] == "failed"
    assert "probe/recall/accuracy" in results["points"][0]["metrics"]
    assert "probe/parity/accuracy" not in results["points"][0]["metrics"]


def _fail(probe):
    raise RuntimeError("out of memory\nof which there is more to tell")


def test_a_probe_that_fails_is_named_and_the_next_one_runs(folder, monkeypatch, capsys):
    train = point_process.train_on_probe
    monkeypatch.setattr(point_process, "train_on_probe", lambda model, probe, *rest, **options: (
        _fail(probe) if probe.task == "mqar" else train(model, probe, *rest, **options)))
    plan = make_plan(words(folder, MQAR, PARITY))
    run(plan, ["seed-0"])
    assert "error: probe recall: out of memory\n" in capsys.readouterr().err
    assert [path.name for path in (folder / "points" / "seed-0" / "probes").iterdir()] == ["parity.json"]
    assert point_outcome(plan.points[0])["status"] == "failed"


def test_a_point_imports_the_code_of_the_user(folder):
    file = prepare_point(make_plan(words(folder, MQAR)).points[0]) / POINT_FILE
    command = point_command(file, ["kinds.py"])
    assert command[1:] == ["-m", "hybridlm.sweep.run_point", str(file.parent), "--import", "kinds.py"]
    (folder / "kinds.py").write_text("raise RuntimeError('imported')")
    assert point_process.main([str(file.parent), "--import", str(folder / "kinds.py")]) == 1


def test_a_point_that_another_process_holds_is_left_to_it(folder):
    point = make_plan(words(folder, MQAR)).points[0]
    with closing(RunFolder(prepare_point(point))), pytest.raises(ConfigError, match="another process"):
        point_process.run_point(folder / "points" / point.name)


@pytest.mark.parametrize("tasks", [[PARITY], [MQAR.replace("steps: 2", "steps: 3"), PARITY]])
def test_a_folder_with_other_probes_is_refused(folder, tasks):
    run(make_plan(words(folder, MQAR, PARITY)), [])
    with pytest.raises(ConfigError, match=r"holds another sweep: its probe recall is not the same"):
        check_owner(make_plan(words(folder, *tasks)))


def test_what_a_point_costs_counts_its_probes(folder):
    alone, both = make_plan(words(folder, MQAR)), make_plan([*words(folder, MQAR), "sweep.language_model=true",
                                                             "training.steps=3", "training.batch_size=1",
                                                             "training.sequence_length=8"])
    assert (cost_row(alone.points[0])["tokens"], cost_row(both.points[0])["tokens"]) == (2 * 2 * 4, 16 + 3 * 8)
    assert (alone.points[0].steps, both.points[0].steps) == (0, 3)
    assert [task.label for task in read_request(["sweep.probes=mqar,s5"]).sweep.probes] == ["mqar", "s5"]


@pytest.mark.parametrize(("word", "says"), [
    ("sweep.probes=mqar,s55", ["no probe of this name", "did you mean"]),
    ("sweep.probes=mqar,mqar", ["names two probes alike", "mqar", "a label for each"]),
    ("sweep.probes=[{name: mqar, parameters: {num_pair: 3}}]", ["num_pair", "did you mean 'num_pairs'"]),
    ("sweep.probes=[{name: mqar, length: 8}]", ["length", "too short for mqar", "at least 24"]),
    ("sweep.probes=[{name: s5, step: 8}]", ["step", "did you mean 'steps'"]),
    ("sweep.probes=[{name: s5, steps: 0}]", ["sweep.probes.0", "steps", "must be positive"]),
    ("sweep.probes=[{name: s5", ["sweep.probes", "cannot be read"]),
    ("sweep.language_model=false", ["there are no probes"]),
])
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, word, says):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *MODEL, word, "--dry-run"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(part in line for part in says), line


def test_decoding_is_timed_after_training_and_once(folder, tmp_path, monkeypatch):
    text = tmp_path / "text.py"
    text.write_text("x = 1\n" * 400)
    plan = make_plan([*MODEL, f"sweep.dir={folder}", f"data.path={text}", f"data.cache_dir={tmp_path}/cache",
                      "training.steps=2", "training.batch_size=1", "training.sequence_length=8",
                      "training.eval_batches=1"])
    del plan.points[1:]
    plan.points[0].work.decode_context = 12
    write_json(folder / "sweep.json", describe_plan(plan, [0.0], "", ["waiting"], 1))
    run_dir = prepare_point(plan.points[0])
    assert point_command(run_dir / POINT_FILE)[2] == "hybridlm.sweep.run_point"
    assert point_process.run_point(run_dir) == 0
    row = json.loads((run_dir / "decode.json").read_text())
    assert row["context"] == 12
    write_json(run_dir / OUTCOME_FILE, {"status": "finished", "step": 2, "seconds": 1.0})
    metrics = collect(folder)["points"][0]["metrics"]
    assert metrics["decode_milliseconds_per_token"] == pytest.approx(1000 / row["decode_tokens_per_second"])
    assert "validation_bits_per_byte" in metrics
    decode_speed = point_process.decode_speed
    monkeypatch.setattr(point_process, "decode_speed", None)  # a point that is started again does not measure again
    assert point_process.run_point(run_dir) == 0
    # The time behind another context is another number: the finished point waits until it is measured.
    plan.points[0].work.decode_context = 16
    assert point_outcome(plan.points[0])["status"] == "waiting"
    write_json(folder / "sweep.json", describe_plan(plan, [0.0], "", ["waiting"], 1))
    assert "decode_milliseconds_per_token" not in collect(folder)["points"][0]["metrics"]
    prepare_point(plan.points[0])
    monkeypatch.setattr(point_process, "decode_speed", decode_speed)
    assert point_process.run_point(run_dir) == 0
    assert json.loads((run_dir / "decode.json").read_text())["context"] == 16
    write_json(run_dir / OUTCOME_FILE, {"status": "finished", "step": 2, "seconds": 1.0})
    assert "decode_milliseconds_per_token" in collect(folder)["points"][0]["metrics"]


def test_decoding_that_fails_is_named_and_the_point_finishes(folder, tmp_path, monkeypatch, capsys):
    plan = make_plan(words(folder, MQAR))
    point = plan.points[0]
    point.work.decode_context = 12
    run_dir = prepare_point(point)
    assert point_process.run_point(run_dir) == 0  # probes alone leave no checkpoint
    assert "error: decoding: there is no checkpoint of the trained weights; to measure" in capsys.readouterr().err
    write_json(run_dir / OUTCOME_FILE, {"status": "finished", "step": 0, "seconds": 1.0})
    assert point_outcome(point)["status"] == "finished"
    write_json(folder / "sweep.json", describe_plan(plan, [0.0] * 2, "", ["waiting"] * 2, 1))
    assert "decode_milliseconds_per_token" not in collect(folder)["points"][0]["metrics"]
