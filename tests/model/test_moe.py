"""Mixture of experts: selection, arithmetic, balance and costs against plain loops.

N tokens, D model width, E experts, A experts a token.
"""

import argparse
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hybridlm import load_config
from hybridlm.errors import ConfigError
from hybridlm.model.config import ScheduleConfig
from hybridlm.model.feed_forward import DenseConfig, MoEConfig, SwiGLU, build_feed_forward
from hybridlm.model.feed_forward.moe.router import MAX_BIAS_STEP
from hybridlm.model.layer_context import LayerContext, NormConfig
from hybridlm.model.model import build_model
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens
from tests.support import tiny_lm

HIDDEN = 16


def config(**options):
    defaults = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return MoEConfig(**{**defaults, **options})


def context(layer=1, layers=4):
    return LayerContext(hidden_size=HIDDEN, layer_index=layer, num_layers=layers, norm=NormConfig(), max_position=64)


def build(options, std=0.5):
    torch.manual_seed(0)
    module = build_feed_forward(config(**options), context())
    module.init_weights(std)
    return module


def sequence(batch, length, borders=None):
    cu = None if borders is None else CuSeqlens(borders)
    return SequenceInfo.make(batch, length, torch.device("cpu"), cu)


def selection_by_hand(scores, bias, groups, kept_groups, top):
    """The experts of one token, by plain Python."""
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(choice) // groups
    best = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -best[g])[:kept_groups]
    candidates = [e for g in kept for e in range(g * size, (g + 1) * size)]
    return set(sorted(candidates, key=lambda e: -choice[e])[:top])


FORMS = [
    {},
    {"norm_topk_prob": False},
    {"router": "sigmoid", "routed_scaling_factor": 2.5, "num_shared_experts": 1},
    {"router": "sigmoid", "num_groups": 4, "topk_groups": 2, "bias_update_rate": 0.1, "num_experts_per_tok": 3},
    {"num_shared_experts": 2, "shared_gate": True, "swiglu_limit": 0.4, "num_experts_per_tok": 8},
    {"num_shared_experts": 1, "shared_intermediate_size": 20, "num_experts_per_tok": 1},
]


@pytest.mark.parametrize("options", FORMS)
def test_equals_a_loop_over_tokens_and_experts(options):
    module = build(options).double()
    c = module.config
    if c.has_bias:
        module.router.bias.copy_(torch.linspace(-0.3, 0.3, 8))
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    y, _ = module(x, sequence(2, 7))
    bias = module.router.bias.tolist() if c.has_bias else [0.0] * 8
    for token, out in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True):
        logits = module.router.weight @ token
        scores = logits.softmax(0) if c.router == "softmax" else logits.sigmoid()
        ids = sorted(selection_by_hand(scores.tolist(), bias, c.num_groups, c.topk_groups, c.num_experts_per_tok))
        weights = scores[ids] / scores[ids].sum() if c.norm_topk_prob else scores[ids]
        expected = torch.zeros_like(token)
        for e, weight in zip(ids, weights * c.routed_scaling_factor, strict=True):
            gate_up, down = module.experts.gate_up[e], module.experts.down[e]
            expected += weight * expert_by_hand(gate_up, down, token, c.swiglu_limit)
        if module.shared is not None:
            gate_up = torch.cat([module.shared.gate_proj.weight, module.shared.up_proj.weight])
            shared = expert_by_hand(gate_up, module.shared.down_proj.weight, token, c.swiglu_limit)
            gate = torch.sigmoid(module.shared_gate.weight @ token) if module.shared_gate is not None else 1.0
            expected += gate * shared
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def expert_by_hand(gate_up, down, token, limit):
    gate, up = (gate_up @ token).chunk(2)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return down @ (F.silu(gate) * up)


def test_group_limited_selection_against_plain_python():
    module = build({"router": "sigmoid", "num_experts": 12, "num_groups": 4, "topk_groups": 2,
                    "num_experts_per_tok": 4, "bias_update_rate": 0.1})
    module.router.bias.copy_(torch.randn(12) * 0.2)
    scores = torch.rand(200, 12)
    ids = module.router.select(scores)
    for row, chosen in zip(scores, ids, strict=True):
        assert set(chosen.tolist()) == selection_by_hand(row.tolist(), module.router.bias.tolist(), 4, 2, 4)
    free = scores.add(module.router.bias).topk(4, dim=-1).indices
    assert any(set(a.tolist()) != set(b.tolist()) for a, b in zip(ids, free, strict=True)), "the groups bind nothing"


def test_bias_selects_but_does_not_weigh():
    module = build({"router": "sigmoid", "bias_update_rate": 0.1, "norm_topk_prob": False})
    module.router.bias[5] = 100.0
    ids, weights, _ = module.router(torch.randn(1, 9, HIDDEN), sequence(1, 9))
    assert (ids == 5).any(dim=1).all()
    assert weights.max() < 1


def test_bias_moves_against_the_load_and_the_load_is_forgotten():
    module = build({"router": "sigmoid", "bias_update_rate": 0.01}).train()
    x = torch.randn(3, 40, HIDDEN)
    _, aux = module(x, sequence(3, 40))
    assert module.router.load.sum() == 0, "a forward changes nothing"
    module.record(aux)
    module.record(aux)
    ids = module.router(x, sequence(3, 40))[0]
    load = torch.bincount(ids.flatten(), minlength=8) * 2
    assert torch.equal(module.router.load, load)
    module.post_optimizer_step()
    torch.testing.assert_close(module.router.bias, 0.01 * torch.sign(load.float().mean() - load))
    assert module.router.load.sum() == 0
    before = module.router.bias.clone()
    module.record(aux)
    module.post_optimizer_step(update=False)
    assert torch.equal(module.router.bias, before)
    assert module.router.load.sum() == 0


def test_bias_update_balances_a_skewed_router():
    module = build({"router": "sigmoid", "bias_update_rate": 0.02}).train()
    x = torch.randn(1, 256, HIDDEN) + 1.0  # a common direction makes some experts everybody's favourites
    violations = []
    for _ in range(150):
        aux = module.router(x, sequence(1, 256))[2]
        module.record(aux)
        module.post_optimizer_step()
        violations.append(float(aux["stat/max_violation"]))
    assert violations[0] > 1.0
    assert max(violations[-5:]) < 0.35


def balance_by_hand(p_NE, scores_NE, top, borders):
    """Equations 17 to 20 of DeepSeek-V3, one document after the other, weighted by tokens."""
    total = 0.0
    for a, b in itertools.pairwise(borders):
        for e in range(p_NE.shape[1]):
            hits = sum(e in scores_NE[t].topk(top).indices.tolist() for t in range(a, b))
            f = p_NE.shape[1] / (top * (b - a)) * hits
            total += (b - a) * f * float(p_NE[a:b, e].mean())
    return total / borders[-1]


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("borders", [None, [0, 3, 10, 12, 20]])
def test_balance_loss_by_document(router, borders):
    module = build({"router": router, "balance_loss": 0.01, "num_groups": 2, "topk_groups": 1}).train()
    x = torch.randn(2, 10, HIDDEN)
    _, aux = module(x, sequence(2, 10, borders))
    logits = x.flatten(0, 1) @ module.router.weight.T
    scores = logits.softmax(-1) if router == "softmax" else logits.sigmoid()
    p = scores / scores.sum(-1, keepdim=True)
    expected = balance_by_hand(p.detach(), scores.detach(), 2, borders or [0, 10, 20])
    assert float(aux["loss/balance"].detach()) == pytest.approx(expected, rel=1e-5)


def test_balance_loss_is_one_when_uniform_and_its_gradient_reaches_the_router():
    module = build({"balance_loss": 0.01, "num_experts_per_tok": 8}).train()
    with torch.no_grad():
        module.router.weight.zero_()
    x = torch.randn(2, 6, HIDDEN)
    assert float(module(x, sequence(2, 6))[1]["loss/balance"].detach()) == pytest.approx(1.0)

    module = build({"router": "sigmoid", "balance_loss": 0.01}).train()
    module(x, sequence(2, 6))[1]["loss/balance"].backward()
    gradient = module.router.weight.grad
    assert gradient.abs().max() > 0
    before = module(x, sequence(2, 6))[1]["loss/balance"]
    with torch.no_grad():
        module.router.weight -= 0.01 * gradient / gradient.norm()
    assert module(x, sequence(2, 6))[1]["loss/balance"] < before


def test_router_z_loss():
    module = build({"router_z_loss": 0.001}).train()
    x = torch.randn(2, 6, HIDDEN)
    logits = x.flatten(0, 1) @ module.router.weight.T
    expected = logits.exp().sum(-1).log().square().mean()
    torch.testing.assert_close(module(x, sequence(2, 6))[1]["loss/router_z"], expected)
    assert module.loss_weights["router_z"] == 0.001


def test_statistics():
    module = build({"num_experts_per_tok": 1}).train()
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[2] = 50.0
    _, aux = module(torch.ones(1, 10, HIDDEN), sequence(1, 10))
    assert aux["load"].tolist() == [0, 0, 10, 0, 0, 0, 0, 0]
    assert aux["stat/max_violation"] == 7
    assert aux["stat/dead_experts"] == 7
    assert float(aux["stat/router_entropy"]) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        module.router.weight.zero_()
    assert float(module(torch.ones(1, 4, HIDDEN), sequence(1, 4))[1]["stat/router_entropy"]) == pytest.approx(1.0)


def test_router_is_fp32_under_autocast_and_experts_are_not():
    module = build({"num_shared_experts": 1})
    x = torch.randn(1, 20, HIDDEN)
    plain = module.router(x, sequence(1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        inside = module.router(x, sequence(1, 20))
        y, _ = module(x, sequence(1, 20))
        assert module.experts(x[0], inside[0], inside[1]).dtype == torch.bfloat16
    assert torch.equal(plain[0], inside[0])
    assert torch.equal(plain[1], inside[1])
    full = module(x, sequence(1, 20))[0]
    assert (y - full).norm() < 0.02 * full.norm()


@pytest.mark.parametrize("options", FORMS)
def test_costs_are_those_of_the_built_module(options):
    module, c = build(options), config(**options)
    assert c.num_params(context()) == sum(p.numel() for p in module.parameters())
    idle = c.num_experts - c.num_experts_per_tok
    assert c.num_params(context(), active=True) == c.num_params(context()) - idle * 3 * HIDDEN * 12
    flops = c.flops_per_token(context())
    assert sum(flops.values()) == 2 * c.num_params(context(), active=True)


def test_dense_layers_are_plain_swiglu():
    c = config(dense_layers=[0, 2], intermediate_size=40)
    dense, moe = build_feed_forward(c, context(2)), build_feed_forward(c, context(1))
    assert isinstance(dense, SwiGLU)
    assert not isinstance(moe, SwiGLU)
    assert [c.is_moe(i) for i in range(4)] == [False, True, False, True]
    assert c.num_params(context(2)) == sum(p.numel() for p in dense.parameters()) == 3 * 40 * HIDDEN
    assert c.num_params(context(2), active=True) == 3 * 40 * HIDDEN


def test_dense_swiglu():
    module = build_feed_forward(DenseConfig(intermediate_size=24, swiglu_limit=0.5), context())
    module.init_weights(0.5)
    x = torch.randn(2, 3, HIDDEN)
    gate = module.gate_proj(x).clamp(max=0.5)
    expected = module.down_proj(F.silu(gate) * module.up_proj(x).clamp(-0.5, 0.5))
    torch.testing.assert_close(module(x, sequence(2, 3))[0], expected)
    c = DenseConfig(intermediate_size=24)
    assert c.num_params(context()) == sum(p.numel() for p in module.parameters())
    assert c.flops_per_token(context()) == {"dense": 2.0 * 3 * 24 * HIDDEN}


def test_frozen_bias_is_kept_and_not_moved():
    module = build({"router": "sigmoid", "correction_bias": True}).train()
    assert "router.bias" in module.state_dict()
    assert "router.load" not in module.state_dict()
    module.record({"load": torch.arange(8)})
    module.post_optimizer_step()
    assert module.router.bias.abs().sum() == 0
    assert module.router.load.sum() == 0
    assert build({"router": "sigmoid"}).router.bias is None


@pytest.mark.parametrize(("options", "key"), [
    ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ({"num_experts": 0}, "num_experts"),
    ({"num_groups": 3}, "num_groups"),
    ({"num_groups": 2, "topk_groups": 3}, "topk_groups"),
    ({"num_groups": 4, "topk_groups": 1, "num_experts_per_tok": 3}, "num_experts_per_tok"),
    ({"shared_gate": True}, "shared_gate"),
    ({"shared_intermediate_size": 8}, "shared_intermediate_size"),
    ({"correction_bias": False, "bias_update_rate": 0.1}, "correction_bias"),
    ({"dense_layers": [0]}, "intermediate_size"),
    ({"dense_layers": [-1], "intermediate_size": 8}, "dense_layers"),
    ({"balance_loss": -1.0}, "balance_loss"),
    ({"swiglu_limit": 0.0}, "swiglu_limit"),
])
def test_values_that_cannot_be_built_are_refused(options, key):
    with pytest.raises(ConfigError) as caught:
        config(**options)
    assert caught.value.key == key
    assert "\n" not in str(caught.value)


def test_dense_layer_outside_the_model_is_refused():
    with pytest.raises(ConfigError, match="a layer the model does not have"):
        config(dense_layers=[4], intermediate_size=8).num_params(context(0, layers=4))


def test_entropy_scale_holds_for_one_expert():
    module = build({"num_experts": 1, "num_experts_per_tok": 1}).train()
    _, aux = module(torch.randn(1, 3, HIDDEN), sequence(1, 3))
    assert math.isfinite(float(aux["stat/router_entropy"]))
    assert aux["stat/max_violation"] == 0


def test_without_a_rate_the_bias_moves_in_proportion_to_the_violation():
    router = build({"router": "sigmoid", "bias_update_rate": None}).train().router
    router.load.copy_(torch.tensor([0, 5, 10, 10, 11, 15, 9, 20]))  # the mean is 10
    router.balance()
    expected = [1.0, 0.5, 0.0, 0.0, -0.1, -0.5, 0.1, -1.0]
    torch.testing.assert_close(router.bias, MAX_BIAS_STEP * torch.tensor(expected))
    assert not router.load.any()
    before = router.bias.clone()
    router.balance()
    assert torch.equal(router.bias, before), "a step without tokens moves nothing"


def train_briefly(rate):
    """Dead experts in each of 80 steps of a model of 4 layers with 8 experts each, and the violation at the end."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    experts = tiny_lm.moe(num_groups=1, topk_groups=1, dense_layers=[], moe_intermediate_size=32, bias_update_rate=rate,
                          balance_loss=1e-4)
    model = build_model(tiny_lm.config(vocab_size=256, num_layers=4, hidden_size=64, init_std=0.02,
                                       feed_forward=experts, schedule=ScheduleConfig(full="full", ratio=0))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    dead, violations = [], []
    for _ in range(80):
        starts = torch.randint(len(text) - 64, (4,), generator=generator).tolist()
        ids = torch.stack([text[start:start + 64] for start in starts])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        load_LE = torch.stack(list(model.router_loads().values())).float()
        dead.append(int((load_LE == 0).sum()))
        violations.append(float((load_LE.amax(1) / load_LE.mean(1) - 1).mean()))
        model.post_optimizer_step()
    return dead, sum(violations[-25:]) / 25


def test_experts_stay_in_use_in_a_short_run():
    """By default, in a run in which the published step of 0.001 leaves many experts without tokens for long."""
    published, published_violation = train_briefly(0.001)
    dead, violation = train_briefly(load_config("train", ["model=hybrid_tiny"]).model.feed_forward.bias_update_rate)
    assert max(published) >= 12
    assert sum(dead) < sum(published) / 2
    assert sum(dead[-25:]) <= 25, "at most one of 32 on average at the end"
    assert violation < 1 < published_violation


@pytest.mark.parametrize(("model", "rate"), [("kimi_linear_48b", 0.001), ("deepseek_v32_671b", 0.001),
                                             ("kimi_linear_tiny", None), ("deepseek_v32_tiny", None),
                                             ("hybrid_tiny", None), ("hybrid_1b", None), ("quickstart", 0.02)])
def test_published_models_keep_the_published_rate(model, rate):
    assert load_config("train", [f"model={model}"]).model.feed_forward.bias_update_rate == rate
    obeyed = load_config("train", [f"model={model}", "model.feed_forward.bias_update_rate=0.003"])
    assert obeyed.model.feed_forward.bias_update_rate == 0.003
