"""Routed experts: every token reaches its experts, whatever else is in the batch."""

import pytest
import torch

from hybridlm_kernels import SoftCaps, moe_experts, registry
from tests.support.kernel_compare import assert_same_function, error, tensors

# tokens, experts a token, experts, model width, expert width
CASES = [(1, 1, 1, 8, 4), (1, 2, 4, 16, 8), (37, 2, 8, 64, 32), (70, 3, 5, 24, 13), (65, 4, 16, 20, 7),
         (300, 2, 3, 64, 64), (9, 2, 40, 16, 8)]


def routing(tokens, chosen, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).topk(chosen).indices


def case(tokens, chosen, experts, dim, width, dtype=torch.float32):
    x, gate_up, down = tensors((tokens, dim), (experts, 2 * width, dim), (experts, dim, width), dtype=dtype)
    weights = torch.rand(tokens, chosen, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    return x, gate_up, down, routing(tokens, chosen, experts), weights


def compare(x, gate_up, down, ids, weights, tolerance, **options):
    assert_same_function(
        lambda backend: moe_experts(x, gate_up, down, ids, weights, backend=backend, **options),
        (x, gate_up, down, weights), tolerance)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("shape", CASES)
def test_equals_reference(shape, limit):
    compare(*case(*shape), 1e-6, limit=limit)


@pytest.mark.parametrize("caps", [SoftCaps(4.0, 25.0), SoftCaps(0.5, None)])
def test_soft_caps_equal_reference(caps):
    compare(*case(37, 2, 8, 64, 32), 1e-6, soft_caps=caps)


@pytest.mark.parametrize("shape", CASES)
def test_bf16(shape):
    x, gate_up, down, ids, weights = case(*shape, dtype=torch.bfloat16)
    exact = moe_experts(x.double(), gate_up.double(), down.double(), ids, weights.double(), backend="reference")
    y = moe_experts(x, gate_up, down, ids, weights)
    assert y.dtype == torch.bfloat16
    assert error(y, exact) < 1e-2
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    inputs = (x, gate_up, down, weights)
    for grad, other in zip(torch.autograd.grad(y, inputs, upstream),
                           torch.autograd.grad(exact, inputs, upstream.double()), strict=True):
        assert error(grad, other) < 2e-2


def test_one_expert_gets_everything_and_the_others_nothing():
    x, gate_up, down, _, weights = case(50, 1, 6, 16, 8)
    compare(x, gate_up, down, torch.full((50, 1), 4), weights, 1e-6)


def test_one_expert_twice_for_a_token():
    x, gate_up, down, _, weights = case(20, 2, 3, 16, 8)
    compare(x, gate_up, down, torch.ones(20, 2, dtype=torch.int64), weights, 1e-6)


def test_no_tokens():
    x, gate_up, down, ids, weights = case(0, 2, 4, 16, 8)
    y = moe_experts(x, gate_up, down, ids, weights)
    assert y.shape == (0, 16)
    y.sum().backward()
    for leaf in (x, gate_up, down, weights):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_expanded_upstream_gradient():
    x, gate_up, down, ids, weights = case(37, 2, 8, 64, 32)
    grads = torch.autograd.grad(moe_experts(x, gate_up, down, ids, weights).sum(), (x, gate_up, down, weights))
    other = torch.autograd.grad(moe_experts(x, gate_up, down, ids, weights, backend="reference").sum(),
                                (x, gate_up, down, weights))
    assert max(error(a, b) for a, b in zip(grads, other, strict=True)) < 1e-6


def test_unwritten_memory_is_never_read():
    x, gate_up, down, ids, weights = case(37, 2, 8, 64, 32)
    torch.use_deterministic_algorithms(True)  # with it, torch fills new memory with NaN
    try:
        y = moe_experts(x, gate_up, down, ids, weights)
        grads = torch.autograd.grad(y.square().sum(), (x, gate_up, down, weights))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(t).all() for t in (y, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_token_does_not_feel_the_others(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed, tokens in enumerate([2, 5, 17, 40, 111, 300]):
            x, gate_up, down, ids, weights = (t.detach() for t in case(tokens, 2, 8, 64, 32, dtype))
            y = moe_experts(x, gate_up, down, ids, weights)
            cut = tokens // 2
            assert torch.equal(y[:cut], moe_experts(x[:cut], gate_up, down, ids[:cut], weights[:cut]))
            others, routes = x.clone(), ids.clone()
            others[cut:] = torch.randn(tokens - cut, 64)
            routes[cut:] = routing(tokens - cut, 2, 8, seed + 1)
            assert torch.equal(y[:cut], moe_experts(others, gate_up, down, routes, weights)[:cut])
    finally:
        torch.set_num_threads(before)


def test_the_same_bits_every_time():
    x, gate_up, down, ids, weights = case(300, 4, 16, 64, 32)

    def run():
        y = moe_experts(x, gate_up, down, ids, weights)
        return y, *torch.autograd.grad(y.square().sum(), (x, gate_up, down, weights))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_autocast_works_in_bf16_and_returns_fp32_gradients():
    x, gate_up, down, ids, weights = case(37, 2, 8, 64, 32)
    expected = moe_experts(x, gate_up, down, ids, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe_experts(x, gate_up, down, ids, weights)
    assert y.dtype == torch.bfloat16
    assert 1e-5 < error(y, expected) < 1e-2
    y.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, gate_up, down, weights))


def test_fp64_goes_to_the_reference_with_a_reason():
    registry.configure({})
    moe_experts(*case(5, 2, 4, 16, 8, dtype=torch.float64))
    row = registry.explain()[-1]
    assert (row.operation, row.backend) == ("moe_experts", "reference")
    assert any("float64" in reason for reason in row.rejected)


def test_bad_shapes():
    x, gate_up, down, ids, weights = case(5, 2, 4, 16, 8)
    with pytest.raises(ValueError, match="x must be"):
        moe_experts(x[:, :8], gate_up, down, ids, weights)
    with pytest.raises(ValueError, match="down must be"):
        moe_experts(x, gate_up, down.transpose(1, 2), ids, weights)
    with pytest.raises(ValueError, match="expert_ids and weights"):
        moe_experts(x, gate_up, down, ids, weights[:, :1])
    with pytest.raises(ValueError, match="expert_ids and weights"):
        moe_experts(x, gate_up, down, ids[:4], weights[:4])
