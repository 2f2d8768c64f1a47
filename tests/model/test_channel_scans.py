"""Mixers with one state per channel: equal to transformers, to the papers' formulas, with the published start."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import RGLRUConfig, build_mixer
from hybridlm.model.mixers.rg_lru import bounded_sqrt
from tests.support.layer_parity import (
    BATCH,
    HIDDEN,
    LENGTH,
    TOLERANCE,
    context,
    ours,
    positions,
    random_weights,
    renamed,
    token_inputs,
)
from tests.support.mixer_cases import build, inputs, run


def test_equals_the_recurrent_block_of_recurrent_gemma():
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    theirs = RecurrentGemmaConfig(hidden_size=HIDDEN, lru_width=HIDDEN, num_attention_heads=4, num_hidden_layers=3)
    layer = RecurrentGemmaRecurrentBlock(theirs, 0)
    random_weights(layer)
    names = {"linear_x": "x_proj", "linear_y": "y_proj", "linear_out": "out_proj", "conv_1d": "conv", "rg_lru.": "",
             "recurrent_param": "Lambda", "input_gate_weight": "input_gate", "input_gate_bias": "input_bias",
             "recurrent_gate_weight": "recurrence_gate", "recurrent_gate_bias": "recurrence_bias"}
    weights = renamed(layer, names)
    weights["conv.weight"] = weights["conv.weight"][:, 0]
    for name in ("input_bias", "recurrence_bias"):
        weights[name] = weights[name].flatten()
    x = token_inputs()
    with torch.no_grad():
        expected, _ = layer(x, positions(), torch.ones(BATCH, LENGTH), use_cache=False)
        torch.testing.assert_close(ours(RGLRUConfig(num_heads=4), weights, x), expected, **TOLERANCE)


def test_the_start_of_griffin_is_the_published_one():
    torch.manual_seed(0)
    mixer = build_mixer(RGLRUConfig(num_heads=4), context())
    mixer.init_weights(0.02)
    square = (-mixer.Lambda).sigmoid() ** 2  # exp(-softplus(Lambda))^2
    assert square.min() > 0.9**2 - 1e-4
    assert square.max() < 0.999**2 + 1e-4
    assert square.mean().item() == pytest.approx((0.9**2 + 0.999**2) / 2, abs=0.02)
    assert mixer.input_gate.std().item() == pytest.approx((0.01 / 16) ** 0.5, rel=0.1)
    assert mixer.conv.weight.std().item() == pytest.approx((0.01 / 4) ** 0.5, rel=0.15)


def test_the_slope_of_the_square_root_is_bounded():
    x = torch.tensor([0.0, 1e-12, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    y = bounded_sqrt(x)
    assert torch.equal(y.detach(), x.detach().sqrt())
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == pytest.approx([1000.0, 1000.0, 1.0, 0.5])


@pytest.mark.parametrize("name", ["min_gru", "min_lstm"])
def test_gates_read_the_token_alone(name):
    """The recurrence of the paper, token by token, on the projections of the mixer."""
    mixer, x = build(name), inputs(1, 5)
    with torch.no_grad():
        u = x[0]
        if mixer.conv is not None:
            padded = torch.nn.functional.pad(u, (0, 0, 3, 0))
            u = mixer.conv.bias + sum(padded[w : w + 5] * mixer.conv.weight[:, w] for w in range(4))
        h, states = torch.zeros(mixer.h_proj.out_features, dtype=x.dtype), []
        for t in range(5):
            raw = mixer.h_proj(u[t])
            candidate = torch.where(raw >= 0, raw + 0.5, raw.sigmoid())
            if name == "min_gru":
                z = mixer.z_proj(u[t]).sigmoid()
                h = (1 - z) * h + z * candidate
            else:
                f, i = mixer.f_proj(u[t]).sigmoid(), mixer.i_proj(u[t]).sigmoid()
                h = (f * h + i * candidate) / (f + i)
            states.append(h)
        torch.testing.assert_close(run(mixer, x)[0], mixer.out_proj(torch.stack(states)))


def test_blocks_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="num_heads: must divide the width of the recurrence; got 5"):
        build_mixer(RGLRUConfig(num_heads=5), context())
