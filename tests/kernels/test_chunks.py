"""The layout of documents in chunks, and the block solver."""

import pytest
import torch

from hybridlm_kernels import CuSeqlens
from hybridlm_kernels.recurrence.chunk_layout import STEP_GROUP_MAX_ELEMENTS, ChunkLayout, get_chunk_layout
from hybridlm_kernels.recurrence.decay_products import ScalarDecay
from hybridlm_kernels.recurrence.triangular_solve import block_inverses, solve, solve_transposed

CPU = torch.device("cpu")


def test_documents_alive_at_a_step_are_a_prefix():
    layout = ChunkLayout(1, 70, 16, [3, 40, 16, 11], True, CPU)
    assert layout.counts == [4, 1, 1]  # 40 tokens need three chunks, the others one
    assert layout.starts == [0, 4, 5, 6]
    tokens = torch.arange(70.0).view(1, 70, 1, 1)
    (group,) = layout.step_groups(1)
    chunks = group.gather(tokens, torch.float32)[:, 0, :, 0]
    assert chunks[0].tolist() == list(range(3, 19))  # the longest document first
    assert chunks[4].tolist() == list(range(19, 35))
    assert chunks[5].tolist() == [*range(35, 43), *[0] * 8]
    assert chunks[3].tolist() == [0, 1, 2, *[0] * 13]  # the shortest last, its padding zero


@pytest.mark.parametrize("borders", [None, [0, 5, 30, 31, 60]])
@pytest.mark.parametrize("elements", [1, 10**9])
def test_scatter_undoes_gather(borders, elements, monkeypatch):
    monkeypatch.setitem(STEP_GROUP_MAX_ELEMENTS, "cpu", elements)
    cu_seqlens = None if borders is None else CuSeqlens(borders)
    layout = (ChunkLayout(2, 30, 16, [30, 30], False, CPU) if borders is None
              else get_chunk_layout(2, 30, 16, cu_seqlens, CPU))
    x = torch.randn(2, 30, 3, 4)
    buffer = layout.allocate_output(x.shape, x.dtype)
    step_groups = layout.step_groups(4)
    assert len(step_groups) == (2 if elements == 1 else 1)
    for group in step_groups:
        group.scatter(group.gather(x, x.dtype), buffer)
    assert torch.equal(layout.finish_output(buffer, x.shape), x)


def test_layouts_are_kept_with_their_borders():
    borders = CuSeqlens([0, 5, 40])
    assert get_chunk_layout(1, 40, 16, borders, CPU) is get_chunk_layout(1, 40, 16, borders, CPU)
    assert get_chunk_layout(1, 40, 32, borders, CPU) is not get_chunk_layout(1, 40, 16, borders, CPU)


def test_states_go_to_the_order_of_lengths_and_back():
    layout = ChunkLayout(1, 70, 16, [3, 40, 16, 11], True, CPU)
    states = torch.arange(4.0).view(4, 1, 1, 1)
    ordered = layout.copy_states(states, (1, 1, 1), torch.float32)
    assert ordered.flatten().tolist() == [1, 2, 3, 0]
    assert torch.equal(layout.unsort_documents(ordered), states)


@pytest.mark.parametrize("C", [16, 32, 64])
@pytest.mark.parametrize("with_beta", [False, True])
def test_block_solver(C, with_beta):
    generator = torch.Generator().manual_seed(C)
    L = torch.randn(3, C, C, dtype=torch.float64, generator=generator).tril(-1) * 0.3
    beta = torch.rand(3, C, 1, dtype=torch.float64, generator=generator) if with_beta else None
    R = torch.randn(3, C, 5, dtype=torch.float64, generator=generator)
    system = torch.eye(C, dtype=torch.float64) + (L if beta is None else L * beta.mT)
    inverses = block_inverses(L, beta)
    left, right = solve(L, beta, inverses, R, (2, 3))
    torch.testing.assert_close(system @ torch.cat([left, right], -1), R)
    Y, residual = solve_transposed(L, beta, inverses, R)
    torch.testing.assert_close(system.mT @ Y, R if beta is None else beta * R)
    torch.testing.assert_close(Y, residual if beta is None else beta * residual)


def test_identical_keys_do_not_lose_digits():
    """The inverse of all-ones below the diagonal has entries of at most one; powers of it do not."""
    L = torch.ones(1, 64, 64).tril(-1)
    R = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    (Z,) = solve(L, None, block_inverses(L, None), R, (4,))
    expected = torch.linalg.solve_triangular(L.double(), R.double(), upper=False, unitriangular=True)
    assert (Z - expected).abs().max() < 1e-5


@pytest.mark.parametrize("strength", [1.0, 8.0, 30.0])
def test_products_of_strong_decays_hold_no_number_that_is_slow_to_multiply(strength):
    """Factors are zero or large enough that the product of two is a normal number, and right to fp32 rounding."""
    g_PHvC = -strength * torch.rand(3, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g_PHvC[0, 0, 5] = -torch.inf
    found, expected = ScalarDecay.varying(g_PHvC.float()), ScalarDecay.varying(g_PHvC.float().double())
    smallest = torch.finfo(torch.float32).tiny ** 0.5
    for x, exact in zip(found.tensors, expected.tensors, strict=True):
        assert bool(((x == 0) | (x > smallest)).all())
        torch.testing.assert_close(x.double(), exact, rtol=1e-4, atol=2 * smallest)
    dropped = (found.between == 0) & (expected.between > 0)
    assert bool(dropped.any()) == (strength > 1.0)
