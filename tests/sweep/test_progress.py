"""Estimates that learn from what points take, and the lines that say how far a sweep is."""

import json
from pathlib import Path

import pytest

from hybridlm.sweep import estimate, progress
from hybridlm.sweep.plan import make_plan
from hybridlm.sweep.progress import Progress

STEPS = 100


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


@pytest.fixture
def points(tmp_path):
    return make_plan(["model=hybrid_tiny", "model.schedule.ratio=0,inf", "training.seed=0,1", f"training.steps={STEPS}",
                      f"sweep.dir={tmp_path}"]).points


def train_to(point, step):
    folder = Path(point.config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": number, "loss": 1.0}) for number in range(1, step + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n" + '{"step": 9')  # a line that is being written


def test_a_finished_point_tells_how_long_its_kind_takes_and_how_wrong_the_others_are(points):
    names = [point.name for point in points]
    assert names == ["ratio-0_seed-0", "ratio-0_seed-1", "ratio-inf_seed-0", "ratio-inf_seed-1"]
    assert estimate.correct(points, [10.0, 10.0, 20.0, 20.0], {names[0]: 30.0}) == [30.0, 30.0, 60.0, 60.0]
    took = {names[0]: 30.0, names[1]: 34.0, names[2]: 40.0}
    assert estimate.correct(points, [10.0, 10.0, 20.0, 20.0], took) == [30.0, 34.0, 40.0, 40.0]
    assert estimate.correct(points, [10.0, 10.0, 20.0, 20.0], {}) == [10.0, 10.0, 20.0, 20.0]


def test_progress_says_step_and_time_by_the_pace_of_the_point(points, clock):
    said = []
    names = [point.name for point in points]
    sweep = Progress(points, [5.0] * 4, 1, said.append)
    sweep.started(names[0])
    clock.now += 8  # the process starts
    train_to(points[0], 1)
    sweep.tick(names[1:])
    assert said == []
    for step in range(2, 26):
        clock.now += 2
        train_to(points[0], step)
        sweep.tick(names[1:])
    assert sweep.seconds_left_of(names[0]) == pytest.approx(75 * 2)
    # This point will have taken 8 + 24 * 2 + 150 s, as will its kin; the others were guessed at as much.
    assert sweep.seconds_left(names[1:]) == pytest.approx(150 + 3 * 206)
    line, = said
    assert line == f"{names[0]}: step 12 of {STEPS}, about 0:02:56 left; about 0:13:14 left of the sweep"


def test_a_point_that_has_ended_corrects_the_rest_and_a_resumed_one_does_not(points, clock):
    names = [point.name for point in points]
    sweep = Progress(points, [5.0] * 4, 2, lambda text: None)
    train_to(points[1], 50)
    sweep.started(names[0])
    sweep.started(names[1])
    clock.now += 40
    sweep.ended(names[1], finished=True)  # from step 50: not what a whole point takes
    assert sweep.took == {}
    sweep.ended(names[0], finished=True)
    assert sweep.took == {names[0]: 40.0}
    assert sweep.seconds_left(names[2:]) == pytest.approx(40.0)  # two at a time
    assert sweep.seconds_left(names[3:]) == pytest.approx(40.0)  # one point takes its time, whatever runs beside it


def test_a_measured_estimate_knows_start_steps_and_validation(monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "START_OF_A_POINT", "import time; time.sleep(1)")
    words = ["model=hybrid_tiny", "model.num_layers=1", "training.batch_size=4", "training.sequence_length=32",
             f"sweep.dir={tmp_path}", "training.seed=0,1", "training.eval_batches=20"]

    def seconds(*more):
        found, how = estimate.estimate(make_plan([*words, *more]).points, measure=True)
        assert how.startswith("measured: ")
        assert found[0] == found[1]
        return found[0]

    short, long = seconds("training.steps=1"), seconds("training.steps=20000")
    assert short > 1.0
    assert long > 100 * (short - 1.0)
    validated = seconds("training.steps=20000", "training.eval_every=1")
    assert validated > 1.2 * long  # 20 batches after each step: as much as six steps


def test_steps_are_measured_only_where_that_is_cheap(monkeypatch, points):
    asked = []
    monkeypatch.setattr(estimate, "estimate_by_measurement", lambda points: asked.append(1) or ([1.0] * 4, "measured"))
    for rate, expected in ((1e12, "measured"), (1.0, "at least")):
        monkeypatch.setattr(estimate, "peak_flops", lambda *_, rate=rate: (rate, "made up"))
        assert estimate.estimate(points, measure=None)[1].startswith(expected)
    monkeypatch.setattr(estimate, "host_memory_bytes", lambda: 1 << 20)
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1e12, "made up"))
    assert estimate.estimate(points, measure=None)[1].startswith("at least")
    assert asked == [1]
