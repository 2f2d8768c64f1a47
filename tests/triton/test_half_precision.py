"""Errors of the bf16 kernels, emulated: outputs 0.005, dq dk dv 0.008, gradients of gates and of beta 0.02."""

import pytest
import torch

from hybridlm_kernels.ops.delta_rule import triton_backend, triton_chunk, triton_gradients, triton_value_keys
from hybridlm_kernels.ops.linear_attention import triton_backend as linear_backend
from hybridlm_kernels.ops.linear_attention import triton_channel
from hybridlm_kernels.random_inputs import recurrence_inputs
from hybridlm_kernels.recurrence import triton_channel_pairs, triton_tiles
from hybridlm_kernels.triton_support import INTERPRETED
from tests.support.emulated_bf16 import Emulation, assert_within_bounds, half, launches_in_half, sum_over, times
from tests.support.erase_forms import make_inputs
from tests.support.kernel_compare import error
from tests.support.recurrences import set_gates, with_gradients

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU computes in bf16 itself")


def emulated(inputs, device, monkeypatch, operation="delta_rule", **options):
    """Outputs, states and gradients of inputs with bf16's values, as the kernels of bf16 find them."""
    emulation = Emulation()
    emulation.install(monkeypatch)

    def narrow(launches):
        launches.flags.update(EXACT=False)
        if launches.decay == "channel":
            launches.merged, launches.checked = triton_backend.merged_levels(launches.options.gate, torch.bfloat16)

    def narrow_linear(launches):
        launches.exact = False
        launches.merged, launches.checked = linear_backend.merged_levels(None, torch.bfloat16)

    launches_in_half(monkeypatch, triton_backend._DeltaRuleLaunches, emulation, narrow)
    launches_in_half(monkeypatch, linear_backend._LinearAttentionLaunches, emulation, narrow_linear)
    for module in (triton_tiles, triton_gradients, triton_channel, triton_channel_pairs, triton_value_keys):
        monkeypatch.setattr(module, "sum_over", sum_over(emulation))
    monkeypatch.setattr(triton_channel_pairs, "times", times)
    monkeypatch.setattr(triton_chunk, "solve", emulation.with_bits(triton_chunk.solve, 11))
    single = {name: x.float().to(device) for name, x in inputs.items()}
    return with_gradients(operation, single, backend="triton", **options)


@pytest.mark.parametrize(("decay", "gate"), [("scalar", "softplus"), ("channel", "softplus"),
                                             ("channel", "lower_bounded")])
def test_errors_of_the_delta_rule(decay, gate, device, monkeypatch):
    inputs = recurrence_inputs(decay, T=72, K=32, V=32, beta=True, raw=True, gate=gate)
    inputs = {name: x if name in ("initial_state", "A_log", "dt_bias") else half(x) for name, x in inputs.items()}
    options = {"gate": gate, "beta_sigmoid": 1.0, "qk_l2norm": True}
    expected = with_gradients("delta_rule", inputs, backend="reference", **options)
    got = emulated(inputs, device, monkeypatch, **options)
    x, du = inputs["g"] + inputs["dt_bias"], expected["g"]
    by_rate = x if gate == "lower_bounded" else torch.nn.functional.softplus(x) / x.sigmoid()  # dg/dA_log over dg/du
    assert_within_bounds(got, expected, error, {"dt_bias": du, "A_log": du * by_rate})


@pytest.mark.parametrize(("form", "decay"), [("free vector, before", "channel"), ("own key, before", "scalar")])
def test_errors_of_erasing_forms(form, decay, device, monkeypatch):
    """RWKV-7, whose decay per token is at least 0.545, and Comba's rule."""
    inputs, options = make_inputs(form, decay, T=72, H=1, HV=1, K=32, V=32)
    inputs["g"] = inputs["g"] * 0.303
    inputs = {name: x if name in ("initial_state", "g") else half(x) for name, x in inputs.items()}
    expected = with_gradients("delta_rule", inputs, backend="reference", **options)
    assert_within_bounds(emulated(inputs, device, monkeypatch, **options), expected, error, {})


@pytest.mark.parametrize("gates", ["0", "-3", "-12", "mixed", "-inf"])
def test_errors_of_decays_at_the_extremes(gates, device, monkeypatch):
    """All pairs in one product (0), by levels (-12, -inf), or some channels and blocks of tokens in either way."""
    inputs = recurrence_inputs("channel", T=72, K=32, V=32, beta=True)
    set_gates(inputs["g"], gates)
    inputs = {name: x if name in ("initial_state", "g") else half(x) for name, x in inputs.items()}
    expected = with_gradients("delta_rule", inputs, backend="reference", qk_l2norm=True)
    assert_within_bounds(emulated(inputs, device, monkeypatch, qk_l2norm=True), expected, error, {})


@pytest.mark.parametrize("gates", ["0", "mixed"])
def test_errors_of_linear_attention_with_a_decay_per_channel(gates, device, monkeypatch):
    """GLA, whose pairs meet as those above."""
    inputs = recurrence_inputs("channel", T=72, K=32, V=32)
    set_gates(inputs["g"], gates)
    inputs = {name: x if name in ("initial_state", "g") else half(x) for name, x in inputs.items()}
    expected = with_gradients("linear_attention", inputs, backend="reference")
    assert_within_bounds(emulated(inputs, device, monkeypatch, "linear_attention"), expected, error, {})


def test_errors_of_a_learnt_gate_of_linear_attention(device, monkeypatch):
    inputs = recurrence_inputs("channel", T=72, K=32, V=32, raw=True, gate="logsigmoid")
    inputs = {name: x if name in ("initial_state", "dt_bias") else half(x) for name, x in inputs.items()}
    expected = with_gradients("linear_attention", inputs, backend="reference", gate="logsigmoid")
    got = emulated(inputs, device, monkeypatch, "linear_attention", gate="logsigmoid")
    assert_within_bounds(got, expected, error, {})
