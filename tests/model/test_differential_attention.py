"""Differential attention: equal to the layer of transformers, the published start, pairs of heads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import AttentionConfig, DifferentialAttentionConfig, build_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.rope import RopeConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens
from tests.support.layer_parity import (
    HIDDEN,
    TOLERANCE,
    causal_mask,
    context,
    ours,
    positions,
    random_weights,
    renamed,
    token_inputs,
)
from tests.support.mixer_cases import build, build_layers, context_of, inputs, run
from tests.support.mixer_forms.differential_attention import FORMS

LAYER = 2


@pytest.mark.parametrize("groups", [2, 4])
def test_equals_the_attention_of_diffllama(groups):
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

    theirs = DiffLlamaConfig(hidden_size=HIDDEN, num_attention_heads=8, num_key_value_heads=groups, head_dim=8,
                             rms_norm_eps=1e-5, attn_implementation="eager")
    layer = DiffLlamaAttention(theirs, LAYER)
    random_weights(layer)
    for name in ("q1", "k1", "q2", "k2"):
        getattr(layer, f"lambda_{name}").data.mul_(0.3)
    weights = renamed(layer, {})
    for name, heads in (("q", 8), ("k", groups), ("v", groups)):  # theirs pair head i with head i + heads / 2
        order = [head for pair in range(heads // 2) for head in (pair, pair + heads // 2)]
        weights[f"{name}_proj.weight"] = weights[f"{name}_proj.weight"].view(heads, 8, HIDDEN)[order].flatten(0, 1)
    x = token_inputs()
    with torch.no_grad():
        tables = DiffLlamaRotaryEmbedding(theirs)(x, positions())
        expected, _ = layer(x, tables, causal_mask())
        config = DifferentialAttentionConfig(num_heads=8, num_kv_heads=groups, head_dim=8, norm_weight=False)
        torch.testing.assert_close(ours(config, weights, x, layer_index=LAYER), expected, **TOLERANCE)


def test_the_formula_of_the_paper():
    mixer, x = build("phi4_flash_swa"), inputs(1, 25)[0]
    K, scale = 4, 1 - mixer.lambda_init
    with torch.no_grad():
        q, k, v = (proj(x).view(25, 8, K) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        weight = (math.exp(mixer.lambda_q1 @ mixer.lambda_k1) - math.exp(mixer.lambda_q2 @ mixer.lambda_k2)
                  + 0.8 - 0.6 * math.exp(-0.3))
        for t in (0, 7, 24):
            seen, heads = slice(max(0, t - 19), t + 1), []
            for pair in (0, 2, 4, 6):
                maps = [torch.softmax(k[seen, head] @ q[t, head] / K**0.5, 0) for head in (pair, pair + 1)]
                o = (maps[0] - weight * maps[1]) @ v[seen, pair : pair + 2].flatten(1)
                heads.append(o / (o.square().mean() + 1e-5).sqrt() * scale)
            torch.testing.assert_close(run(mixer, x[None])[0, t], mixer.o_proj(torch.cat(heads)))


def test_a_reader_is_the_same_layer_with_the_keys_and_values_of_its_source():
    source_config = DifferentialAttentionConfig(num_heads=8, num_kv_heads=4, head_dim=4, window=6)
    reader_config = DifferentialAttentionConfig(num_heads=4, head_dim=4, share_keys=True)
    source, reader = build_layers(source_config, reader_config)
    source_input, x = inputs(2, 12), inputs(2, 12, seed=7)
    seq = SequenceInfo.make(2, 12, x.device, CuSeqlens([0, 1, 12, 17, 24]))
    source(source_input, seq)
    y = reader(x, seq)[0]

    alike = build_layers(source_config, replace(source_config, num_heads=4))[1]
    alike.load_state_dict({**{name: value for name, value in source.state_dict().items() if name[0] in "kv"},
                           **reader.state_dict()})
    alike.k_proj.register_forward_hook(lambda *_: source.k_proj(source_input))
    alike.v_proj.register_forward_hook(lambda *_: source.v_proj(source_input))
    torch.testing.assert_close(y, alike(x, seq)[0])
    y.square().sum().backward()
    learned = {name for name, parameter in source.named_parameters() if parameter.grad is not None}
    assert learned == {"k_proj.weight", "v_proj.weight"}


@pytest.mark.parametrize(("options", "message"), [
    ({"head_dim": 8}, "head_dim: reads keys of another form, those of layer 0; got 8; expected 4"),
    ({"num_heads": 6}, "num_heads: must be a multiple of the key/value heads that are read; got 6; expected a multi"),
    ({"window": 21}, "window: must not be wider than that of the layer that is read; got 21; expected at most 20"),
    ({"rope": RopeConfig()}, "rope: reads keys of another form, those of layer 0"),
])
def test_a_reader_that_does_not_fit_is_refused(options, message):
    source = FORMS["phi4_flash_swa"]
    reader = DifferentialAttentionConfig(**{"num_heads": 8, "head_dim": 4, "share_keys": True,
                                            "rope": RopeConfig(kind="none")} | options)
    with pytest.raises(ConfigError) as caught:
        build_mixer(reader, context_of(layer_index=1, layers=[source, reader]))
    assert str(caught.value).startswith(message)
    with pytest.raises(ConfigError, match="source: names a layer whose keys are read; got 0; expected null, or shar"):
        DifferentialAttentionConfig(num_heads=2, head_dim=4, source=0)


def test_the_published_start():
    torch.manual_seed(0)
    for layer, expected in ((0, 0.2), (3, 0.8 - 0.6 * math.exp(-0.9))):
        mixer = build_mixer(DifferentialAttentionConfig(num_heads=2, head_dim=256), context(layer_index=layer))
        assert mixer.lambda_init == pytest.approx(expected)
    mixer.init_weights(0.02)
    for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
        assert getattr(mixer, name).std().item() == pytest.approx(0.1, rel=0.15)
    assert bool((mixer.o_norm.weight == 1).all())


@pytest.mark.parametrize(("options", "message"), [
    ({"num_heads": 3}, "num_heads: must be even: two heads are one difference; got 3"),
    ({"num_heads": 4, "num_kv_heads": 1}, "num_kv_heads: must be even: two heads are one difference; got 1"),
    ({"num_heads": 4, "lambda_std": 0.0}, "lambda_std: must be positive; got 0"),
])
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        DifferentialAttentionConfig(head_dim=8, **options)


@pytest.mark.parametrize(("heads", "groups", "expected"),
                         [(4, 1, (4, 2, 8)), (3, 1, (6, 2, 4)), (4, None, (4, None, 8))])
def test_a_preset_fits_models_with_odd_heads(heads, groups, expected):
    model = ModelSizes(24, mixers=[AttentionConfig(num_heads=heads, num_kv_heads=groups, head_dim=8)])
    sizes = DifferentialAttentionConfig.fill_sizes({"kind": "differential_attention"}, model)
    config = DifferentialAttentionConfig(**sizes)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == expected
