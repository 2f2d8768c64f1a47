"""The coordinate check: what must stay of one size does, and the standard parametrization is seen to fail."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from hybridlm import load_config
from hybridlm.ladder import coordinates
from hybridlm.ladder.coordinate_report import check_ladder, print_check
from hybridlm.ladder.coordinates import Coordinate, CoordinateCheck, check_coordinates, steepest
from hybridlm.ladder.request import read_ladder_request
from hybridlm.optimizers import AdamWConfig, MuonConfig

WIDTHS = (64, 128, 256)


@pytest.fixture(scope="module")
def model():
    config = load_config("train", ["model=hybrid_probes", "model.schedule.ratio=1"]).model
    return replace(config.resize(64, 2), tie_embeddings=True, init_std=0.5 / 64**0.5)


@pytest.mark.parametrize(("make", "steps", "seeds"), [(AdamWConfig, 3, (0, 1)), (MuonConfig, 1, (0, 1, 2))])
def test_sizes_are_stable_under_mup_and_not_under_the_standard_parametrization(model, make, steps, seeds):
    check = CoordinateCheck(WIDTHS, seeds=seeds, steps=steps, rows=2, length=32)
    found = check_coordinates(model, make(lr=4e-3), check, "mup")
    assert not [(each.name, each.quantity, each.step, each.slopes) for each in found if each.excess > 0]
    assert {"embedding", "kda.q_proj", "kda output", "full.o_proj", "feed_forward output", "last residual",
            "logits"} <= {each.name for each in found}
    control = check_coordinates(model, make(lr=4e-3), check, "standard")
    assert steepest(control, "update").slope > 0.5 > 0.35 > steepest(found, "update").slope
    grown = {each.name for each in control if each.quantity == "change" and each.slope and each.slope > 0.15}
    assert {"logits", "kda.q_proj", "last residual"} <= grown


@pytest.mark.parametrize(("slopes", "stable", "uncertain"), [
    ((0.1, 0.12, 0.11), True, False), ((0.28, 0.12, 0.15), True, True), ((0.5, 0.52, 0.49), False, False),
    ((-0.5, -0.52, -0.49), False, False), ((0.2,), False, False), ((), True, False)])
def test_a_slope_is_unstable_only_where_its_interval_lies_beyond_the_bounds(slopes, stable, uncertain):
    found = Coordinate("last residual", "size", 1, {}, slopes)
    assert (found.is_stable, found.is_uncertain) == (stable, uncertain)
    assert Coordinate("logits", "size", 1, {}, (-0.5, -0.52, -0.49)).is_stable  # these may fall


@pytest.mark.parametrize(("slopes", "undecided"), [
    ((0.9, 1.1), True), ((0.28, 0.12, 0.15), True), ((0.17, 0.16, 0.14), False), ((0.1, 0.12), False)])
def test_what_no_interval_of_few_seeds_can_tell_is_undecided(slopes, undecided):
    found = Coordinate("last residual", "size", 1, {}, slopes)
    assert found.is_stable
    assert found.is_undecided == undecided


def check_with(monkeypatch, folder, sizes, seeds):
    """The report of a ladder's check and what it prints, where trainings give `sizes(kind, width, seed)`."""
    def train(config, optimizer, check, seed):
        rms = sizes(config.parametrization.kind, config.hidden_size, seed)
        return {("last residual", "change", 1): rms, ("embedding", "change", 1): 0.0}

    monkeypatch.setattr(coordinates, "_train", train)
    request = read_ladder_request(["ladder=tiny", f"ladder.dir={folder}"])
    report = check_ladder(request, [64, 128, 256], lambda line: None, seeds)
    text = io.StringIO()
    print_check(report, Console(file=text, width=200))
    saved = (folder / "coordinates.json").read_text()
    assert json.loads(saved) == report
    assert "NaN" not in saved
    assert "Infinity" not in saved
    return report, text.getvalue()


def growing(kind, width, seed):
    return float(width) if kind == "standard" else 1.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("seeds_that_diverge", [(0, 1, 2, 3), (2,)])
def test_a_training_that_blows_up_is_not_stable(monkeypatch, tmp_path, value, seeds_that_diverge):
    report, _ = check_with(monkeypatch, tmp_path, growing, seeds=4)
    assert (report["verdict"], report["passes"]) == ("passes", True)  # a change that is 0 everywhere is no fault

    def diverging(kind, width, seed):
        bad = kind != "standard" and width > 64 and seed in seeds_that_diverge
        return value if bad else growing(kind, width, seed)

    report, text = check_with(monkeypatch, tmp_path, diverging, seeds=4)
    assert (report["verdict"], report["passes"]) == ("fails", False)
    [row] = report["architectures"]["kda"]["completep"]["unstable"]
    assert (row["name"], row["diverged"]) == ("last residual", len(seeds_that_diverge))
    assert f"last residual change at step 1: not finite with {len(seeds_that_diverge)} of 4 seeds, unstable" in text


def test_a_control_that_is_not_finite_does_not_grow(monkeypatch, tmp_path):
    report, _ = check_with(monkeypatch, tmp_path, lambda kind, *_: math.nan if kind == "standard" else 1.0, seeds=2)
    assert not report["architectures"]["kda"]["control_grows"]
    assert report["verdict"] == "fails"


def test_two_seeds_do_not_make_a_steep_slope_pass(monkeypatch, tmp_path):
    def steep(kind, width, seed):
        return growing(kind, width, seed) if kind == "standard" else width ** (0.9 + 0.2 * seed)

    report, text = check_with(monkeypatch, tmp_path, steep, seeds=2)
    assert (report["verdict"], report["passes"]) == ("undecided", False)
    assert "UNDECIDED" in text
    assert "keep their size" not in text
    assert "--check-seeds 8 takes more" in text
