"""The delta rule as Triton kernels: forward and backward by chunks, and the recurrence itself for decoding.

Forward: `chunk_kernel` finds what does not depend on the state, `scan_kernel` the states and outputs. Backward:
`scan_kernel` again for the states of all chunks, `scan_back_kernel` for their gradients, `gradients_kernel` for those
of the inputs. Kept between the two: the inputs, the scores A and X, and seven numbers a token and head.

Legend: B rows, T tokens a row, H key heads, G value heads, K/V key/value head dim, N documents, C tokens a chunk,
P chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..gates import Gate, parameters_of
from ..packing import CuSeqlens
from ..precision import plain_backward
from ..triton_chunks import CHUNK, ChunkTables, chunk_tables
from .triton_chunk import FACTORS, chunk_kernel
from .triton_decode import decode_kernel
from .triton_gradients import gradients_kernel
from .triton_scan import scan_back_kernel, scan_kernel

FEW_TOKENS = 16  # up to here, and without gradients, the recurrence itself is faster than chunks


@torch.compiler.disable
def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTGV: Tensor, g: Tensor | None, beta_BTG: Tensor | None,
               scale: float, state_NGKV: Tensor | None, borders: CuSeqlens | None, qk_l2norm: bool,
               gate: Gate | None = None, beta_sigmoid: float | None = None) -> tuple[Tensor, Tensor]:
    """Arguments as in the public function, already checked."""
    q, k = q_BTHK.to(v_BTGV.dtype), k_BTHK.to(v_BTGV.dtype)
    tensors: list[Any] = [None if x is None else x.contiguous()
                          for x in (q, k, v_BTGV, g, beta_BTG, *parameters_of(gate), state_NGKV)]
    options = _Options(scale, borders, qk_l2norm, gate, beta_sigmoid)
    longest = q.shape[1] if borders is None else max(borders.lengths)
    if longest > FEW_TOKENS or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        return _DeltaRule.apply(*tensors, options)
    return _Launches(_Inputs(*tensors), options).decode()


@dataclass(frozen=True)
class _Inputs:
    """The tensors of a call, contiguous."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, G, V]
    g: Tensor | None  # [B, T, G(, K)]
    beta: Tensor | None  # [B, T, G]
    A_log: Tensor | None  # [G]
    dt_bias: Tensor | None  # [G(, K)]
    state: Tensor | None  # [N, G, K, V]


@dataclass(frozen=True)
class _Options:
    scale: float
    borders: CuSeqlens | None
    qk_l2norm: bool
    gate: Gate | None
    beta_sigmoid: float | None


@dataclass(frozen=True)
class _Scores:
    """What `chunk_kernel` finds."""

    A: Tensor  # [B, T, G, C]
    X: Tensor  # [B, T, G, C]
    factors: Tensor  # [G, 7, B T]
    total: Tensor  # [P, G(, K)]


class _Launches:
    """One call's sizes and flags, and the launches of its kernels."""

    def __init__(self, x: _Inputs, options: _Options):
        self.x, self.options = x, options
        (self.B, self.T, self.H, self.K), (self.G, self.V) = x.k.shape, x.v.shape[2:]
        self.tokens, self.dtype, self.device = self.B * self.T, x.v.dtype, x.v.device
        self.tables: ChunkTables = chunk_tables(self.B, self.T, options.borders, self.device)
        self.documents = self.B if options.borders is None else options.borders.num_documents
        self.decay = "none" if x.g is None else "channel" if x.g.dim() == 4 else "head"
        gate = options.gate
        self.flags = {
            "DECAY": self.decay, "GATE": "none" if gate is None else gate.kind, "L2NORM": options.qk_l2norm,
            "SIGMOID": options.beta_sigmoid is not None, "EXACT": self.dtype == torch.float32}
        self.gate_constant = (1.0 if gate is None else gate.normalizer if gate.kind == "logsigmoid"
                              else gate.lower_bound)
        self.beta_scale = 1.0 if options.beta_sigmoid is None else float(options.beta_sigmoid)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def chunk(self, scores: _Scores | None = None) -> tuple[_Scores, tuple[Tensor, ...]]:
        """A, X and what goes with them (unless given), and the queries, keys and writes that the scans take."""
        x, channel = self.x, self.decay == "channel"
        decayed = tuple(self.empty(self.B, self.T, self.G, self.K) for _ in range(3)) if channel else (x.q, x.k, x.k)
        found = scores
        if found is None:
            found = _Scores(self.empty(self.B, self.T, self.G, CHUNK), self.empty(self.B, self.T, self.G, CHUNK),
                            self.empty(self.G, FACTORS.value, self.tokens, dtype=torch.float32),
                            self.empty(self.tables.num_chunks, self.G, *([self.K] if channel else []),
                                       dtype=torch.float32))
        if channel or scores is None:
            chunk_kernel[(self.tables.num_chunks, self.G, 2)](
                x.q, x.k, x.g, x.beta, x.A_log, x.dt_bias, self.tables.chunks, found.A, found.X, found.factors,
                found.total, *decayed, self.options.scale, self.gate_constant, self.beta_scale, self.tokens, self.H,
                self.G, K=self.K, SCORES=scores is None, **self.flags)
        return found, decayed

    def decode(self) -> tuple[Tensor, Tensor]:
        """o [B, T, G, V] and the last states [N, G, K, V], token by token."""
        x, flags = self.x, {name: self.flags[name] for name in ("DECAY", "GATE", "L2NORM", "SIGMOID")}
        o = self.empty(*x.v.shape)
        last = self.empty(self.documents, self.G, self.K, self.V, dtype=torch.float32)
        block = min(32, max(16, triton.next_power_of_2(self.V)))
        decode_kernel[(self.documents * self.G * triton.cdiv(self.V, block),)](
            x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, x.state, self.tables.documents, o, last,
            self.options.scale, self.gate_constant, self.beta_scale, self.H, self.G, K=self.K, V=self.V,
            BK=triton.next_power_of_2(self.K), BV=block, **flags)
        return o, last

    def _scan_sizes(self) -> dict[str, Any]:
        return {"K": self.K, "V": self.V, "BK": max(16, triton.next_power_of_2(self.K)),
                "CHANNEL": self.decay == "channel", "EXACT": self.flags["EXACT"]}

    def _scan_grid(self, sizes: dict[str, Any]) -> tuple[int]:
        return (self.documents * self.G * triton.cdiv(self.V, sizes["BV"]),)

    def scan(self, scores: _Scores, decayed: tuple[Tensor, ...], output: bool) -> tuple[Tensor, Tensor]:
        """(o [B, T, G, V], last states [N, G, K, V]), or without output (Y [B, T, G, V], states [P, G, K, V])."""
        x = self.x
        per_token = self.empty(self.B, self.T, self.G, self.V)
        states = (self.empty(self.documents, self.G, self.K, self.V, dtype=torch.float32) if output
                  else self.empty(self.tables.num_chunks, self.G, self.K, self.V))
        outputs = (per_token, states, None, None) if output else (None, None, states, per_token)
        scan_kernel[self._scan_grid](
            *decayed, x.v, scores.A, scores.X, scores.factors, scores.total, x.state, self.tables.documents, *outputs,
            self.tokens, self.H, self.G, OUTPUT=output, **self._scan_sizes())
        return per_token, states

    def scan_back(self, scores: _Scores, decayed: tuple[Tensor, ...], do: Tensor, d_last: Tensor,
                  output: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Z [B, T, G, V], the gradients of the states after every chunk [P, G, K, V] and of the initial ones."""
        z = self.empty(self.B, self.T, self.G, self.V)
        d_states = self.empty(self.tables.num_chunks, self.G, self.K, self.V)
        d_first = self.empty(self.documents, self.G, self.K, self.V, dtype=torch.float32) if output else None
        scan_back_kernel[self._scan_grid](
            *decayed, do, scores.A, scores.X, scores.factors, scores.total, d_last, self.tables.documents, d_states, z,
            d_first, self.tokens, self.H, self.G, OUTPUT=output, **self._scan_sizes())
        return z, d_states, d_first

    def gradients(self, scores: _Scores, do: Tensor, y: Tensor, z: Tensor, states: Tensor, d_states: Tensor,
                  needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Of q, k, v, g, beta, A_log and dt_bias, None where there is none or `needed` says it is not wanted."""
        x, P = self.x, self.tables.num_chunks
        dq, dk = (self.empty(self.B, self.T, self.G, self.K) for _ in range(2))
        dv = self.empty(*x.v.shape)
        dg = torch.empty_like(x.g) if x.g is not None and any((needed[3], needed[5], needed[6])) else None
        d_beta = torch.empty_like(x.beta) if x.beta is not None and needed[4] else None
        d_A_log = self.empty(P, self.G, dtype=torch.float32) if x.A_log is not None and needed[5] else None
        d_bias = (self.empty(P, *x.dt_bias.shape, dtype=torch.float32) if x.dt_bias is not None and needed[6]
                  else None)
        gradients_kernel[(P, self.G)](
            x.q, x.k, x.g, x.A_log, x.dt_bias, do, y, z, scores.A, scores.factors, scores.total, states, d_states,
            self.tables.chunks, self.empty(2, self.tokens, self.G, CHUNK), dq, dk, dv, dg, d_beta, d_A_log, d_bias,
            1.0 / self.options.scale if self.options.scale else 0.0, self.gate_constant, self.beta_scale, self.tokens,
            self.H, self.G, K=self.K, V=self.V, **self.flags)

        def of_heads(d: Tensor) -> Tensor:
            return d if self.H == self.G else d.unflatten(2, (self.H, -1)).sum(3)

        def of_chunks(d: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if d is None or like is None else d.sum(0).to(like.dtype)

        return [of_heads(dq), of_heads(dk), dv, dg if needed[3] else None, d_beta, of_chunks(d_A_log, x.A_log),
                of_chunks(d_bias, x.dt_bias)]


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
                A_log: Tensor | None, dt_bias: Tensor | None, state: Tensor | None, options: _Options) -> Any:
        inputs = _Inputs(q, k, v, g, beta, A_log, dt_bias, state)
        ctx.options = options
        launches = _Launches(inputs, options)
        scores, decayed = launches.chunk()
        o, last = launches.scan(scores, decayed, output=True)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*vars(inputs).values(), *vars(scores).values())
        return o, last

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, d_last: Tensor) -> Any:
        saved = ctx.saved_tensors  # read once: a checkpointed layer unpacks each saved tensor a single time
        inputs, scores = _Inputs(*saved[:8]), _Scores(*saved[8:])
        launches = _Launches(inputs, ctx.options)
        _, decayed = launches.chunk(scores)
        y, states = launches.scan(scores, decayed, output=False)
        do, d_last = do.contiguous(), d_last.contiguous()
        z, d_states, d_first = launches.scan_back(scores, decayed, do, d_last, ctx.needs_input_grad[7])
        gradients = launches.gradients(scores, do, y, z, states, d_states, ctx.needs_input_grad)
        if d_first is not None and inputs.state is not None:
            d_first = d_first.to(inputs.state.dtype)
        return *gradients, d_first, None
