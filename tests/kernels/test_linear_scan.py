"""The linear scan: equal to its definition in every number type, packed or not, with states, causal to the last bit."""

import pytest
import torch

from hybridlm_kernels import linear_scan
from tests.support.kernel_compare import error


def make(B=2, T=75, C=3, N=None, dtype=torch.float64):
    """Inputs, factors of absolute value at most 1 with some zeros, and states."""
    generator = torch.Generator().manual_seed(T)
    shapes = (B, T, C), (B, T, C), (N or B, C)
    x, a, state = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    a = a / (1.0 + a.abs()) ** 0.5
    a = a / a.abs().clamp(min=1.0)
    a[:, T // 2] = 0.0
    return [x, a, state]


def results_and_gradients(x, a, state, **options):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x, a, state)]
    h, final = linear_scan(*leaves[:2], initial_state=leaves[2], **options)
    generator = torch.Generator().manual_seed(1)
    wide = torch.complex128 if h.is_complex() else torch.float64
    upstream = [torch.randn(t.shape, generator=generator, dtype=wide).to(t) for t in (h, final)]
    return [h, final, *torch.autograd.grad([h, final], [t for t in leaves if t is not None], upstream)]


@pytest.mark.parametrize("borders", [None, [0, 1, 3, 40, 40, 75, 150]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_definition(borders, dtype, with_state):
    x, a, state = make(N=None if borders is None else 6, dtype=dtype)
    inputs = (x, a, state if with_state else None)
    expected = results_and_gradients(*inputs, cu_seqlens=borders, backend="reference")
    for got, wanted in zip(results_and_gradients(*inputs, cu_seqlens=borders, backend="torch"), expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_definition_is_the_sum_of_decayed_inputs():
    x, a, _ = make(B=1, T=9)
    h, _ = linear_scan(x, a, backend="reference")
    for t in range(9):
        expected = sum(x[0, s] * a[0, s + 1 : t + 1].prod(0) for s in range(t + 1))
        torch.testing.assert_close(h[0, t], expected)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(B=1, T=40, C=1, N=3)]
    assert torch.autograd.gradcheck(
        lambda x, a, s: linear_scan(x, a, initial_state=s, cu_seqlens=[0, 1, 1, 40]), inputs)


def test_causal_to_the_last_bit_and_packed_documents_alone():
    x, a, _ = make(dtype=torch.float64)
    before, _ = linear_scan(x.float(), a.float())
    for t in (0, 31, 40, 70):
        changed = x.float()
        changed[:, t + 1 :] += 1.0
        after, _ = linear_scan(changed, a.float())
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])
    packed, ends = linear_scan(x[:1], a[:1], cu_seqlens=[0, 33, 75])
    alone, end = linear_scan(x[:1, 33:], a[:1, 33:])
    torch.testing.assert_close(packed[:, 33:], alone)
    torch.testing.assert_close(ends[1:], end)


def test_decoding_equals_one_call():
    x, a, state = make()
    one_call, last = linear_scan(x, a, initial_state=state)
    outputs = []
    for t in range(x.shape[1]):
        h, state = linear_scan(x[:, t : t + 1], a[:, t : t + 1], initial_state=state)
        outputs.append(h)
    torch.testing.assert_close(torch.cat(outputs, 1), one_call)
    torch.testing.assert_close(state, last)


def test_half_precision_is_computed_in_fp32():
    x, a, _ = make()
    h, last = linear_scan(x.bfloat16(), a.bfloat16())
    assert h.dtype == last.dtype == torch.float32
    assert torch.equal(h, linear_scan(x.bfloat16().float(), a.bfloat16().float())[0])
    assert error(h, linear_scan(x, a)[0]) < 0.02
    assert linear_scan(x.float(), a.to(torch.complex64))[0].dtype == torch.complex64


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("x", (2, 75), r"x must be \[batch, time, channels\]"),
    ("a", (2, 75, 4), r"a must have the shape of x, \[2, 75, 3\]; got \[2, 75, 4\]"),
    ("state", (2, 4), r"initial_state must be \[documents, channels\] = \[2, 3\]; got \[2, 4\]"),
])
def test_shapes_that_do_not_fit(name, shape, message):
    inputs = dict(zip(("x", "a", "state"), make(), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        linear_scan(inputs["x"], inputs["a"], initial_state=inputs["state"])
