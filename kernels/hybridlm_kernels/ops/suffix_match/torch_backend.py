"""Matches by run lengths, in any device's tensors, and all flipped bits at once.

The run length r[t, j] is how many symbols of q up to t are those of k up to j: 0 where the two differ, else one more
than r[t - 1, j - 1]. The match of t is the largest run length with j < t, the latest of equal ones: the largest of
r S + j, which is called a score. A forward keeps one row of run lengths, so a token costs as much as it has keys.

A flipped bit changes run lengths in three ways, each known from the run lengths as they are (`flips`).

Legend: N streams, T queries and tokens, S keys, R run lengths of the last query, b bits of a symbol, W lengths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.ops.suffix_match.matched_signs import (
    MatchedSigns,
    from_streams,
    read_at,
    readable_signs,
    symbols,
    to_streams,
)
from hybridlm_kernels.packing import CuSeqlens

ROW_ELEMENTS = 2**17  # run lengths that are worked on at a time in a forward
TABLE_ELEMENTS = 2**20  # entries of a table over pairs of tokens in a backward


def suffix_match(q_BTC: Tensor, k_BSC: Tensor, v_BSC: Tensor, scale_C: Tensor, bits: int, unmatched: str,
                 runs_BRG: Tensor | None, final_runs: bool,
                 cu_seqlens: CuSeqlens | None) -> tuple[Tensor, Tensor | None]:
    """The torch backend; arguments as in the public function, already checked."""
    if runs_BRG is None and not final_runs:

        def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return MatchedSigns.apply(q, k, v, scale_C, bits, unmatched, match, flips)

        tensors = (q_BTC, k_BSC, v_BSC)
        return rows(*tensors) if cu_seqlens is None else each_document_row(rows, tensors, cu_seqlens), None
    q_NTb, k_NSb, v_NSb = (to_streams(x, bits) for x in (q_BTC, k_BSC, v_BSC))
    runs_NR = None if runs_BRG is None else runs_BRG.transpose(1, 2).flatten(0, 1)
    index_NT, runs_NR = match_and_runs(symbols(q_NTb), symbols(k_NSb), runs_NR)
    signs_NTb = read_at(readable_signs(v_NSb, unmatched, torch.float32), index_NT)
    y_BTC = (scale_C * from_streams(signs_NTb, len(q_BTC))).to(q_BTC.dtype)
    return y_BTC, runs_NR.unflatten(0, (len(q_BTC), -1)).transpose(1, 2).contiguous() if final_runs else None


def match(q_NT: Tensor, k_NT: Tensor) -> Tensor:
    """The index behind the match, [N, T]; 0 where there is none."""
    return match_and_runs(q_NT, k_NT, None)[0]


def match_and_runs(q_NT: Tensor, k_NS: Tensor, runs_NR: Tensor | None) -> tuple[Tensor, Tensor]:
    """The index behind the match, [N, T], and the run lengths of the last query, [N, S - 1].

    Args:
        q_NT: symbols of the last T tokens.
        k_NS: symbols of all tokens.
        runs_NR: run lengths of the token before the first query; None where the queries start at the first token.
    """
    T, S = q_NT.shape[1], k_NS.shape[1]
    streams = max(1, ROW_ELEMENTS // S)
    found = [_match_rows(q, k, runs) for q, k, runs in zip(
        q_NT.split(streams), k_NS.split(streams),
        (q_NT.new_empty(len(q_NT), 0) if T == S else runs_NR).split(streams), strict=True)]  # type: ignore[union-attr]
    return torch.cat([index for index, _ in found]), torch.cat([runs for _, runs in found])


def _match_rows(q_NT: Tensor, k_NS: Tensor, runs_NR: Tensor) -> tuple[Tensor, Tensor]:
    """`match_and_runs` of a few streams."""
    T, S = q_NT.shape[1], k_NS.shape[1]
    place_S = torch.arange(S, device=q_NT.device, dtype=_score_dtype(S))
    index_NT = torch.zeros(q_NT.shape, dtype=torch.int32, device=q_NT.device)
    for i, t in enumerate(range(S - T, S)):
        if t == 0:
            continue
        runs_NR = torch.where(q_NT[:, i, None] == k_NS[:, :t], F.pad(runs_NR, (1, 0)) + 1, 0)
        best_N = (runs_NR * S + place_S[:t]).amax(1)
        index_NT[:, i] = torch.where(best_N >= S, best_N % S + 1, 0)
    return index_NT, runs_NR


def _score_dtype(size: int) -> torch.dtype:
    """The smallest dtype of the scores of rows of `size` tokens."""
    return torch.int32 if size * (size + 1) < 2**31 else torch.int64


def flips(q_NT: Tensor, k_NT: Tensor, signs_NTb: Tensor, dy_NTb: Tensor) -> tuple[Tensor, Tensor]:
    """Changes of sum(dy * read) when each bit of q and of k is flipped alone, [N, T, b] each.

    Args:
        q_NT: symbols of the queries.
        k_NT: symbols of the keys.
        signs_NTb: what is read from each index.
        dy_NTb: weights of what is read.
    """
    streams = max(1, TABLE_ELEMENTS // q_NT.shape[1] ** 2)
    parts = [_flips_of(*tensors) for tensors in zip(
        *(x.split(streams) for x in (q_NT, k_NT, signs_NTb, dy_NTb)), strict=True)]
    return torch.cat([dq for dq, _ in parts]), torch.cat([dk for _, dk in parts])


def _flips_of(q_NT: Tensor, k_NT: Tensor, signs_NTb: Tensor, dy_NTb: Tensor) -> tuple[Tensor, Tensor]:
    """`flips` of a few streams.

    Let r = r[t, j]. Where its run ends at a place (t - r, j - r) of both rows, the two symbols there differ. If they
    differ by one bit, flipping that bit of either symbol lengthens the run to r + 1 + r[t - r - 1, j - r - 1].
    Flipping any bit of a symbol inside the run cuts the run there. No other run length changes.

    Query s = t - w flipped: the longest of those lengthened there wins, since they are longer than w and others are
    cut to w; else the latest j with r >= w; else, where w > 0, no run reaches s and the match stays.
    Key s flipped: the best of those lengthened there, of the runs that end before s, and of those that end at j >= s
    and are cut to j - s. Of the last, the longest is the largest w for which the latest j with r >= w is s + w or more.
    """
    N, T = q_NT.shape
    bits = dy_NTb.shape[2]
    runs_NTT = _run_table(q_NT, k_NT)
    score_NTT, longer_NTTW = _scores(runs_NTT), _lengthened(q_NT, k_NT, runs_NTT, bits)
    latest_NTW = _latest_by_length(runs_NTT)
    best_NT = score_NTT.amax(2)
    w_W = torch.arange(T, device=q_NT.device)
    size = torch.full((), T, dtype=score_NTT.dtype, device=q_NT.device)
    run_NTT, place_T = runs_NTT.long(), w_W
    start_NTT = place_T - run_NTT  # j - r: the key at which the run ended
    valid_NTT = (place_T < w_W[:, None]) & (start_NTT >= 0)

    def gathered(index_NTT: Tensor) -> Tensor:
        """The best score of those lengthened, by token, `index` of the pair and bit: [N, T, T, b]."""
        best = score_NTT.new_full((N, T, T * bits), -1)
        slot = index_NTT.clamp(0, T - 1) * bits + longer_NTTW[1].clamp_min(0)
        usable = valid_NTT & (longer_NTTW[1] >= 0)
        return best.scatter_reduce_(2, slot, torch.where(usable, longer_NTTW[0], -1), "amax").unflatten(2, (T, bits))

    def change(score_NTXb: Tensor) -> Tensor:
        """The change of dy * read of every token if its match had this score, [N, T, X, b]."""
        index = torch.where(score_NTXb >= 0, score_NTXb % size + 1, 0).flatten(1)
        read = read_at(signs_NTb, index).unflatten(1, score_NTXb.shape[1:])  # [N, T, X, b, b]
        value = (read * dy_NTb[:, :, None, None]).sum(-1)
        now = read_at(signs_NTb, torch.where(best_NT >= 0, best_NT % size + 1, 0))
        return value - (now * dy_NTb).sum(-1)[:, :, None, None]

    # Queries: rows by t, columns by w = t - s.
    longer = gathered(run_NTT)
    cut_NTT = torch.where((latest_NTW[..., :T] >= 0) & (w_W > 0), latest_NTW[..., :T].to(score_NTT.dtype) + size,
                          torch.where(w_W > 0, best_NT[..., None], -1))
    of_query = change(torch.where(longer >= 0, longer, cut_NTT[..., None]))
    of_query = of_query.masked_fill((w_W > w_W[:, None])[..., None], 0.0)
    dq_NTb = torch.zeros_like(dy_NTb).index_add_(
        1, (w_W[:, None] - w_W).clamp_min(0).flatten(), of_query.flatten(1, 2))

    # Keys: rows by t, columns by s.
    before_NTT = F.pad(score_NTT.cummax(2).values[..., :-1], (1, 0), value=-1)
    length_W = torch.arange(1, T + 1, device=q_NT.device)
    reach_NTW = length_W - latest_NTW[..., 1:]  # ascending; a length serves key s where this is at most -s
    w_NTT = torch.searchsorted(reach_NTW.contiguous(), (-w_W).expand(N, T, T).contiguous(), right=True)
    cut_NTT = torch.where(w_NTT > 0, w_NTT * size + latest_NTW.gather(2, w_NTT), -1).to(score_NTT.dtype)
    best = torch.maximum(gathered(start_NTT), torch.maximum(before_NTT, cut_NTT)[..., None])
    of_key = change(best).masked_fill((w_W >= w_W[:, None])[..., None], 0.0)
    return dq_NTb, of_key.sum(1)


def _run_table(q_NT: Tensor, k_NT: Tensor) -> Tensor:
    """All run lengths [N, T, T] of j < t, 0 elsewhere."""
    N, T = q_NT.shape
    runs_NTT = q_NT.new_zeros(N, T, T, dtype=_score_dtype(T))
    for t in range(1, T):
        before = F.pad(runs_NTT[:, t - 1, : t - 1], (1, 0))
        runs_NTT[:, t, :t] = torch.where(q_NT[:, t, None] == k_NT[:, :t], before + 1, 0)
    return runs_NTT


def _scores(runs_NTT: Tensor) -> Tensor:
    """r T + j where the run length r is not 0, else -1."""
    T = runs_NTT.shape[1]
    return torch.where(runs_NTT > 0, runs_NTT * T + torch.arange(T, device=runs_NTT.device, dtype=runs_NTT.dtype), -1)


def _latest_by_length(runs_NTT: Tensor) -> Tensor:
    """The latest j whose run length is at least w, for w = 0 .. T, [N, T, T + 1]; -1 where there is none."""
    N, T = runs_NTT.shape[:2]
    place = torch.arange(T, device=runs_NTT.device).expand(N, T, T)
    latest = place.new_full((N, T, T + 1), -1)
    latest.scatter_reduce_(2, runs_NTT.long(), place, "amax")
    return latest.flip(2).cummax(2).values.flip(2)


def _lengthened(q_NT: Tensor, k_NT: Tensor, runs_NTT: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """For each pair (t, j): the score of its run if the symbols that end it were equal, and their bit that differs.

    The bit is -1 where more than one differs. Both mean nothing where the run reaches the first token.
    """
    N, T = q_NT.shape
    run = runs_NTT.long()
    place_T = torch.arange(T, device=q_NT.device)
    at_query = (place_T[:, None] - run).clamp_min(0).flatten(1)
    at_key = (place_T - run).clamp_min(0).flatten(1)
    differ = (q_NT.gather(1, at_query) ^ k_NT.gather(1, at_key)).view(N, T, T)
    bit_of = torch.full((2**bits,), -1, device=q_NT.device)
    bit_of[2 ** torch.arange(bits, device=q_NT.device)] = torch.arange(bits, device=q_NT.device)
    behind = F.pad(runs_NTT, (1, 0, 1, 0)).flatten(1).gather(1, at_query * (T + 1) + at_key).view(N, T, T)
    score = (runs_NTT + 1 + behind) * T + place_T.to(runs_NTT.dtype)
    return score, bit_of[differ.long()]
