"""AFT-full and AFT-local: the causal formula of the paper, the start, and documents that are too long."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import AFTConfig, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, inputs, run


@pytest.mark.parametrize(("name", "window"), [("aft_full", 99), ("aft_local", 5)])
def test_is_the_formula_of_the_paper(name, window):
    mixer, x = build(name), inputs(1, 9)[0]
    with torch.no_grad():
        q, k, v = (projection(x) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        w = mixer.left @ mixer.right.T
        for t in (0, 4, 8):
            bias = torch.tensor([w[t, s].item() if t - s < window else 0.0 for s in range(t + 1)], dtype=x.dtype)
            weights = (k[: t + 1] + bias[:, None]).exp()
            y = (weights * v[: t + 1]).sum(0) / weights.sum(0)
            torch.testing.assert_close(run(mixer, x[None])[0, t], mixer.o_proj(q[t].sigmoid() * y))


def test_the_start_and_documents_that_are_too_long():
    torch.manual_seed(0)
    mixer = build_mixer(AFTConfig(rank=16, max_length=40), context())
    mixer.init_weights(0.02)
    for factor in (mixer.left, mixer.right):
        assert factor.shape == (40, 16)
        assert factor.std().item() == pytest.approx(0.1, rel=0.1)
    with pytest.raises(ConfigError, match="max_length: has weights for fewer positions; got 40; expected 41 or more"):
        run(mixer, torch.zeros(1, 41, mixer.q_proj.in_features))


@pytest.mark.parametrize("key", ["rank", "weight_window", "max_length"])
def test_bad_options_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key}: must be positive; got 0"):
        AFTConfig(**{key: 0})
