"""A softmax window beside a linear part: the published formulas token by token, the published start, bad options."""

from __future__ import annotations

import math

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import AttentionConfig, WindowGLAConfig, WindowLinearConfig, build_mixer
from hybridlm.model.rope import rotate
from hybridlm.model.sequence import SequenceInfo
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, context_of, inputs, run

T = 30


def projections(mixer, x):
    """Queries, keys and values [T, H, K] before rotation, keys and values repeated for the heads of their group."""
    config = mixer.config
    q, k, v = (proj(x).unflatten(-1, (-1, config.head_dim)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    return q, *(y.repeat_interleave(config.num_heads // config.kv_heads, 1) for y in (k, v))


def rotated(mixer, y):
    seq = SequenceInfo.make(1, T, y.device)
    return rotate(y[None], mixer.config.rope, mixer.rotary_dim, seq)[0]


@pytest.mark.parametrize("name", ["lolcats", "lolcats_convex"])
def test_one_denominator_as_in_the_code_of_lolcats(name):
    mixer, x = build(name), inputs(1, T)[0]
    config = mixer.config
    with torch.no_grad():
        q, k, v = projections(mixer, x)
        q, k = rotated(mixer, q), rotated(mixer, k)
        out = torch.zeros_like(q)
        for h in range(config.num_heads):
            maps = {"q": mixer.q_map[h], "k": mixer.k_map[h]}
            phi = {side: torch.cat([(y[:, h] @ maps[side]).softmax(-1), (-y[:, h] @ maps[side]).softmax(-1)], -1)
                   for side, y in (("q", q), ("k", k))}
            near = mixer.window_factor[h].sigmoid()
            far = 1 - near if config.convex else 1.0
            for t in range(T):
                first = max(0, t - config.window + 1)
                scores = k[first : t + 1, h] @ q[t, h] / config.head_dim**0.5
                weights = torch.cat([far * phi["k"][:first] @ phi["q"][t], near * (scores - scores.max()).exp()])
                out[t, h] = weights @ v[: t + 1, h] / weights.sum()
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(out.flatten(1)))


def test_halves_as_in_the_code_of_liger():
    mixer, x = build("liger"), inputs(1, T)[0]
    with torch.no_grad():
        q, k, v = projections(mixer, x)
        q_turned, k_turned = rotated(mixer, q), rotated(mixer, k)
        out, state = torch.zeros_like(q), torch.zeros(4, 8, 8, dtype=x.dtype)
        for t in range(T):
            first = max(0, t - mixer.config.window + 1)
            state = k[t].sigmoid()[..., None] ** (1 / 16) * state + k[t].softmax(-1)[..., None] * v[t][:, None]
            for h in range(4):
                p = (k_turned[first : t + 1, h] @ q_turned[t, h] / 8**0.5).softmax(0)
                out[t, h] = 0.5 * p @ v[first : t + 1, h] + 0.5 * q[t, h].softmax(-1) @ state[h]
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(out.flatten(1)))


def test_the_start_of_lolcats():
    torch.manual_seed(0)
    mixer = build_mixer(WindowLinearConfig(num_heads=4, head_dim=16, window_factor_init=-2.0), context())
    mixer.init_weights(0.02)
    assert mixer.q_map.shape == (4, 16, 8)
    for weight in (mixer.q_map, mixer.k_map):
        bound = math.sqrt(6 / (16 * 8))
        assert bound * 0.95 < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert bool((mixer.window_factor == -2.0).all())


def test_liger_takes_the_weights_of_attention():
    source = build_mixer(AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), context_of())
    source.init_weights(0.1)
    config = WindowGLAConfig(num_heads=4, num_kv_heads=2, head_dim=8)
    taken = config.initial_weights_from(source.config, dict(source.named_parameters()), NormConfig())
    mixer = build_mixer(config, context_of())
    mixer.load_state_dict(taken)
    assert all(torch.equal(taken[name], value) for name, value in source.state_dict().items())
    other = WindowGLAConfig(num_heads=2, head_dim=8)
    assert other.initial_weights_from(source.config, dict(source.named_parameters()), NormConfig()) == {}


@pytest.mark.parametrize(("config", "options", "message"), [
    (WindowLinearConfig, {"window": 0}, "window: must be positive; got 0"),
    (WindowLinearConfig, {"feature_dim": 0}, "feature_dim: must be positive; got 0"),
    (WindowGLAConfig, {"gate_normalizer": 0.0}, "gate_normalizer: must be positive; got 0"),
])
def test_options_that_cannot_be(config, options, message):
    with pytest.raises(ConfigError, match=message):
        config(num_heads=4, head_dim=8, **options)
