"""The selective scan: equal to its definition with and without A, packed or not, with states, and causal."""

import importlib

import pytest
import torch

from hybridlm_kernels import selective_scan
from tests.support.kernel_compare import error

NAMES = ("x", "dt", "A", "B", "C", "state")


def make(rows=2, T=21, D=3, N=4, documents=None, longhorn=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)
    shapes = (rows, T, D), (rows, T, D), (D, N), (rows, T, N), (rows, T, N), (documents or rows, D, N)
    x, dt, A, B, C, state = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    if longhorn:
        beta = dt.sigmoid()
        return [x, beta / (1.0 + beta * B.square().sum(-1, keepdim=True)), None, B, C, state]
    return [x, torch.nn.functional.softplus(dt), -A.exp(), B, C, state]


def results_and_gradients(*tensors, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y, final = selective_scan(*leaves[:5], initial_state=leaves[5], **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, final)]
    return [y, final, *torch.autograd.grad([y, final], [t for t in leaves if t is not None], upstream)]


@pytest.fixture(params=[3, 64], ids=["blocks of 3", "one block"])
def block_tokens(request, monkeypatch):
    module = importlib.import_module("hybridlm_kernels.ops.selective_scan.torch_backend")
    monkeypatch.setattr(module, "BLOCK_MAX_TOKENS", request.param)


@pytest.mark.usefixtures("block_tokens")
@pytest.mark.parametrize("borders", [None, [0, 1, 6, 6, 14, 21, 42]])
@pytest.mark.parametrize("longhorn", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_definition(borders, longhorn, with_state):
    tensors = make(documents=None if borders is None else 6, longhorn=longhorn)
    tensors[5] = tensors[5] if with_state else None
    expected = results_and_gradients(*tensors, cu_seqlens=borders, backend="reference")
    for got, wanted in zip(results_and_gradients(*tensors, cu_seqlens=borders, backend="torch"), expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(rows=1, T=9, D=2, N=2, documents=3)]
    assert torch.autograd.gradcheck(
        lambda *x: selective_scan(*x[:5], initial_state=x[5], cu_seqlens=[0, 1, 1, 9]), inputs)


def test_the_factor_of_longhorn_is_the_diagonal_of_its_closed_form():
    """The minimiser of |h - h_old|^2 + beta (k h - x)^2, with the outer product k k^T replaced by its diagonal."""
    x, dt, _, B, _, state = make(rows=1, T=1, longhorn=True)
    h, k = state[0], B[0, 0]
    _, final = selective_scan(x, dt, None, B, B, initial_state=state)
    exact = h - dt[0, 0, :, None] * k * (h * k) + dt[0, 0, :, None] * x[0, 0, :, None] * k
    torch.testing.assert_close(final[0], exact)


def test_causal_to_the_last_bit():
    tensors = make(T=70, dtype=torch.float32)
    before, _ = selective_scan(*tensors[:5])
    for t in (0, 40, 65):
        changed = [*tensors]
        for i in (0, 1, 3, 4):
            changed[i] = tensors[i].clone()
            changed[i][:, t + 1 :] += 1.0
        after, _ = selective_scan(*changed[:5])
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_decoding_equals_one_call():
    x, dt, A, B, C, state = make()
    one_call, last = selective_scan(x, dt, A, B, C, initial_state=state)
    outputs = []
    for t in range(x.shape[1]):
        y, state = selective_scan(*(u[:, t : t + 1] for u in (x, dt)), A, *(u[:, t : t + 1] for u in (B, C)),
                                  initial_state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), one_call)
    torch.testing.assert_close(state, last)


def test_states_stay_in_fp32_under_half_precision():
    x, dt, A, B, C, _ = make(dtype=torch.float32)
    y, state = selective_scan(x.bfloat16(), dt, A, B.bfloat16(), C.bfloat16())
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    rounded = selective_scan(x.bfloat16().float(), dt, A, B.bfloat16().float(), C.bfloat16().float())
    assert torch.equal(state, rounded[1])
    assert error(y, rounded[0]) < 0.004


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("x", (2, 21), r"x must be \[batch, time, channels\]"),
    ("dt", (2, 21, 4), r"dt must be \[2, 21, 3\]; got \[2, 21, 4\]"),
    ("A", (3, 5), r"A must be \[3, 4\]; got \[3, 5\]"),
    ("C", (2, 21, 5), r"C must be \[2, 21, 4\]; got \[2, 21, 5\]"),
    ("state", (1, 3, 4), r"initial_state must be \[2, 3, 4\]; got \[1, 3, 4\]"),
])
def test_shapes_that_do_not_fit(name, shape, message):
    inputs = dict(zip(NAMES, make(), strict=True)) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        selective_scan(*(inputs[n] for n in NAMES[:5]), initial_state=inputs["state"])
