"""Test-time training by mini-batches, in torch operations: the dual form.

With G the gradients of the losses at the outputs of the linear maps, at the weights W of the start of a mini-batch, and
E = tril(scale_j rate_s), a linear map with weights W - scale_j sum_{s<=j} rate_s k_s G_s^T and its bias give
    q_j W + b - sum_s E_js (q_j . k_s + 1) G_s
so that no weights of single tokens are formed. (Sun et al. 2024, Learning to (Learn at Test Time), section 2.5 and
appendix A.) Mini-batches follow one another; those of all documents at one place run side by side.

The backward is that of autograd. It keeps the weights at the start of some mini-batches only and computes those between
them again.

Legend: B rows, T tokens, H heads, K head dim, F hidden dim, M tokens of a mini-batch, N documents, P weights of a head,
n documents that have a mini-batch at a step, X all mini-batches of all documents, in the order of the steps.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.recurrence.chunk_layout import from_chunks, get_chunk_layout, to_chunks

MINI_BATCHES_PER_SEGMENT = 4  # mini-batches from one kept state to the next


def ttt_memory(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, rate_BTH: Tensor, scale_M: Tensor,
                       norm_weight_HK: Tensor, norm_bias_HK: Tensor, state_N2HP: Tensor, borders: CuSeqlens | None,
                       hidden_dim: int, eps: float, open_tokens: int) -> tuple[Tensor, Tensor]:
    """The torch backend; arguments as in the public function, already checked, all in one dtype."""
    M, T = len(scale_M), q_BTHK.shape[1]
    per_token = [q_BTHK, k_BTHK, v_BTHK, rate_BTH[..., None]]
    norm = (norm_weight_HK, norm_bias_HK, eps)
    if open_tokens == 0 and (borders is not None or T >= M):
        return _whole_mini_batches(per_token, scale_M, norm, state_N2HP, borders, hidden_dim)
    first = min(T, M - open_tokens)  # tokens of the open mini-batch
    q, k, v, rate = (x[:, :first].transpose(1, 2) for x in per_token)
    memory = Memory(state_N2HP[:, 0], hidden_dim, q.shape[-1])
    earlier = Memory(state_N2HP[:, 1], hidden_dim, q.shape[-1]) if open_tokens else None
    step = MiniBatch(q, k, v, rate, scale_M[open_tokens : open_tokens + first], norm)
    o_BHTK, gradients = step.read(memory, earlier)
    sums = state_N2HP[:, 1] + gradients if open_tokens else gradients
    o = (q + _layer_norm(o_BHTK, *norm)).transpose(1, 2)
    if open_tokens + first < M:
        return o, torch.stack([state_N2HP[:, 0], sums], 1)
    state = torch.stack([state_N2HP[:, 0] - scale_M[-1] * sums, torch.zeros_like(sums)], 1)
    if first == T:
        return o, state
    later = [x[:, first:] for x in (q_BTHK, k_BTHK, v_BTHK, rate_BTH)]
    rest, state = ttt_memory(later[0], later[1], later[2], later[3], scale_M, norm_weight_HK, norm_bias_HK, state, None,
                             hidden_dim, eps, 0)
    return torch.cat([o, rest], 1), state


class Memory:
    """The linear maps of a memory, views of its flat weights [n, H, P]."""

    def __init__(self, weights_nHP: Tensor, hidden_dim: int, K: int):
        self.hidden_dim = hidden_dim
        if hidden_dim == 0:
            W1, b1 = weights_nHP.split([K * K, K], -1)
            self.W1, self.b1 = W1.unflatten(-1, (K, K)), b1[:, :, None]
            return
        W1, b1, W2, b2 = weights_nHP.split([K * hidden_dim, hidden_dim, hidden_dim * K, K], -1)
        self.W1, self.b1 = W1.unflatten(-1, (K, hidden_dim)), b1[:, :, None]
        self.W2, self.b2 = W2.unflatten(-1, (hidden_dim, K)), b2[:, :, None]


class MiniBatch:
    """Mini-batches of n documents: everything about them that no weights are needed for.

    Args:
        q, k, v: [n, H, M, K].
        rate: [n, H, M, 1].
        scale_M: factor of each token.
        norm: weight, bias and eps of the norm.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, scale_M: Tensor,
                 norm: tuple[Tensor, Tensor, float]):
        gamma, beta, self.eps = norm
        self.q, self.k, self.rate, self.scale = q, k, rate, scale_M[:, None]
        self.steps = (self.scale * rate.mT).tril()  # E [n, H, M, M]
        self.scores = self.steps * (q @ k.mT + 1.0)
        self.squared_gamma = gamma[:, None].square()
        self.target = gamma[:, None] * (beta[:, None] - (v - k))

    def read(self, memory: Memory, earlier: Memory | None) -> tuple[Tensor, Tensor]:
        """Outputs of the memory for the queries [n, H, M, K], and the sums of gradients times rates [n, H, P].

        Args:
            memory: the weights at the start of the mini-batch.
            earlier: sums of gradients times rates of tokens of the mini-batch before these; None: there are none.
        """
        Z1 = self.k @ memory.W1 + memory.b1
        if memory.hidden_dim == 0:
            G1 = self._loss_gradient(Z1)
            outputs = self.q @ memory.W1 + memory.b1 - self.scores @ G1
            if earlier is not None:
                outputs = outputs - self.scale * (self.q @ earlier.W1 + earlier.b1)
            return outputs, self._sum(self.k, G1)
        X2 = F.gelu(Z1, approximate="tanh")
        G2 = self._loss_gradient(X2 @ memory.W2 + memory.b2)
        G1 = torch.ops.aten.gelu_backward(G2 @ memory.W2.mT, Z1, approximate="tanh")
        hidden = self.q @ memory.W1 + memory.b1 - self.scores @ G1
        if earlier is not None:
            hidden = hidden - self.scale * (self.q @ earlier.W1 + earlier.b1)
        hidden = F.gelu(hidden, approximate="tanh")
        outputs = hidden @ memory.W2 + memory.b2 - (self.steps * (hidden @ X2.mT + 1.0)) @ G2
        if earlier is not None:
            outputs = outputs - self.scale * (hidden @ earlier.W2 + earlier.b2)
        return outputs, torch.cat([self._sum(self.k, G1), self._sum(X2, G2)], -1)

    def _loss_gradient(self, Z: Tensor) -> Tensor:
        """The gradient of the loss at the output Z of the memory, before the norm."""
        centered = Z - Z.mean(-1, keepdim=True)
        rstd = (centered.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        normed = centered * rstd
        g = self.squared_gamma * normed + self.target
        return rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))

    def _sum(self, x: Tensor, G: Tensor) -> Tensor:
        """Sums of rate x G^T and of rate G, flattened: those of the weights and of the bias of a linear map."""
        rated = self.rate * G
        return torch.cat([(x.mT @ rated).flatten(-2), rated.sum(-2)], -1)


def _whole_mini_batches(per_token: list[Tensor], scale_M: Tensor, norm: tuple[Tensor, Tensor, float],
                        state_N2HP: Tensor, borders: CuSeqlens | None, hidden_dim: int) -> tuple[Tensor, Tensor]:
    """Documents that begin with a mini-batch; the last one of each may be shorter."""
    q_BTHK, M = per_token[0], len(scale_M)
    B, T, _, K = q_BTHK.shape
    layout = get_chunk_layout(B, T, M, borders, q_BTHK.device)
    q, k, v, rate = (to_chunks(x, layout) for x in per_token)
    filled = torch.arange(M, device=rate.device) < layout.to_device(layout.tokens_per_chunk)[:, None]
    batches = [q, k, v, torch.where(filled[:, None, :, None], rate, 0.0)]
    weights_nHP = layout.sort_documents(state_N2HP[:, 0])

    def segment(weights_nHP: Tensor, scale_M: Tensor, gamma: Tensor, beta: Tensor, *batches: Tensor, first: int,
                end: int) -> tuple[Tensor, ...]:
        """Outputs of the steps first .. end - 1, the weights after them, and the states of documents that end."""
        outputs, ended = [], []
        for step in range(first, end):
            n, after = layout.counts[step], (*layout.counts, 0)[step + 1]
            rows = slice(layout.starts[step] - layout.starts[first], layout.starts[step + 1] - layout.starts[first])
            q, k, v, rate = (x[rows] for x in batches)
            batch = MiniBatch(q, k, v, rate, scale_M, (gamma, beta, norm[2]))
            o, sums = batch.read(Memory(weights_nHP, hidden_dim, K), None)
            outputs.append(o)
            next_nHP = weights_nHP - scale_M[-1] * sums
            if after < n:
                full = filled[layout.starts[step] + after : layout.starts[step + 1], -1][:, None, None]
                ended.append(torch.stack([torch.where(full, next_nHP[after:], weights_nHP[after:]),
                                          torch.where(full, 0.0, sums[after:])], 1))
            weights_nHP = next_nHP[:after]
        return torch.cat(outputs), weights_nHP, *ended

    outputs, ended = [], []
    for first in range(0, len(layout.counts), MINI_BATCHES_PER_SEGMENT):
        end = min(first + MINI_BATCHES_PER_SEGMENT, len(layout.counts))
        of_segment = [x[layout.starts[first] : layout.starts[end]] for x in batches]
        run = partial(segment, first=first, end=end)
        if torch.is_grad_enabled():
            o, weights_nHP, *states = checkpoint(run, weights_nHP, scale_M, norm[0], norm[1], *of_segment,
                                                 use_reentrant=False, preserve_rng_state=False)
        else:
            o, weights_nHP, *states = run(weights_nHP, scale_M, norm[0], norm[1], *of_segment)
        outputs.append(o)
        ended += states
    o_XHMK = q + _layer_norm(torch.cat(outputs), *norm)
    final_N2HP = layout.unsort_documents(torch.cat(ended[::-1]))  # documents that end first are the last ones
    return from_chunks(o_XHMK, layout), final_N2HP


def _layer_norm(x_nHMK: Tensor, gamma_HK: Tensor, beta_HK: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x_nHMK, x_nHMK.shape[-1:], eps=eps) * gamma_HK[:, None] + beta_HK[:, None]
