"""Kinds are registered only with everything their contract asks for, under a name of their own."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hybridlm.kind_registry import KindError
from hybridlm.model.feed_forward import FEED_FORWARDS, FeedForward, FeedForwardConfig, register_feed_forward
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import MIXERS, SequenceMixer, register_mixer
from hybridlm.model.mixers.contract import MixerConfig
from hybridlm.model.mixers.sizing import ModelSizes


@dataclass(kw_only=True)
class MeanConfig(MixerConfig):
    """Mean of all earlier inputs."""

    kind: str = "mean"
    num_heads: int
    head_dim: int = 4

    def num_params(self, context):
        return context.hidden_size**2

    def flops_per_token(self, context, context_length):
        return {"projections": 2.0 * context.hidden_size**2}

    def state_bytes(self, context, context_length, element_bytes=2):
        return 4 * context.hidden_size


class Mean(SequenceMixer):
    def __init__(self, config, context):
        super().__init__()
        self.o_proj = nn.Linear(context.hidden_size, context.hidden_size, bias=False)

    def forward(self, x_BTD, seq, state=None):
        count_T1 = torch.arange(1, x_BTD.shape[1] + 1)[:, None]
        return self.o_proj(x_BTD.cumsum(1) / count_T1), {}

    def new_state(self, batch, max_length):
        return None

    def init_weights(self, std):
        nn.init.normal_(self.o_proj.weight, std=std)


@pytest.fixture(autouse=True)
def _registries_as_before():
    kept = dict(MIXERS), dict(FEED_FORWARDS)
    yield
    for registry, entries in zip((MIXERS, FEED_FORWARDS), kept, strict=True):
        registry.clear()
        registry.update(entries)


def test_a_kind_of_ones_own_has_answers_to_what_it_does_not_write():
    assert register_mixer("mean", MeanConfig)(Mean) is Mean
    config = MIXERS.config_class("mean")(num_heads=2)
    assert config.canonical(None)["num_heads"] == 2
    assert (config.is_linear, config.has_indexer(), config.can_take_indexer(), config.state_heads()) == (
        False, False, False, None)
    assert config.initial_weights_from(config, {}, NormConfig()) == {}
    filled = MeanConfig.fill_sizes({"head_dim": 8}, ModelSizes(hidden_size=64))
    assert filled == {"head_dim": 8, "num_heads": 4}


def test_a_name_is_taken_once():
    register_mixer("mean", MeanConfig)(Mean)
    register_mixer("mean", MeanConfig)(Mean)  # a reload of its file

    @dataclass(kw_only=True)
    class OtherConfig(MeanConfig):
        pass

    with pytest.raises(KindError, match=r"mixer kind 'mean' is taken by .*MeanConfig; give OtherConfig another name"):
        register_mixer("mean", OtherConfig)(Mean)


def test_a_missing_method_is_named():
    @dataclass(kw_only=True)
    class Unfinished(MixerConfig):
        kind: str = "unfinished"

        def num_params(self, context):
            return 0

    with pytest.raises(KindError, match="Unfinished lacks flops_per_token and state_bytes"):
        register_mixer("unfinished", Unfinished)(Mean)

    class Frozen(Mean):
        init_weights = SequenceMixer.init_weights

    with pytest.raises(KindError, match="Frozen lacks init_weights"):
        register_mixer("frozen", MeanConfig)(Frozen)

    class Empty(FeedForward):
        pass

    @dataclass(kw_only=True)
    class EmptyConfig(FeedForwardConfig):
        kind: str = "empty"

        def num_params(self, context, *, active=False):
            return 0

        def flops_per_token(self, context):
            return {}

    with pytest.raises(KindError, match="Empty lacks forward and init_weights"):
        register_feed_forward("empty", EmptyConfig)(Empty)
    assert "empty" not in FEED_FORWARDS


def test_a_config_of_another_registry_is_refused():
    with pytest.raises(KindError, match="does not derive from FeedForwardConfig"):
        register_feed_forward("mean", MeanConfig)(Mean)


def test_presets_take_their_sizes_from_the_model():
    kda = MIXERS.config_class("delta_rule")(num_heads=4, head_dim=16, gate_rank=16, output_gate_rank=16)
    mla = MIXERS.config_class("mla")(num_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
                                     v_head_dim=16)
    model = ModelSizes(hidden_size=64, mixers=[kda, mla])

    def filled(kind, **options):
        return MIXERS.config_class(kind).fill_sizes({"kind": kind, **options}, model)

    assert filled("delta_rule", decay="scalar") == {
        "kind": "delta_rule", "decay": "scalar", "num_heads": 4, "head_dim": 16}
    assert filled("delta_rule", decay="channel", head_dim=8)["gate_rank"] == 8
    assert filled("attention", window=32) == {"kind": "attention", "window": 32, "num_heads": 4, "head_dim": 16}
    assert filled("mla", indexer={"topk": 64}) == {
        "kind": "mla", "num_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "indexer": {"topk": 64, "num_heads": 16, "head_dim": 16}}
    complete = {"kind": "linear_attention", "num_heads": 2, "head_dim": 8}
    assert filled(**complete) == complete


@pytest.mark.parametrize(("hidden", "heads", "dim", "latent"), [
    (64, 4, 16, 32), (128, 4, 32, 64), (1024, 8, 128, 256), (2304, 32, 128, 512), (7168, 128, 128, 512)])
def test_latents_have_the_published_proportions(hidden, heads, dim, latent):
    """Sizes of the built-in models with multi-head latent attention, from tiny to 671 B."""
    full = MIXERS.config_class("attention")(num_heads=heads, head_dim=dim)
    sizes = MIXERS.config_class("mla").fill_sizes({}, ModelSizes(hidden_size=hidden, mixers=[full]))
    assert sizes == {"num_heads": heads, "kv_lora_rank": latent, "qk_nope_head_dim": dim,
                     "qk_rope_head_dim": dim // 2, "v_head_dim": dim}
