"""Routed experts: the order by expert, empty and crowded experts, outputs and every gradient."""

import pytest
import torch

from hybridlm_kernels import KernelUnavailable, moe_experts
from hybridlm_kernels.ops.moe import triton_routing
from tests.support.against_reference import assert_equals_reference
from tests.support.kernel_compare import NoWait, error, tensors


def routing(tokens, chosen, experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, experts, generator=generator).topk(chosen).indices


def case(tokens, chosen, experts, dim, width):
    x, gate_up, down = tensors((tokens, dim), (experts, 2 * width, dim), (experts, dim, width))
    weights = torch.rand(tokens, chosen, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x, gate_up, down, weights


def compare(ids, inputs, device, limit=None):
    def run(backend, x, gate_up, down, weights):
        return moe_experts(x, gate_up, down, ids.to(device), weights, limit=limit, backend=backend)

    assert_equals_reference(run, inputs, device)


@pytest.mark.parametrize(("shape", "limit"), [
    ((1, 1, 1, 60, 4), None), ((63, 2, 3, 24, 100), 0.5), ((65, 1, 3, 100, 13), None), ((9, 3, 4, 36, 65), 0.5)])
def test_equals_reference(shape, limit, device):
    compare(routing(*shape[:3]), case(*shape), device, limit)


@pytest.mark.parametrize("expert", [0, 3, 5])
def test_one_expert_gets_everything(expert, device):
    compare(torch.full((50, 1), expert), case(50, 1, 6, 16, 8), device)


def test_one_expert_twice_for_a_token(device):
    compare(torch.ones(20, 2, dtype=torch.int32), case(20, 2, 3, 16, 8), device)


def test_strided_inputs_and_expanded_gradient(device):
    def run(backend, x, gate_up, down, weights):
        return moe_experts(x.T, gate_up.transpose(0, 2), down.permute(2, 1, 0), ids, weights.T,
                           backend=backend).sum().expand(3, 2)

    ids = routing(20, 2, 3).to(device)
    assert_equals_reference(run, tensors((16, 20), (16, 16, 3), (8, 16, 3), (2, 20)), device)


def test_no_tokens(device):
    x, gate_up, down, weights = (t.detach().float().to(device).requires_grad_() for t in case(0, 2, 4, 16, 8))
    y = moe_experts(x, gate_up, down, torch.zeros(0, 2, dtype=torch.int64, device=device), weights, backend="triton")
    assert y.shape == (0, 16)
    grads = torch.autograd.grad(y.sum(), (x, gate_up, down, weights))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.parametrize(("tokens", "chosen", "experts", "block"), [
    (1, 1, 1, 16), (129, 1, 70, 16), (5, 2, 40, 16), (150, 1, 3, 64), (200, 3, 7, 128), (200, 1, 1, 128)])
def test_every_row_is_in_one_tile_of_its_expert(tokens, chosen, experts, block, device):
    ids = routing(tokens, chosen, experts)
    routes = triton_routing.sort_by_expert(ids.to(device), experts)
    assert routes.block_m == block
    order = ids.flatten().sort(stable=True).indices
    assert torch.equal(routes.pair_P.cpu().long(), order)
    assert torch.equal(routes.slot_NA.cpu().flatten().long(), order.argsort())
    ends = ids.flatten().bincount(minlength=experts).cumsum(0)
    assert torch.equal(routes.end_E.cpu(), ends)
    rows = []
    for expert, row in zip(routes.tile_expert.tolist(), routes.tile_row.tolist(), strict=True):
        if expert < experts:
            start = ends[expert] - (ids == expert).sum()
            assert start <= row < ends[expert]
            assert (row - start) % routes.block_m == 0
            rows += range(row, min(row + routes.block_m, ends[expert]))
    assert rows == list(range(ids.numel()))


def test_the_same_bits_every_time_and_whatever_the_other_tokens(device):
    ids = routing(40, 2, 4).to(device)
    x, gate_up, down, weights = (t.detach().float().to(device) for t in case(40, 2, 4, 24, 16))
    y = moe_experts(x, gate_up, down, ids, weights, backend="triton")
    assert torch.equal(y, moe_experts(x, gate_up, down, ids, weights, backend="triton"))
    others = x.clone()
    others[20:] = 0.5
    assert torch.equal(y[:20], moe_experts(others, gate_up, down, ids, weights, backend="triton")[:20])


def test_the_host_reads_no_counts(device):
    ids = routing(20, 2, 4).to(device)
    inputs = [t.detach().float().to(device).requires_grad_() for t in case(20, 2, 4, 16, 8)]
    with NoWait():
        y = moe_experts(*inputs[:3], ids, inputs[3], backend="triton")
        grads = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.isfinite(grad).all() for grad in grads)
    with pytest.raises(AssertionError, match="waits for the device"), NoWait():
        ids.sum().item()


def test_products_run_in_the_dtype_of_autocast(device):
    ids = routing(20, 2, 4).to(device)
    inputs = [t.detach().float().to(device).requires_grad_() for t in case(20, 2, 4, 16, 8)]
    exact = moe_experts(*inputs[:3], ids, inputs[3], backend="triton")
    with torch.autocast(device, dtype=torch.float16):
        y = moe_experts(*inputs[:3], ids, inputs[3], backend="triton")
    assert y.dtype == torch.float16
    assert 1e-5 < error(y, exact) < 5e-3
    expected = torch.autograd.grad(exact.sum(), inputs)
    for grad, other in zip(torch.autograd.grad(y.float().sum(), inputs), expected, strict=True):
        assert grad.dtype == torch.float32
        assert error(grad, other) < 5e-3


def test_too_many_experts_are_refused(device):
    with pytest.raises(KernelUnavailable, match="up to 1024 experts"):
        moe_experts(torch.zeros(1, 2, device=device), torch.zeros(1025, 2, 2, device=device),
                    torch.zeros(1025, 2, 1, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device),
                    torch.zeros(1, 1, device=device), backend="triton")
