"""The diagonal state space model: its definition, the convolution of S4D's code, causality, packing and decoding."""

import pytest
import torch

from hybridlm_kernels import diagonal_ssm
from tests.support.kernel_compare import error


def make(B=1, T=70, C=2, M=1, S=3, N=None, dtype=torch.float64):
    """Inputs, strong and weak decays with all angles, output weights and states."""
    generator = torch.Generator().manual_seed(T)
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    x = torch.randn(B, T, C, M, generator=generator, dtype=torch.float64).to(dtype)
    rate = 10.0 ** torch.linspace(-3, 1, C * S, dtype=torch.float64).view(C, S)
    log_a = torch.complex(-rate, 3.0 * torch.rand(C, S, generator=generator, dtype=torch.float64))
    c = torch.randn(C, S, generator=generator, dtype=torch.complex128)
    state = torch.randn(N or B, C, M, S, generator=generator, dtype=torch.complex128)
    return [x, log_a.to(complex_dtype), c.to(complex_dtype), state.to(complex_dtype)]


def results_and_gradients(inputs, **options):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    outputs = diagonal_ssm(*leaves[:3], initial_state=leaves[3], **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [t for t in leaves if t is not None], upstream)]


@pytest.mark.parametrize(("T", "M", "borders"), [(1, 2, None), (64, 1, None), (70, 2, None),
                                                 (70, 1, [0, 1, 3, 3, 68, 70, 140])])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_definition(T, M, borders, with_state):
    x, log_a, c, state = make(B=2, T=T, M=M, N=None if borders is None else 6)
    inputs = (x, log_a, c, state if with_state else None)
    expected = results_and_gradients(inputs, cu_seqlens=borders, backend="reference")
    for got, wanted in zip(results_and_gradients(inputs, cu_seqlens=borders, backend="torch"), expected, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_is_the_convolution_of_the_code_of_s4d():
    x, log_a, c, _ = make()
    distance = torch.arange(70)
    kernel_CT = 2 * (c[..., None] * (log_a[..., None] * distance).exp()).sum(1).real
    transformed = torch.fft.rfft(kernel_CT, n=140) * torch.fft.rfft(x[0, :, :, 0].T, n=140)
    torch.testing.assert_close(diagonal_ssm(x, log_a, c)[0][0, :, :, 0].T, torch.fft.irfft(transformed, n=140)[:, :70])


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(T=5, C=1, S=2, N=3)]
    assert torch.autograd.gradcheck(
        lambda x, log_a, c, s: diagonal_ssm(x, log_a.real.clamp(max=0) + 1j * log_a.imag, c, initial_state=s,
                                            cu_seqlens=[0, 1, 1, 5]), inputs)


def test_causal_to_the_last_bit_and_decoding_equals_one_call():
    x, log_a, c, state = make(T=130, dtype=torch.float32)
    before, last = diagonal_ssm(x, log_a, c, initial_state=state)
    for t in (0, 63, 64, 100):
        changed = x.clone()
        changed[:, t + 1 :] += 1.0
        after, _ = diagonal_ssm(changed, log_a, c, initial_state=state)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1], after[:, t + 1])
    outputs = []
    for part in (x[:, :65], *x[:, 65:68].split(1, 1), x[:, 68:]):
        y, state = diagonal_ssm(part, log_a, c, initial_state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-4)
    half, _ = diagonal_ssm(x.bfloat16(), log_a, c)
    assert half.dtype == torch.float32
    assert error(half, diagonal_ssm(x, log_a, c)[0]) < 0.02


@pytest.mark.parametrize(("place", "tensor", "message"), [
    (0, torch.zeros(1, 70, 2), r"x must be \[batch, time, channels, inputs\]"),
    (1, torch.zeros(3, 3, dtype=torch.complex128), r"log_a and c must be \[channels, modes\] = \[2, S\]"),
    (2, torch.zeros(2, 3), "complex of one precision"),
    (3, torch.zeros(1, 2, 1, 4), r"initial_state must be \[1, 2, 1, 3\]; got \[1, 2, 1, 4\]"),
])
def test_inputs_that_do_not_fit(place, tensor, message):
    inputs = make()
    inputs[place] = tensor
    with pytest.raises(ValueError, match=message):
        diagonal_ssm(*inputs[:3], initial_state=inputs[3])
