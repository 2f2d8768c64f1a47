"""What theory says of recurrent mixers holds when they are trained: who tracks a state, and how much a state recalls.

Transitions with eigenvalues in [0, 1] cannot count modulo 2 beyond the lengths that were learned by heart (Sarrof et
al. 2024; Grazzi et al. 2024, arXiv 2411.12537), and without a transition that mixes channels no permutation of three
things can be composed. A state of N numbers per channel holds about N pairs (Arora et al. 2023, arXiv 2312.04927).
All models are trained from scratch on the same examples, and the figures are those of one seed.
"""

from functools import partial

import pytest

from hybridlm.evaluation.probe_training import train_on_probe
from hybridlm.evaluation.probes import make_probe
from hybridlm.run_config import load_config

pytestmark = pytest.mark.slow


def train(mixer, probe, steps, lr, length, options=(), layers=1, seed=0, **parameters):
    """Token accuracy of layers of one mixer at the length of training and at twice that."""
    config = load_config("train", [
        "model=hybrid_tiny", f"model.num_layers={layers}", "model.hidden_size=32", "model.schedule.ratio=inf",
        "model.feed_forward={kind: dense, intermediate_size: 64}", "model.mtp.depth=0",
        f"model.schedule.linear={mixer}", *(f"model.mixers.{mixer}.{option}" for option in options)]).model
    result = train_on_probe(config, make_probe(probe, parameters), steps, lr, seed, length=length,
                            eval_lengths=[length, 2 * length], examples=64)
    return [score.token for score in result.accuracy.values()]


PARITY = partial(train, probe="parity", steps=150, lr=1e-2, length=16)
SHORT_PARITY = partial(train, probe="parity", steps=400, lr=1e-2, length=8, layers=2, seed=1)
S3 = partial(train, probe="s3", steps=250, lr=1e-2, length=10)
RECALL = partial(train, probe="mqar", steps=200, length=12, num_pairs=4, key_vocab=4, value_vocab=4)


@pytest.mark.parametrize(("mixer", "options"), [
    ("deltanet", ["beta_scale=2.0", "conv_size=0"]), ("delta_product", ["conv_size=0"])])
def test_negative_eigenvalues_learn_parity_at_any_length(mixer, options):
    assert min(PARITY(mixer, options=options)) > 0.97


@pytest.mark.parametrize(("mixer", "options"), [
    ("deltanet", ["conv_size=0"]), ("gla", []), ("mamba2", [])])
def test_eigenvalues_between_0_and_1_do_not_learn_parity(mixer, options):
    assert PARITY(mixer, options=options)[1] < 0.7


def test_rwkv7_carries_parity_further_than_gla():
    """Its eigenvalues lie above -0.455: a flip shrinks what it flips, and two layers go a part of the way."""
    assert SHORT_PARITY("rwkv7")[1] > 0.9
    assert SHORT_PARITY("gla")[1] < 0.8


def test_two_writes_per_token_compose_permutations():
    assert min(S3("delta_product", options=["conv_size=0"])) > 0.95


@pytest.mark.parametrize("mixer", ["gla", "mamba2"])
def test_diagonal_transitions_do_not_compose_permutations(mixer):
    assert S3(mixer)[1] < 0.5


@pytest.mark.parametrize(("mixer", "lr", "large", "small", "recalled", "lost"), [
    ("deltanet", 1e-2, ["num_heads=1", "head_dim=16"], ["num_heads=1", "head_dim=2"], 0.95, 0.5),
    ("mamba2", 3e-2, ["state_size=32"], ["state_size=1"], 0.85, 0.65)])
def test_recall_is_lost_where_pairs_exceed_the_state(mixer, lr, large, small, recalled, lost):
    assert RECALL(mixer, lr=lr, options=large)[0] > recalled
    assert RECALL(mixer, lr=lr, options=small)[0] < lost
