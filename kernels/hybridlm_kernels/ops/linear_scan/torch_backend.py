"""Linear scan in torch operations: chunks of all rows side by side, then a carry from chunk to chunk.

Inside a chunk, h_t is the state from zero and p_t the product of the factors up to t. With the state s before the
chunk the states are h_t + p_t s. (Martin and Cundy 2018, section 2.)

Legend: B rows, T tokens, C channels, P chunks per row, N documents.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.ops.linear_scan import reference
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.document_ends import find_document_ends

CHUNK_TOKENS = 32  # tokens per chunk; a fixed number, so that results do not depend on how long a row is
RECURRENT_MAX_TOKENS = 8  # up to so many tokens the recurrence itself is faster than chunks


def linear_scan(x_BTC: Tensor, a_BTC: Tensor, state_NC: Tensor | None, borders: CuSeqlens | None,
                dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked, computed in `dtype`."""
    B, T, C = x_BTC.shape
    if borders is None and T <= RECURRENT_MAX_TOKENS:
        return reference.linear_scan(x_BTC, a_BTC, state_NC, None, dtype)
    ends = find_document_ends(B, T, borders, x_BTC.device)
    x_XC, a_XC = x_BTC.to(dtype).reshape(-1, C), a_BTC.to(dtype).reshape(-1, C)
    if state_NC is not None:
        start_MC = ends.at_documents(state_NC.to(dtype))
        x_XC = x_XC.index_add(0, ends.first_M, a_XC.index_select(0, ends.first_M) * start_MC)
    a_XC = a_XC.index_fill(0, ends.first_M, 0.0)  # nothing of an earlier document
    h_BTC = _TorchLinearScan.apply(x_XC.view(B, T, C), a_XC.view(B, T, C))
    return h_BTC, ends.final_states(h_BTC.flatten(0, 1), state_NC)


class _TorchLinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
        h = scan_rows(x, a)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    @plain_backward
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor | None]:
        a, h = ctx.saved_tensors
        dx = scan_rows(dh, F.pad(a[:, 1:].conj(), (0, 0, 0, 1)), reverse=True)
        da = dx * F.pad(h[:, :-1], (0, 0, 1, 0)).conj() if ctx.needs_input_grad[1] else None
        return dx, da


def scan_rows(x_BTC: Tensor, a_BTC: Tensor, reverse: bool = False) -> Tensor:
    """The states [B, T, C] of h_t = a_t h_{t-1} + x_t over each row, or h_t = a_t h_{t+1} + x_t from its end.

    >>> scan_rows(torch.ones(1, 3, 1), torch.full((1, 3, 1), 0.5), reverse=True).flatten()
    tensor([1.7500, 1.5000, 1.0000])
    """
    T = x_BTC.shape[1]
    missing = -T % CHUNK_TOKENS
    a_BPTC = F.pad(a_BTC, (0, 0, 0, missing)).unflatten(1, (-1, CHUNK_TOKENS))
    h_BPTC = F.pad(x_BTC, (0, 0, 0, missing)).unflatten(1, (-1, CHUNK_TOKENS))
    if not missing:  # nothing was padded, so this may still be the memory of the input
        h_BPTC = h_BPTC.clone(memory_format=torch.contiguous_format)
    chunks = a_BPTC.shape[1]
    steps = range(CHUNK_TOKENS)[::-1] if reverse else range(CHUNK_TOKENS)
    products_BPTC = a_BPTC.clone() if chunks > 1 else a_BPTC
    for before, t in pairwise(steps):
        h_BPTC[:, :, t].addcmul_(a_BPTC[:, :, t], h_BPTC[:, :, before])
        if chunks > 1:
            products_BPTC[:, :, t].mul_(products_BPTC[:, :, before])
    order = range(chunks)[::-1] if reverse else range(chunks)
    for before, p in pairwise(order):
        h_BPTC[:, p].addcmul_(products_BPTC[:, p], h_BPTC[:, before, steps[-1]].unsqueeze(1))
    return h_BPTC.flatten(1, 2)[:, :T]
