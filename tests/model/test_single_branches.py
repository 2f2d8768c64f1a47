"""Layers that are a mixer alone or a feed-forward alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hybridlm.checkpoint.model import layer_list
from hybridlm.errors import ConfigError
from hybridlm.model import build_model
from hybridlm.model.canonical import canonical
from hybridlm.model.config import ModelConfig, ScheduleConfig
from hybridlm.model.cost import count_parameters, decode_state_bytes, forward_flops
from hybridlm.model.edit import replace_mixers
from hybridlm.model.feed_forward import NoFeedForwardConfig, SquaredReLUConfig
from hybridlm.model.mixers import AttentionConfig, DeltaRuleConfig, NoMixerConfig
from hybridlm.model.residual import AttentionResidualConfig, HyperConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.run_config import load_config, load_model_config
from hybridlm.sweep.point import identify_run


def small(pattern=("gdn", "none", "full", "gdn"), alone=("gdn",), **more) -> ModelConfig:
    return ModelConfig(**{
        "vocab_size": 20, "hidden_size": 16, "num_layers": len(pattern), "max_position": 32,
        "schedule": ScheduleConfig(pattern=list(pattern), alone=list(alone)),
        "mixers": {"gdn": DeltaRuleConfig(num_heads=2, head_dim=8, decay="scalar"),
                   "full": AttentionConfig(num_heads=2, head_dim=8), "none": NoMixerConfig()},
        "feed_forward": SquaredReLUConfig(intermediate_size=24)} | more)


def test_a_layer_adds_the_branches_it_has():
    model = build_model(small(), seed=0).double().eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        hidden = model(ids, return_hidden_states=True).hidden_states
        for index, layer in enumerate(model.layers):
            expected = hidden[index]
            if layer.mixer_name != "none":
                seq = SequenceInfo.make(*ids.shape, ids.device)
                expected = expected + layer.mixer(layer.mixer_norm(expected), seq)[0]
            if layer.mixer_name != "gdn":
                x = layer.feed_forward_norm(expected)
                inner = F.relu(x @ layer.feed_forward.up_proj.weight.T) ** 2
                expected = expected + inner @ layer.feed_forward.down_proj.weight.T
            found = hidden[index + 1]
            torch.testing.assert_close(found, model.norm(expected) if index == 3 else expected)


@pytest.mark.parametrize("changes", [{}, {"residual": HyperConfig(num_streams=2)},
                                     {"pattern": ("full", "gdn"), "alone": (), "feed_forward": NoFeedForwardConfig()}])
def test_costs_are_those_of_the_built_model(changes):
    config = small(**changes)
    model = build_model(config, seed=0)
    assert count_parameters(config).total == model.num_params()
    state = model.new_state(1, 32)
    with torch.no_grad():
        model(torch.arange(8)[None], state=state)
    assert decode_state_bytes(config, 8, element_bytes=4) == sum(layer.num_bytes for layer in state.layers)
    kinds = [layer["feed_forward"] for layer in layer_list(config)]
    assert sum(kind == "dense" for kind in kinds) == sum("feed_forward" in layer.branches for layer in model.layers)
    branches = sum("feed_forward" in layer.branches for layer in model.layers)
    assert forward_flops(config, 8).get("feed_forward.squared_relu", 0.0) == branches * 2 * (2 * 16 * 24)


def test_models_that_differ_in_a_branch_are_told_apart():
    both, lone = (load_config("train", ["model=hybrid_tiny", f"model.schedule.alone={names}"])
                  for names in ("[]", "[kda]"))
    assert identify_run(both) != identify_run(lone)
    assert canonical(small()) != canonical(small(alone=()))
    assert canonical(small(alone=("gdn", "full"))) != canonical(small())


def test_mamba_and_nemotron_h_as_a_user_writes_them():
    mamba = load_model_config("mamba_tiny", [])
    assert mamba.present_branches("mamba") == ("mixer",)
    nemotron = load_model_config("nemotron_h_tiny", [])
    assert [nemotron.present_branches(name) for name in nemotron.layers()[4:7]] == [
        ("mixer",), ("mixer",), ("feed_forward",)]
    assert nemotron.num_layers == 14


@pytest.mark.parametrize(("changes", "message"), [
    ({"alone": ("gnd",)}, "schedule.alone: names an unknown mixer; got 'gnd'"),
    ({"alone": ("none",)}, "has layers with neither a mixer nor a feed-forward; got 'none'"),
    ({"feed_forward": NoFeedForwardConfig()}, "has layers with neither a mixer nor a feed-forward"),
    ({"residual": AttentionResidualConfig()}, "residual.form: needs a mixer and a feed-forward in each layer")])
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        small(**changes)


def test_a_replaced_mixer_stays_alone():
    model = build_model(small(pattern=("full", "gdn", "full", "none"), alone=("full",)), seed=0)
    new = DeltaRuleConfig(num_heads=2, head_dim=8, decay="scalar")
    changed, _ = replace_mixers(model, [0], new)
    names = changed.config.layers()
    assert changed.config.present_branches(names[0]) == ("mixer",)
    assert changed.config.present_branches(names[1]) == ("mixer", "feed_forward")
    with pytest.raises(ConfigError, match="have no mixer to replace"):
        replace_mixers(model, [3], new)
    with pytest.raises(ConfigError, match="are with and without a feed-forward"):
        replace_mixers(model, [0, 1], new)


def test_scales_of_embedding_and_logits():
    plain = build_model(small(), seed=0).double().eval()
    scaled = build_model(dataclasses.replace(small(), embedding_scale=3.0, logit_scale=0.25), seed=0).double().eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = plain(None, inputs_embeds=3.0 * plain.embed(ids)).logits * 0.25
        torch.testing.assert_close(scaled(ids).logits, expected)
        assert scaled.config.logit_multiplier == 0.25
