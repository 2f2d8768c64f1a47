"""ROSA: equal to the published layers, with their start."""

from __future__ import annotations

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import ROSAConfig, build_mixer
from tests.support.layer_parity import HIDDEN, context
from tests.support.mixer_cases import build, inputs, run


def look_back(queries: str, keys: str, t: int) -> int | None:
    """The place behind the last occurrence of the longest suffix of the queries up to t, among the keys before t."""
    for length in range(t, 0, -1):
        found = keys[:t].rfind(queries[t + 1 - length : t + 1])
        if found >= 0:
            return found + length
    return None


@pytest.mark.parametrize(("name", "bits", "without"), [("rosa", 1, -1.0), ("rosa_4bit", 4, 0.0)])
def test_equals_the_published_layer(name, bits, without):
    """By searching in text, a symbol a letter (RWKV-LM, 260212_rosa1bitLM_L12.py and 260222_rosa4bitLM_L12.py)."""
    mixer, x = build(name), inputs(1, 20)[0]
    with torch.no_grad():
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        q, k, v = (projection(x + (before - x) * mix) for projection, mix in
                   zip((mixer.q_proj, mixer.k_proj, mixer.v_proj), mixer.mix, strict=True))
        read = torch.empty_like(v)
        for channel in range(0, x.shape[1], bits):
            own = slice(channel, channel + bits)
            queries, keys = ("".join(chr(97 + sum(2**i for i, value in enumerate(row) if value > 0))
                                     for row in y[:, own]) for y in (q, k))
            for t in range(len(x)):
                place = look_back(queries, keys, t)
                read[t, own] = without if place is None else torch.where(v[place, own] > 0, 1.0, -1.0)
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(read * mixer.scale))


def test_the_start_is_the_published_one():
    mixer = build_mixer(ROSAConfig(), context())
    mixer.init_weights(0.02)
    assert torch.equal(mixer.scale, torch.ones(HIDDEN))
    assert torch.equal(mixer.mix, torch.zeros(3, HIDDEN))
    assert all(not projection.bias.any() for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj))
    assert mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_bad_options_are_refused():
    with pytest.raises(ConfigError, match="bits: must be 1 to 8; got 0"):
        ROSAConfig(bits=0)
    with pytest.raises(ConfigError, match="bits: must divide the hidden size; got 5"):
        build_mixer(ROSAConfig(bits=5), context())
