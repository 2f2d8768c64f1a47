"""Linear attention with decay as Triton kernels: forward and backward by chunks, and the recurrence for decoding.

With no decay, a constant or a scalar one, o, dq, dk and dv are the same sum with names exchanged: one launch of
`scan_kernel` each, after one that sums up the gates of a scalar decay. Where gates learn, the states of chunks and the
scores of pairs are stored as well. With a decay per channel, `chunk_kernel` goes before the scans and
`gradients_kernel` after them. Where heads are few, documents are cut into segments that are scanned side by side.
Without a decay per channel, values wider than the widest keys are taken in pieces where something learns.

Legend: B rows, T tokens per row, H key heads, HV value heads, K/V key/value head dim, N documents, U segments of
documents, C tokens per chunk, P chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from hybridlm_kernels.ops.linear_attention.triton_channel import chunk_kernel, gradients_kernel, pair_gradients_kernel
from hybridlm_kernels.ops.linear_attention.triton_decode import decode_kernel
from hybridlm_kernels.ops.linear_attention.triton_scan import (
    ROWS,
    gate_gradient_kernel,
    pairs_kernel,
    scan_kernel,
    token_decays_kernel,
)
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.arguments import MAX_KEY_DIM, MAX_KEY_DIM_FP32
from hybridlm_kernels.recurrence.gates import Gate, parameters_of
from hybridlm_kernels.recurrence.triton_channel_pairs import merged_levels
from hybridlm_kernels.recurrence.triton_chunk_tables import CHUNK_TOKENS, get_chunk_tables
from hybridlm_kernels.recurrence.triton_join import join_kernel
from hybridlm_kernels.triton_support import fill_device, parallel_programs

# Up to so many tokens, and without gradients, the recurrence itself is faster than chunks.
RECURRENT_MAX_TOKENS = 16
# Segments per document from which two scans side by side are faster than one.
MIN_SEGMENTS_PER_DOCUMENT = 2


def linear_attention(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, scale: float,
                     state_NHvKV: Tensor | None, borders: CuSeqlens | None,
                     gate: Gate | None = None, final_state: bool = True) -> tuple[Tensor, Tensor]:
    """The Triton backend; arguments as in the public function, already checked."""
    if g is not None and g.dim() == 1 and g.requires_grad:  # rare: its gradient is that of a decay per token, summed
        g = g.expand(v_BTHvV.shape[:3])
    tensors = (q_BTHK.to(v_BTHvV.dtype), k_BTHK.to(v_BTHvV.dtype), v_BTHvV, g, *parameters_of(gate), state_NHvKV)
    inputs: list[Any] = [None if x is None else x.contiguous() for x in tensors]
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    widest = MAX_KEY_DIM_FP32 if v_BTHvV.dtype == torch.float32 else MAX_KEY_DIM
    if learns and v_BTHvV.shape[3] > widest and (g is None or g.dim() < 4):  # gradients have states of whole values
        values = v_BTHvV.split(widest, 3)
        states = [None] * len(values) if state_NHvKV is None else state_NHvKV.split(widest, 3)
        pieces = [linear_attention(q_BTHK, k_BTHK, v, g, scale, state, borders, gate, final_state)
                  for v, state in zip(values, states, strict=True)]
        return torch.cat([o for o, _ in pieces], 3), torch.cat([state for _, state in pieces], 3)
    if borders is None and q_BTHK.shape[1] <= RECURRENT_MAX_TOKENS and not learns:
        return _LinearAttentionLaunches(_LinearAttentionInputs(*inputs), scale, None, gate).decode()
    return _TritonLinearAttention.apply(*inputs, scale, borders, gate, final_state)


@dataclass(frozen=True)
class _LinearAttentionInputs:
    """The tensors of a call, contiguous."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, HV, V]
    g: Tensor | None  # [HV], [B, T, HV] or [B, T, HV, K]
    A_log: Tensor | None  # [HV]
    dt_bias: Tensor | None  # [HV(, K)]
    state: Tensor | None  # [N, HV, K, V]


class _TritonLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, A_log: Tensor | None,
                dt_bias: Tensor | None, state: Tensor | None, scale: float, borders: CuSeqlens | None,
                gate: Gate | None, final_state: bool) -> Any:
        inputs = _LinearAttentionInputs(q, k, v, g, A_log, dt_bias, state)
        launches = _LinearAttentionLaunches(inputs, scale, borders, gate)
        if launches.decay == "channel":
            queries, writes, _, A, decays = launches.chunk()
            o, last = launches.scan(queries, writes, v, state, A, decays, final=final_state)
        else:
            A = launches.scores() if any(ctx.needs_input_grad[3:6]) else None
            decays = launches.token_decays() if launches.decay == "scalar" else None
            o, last = launches.scan(q, k, v, state, A, decays, pairs=True, final=final_state)
        ctx.save_for_backward(*vars(inputs).values(), A, decays)
        ctx.options = scale, borders, gate
        ctx.set_materialize_grads(False)
        return o, launches.wide(0, launches.HV, launches.K, launches.V) if last is None else last

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor | None, d_last: Tensor | None) -> Any:
        *inputs, A, decays = ctx.saved_tensors  # read once: a checkpointed layer unpacks each tensor a single time
        launches = _LinearAttentionLaunches(_LinearAttentionInputs(*inputs), *ctx.options)
        do = torch.zeros_like(inputs[2]) if do is None else do.contiguous()
        d_last = None if d_last is None or not d_last.numel() else d_last.contiguous()
        if launches.decay == "channel":
            gradients = launches.channel_backward(do, d_last, A, decays, ctx.needs_input_grad)
        else:
            gradients = launches.scalar_backward(do, d_last, A, decays, ctx.needs_input_grad)
        return *gradients, None, None, None, None


class _LinearAttentionLaunches:
    """The sizes and flags of one call, and the launches of its kernels."""

    def __init__(self, x: _LinearAttentionInputs, scale: float, borders: CuSeqlens | None, gate: Gate | None):
        self.x, self.scale = x, float(scale)
        (self.B, self.T, self.H, self.K), (self.HV, self.V) = x.k.shape, x.v.shape[2:]
        self.tokens, self.dtype, self.device = self.B * self.T, x.v.dtype, x.v.device
        self.tables = get_chunk_tables(self.B, self.T, borders, self.device)
        self.documents = self.B if borders is None else borders.num_documents
        self.decay = "none" if x.g is None else ("constant", "scalar", "channel")[max(0, x.g.dim() - 2)]
        constant = 1.0
        if gate is not None:
            constant = gate.normalizer if gate.kind == "logsigmoid" else gate.lower_bound
        self.gate_arguments = {
            "g_ptr": x.g, "A_log_ptr": x.A_log, "bias_ptr": x.dt_bias, "gate_constant": float(constant),
            "GATE": "none" if gate is None else gate.kind}
        self.exact = self.dtype == torch.float32
        self.merged, self.checked = merged_levels(gate, self.dtype) if self.decay == "channel" else (0, False)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A new tensor, by default in the dtype of the values."""
        return torch.empty(*shape, dtype=dtype or self.dtype, device=self.device)

    def wide(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor in float32, or in another type of more than 16 bits."""
        return self.empty(*shape, dtype=dtype)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The outputs and last states by the recurrence."""
        x = self.x
        o, last = torch.empty_like(x.v), self.wide(self.B, self.HV, self.K, self.V)
        columns = min(_padded(self.V), max(16, 4096 // _padded(self.K)))
        decode_kernel[(self.B * self.HV * triton.cdiv(self.V, columns),)](
            q_ptr=x.q, k_ptr=x.k, v_ptr=x.v, state_ptr=x.state, o_ptr=o, last_ptr=last, scale=self.scale, T=self.T,
            H=self.H, HV=self.HV, K=self.K, V=self.V, BK=_padded(self.K), BV=columns, DECAY=self.decay,
            **self.gate_arguments)
        return o, last

    def chunk(self, scores: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Queries, writes and sums of log2 decays [B, T, HV, K].

        With `scores` also A [B, T, HV, C] and the decay of chunks [P, HV, K].
        """
        x, P = self.x, self.tables.num_chunks
        queries, writes = (self.empty(self.B, self.T, self.HV, self.K) for _ in range(2))
        sums = self.wide(self.B, self.T, self.HV, self.K, dtype=torch.float64 if self.exact else torch.float32)
        A = self.scores() if scores else None
        total = self.wide(P, self.HV, self.K) if scores else None
        chunk_kernel[(P, self.HV)](
            q_ptr=x.q, k_ptr=x.k, chunks_ptr=self.tables.chunks, A_ptr=A, total_ptr=total, sums_ptr=sums,
            queries_ptr=queries, writes_ptr=writes, scale=self.scale, H=self.H, HV=self.HV, K=self.K, SCORES=scores,
            MERGED=self.merged, CHECKED=self.checked, EXACT=self.exact, **self.gate_arguments)
        return queries, writes, sums, A, total

    def scores(self) -> Tensor:
        """A new tensor for the scores of pairs, [B, T, HV, C]."""
        return self.empty(self.B, self.T, self.HV, CHUNK_TOKENS)

    def token_decays(self) -> Tensor:
        """The decays per token that scans read, [P, HV, 4, C]; as `token_decays_kernel` says."""
        decays = self.wide(self.tables.num_chunks, self.HV, ROWS.value, CHUNK_TOKENS)
        token_decays_kernel[(self.tables.num_chunks, self.HV)](
            chunks_ptr=self.tables.chunks, decays_ptr=decays, HV=self.HV, num_warps=2, **self.gate_arguments)
        return decays

    def pairs(self, x: Tensor, y: Tensor, other: Tensor, dots: Tensor, decays: Tensor) -> Tensor:
        """The scores A [B, T, HV, C] of x against y; as `pairs_kernel` says."""
        A, Y = self.scores(), y.shape[3]
        pairs_kernel[(self.tables.num_chunks, self.HV)](
            x_ptr=x, y_ptr=y, decays_ptr=decays, chunks_ptr=self.tables.chunks, A_ptr=A, other_ptr=other, dots_ptr=dots,
            scale=self.scale, HV=self.HV, XY_GROUP=self.HV // y.shape[2], Y=Y, BY=min(64, _padded(Y)), EXACT=self.exact)
        return A

    def scan(self, x: Tensor, y: Tensor, z: Tensor, start: Tensor | None, A: Tensor | None,
             decays: Tensor | None, *, reverse: bool = False, output: bool = True, pairs: bool = False,
             states: Tensor | None = None, w: Tensor | None = None, dots: Tensor | None = None,
             carry: Tensor | None = None, final: bool = False) -> tuple[Tensor, Tensor | None]:
        """The sums out [B, T, HV, Z] and, if `final`, the states [N, HV, Y, Z] after the scan; as `scan_kernel` says.

        `decays` are those of chunks with a decay per channel, those of `token_decays` with one per token. Writes
        `states`, unless `carry` is given, for which it reads them.
        """
        Y, Z = y.shape[3], z.shape[3]
        sizes = {"Y": Y, "Z": Z, "BY": _padded(Y), "BZ": self.columns(Y, Z)}
        blocks = triton.cdiv(Z, sizes["BZ"])
        out = self.empty(self.B, self.T, self.HV, Z) if output else None
        last = self.wide(self.documents, self.HV, Y, Z) if final else None

        def launch(segments: Tensor, start: Tensor | None, last: Tensor | None, total_of_segments: Tensor | None,
                   output: bool, learn: bool) -> None:
            programs = len(segments) * self.HV * blocks
            scan_kernel[(programs,)](
                x_ptr=x, y_ptr=y, z_ptr=z, w_ptr=w, A_ptr=A, g_ptr=self.x.g if self.decay == "constant" else None,
                decays_ptr=decays if self.decay == "scalar" else None,
                chunk_total_ptr=decays if self.decay == "channel" else None, start_ptr=start, segments_ptr=segments,
                out_ptr=out if output else None, last_ptr=last, total_ptr=total_of_segments,
                states_ptr=states if learn else None, dots_ptr=dots if learn else None,
                carry_ptr=carry if learn else None, scale=self.scale, tokens=self.tokens,
                chunks=self.tables.num_chunks, full=fill_device(programs, self.device), HV=self.HV,
                XY_GROUP=self.HV // y.shape[2], Z_GROUP=self.HV // z.shape[2], DECAY=self.decay, REVERSE=reverse,
                OUTPUT=output, PAIRS=output and pairs, STATES=learn and states is not None and carry is None,
                DOTS=learn and dots is not None, EXACT=self.exact, **sizes)

        chunks = self.tables.chunks_per_segment(
            self.documents * self.HV * blocks,
            lambda: self._scans_side_by_side(sizes, x, y, z, pairs and output, reverse), MIN_SEGMENTS_PER_DOCUMENT)
        if chunks >= self.tables.max_chunks:
            launch(self.tables.documents, start, last, None, output, True)
            return out, last  # type: ignore[return-value]
        segments, segments_of_documents = self.tables.segments(chunks)
        channel = self.decay == "channel"
        starts = self.wide(len(segments), self.HV, Y, Z)
        total_of_segments = self.wide(len(segments), self.HV, *([Y] if channel else []))
        launch(segments, None, starts, total_of_segments, False, False)
        join_kernel[(self.documents * self.HV * blocks,)](
            states_ptr=starts, transitions_ptr=total_of_segments, start_ptr=start,
            segments_of_documents_ptr=segments_of_documents, last_ptr=last, HV=self.HV, **sizes,
            TRANSITION="channel" if channel else "scalar", REVERSE=reverse, EXACT=self.exact)
        if output or states is not None:
            launch(segments, starts, None, None, output, True)
        return out, last  # type: ignore[return-value]

    def _scans_side_by_side(self, sizes: dict[str, int], x: Tensor, y: Tensor, z: Tensor, pairs: bool,
                            reverse: bool) -> int:
        """Programs of a scan that the device runs side by side, by the kernel as it is built for it."""
        dtypes = {"x_ptr": x.dtype, "y_ptr": y.dtype, "z_ptr": z.dtype, "A_ptr": self.dtype, "out_ptr": self.dtype,
                  "segments_ptr": torch.int64, "start_ptr": torch.float32}
        if self.decay == "channel":
            dtypes["chunk_total_ptr"] = torch.float32
        elif self.decay == "scalar":
            dtypes["decays_ptr"] = torch.float32
        elif self.x.g is not None:
            dtypes["g_ptr"] = self.x.g.dtype
        flags = {"OUTPUT": True, "PAIRS": pairs, "STATES": False, "DOTS": False, "EXACT": self.exact}
        return parallel_programs(self.device, scan_kernel, dtypes, sizes | flags | {
            "HV": self.HV, "XY_GROUP": self.HV // y.shape[2], "Z_GROUP": self.HV // z.shape[2], "DECAY": self.decay,
            "REVERSE": reverse})

    def columns(self, Y: int, Z: int) -> int:
        """Columns of z per program: fewer where the state would not fit its registers."""
        return min(_padded(Z), 32 if Y > 128 or self.exact else 64)

    def scalar_backward(self, do: Tensor, d_last: Tensor | None, A: Tensor | None, decays: Tensor | None,
                        needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of q, k, v, g, A_log, dt_bias and state, where the decay is not one per channel."""
        x = self.x
        P, blocks = self.tables.num_chunks, triton.cdiv(self.K, self.columns(self.V, self.K))
        M = states = pairs = dots = reverse_dots = carry = None
        if A is not None:
            states, pairs = self.empty(P, self.HV, self.V, self.K), self.wide(self.tokens, self.HV)
            dots, reverse_dots = (self.wide(blocks, self.tokens, self.HV) for _ in range(2))
            carry = self.wide(blocks, P, self.HV)
            assert decays is not None  # only a decay per token learns
            M = self.pairs(do, x.v, A, pairs, decays)
        start = None if x.state is None else x.state.mT.contiguous()
        pairs_in_scan = M is None
        dq, _ = self.scan(do, x.v, x.k, start, M, decays, pairs=pairs_in_scan, states=states, w=x.q, dots=dots)
        d_end = None if d_last is None else d_last.mT.contiguous()
        dk, _ = self.scan(x.v, do, x.q, d_end, M, decays, reverse=True, pairs=pairs_in_scan, states=states,
                          w=x.k, dots=reverse_dots, carry=carry)
        dv, d_state = self.scan(x.k, x.q, do, d_last, A, decays, reverse=True, pairs=pairs_in_scan, final=needed[6])
        gates: list[Tensor | None] = [None, None, None]
        if A is not None:
            gates = self._gate_gradients(pairs, dots, reverse_dots, carry, needed)
        return [self._sum_value_heads(dq), self._sum_value_heads(dk), dv, *gates, self._d_state(d_state)]

    def _gate_gradients(self, pairs: Tensor | None, dots: Tensor | None, reverse_dots: Tensor | None,
                        carry: Tensor | None, needed: tuple[bool, ...]) -> list[Tensor | None]:
        x, P = self.x, self.tables.num_chunks
        assert x.g is not None
        assert dots is not None
        dg = torch.empty_like(x.g)
        d_A_log = self.wide(P, self.HV) if needed[4] else None
        d_bias = self.wide(P, self.HV) if needed[5] else None
        gate_gradient_kernel[(P, self.HV)](
            pairs_ptr=pairs, dots_ptr=dots, reverse_dots_ptr=reverse_dots, carry_ptr=carry,
            chunks_ptr=self.tables.chunks, dg_ptr=dg, d_A_log_ptr=d_A_log, d_bias_ptr=d_bias, tokens=self.tokens,
            chunks=P, HV=self.HV, BLOCKS=dots.shape[0], **self.gate_arguments)
        return [dg if needed[3] else None, _sum_chunks(d_A_log, x.A_log), _sum_chunks(d_bias, x.dt_bias)]

    def channel_backward(self, do: Tensor, d_last: Tensor | None, A: Tensor, total: Tensor,
                         needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of q, k, v, g, A_log, dt_bias and state, with a decay per channel."""
        x, P = self.x, self.tables.num_chunks
        queries, writes, decays, _, _ = self.chunk(scores=False)
        states, d_states = (self.empty(P, self.HV, self.K, self.V) for _ in range(2))
        self.scan(writes, writes, x.v, x.state, A, total, output=False, states=states)
        dv, d_state = self.scan(writes, queries, do, d_last, A, total, reverse=True, states=d_states,
                                final=needed[6])
        dq, dk = (self.empty(self.B, self.T, self.HV, self.K) for _ in range(2))
        dg = torch.empty_like(x.g) if any(needed[3:6]) else None  # type: ignore[arg-type]
        d_A_log = self.wide(P, self.HV) if needed[4] else None
        d_bias = self.wide(P, self.HV, self.K) if needed[5] else None
        pairs: dict[str, Any] = {
            "itself_ptr": self.wide(self.tokens, self.HV), "dq_pairs_ptr": torch.empty_like(dq),
            "dk_pairs_ptr": torch.empty_like(dk), "dg_pairs_ptr": None if dg is None else torch.empty_like(dg)}
        shared: dict[str, Any] = pairs | {
            "q_ptr": x.q, "k_ptr": x.k, "v_ptr": x.v, "do_ptr": do, "sums_ptr": decays,
            "chunks_ptr": self.tables.chunks, "scale": self.scale, "H": self.H, "HV": self.HV, "K": self.K,
            "V": self.V, "EXACT": self.exact}
        pair_gradients_kernel[(P, self.HV)](scratch_ptr=self.scores(), MERGED=self.merged, **shared)
        gradients_kernel[(P, self.HV)](
            S_ptr=states, dS_ptr=d_states, total_ptr=total, dq_ptr=dq, dk_ptr=dk, dg_ptr=dg, d_A_log_ptr=d_A_log,
            d_bias_ptr=d_bias, **shared, **self.gate_arguments)
        return [self._sum_value_heads(dq), self._sum_value_heads(dk), dv, dg if needed[3] else None,
                _sum_chunks(d_A_log, x.A_log), _sum_chunks(d_bias, x.dt_bias), self._d_state(d_state)]

    def _sum_value_heads(self, d_BTHvK: Tensor) -> Tensor:
        return d_BTHvK if self.H == self.HV else d_BTHvK.unflatten(2, (self.H, -1)).sum(3)

    def _d_state(self, d_state: Tensor | None) -> Tensor | None:
        return None if d_state is None or self.x.state is None else d_state.to(self.x.state.dtype)


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _sum_chunks(d: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if d is None or like is None else d.sum(0).to(like.dtype)
