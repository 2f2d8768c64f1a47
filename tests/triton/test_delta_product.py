"""Several writes per token in the Triton delta rule (DeltaProduct), against the fp64 recurrence."""

import pytest
import torch

from hybridlm_kernels.ops.delta_rule import triton_backend as backend
from hybridlm_kernels.random_inputs import recurrence_inputs
from tests.support.kernel_compare import error
from tests.support.recurrences import assert_causal, assert_triton_equals_reference, call

BORDERS = [0, 1, 23, 31]


@pytest.fixture(autouse=True)
def uncut_documents(monkeypatch):
    """No document is cut into segments."""
    monkeypatch.setattr(backend, "parallel_programs", lambda *_: 0)


def make_inputs(decay, tokens, steps, **sizes):
    """Inputs with a query and a decay per token, and as many keys, values and strengths as there are writes."""
    inputs = recurrence_inputs(decay, T=tokens * steps, beta=True, **{"K": 12} | sizes)
    per_token = {name: inputs[name][:, :tokens].clone() for name in ("q", "g") if name in inputs}
    return inputs | per_token


@pytest.mark.parametrize(("decay", "steps", "borders"), [
    ("none", 2, None), ("scalar", 3, BORDERS), ("channel", 3, BORDERS), ("channel", 2, None)])
def test_equals_the_recurrence(decay, steps, borders, device):
    documents = None if borders is None else len(borders) - 1
    inputs = make_inputs(decay, BORDERS[-1], steps, documents=documents)
    assert_triton_equals_reference("delta_rule", inputs, device, steps=steps, cu_seqlens=borders)


@pytest.mark.parametrize("decay", ["scalar", "channel"])
def test_gates_and_norms_inside(decay, device):
    inputs = make_inputs(decay, 10, 3, HV=2, raw=True, gate="softplus")
    assert_triton_equals_reference("delta_rule", inputs, device, steps=3, gate="softplus", beta_sigmoid=2.0,
                                   qk_l2norm=True)


def test_values_wider_than_keys_can_be(device):
    assert_triton_equals_reference("delta_rule", make_inputs("scalar", 5, 2, V=280), device, steps=2)


@pytest.mark.parametrize("form", [{"erase_before_decay": True}, {"erase_key": True}, {"erase_vector": True}])
def test_erasing_forms(form, device):
    inputs = make_inputs("scalar", 12, 2)
    options = {name: wanted for name, wanted in form.items() if name == "erase_before_decay"}
    if "erase_key" in form:
        inputs["erase_key"] = inputs["k"].flip(1)
    if "erase_vector" in form:
        inputs["erase_vector"] = -inputs.pop("beta")[..., None] * inputs["k"]
    assert_triton_equals_reference("delta_rule", inputs, device, steps=2, **options)


def test_queries_and_decays_are_not_spread(device, monkeypatch):
    """The kernels get one query and one decay per token, and write one output."""
    seen: dict[str, torch.Tensor] = {}

    class Watched(backend._DeltaRuleLaunches):
        def __init__(self, x, options):
            super().__init__(x, options)
            seen.update(q=x.q, g=x.g, v=x.v)

    monkeypatch.setattr(backend, "_DeltaRuleLaunches", Watched)
    inputs = {name: x.float().to(device) for name, x in make_inputs("scalar", 30, 3).items()}
    o, _ = call("delta_rule", inputs, steps=3, backend="triton")
    assert [x.shape[1] for x in (seen["q"], seen["g"], seen["v"], o)] == [30, 30, 90, 30]


def test_causal_to_the_last_bit(device):
    tokens, steps = 30, 3
    inputs = make_inputs("channel", tokens, steps)
    rows = ("k", "v", "beta")
    grouped = inputs | {name: inputs[name].unflatten(1, (tokens, steps)) for name in rows}

    def run(inputs):
        single = {name: x.to(device, torch.float32) for name, x in inputs.items()}
        single |= {name: single[name].flatten(1, 2) for name in rows}
        return call("delta_rule", single, backend="triton", steps=steps)[0]

    assert_causal(run, grouped, (7, 20, 21))


def test_decoding_equals_one_call(device):
    inputs = {name: x.float().to(device) for name, x in make_inputs("scalar", 12, 2).items()}
    one_call, last = call("delta_rule", inputs, steps=2, backend="triton")
    state, outputs = inputs.pop("initial_state"), []
    for start, end in ((0, 1), (1, 3), (3, 12)):
        tokens = {name: x[:, start:end] if name in ("q", "g") else x[:, 2 * start : 2 * end]
                  for name, x in inputs.items()}
        o, state = call("delta_rule", tokens | {"initial_state": state}, steps=2, backend="triton")
        outputs.append(o)
    assert error(torch.cat(outputs, 1), one_call) < 1e-6
    assert error(state, last) < 1e-6
