"""mLSTM and sLSTM: equal to transformers' layer and to the paper's recurrence, with the published start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.errors import ConfigError
from hybridlm.model.mixers import MLSTMBlockConfig, MLSTMConfig, SLSTMConfig, build_mixer
from hybridlm.model.mixers.common.exponential_gates import read_exponential_state
from hybridlm.model.sequence import SequenceInfo
from tests.support.layer_parity import HIDDEN, TOLERANCE, context, ours, random_weights, token_inputs
from tests.support.mixer_cases import build, inputs, run

NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "ogate_preact": "g_proj", "igate_preact": "i_proj",
         "fgate_preact": "f_proj", "multihead_norm": "o_norm", "out_proj": "o_proj"}


def test_equals_the_layer_of_transformers():
    """Their divisor has 1e-6 more, and their maximum differs: the same function within this tolerance."""
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

    theirs = xLSTMConfig(hidden_size=HIDDEN, num_heads=4, num_hidden_layers=2, autocast_kernel_dtype="float32",
                         mode="inference", chunk_size=16)
    layer = xLSTMLayer(theirs)
    random_weights(layer)
    weights = {}
    for name, value in layer.state_dict().items():
        owner, _, last = name.rpartition(".")
        weights[f"{NAMES[owner]}.{last}"] = value
    for gate in "if":
        weights[f"{gate}_bias"] = weights.pop(f"{gate}_proj.bias")
    x = token_inputs()
    with torch.no_grad():
        expected, _ = layer(x)
        torch.testing.assert_close(ours(MLSTMConfig(num_heads=4, head_dim=8), weights, x), expected, **TOLERANCE)


def recurrence(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
    """The paper's equations 19 to 27 token by token, without any maximum: [T, H, V]."""
    T, H, K = q.shape
    outputs = []
    C, n = q.new_zeros(H, K, v.shape[2]), q.new_zeros(H, K)
    for t in range(T):
        forget, enter = torch.sigmoid(f[t])[:, None], torch.exp(i[t])[:, None]
        C = forget[..., None] * C + enter[..., None] * k[t][:, :, None] * v[t][:, None, :]
        n = forget * n + enter * k[t]
        scaled = q[t] / K**0.5
        total = torch.einsum("hk,hk->h", n, scaled).abs().clamp(min=1.0)
        outputs.append(torch.einsum("hkv,hk->hv", C, scaled) / total[:, None])
    return torch.stack(outputs)


@pytest.mark.parametrize("dims", [(4, 3), (3, 300)])  # the second has more columns than one value head takes
@pytest.mark.parametrize("shift", [-4.0, 0.0, 6.0])
def test_the_recurrence_of_the_paper_where_no_maximum_is_needed(dims, shift):
    generator = torch.Generator().manual_seed(0)
    T, H, (K, V) = 37, 2, dims
    q, k, v, i, f = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in
                     ((T, H, K), (T, H, K), (T, H, V), (T, H), (T, H)))
    i, f = 2.0 * i + shift, 3.0 * f
    got = read_exponential_state(*(x[None] for x in (q, k, v, i, f)), SequenceInfo.make(1, T, q.device))
    torch.testing.assert_close(got[0], recurrence(q, k, v, i, f), rtol=1e-10, atol=1e-10)


def test_gates_of_any_size_stay_finite_in_fp32():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 40, 2, 4, generator=generator)
    i = 200.0 * torch.randn(1, 40, 2, generator=generator)
    leaves = [x.requires_grad_() for x in (q, k, v, i, 50.0 * i.detach())]
    h = read_exponential_state(*leaves, SequenceInfo.make(1, 40, q.device))
    gradients = torch.autograd.grad(h.square().sum(), leaves)
    assert all(torch.isfinite(x).all() for x in (h, *gradients))
    wide = read_exponential_state(*(x.detach().double() for x in leaves), SequenceInfo.make(1, 40, q.device))
    torch.testing.assert_close(h.double(), wide, rtol=2e-3, atol=2e-3)


def test_the_block_is_that_of_the_paper():
    mixer, x = build("mlstm_block"), inputs(1, 6)
    with torch.no_grad():
        u, z = mixer.up_proj(x[0]).chunk(2, -1)
        padded = F.pad(u, (0, 0, 3, 0))
        c = F.silu(mixer.conv.bias + sum(padded[w : w + 6] * mixer.conv.weight[:, w] for w in range(4)))
        q, k, v = (source @ torch.block_diag(*weight).T for source, weight in
                   ((c, mixer.q_map), (c, mixer.k_map), (u, mixer.v_map)))
        gates = torch.cat([q, k, v], -1)
        i, f = mixer.i_proj(gates) + mixer.i_bias, mixer.f_proj(gates) + mixer.f_bias
        h = recurrence(*(y.view(6, 2, -1) for y in (q, k, v)), i, f).flatten(1)
        h = F.group_norm(h, 2, mixer.o_norm.weight, eps=1e-5) + mixer.skip * c
        torch.testing.assert_close(run(mixer, x)[0], mixer.down_proj(h * F.silu(z)))


def test_slstm_is_the_recurrence_of_the_paper():
    """Its equations 8 to 15 token by token, without any maximum."""
    mixer, x = build("slstm"), inputs(1, 6)
    with torch.no_grad():
        padded = F.pad(x[0], (0, 0, 3, 0))
        u = F.silu(mixer.conv.bias + sum(padded[w : w + 6] * mixer.conv.weight[:, w] for w in range(4)))
        W = {name: torch.block_diag(*getattr(mixer, f"{name}_map")) for name in "zifo"}
        R = {name: torch.block_diag(*mixer.recurrence[4 * j : 4 * j + 4]) for j, name in enumerate("zifo")}
        b = dict(zip("zifo", mixer.gate_bias.chunk(4), strict=True))
        h = c = n = torch.zeros_like(x[0, 0])
        outputs = []
        for t in range(6):
            z, i, f, o = (W[name] @ source + R[name] @ h + b[name] for name, source in
                          (("z", x[0, t]), ("i", u[t]), ("f", u[t]), ("o", x[0, t])))
            c = f.sigmoid() * c + i.exp() * z.tanh()
            n = f.sigmoid() * n + i.exp()
            h = o.sigmoid() * c / n
            outputs.append(h)
        expected = F.group_norm(torch.stack(outputs), 4, mixer.o_norm.weight, eps=1e-5)
        torch.testing.assert_close(run(mixer, x)[0], expected)


def test_the_start_of_slstm_is_the_published_one():
    mixer = build_mixer(SLSTMConfig(num_heads=4), context(layer_index=1, num_layers=4))
    mixer.init_weights(0.02)
    assert not mixer.recurrence.any()
    z, i, f, o = mixer.gate_bias.view(4, 4, 16)
    assert not any(bias.any() for bias in (z, i, o))
    for j in (0, 1, 7, 15):
        assert f[2, j].item() == pytest.approx(5 - 12 * (j / 15) ** (0.3 + 1.3 / 3), abs=1e-5)
    assert mixer.z_map.std().item() == pytest.approx((2 / (5 * HIDDEN)) ** 0.5, rel=0.1)


def test_the_starts_are_the_published_ones():
    torch.manual_seed(0)
    layer = build_mixer(MLSTMConfig(num_heads=4, head_dim=8), context())
    block = build_mixer(MLSTMBlockConfig(num_heads=4), context())
    for mixer in (layer, block):
        mixer.init_weights(0.02)
        assert not mixer.i_proj.weight.any()
        assert not mixer.f_proj.weight.any()
        assert mixer.f_bias.tolist() == pytest.approx([3.0, 4.0, 5.0, 6.0])
    assert layer.i_bias.tolist() == [-10.0] * 4
    assert block.i_bias.abs().max() < 0.4
    assert block.i_bias.any()
    assert block.q_map.std().item() == pytest.approx((2 / (5 * 2 * HIDDEN)) ** 0.5, rel=0.1)
    assert torch.equal(block.skip, torch.ones(2 * HIDDEN))


@pytest.mark.parametrize(("config", "message"), [
    (lambda: MLSTMConfig(num_heads=2, head_dim=4, gate_soft_cap=0.0), "gate_soft_cap: must be positive"),
    (lambda: MLSTMBlockConfig(num_heads=2, conv_size=1), "conv_size: is not a convolution"),
    (lambda: SLSTMConfig(num_heads=2, conv_size=0), "conv_size: is not a convolution"),
    (lambda: build_mixer(SLSTMConfig(num_heads=3), context()), "num_heads: must divide the width of the model"),
    (lambda: build_mixer(MLSTMBlockConfig(num_heads=3), context()), "num_heads: must divide the channels of the block"),
])
def test_bad_options_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        config()
