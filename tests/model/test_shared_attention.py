"""Layers that read an earlier layer's keys and values, or its memory: the values they get, and refused configs."""

import itertools

import pytest
import torch

from hybridlm.errors import ConfigError
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import (
    AttentionConfig,
    GatedMemoryConfig,
    Mamba2Config,
    MLAConfig,
    ParallelConfig,
    SharedAttentionConfig,
    build_mixer,
)
from hybridlm.model.mixers.common.memory import MEMORY
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.packing import CuSeqlens
from tests.support import tiny_lm
from tests.support.mixer_cases import MLA_DIMS, build_layers, context_of, inputs
from tests.support.tiny_lm import BORDERS, VOCABULARY

IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))

SOURCE = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head", window=5)
READER = SharedAttentionConfig(q_norm="head")


@pytest.mark.parametrize("source_config", [SOURCE, ParallelConfig(branches={"a": SOURCE, "b": SOURCE})])
def test_a_reader_is_attention_with_the_projections_of_its_source_for_keys_and_values(source_config):
    source, reader = build_layers(source_config, READER)
    source_input, x = inputs(2, 12), inputs(2, 12, seed=7)
    seq = SequenceInfo.make(2, 12, x.device, CuSeqlens([0, 1, 12, 17, 24]))
    source(source_input, seq)
    y = reader(x, seq)[0]

    own = source.branches["b"] if hasattr(source, "branches") else source  # the last one replaces what others leave
    alike = build_layers(SOURCE)[0]
    alike.load_state_dict({**own.state_dict(), **reader.state_dict()})
    both = torch.stack([source_input, x])
    alike.k_proj.register_forward_hook(lambda *_: own.k_proj(both[0]))
    alike.v_proj.register_forward_hook(lambda *_: own.v_proj(both[0]))
    torch.testing.assert_close(y, alike(x, seq)[0])

    y.square().sum().backward()
    learned = {name for name, parameter in own.named_parameters() if parameter.grad is not None}
    assert learned == {"k_proj.weight", "v_proj.weight", "k_norm.weight"}


def test_keys_are_left_only_where_a_later_layer_reads_them():
    first, second, third, reader = build_layers(SOURCE, SOURCE, SOURCE, SharedAttentionConfig(source=1))
    assert [mixer.keys_are_read for mixer in (first, second, third)] == [False, True, False]
    assert reader.source == 1


def test_the_memory_of_mamba2_is_its_output_before_the_gate_and_the_norm():
    config = Mamba2Config(num_heads=2, head_dim=8, state_size=4)
    source, _ = build_layers(config, GatedMemoryConfig(norm=True))
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


def test_a_reader_that_does_not_fit_is_refused_with_the_config_of_the_model_and_by_its_name():
    with pytest.raises(ConfigError) as caught:
        tiny_lm.config(mixers={"full": SOURCE, "reader": SharedAttentionConfig(num_heads=3)}, num_layers=2,
                       schedule=ScheduleConfig(pattern=["full", "reader"]))
    assert str(caught.value).startswith("mixers.reader.num_heads: must be a multiple of the key/value heads that are")


def test_options_that_have_no_effect_are_no_difference():
    norm = NormConfig(eps=1e-5)
    assert SharedAttentionConfig(q_norm_eps=1e-3).canonical(norm) == SharedAttentionConfig().canonical(norm)
    assert READER.canonical(norm)["q_norm_eps"] == 1e-5


def shared_model():
    """Every way to read from an earlier layer, two readers of one source, and sources that are named."""
    mixers = {
        "local": AttentionConfig(num_heads=2, head_dim=8, window=6),
        "full": AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
        "latent": MLAConfig(**MLA_DIMS),
        "local_reader": SharedAttentionConfig(source="local", window=3),
        "full_reader": SharedAttentionConfig(source="full", sinks=True, output_gate="head"),
        "bridge": AttentionConfig(num_heads=2, head_dim=8, key_input="full"),
        "latent_reader": MLAConfig(**MLA_DIMS, latent_source="latent"),
    }
    pattern = ["local", "full", "latent", "local", "local_reader", "full_reader", "bridge", "latent_reader",
               "full_reader", "latent_reader"]
    return tiny_lm.model(mixers=mixers, num_layers=len(pattern), schedule=ScheduleConfig(pattern=pattern))


def test_sources_are_found_by_the_name_of_their_mixer():
    layers_of_model = shared_model().layers
    assert [layers_of_model[i].mixer.source for i in (4, 5, 8)] == [3, 1, 1]
    assert layers_of_model[6].mixer.key_source == 1
    assert [layers_of_model[i].mixer.latent_layer for i in (7, 9)] == [2, 2]
    assert [block.input_is_read for block in layers_of_model].index(True) == 1
    with pytest.raises(ConfigError, match="which no earlier layer with mixer 'full' leaves; expected an earlier layer"):
        tiny_lm.config(mixers={"full": SOURCE, "reader": SharedAttentionConfig(source="full")}, num_layers=2,
               schedule=ScheduleConfig(pattern=["reader", "full"]))


@torch.no_grad()
def test_a_model_that_shares_is_decoded_and_packed_as_it_is_computed():
    lm, flat = shared_model().double().eval(), IDS.flatten()
    packed = lm(IDS, cu_seqlens=BORDERS).logits.flatten(0, 1)
    separate = torch.cat([lm(flat[None, a:b]).logits[0] for a, b in itertools.pairwise(BORDERS)])
    torch.testing.assert_close(packed, separate)
    state = lm.new_state(2, 20)
    parts = [lm(ids, state=state).logits for ids in IDS.split([7, 1, 1, 3, 1, 6, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), lm(IDS).logits, rtol=1e-7, atol=1e-9)
    kept = [layer.mixer.num_bytes if hasattr(layer.mixer, "num_bytes") else 0 for layer in state.layers]
    assert [index for index, size in enumerate(kept) if size] == [0, 1, 2, 3, 6]  # readers keep nothing


def test_gradients_of_a_model_that_shares_are_those_of_recomputed_layers_and_sums_over_readers():
    lm, results = shared_model().train(), []
    for lm.activation_checkpointing in (False, True):
        lm.zero_grad()
        lm(IDS, labels=IDS, cu_seqlens=BORDERS).loss.backward()
        results.append([p.grad.clone() for p in lm.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    source, one, two = build_layers(MLAConfig(**MLA_DIMS), MLAConfig(**MLA_DIMS, latent_source=0),
                                    MLAConfig(**MLA_DIMS, latent_source=0))
    x, weight = inputs(2, 9), source.kv_a_proj.weight

    def losses(*readers):
        seq = SequenceInfo.make(2, 9, x.device)
        own = source(x, seq)[0].square().sum()
        return [own, *(reader(x, seq)[0].square().sum() for reader in readers)]

    together = torch.autograd.grad(sum(losses(one, two)), weight)[0]
    apart = sum(torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (
        *losses(one), losses(two)[1]))
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize(("reader", "message"), [
    (SharedAttentionConfig(window=6), "window: must not be wider than that of the layer that is read; got 6; expect"),
    (MLAConfig(**MLA_DIMS, latent_source=0), "latent_source: layer 1 reads the latents of MLA, which no layer 0 leav"),
])
def test_sources_that_do_not_fit_are_refused(reader, message):
    with pytest.raises(ConfigError) as caught:
        build_mixer(reader, context_of(layer_index=1, layers=[SOURCE, reader]))
    assert str(caught.value).startswith(message)


def test_latents_of_another_width_are_refused():
    source, reader = MLAConfig(**{**MLA_DIMS, "kv_lora_rank": 8}), MLAConfig(**MLA_DIMS, latent_source=0)
    with pytest.raises(ConfigError, match="latent_source: reads latents of another form"):
        build_mixer(reader, context_of(layer_index=1, layers=[source, reader]))
