"""Decode steps: what a mixer or feed-forward prepares so that one token per row goes through it without overhead.

A module's `forward` serves any number of tokens, packed or not, with gradients: it checks shapes, chooses backends and
passes through autograd functions, which takes longer than the arithmetic when there is one token. A kind that has
`prepare_step` returns a function for that one case. The function computes what `forward` would, reads parameters where
they are when it is called, and calls every linear layer that is more than a matrix (an adapter, a quantised layer, one
with hooks) instead of reading its weight.

B rows, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.norm import GatedRMSNorm, RMSNorm
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.decoding import gated_rms_norm_step, rms_norm_step

# (input of the branch [B, 1, D], positions, decode state of the branch) -> output of the branch [B, 1, D]
DecodeStep = Callable[[Tensor, SequenceInfo, Any], Tensor]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class does: it is no subclass, and nothing is hooked into it."""
    return type(module) is kind and "forward" not in vars(module) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when the module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def linear_step(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The product with a linear layer's weight; the module itself where it is more than that.

    >>> layer = nn.Linear(2, 1)
    >>> x = torch.ones(1, 2)
    >>> bool(linear_step(layer)(x) == layer(x))
    True
    """
    if not is_plain(module, nn.Linear):
        return module
    parameters = module._parameters
    if parameters["bias"] is None:
        return lambda x: F.linear(x, parameters["weight"])  # type: ignore[arg-type]
    return lambda x: F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]


class NormStep:
    """A norm as a plain function of its input, with the attributes by which a residual may read it."""

    def __init__(self, norm: RMSNorm):
        self._parameters = norm._parameters
        self.eps = norm.eps
        self.zero_centered = norm.zero_centered

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"]  # type: ignore[return-value]

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm_step(x, self._parameters["weight"], self.eps, self.zero_centered)  # type: ignore[arg-type]


def norm_step(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """An RMS norm without its checks; the module itself where it is more than that."""
    return NormStep(norm) if is_plain(norm, RMSNorm) else norm  # type: ignore[arg-type]


def gated_norm_step(norm: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A gated RMS norm without its checks; the module itself where it is more than that."""
    if not is_plain(norm, GatedRMSNorm):
        return norm
    assert isinstance(norm, GatedRMSNorm)
    parameters, eps, activation = norm._parameters, norm.eps, norm.activation
    return lambda x, gate: gated_rms_norm_step(x, gate, parameters["weight"], eps, activation)  # type: ignore[arg-type]


def row_mask(seq: SequenceInfo, keys: int) -> Tensor | None:
    """The last `keys` tokens of the decode state that each row may see, bool [B, 1, 1, keys].

    None where rows are of one length, so that all may be seen.
    """
    if seq.padding_B is None:
        return None
    name = f"row_mask {keys}"
    if name not in seq.tables:
        first = seq.last_position + 1 - keys
        seen_S = torch.arange(first, first + keys, device=seq.padding_B.device)
        seq.tables[name] = (seen_S >= seq.padding_B[:, None])[:, None, None]
    return seq.tables[name]


def attend_one(q_BHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seq: SequenceInfo, scale: float | None = None) -> Tensor:
    """Softmax attention of one query per row and head to all keys of the decode state.

    The query heads of a group are as many queries of one head: no key or value is repeated, and none is padded.

    Args:
        q_BHK: queries, H heads.
        k_BSGK: keys, G heads.
        v_BSGV: values.
        seq: says which keys are the padding of shorter rows.
        scale: factor on the scores; None: K^-0.5.

    Returns:
        o [B, H, V].
    """
    B, H, K = q_BHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BGRK, k_BGSK, v_BGSV = q_BHK.reshape(B, G, H // G, K), k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2)
    mask_B11S = row_mask(seq, S)
    if v_BSGV.shape[-1] == K:
        o_BGRV = F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSV, attn_mask=mask_B11S, scale=scale)
    else:  # the fused kernel wants one width: it would copy all values
        score_BGRS = (q_BGRK @ k_BGSK.mT).mul_(K**-0.5 if scale is None else scale)
        if mask_B11S is not None:
            score_BGRS.masked_fill_(~mask_B11S, -torch.inf)
        weight_BGRS = torch.softmax(score_BGRS, -1, dtype=torch.promote_types(q_BHK.dtype, torch.float32))
        o_BGRV = weight_BGRS.to(v_BSGV.dtype) @ v_BGSV
    return o_BGRV.reshape(B, H, -1)
