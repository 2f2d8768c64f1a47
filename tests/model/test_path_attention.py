"""PaTH attention: the formulas of the paper token by token, the published start, bad options."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import PathAttentionConfig, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, inputs, run

T, K = 8, 8


@pytest.mark.parametrize("name", ["path", "path_fox"])
def test_the_formula_of_the_paper(name):
    mixer, x = build(name), inputs(1, T)[0]
    config = mixer.config
    H, G = config.num_heads, config.kv_heads
    with torch.no_grad():
        q, k, v = (proj(x).unflatten(-1, (-1, K)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        if config.qk_norm:
            q, k = mixer.q_norm(q), mixer.k_norm(k)
        if config.w_rank is None:
            w = mixer.w_proj(x)
        else:
            w = torch.nn.functional.pad(mixer.w_b_proj(mixer.w_a_proj(x)), (0, 0, 2, 0))
            w = torch.nn.functional.silu(sum(w[i : i + T] * mixer.w_conv.weight[:, i] for i in range(3)))
        w = w.unflatten(-1, (G, K))
        w = w / (w.square().sum(-1, keepdim=True) + 1e-6).sqrt()
        beta = 2 * mixer.beta_proj(x).sigmoid()
        log_f = torch.zeros(T, H, dtype=x.dtype) if mixer.f_proj is None else mixer.f_proj(x).sigmoid().log()
        for t in range(T):
            heads = []
            for h in range(H):
                group, scores, row = h // (H // G), [], q[t, h]
                for s in range(t, -1, -1):  # the row q_t^T H_t ... H_{s+1}, factor by factor
                    scores.append(row @ k[s, group] / K**0.5 + log_f[s + 1 : t + 1, h].sum())
                    row = row - beta[s, group] * (row @ w[s, group]) * w[s, group]
                heads.append(torch.stack(scores[::-1]).softmax(0) @ v[: t + 1, group])
            torch.testing.assert_close(run(mixer, x[None])[0, t], mixer.o_proj(torch.cat(heads)))


def test_strengths_start_at_one():
    torch.manual_seed(0)
    mixer = build_mixer(PathAttentionConfig(num_heads=4, head_dim=16), context())
    mixer.init_weights(0.02)
    assert mixer.w_a_proj.weight.shape == (32, 64)
    assert torch.equal(mixer.beta_proj.bias, torch.zeros(4))
    assert mixer.w_conv.weight.abs().max() <= 3**-0.5
    assert mixer.w_conv.weight.std().item() == pytest.approx(1 / 3, rel=0.15)


@pytest.mark.parametrize(("options", "message"), [
    ({"w_rank": 0}, "w_rank: must be positive; got 0"),
    ({"conv_size": 1}, "conv_size: is not a convolution; got 1"),
])
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        PathAttentionConfig(num_heads=4, head_dim=8, **options)
