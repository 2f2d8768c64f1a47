"""The memory of Titans by chunks, in torch operations: the dual form.

Unrolled from the memory M and the momentum S before a chunk, with the gradients g_s at the weights W of its start,

    M_t = keep_t M + carry_t S - sum_{s<=t} c_ts g_s,     S_t = eta_t ... eta_1 S - sum_{s<=t} p_ts g_s
    p_ts = theta_s eta_{s+1} ... eta_t,   c_ts = (1 - alpha_t) c_{t-1,s} + p_ts

and the gradient of a linear map is an outer product k_s G_s^T, so that q_t M_t = keep_t q_t M + carry_t q_t S -
sum_s c_ts (q_t . k_s) G_s: no weights of single tokens are formed. Chunks follow one another; those of all documents at
one place run side by side. The backward is that of autograd, which keeps the weights before some chunks and computes
those between them again.

Legend: B rows, T tokens, H heads, K head dim, F hidden dim, C tokens per chunk, N documents, P weights of a head, n
documents that have a chunk at a step, X all chunks of all documents, in the order of the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.chunk_layout import from_chunks, get_chunk_layout, to_chunks

CHUNKS_PER_SEGMENT = 4  # chunks from one kept state to the next


def titans_memory(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, alpha_BTH: Tensor, eta_BTH: Tensor,
                  theta_BTH: Tensor, state_N3HP: Tensor, borders: CuSeqlens | None, hidden_dim: int, chunk: int,
                  open_tokens: int) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked, all in one dtype."""
    T = q_BTHK.shape[1]
    tokens = [q_BTHK, k_BTHK, v_BTHK, *(x[..., None] for x in (alpha_BTH, eta_BTH, theta_BTH))]
    first = min(T, chunk - open_tokens) if open_tokens else 0  # tokens of the open chunk
    outputs = []
    if first:
        o_BHTK, state_N3HP = _one_chunk([x[:, :first].transpose(1, 2) for x in tokens], state_N3HP,
                                        torch.full((q_BTHK.shape[0],), first - 1), hidden_dim)
        if open_tokens + first == chunk:
            state_N3HP = state_N3HP[:, [1, 1, 2]]
        outputs.append(o_BHTK.transpose(1, 2))
    if first < T:
        o, state_N3HP = _whole_chunks([x[:, first:] for x in tokens], state_N3HP, borders, hidden_dim, chunk)
        outputs.append(o)
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state_N3HP


@dataclass(frozen=True)
class Factors:
    """The factors of M, S and the gradients in chunks, from their gates.

    `keep`, `carry` [n, H, C, 1] and `of_gradients` c [n, H, C, C] make M_t; `last` has keep, carry, the product of the
    etas [n, H, 1, 1], and c and p [n, H, C, 1] of the last token of each chunk.
    """

    keep: Tensor
    carry: Tensor
    of_gradients: Tensor
    last: tuple[Tensor, ...]

    @classmethod
    def of(cls, alpha: Tensor, eta: Tensor, theta: Tensor, last_n: Tensor) -> Factors:
        """The factors of gates [n, H, C, 1]; `last_n` is the place of the last token of each chunk."""
        per_token: list[tuple[Tensor, ...]] = []  # keep, carry, product, c and p of each token
        kept = product = torch.ones_like(alpha[:, :, 0])
        carried = torch.zeros_like(kept)
        c = p = torch.zeros_like(alpha[..., 0])
        place_C = torch.arange(alpha.shape[2], device=alpha.device)
        for t in range(alpha.shape[2]):
            left, momentum = 1 - alpha[:, :, t], eta[:, :, t]
            product = momentum * product
            kept, carried = left * kept, left * carried + product
            p = torch.where(place_C == t, theta[:, :, t], momentum * p)
            c = left * c + p
            per_token.append((kept, carried, product, c, p))
        rows = [torch.stack(list(column), 2) for column in zip(*per_token, strict=True)]
        place_n = torch.arange(len(last_n), device=alpha.device)
        last = tuple(x[place_n, :, last_n.to(alpha.device)][..., None] for x in rows)
        return cls(rows[0], rows[1], rows[3], last)

    def chunks(self, rows: slice) -> Factors:
        """The factors of some of the chunks."""
        return Factors(self.keep[rows], self.carry[rows], self.of_gradients[rows], tuple(x[rows] for x in self.last))


def _read_chunk(q: Tensor, k: Tensor, v: Tensor, factors: Factors, state_n3HP: Tensor,
                hidden_dim: int) -> tuple[Tensor, Tensor]:
    """Outputs [n, H, C, K] of a chunk, and memory and momentum [n, 2, H, P] at its last token."""
    K = q.shape[-1]
    start, memory, surprise = (_maps(x, K, hidden_dim) for x in state_n3HP.unbind(1))
    keep, carry, product, c_last, p_last = factors.last
    if hidden_dim == 0:
        inputs, gradients = [k], [2.0 * (k @ start[0] - v)]
    else:
        Z = k @ start[0]
        hidden = F.gelu(Z, approximate="tanh")
        G2 = 2.0 * (hidden @ start[1] - v)
        G1 = torch.ops.aten.gelu_backward(G2 @ start[1].mT, Z, approximate="tanh")
        inputs, gradients = [k, hidden], [G1, G2]
    x, memories, surprises = q, [], []
    for layer, (a, G) in enumerate(zip(inputs, gradients, strict=True)):
        if layer:
            x = F.gelu(x, approximate="tanh")
        M, S = memory[layer], surprise[layer]
        memories.append((keep * M + carry * S - (c_last * a).mT @ G).flatten(-2))
        surprises.append((product * S - (p_last * a).mT @ G).flatten(-2))
        x = factors.keep * (x @ M) + factors.carry * (x @ S) - (factors.of_gradients * (x @ a.mT)) @ G
    return x, torch.stack([torch.cat(memories, -1), torch.cat(surprises, -1)], 1)


def _maps(weights_nHP: Tensor, K: int, hidden_dim: int) -> list[Tensor]:
    """The linear maps of a memory, views of its flat weights."""
    if hidden_dim == 0:
        return [weights_nHP.unflatten(-1, (K, K))]
    W1, W2 = weights_nHP.split(K * hidden_dim, -1)
    return [W1.unflatten(-1, (K, hidden_dim)), W2.unflatten(-1, (hidden_dim, K))]


def _one_chunk(tokens: list[Tensor], state_N3HP: Tensor, last_N: Tensor, hidden_dim: int) -> tuple[Tensor, Tensor]:
    """Tokens of one open chunk: their outputs, and the state after them, of which the weights of the start stay."""
    q, k, v, alpha, eta, theta = tokens
    o, after = _read_chunk(q, k, v, Factors.of(alpha, eta, theta, last_N), state_N3HP, hidden_dim)
    return o, torch.cat([state_N3HP[:, :1], after], 1)


def _whole_chunks(tokens: list[Tensor], state_N3HP: Tensor, borders: CuSeqlens | None, hidden_dim: int,
                  chunk: int) -> tuple[Tensor, Tensor]:
    """Documents that begin with a chunk; the last chunk of each may be shorter."""
    B, T = tokens[0].shape[:2]
    layout = get_chunk_layout(B, T, chunk, borders, tokens[0].device)
    q, k, v, alpha, eta, theta = (to_chunks(x, layout) for x in tokens)
    size_X = layout.to_device(layout.tokens_per_chunk)
    factors = Factors.of(alpha, eta, theta, size_X - 1)
    whole_X = (size_X == chunk)[:, None, None]

    def segment(state_n3HP: Tensor, q: Tensor, k: Tensor, v: Tensor, *parts: Tensor, first: int,
                end: int) -> tuple[Tensor, ...]:
        """Outputs of the steps first .. end - 1, the states after them, and those of documents that end."""
        of_segment = Factors(parts[0], parts[1], parts[2], parts[3:])
        outputs, ended = [], []
        for step in range(first, end):
            after_n = (*layout.counts, 0)[step + 1]
            rows = slice(layout.starts[step] - layout.starts[first], layout.starts[step + 1] - layout.starts[first])
            o, after = _read_chunk(q[rows], k[rows], v[rows], of_segment.chunks(rows), state_n3HP, hidden_dim)
            outputs.append(o)
            whole_n = whole_X[layout.starts[step] : layout.starts[step + 1]]
            start = torch.where(whole_n, after[:, 0], state_n3HP[:, 0])
            state_n3HP = torch.cat([start[:, None], after], 1)
            if after_n < layout.counts[step]:
                ended.append(state_n3HP[after_n:])
            state_n3HP = state_n3HP[:after_n]
        return torch.cat(outputs), state_n3HP, *ended

    state_n3HP, outputs, ended = layout.sort_documents(state_N3HP), [], []
    for first in range(0, len(layout.counts), CHUNKS_PER_SEGMENT):
        end = min(first + CHUNKS_PER_SEGMENT, len(layout.counts))
        rows = slice(layout.starts[first], layout.starts[end])
        part = factors.chunks(rows)
        arguments = (state_n3HP, q[rows], k[rows], v[rows], part.keep, part.carry, part.of_gradients, *part.last)
        run = partial(segment, first=first, end=end)
        if torch.is_grad_enabled():
            o, state_n3HP, *states = checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            o, state_n3HP, *states = run(*arguments)
        outputs.append(o)
        ended += states
    final_N3HP = layout.unsort_documents(torch.cat(ended[::-1]))  # documents that end first are the last ones
    return from_chunks(torch.cat(outputs), layout), final_N3HP
