"""GateLoop, Rodimus and LightNet: the papers' recurrences token by token, with the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import GateLoopConfig, LightNetConfig, RodimusConfig, build_mixer
from hybridlm.model.mixers.common.phase import accumulate_phase
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import CuSeqlens
from tests.support.layer_parity import HIDDEN, context
from tests.support.mixer_cases import build, inputs, run

CPU = torch.device("cpu")


def test_gate_loop_is_the_complex_recurrence_of_the_paper():
    mixer, x = build("gate_loop"), inputs(1, 8)[0]
    with torch.no_grad():
        q, k, v = (projection(x).view(8, 2, 6) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        a = torch.polar(mixer.alpha_proj(x).sigmoid(), mixer.phi_proj(x)).view(8, 2, 6)
        o = torch.zeros(8, 2, 6, dtype=x.dtype)
        for h in range(2):
            S = torch.zeros(6, 6, dtype=torch.complex128)
            for t in range(8):
                S = a[t, h, :, None] * S + torch.outer(k[t, h], v[t, h])
                o[t, h] = q[t, h] @ S.real
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(o.flatten(1)))


def test_simple_gate_loop_is_its_recurrence():
    mixer, x = build("simple_gate_loop"), inputs(1, 8)[0]
    with torch.no_grad():
        h, expected = torch.zeros(x.shape[1], dtype=x.dtype), []
        for t in range(8):
            h = h / (1 + (-mixer.alpha_proj(x[t])).exp()) + mixer.v_proj(x[t])
            expected.append(mixer.q_proj(x[t]) * h)
        torch.testing.assert_close(run(mixer, x[None])[0], torch.stack(expected))


def test_rodimus_is_the_recurrence_of_the_paper():
    mixer, x = build("rodimus"), inputs(1, 8)[0]
    with torch.no_grad():
        u = mixer.up_proj(x)
        padded = F.pad(u, (0, 0, 2, 0))
        h = F.silu(mixer.conv.bias + sum(padded[w : w + 8] * mixer.conv.weight[:, w] for w in range(3)))
        q, k = mixer.query_proj(h), mixer.key_proj(h)
        a = (1 + (mixer.select_proj(h) + mixer.select_bias).exp()).log()
        tau = (mixer.tau_proj(h) + mixer.tau_bias).sigmoid()
        v = u * mixer.value_b_proj(mixer.value_a_proj(u)).sigmoid()
        S, outputs = torch.zeros(8, u.shape[1], dtype=x.dtype), []
        for t in range(8):
            key = k[t] / k[t].norm() * a[t] ** tau[t]
            S = (-a[t] * tau[t]).exp()[:, None] * S + torch.outer(key, v[t])
            outputs.append(8**-0.5 * q[t] @ S + mixer.skip * h[t])
        o = torch.stack(outputs) * F.silu(mixer.gate_proj(x))
        normed = o / (o.square().mean(-1, keepdim=True) + mixer.norm.eps).sqrt() * mixer.norm.weight
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.down_proj(normed))


def test_lightnet_averages_values_under_a_softmax_over_time():
    mixer, x = build("lightnet"), inputs(1, 9)[0]
    mixer.k_proj.weight.data *= 400.0
    with torch.no_grad():
        q, k, v = (projection(x).view(9, 2, -1) for projection in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        assert k.max() > 100, "exponentials of such keys do not fit fp32"
        o = torch.zeros(9, 2, 8, dtype=x.dtype)
        for t in range(9):
            means = torch.einsum("shk,shv->hkv", torch.softmax(k[: t + 1], 0), v[: t + 1])
            o[t] = torch.einsum("hk,hkv->hv", F.silu(q[t]), means) * 6**-0.5
        o = o.flatten(1)
        o = o / (o.square().mean(-1, keepdim=True) + mixer.o_norm.eps).sqrt() * mixer.o_norm.weight
        o = o * F.silu(mixer.g_b_proj(mixer.g_a_proj(x)))
        torch.testing.assert_close(run(mixer, x[None])[0], mixer.o_proj(o))
        fp32 = run(mixer.float(), x[None].float())[0]
        torch.testing.assert_close(fp32.double(), mixer.o_proj(o.float()).double(), rtol=1e-4, atol=1e-4)


def test_wide_values_of_rodimus_in_parts_are_the_values_in_one():
    torch.manual_seed(0)
    mixer = build_mixer(RodimusConfig(expand=8, key_dim=4, value_rank=3), context()).double()
    mixer.init_weights(0.3)
    assert mixer.value_heads == 8 * HIDDEN // 128 == 4
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    parts = run(mixer, x)
    mixer.value_heads = 1
    torch.testing.assert_close(parts, run(mixer, x))


def test_phases_start_anew_at_documents_and_go_on_in_decoding():
    angle = torch.linspace(0.3, 3.0, 7, dtype=torch.float64).view(1, 7, 1)
    cos, sin = accumulate_phase(angle, SequenceInfo.make(1, 7, CPU, CuSeqlens([0, 3, 7])))
    sums = torch.cat([angle[:, :3].cumsum(1), angle[:, 3:].cumsum(1)], 1)
    torch.testing.assert_close((cos, sin), (sums.cos(), sums.sin()))


def test_phases_of_long_documents_keep_their_precision():
    angle = torch.full((1, 20_000, 1), 2.5)
    cos, _ = accumulate_phase(angle, SequenceInfo.make(1, 20_000, CPU))
    exact = (angle[0, 0, 0].double() * 20_000).cos()
    assert abs(cos[0, -1, 0].double() - exact) < 1e-3  # a sum of angles in fp32 is off by more


def test_all_projections_of_lightnet_start_alike():
    torch.manual_seed(0)
    mixer = build_mixer(LightNetConfig(num_heads=4, head_dim=32), context())
    mixer.init_weights(0.02)
    for name, parameter in mixer.named_parameters():
        if name == "o_norm.weight":
            assert torch.equal(parameter, torch.ones_like(parameter))
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.06), name


def test_the_start_of_rodimus_is_the_published_one():
    torch.manual_seed(0)
    mixer = build_mixer(RodimusConfig(key_dim=256), context())
    mixer.init_weights(0.02)
    a, tau = F.softplus(mixer.select_bias), mixer.tau_bias.sigmoid()
    assert a.min() >= 1e-3 * 0.999
    assert a.max() <= 0.1 * 1.001
    assert a.log().mean().item() == pytest.approx(0.5 * torch.tensor(1e-4).log().item(), abs=0.3)
    assert tau.min() >= 1 / 16 - 1e-6
    assert tau.max() <= 0.9 + 1e-6
    assert tau.mean().item() == pytest.approx((1 / 16 + 0.9) / 2, abs=0.05)
    assert torch.equal(mixer.skip, torch.ones(2 * HIDDEN))
    fan = sum(mixer.key_proj.weight.shape)
    assert mixer.key_proj.weight.std().item() == pytest.approx(2**-2.5 * (2 / fan) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: GateLoopConfig(num_heads=0, head_dim=4), "num_heads: must be positive"),
    (lambda: LightNetConfig(num_heads=2, head_dim=4, output_gate_rank=0), "output_gate_rank: must be positive"),
    (lambda: RodimusConfig(key_dim=0), "key_dim: must be positive"),
    (lambda: RodimusConfig(conv_size=1), "conv_size: is not a convolution"),
])
def test_bad_options_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
