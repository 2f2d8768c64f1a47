"""The indexer's loss on Triton kernels, in blocks of queries; memory grows with S, never with T times S.

As in the torch backend the gradient is computed in the forward, when it is wanted, and scaled in the backward.

B rows, T queries (the last T positions), S keys, J index heads, I index dim, H query heads, G key heads, K key dim,
N listed keys per query, Q queries of a block, X keys that a block may see.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybridlm_kernels.ops.indexer_kl import triton_listed, triton_visible
from hybridlm_kernels.ops.sparse_attention.triton_index import Strips, index_tensors, select, strip, write_index_scores
from hybridlm_kernels.ops.sparse_attention.triton_inverse import queries_per_block
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.triton_support import CompileCase

IndexTensors = tuple[Tensor, Tensor, Tensor]  # q, k, w
# loss and entropy of each query, gradients of q, k and w, and the recall or nothing
KLResults = tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@triton.jit(do_not_specialize=["Q", "start", "low"])
def _kl_rows(score_ptr, p_ptr, first_ptr, loss_ptr, entropy_ptr, T, S, Q, start, low, stride, N, LISTED: tl.constexpr,
          LEARNS: tl.constexpr, BLOCK: tl.constexpr):
    """Loss and entropy of one query; with LEARNS the gradient softmax(score) - p takes the place of the scores.

    LISTED: N entries, of which those with a score of -inf hold no key; else the keys from the first visible one on.
    """
    row, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    line = (b * Q + row) * stride
    first, stop = 0, N
    if not LISTED:
        first = tl.load(first_ptr + b * T + start + row) - low
        stop = S - T + start + row + 1 - low
    lanes = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(first, stop, BLOCK):
        at = begin + lanes
        score = tl.load(score_ptr + line + at, mask=at < stop, other=float("-inf"))
        above = tl.maximum(most, score)
        pivot = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(most - pivot) + tl.exp(score - pivot)
        most = above
    greatest = tl.max(most, 0)
    greatest = tl.where(greatest == float("-inf"), 0.0, greatest)
    total = tl.sum(total * tl.exp(most - greatest), 0)
    log_total = greatest + tl.log(tl.where(total > 0, total, 1.0))
    loss = tl.zeros([BLOCK], tl.float32)
    entropy = tl.zeros([BLOCK], tl.float32)
    for begin in range(first, stop, BLOCK):
        at = begin + lanes
        score = tl.load(score_ptr + line + at, mask=at < stop, other=float("-inf"))
        p = tl.load(p_ptr + line + at, mask=at < stop, other=0.0)
        log_q = tl.where(score > float("-inf"), score - log_total, 0.0)
        q = tl.where(score > float("-inf"), tl.exp(log_q), 0.0)
        loss += tl.where(p > 0, p * (tl.log(tl.where(p > 0, p, 1.0)) - log_q), 0.0)
        entropy -= q * log_q
        if LEARNS:
            tl.store(score_ptr + line + at, q - p, mask=at < stop)
    tl.store(loss_ptr + b * T + start + row, tl.sum(loss, 0))
    tl.store(entropy_ptr + b * T + start + row, tl.sum(entropy, 0))


def indexer_kl(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, main_q_BTHK: Tensor, main_k_BSGK: Tensor,
               indices_BTN: Tensor | None, recall_of_BTN: Tensor | None, scale: float,
               cu_seqlens: CuSeqlens | None) -> tuple[Tensor, ...]:
    """The Triton backend; arguments as in the public function, already checked."""
    dtype = torch.promote_types(main_q_BTHK.dtype, main_k_BSGK.dtype)
    main = main_q_BTHK.to(dtype).contiguous(), main_k_BSGK.to(dtype).contiguous()
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BTJI, k_BSI, w_BTJ))
    return _TritonIndexerKL.apply(q_BTJI, k_BSI, w_BTJ, main, indices_BTN, recall_of_BTN, scale, cu_seqlens, learns)


class _TritonIndexerKL(torch.autograd.Function):
    """Loss and entropy; gradients are computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx, q_BTJI, k_BSI, w_BTJ, main, indices_BTN, recall_of_BTN, scale, cu_seqlens, learns):
        index = index_tensors(q_BTJI, k_BSI, w_BTJ)
        if indices_BTN is None:
            loss_BT, entropy_BT, grads, recall = _visible(index, main, recall_of_BTN, scale, cu_seqlens, learns)
            count = loss_BT.new_tensor(loss_BT.numel())
        else:
            indices_BTN = indices_BTN.int().contiguous()
            loss_BT, entropy_BT, grads, recall = _listed(index, main, indices_BTN, scale, learns)
            count = (indices_BTN >= 0).any(-1).sum().clamp(min=1)
        loss, entropy = loss_BT.sum() / count, entropy_BT.sum() / count
        if learns:
            inputs = (q_BTJI, k_BSI, w_BTJ)
            ctx.save_for_backward(*((g / count).to(x.dtype) for g, x in zip(grads, inputs, strict=True)))
        ctx.mark_non_differentiable(entropy, *recall)
        return loss, entropy, *recall

    @staticmethod
    @plain_backward
    def backward(ctx, dloss, *_):
        return (*(dloss.to(g.dtype) * g for g in ctx.saved_tensors), *[None] * 6)


def _empty_sums(index: IndexTensors) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and entropy of each query, dq and dw, all fp32 and still to be written."""
    shape = index[0].shape
    loss, entropy, dq, dw = (torch.empty(s, dtype=torch.float32, device=index[0].device)
                             for s in (shape[:2], shape[:2], shape, shape[:3]))
    return loss, entropy, dq, dw


def _visible(index: IndexTensors, main: tuple[Tensor, Tensor], recall_of_BTN: Tensor | None, scale: float,
             cu_seqlens: CuSeqlens | None, learns: bool) -> KLResults:
    (batch, queries), keys, heads = index[0].shape[:2], index[1].shape[1], main[0].shape[2]
    strips = Strips(batch, queries, keys, cu_seqlens, index[0].device)
    loss_BT, entropy_BT, dq, dw = _empty_sums(index)
    dk_PBSI = torch.zeros(triton_visible.KEY_GRADIENT_PROGRAMS, *index[1].shape, dtype=torch.float32, device=dq.device)
    score_buffer, p_buffer = strips.buffer(), strips.buffer()
    recall = None if recall_of_BTN is None else _TritonRecallSums(recall_of_BTN, strips)
    for start, size, low, width in strips.blocks():
        score_BQX, p_BQX = (strip(x, batch, size, width) for x in (score_buffer, p_buffer))
        lse_BQH = torch.empty(batch, size, heads, dtype=torch.float32, device=dq.device)
        triton_visible.attention_strip(*main, scale, strips, start, low, lse_BQH, p_BQX)
        write_index_scores(*index, strips, start, low, score_BQX)
        _kl_rows[(size, batch)](
            score_ptr=score_BQX, p_ptr=p_BQX, first_ptr=strips.first_BT, loss_ptr=loss_BT, entropy_ptr=entropy_BT,
            T=queries, S=keys, Q=size, start=start, low=low, stride=score_BQX.stride(1), N=0, LISTED=False,
            LEARNS=learns, BLOCK=_block(width))
        if recall is not None:
            recall.add(p_BQX, start, low)
        if learns:
            triton_visible.add_gradients(*index, strips, start, low, score_BQX, dq, dw, dk_PBSI)
    return loss_BT, entropy_BT, (dq, dk_PBSI.sum(0), dw), () if recall is None else recall.means()


def _listed(index: IndexTensors, main: tuple[Tensor, Tensor], indices_BTN: Tensor, scale: float,
            learns: bool) -> KLResults:
    (q, k, _), heads, device = index, main[0].shape[2], index[0].device
    batch, queries, listed = indices_BTN.shape
    loss_BT, entropy_BT, dq, dw = _empty_sums(index)
    dk_BSI = torch.zeros(k.shape, dtype=torch.float32, device=device)
    pair_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    most = queries_per_block(queries, k.shape[1], listed * (8 + k.shape[2] * pair_dtype.itemsize) + 4 * heads)
    lse, score, p = (torch.empty(most, n, dtype=torch.float32, device=device) for n in (heads, listed, listed))
    pair_MI = torch.empty(most * listed if learns else 0, k.shape[2], dtype=pair_dtype, device=device)
    for row in range(batch):
        for begin in range(0, queries, most):
            size, start = min(most, queries - begin), row * queries + begin
            triton_listed.distributions(index, main, scale, indices_BTN, start, lse, score[:size], p[:size])
            _kl_rows[(size, 1)](
                score_ptr=score, p_ptr=p, first_ptr=indices_BTN, loss_ptr=loss_BT, entropy_ptr=entropy_BT, T=queries,
                S=k.shape[1], Q=size, start=start, low=0, stride=listed, N=listed, LISTED=True, LEARNS=learns,
                BLOCK=_block(listed))
            if learns:
                triton_listed.add_gradients(index, indices_BTN, start, score[:size], dq, dw, pair_MI, dk_BSI[row])
    return loss_BT, entropy_BT, (dq, dk_BSI, dw), ()


def _block(width: int) -> int:
    """Columns that a program of `_kl_rows` reads at a time."""
    return min(1024, max(64, triton.next_power_of_2(width)))


class _TritonRecallSums:
    """Adds up the attention on listed keys over blocks of queries."""

    def __init__(self, indices_BTN: Tensor, strips: Strips):
        self.indices_BTN, self.strips = indices_BTN, strips
        self.best_BTN = torch.full_like(indices_BTN, -1, dtype=torch.int32)
        self.totals = torch.zeros(4, dtype=torch.float32, device=indices_BTN.device)

    def add(self, p_BQX: Tensor, start: int, low: int) -> None:
        batch, size, width = p_BQX.shape
        strips, listed_BQN = self.strips, self.indices_BTN[:, start : start + size].long()
        last_Q = torch.arange(size, device=p_BQX.device) + (strips.keys - strips.queries + start)
        first_BQ = strips.first_BT[:, start : start + size]
        seen_BQN = (listed_BQN >= first_BQ[..., None]) & (listed_BQN <= last_Q[:, None])
        n_BQ = seen_BQN.sum(-1)
        chose_BQ = last_Q + 1 - first_BQ > n_BQ
        # attention is not negative, hence its bits are in its order
        select(p_BQX, strips, start, low, self.best_BTN, n_BQ.int())
        best_BQN = self.best_BTN[:, start : start + size].long()
        marked = torch.zeros(batch, size, width + 1, dtype=torch.bool, device=p_BQX.device)
        marked.scatter_(-1, (listed_BQN - low).masked_fill(~seen_BQN, width), True)
        place_BQN = (best_BQN - low).clamp(min=0)
        hits_BQ = (marked.gather(-1, place_BQN) & (best_BQN >= 0)).sum(-1)
        mass_BQ = p_BQX.gather(-1, (listed_BQN - low).masked_fill(~seen_BQN, 0)).where(seen_BQN, 0.0).sum(-1)
        attainable_BQ = p_BQX.gather(-1, place_BQN).where(best_BQN >= 0, 0.0).sum(-1)
        agreement_BQ = hits_BQ / n_BQ.clamp(min=1)
        summands = (mass_BQ, agreement_BQ, attainable_BQ, torch.ones_like(mass_BQ))
        self.totals += torch.stack([x.where(chose_BQ, 0.0).sum() for x in summands])

    def means(self) -> tuple[Tensor, ...]:
        means = self.totals[:3] / self.totals[3].clamp(min=1)
        return tuple(torch.where(self.totals[3] > 0, means, 1.0).unbind())


COMPILE_CASES = [
    CompileCase(f"rows of {label}", _kl_rows,
             dict.fromkeys(("T", "S", "Q", "start", "low", "stride", "N"), "i32") | {"first_ptr": "*i32"}
             | {f"{x}_ptr": "*fp32" for x in ("score", "p", "loss", "entropy")},
             {"LISTED": listed, "LEARNS": True, "BLOCK": 1024}, ("stride",))
    for label, listed in (("visible keys", False), ("listed keys", True))]
