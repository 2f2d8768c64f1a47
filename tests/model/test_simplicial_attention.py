"""2-simplicial attention: the formula of the published code token by token, and bad options."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import SimplicialAttentionConfig
from tests.support.mixer_cases import build, inputs, run

T, K = 12, 8


def test_the_formula_of_the_published_code():
    mixer, x = build("simplicial"), inputs(1, T)[0]
    with torch.no_grad():
        q, k, v, k2, v2 = (getattr(mixer, f"{name}_proj")(x).unflatten(-1, (-1, K))
                           for name in ("q", "k", "v", "k2", "v2"))
        for t in (0, 3, 11):
            heads = []
            for h in range(4):
                s, r = slice(max(0, t - 8), t + 1), slice(max(0, t - 3), t + 1)
                first, second = k[s, h // 2], k2[r, h // 2] + 1 / K
                p = (torch.einsum("c,sc,rc->sr", q[t, h], first, second) / K**0.5).exp()
                heads.append(torch.einsum("sr,sv,rv->v", p / p.sum(), v[s, h // 2], v2[r, h // 2] + 1))
            torch.testing.assert_close(run(mixer, x[None])[0, t], mixer.o_proj(torch.cat(heads)))


@pytest.mark.parametrize("key", ["window", "second_window"])
def test_windows_are_positive(key):
    with pytest.raises(ConfigError, match=f"{key}: must be positive; got 0"):
        SimplicialAttentionConfig(num_heads=4, head_dim=8, **{key: 0})
