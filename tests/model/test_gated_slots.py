"""Slot attention: the papers' formulas token by token, and their start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import GatedSlotsConfig, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, inputs, run

H, T = 2, 7


def heads(projection, x):
    return projection(x).view(T, H, -1)


@pytest.mark.parametrize(("name", "per_group"), [("gsa", 1), ("gsa_groups", 2)])
def test_gsa_is_the_recurrence_of_the_paper(name, per_group):
    """With groups as in flash-linear-attention: queries h of group h // R read the slots of one key/value head."""
    mixer, x = build(name), inputs(1, T)
    H = 2 * per_group
    mixer.s_proj.weight.data *= 10.0  # strong decays
    with torch.no_grad():
        q = F.silu(mixer.q_proj(x[0]).view(T, H, 6))
        k, v = (F.silu(heads(p, x[0])) for p in (mixer.k_proj, mixer.v_proj))
        alpha = torch.sigmoid(heads(mixer.s_proj, x[0])) ** (1 / 8)
        outputs = []
        for h in range(H):
            keys, values = torch.zeros(5, 6, dtype=x.dtype), torch.zeros(5, 8, dtype=x.dtype)
            for t in range(T):
                a = alpha[t, h // per_group][:, None]
                keys = a * keys + (1 - a) * k[t, h // per_group]
                values = a * values + (1 - a) * v[t, h // per_group]
                outputs.append(values.T @ torch.softmax(keys @ q[t, h], 0))
        o = torch.stack(outputs).view(H, T, 8).transpose(0, 1).reshape(T, 8 * H)
        o = F.silu(o)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
        torch.testing.assert_close(run(mixer, x)[0], mixer.o_proj(o))


def test_abc_averages_tokens_under_a_softmax_over_time():
    mixer, x = build("abc"), inputs(1, T)
    mixer.s_proj.weight.data *= 10.0
    with torch.no_grad():
        q, k, v = (heads(p, x[0]) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        angle = torch.arange(T)[:, None] / 10000.0 ** (torch.arange(4) / 4)
        turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)[:, None]
        q, k = (turn * torch.complex(y[..., :4], y[..., 4:]) for y in (q, k))  # pairs i and i + 4
        logits = heads(mixer.s_proj, x[0]).clamp(-32, 32)
        assert logits.abs().max() == 32, "the bound is tested too"
        o = torch.zeros(T, H, 8, dtype=x.dtype)
        for t in range(T):
            weights = torch.softmax(logits[: t + 1], 0)  # over the tokens so far
            keys = torch.einsum("shm,shk->hmk", weights.to(k.dtype), k[: t + 1])
            values = torch.einsum("shm,shv->hmv", weights, v[: t + 1])
            scores = torch.einsum("hk,hmk->hm", q[t].conj(), keys).real
            o[t] = torch.einsum("hm,hmv->hv", torch.softmax(scores * 8**-0.5, -1), values)
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
        o = o * F.silu(heads(mixer.g_proj, x[0]))
        torch.testing.assert_close(run(mixer, x)[0], mixer.o_proj(o.flatten(1)))


@pytest.mark.parametrize("rule", ["gsa", "abc"])
def test_all_projections_start_alike(rule):
    torch.manual_seed(0)
    mixer = build_mixer(GatedSlotsConfig(num_heads=4, head_dim=16, rule=rule), context())
    mixer.init_weights(0.02)
    for name, parameter in mixer.named_parameters():
        if name == "o_norm.weight":
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize(("options", "message"), [
    ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads: must divide num_heads"),
    ({"num_slots": 0}, "num_slots: must be positive"),
    ({"max_logit": 0.0}, "max_logit: must be positive"),
    ({"rule": "abc", "head_dim": 7}, "head_dim: must rotate an even number of dims"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        GatedSlotsConfig(**{"num_heads": 2, "head_dim": 8} | options)
