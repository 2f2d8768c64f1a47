"""What must stay in fp32 stays there through every cast: the list is that of the modules."""

import copy
from itertools import chain

import pytest
import torch

from hybridlm.model.fp32_parameters import is_listed
from hybridlm.model.model import build_model
from tests.model.test_wrapped_linears import IDS, SYSTEMS, decode, system, wrap_linears
from tests.support.mixer_forms import collect_names
from tests.support.tiny_lm import config, moe

CASTS = {"to": lambda module: module.to(torch.bfloat16), "bfloat16": lambda module: module.bfloat16(),
         "half": lambda module: module.half(), "twice": lambda module: module.half().bfloat16(),
         "with its device": lambda module: module.to("cpu", torch.bfloat16),
         "a wrapper": lambda module: torch.nn.Sequential(module).bfloat16()[0],
         "in parts": lambda module: [child.bfloat16() for child in module.children()] and module}


def tensors(model):
    return dict(chain(model.named_parameters(), model.named_buffers()))


def assert_only_listed_stay(model, before):
    kept = model.fp32_parameter_names()
    assert kept
    for name, tensor in tensors(model).items():
        if name in kept:
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, before[name]), name
        elif tensor.is_floating_point():
            assert tensor.dtype in (torch.bfloat16, torch.float16), name


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["glm5_next", "mamba2", "gpt_oss"])
def test_casts_leave_what_must_stay_in_fp32(name, cast):
    model = system(name).float()
    with torch.no_grad():
        for tensor in tensors(model).values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.01)  # what bf16 would round
    before = copy.deepcopy(tensors(model))
    assert_only_listed_stay(CASTS[cast](model), before)


def test_casts_with_gradients_and_to_wider_types():
    model = system("kda").float().train()
    model(IDS, labels=IDS).loss.backward()
    model.bfloat16()
    assert all(p.grad.dtype == p.dtype for p in model.parameters() if p.grad is not None)
    assert all(p.dtype == torch.float64 for p in model.double().parameters())
    assert all(p.dtype == torch.float32 for p in model.float().parameters())


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_model_cast_to_bf16_computes_nearly_the_same(name):
    """No operation stumbles over the mixture of dtypes: logits, decoding, loss and gradients."""
    exact, half = system(name).float().eval(), system(name).float().bfloat16().eval()
    with torch.no_grad():
        logits = exact(IDS).logits
        allowed = (0.3 if name in collect_names("SIGNS") else 0.1) * logits.norm()
        assert (half(IDS).logits - logits).norm() < allowed
    assert (decode(half, IDS) - logits).norm() < allowed
    loss = half.train()(IDS, labels=IDS).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact.train()(IDS, labels=IDS).loss.item(), rel=0.03)
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


def test_adapters_around_listed_weights_do_not_take_them_off_the_list():
    model = system("deepseek_v32").float()
    wrap_linears(model)
    model.bfloat16()
    indexer = model.layers[0].mixer.indexer
    assert indexer.weights_proj.base_layer.weight.dtype == torch.float32
    assert indexer.q_proj.base_layer.weight.dtype == torch.bfloat16


def test_a_low_default_dtype_does_not_reach_them():
    options = {"feed_forward": moe(), "num_layers": 2}
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = build_model(config(**options))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_only_listed_stay(model, copy.deepcopy(tensors(model)))
    assert model.layers[1].feed_forward.router.weight.unique().numel() > 200, "drawn in fp32, not rounded"


def test_casting_past_the_modules_is_said_once(caplog):
    model = system("kda").float()
    router = model.layers[1].feed_forward.router
    router._parameters["weight"] = torch.nn.Parameter(router.weight.bfloat16())
    model._watch.casts_are_checked = False
    model.eval().train()
    assert [record.getMessage() for record in caplog.records] == [
        "1 tensors that must stay in fp32 were cast, such as layers.1.feed_forward.router.weight to bfloat16: routers "
        "and decays are rounded; load with from_pretrained(dtype=...), or cast the model with .to()"]


@pytest.mark.parametrize(("name", "listed"), [
    ("A_log", True), ("x.A_log", True), ("xA_log", False), ("A_log.x", False), ("o_norm.weight", True),
    ("o_norm.original_module.weight", True), ("weight", False), ("p_norm.weight", False), ("o_norm.bias", False)])
def test_names_on_the_list(name, listed):
    assert is_listed(name, ("A_log", "o_norm.weight")) is listed
