"""The delta rule as Triton kernels: forward and backward by chunks, and the recurrence itself for decoding.

Forward: `chunk_kernel` finds what does not depend on the state, `scan_kernel` the states and outputs; `fused_kernel`
does both where documents and heads fill the device, and without a decay a channel for short documents. Backward:
`scan_kernel` again for the states of all chunks, `scan_back_kernel` for their gradients, `gradients_kernel` for those
of the inputs. Kept between the two: the inputs, the scores A and X, and seven numbers a token and head. Where heads are
few, documents are cut into pieces that are scanned side by side.

Legend: B rows, T tokens a row, H key heads, G value heads, K/V key/value head dim, N documents, U pieces of documents,
C tokens a chunk, P chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from hybridlm_kernels.ops.delta_rule.triton_chunk import FACTORS, chunk_kernel
from hybridlm_kernels.ops.delta_rule.triton_decode import decode_kernel
from hybridlm_kernels.ops.delta_rule.triton_fused import fused_channel_kernel, fused_kernel
from hybridlm_kernels.ops.delta_rule.triton_gradients import gradients_kernel
from hybridlm_kernels.ops.delta_rule.triton_scan import scan_back_kernel, scan_kernel
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.gates import Gate, parameters_of
from hybridlm_kernels.recurrence.triton_chunk_tables import CHUNK, ChunkTables, chunk_tables
from hybridlm_kernels.recurrence.triton_join import join_kernel
from hybridlm_kernels.recurrence.triton_tiles import LEVELS
from hybridlm_kernels.triton_support import parallel_programs

LARGEST_EXPONENT = 60.0  # of 2, in a product of pairs that meet at once; bf16 and fp32 go to 127
FEW_TOKENS = 16  # up to here, and without gradients, the recurrence itself is faster than chunks
FEW_CHUNKS = 4  # of the longest document: up to here one launch, unless the decay is one a channel
MOST_FUSED_CHUNKS = 64  # up to here one launch, where one program a document and head fills the device
FILLED = 0.8  # of the device, that counts as full
FEWEST_PIECES = 3  # of a document: pieces are scanned twice, so two would gain nothing
COLUMNS = 32  # of the values, that a program of a scan takes, where programs are counted before one is tuned


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
class _Found:
    """What the forward pass keeps besides the inputs; the last two where scans are split."""

    A: Tensor  # [B, T, G, C]
    X: Tensor  # [B, T, G, C]
    factors: Tensor  # [G, 7, B T]
    total: Tensor  # [P, G(, K)]
    starts: Tensor | None = None  # states before pieces [U, G, K, V]
    transitions: Tensor | None = None  # of pieces [U, G, K, K]


class _Launches:
    """One call's sizes and flags, and the launches of its kernels."""

    def __init__(self, x: _Inputs, options: _Options):
        self.x, self.options = x, options
        (self.B, self.T, self.H, self.K), (self.G, self.V) = x.k.shape, x.v.shape[2:]
        self.tokens, self.dtype, self.device = self.B * self.T, x.v.dtype, x.v.device
        self.tables: ChunkTables = chunk_tables(self.B, self.T, options.borders, self.device)
        self.documents = self.B if options.borders is None else options.borders.num_documents
        chunks = self.tables.piece_length(2 * self.documents * self.G * triton.cdiv(self.V, COLUMNS),
                                          parallel_programs(self.device), FEWEST_PIECES)
        self.split = chunks < self.tables.most_chunks
        self.table, self.of_documents = self.tables.pieces(chunks)  # of whole documents where scans are not split
        self.decay = "none" if x.g is None else "channel" if x.g.dim() == 4 else "head"
        gate = options.gate
        self.flags = {
            "DECAY": self.decay, "GATE": "none" if gate is None else gate.kind, "L2NORM": options.qk_l2norm,
            "SIGMOID": options.beta_sigmoid is not None, "EXACT": self.dtype == torch.float32}
        self.merged = merged_levels(gate, self.dtype) if self.decay == "channel" else 0
        self.gate_constant = (1.0 if gate is None else gate.normalizer if gate.kind == "logsigmoid"
                              else gate.lower_bound)
        self.beta_scale = 1.0 if options.beta_sigmoid is None else float(options.beta_sigmoid)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def wide(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def states_of_documents(self) -> Tensor:
        return self.wide(self.documents, self.G, self.K, self.V)

    def forward(self) -> tuple[_Found, Tensor, Tensor]:
        """What the backward pass needs, o [B, T, G, V] and the last states [N, G, K, V]."""
        A, X = (self.empty(self.B, self.T, self.G, CHUNK) for _ in range(2))
        total = self.wide(self.tables.num_chunks, self.G, *([self.K] if self.decay == "channel" else []))
        found = _Found(A, X, self.wide(self.G, FACTORS.value, self.tokens), total)
        o, last = self.empty(*self.x.v.shape), self.states_of_documents()
        if self.in_one_launch():
            self.fused(found, o, last)
            return found, o, last
        decayed = self.chunk(found, scores=True)
        if self.split:
            found = self.starts(found, decayed, last)
        self.scan(found, decayed, "outputs", self.x.state if found.starts is None else found.starts, o=o,
                  last=None if self.split else last)
        return found, o, last

    def in_one_launch(self) -> bool:
        """Whether chunks and scan go together: it moves fewer bytes, and prepares the chunks of a document one after
        another, which costs nothing where there are few or where other documents and heads fill the device."""
        longest, parallel = self.tables.most_chunks, parallel_programs(self.device)
        if self.decay == "channel":  # programs of twice the size, each with memory for a whole chunk
            parallel //= 2
            if self.documents * CHUNK > self.tokens:
                return False
        elif longest <= FEW_CHUNKS:
            return True
        return longest <= MOST_FUSED_CHUNKS and self.tables.filling(self.G, parallel) >= FILLED

    def fused(self, found: _Found, o: Tensor, last: Tensor) -> None:
        x = self.x
        scratch = self.empty(self.documents * self.G, 3, CHUNK, self.K) if self.decay == "channel" else None
        kernel = fused_channel_kernel if self.decay == "channel" else fused_kernel
        kernel[(self.documents * self.G,)](
            x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, x.state, self.tables.documents, found.A, found.X,
            found.factors, found.total, scratch, o, last, self.options.scale, self.gate_constant, self.beta_scale,
            self.tokens, self.H, self.G, K=self.K, V=self.V, PADDED=_padded(self.K), MERGED=self.merged, **self.flags)

    def chunk(self, found: _Found, scores: bool) -> tuple[Tensor, ...]:
        """The queries, keys and writes that the scans take; with `scores` A, X and what goes with them, too."""
        x, channel = self.x, self.decay == "channel"
        decayed = tuple(self.empty(self.B, self.T, self.G, self.K) for _ in range(3)) if channel else (x.q, x.k, x.k)
        if channel or scores:
            chunk_kernel[(self.tables.num_chunks, self.G, 2)](
                x.q, x.k, x.g, x.beta, x.A_log, x.dt_bias, self.tables.chunks, found.A, found.X, found.factors,
                found.total, *decayed, self.options.scale, self.gate_constant, self.beta_scale, self.tokens, self.H,
                self.G, K=self.K, SCORES=scores, MERGED=self.merged, **self.flags)
        return decayed

    def decode(self) -> tuple[Tensor, Tensor]:
        """o [B, T, G, V] and the last states [N, G, K, V], token by token."""
        x, flags = self.x, {name: self.flags[name] for name in ("DECAY", "GATE", "L2NORM", "SIGMOID")}
        o = self.empty(*x.v.shape)
        last = self.states_of_documents()
        block = min(32, max(16, triton.next_power_of_2(self.V)))
        decode_kernel[(self.documents * self.G * triton.cdiv(self.V, block),)](
            x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, x.state, self.tables.documents, o, last,
            self.options.scale, self.gate_constant, self.beta_scale, self.H, self.G, K=self.K, V=self.V,
            BK=triton.next_power_of_2(self.K), BV=block, **flags)
        return o, last

    def _scan(self, blocks: Callable[[int], int]) -> tuple[Callable[[dict[str, Any]], tuple[int]], dict[str, Any]]:
        """The grid of a scan, so many blocks of columns a document or piece, and its constants."""
        return lambda sizes: (len(self.table) * self.G * blocks(sizes["BV"]),), {
            "K": self.K, "V": self.V, "BK": _padded(self.K), "CHANNEL": self.decay == "channel",
            "EXACT": self.flags["EXACT"]}

    def _blocks_of_values(self, columns: int) -> int:
        return triton.cdiv(self.V, columns)

    def scan(self, found: _Found, decayed: tuple[Tensor, ...], mode: str, start: Tensor | None,
             **outputs: Tensor | None) -> None:
        """From the states before documents or pieces; as `scan_kernel` says."""
        grid, sizes = self._scan(lambda columns: self._blocks_of_values(columns)
                                 + (triton.cdiv(self.K, columns) if mode == "pieces" else 0))
        names = ("o", "last", "transitions", "states", "y")
        scan_kernel[grid](
            *decayed, self.x.v, found.A, found.X, found.factors, found.total, start, self.table,
            *(outputs.get(name) for name in names), self.tokens, self.H, self.G, MODE=mode, **sizes)

    def starts(self, found: _Found, decayed: tuple[Tensor, ...], last: Tensor) -> _Found:
        """With the states that pieces start from and their transitions; writes the last states."""
        U = len(self.table)
        starts, transitions = self.wide(U, self.G, self.K, self.V), self.wide(U, self.G, self.K, self.K)
        self.scan(found, decayed, "pieces", None, last=starts, transitions=transitions)
        self.join(starts, transitions, self.x.state, last, reverse=False)
        return replace(found, starts=starts, transitions=transitions)

    def join(self, states: Tensor, transitions: Tensor, start: Tensor | None, last: Tensor, reverse: bool) -> None:
        join_kernel[(self.documents * self.G * self._blocks_of_values(COLUMNS),)](
            states, transitions, start, self.of_documents, last, self.G, Y=self.K, Z=self.V, BY=_padded(self.K),
            BZ=COLUMNS, TRANSITION="matrix", REVERSE=reverse, EXACT=self.flags["EXACT"])

    def states(self, found: _Found, decayed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Y [B, T, G, V] and the states before every chunk [P, G, K, V]."""
        y, states = self.empty(*self.x.v.shape), self.empty(self.tables.num_chunks, self.G, self.K, self.V)
        self.scan(found, decayed, "states", found.starts if self.split else self.x.state, y=y, states=states)
        return y, states

    def scan_back(self, found: _Found, decayed: tuple[Tensor, ...], do: Tensor,
                  d_last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Z [B, T, G, V], the gradients of the states after every chunk [P, G, K, V] and of the initial ones."""
        z, d_states = self.empty(*self.x.v.shape), self.empty(self.tables.num_chunks, self.G, self.K, self.V)
        d_first = self.states_of_documents()
        grid, sizes = self._scan(self._blocks_of_values)

        def launch(d_last: Tensor | None, d_states: Tensor | None, z: Tensor | None, d_first: Tensor | None) -> None:
            scan_back_kernel[grid](
                *decayed, do, found.A, found.X, found.factors, found.total, d_last, self.table, d_states, z, d_first,
                self.tokens, self.H, self.G, PIECES=z is None, **sizes)

        if found.transitions is None:
            launch(d_last, d_states, z, d_first)
        else:
            ends = self.wide(len(self.table), self.G, self.K, self.V)
            launch(None, None, None, ends)
            self.join(ends, found.transitions, d_last, d_first, reverse=True)
            launch(ends, d_states, z, None)
        return z, d_states, d_first

    def gradients(self, found: _Found, do: Tensor, y: Tensor, z: Tensor, states: Tensor, d_states: Tensor,
                  needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Of q, k, v, g, beta, A_log and dt_bias, None where there is none or `needed` says it is not wanted."""
        x, P = self.x, self.tables.num_chunks
        dq, dk = (self.empty(self.B, self.T, self.G, self.K) for _ in range(2))
        dv = self.empty(*x.v.shape)
        dg = torch.empty_like(x.g) if x.g is not None and any((needed[3], needed[5], needed[6])) else None
        d_beta = torch.empty_like(x.beta) if x.beta is not None and needed[4] else None
        d_A_log = self.wide(P, self.G) if x.A_log is not None and needed[5] else None
        d_bias = self.wide(P, *x.dt_bias.shape) if x.dt_bias is not None and needed[6] else None
        gradients_kernel[(P, self.G)](
            x.q, x.k, x.g, x.A_log, x.dt_bias, do, y, z, found.A, found.factors, found.total, states, d_states,
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
        found, o, last = _Launches(inputs, options).forward()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*vars(inputs).values(), *vars(found).values())
        return o, last

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, d_last: Tensor) -> Any:
        saved = ctx.saved_tensors  # read once: a checkpointed layer unpacks each saved tensor a single time
        inputs, found = _Inputs(*saved[:8]), _Found(*saved[8:])
        launches = _Launches(inputs, ctx.options)
        decayed = launches.chunk(found, scores=False)
        y, states = launches.states(found, decayed)
        do, d_last = do.contiguous(), d_last.contiguous()
        z, d_states, d_first = launches.scan_back(found, decayed, do, d_last)
        gradients = launches.gradients(found, do, y, z, states, d_states, ctx.needs_input_grad)
        return *gradients, None if inputs.state is None else d_first.to(inputs.state.dtype), None


def merged_levels(gate: Gate | None, dtype: torch.dtype) -> int:
    """How many levels of the pairs of a chunk one product may take (`triton_chunk._channel_scores`): as many as keep
    every exponent within `LARGEST_EXPONENT`, whatever the gate's input. None without a bound, or in fp16."""
    if gate is None or gate.kind != "lower_bounded" or dtype == torch.float16:
        return 0
    tokens = LARGEST_EXPONENT / (-gate.lower_bound * math.log2(math.e))  # in half a block
    levels = min(int(LEVELS.value), 1 + math.floor(math.log2(tokens))) if tokens >= 1 else 0
    return levels if levels > 1 else 0  # one level by itself is what the others are


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
