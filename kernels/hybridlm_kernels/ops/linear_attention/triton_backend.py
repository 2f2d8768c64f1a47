"""Linear attention with decay as Triton kernels: forward and backward by chunks, and the recurrence for decoding.

With no decay, a constant one or one a head, o, dq, dk and dv are the same sum with names exchanged: one launch of
`scan_kernel` each. Where gates learn, the states of chunks and the scores of pairs are stored as well. With a decay a
channel, `chunk_kernel` goes before the scans and `gradients_kernel` behind them. Where heads are few, documents are cut
into pieces that are scanned side by side.

Legend: B rows, T tokens a row, H key heads, G value heads, K/V key/value head dim, N documents, U pieces of
documents, C tokens a chunk, P chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hybridlm_kernels.ops.linear_attention.triton_channel import chunk_kernel, gradients_kernel
from hybridlm_kernels.ops.linear_attention.triton_decode import decode_kernel
from hybridlm_kernels.ops.linear_attention.triton_scan import gate_gradient_kernel, pairs_kernel, scan_kernel
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.gates import Gate, parameters_of
from hybridlm_kernels.recurrence.triton_chunk_tables import CHUNK, chunk_tables
from hybridlm_kernels.recurrence.triton_join import join_kernel
from hybridlm_kernels.triton_support import parallel_programs

FEW_TOKENS = 16  # up to here, without gradients, the recurrence itself is faster than chunks
CHANNELS, CHANNELS_LEARNT = 32, 16  # at a time, in the kernels of a decay a channel: what their registers hold


@torch.compiler.disable
def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTGV: Tensor, g: Tensor | None, scale: float,
                    state_NGKV: Tensor | None, borders: CuSeqlens | None,
                    gate: Gate | None = None) -> tuple[Tensor, Tensor]:
    """Arguments as in the public function, already checked."""
    if g is not None and g.dim() == 1 and g.requires_grad:  # rare: its gradient is that of one a token, summed
        g = g.expand(v_BTGV.shape[:3])
    tensors = (q_BTHK.to(v_BTGV.dtype), k_BTHK.to(v_BTGV.dtype), v_BTGV, g, *parameters_of(gate), state_NGKV)
    inputs: list[Any] = [None if x is None else x.contiguous() for x in tensors]
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if borders is None and q_BTHK.shape[1] <= FEW_TOKENS and not learns:
        return _Launches(_Inputs(*inputs), scale, None, gate).decode()
    return _LinearAttention.apply(*inputs, scale, borders, gate)


@dataclass(frozen=True)
class _Inputs:
    """The tensors of a call, contiguous."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, G, V]
    g: Tensor | None  # [G], [B, T, G] or [B, T, G, K]
    A_log: Tensor | None  # [G]
    dt_bias: Tensor | None  # [G(, K)]
    state: Tensor | None  # [N, G, K, V]


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, A_log: Tensor | None,
                dt_bias: Tensor | None, state: Tensor | None, scale: float, borders: CuSeqlens | None,
                gate: Gate | None) -> Any:
        inputs = _Inputs(q, k, v, g, A_log, dt_bias, state)
        launches = _Launches(inputs, scale, borders, gate)
        if launches.decay == "channel":
            queries, writes, A, total = launches.chunk()
            o, last = launches.scan(queries, writes, v, state, A, total)
        else:
            A = launches.scores() if any(ctx.needs_input_grad[3:6]) else None
            total = None
            o, last = launches.scan(q, k, v, state, A, pairs=True)
        ctx.save_for_backward(*vars(inputs).values(), A, total)
        ctx.options = scale, borders, gate
        return o, last

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor, d_last: Tensor) -> Any:
        *inputs, A, total = ctx.saved_tensors  # read once: a checkpointed layer unpacks each saved tensor a single time
        launches = _Launches(_Inputs(*inputs), *ctx.options)
        do, d_last = do.contiguous(), d_last.contiguous()
        if launches.decay == "channel":
            gradients = launches.backward_of_channels(do, d_last, A, total, ctx.needs_input_grad)
        else:
            gradients = launches.backward_of_heads(do, d_last, A, ctx.needs_input_grad)
        return *gradients, None, None, None


class _Launches:
    """One call's sizes and flags, and the launches of its kernels."""

    def __init__(self, x: _Inputs, scale: float, borders: CuSeqlens | None, gate: Gate | None):
        self.x, self.scale = x, float(scale)
        (self.B, self.T, self.H, self.K), (self.G, self.V) = x.k.shape, x.v.shape[2:]
        self.tokens, self.dtype, self.device = self.B * self.T, x.v.dtype, x.v.device
        self.tables = chunk_tables(self.B, self.T, borders, self.device)
        self.documents = self.B if borders is None else borders.num_documents
        self.decay = "none" if x.g is None else ("constant", "head", "channel")[max(0, x.g.dim() - 2)]
        constant = 1.0 if gate is None else gate.normalizer if gate.kind == "logsigmoid" else gate.lower_bound
        self.gate_inputs = (x.g, x.A_log, x.dt_bias, float(constant))
        self.gate = "none" if gate is None else gate.kind
        self.exact = self.dtype == torch.float32

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def wide(self, *shape: int) -> Tensor:
        return self.empty(*shape, dtype=torch.float32)

    def decode(self) -> tuple[Tensor, Tensor]:
        """(o, last states) by the recurrence."""
        o, last = torch.empty_like(self.x.v), self.wide(self.B, self.G, self.K, self.V)
        columns = min(_padded(self.V), max(16, 4096 // _padded(self.K)))
        decode_kernel[(self.B * self.G * triton.cdiv(self.V, columns),)](
            self.x.q, self.x.k, self.x.v, *self.gate_inputs, self.x.state, o, last, self.scale, self.T, self.H, self.G,
            K=self.K, V=self.V, BK=_padded(self.K), BV=columns, DECAY=self.decay, GATE=self.gate)
        return o, last

    def chunk(self, scores: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Queries and writes [B, T, G, K]; with scores A [B, T, G, C] and the decay of chunks [P, G, K]."""
        x, P = self.x, self.tables.num_chunks
        queries, writes = (self.empty(self.B, self.T, self.G, self.K) for _ in range(2))
        A = self.scores() if scores else None
        total = self.wide(P, self.G, self.K) if scores else None
        chunk_kernel[(P, self.G)](
            x.q, x.k, *self.gate_inputs, self.tables.chunks, A, total, queries, writes, self.scale, self.H, self.G,
            K=self.K, BK=min(CHANNELS, _padded(self.K)), GATE=self.gate, SCORES=scores,
            EXACT=self.exact)
        return queries, writes, A, total

    def scores(self) -> Tensor:
        return self.empty(self.B, self.T, self.G, CHUNK)

    def pairs(self, x: Tensor, y: Tensor, other: Tensor, dots: Tensor) -> Tensor:
        """The scores A [B, T, G, C] of x against y; as `pairs_kernel` says."""
        A, Y = self.scores(), y.shape[3]
        pairs_kernel[(self.tables.num_chunks, self.G)](
            x, y, *self.gate_inputs, self.tables.chunks, A, other, dots, self.scale, self.G, self.G // y.shape[2], Y=Y,
            BY=min(64, _padded(Y)), GATE=self.gate, EXACT=self.exact)
        return A

    def scan(self, x: Tensor, y: Tensor, z: Tensor, start: Tensor | None, A: Tensor | None,
             total: Tensor | None = None, *, reverse: bool = False, output: bool = True, pairs: bool = False,
             states: Tensor | None = None, w: Tensor | None = None, dots: Tensor | None = None,
             carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """out [B, T, G, Z] and the states [N, G, Y, Z] after the scan; as `scan_kernel` says.

        Writes `states`, unless `carry` is given, for which it reads them.
        """
        Y, Z = y.shape[3], z.shape[3]
        sizes = {"Y": Y, "Z": Z, "BY": _padded(Y), "BZ": self.columns(Y, Z)}
        blocks = triton.cdiv(Z, sizes["BZ"])
        out = self.empty(self.B, self.T, self.G, Z) if output else None
        last = self.wide(self.documents, self.G, Y, Z)

        def launch(pieces: Tensor, start: Tensor | None, last: Tensor | None, total_of_pieces: Tensor | None,
                   output: bool, learn: bool) -> None:
            scan_kernel[(len(pieces) * self.G * blocks,)](
                x, y, z, w, A, *self.gate_inputs, total, start, pieces, out if output else None, last, total_of_pieces,
                states if learn else None, dots if learn else None, carry if learn else None, self.scale, self.tokens,
                self.tables.num_chunks, self.G, self.G // y.shape[2], self.G // z.shape[2], **sizes, DECAY=self.decay,
                GATE=self.gate, REVERSE=reverse, OUTPUT=output, PAIRS=output and pairs,
                STATES=learn and states is not None and carry is None, DOTS=learn and dots is not None,
                EXACT=self.exact)

        chunks = self.tables.piece_length(self.documents * self.G * blocks, parallel_programs(self.device), 2)
        if chunks >= self.tables.most_chunks:
            launch(self.tables.documents, start, last, None, output, True)
            return out, last  # type: ignore[return-value]
        pieces, of_documents = self.tables.pieces(chunks)
        alone = self.wide(len(pieces), self.G, Y, Z)
        channel = self.decay == "channel"
        total_of_pieces = self.wide(len(pieces), self.G, Y) if channel else self.wide(len(pieces), self.G)
        launch(pieces, None, alone, total_of_pieces, False, False)
        join_kernel[(self.documents * self.G * blocks,)](alone, total_of_pieces, start, of_documents, last, self.G,
                                                         **sizes, TRANSITION="channel" if channel else "head",
                                                         REVERSE=reverse, EXACT=self.exact)
        if output or states is not None:
            launch(pieces, alone, None, None, output, True)
        return out, last  # type: ignore[return-value]

    def columns(self, Y: int, Z: int) -> int:
        """Columns of z a program: fewer where the state would not fit its registers."""
        return min(_padded(Z), 32 if Y > 128 or self.exact else 64)

    def backward_of_heads(self, do: Tensor, d_last: Tensor, A: Tensor | None,
                          needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of q, k, v, g, A_log, dt_bias and state, where the decay is not one a channel."""
        x = self.x
        P, blocks = self.tables.num_chunks, triton.cdiv(self.K, self.columns(self.V, self.K))
        M = states = pairs = dots = reverse_dots = carry = None
        if A is not None:
            states, pairs = self.empty(P, self.G, self.V, self.K), self.wide(self.tokens, self.G)
            dots, reverse_dots = (self.wide(blocks, self.tokens, self.G) for _ in range(2))
            carry = self.wide(blocks, P, self.G)
            M = self.pairs(do, x.v, A, pairs)
        start = None if x.state is None else x.state.mT.contiguous()
        here = M is None  # scores are found on the way
        dq, _ = self.scan(do, x.v, x.k, start, M, pairs=here, states=states, w=x.q, dots=dots)
        dk, _ = self.scan(x.v, do, x.q, d_last.mT.contiguous(), M, reverse=True, pairs=here, states=states, w=x.k,
                          dots=reverse_dots, carry=carry)
        dv, d_state = self.scan(x.k, x.q, do, d_last, A, reverse=True, pairs=here)
        gates: list[Tensor | None] = [None, None, None]
        if A is not None:
            gates = self._gate_gradients((pairs, dots, reverse_dots, carry), needed)
        return [self._of_heads(dq), self._of_heads(dk), dv, *gates, self._of_state(d_state, needed)]

    def _gate_gradients(self, dots: tuple[Any, ...], needed: tuple[bool, ...]) -> list[Tensor | None]:
        x, P = self.x, self.tables.num_chunks
        dg = torch.empty_like(x.g)  # type: ignore[arg-type]
        d_A_log = self.wide(P, self.G) if needed[4] else None
        d_bias = self.wide(P, self.G) if needed[5] else None
        gate_gradient_kernel[(P, self.G)](
            *dots, *self.gate_inputs, self.tables.chunks, dg, d_A_log, d_bias, self.tokens, P, self.G,
            BLOCKS=dots[1].shape[0], GATE=self.gate)
        return [dg if needed[3] else None, _of_chunks(d_A_log, x.A_log), _of_chunks(d_bias, x.dt_bias)]

    def backward_of_channels(self, do: Tensor, d_last: Tensor, A: Tensor, total: Tensor,
                             needed: tuple[bool, ...]) -> list[Tensor | None]:
        """As `backward_of_heads`, with a decay a channel."""
        x, P = self.x, self.tables.num_chunks
        queries, writes, _, _ = self.chunk(scores=False)
        states, d_states = (self.empty(P, self.G, self.K, self.V) for _ in range(2))
        self.scan(writes, writes, x.v, x.state, A, total, output=False, states=states)
        dv, d_state = self.scan(writes, queries, do, d_last, A, total, reverse=True, states=d_states)
        dq, dk = (self.empty(self.B, self.T, self.G, self.K) for _ in range(2))
        channels = min(CHANNELS_LEARNT, _padded(self.K))
        blocks = triton.cdiv(self.K, channels)
        learns = any(needed[3:6])
        dg = torch.empty_like(x.g) if learns else None  # type: ignore[arg-type]
        sums = self.wide(self.tokens, self.G, self.K) if learns else None
        d_A_log = self.wide(P, self.G, blocks) if needed[4] else None
        d_bias = self.wide(P, self.G, self.K) if needed[5] else None
        for keys, tensors, pair, out in ((False, (x.q, x.k, do, x.v), (states, d_states), dq),
                                         (True, (x.k, x.q, x.v, do), (d_states, states), dk)):
            gradients_kernel[(P, self.G * blocks)](
                *tensors, *self.gate_inputs, *pair, total, self.tables.chunks, out, sums, dg, d_A_log, d_bias,
                self.scale, self.H, self.G, K=self.K, V=self.V, BK=channels, BV=min(32, _padded(self.V)),
                GATE=self.gate, KEYS=keys, EXACT=self.exact)
        if d_A_log is not None:
            d_A_log = d_A_log.sum(2)
        return [self._of_heads(dq), self._of_heads(dk), dv, dg if needed[3] else None, _of_chunks(d_A_log, x.A_log),
                _of_chunks(d_bias, x.dt_bias), self._of_state(d_state, needed)]

    def _of_heads(self, d_BTGK: Tensor) -> Tensor:
        return d_BTGK if self.H == self.G else d_BTGK.unflatten(2, (self.H, -1)).sum(3)

    def _of_state(self, d_state: Tensor, needed: tuple[bool, ...]) -> Tensor | None:
        return d_state.to(self.x.state.dtype) if needed[6] and self.x.state is not None else None


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _of_chunks(d: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if d is None or like is None else d.sum(0).to(like.dtype)
