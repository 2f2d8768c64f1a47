"""What the delta rule erases and writes beyond Gated DeltaNet and KDA: the papers' recurrences by token in fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from hybridlm.errors import ConfigError
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers import DeltaRuleConfig, build_mixer
from tests.support.layer_parity import context
from tests.support.mixer_cases import build, context_of, inputs, run

T = 6


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def convolved(mixer, name, x):
    """silu(conv(W x)) of one row, [T, channels]."""
    y = getattr(mixer, f"{name}_proj")(x[0])
    weight = getattr(mixer, f"{name}_conv")
    taps = weight.shape[1]
    padded = F.pad(y, (0, 0, taps - 1, 0))
    return F.silu(sum(padded[i : i + len(y)] * weight[:, i] for i in range(taps)))


def finish(mixer, x, reads):
    """Norm over each head, output gate and projection of reads [T, HV, V]."""
    normed = reads * (reads.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.o_norm.weight
    if mixer.config.output_gate == "none":
        return mixer.o_proj(normed.flatten(-2))
    project = mixer.g_proj if hasattr(mixer, "g_proj") else lambda x: mixer.g_b_proj(mixer.g_a_proj(x))
    act = {"silu": F.silu, "sigmoid": torch.sigmoid}[mixer.config.output_gate]
    return mixer.o_proj((normed * act(project(x[0])).view_as(normed)).flatten(-2))


def scalar_decay(mixer, x):
    """alpha [T, HV]."""
    return torch.exp(-mixer.A_log.exp() * F.softplus(mixer.a_proj(x[0]) + mixer.dt_bias))


def channel_decay(mixer, x, heads):
    """alpha [T, H, K]."""
    f = mixer.f_b_proj(mixer.f_a_proj(x[0])) + mixer.dt_bias
    return torch.exp(-mixer.A_log.exp()[:, None] * F.softplus(f).view(T, heads, -1))


@torch.no_grad()
@pytest.mark.parametrize("name", ["delta_product", "gated_delta_product"])
def test_delta_product(name):
    """S <- alpha S, then S <- (I - beta_j k_j k_j^T) S + beta_j k_j v_j^T for j = 1 ... n."""
    mixer, x = build(name), inputs(1, T)
    c = mixer.config
    n, H, HV, K, V = c.steps, c.num_heads, c.value_heads, c.head_dim, c.value_dim
    q, k = unit(convolved(mixer, "q", x).view(T, H, K)), unit(convolved(mixer, "k", x).view(T, n, H, K))
    v = convolved(mixer, "v", x).view(T, n, HV, V)
    beta = 2 * torch.sigmoid(mixer.b_proj(x[0])).view(T, n, HV)
    alpha = scalar_decay(mixer, x) if c.decay == "scalar" else torch.ones(T, HV)
    reads = torch.zeros(T, HV, V, dtype=x.dtype)
    for h in range(HV):
        S, key_head = torch.zeros(K, V, dtype=x.dtype), h // (HV // H)
        for t in range(T):
            S = alpha[t, h] * S
            for j in range(n):
                kj = k[t, j, key_head]
                S = S - beta[t, j, h] * torch.outer(kj, kj) @ S + beta[t, j, h] * torch.outer(kj, v[t, j, h])
            reads[t, h] = S.T @ q[t, key_head] / K**0.5
    torch.testing.assert_close(run(mixer, x)[0], finish(mixer, x, reads))


@torch.no_grad()
@pytest.mark.parametrize(("read", "beta_scale"), [("before", 1.0), ("after", 2.0)])
@pytest.mark.parametrize("qk_l2norm", [True, False])
def test_comba(read, beta_scale, qk_l2norm):
    """S_t = alpha S_{t-1} - beta k (p^T S) + beta k v^T with p = sigmoid(c) k; queries q - d p. alpha is strong."""
    torch.manual_seed(0)
    config = DeltaRuleConfig(num_heads=2, head_dim=8, decay="scalar", read=read, beta_scale=beta_scale, conv_size=2,
                             query_correction=True, output_gate="sigmoid", qk_l2norm=qk_l2norm)
    mixer, x = build_mixer(config, context_of()).double(), inputs(1, T)
    mixer.init_weights(0.3)
    mixer.A_log.data.fill_(math.log(3.0))
    mixer.dt_bias.data.fill_(0.5)
    mixer.correction_gate.data = torch.tensor([0.3, -1.0], dtype=x.dtype)
    q, k, v = (convolved(mixer, name, x).view(T, 2, 8) for name in "qkv")
    p = torch.sigmoid(mixer.correction_gate)[:, None] * k
    q = q - mixer.correction[:, None] * p
    if qk_l2norm:  # the published kernels normalise p as well, which leaves k
        q, k = unit(q), unit(k)
        p = k
    beta, alpha = beta_scale * torch.sigmoid(mixer.b_proj(x[0])), scalar_decay(mixer, x)
    assert alpha.mean() < 0.3
    reads = torch.zeros(T, 2, 8, dtype=x.dtype)
    for h in range(2):
        S = torch.zeros(8, 8, dtype=x.dtype)
        for t in range(T):
            seen = S if read == "before" else alpha[t, h] * S
            S = alpha[t, h] * S + beta[t, h] * torch.outer(k[t, h], v[t, h] - seen.T @ p[t, h])
            reads[t, h] = S.T @ q[t, h] / 8**0.5
    torch.testing.assert_close(run(mixer, x)[0], finish(mixer, x, reads))


@torch.no_grad()
def test_gated_deltanet_2():
    """S_t = (I - k (b * k)^T) Diag(alpha) S_{t-1} + k (w * v)^T."""
    mixer, x = build("gdn2"), inputs(1, T)
    q, k, v = (convolved(mixer, name, x).view(T, 2, 8) for name in "qkv")
    q, k, alpha = unit(q), unit(k), channel_decay(mixer, x, 2)
    b, w = (torch.sigmoid(projection(x[0])).view(T, 2, 8) for projection in (mixer.b_proj, mixer.w_proj))
    reads, eye = torch.zeros(T, 2, 8, dtype=x.dtype), torch.eye(8, dtype=x.dtype)
    for h in range(2):
        S = torch.zeros(8, 8, dtype=x.dtype)
        for t in range(T):
            erase = eye - torch.outer(k[t, h], b[t, h] * k[t, h])
            S = erase @ torch.diag(alpha[t, h]) @ S + torch.outer(k[t, h], w[t, h] * v[t, h])
            reads[t, h] = S.T @ q[t, h] / 8**0.5
    torch.testing.assert_close(run(mixer, x)[0], finish(mixer, x, reads))


@torch.no_grad()
def test_preconditioned_kda():
    """A_t = e^{g'} A_{t-1} + b' k^2; the written key is k 1.5^{-s}, s = r / (1 + |r|), r = log(A + 1e-6) - c."""
    mixer, x = build("preconditioned_kda"), inputs(1, T)
    metric = mixer.preconditioner
    q, k, v = (convolved(mixer, name, x).view(T, 2, 8) for name in "qkv")
    q, k, alpha = unit(q), unit(k), channel_decay(mixer, x, 2)
    beta, weight = torch.sigmoid(mixer.b_proj(x[0])), torch.sigmoid(metric.b_proj(x[0]))
    kept = torch.exp(-metric.A_log.exp() * F.softplus(metric.a_proj(x[0]) + metric.dt_bias))
    reads = torch.zeros(T, 2, 8, dtype=x.dtype)
    for h in range(2):
        S, A = torch.zeros(8, 8, dtype=x.dtype), torch.zeros(8, dtype=x.dtype)
        for t in range(T):
            key = k[t, h]
            A = kept[t, h] * A + weight[t, h] * key**2
            r = torch.log(A + 1e-6) - metric.center[h]
            written = key * 1.5 ** (-r / (1 + r.abs()))
            S = torch.diag(alpha[t, h]) @ S
            S = S + beta[t, h] * torch.outer(written, v[t, h] - S.T @ key)
            reads[t, h] = S.T @ q[t, h] / 8**0.5
    torch.testing.assert_close(run(mixer, x)[0], finish(mixer, x, reads))


@torch.no_grad()
def test_longhorn_is_the_minimum_of_its_objective():
    """S_t minimises |S - S_{t-1}|^2 + beta |S^T k - v|^2, a linear system in S."""
    mixer, x = build("longhorn_exact"), inputs(1, T)
    c = mixer.config
    q, k = (convolved(mixer, name, x).view(T, 2, 8) for name in "qk")
    v, beta = convolved(mixer, "v", x).view(T, 4, c.value_dim), torch.sigmoid(mixer.b_proj(x[0]))
    reads = torch.zeros(T, 4, c.value_dim, dtype=x.dtype)
    for h in range(4):
        S = torch.zeros(8, c.value_dim, dtype=x.dtype)
        for t in range(T):
            key = k[t, h // 2]
            normal = torch.eye(8, dtype=x.dtype) + beta[t, h] * torch.outer(key, key)
            S = torch.linalg.solve(normal, S + beta[t, h] * torch.outer(key, v[t, h]))
            reads[t, h] = S.T @ q[t, h // 2] / 8**0.5
    torch.testing.assert_close(run(mixer, x)[0], finish(mixer, x, reads))


def test_the_starts_are_the_published_ones():
    torch.manual_seed(0)
    config = DeltaRuleConfig(num_heads=64, head_dim=2, query_correction=True, correction_init=0.02, precondition=True,
                             a_init=(1.0, 16.0), dt_bias_init="zeros")
    mixer = build_mixer(config, context())
    mixer.init_weights(0.02)
    metric = mixer.preconditioner
    assert mixer.correction.unique().item() == pytest.approx(0.02)
    assert mixer.correction_gate.unique().item() == 1.0
    assert metric.center.unique().item() == pytest.approx(-0.2)
    assert not mixer.dt_bias.any()
    rate, step = metric.A_log.exp(), F.softplus(metric.dt_bias)
    assert 1 <= rate.min() < rate.max() <= 16
    assert rate.mean().item() == pytest.approx(8.5, abs=1.5)
    assert 0.99e-3 <= step.min() < step.max() <= 0.1001
    assert step.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.4)
    assert metric.a_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(("options", "message"), [
    ({"steps": 0}, "steps: must be positive"),
    ({"steps": 2, "precondition": True}, "precondition: is not defined for several writes"),
    ({"steps": 2, "query_correction": True}, "query_correction: is not defined for several writes"),
    ({"precondition": True, "beta_scale": 2.0}, "beta_scale: must keep the state stable; got 2.0; expected .* 1.333"),
    ({"implicit": True, "strength": "channel"}, "implicit: needs one beta per head"),
])
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ConfigError, match=message):
        DeltaRuleConfig(num_heads=2, head_dim=8, **options)


def test_attention_weights_start_every_write():
    config = DeltaRuleConfig(num_heads=2, head_dim=4, steps=3)
    old = build_mixer(DeltaRuleConfig(num_heads=2, head_dim=4), context()).config
    assert config.initial_weights_from(old, {}, NormConfig()) == {}
    from hybridlm.model.mixers import AttentionConfig

    attention = build_mixer(AttentionConfig(num_heads=2, head_dim=4), context())
    found = config.initial_weights_from(attention.config, dict(attention.named_parameters()), NormConfig())
    assert found["k_proj.weight"].shape[0] == config.channels["k"] == 24
    assert torch.equal(found["k_proj.weight"][:8], attention.k_proj.weight)
    assert torch.equal(found["k_proj.weight"][16:], attention.k_proj.weight)
