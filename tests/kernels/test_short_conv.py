"""The short convolution: equal to its definition, to torch's convolution, packed or not, with states."""

import importlib
from itertools import pairwise

import pytest
import torch

from hybridlm_kernels import short_conv
from tests.support.kernel_compare import error

NAMES = ("x", "weight", "bias", "state")


def make(B=2, T=15, C=5, W=4, N=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T + W)
    shapes = (B, T, C), (C, W), (C,), (N or B, C, W - 1)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def results_and_gradients(x, weight, bias, state, **options):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (x, weight, bias, state)]
    y, final = short_conv(*leaves[:3], initial_state=leaves[3], **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (y, final)]
    present = [t for t in leaves if t is not None]
    return [y, final, *torch.autograd.grad([y, final], present, upstream, allow_unused=True)]


def assert_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        if b is not None:  # states of no rows take no part
            assert a.shape == b.shape
            assert error(a, b) <= tolerance


@pytest.mark.parametrize("borders", [None, [0, 1, 3, 10, 15, 17, 30]])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("extras", [False, True])
def test_equals_the_definition(borders, W, activation, extras):
    x, weight, bias, state = make(W=W, N=None if borders is None else 6)
    inputs = (x, weight, bias, state) if extras else (x, weight, None, None)
    options = {"activation": activation, "cu_seqlens": borders}
    expected = results_and_gradients(*inputs, **options, backend="reference")
    assert_close(results_and_gradients(*inputs, **options, backend="torch"), expected, 1e-13)
    single = [None if t is None else t.float() for t in inputs]
    assert_close(results_and_gradients(*single, **options, backend="torch"), expected, 1e-5)


def test_equals_torchs_convolution():
    x, weight, bias, state = make()
    y, final = short_conv(x, weight, bias, initial_state=state, activation="silu")
    padded = torch.cat([state, x.mT], dim=2)
    expected = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=5)
    torch.testing.assert_close(y, torch.nn.functional.silu(expected).mT)
    assert torch.equal(final, padded[..., -3:])


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(B=1, T=7, C=2, W=3, N=3)]

    def run(x, weight, bias, state):
        return short_conv(x, weight, bias, activation="silu", initial_state=state, cu_seqlens=[0, 1, 3, 7])

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("elements", [1, 2**20])
def test_packed_documents_equal_documents_alone(elements, monkeypatch):
    module = importlib.import_module("hybridlm_kernels.ops.short_conv.torch_backend")
    monkeypatch.setitem(module.BLOCK_MAX_ELEMENTS, "cpu", elements)
    borders = [0, 1, 20, 40, 41, 43, 80]
    x, weight, bias, state = make(T=40, N=6)
    y, final = short_conv(x, weight, bias, activation="silu", initial_state=state, cu_seqlens=borders)
    for n, (a, b) in enumerate(pairwise(borders)):
        y_n, final_n = short_conv(x.flatten(0, 1)[None, a:b], weight, bias, activation="silu",
                                  initial_state=state[n : n + 1])
        torch.testing.assert_close(y.flatten(0, 1)[a:b], y_n[0])
        assert torch.equal(final[n], final_n[0])


def test_causal_to_the_last_bit():
    x, weight, bias, _ = make(T=40, dtype=torch.float32)
    before, _ = short_conv(x, weight, bias, activation="silu")
    for t in (0, 1, 20, 38):
        changed = x.clone()
        changed[:, t + 1 :] += 1.0
        after, _ = short_conv(changed, weight, bias, activation="silu")
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])


def test_decoding_equals_one_call():
    x, weight, bias, state = make(T=9)
    one_call, last = short_conv(x, weight, bias, initial_state=state)
    outputs = []
    for t in range(9):
        y, state = short_conv(x[:, t : t + 1], weight, bias, initial_state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), one_call)
    assert torch.equal(state, last)


def test_half_precision_and_autocast():
    x, weight, bias, _ = make(T=40, dtype=torch.bfloat16)
    y, final = short_conv(x, weight.float(), bias.float(), activation="silu")
    assert y.dtype == final.dtype == torch.bfloat16
    wide, _ = short_conv(x.float(), weight.float(), bias.float(), activation="silu")
    assert error(y, wide) < 0.004
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(short_conv(x.float(), weight.float(), bias.float(), activation="silu")[0], wide)


@pytest.mark.parametrize(("change", "message"), [
    ({"x": (2, 15)}, r"x must be \[batch, time, channels\]"),
    ({"weight": (4, 4)}, r"weight must be \[5 channels, taps\]; got \[4, 4\]"),
    ({"bias": (4,)}, r"bias must be \[5\]; got \[4\]"),
    ({"state": (2, 5, 4)}, r"initial_state must be .* = \[2, 5, 3\]; got \[2, 5, 4\]"),
])
def test_shapes_that_do_not_fit(change, message):
    inputs = dict(zip(NAMES, make(), strict=True)) | {name: torch.zeros(s) for name, s in change.items()}
    with pytest.raises(ValueError, match=message):
        short_conv(inputs["x"], inputs["weight"], inputs["bias"], initial_state=inputs["state"])


def test_unknown_activation():
    x, weight, _, _ = make()
    with pytest.raises(ValueError, match="activation must be 'silu' or None; got 'relu'"):
        short_conv(x, weight, activation="relu")
