"""S4D and H3: the convolutions of the authors' code, with the published start."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import H3Config, S4DConfig, build_mixer
from tests.support.layer_parity import HIDDEN, context
from tests.support.mixer_cases import build, inputs, run

T = 9


def convolve(kernel_CT, x_TC):
    """y_t = sum_s kernel_s x_{t-s}, by Fourier transforms as in the authors' code."""
    product = torch.fft.rfft(kernel_CT, n=2 * T) * torch.fft.rfft(x_TC.T, n=2 * T)
    return torch.fft.irfft(product, n=2 * T)[:, :T].T


def ssm_matrices(ssm):
    A = -ssm.A_log.exp() + 1j * ssm.A_imag
    return A, ssm.log_dt.exp()[:, None], torch.view_as_complex(ssm.C)


def test_s4d_is_the_convolution_of_the_authors_code():
    mixer, x = build("s4d"), inputs(1, T)[0]
    with torch.no_grad():
        A, dt, C = ssm_matrices(mixer.ssm)
        vandermonde = (A * dt)[..., None] * torch.arange(T)
        kernel = 2 * torch.einsum("hn,hnl->hl", C * ((A * dt).exp() - 1) / A, vandermonde.exp()).real
        y = F.gelu(convolve(kernel, x) + mixer.ssm.D * x)
        a, b = (y @ mixer.out_proj.weight.T + mixer.out_proj.bias).chunk(2, -1)
        torch.testing.assert_close(run(mixer, x[None])[0], a * b.sigmoid())


@pytest.mark.parametrize("name", ["h3", "h3_heads"])
def test_h3_is_the_recurrence_of_the_paper(name):
    """Shift as a matrix, bilinear steps by solving for the next state, products of a head one by one."""
    mixer, x = build(name), inputs(1, T)[0]
    K, taps, D = mixer.config.head_dim, mixer.config.state_size, x.shape[1]
    with torch.no_grad():
        q, k, v = (projection(x) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        shift = torch.diag(torch.ones(taps - 1, dtype=x.dtype), -1)
        memory, moved = torch.zeros(taps, D, dtype=x.dtype), []
        for t in range(T):
            memory = shift @ memory
            memory[0] = k[t]  # B is the first unit vector
            moved.append((mixer.shift.weight.flip(1).T * memory).sum(0) + mixer.k_skip * k[t])
        k = torch.stack(moved)
        A, dt, C = ssm_matrices(mixer.ssm)
        B = torch.view_as_complex(mixer.ssm.B)
        y = torch.zeros(T, D, dtype=x.dtype)
        for h in range(D // K):
            state = torch.zeros(K, K, A.shape[1], dtype=torch.complex128)
            for t in range(T):
                head = slice(h * K, h * K + K)
                product = torch.outer(k[t, head], v[t, head])
                # (1 - dt A / 2) s_t = (1 + dt A / 2) s_{t-1} + dt B u_t
                step = (1 + dt[h] * A[h] / 2) * state + dt[h] * B[h] * product[..., None]
                state = step / (1 - dt[h] * A[h] / 2)
                read = 2 * (state * C[h]).sum(-1).real + mixer.ssm.D[h] * product
                y[t, head] = q[t, head] @ read
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(y))


@pytest.mark.parametrize("config", [S4DConfig(state_size=32), H3Config(state_size=32)])
def test_the_start_is_the_published_one(config):
    torch.manual_seed(0)
    mixer = build_mixer(config, context())
    mixer.init_weights(0.02)
    ssm = mixer.ssm
    torch.testing.assert_close(ssm.A_log.exp(), torch.full((HIDDEN, 16), 0.5))
    torch.testing.assert_close(ssm.A_imag, (math.pi * torch.arange(16)).expand(HIDDEN, -1))
    steps = ssm.log_dt.exp()
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert ssm.log_dt.mean().item() == pytest.approx(math.log(1e-2), abs=0.6)
    assert torch.view_as_complex(ssm.C).abs().square().mean().item() == pytest.approx(1.0, rel=0.15)
    assert 0.6 < ssm.D.std() < 1.4
    if ssm.B is not None:
        assert torch.equal(torch.view_as_complex(ssm.B), torch.ones(HIDDEN, 16, dtype=torch.complex64))
        assert mixer.shift.weight.abs().max() <= 32**-0.5
        assert mixer.shift.weight.std().item() == pytest.approx((1 / 96) ** 0.5, rel=0.1)
        assert 0.6 < mixer.k_skip.std() < 1.4
        assert not mixer.o_proj.bias.any()
    else:
        for parameter in mixer.out_proj.parameters():
            assert parameter.abs().max() <= HIDDEN**-0.5
        assert mixer.out_proj.weight.std().item() == pytest.approx((1 / (3 * HIDDEN)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: S4DConfig(state_size=5), "state_size: must be even and positive; got 5"),
    (lambda: H3Config(state_size=0), "state_size: must be even and positive; got 0"),
    (lambda: H3Config(head_dim=0), "head_dim: must be positive; got 0"),
    (lambda: build_mixer(H3Config(head_dim=HIDDEN - 1), context()), "head_dim: must divide the hidden size"),
])
def test_bad_options_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
