"""Token-level sparse attention in blocks of queries; memory grows with S, never with T times S.

B rows, T queries (the last T positions), S keys, J index heads, I index dim, H query heads, G key/value heads,
R = H/G, K key dim, V value dim, N selected keys per query, Q queries of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward

# Elements per block of queries: near the cache on a CPU, and enough work for several threads.
CPU_INDEX_ELEMENTS = 2**20  # scores of the indexer
CPU_MASKED_ELEMENTS = 2**20  # scores of attention to keys in place
CPU_GATHERED_ELEMENTS = 2**19  # gathered keys and their scores
GPU_BLOCK_ELEMENTS = 2**27
# Measured on a CPU, in units of one query head's work on one key in place:
GATHER_COST = 16  # to gather one key of one head
COPY_COST = 16  # to lay out one key of one head for the products in place


def query_blocks(queries: int, elements_per_query: int, device: torch.device,
                 cpu_elements: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of blocks whose scores stay within the budget. The sizes follow from shapes alone."""
    budget = cpu_elements if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    size = max(8, budget // max(1, elements_per_query) // 8 * 8)
    for start in range(0, queries, size):
        yield start, min(start + size, queries)


def indexer_topk(q_BTJI: Tensor, k_BSI: Tensor, w_BTJ: Tensor, topk: int, cu_seqlens: CuSeqlens | None = None,
                 num_first: int = 0, num_local: int = 0) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    batch, queries, heads, _ = q_BTJI.shape
    keys, device = k_BSI.shape[1], q_BTJI.device
    wide = torch.promote_types(q_BTJI.dtype, torch.float32)
    position_T = torch.arange(keys - queries, keys, device=device)
    first_BT = position_T.new_zeros(1, queries)  # first key a query may see
    least = most = [0] * queries  # the same on the host: the least and the most over rows
    if cu_seqlens is not None:
        first_BT = cu_seqlens.first_keys(batch, queries)
        least, most = (x[-queries:] for x in _first_keys(cu_seqlens, keys))
    out_BTN = torch.empty(batch, queries, topk, dtype=torch.int32, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        k_BIS = k_BSI.to(wide).transpose(1, 2)
        for start, stop in query_blocks(queries, batch * heads * keys, device, CPU_INDEX_ELEMENTS):
            low, high = least[start], keys - queries + stop
            first_BQ1 = first_BT[:, start:stop, None]
            if high - low <= topk:  # every visible key is selected
                s_BQN = first_BQ1 + torch.arange(topk, device=device)
                out_BTN[:, start:stop] = s_BQN.masked_fill(s_BQN > position_T[start:stop, None], -1)
                continue
            dots = q_BTJI[:, start:stop].to(wide).flatten(1, 2) @ k_BIS[..., low:high]
            score_BQX = torch.bmm(
                w_BTJ[:, start:stop].to(wide).reshape(-1, 1, heads),
                dots.relu_().view(batch * (stop - start), heads, high - low)).view(batch, stop - start, -1)
            s_X = torch.arange(low, high, device=device)
            seen_BQX = (s_X <= position_T[start:stop, None]) & (s_X >= first_BQ1)
            if num_first or num_local:
                always = (s_X < first_BQ1 + num_first) | (s_X > position_T[start:stop, None] - num_local)
                score_BQX = score_BQX.masked_fill_(always & seen_BQX, torch.inf)
            enough = all(keys - queries + t - most[t] + 1 >= topk for t in range(start, stop))
            chosen_BQN = select_best(score_BQX, seen_BQX, topk, enough)
            out_BTN[:, start:stop] = torch.where(chosen_BQN < 0, -1, chosen_BQN + low)
    return out_BTN


def _first_keys(cu_seqlens: CuSeqlens, length: int) -> tuple[list[int], list[int]]:
    """The first key of the document at each position of a row: the least and the most over the rows."""
    if "first_keys" not in cu_seqlens.cache:
        least, most = [length] * length, [0] * length
        for start, stop in zip(cu_seqlens.host, cu_seqlens.host[1:], strict=False):
            begin = start % length
            for t in range(begin, begin + stop - start):
                least[t], most[t] = min(least[t], begin), max(most[t], begin)
        cu_seqlens.cache["first_keys"] = least, most
    return cu_seqlens.cache["first_keys"]


def select_best(score_BQX: Tensor, seen_BQX: Tensor, topk: int, enough: bool) -> Tensor:
    """The best keys among those seen, ascending, then -1 where fewer are seen, [B, Q, topk].

    Score and position make one integer, so that no two are equal: the bits of the score in an order-preserving
    form, then the position, the lower the better. `enough`: every query sees at least topk keys.
    """
    batch, size, count = score_BQX.shape
    s_X = torch.arange(count, device=score_BQX.device)
    bits = (score_BQX.float() + torch.where(seen_BQX, 0.0, -torch.inf)).view(torch.int32)  # -0 + 0 = 0
    bits = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    rank_BQX = bits.long().bitwise_left_shift_(32).add_(count - 1 - s_X)
    chosen_BQN = rank_BQX.topk(min(topk, count), dim=-1, sorted=False).indices
    if enough:
        marked = torch.zeros_like(rank_BQX, dtype=torch.bool).scatter_(-1, chosen_BQN, True).view(batch * size, count)
        return torch.nonzero_static(marked, size=batch * size * topk)[:, 1].view(batch, size, topk)
    chosen_BQN = chosen_BQN.masked_fill(~seen_BQX.expand_as(rank_BQX).gather(-1, chosen_BQN), count).sort(-1).values
    chosen_BQN = chosen_BQN.masked_fill(chosen_BQN == count, -1)
    return F.pad(chosen_BQN, (0, topk - chosen_BQN.shape[-1]), value=-1)


def sparse_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor,
                     scale: float | None = None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if indices_BTN.shape[2] == 0:
        indices_BTN = indices_BTN.new_full((*indices_BTN.shape[:2], 1), -1)
    with torch.autocast(q_BTHK.device.type, enabled=False):
        return _TorchSparseAttention.apply(q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale)


class _TorchSparseAttention(torch.autograd.Function):
    """Attention to listed keys that keeps its inputs; the backward computes the probabilities again, block by block.

    A block either multiplies with all keys in place and masks (few query heads per key head, or few keys), or gathers
    the selected ones: gathered keys serve the R query heads of their key head once and are not read again.
    """

    @staticmethod
    def forward(ctx, q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale):
        ctx.save_for_backward(q_BTHK, k_BSGK, v_BSGV, indices_BTN)
        ctx.scale = scale
        return _choose_gathered_or_masked(q_BTHK, k_BSGK, indices_BTN)[0](q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale)

    @staticmethod
    @plain_backward
    def backward(ctx, do_BTHV):
        saved = ctx.saved_tensors
        grads = _choose_gathered_or_masked(saved[0], saved[1], saved[3])[1](do_BTHV, *saved, ctx.scale)
        return (*(g.to(x.dtype) for g, x in zip(grads, saved[:3], strict=True)), None, None)


def _choose_gathered_or_masked(q_BTHK: Tensor, k_BSGK: Tensor, indices_BTN: Tensor) -> tuple[Callable, Callable]:
    """The forward and the backward that cost less, by GATHER_COST and COPY_COST."""
    queries, heads = q_BTHK.shape[1:3]
    keys, groups = k_BSGK.shape[1:3]
    gathered = (GATHER_COST * groups + heads) * queries * indices_BTN.shape[2]
    masked = heads * queries * (keys - queries // 2) + COPY_COST * groups * keys
    return (gathered_forward, gathered_backward) if gathered < masked else (masked_forward, masked_backward)


class _MaskedBlocks:
    """Blocks of queries against all keys up to the last they may need, the unselected ones masked out."""

    def __init__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor, scale: float):
        self.batch, self.queries, self.heads = q_BTHK.shape[:3]
        self.keys, self.groups = k_BSGK.shape[1:3]
        self.wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        self.q_BTHK, self.indices_BTN, self.scale = q_BTHK, indices_BTN, scale
        self.k_XSK, self.v_XSV = self.by_group(k_BSGK), self.by_group(v_BSGV)

    def by_group(self, x_BSGD: Tensor) -> Tensor:
        """Keys or values by row and key head, [B*G, S, D], contiguous."""
        return x_BSGD.to(self.wide).transpose(1, 2).flatten(0, 1).contiguous()

    def by_rows(self, x_BQHD: Tensor) -> Tensor:
        """The query heads of a key head one below the other, [B*G, R*Q, D]."""
        return x_BQHD.to(self.wide).transpose(1, 2).reshape(
            self.batch * self.groups, -1, x_BQHD.shape[-1])

    def from_rows(self, x: Tensor, size: int) -> Tensor:
        """The reverse of `by_rows`, [B, Q, H, D]."""
        return x.view(self.batch, self.heads, size, -1).transpose(1, 2)

    def blocks(self) -> Iterator[tuple[slice, int, Tensor, Tensor, Tensor]]:
        """Yields (queries, keys in reach, scaled q, probabilities, whether a query has any key)."""
        elements = self.batch * self.heads * self.keys
        for start, stop in query_blocks(self.queries, elements, self.q_BTHK.device, CPU_MASKED_ELEMENTS):
            rows, size = slice(start, stop), stop - start
            index_BQN = self.indices_BTN[:, rows].long()
            reach = self.keys - self.queries + stop
            if index_BQN.device.type != "cpu":
                reach = self.keys
            elif index_BQN.numel():  # an index beyond the query's own position is unusual, yet not forbidden
                reach = max(reach, int(index_BQN.max()) + 1)
            mask_BQX = self.k_XSK.new_full((self.batch, size, reach + 1), -torch.inf)
            mask_BQX.scatter_(-1, index_BQN.masked_fill(index_BQN < 0, reach), 0.0)
            has_BQ11 = (index_BQN >= 0).any(-1)[:, :, None, None]
            mask_BQX = mask_BQX[..., :reach].masked_fill(~has_BQ11[..., 0], 0.0)
            q_XRK = self.by_rows(self.q_BTHK[:, rows] * self.scale)
            score = torch.bmm(q_XRK, self.k_XSK[:, :reach].transpose(1, 2))
            score.view(self.batch, self.heads, size, reach).add_(mask_BQX[:, None])
            yield rows, reach, q_XRK, torch.softmax(score, -1), has_BQ11


def masked_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor, scale: float) -> Tensor:
    """Attention with all keys in place, the unselected ones masked out."""
    masked = _MaskedBlocks(q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale)
    o_BTHV = v_BSGV.new_empty(*q_BTHK.shape[:3], v_BSGV.shape[-1])
    for rows, reach, _, p, has_BQ11 in masked.blocks():
        o = masked.from_rows(torch.bmm(p, masked.v_XSV[:, :reach]), rows.stop - rows.start)
        torch.mul(o, has_BQ11, out=o_BTHV[:, rows]) if o.dtype == o_BTHV.dtype else o_BTHV[:, rows].copy_(
            o * has_BQ11)
    return o_BTHV


def masked_backward(do_BTHV: Tensor, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by `masked_forward`."""
    masked = _MaskedBlocks(q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale)
    dq_BTHK = torch.empty(q_BTHK.shape, dtype=masked.wide, device=q_BTHK.device)
    # [B*G, D, S]: the products that add up to them run twice as fast this way round
    dk_XKS, dv_XVS = (x.new_zeros(x.shape[0], x.shape[2], x.shape[1]) for x in (masked.k_XSK, masked.v_XSV))
    for rows, reach, q_XRK, p, has_BQ11 in masked.blocks():
        do_XRV = masked.by_rows(do_BTHV[:, rows] * has_BQ11)
        dp = torch.bmm(do_XRV, masked.v_XSV[:, :reach].transpose(1, 2))
        dv_XVS[..., :reach].baddbmm_(do_XRV.transpose(1, 2), p)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        dk_XKS[..., :reach].baddbmm_(q_XRK.transpose(1, 2), ds)
        dq_XRK = torch.bmm(ds, masked.k_XSK[:, :reach])
        dq_BTHK[:, rows] = masked.from_rows(dq_XRK, rows.stop - rows.start) * scale
    dk, dv = (x.unflatten(0, (masked.batch, masked.groups)).permute(0, 3, 1, 2) for x in (dk_XKS, dv_XVS))
    return dq_BTHK, dk, dv


class _GatheredBlocks:
    """Blocks of queries against a copy of the keys they selected."""

    def __init__(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor, scale: float):
        self.wide = torch.promote_types(q_BTHK.dtype, torch.float32)
        self.batch, self.keys, self.groups = k_BSGK.shape[:3]
        self.q_BTHK, self.scale, self.v_dim = q_BTHK, scale, v_BSGV.shape[3]
        # rows of the flattened keys; an absent one reads key 0 and is masked
        offset_B11 = torch.arange(self.batch, device=q_BTHK.device)[:, None, None] * self.keys
        self.absent_BTN = indices_BTN < 0
        self.row_BTN = (indices_BTN.long() + offset_B11).masked_fill(self.absent_BTN, 0)
        self.k_MX, self.v_MX = (x.flatten(0, 1).flatten(1) for x in (k_BSGK, v_BSGV))
        # absorbed MLA: the values are the first dims of the keys, and one copy serves both
        self.one_copy = k_BSGK.data_ptr() == v_BSGV.data_ptr() and k_BSGK.stride() == v_BSGV.stride()

    def gather(self, x_MX: Tensor, row_BQN: Tensor) -> Tensor:
        """The selected keys or values, [B*Q, G, N, D]."""
        gathered_MD = x_MX.index_select(0, row_BQN.flatten()).to(self.wide)
        return gathered_MD.view(-1, row_BQN.shape[2], self.groups, x_MX.shape[1] // self.groups).transpose(1, 2)

    def by_key_head(self, x_BQHD: Tensor) -> Tensor:
        """Queries or output gradients by key head, [B*Q, G, R, D]."""
        return x_BQHD.to(self.wide).flatten(0, 1).unflatten(1, (self.groups, -1))

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Yields (queries, scaled q, selected k, selected v, probabilities, whether a query has any key)."""
        selected, heads = self.row_BTN.shape[2], self.q_BTHK.shape[2]
        elements = self.batch * selected * (max(self.k_MX.shape[1], self.v_MX.shape[1]) + heads)
        for start, stop in query_blocks(self.q_BTHK.shape[1], elements, self.q_BTHK.device, CPU_GATHERED_ELEMENTS):
            rows = slice(start, stop)
            absent = self.absent_BTN[:, rows].flatten(0, 1)[:, None, None, :]
            has = ~absent.all(-1, keepdim=True)
            q, k = self.by_key_head(self.q_BTHK[:, rows] * self.scale), self.gather(self.k_MX, self.row_BTN[:, rows])
            v = k[..., : self.v_dim] if self.one_copy else self.gather(self.v_MX, self.row_BTN[:, rows])
            score = torch.matmul(q, k.transpose(2, 3)).masked_fill_(absent & has, -torch.inf)
            yield rows, q, k, v, torch.softmax(score, -1) * has, has

    def add_up(self, grad: Tensor, rows: slice, total_MX: Tensor) -> None:
        """Adds the gradient of each selected row to total[row], in an order that never changes."""
        grad = grad.transpose(1, 2).reshape(-1, total_MX.shape[1])  # zero where no key is selected
        row = self.row_BTN[:, rows].flatten()
        if total_MX.device.type == "cpu":
            total_MX.index_add_(0, row, grad)
        else:  # index_add_ would use atomics
            total_MX += torch.ops.aten.embedding_dense_backward(grad.contiguous(), row, len(total_MX), -1, False)


def gathered_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor, scale: float) -> Tensor:
    """Attention with a copy of the selected keys."""
    gathered = _GatheredBlocks(q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale)
    o_BTHV = v_BSGV.new_empty(*q_BTHK.shape[:3], v_BSGV.shape[-1])
    for rows, _, _, v, p, _ in gathered.blocks():
        o_BTHV[:, rows] = torch.matmul(p, v).flatten(1, 2).unflatten(0, (q_BTHK.shape[0], -1))
    return o_BTHV


def gathered_backward(do_BTHV: Tensor, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, indices_BTN: Tensor,
                      scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by `gathered_forward`."""
    gathered = _GatheredBlocks(q_BTHK, k_BSGK, v_BSGV, indices_BTN, scale)
    dq_BTHK = torch.empty(q_BTHK.shape, dtype=gathered.wide, device=q_BTHK.device)
    dk_MX, dv_MX = (torch.zeros_like(x, dtype=gathered.wide, memory_format=torch.contiguous_format)
                    for x in (gathered.k_MX, gathered.v_MX))
    for rows, q, k, v, p, has in gathered.blocks():
        do = gathered.by_key_head(do_BTHV[:, rows]) * has
        ds = torch.ops.aten._softmax_backward_data(torch.matmul(do, v.transpose(2, 3)), p, -1, p.dtype)
        gathered.add_up(torch.matmul(p.transpose(2, 3), do), rows, dv_MX)
        gathered.add_up(torch.matmul(ds.transpose(2, 3), q), rows, dk_MX)
        dq_BTHK[:, rows] = (torch.matmul(ds, k) * scale).flatten(1, 2).unflatten(0, (q_BTHK.shape[0], -1))
    return dq_BTHK, dk_MX.view(k_BSGK.shape), dv_MX.view(v_BSGV.shape)
