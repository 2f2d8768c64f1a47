"""The coordinate check: what must stay of one size does, and the standard parametrization is seen to fail."""

from dataclasses import replace

import pytest

from hybridlm import load_config
from hybridlm.ladder.coordinates import Coordinate, CoordinateCheck, check_coordinates, steepest
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
