"""MesaNet: the least squares problem of the paper solved token by token, and the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import MesaNetConfig, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, inputs, run

T, H, K = 7, 2, 6


def heads_after_conv(projection, conv, x):
    padded = F.pad(projection(x), (0, 0, 3, 0))
    y = F.silu(sum(padded[w : w + T] * conv.weight[:, w] for w in range(4))).view(T, H, K)
    return y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def test_each_token_reads_the_map_of_the_smallest_error():
    """The map from keys to values is found by a least squares solver on stacked, weighted rows."""
    mixer, x = build("mesa_net"), inputs(1, T)
    with torch.no_grad():
        q = heads_after_conv(mixer.q_proj, mixer.q_conv, x[0])
        k = heads_after_conv(mixer.k_proj, mixer.k_conv, x[0])
        v = mixer.v_proj(x[0]).view(T, H, K)
        alpha = torch.sigmoid(mixer.a_proj(x[0]) + mixer.a_bias)
        beta = torch.sigmoid(mixer.b_proj(x[0]) + mixer.b_bias)
        ridge = (0.25 + torch.log1p(mixer.lambda_raw.exp())).view(H, K)
        o = torch.zeros(T, H, K, dtype=x.dtype)
        for t in range(T):
            for h in range(H):
                kept = [beta[s, h] * alpha[s + 1 : t + 1, h].prod() for s in range(t + 1)]
                weight = torch.stack(kept).sqrt()[:, None]
                rows = torch.cat([weight * k[: t + 1, h], ridge[h].sqrt().diag()])
                targets = torch.cat([weight * v[: t + 1, h], torch.zeros(K, K, dtype=x.dtype)])
                o[t, h] = q[t, h] @ torch.linalg.lstsq(rows, targets).solution
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.o_norm.weight
        torch.testing.assert_close(run(mixer, x)[0], mixer.o_proj(o.flatten(1)), rtol=1e-6, atol=1e-7)


def test_the_start_is_the_published_one():
    torch.manual_seed(0)
    mixer = build_mixer(MesaNetConfig(num_heads=4, head_dim=16), context())
    mixer.init_weights(0.02)
    torch.testing.assert_close(0.25 + F.softplus(mixer.lambda_raw), torch.ones(64))
    assert not mixer.a_bias.any()
    assert not mixer.b_bias.any()
    assert mixer.q_conv.weight.abs().max() <= 0.5
    assert mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("options", "message"), [
    ({"iterations": 0}, "iterations: must be positive"),
    ({"lambda_min": 1.0}, "lambda_min: must be below the start of lambda"),
    ({"conv_size": 0}, "conv_size: is not a convolution"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MesaNetConfig(**{"num_heads": 2, "head_dim": 8} | options)
