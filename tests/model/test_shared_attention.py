"""Layers that read an earlier layer's keys and values, or its memory: the values they get, and refused configs."""

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import (
    AttentionConfig,
    GatedMemoryConfig,
    Mamba2Config,
    ParallelConfig,
    SharedAttentionConfig,
    build_mixer,
)
from hybridlm.model.mixers.common.memory import MEMORY
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens
from tests.support.mixer_cases import context_of, inputs

SOURCE = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head", window=5)
READER = SharedAttentionConfig(q_norm="head")


def layers(*configs):
    """One layer for each config, in fp64, with weights away from neutral values."""
    torch.manual_seed(0)
    found = []
    for index, config in enumerate(configs):
        mixer = build_mixer(config, context_of(layer_index=index, layers=configs))
        mixer.init_weights(0.3)
        for parameter in mixer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        found.append(mixer.double())
    return found


@pytest.mark.parametrize("source_config", [SOURCE, ParallelConfig(branches={"a": SOURCE, "b": SOURCE})])
def test_a_reader_is_attention_with_the_projections_of_its_source_for_keys_and_values(source_config):
    source, reader = layers(source_config, READER)
    source_input, x = inputs(2, 12), inputs(2, 12, seed=7)
    seq = SequenceInfo.make(2, 12, x.device, CuSeqlens([0, 1, 12, 17, 24]))
    source(source_input, seq)
    y = reader(x, seq)[0]

    own = source.branches["b"] if hasattr(source, "branches") else source  # the last one replaces what others leave
    alike = layers(SOURCE)[0]
    alike.load_state_dict({**own.state_dict(), **reader.state_dict()})
    both = torch.stack([source_input, x])
    alike.k_proj.register_forward_hook(lambda *_: own.k_proj(both[0]))
    alike.v_proj.register_forward_hook(lambda *_: own.v_proj(both[0]))
    torch.testing.assert_close(y, alike(x, seq)[0])

    y.square().sum().backward()
    learned = {name for name, parameter in own.named_parameters() if parameter.grad is not None}
    assert learned == {"k_proj.weight", "v_proj.weight", "k_norm.weight"}


def test_keys_are_left_only_where_a_later_layer_reads_them():
    first, second, third, reader = layers(SOURCE, SOURCE, SOURCE, SharedAttentionConfig(source=1))
    assert [mixer.keys_are_read for mixer in (first, second, third)] == [False, True, False]
    assert reader.source == 1


def test_the_memory_of_mamba2_is_its_output_before_the_gate_and_the_norm():
    config = Mamba2Config(num_heads=2, head_dim=8, state_size=4)
    source, _ = layers(config, GatedMemoryConfig(norm=True))
    x, seq = inputs(1, 9), SequenceInfo.make(1, 9, torch.device("cpu"))
    y = source(x, seq)[0]
    memory, gate = seq.read(MEMORY, 0), source.in_proj(x)[..., : config.inner_size]
    product = memory * torch.nn.functional.silu(gate)
    normed = source.norm.weight * product * (product.square().mean(-1, keepdim=True) + source.norm.eps) ** -0.5
    torch.testing.assert_close(source.out_proj(normed), y)


@pytest.mark.parametrize(("config", "message"), [
    (SharedAttentionConfig(num_heads=3), "num_heads: must be a multiple of the key/value heads that are read; got 3; "
     "expected a multiple of 2"),
    (SharedAttentionConfig(source=1), "source: layer 1 reads the keys and values of attention, which no layer 1"),
])
def test_what_does_not_fit_the_source_is_refused(config, message):
    with pytest.raises(ConfigError) as caught:
        build_mixer(config, context_of(layer_index=1, layers=[SOURCE, config]))
    assert str(caught.value).startswith(message)


def test_options_that_have_no_effect_are_no_difference():
    norm = NormConfig(eps=1e-5)
    assert SharedAttentionConfig(q_norm_eps=1e-3).canonical(norm) == SharedAttentionConfig().canonical(norm)
    assert READER.canonical(norm)["q_norm_eps"] == 1e-5
