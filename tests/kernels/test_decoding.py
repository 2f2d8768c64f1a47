"""Operations on one token per row equal the reference backends of the operations they stand for."""

import pytest
import torch

import hybridlm_kernels as ops
from hybridlm_kernels import decoding, registry
from hybridlm_kernels.random_inputs import recurrence_inputs
from tests.support.recurrences import KINDS, call


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("operation", "decay"), KINDS)
def test_a_recurrence_token_by_token(operation, decay):
    inputs = recurrence_inputs(decay, beta=operation == "delta_rule", B=3, T=7, H=2, HV=4, K=6, V=5)
    expected, last = call(operation, inputs, backend="reference")
    state = inputs["initial_state"].clone()
    q, k, v, g, beta = (inputs.get(name) for name in ("q", "k", "v", "g", "beta"))
    for t in range(7):
        log_decay = g if g is None or g.dim() == 1 else g[:, t]
        if operation == "delta_rule":
            o = decoding.delta_rule_step(q[:, t], k[:, t], v[:, t], log_decay, beta[:, t], 6**-0.5, state, False)
        else:
            o = decoding.linear_attention_step(q[:, t], k[:, t], v[:, t], log_decay, 6**-0.5, state)
        torch.testing.assert_close(o, expected[:, t], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


def test_the_delta_rule_divides_by_the_length():
    q, k, v = random(2, 1, 2, 6), random(2, 1, 2, 6, seed=1), random(2, 1, 2, 5, seed=2)
    start = random(2, 2, 6, 5, seed=3)
    expected, last = ops.delta_rule(q, k, v, initial_state=start, qk_l2norm=True, backend="reference")
    state = start.clone()
    o = decoding.delta_rule_step(q[:, 0], k[:, 0], v[:, 0], None, None, 6**-0.5, state, True)
    torch.testing.assert_close(o, expected[:, 0])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_convolution_norms_and_swiglu(dtype):
    x, gate, up = random(3, 8, dtype=dtype), random(3, 8, dtype=dtype, seed=1), random(3, 8, dtype=dtype, seed=2)
    weight, taps = random(8, seed=3).float(), random(8, 4, dtype=dtype, seed=4)
    start = random(3, 8, 3, dtype=dtype, seed=5)
    for zero_centered in (False, True):
        torch.testing.assert_close(decoding.rms_norm_step(x, weight, 1e-6, zero_centered),
                                   ops.rms_norm(x, weight, 1e-6, zero_centered=zero_centered, backend="reference"))
    for activation in ("silu", "sigmoid"):
        torch.testing.assert_close(decoding.gated_rms_norm_step(x, gate, weight, 1e-6, activation),
                                   ops.gated_rms_norm(x, gate, weight, 1e-6, activation=activation,
                                                      backend="reference"))
    for activation in ("silu", None):
        y, last = ops.short_conv(x[:, None], taps, activation=activation, initial_state=start, backend="reference")
        got, state = decoding.short_conv_step(x, taps, start, activation)
        torch.testing.assert_close(got, y[:, 0])
        assert torch.equal(state, last)
    for limit in (None, 0.3):
        torch.testing.assert_close(decoding.swiglu_step(gate, up, limit),
                                   ops.swiglu(gate, up, limit=limit, backend="reference"))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(1, 4), (3, 1, 4)])  # one position for all rows, or one each
def test_rotation(interleaved, shape):
    angle = random(*shape)
    x = random(3, 1, 2, 8, seed=1)
    tables = decoding.rotary_step_tables(angle.cos(), angle.sin(), interleaved)
    torch.testing.assert_close(decoding.rotary_step(x, *tables, interleaved),
                               ops.rotary(x, angle.cos(), angle.sin(), interleaved=interleaved, backend="reference"))


@pytest.mark.parametrize("limit", [None, 0.5])
def test_the_experts_of_one_token(limit):
    x, gate_up, down = random(1, 6), random(5, 8, 6, seed=1), random(5, 6, 4, seed=2)
    weights = random(3, seed=3)
    expected = ops.moe_experts(x, gate_up, down, torch.tensor([[4, 0, 3]]), weights[None], limit=limit,
                               backend="reference")
    torch.testing.assert_close(decoding.moe_experts_step(x, gate_up, down, [4, 0, 3], weights, limit), expected)


def test_they_stand_for_the_torch_backends_alone():
    before = registry.revision()
    assert decoding.is_preferred("cpu")
    assert not decoding.is_preferred("cuda"), "Triton kernels run there"
    try:
        registry.configure({"short_conv": "reference"})
        assert registry.revision() > before
        assert not decoding.is_preferred("cpu")
    finally:
        registry.configure({"short_conv": "auto"})
    assert decoding.is_preferred("cpu")
