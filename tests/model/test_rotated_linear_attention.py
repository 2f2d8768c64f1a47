"""Linear attention with normed queries and keys and RoPE, against its definition written again token by token."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import LinearAttentionConfig
from hybridlm.model.mixers.linear_attention import compute_decay_slopes
from hybridlm.model.rope import RopeConfig
from tests.support.mixer_cases import build, inputs, run

LENGTH = 17


def rotated(x_K, position, theta=10000.0):
    first, second = x_K.chunk(2)
    angle = position * theta ** (-torch.arange(4, dtype=torch.float32) * 2 / 8)
    cos, sin = angle.cos().double(), angle.sin().double()
    return torch.cat([first * cos - second * sin, second * cos + first * sin])


def rms(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@torch.no_grad()
def test_it_equals_its_definition():
    mixer, x = build("lightning_rope"), inputs(1, LENGTH)
    q, k, v = (proj(x[0]).view(LENGTH, 2, 8) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = rms(q, mixer.q_norm.weight), rms(k, mixer.k_norm.weight)
    slopes = compute_decay_slopes("lightning", 2, layer_index=1, num_layers=4)
    rows = []
    for t in range(LENGTH):
        heads = []
        for h in range(2):
            weights = [torch.exp(torch.tensor(-slopes[h] * (t - s), dtype=torch.float64))
                       * (rotated(q[t, h], t) @ rotated(k[s, h], s)) / 8**0.5 for s in range(t + 1)]
            heads.append(sum(w * v[s, h] for s, w in enumerate(weights)))
        o = rms(torch.cat(heads), mixer.o_norm.weight)
        rows.append(mixer.o_proj(o * mixer.g_proj(x[0, t]).sigmoid()))
    torch.testing.assert_close(run(mixer, x)[0], torch.stack(rows), rtol=1e-6, atol=1e-6)


def test_scores_depend_on_the_distance_alone():
    """Without decay, a document that begins later in the positions gives the same outputs."""
    mixer, x = build("lightning_rope"), inputs(1, LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(run(mixer, x, offset=100), run(mixer, x), rtol=1e-5, atol=1e-5)


def test_an_idle_rope_is_no_difference_and_one_that_turns_nothing_is_refused():
    norm, sizes = NormConfig(), {"num_heads": 2, "head_dim": 8}
    assert LinearAttentionConfig(**sizes, rope=RopeConfig(theta=5.0)).canonical(norm) == LinearAttentionConfig(
        **sizes).canonical(norm)
    assert LinearAttentionConfig(**sizes, rotation="rope").canonical(norm) != LinearAttentionConfig(
        **sizes, rotation="rope", rope=RopeConfig(theta=5.0)).canonical(norm)
    with pytest.raises(ConfigError, match=r"rope.kind: rotates nothing; got 'none'; expected half or interleaved"):
        LinearAttentionConfig(**sizes, rotation="rope", rope=RopeConfig(kind="none"))
    with pytest.raises(ConfigError, match="rope: must rotate an even number of dims"):
        LinearAttentionConfig(num_heads=2, head_dim=7, rotation="rope")
