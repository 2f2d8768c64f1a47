"""A residual of one's own: several streams, own parameters, reads of earlier values; nobody else needs to know it."""

import itertools

import pytest
import torch

from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError
from hybridlm.model.config import ModelConfig, MTPConfig, ScheduleConfig
from hybridlm.model.cost import count_parameters, forward_flops
from hybridlm.model.memory import activation_bytes_per_token
from hybridlm.model.mixers import AttentionConfig
from hybridlm.model.residual import BranchConfig, SingleResidualConfig
from hybridlm.optimizers import OptimizerConfig, build_optimizer
from tests.support import residual_kinds
from tests.support.residual_kinds import TwoStreamsConfig
from tests.support.tiny_lm import BORDERS, VOCABULARY, config, model, moe

IDS = torch.randint(VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True, scope="module")
def _kinds():
    with residual_kinds.registered():
        yield


def two_streams(**options):
    return model(residual=TwoStreamsConfig(), mtp=MTPConfig(depth=1), **options)


def test_the_form_is_chosen_in_the_config():
    data = to_dict(config())
    assert data["residual"] == {"form": "single"}
    assert from_dict(ModelConfig, data | {"residual": {}}).residual == SingleResidualConfig()
    data["residual"] = {"form": "test_two_streams", "embedding_weight": 0.25}
    assert from_dict(ModelConfig, data).residual == TwoStreamsConfig(embedding_weight=0.25)
    with pytest.raises(ConfigError, match=r"residual\.form: unknown form; got 'twin'; expected one of att"):
        from_dict(ModelConfig, data | {"residual": {"form": "twin"}})


def test_a_branch_that_the_residual_cannot_join_is_refused():
    mixers = {"full": AttentionConfig(num_heads=2, head_dim=16, residual=BranchConfig(form="post"))}
    with pytest.raises(ConfigError, match=r"residual\.form: cannot stand in two streams; got 'post'"):
        config(mixers=mixers, schedule=ScheduleConfig(pattern=["full"]), residual=TwoStreamsConfig())


def test_its_parameters_have_names_roles_and_first_values_and_all_learn():
    lm = two_streams().train()
    names = {name for name, _ in lm.named_parameters()}
    assert {"residual.end_weights", "layers.1.mixer_residual.read_weights", "mtp.0.residual.end_weights",
            "layers.1.feed_forward_residual.proj.weight", "mtp.0.block.mixer_residual.proj.weight"} <= names
    roles = lm.parameter_roles()
    assert roles["residual.end_weights"].kind == "vector"
    assert roles["layers.0.mixer_residual.proj.weight"].kind == "matrix"
    assert "layers.2.feed_forward_residual.read_weights" in lm.fp32_parameter_names()
    assert lm.layers[0].mixer_residual.read_weights.tolist() == [0.5, 0.5]
    optimizers = build_optimizer(lm, from_dict(OptimizerConfig, {"kind": "muon"}))
    lm(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in lm.parameters())
    assert sum(len(group["params"]) for member in optimizers.members for group in member.param_groups) == len(names)


def test_costs_are_those_of_the_built_model():
    lm = two_streams(feed_forward=moe())
    count = count_parameters(lm.config)
    assert count.total_with_mtp == lm.num_params()
    assert count.mtp == sum(p.numel() for p in lm.mtp.parameters())
    for layer, block in zip(count.layers, lm.layers, strict=True):
        assert layer.params == sum(p.numel() for p in block.parameters())
    single = model(feed_forward=moe()).config
    assert forward_flops(lm.config, 20, mtp=False)["residual"] == 3 * 2 * 4.0 * 32
    assert "residual" not in forward_flops(single, 20)
    more = activation_bytes_per_token(lm.config, 2, True) - activation_bytes_per_token(config(
        feed_forward=moe(), mtp=MTPConfig(depth=1)), 2, True)
    assert more >= 3 * 2 * 4 * 32  # checkpointing keeps two tensors [B, T, D] more per layer


def test_activation_checkpointing_changes_no_bit():
    lm = two_streams(feed_forward=moe()).train()
    results = []
    for lm.activation_checkpointing in (False, True):
        lm.zero_grad()
        loss = lm(IDS, labels=IDS, cu_seqlens=BORDERS).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in lm.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_packed_and_decoded_as_any_model():
    lm, flat = two_streams().double().eval(), IDS.flatten()
    packed = lm(IDS, cu_seqlens=BORDERS).logits.flatten(0, 1)
    separate = torch.cat([lm(flat[None, a:b]).logits[0] for a, b in itertools.pairwise(BORDERS)])
    torch.testing.assert_close(packed, separate)
    state = lm.new_state(2, 20)
    parts = [lm(ids, state=state).logits for ids in IDS.split([7, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), lm(IDS).logits, rtol=1e-7, atol=1e-9)
