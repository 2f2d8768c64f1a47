"""PaTH attention in blocks: the queries of a block walk back over the chunks before them.

Within a chunk, the product of reflections up to token t is I - sum_{i <= t} w_i y_i^T with
Y = (I + strict lower part of diag(beta) W W^T)^{-1} diag(beta) W. A query at the start of its chunk is therefore
q - (lower part of Q W^T) Y, and one that passes a whole chunk becomes q - (q W^T) Y. Scores exist for one block of
queries at a time; the backward computes them again. (Yang et al. 2025, section 3.)

B rows, T tokens, H heads, K key dim, V value dim, N chunks of C tokens, n chunks of a block, Q = n C queries of a
block, P earlier keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recompute import recomputed

CHUNK_TOKENS = 64
SHORT_CHUNK_TOKENS = 16  # of calls with so few tokens or fewer, as in decoding
BLOCK_CHUNKS = 4


def path_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BSGV: Tensor, w_BTGK: Tensor, beta_BTG: Tensor,
                   g_BSH: Tensor | None, past_BPGK: Tensor | None, scale: float,
                   cu_seqlens: CuSeqlens | None) -> Tensor:
    """The torch backend; arguments as in the public function, already checked."""
    tokens = [q_BTHK, k_BTGK, v_BSGV, w_BTGK, beta_BTG, *([] if g_BSH is None else [g_BSH])]

    def rows(*tokens: Tensor) -> Tensor:
        return _rows(*tokens[:5], tokens[5] if len(tokens) > 5 else None, past_BPGK, scale)  # type: ignore

    if cu_seqlens is not None and cu_seqlens.num_documents > q_BTHK.shape[0]:
        return each_document_row(rows, tokens, cu_seqlens)
    return rows(*tokens)


def _chunk_tokens(tokens: int) -> int:
    return SHORT_CHUNK_TOKENS if tokens <= SHORT_CHUNK_TOKENS else CHUNK_TOKENS


def _in_chunks(x_BTHX: Tensor, size: int) -> Tensor:
    """Chunks [B, H, N, C, X] in fp32 at least, zeros behind the last token."""
    x_BHTX = wide(x_BTHX).transpose(1, 2)
    return F.pad(x_BHTX, (0, 0, 0, -x_BHTX.shape[2] % size)).unflatten(2, (-1, size))


def reflections(w_BHNCK: Tensor, beta_BHNC: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices (I + strict lower part of diag(beta) W W^T)^{-1} diag(beta) [.., C, C], and that times W: Y."""
    beta_BHNC1 = beta_BHNC[..., None]
    below = (beta_BHNC1 * (w_BHNCK @ w_BHNCK.mT)).tril(-1)
    inverse = torch.linalg.solve_triangular(below, torch.diag_embed(beta_BHNC), upper=False, unitriangular=True)
    return inverse, inverse @ w_BHNCK


def through_chunk(k: Tensor, w: Tensor, inverse: Tensor) -> Tensor:
    """Keys [.., C, K] as they leave their chunk: each through the reflections of the later tokens in it."""
    return k - (inverse @ (w @ k.mT).tril(-1)).mT @ w


def _rows(q_BTHK: Tensor, k_BTGK: Tensor, v_BSGV: Tensor, w_BTGK: Tensor, beta_BTG: Tensor, g_BSH: Tensor | None,
          past_BPGK: Tensor | None, scale: float) -> Tensor:
    """The outputs where every row is one document."""
    T, size = q_BTHK.shape[1], _chunk_tokens(q_BTHK.shape[1])
    copies = q_BTHK.shape[2] // k_BTGK.shape[2]
    q = _in_chunks(q_BTHK * scale, size)
    k, w = (_in_chunks(x.repeat_interleave(copies, 2), size) for x in (k_BTGK, w_BTGK))
    beta_BHNC = _in_chunks(beta_BTG.repeat_interleave(copies, 2)[..., None], size)[..., 0]
    inverse, y = reflections(w, beta_BHNC)
    moved_k = through_chunk(k, w, inverse)
    v_BHSV = wide(v_BSGV).transpose(1, 2).repeat_interleave(copies, 1)
    past = v_BHSV.new_zeros(*q.shape[:2], 0, q.shape[-1]) if past_BPGK is None else \
        wide(past_BPGK).transpose(1, 2).repeat_interleave(copies, 1)
    P, padded = past.shape[2], q.shape[2] * size
    v_BHSV = F.pad(v_BHSV, (0, 0, 0, P + padded - v_BHSV.shape[2]))
    gates = None
    if g_BSH is not None:
        gates = F.pad(g_BSH.transpose(1, 2).double().cumsum(-1), (0, P + padded - g_BSH.shape[1]))
    out = []
    for first in range(0, q.shape[2], BLOCK_CHUNKS):
        last = min(first + BLOCK_CHUNKS, q.shape[2])
        stop = P + last * size
        tensors = [q[:, :, first:last], k[:, :, first:last], moved_k[:, :, :last],
                   v_BHSV[:, :, :stop], w[:, :, :last], y[:, :, :last],
                   inverse[:, :, first:last], past, *([] if gates is None else [gates[:, :, :stop]])]
        out.append(recomputed(_block, *tensors))
    return torch.cat(out, 2)[:, :, :T].transpose(1, 2).to(v_BSGV.dtype)


def _block(q: Tensor, own_k: Tensor, moved_k: Tensor, v_BHSV: Tensor, w: Tensor, y: Tensor, inverse: Tensor,
           past: Tensor, gates_BHS: Tensor | None = None) -> Tensor:
    """The outputs [B, H, Q, V] of the last n chunks of queries."""
    n, C = q.shape[2:4]
    first = moved_k.shape[2] - n
    own_w, own_y = (x[:, :, first:] for x in (w, y))
    reach = (q @ own_w.mT).tril()
    local = q @ own_k.mT - reach @ (inverse @ (own_w @ own_k.mT).tril(-1))
    moved = q - reach @ own_y  # the queries at the start of their chunks
    pieces = []
    for j in range(moved_k.shape[2] - 1, -1, -1):
        above = max(j + 1 - first, 0)  # own chunks from this one on lie behind chunk j
        walking = moved[:, :, above:]
        piece = walking @ moved_k[:, :, j, None].mT
        if above > 0:  # chunk j is one of the block's own
            piece = torch.cat([torch.zeros_like(local[:, :, : above - 1]), local[:, :, above - 1 : above], piece], 2)
        pieces.append(piece.flatten(2, 3))
        walking = walking - (walking @ w[:, :, j, None].mT) @ y[:, :, j, None]
        moved = torch.cat([moved[:, :, :above], walking], 2) if above else walking
    pieces.append(moved.flatten(2, 3) @ past.mT)
    score_BHQS = torch.cat(pieces[::-1], -1)
    S = score_BHQS.shape[-1]
    if gates_BHS is not None:
        score_BHQS = score_BHQS + (gates_BHS[:, :, S - n * C :, None] - gates_BHS[:, :, None]).to(score_BHQS.dtype)
    t_Q1 = torch.arange(S - n * C, S, device=q.device)[:, None]
    hidden_QS = torch.arange(S, device=q.device) > t_Q1
    return score_BHQS.masked_fill(hidden_QS, -torch.inf).softmax(-1) @ v_BHSV


def move_keys(past_BPGK: Tensor | None, k_BTGK: Tensor, w_BTGK: Tensor, beta_BTG: Tensor) -> Tensor:
    """All keys as the token behind these ones reads them: each through the reflections of the tokens after it.

    Args:
        past_BPGK: keys [B, P, G, K] as the first of these tokens would read them; None where there are none.
        k_BTGK: keys of these tokens.
        w_BTGK: directions of their reflections.
        beta_BTG: strengths of their reflections.

    Returns:
        [B, P + T, G, K] in fp32 at least.

    >>> w = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(1, 2, 1, 2)
    >>> move_keys(None, torch.ones(1, 2, 1, 2), w, torch.full((1, 2, 1), 2.0))[0, :, 0].tolist()
    [[1.0, -1.0], [1.0, 1.0]]
    """
    T, size = k_BTGK.shape[1], _chunk_tokens(k_BTGK.shape[1])
    k, w = (_in_chunks(x, size) for x in (k_BTGK, w_BTGK))
    inverse, y = reflections(w, _in_chunks(beta_BTG[..., None], size)[..., 0])
    own = through_chunk(k, w, inverse)
    keys_BGSK = own[:, :, 0, :0] if past_BPGK is None else wide(past_BPGK).transpose(1, 2)
    for j in range(k.shape[2]):
        keys_BGSK = keys_BGSK - (keys_BGSK @ y[:, :, j].mT) @ w[:, :, j]
        keys_BGSK = torch.cat([keys_BGSK, own[:, :, j]], 2)
    return keys_BGSK[:, :, : keys_BGSK.shape[2] - k.shape[2] * size + T].transpose(1, 2)
