"""Operations on one token per row, in torch and without gradients: what a decode step of a model is made of.

They compute what the torch backends compute for a row of one token. They check nothing and choose nothing: whoever
prepares a decode step does that once. State matrices are updated in place.

Legend: B rows, C channels, W taps, D width, H query/key heads, HV value heads, K/V key/value head dim, E experts,
A experts per token, I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.swiglu.soft_caps import SoftCaps
from hybridlm_kernels.ops.swiglu.torch_backend import bounded, soft_parts
from hybridlm_kernels.registry import first_choice

L2NORM_EPSILON = 1e-6  # added to the sum of squares, as in delta_rule
STANDS_FOR = ("rms_norm", "gated_rms_norm", "short_conv", "delta_rule", "linear_attention", "rotary", "swiglu",
              "moe_experts", "attention")


def is_preferred(device: str) -> bool:
    """Whether these functions may replace the operations on a device: their torch backends would run there.

    On a GPU Triton kernels do, and where `configure` names another backend, that one.
    """
    return all(first_choice(name, device) == "torch" for name in STANDS_FOR)


def rms_norm_step(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """RMS norm over the last dim, in fp32 at least; arguments as in `rms_norm`.

    >>> rms_norm_step(torch.tensor([1.0, 7.0]), torch.tensor([1.0, 2.0]), 0.0)
    tensor([0.2000, 2.8000])
    """
    wide_x = _wide(x)
    weight = _wide(weight)
    if not zero_centered and x.dtype is weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    normed = wide_x * _inverse_rms(wide_x, eps)
    return normed.mul_(weight + 1.0 if zero_centered else weight).to(x.dtype)


def gated_rms_norm_step(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    """RMS norm over the last dim times an activated gate, in fp32 at least; arguments as in `gated_rms_norm`.

    >>> gated_rms_norm_step(torch.tensor([2.0, 2.0]), torch.zeros(2), torch.ones(2), 0.0, "sigmoid")
    tensor([0.5000, 0.5000])
    """
    wide_x, gate = _wide(x), _wide(gate)
    y = F.silu(gate) if activation == "silu" else torch.sigmoid(gate)
    return y.mul_(wide_x).mul_(_inverse_rms(wide_x, eps)).mul_(_wide(weight)).to(x.dtype)


def short_conv_step(x_BC: Tensor, weight_CW: Tensor, state_BCW: Tensor,
                    activation: str | None = None) -> tuple[Tensor, Tensor]:
    """One step of the causal convolution.

    Args:
        x_BC: inputs of this token.
        weight_CW: one filter of W taps per channel.
        state_BCW: the W - 1 inputs before it, oldest first.
        activation: "silu" or None.

    Returns:
        y [B, C] in x's dtype, and the W - 1 inputs before the next token.

    >>> y, state = short_conv_step(torch.tensor([[4.0]]), torch.tensor([[10.0, 1.0]]), torch.tensor([[[3.0]]]))
    >>> y, state
    (tensor([[34.]]), tensor([[[4.]]]))
    """
    x_BCW = torch.cat([state_BCW, x_BC.unsqueeze(-1)], -1)
    y_BC = (_wide(x_BCW) * _wide(weight_CW)).sum(-1)
    return (F.silu(y_BC) if activation == "silu" else y_BC).to(x_BC.dtype), x_BCW[..., 1:]


def delta_rule_step(q_BHK: Tensor, k_BHK: Tensor, v_BHvV: Tensor, log_decay: Tensor | None, beta_BHv: Tensor | None,
                    scale: float, state_BHvKV: Tensor, qk_l2norm: bool) -> Tensor:
    """One step of the gated delta rule: S = e^g S;  S += beta k (v - S^T k)^T;  o = scale * S^T q.

    Args:
        q_BHK: queries, activated.
        k_BHK: keys, activated. Key head j serves value heads j r ... j r + r - 1, r = HV / H.
        v_BHvV: values, activated.
        log_decay: logarithm of the decay, [B, HV] or [B, HV, K]; None is no decay.
        beta_BHv: write strength; None is 1.
        scale: factor on the queries.
        state_BHvKV: the contiguous state in float32 at least, changed in place.
        qk_l2norm: divide q and k by sqrt(sum of squares + 1e-6) first.

    Returns:
        o [B, HV, V] in v's dtype.

    >>> state = torch.tensor([[[[5.0], [0.0]]]])
    >>> key = torch.tensor([[[1.0, 0.0]]])
    >>> delta_rule_step(key, key, torch.tensor([[[2.0]]]), None, None, 1.0, state, False), state.flatten()
    (tensor([[[2.]]]), tensor([2., 0.]))
    """
    B, HV, K, V = state_BHvKV.shape
    dtype = state_BHvKV.dtype
    q, k = q_BHK.to(dtype), k_BHK.to(dtype)
    if qk_l2norm:
        q, k = _l2_normed(q), _l2_normed(k)
    q_X1K, k_X1K = _by_value_head(q, HV), _by_value_head(k, HV)
    S_XKV = state_BHvKV.view(B * HV, K, V)
    _decay(S_XKV, log_decay, dtype)
    correction_X1V = torch.baddbmm(v_BHvV.to(dtype).reshape(B * HV, 1, V), k_X1K, S_XKV, alpha=-1)
    if beta_BHv is not None:
        correction_X1V.mul_(beta_BHv.to(dtype).reshape(B * HV, 1, 1))
    S_XKV.baddbmm_(k_X1K.mT, correction_X1V)
    return torch.bmm(q_X1K, S_XKV).mul_(scale).view(B, HV, V).to(v_BHvV.dtype)


def linear_attention_step(q_BHK: Tensor, k_BHK: Tensor, v_BHvV: Tensor, log_decay: Tensor | None, scale: float,
                          state_BHvKV: Tensor) -> Tensor:
    """One step of linear attention: S = e^g S + k v^T;  o = scale * S^T q.

    Args:
        q_BHK: queries, activated.
        k_BHK: keys, activated. Key head j serves value heads j r ... j r + r - 1, r = HV / H.
        v_BHvV: values, activated.
        log_decay: logarithm of the decay, [HV], [B, HV] or [B, HV, K]; None is no decay.
        scale: factor on the queries.
        state_BHvKV: the contiguous state in float32 at least, changed in place.

    Returns:
        o [B, HV, V] in v's dtype.

    >>> state, one = torch.tensor([[[[2.0]]]]), torch.ones(1, 1, 1)
    >>> linear_attention_step(one, one, one, torch.tensor([0.5]).log(), 1.0, state)
    tensor([[[2.]]])
    """
    B, HV, K, V = state_BHvKV.shape
    dtype = state_BHvKV.dtype
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(B, HV)
    S_XKV = state_BHvKV.view(B * HV, K, V)
    _decay(S_XKV, log_decay, dtype)
    k_X1K = _by_value_head(k_BHK.to(dtype), HV)
    S_XKV.baddbmm_(k_X1K.mT, v_BHvV.to(dtype).reshape(B * HV, 1, V))
    o_X1V = torch.bmm(_by_value_head(q_BHK.to(dtype), HV), S_XKV)
    return o_X1V.mul_(scale).view(B, HV, V).to(v_BHvV.dtype)


def rotary_step(x_BTHD: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor, interleaved: bool) -> Tensor:
    """Rotate all D dims of every head, by tables of `rotary_step_tables`.

    >>> cos, sin = rotary_step_tables(torch.tensor([[0.0]]), torch.tensor([[1.0]]), False)  # a quarter turn
    >>> rotary_step(torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), cos, sin, False).flatten()
    tensor([0., 1.])
    """
    x = x_BTHD.to(cos_BT1D.dtype)
    if interleaved:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = x.roll(x.shape[-1] // 2, -1)
    return (x * cos_BT1D).addcmul_(partner, sin_BT1D).to(x_BTHD.dtype)


def rotary_step_tables(cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Tables [(B,) T, 1, 2R] for `rotary_step`: the cosine of each dim, and the sine that multiplies its partner.

    Args:
        cos_BTR: cosines of the angles of R pairs, [T, R] or [B, T, R].
        sin_BTR: their sines.
        interleaved: pairs are (2i, 2i+1); otherwise (i, i+R).
    """
    if interleaved:
        cos, sin = cos_BTR.repeat_interleave(2, -1), torch.stack([-sin_BTR, sin_BTR], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos_BTR, cos_BTR], -1), torch.cat([-sin_BTR, sin_BTR], -1)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def swiglu_step(gate: Tensor, up: Tensor, limit: float | None = None, soft_caps: SoftCaps | None = None) -> Tensor:
    """SwiGLU, silu(gate) * up, or SiTU; arguments as in `swiglu`.

    >>> swiglu_step(torch.tensor([0.0, 100.0]), torch.tensor([1.0, 3.0]))
    tensor([  0., 300.])
    """
    if soft_caps is not None:
        factor, capped, _, _ = soft_parts(gate, up, soft_caps)
        return factor.mul_(capped).to(gate.dtype)
    gate, up = bounded(gate, up, limit)
    return F.silu(gate).mul_(up)


def moe_experts_step(x_1D: Tensor, gate_up_E2ID: Tensor, down_EDI: Tensor, expert_ids_A: list[int],
                     weights_A: Tensor, limit: float | None = None, soft_caps: SoftCaps | None = None) -> Tensor:
    """The routed experts of one token, one after the other: nothing is sorted, padded or copied.

    Args:
        x_1D: the token.
        gate_up_E2ID: weights of gate and up, the gate rows first.
        down_EDI: weights of the way down.
        expert_ids_A: its experts, on the host.
        weights_A: their weights.
        limit: clamps inside SwiGLU.
        soft_caps: caps of SiTU in its place.

    Returns:
        y [1, D] in x's dtype.

    >>> x, down = torch.tensor([[1.0]]), torch.ones(2, 1, 1)
    >>> gate_up = torch.tensor([[[100.0], [1.0]], [[100.0], [2.0]]])
    >>> moe_experts_step(x, gate_up, down, [0, 1], torch.tensor([0.5, 0.25]))
    tensor([[100.]])
    """
    h_A2I = torch.cat([F.linear(x_1D, gate_up_E2ID[expert]) for expert in expert_ids_A])
    gate_AI, up_AI = h_A2I.chunk(2, -1)
    act_AI = swiglu_step(gate_AI, up_AI, limit, soft_caps).mul_(weights_A.to(h_A2I.dtype).unsqueeze(-1))
    y_1D = F.linear(act_AI[:1], down_EDI[expert_ids_A[0]])
    for place in range(1, len(expert_ids_A)):
        y_1D.addmm_(act_AI[place : place + 1], down_EDI[expert_ids_A[place]].t())
    return y_1D


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float32 or x.dtype is torch.float64 else x.float()


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.shape[-1]).add_(eps).rsqrt_()


def _l2_normed(x: Tensor) -> Tensor:
    return x * (x * x).sum(-1, keepdim=True).add_(L2NORM_EPSILON).rsqrt_()


def _by_value_head(x_BHK: Tensor, value_heads: int) -> Tensor:
    """The query or key of each value head, [B * HV, 1, K]."""
    B, H, K = x_BHK.shape
    if value_heads != H:
        x_BHK = x_BHK.repeat_interleave(value_heads // H, 1)
    return x_BHK.reshape(B * value_heads, 1, K)


def _decay(S_XKV: Tensor, log_decay: Tensor | None, dtype: torch.dtype) -> None:
    """Multiply states by e^g, in place."""
    if log_decay is not None:
        S_XKV.mul_(log_decay.to(dtype).exp().reshape(S_XKV.shape[0], -1, 1))
