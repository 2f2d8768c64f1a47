"""The checks of the contract find what is wrong: one mixer for each mistake, by the check that should name it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridlm.model.contract_check import CHECKS, NotClaimed, Subject, run_checks, small_context
from hybridlm.model.feed_forward import DenseConfig, MoEConfig, RWKVChannelMixConfig, SquaredReLUConfig
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.mixers import MIXERS
from tests.support import sharing_kinds
from tests.support.example_mixer import load_example
from tests.support.sharing_kinds import TokenShiftConfig

EXAMPLE = load_example()
Config, Mixer = EXAMPLE.GatedAverageConfig, EXAMPLE.GatedAverage


class LeaksTheFuture(Mixer):
    def forward(self, x_BTD, seq, state=None):
        y_BTD, aux = super().forward(x_BTD, seq, state)
        return y_BTD + 1e-4 * x_BTD.mean(1, keepdim=True), aux


class IgnoresBorders(Mixer):
    def forward(self, x_BTD, seq, state=None):
        seq.positions_BT = seq.positions_BT + 1  # no token begins a document
        return super().forward(x_BTD, seq, state)


class ForgetsItsState(Mixer):
    def forward(self, x_BTD, seq, state=None):
        if state is not None and x_BTD.shape[1] == 1:
            state.matrix = None
        return super().forward(x_BTD, seq, state)


class LeavesAParameterUnset(Mixer):
    def init_weights(self, std):
        nn.init.normal_(self.value_proj.weight, std=std)
        for projection in (self.keep_proj, self.gate_proj, self.out_proj):
            projection.weight.data.fill_(std)


class DoubledBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return 1.001 * dx


class WrongGradient(Mixer):
    def forward(self, x_BTD, seq, state=None):
        return super().forward(DoubledBackward.apply(x_BTD), seq, state)


class StopsAGradient(Mixer):
    def __init__(self, config, context):
        super().__init__(config, context)
        self.gate_proj.register_forward_hook(lambda module, inputs, output: output.detach())


class CountsItsForwards(Mixer):
    forwards = 0

    def forward(self, x_BTD, seq, state=None):
        self.forwards += 1
        y_BTD, aux = super().forward(x_BTD, seq, state)
        return y_BTD * (1 + 1e-6 * self.forwards * self.training), aux


class KeepsATensorOfInference(Mixer):
    scale = None

    def forward(self, x_BTD, seq, state=None):
        if self.scale is None:
            self.scale = torch.ones((), dtype=x_BTD.dtype)
        y_BTD, aux = super().forward(x_BTD, seq, state)
        return y_BTD * self.scale, aux


class RoundsItsBias(Mixer):
    fp32_parameters = ()


class ReturnsFp32(Mixer):
    def forward(self, x_BTD, seq, state=None):
        y_BTD, aux = super().forward(x_BTD, seq, state)
        return y_BTD.to(torch.promote_types(y_BTD.dtype, torch.float32)), aux


class IgnoresEarlierShards(Mixer):
    def forward(self, x_BTD, seq, state=None):
        if seq.shard is not None:
            group = seq.shard.group
            seq.shard.incoming = lambda state, left, apply: 0 * group.gather(state)[0]
        return super().forward(x_BTD, seq, state)


class RolesOfNothing(Mixer):
    def parameter_roles(self):
        return {name: role for name, role in super().parameter_roles().items() if name != "keep_bias"}


class CountsTooFew(Config):
    def num_params(self, context):
        return super().num_params(context) - 1


class ForgetsAProjection(Config):
    def flops_per_token(self, context, context_length):
        return {"projections": 6.0 * context.hidden_size * self.channels(context)}


class FlopsGrowWithTheContext(Config):
    def flops_per_token(self, context, context_length):
        parts = super().flops_per_token(context, context_length)
        return {**parts, "average": parts["average"] + 0.1 * context_length}


class HalfTheState(Config):
    def state_bytes(self, context, context_length, element_bytes=2):
        return 2 * self.channels(context)


class ForgetsWhatAutogradKeeps(Config):
    def activation_bytes(self, context, element_bytes):
        return float(element_bytes * self.channels(context))


class SaysItHandsNothingOver(Config):
    def shard_traffic(self, context, rows, length, shards, element_bytes=2):
        return [ShardTraffic("gather", 0, 0)]


MISTAKES = {
    "initialisation": [(Config, LeavesAParameterUnset, "'keep_bias'")],
    "causality": [(Config, LeaksTheFuture, "a change of token 1 changes the output of token 0")],
    "packed documents": [(Config, IgnoresBorders, "outputs of packed and of separate documents")],
    "decoding": [(Config, ForgetsItsState, "outputs token by token and of one forward")],
    "gradients": [(Config, WrongGradient, "gradient of the inputs")],
    "every parameter learns": [(Config, StopsAGradient, "no gradient reaches gate_proj.weight")],
    "activation checkpointing": [(Config, CountsItsForwards, "differ with activation checkpointing")],
    "training after inference": [(Config, KeepsATensorOfInference, "RuntimeError")],
    "fp32 parameters": [(Config, RoundsItsBias, "keep_bias: vectors that bf16 would round")],
    "half precision": [(Config, ReturnsFp32, "outputs for inputs in bf16 are torch.float32")],
    "parameter count": [(CountsTooFew, Mixer, "num_params says 2,327, the module has 2,328")],
    "parameter roles": [(Config, RolesOfNothing, "differ in keep_bias")],
    "flops": [(ForgetsAProjection, Mixer, "a forward executes"),
              (FlopsGrowWithTheContext, Mixer, "is_linear says")],
    "state bytes": [(HalfTheState, Mixer, "state_bytes says 48 after 31 tokens, the state has 96")],
    "activation bytes": [(ForgetsWhatAutogradKeeps, Mixer, "activation_bytes says 96 per token, autograd keeps")],
    "context parallel": [(Config, IgnoresEarlierShards, "outputs with 2 shards and without")],
    "shard traffic": [(SaysItHandsNothingOver, Mixer, "sent: 384 bytes by all_gather")],
}

# What else fails where one mistake breaks several promises; the others break one.
CONSEQUENCES = {
    LeaksTheFuture: {"packed documents", "decoding", "context parallel"},
    IgnoresBorders: {"context parallel"},
    StopsAGradient: {"gradients"},
    CountsItsForwards: {"causality", "packed documents", "decoding", "gradients", "training after inference",
                        "context parallel"},
    IgnoresEarlierShards: {"shard traffic"},
}


def subject_of(monkeypatch, config, mixer):
    monkeypatch.setitem(MIXERS, "broken", (config, mixer))
    broken = config(kind="broken")
    return Subject(broken, small_context(broken))


def test_every_check_has_a_mistake_that_it_finds():
    assert list(MISTAKES) == list(CHECKS)


@pytest.mark.parametrize(("check", "config", "mixer", "words"),
                         [(check, *case) for check, cases in MISTAKES.items() for case in cases])
def test_a_mistake_is_found_and_named(monkeypatch, check, config, mixer, words):
    verdicts = {v.check: v for v in run_checks(subject_of(monkeypatch, config, mixer), CHECKS)}
    assert verdicts[check].verdict == "failed"
    assert words in verdicts[check].reason
    others = {name for name, v in verdicts.items() if v.verdict == "failed" and name != check}
    if mixer is not LeavesAParameterUnset:  # nobody knows what stood in the memory
        assert others == CONSEQUENCES.get(mixer, set())


def test_what_a_mixer_does_not_claim_is_skipped(monkeypatch):
    class Alone(Config):
        def check_context_parallel(self, shards, length):
            super(Config, self).check_context_parallel(shards, length)

    verdicts = {v.check: v for v in run_checks(subject_of(monkeypatch, Alone, Mixer), CHECKS)}
    assert {name for name, v in verdicts.items() if v.verdict != "passed"} == {"context parallel", "shard traffic"}
    assert verdicts["context parallel"].verdict == "skipped"


@pytest.mark.parametrize("config", [
    TokenShiftConfig(), DenseConfig(intermediate_size=20), SquaredReLUConfig(intermediate_size=20),
    DenseConfig(intermediate_size=20, swiglu_limit=1.0, gate_scale=0.7),
    DenseConfig(intermediate_size=20, activation="geglu_tanh"),
    MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router="softmax", balance_loss=0.01,
              router_z_loss=0.01),
    MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router="sigmoid", num_shared_experts=1),
    MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, router="sqrt_softplus", latent_size=12,
              latent_norm=True, num_shared_experts=1),
    RWKVChannelMixConfig(intermediate_size=20), RWKVChannelMixConfig(intermediate_size=20, receptance=True),
    RWKVChannelMixConfig(intermediate_size=20, deep_embed="output"),
    RWKVChannelMixConfig(intermediate_size=20, deep_embed="inner", deep_embed_rank=3),
], ids=["token_shift", "dense", "squared_relu", "dense_limited", "dense_gelu", "moe_softmax", "moe_sigmoid",
        "moe_latent", "rwkv7", "rwkv6", "rwkv8", "rwkv7a"])
@pytest.mark.parametrize("check", CHECKS)
def test_feed_forwards_keep_the_contract(check, config):
    with sharing_kinds.registered():
        subject = Subject(config, small_context(config))
        if check == "state bytes" and not config.keeps_state:
            with pytest.raises(NotClaimed, match="keeps no state"):
                CHECKS[check](subject)
        else:
            assert CHECKS[check](subject)
