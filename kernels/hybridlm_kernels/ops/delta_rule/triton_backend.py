"""The delta rule as Triton kernels: forward and backward by chunks, and the recurrence itself for decoding.

Forward: with a decay per channel `decayed_kernel` multiplies queries and keys by their decays; `chunk_kernel` finds
what does not depend on the state, `scan_kernel` the states and outputs. Backward: `decayed_kernel` and `scan_kernel`
again for the states of all chunks, `scan_back_kernel` for their gradients, `pair_gradients_kernel` (with a decay per
channel) and `gradients_kernel` for those of the inputs. Kept between the two: the inputs, the scores A and X, and eight
numbers per token and head. Where heads are few, documents are cut into segments that are scanned side by side.

An erase key of its own is one more operand. A free erase vector b takes the place of the key, with beta = -1. Values
are then written at a second set of keys, whose scores and their gradients second launches find; the rest is in
`triton_value_keys.py`. Where a token writes several times, k, v and beta have rows, and q, g and o tokens.

Legend: B rows, T tokens per row, H key heads, HV value heads, K/V key/value head dim, N documents, U segments of
documents, C tokens per chunk, P chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from hybridlm_kernels.ops.delta_rule import triton_value_keys
from hybridlm_kernels.ops.delta_rule.steps import spread_over_steps
from hybridlm_kernels.ops.delta_rule.torch_erase import L2NORM_EPSILON
from hybridlm_kernels.ops.delta_rule.triton_chunk import NUM_FACTORS, chunk_kernel
from hybridlm_kernels.ops.delta_rule.triton_decayed import decayed_kernel
from hybridlm_kernels.ops.delta_rule.triton_decode import decode_kernel
from hybridlm_kernels.ops.delta_rule.triton_gradients import gradients_kernel
from hybridlm_kernels.ops.delta_rule.triton_pair_gradients import pair_gradients_kernel
from hybridlm_kernels.ops.delta_rule.triton_scan import scan_back_kernel, scan_kernel
from hybridlm_kernels.ops.delta_rule.triton_solve import BLOCK as SOLVE_BLOCK
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.precision import plain_backward
from hybridlm_kernels.recurrence.erase import Erase, tensors_of
from hybridlm_kernels.recurrence.gates import Gate, log_decay, parameters_of
from hybridlm_kernels.recurrence.triton_channel_pairs import merged_levels
from hybridlm_kernels.recurrence.triton_chunk_tables import CHUNK_TOKENS, ChunkTables, get_chunk_tables
from hybridlm_kernels.recurrence.triton_join import join_kernel
from hybridlm_kernels.triton_support import fill_device, parallel_programs

# Up to so many tokens, and without gradients, the recurrence itself is faster than chunks.
RECURRENT_MAX_TOKENS = 16
# Segments per document: they are scanned twice, so two would gain nothing.
MIN_SEGMENTS_PER_DOCUMENT = 3
# Columns of the values per program of a scan, for counting programs before a scan is tuned.
SCAN_VALUE_COLUMNS = 32
# Columns per program where there are many programs: fewer requests for the keys and scores that they share.
FULL_VALUE_COLUMNS = 64


def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None, beta_BTHv: Tensor | None,
               scale: float, state_NHvKV: Tensor | None, borders: CuSeqlens | None, qk_l2norm: bool,
               gate: Gate | None = None, beta_sigmoid: float | None = None, final_state: bool = True,
               erase: Erase | None = None, steps: int = 1) -> tuple[Tensor, Tensor]:
    """The Triton backend; arguments as in the public function, already checked, with borders in rows of k and v."""
    dtype, free = v_BTHvV.dtype, erase is not None and erase.vector is not None
    longest = v_BTHvV.shape[1] if borders is None else max(borders.lengths)
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (
        q_BTHK, k_BTHK, v_BTHvV, g, beta_BTHv, state_NHvKV, *parameters_of(gate), *tensors_of(erase)))
    if steps > 1 and (free or (longest <= RECURRENT_MAX_TOKENS and not learns)):
        return spread_over_steps(delta_rule)(q_BTHK, k_BTHK, v_BTHvV, g, beta_BTHv, scale, state_NHvKV, borders,
                                             qk_l2norm, gate, beta_sigmoid, final_state, erase, steps)
    if free and qk_l2norm:  # value keys and erase vectors are used as they are
        q_BTHK, k_BTHK, qk_l2norm = _normalize(q_BTHK), _normalize(k_BTHK), False
    if free and (g is None or g.dim() == 3):  # kernels have free erase vectors with a decay per channel alone
        g, gate = log_decay(g, gate), None
        g = torch.zeros_like(v_BTHvV[..., 0]) if g is None else g
        g = g[..., None].expand(*g.shape, k_BTHK.shape[3])
    keys = [q_BTHK, None if erase is None else erase.key, k_BTHK, None]
    if erase is not None and erase.vector is not None:
        keys = [q_BTHK, k_BTHK if erase.key is None else erase.key, erase.vector, k_BTHK]
    heads = max(x.shape[2] for x in keys if x is not None)  # erase keys and vectors may have as many as values
    keys = [None if x is None else _repeat(x.to(dtype), heads) for x in keys]
    tensors: list[Any] = [None if x is None else x.contiguous()
                          for x in (*keys, v_BTHvV, g, beta_BTHv, *parameters_of(gate), state_NHvKV)]
    options = _DeltaRuleOptions(scale, borders, qk_l2norm, gate, beta_sigmoid, final_state,
                                erase is not None and erase.before_decay, steps)
    if longest > RECURRENT_MAX_TOKENS or learns:
        return _TritonDeltaRule.apply(*tensors, options)
    return _DeltaRuleLaunches(_DeltaRuleInputs(*tensors), options).decode()


def _repeat(x_BTHK: Tensor, heads: int) -> Tensor:
    """Every head repeated, so that there are `heads`."""
    return x_BTHK if x_BTHK.shape[2] == heads else x_BTHK.repeat_interleave(heads // x_BTHK.shape[2], 2)


def _normalize(x: Tensor) -> Tensor:
    """The tensor divided by sqrt(sum of squares + 1e-6), in its dtype."""
    square = x.float().square().sum(-1, keepdim=True)
    return (x * torch.rsqrt(square + L2NORM_EPSILON)).to(x.dtype)


@dataclass(frozen=True)
class _DeltaRuleInputs:
    """The tensors of a call, contiguous."""

    q: Tensor  # [B, T / steps, H, K]
    p: Tensor | None  # erase keys [B, T, H, K], where they are not k
    k: Tensor  # [B, T, H, K], free erase vectors where there are value keys
    value_keys: Tensor | None  # [B, T, H, K], where erase vectors are free
    v: Tensor  # [B, T, HV, V]
    g: Tensor | None  # [B, T / steps, HV(, K)]
    beta: Tensor | None  # [B, T, HV]
    A_log: Tensor | None  # [HV]
    dt_bias: Tensor | None  # [HV(, K)]
    state: Tensor | None  # [N, HV, K, V]


@dataclass(frozen=True)
class _DeltaRuleOptions:
    """The arguments of a call that are not tensors."""

    scale: float
    borders: CuSeqlens | None
    qk_l2norm: bool
    gate: Gate | None
    beta_sigmoid: float | None
    final_state: bool
    before_decay: bool
    steps: int  # rows of k, v and beta per token


@dataclass(frozen=True)
class _ForwardResults:
    """Results of the forward pass that the backward pass needs; `starts` and `transitions` where documents are cut into
    segments."""

    A: Tensor  # [B, T / steps, HV, C]
    X: Tensor  # [B, T, HV, C]
    factors: Tensor  # [HV, 8, B T]
    total: Tensor  # [P, HV(, K)]
    value_A: Tensor | None = None  # scores against value keys [B, T, HV, C]
    value_L: Tensor | None = None
    starts: Tensor | None = None  # states before segments [U, HV, K, V]
    transitions: Tensor | None = None  # of segments [U, HV, K, K]


class _DeltaRuleLaunches:
    """The sizes and flags of one call, and the launches of its kernels."""

    def __init__(self, x: _DeltaRuleInputs, options: _DeltaRuleOptions):
        self.x, self.options = x, options
        (self.B, self.T, self.H, self.K), (self.HV, self.V) = x.k.shape, x.v.shape[2:]
        self.tokens, self.dtype, self.device = self.B * self.T, x.v.dtype, x.v.device
        self.tokens_of_queries = self.T // options.steps
        self.tables: ChunkTables = get_chunk_tables(self.B, self.T, options.borders, self.device)
        self.documents = self.B if options.borders is None else options.borders.num_documents
        self.decay = "none"
        if x.g is not None:
            self.decay = "channel" if x.g.dim() == 4 else "scalar"
        chunks = self.tables.chunks_per_segment(
            2 * self.documents * self.HV * self._blocks_of_values(SCAN_VALUE_COLUMNS), self._scans_side_by_side,
            MIN_SEGMENTS_PER_DOCUMENT)
        self.in_segments = chunks < self.tables.max_chunks
        self.segments, self.segments_of_documents = self.tables.segments(chunks)
        self.full = fill_device(len(self.segments) * self.HV * self._blocks_of_values(FULL_VALUE_COLUMNS), self.device)
        gate = options.gate
        self.flags = {
            "DECAY": self.decay, "GATE": "none" if gate is None else gate.kind, "L2NORM": options.qk_l2norm,
            "SIGMOID": options.beta_sigmoid is not None, "BEFORE": options.before_decay and x.g is not None,
            "STEPS": options.steps, "EXACT": self.dtype == torch.float32}
        self.own, self.free = x.p is not None, x.value_keys is not None
        self.merged, self.checked = merged_levels(gate, self.dtype) if self.decay == "channel" else (0, False)
        self.gate_constant = 1.0
        if gate is not None:
            self.gate_constant = gate.normalizer if gate.kind == "logsigmoid" else gate.lower_bound
        self.beta_scale = -1.0 if self.free else 1.0
        if x.beta is not None and options.beta_sigmoid is not None:
            self.beta_scale = float(options.beta_sigmoid)
        self.gate_arguments = {"g_ptr": x.g, "A_log_ptr": x.A_log, "bias_ptr": x.dt_bias,
                               "gate_constant": self.gate_constant}
        self.sizes = {"tokens": self.tokens, "H": self.H, "HV": self.HV}

    def _scans_side_by_side(self) -> int:
        """Programs of a scan of segments that the device runs side by side, by the kernel as it is built for it."""
        free = ("n_ptr", "written_ptr", "own_ptr") if self.x.value_keys is not None else ()
        dtypes = dict.fromkeys(("q_ptr", "k_ptr", "w_ptr", "v_ptr", "A_ptr", "X_ptr", "o_ptr", *free), self.dtype)
        dtypes |= dict.fromkeys(("factors_ptr", "total_ptr", "state_ptr"), torch.float32)
        return parallel_programs(self.device, scan_kernel, dtypes | {"segments_ptr": torch.int64}, {
            "K": self.K, "V": self.V, "BK": _padded(self.K), "BV": SCAN_VALUE_COLUMNS,
            "CHANNEL": self.decay == "channel", "OWN": self.x.p is not None, "FREE": bool(free),
            "STEPS": self.options.steps, "MODE": "outputs", "EXACT": self.dtype == torch.float32})

    def empty(self, *shape: int) -> Tensor:
        """A new tensor in the dtype of the values."""
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def wide(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A new tensor in float32, or in another type of more than 16 bits."""
        return torch.empty(*shape, dtype=dtype, device=self.device)

    def states_of_documents(self) -> Tensor:
        """A new tensor [N, HV, K, V] in float32."""
        return self.wide(self.documents, self.HV, self.K, self.V)

    def forward(self) -> tuple[_ForwardResults, Tensor, Tensor]:
        """Results for the backward pass, o [B, T, HV, V], and the last states [N, HV, K, V] or none of them."""
        A, X = (self.empty(self.B, T, self.HV, CHUNK_TOKENS) for T in (self.tokens_of_queries, self.T))
        total = self.wide(self.tables.num_chunks, self.HV, *([self.K] if self.decay == "channel" else []))
        results = _ForwardResults(A, X, self.wide(self.HV, NUM_FACTORS.value, self.tokens), total)
        o = self.empty(self.B, self.tokens_of_queries, self.HV, self.V)
        last = self.states_of_documents() if self.options.final_state else None
        decayed, sums = self.decayed(results, factors=True)
        self.chunk(results, sums)
        if self.free:
            value_A, value_L = (self.empty(self.B, self.T, self.HV, CHUNK_TOKENS) for _ in range(2))
            results = replace(results, value_A=value_A, value_L=value_L)
            self.chunk(results, sums, of_values=True)
        if self.in_segments:
            results = self.scan_segments(results, decayed, last)
        self.scan(results, decayed, "outputs", self.x.state if results.starts is None else results.starts, o=o,
                  last=None if self.in_segments else last)
        return results, o, self.wide(0, self.HV, self.K, self.V) if last is None else last

    def decayed(self, results: _ForwardResults, factors: bool) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
        """The queries, keys, writes and value writes for the scans; with a decay per channel they are decayed, and
        there are its cumulative sums of log2 decays.

        With `factors` also fills the factors and total of a decay per channel.
        """
        x = self.x
        if self.decay != "channel":
            return (x.q, x.k if x.p is None else x.p, x.k, None), None
        queries = self.empty(self.B, self.tokens_of_queries, self.HV, self.K)
        keys, writes = (self.empty(self.B, self.T, self.HV, self.K) for _ in range(2))
        value_writes = torch.empty_like(writes) if self.free else None
        sums = self.wide(self.B, self.T, self.HV, self.K, dtype=torch.float64 if self.flags["EXACT"] else torch.float32)
        decayed_kernel[(self.tables.num_chunks, self.HV)](
            q_ptr=x.q, p_ptr=x.p, k_ptr=x.k, value_keys_ptr=x.value_keys, beta_ptr=x.beta,
            chunks_ptr=self.tables.chunks, factors_ptr=results.factors, total_ptr=results.total, sums_ptr=sums,
            queries_ptr=queries, keys_ptr=keys, writes_ptr=writes, value_writes_ptr=value_writes,
            scale=self.options.scale, beta_scale=self.beta_scale, K=self.K, FACTORS=factors, **self.gate_arguments,
            **self.sizes, **{name: flag for name, flag in self.flags.items() if name != "DECAY"})
        return (queries, keys, writes, value_writes), sums

    def chunk(self, results: _ForwardResults, sums: Tensor | None, of_values: bool = False) -> None:
        """Fill A and X and, unless the decay is one per channel, factors and total; or the scores `of_values`."""
        x = self.x
        outputs = {"A_ptr": results.value_A, "L_ptr": results.value_L, "X_ptr": None, "blocks_ptr": None}
        if not of_values:
            blocks = self.wide(self.tokens, self.HV, SOLVE_BLOCK.value)
            outputs = {"A_ptr": results.A, "L_ptr": None, "X_ptr": results.X, "blocks_ptr": blocks}
        chunk_kernel[(self.tables.num_chunks, self.HV)](
            q_ptr=x.q, p_ptr=x.p, k_ptr=x.value_keys if of_values else x.k, beta_ptr=x.beta,
            chunks_ptr=self.tables.chunks, factors_ptr=results.factors, total_ptr=results.total, **outputs,
            sums_ptr=sums, scale=self.options.scale, beta_scale=self.beta_scale, K=self.K, MERGED=self.merged,
            CHECKED=self.checked, **self.gate_arguments, **self.sizes, **self.flags)

    def decode(self) -> tuple[Tensor, Tensor]:
        """The outputs o [B, T, HV, V] and the last states [N, HV, K, V], token by token."""
        x = self.x
        o = self.empty(*x.v.shape)
        last = self.states_of_documents()
        block = min(32, max(16, triton.next_power_of_2(self.V)))
        flags = {name: self.flags[name] for name in ("DECAY", "GATE", "L2NORM", "SIGMOID", "BEFORE")}
        decode_kernel[(self.documents * self.HV * self._blocks_of_values(block),)](
            q_ptr=x.q, p_ptr=x.p, k_ptr=x.k, value_keys_ptr=x.value_keys, v_ptr=x.v, beta_ptr=x.beta,
            state_ptr=x.state, documents_ptr=self.tables.documents, o_ptr=o, last_ptr=last, scale=self.options.scale,
            beta_scale=self.beta_scale, H=self.H, HV=self.HV, K=self.K, V=self.V, BK=triton.next_power_of_2(self.K),
            BV=block, **self.gate_arguments, **flags)
        return o, last

    def _blocks_of_values(self, columns: int) -> int:
        return triton.cdiv(self.V, columns)

    def _scan_grid(self, blocks: Callable[[int], int]) -> Callable[[dict[str, Any]], tuple[int]]:
        """The grid of a scan with `blocks(columns per block)` programs per segment and head."""
        return lambda constants: (len(self.segments) * self.HV * blocks(constants["BV"]),)

    def _scan_arguments(self, results: _ForwardResults, decayed: tuple[Tensor | None, ...]) -> dict[str, Any]:
        """The arguments that both scans take."""
        queries, keys, writes, _ = decayed
        return self.sizes | {
            "q_ptr": queries, "k_ptr": keys, "w_ptr": writes, "A_ptr": results.A, "X_ptr": results.X,
            "factors_ptr": results.factors, "total_ptr": results.total, "segments_ptr": self.segments, "K": self.K,
            "V": self.V, "BK": _padded(self.K), "CHANNEL": self.decay == "channel", "OWN": self.own,
            "STEPS": self.options.steps, "EXACT": self.flags["EXACT"], "full": self.full}

    def scan(self, results: _ForwardResults, decayed: tuple[Tensor | None, ...], mode: str, start: Tensor | None, *,
             o: Tensor | None = None, last: Tensor | None = None, transitions: Tensor | None = None,
             states: Tensor | None = None, y: Tensor | None = None) -> None:
        """Scan from the states before segments, `start`; modes and outputs are those of `scan_kernel`."""
        def blocks(columns: int) -> int:
            of_transitions = triton.cdiv(self.K, columns) if mode == "segments" else 0
            return self._blocks_of_values(columns) + of_transitions

        v, own = self.x.v, None
        if self.free:
            v, own = self.empty(*v.shape), self.empty(*v.shape) if mode == "outputs" else None
            triton_value_keys.value_products_kernel[(self.tables.num_chunks, self.HV)](
                v_ptr=self.x.v, value_A_ptr=results.value_A, value_L_ptr=results.value_L, chunks_ptr=self.tables.chunks,
                reads_ptr=v, outputs_ptr=own, HV=self.HV, V=self.V, EXACT=self.flags["EXACT"])
        scan_kernel[self._scan_grid(blocks)](
            n_ptr=decayed[3], v_ptr=v, written_ptr=self.x.v if self.free else None, own_ptr=own, FREE=self.free,
            state_ptr=start, o_ptr=o, last_ptr=last, transitions_ptr=transitions, states_ptr=states,
            y_ptr=y, MODE=mode, **self._scan_arguments(results, decayed))

    def scan_segments(self, results: _ForwardResults, decayed: tuple[Tensor | None, ...], last: Tensor | None
                      ) -> _ForwardResults:
        """The results with the states before segments and their transitions; fills the last states, if wanted."""
        U = len(self.segments)
        starts, transitions = self.wide(U, self.HV, self.K, self.V), self.wide(U, self.HV, self.K, self.K)
        self.scan(results, decayed, "segments", None, last=starts, transitions=transitions)
        self.join(starts, transitions, self.x.state, last, reverse=False)
        return replace(results, starts=starts, transitions=transitions)

    def join(self, states: Tensor, transitions: Tensor, start: Tensor | None, last: Tensor | None,
             reverse: bool) -> None:
        """Turn the states of segments scanned from zero into those before them; as `join_kernel` says."""
        join_kernel[(self.documents * self.HV * self._blocks_of_values(SCAN_VALUE_COLUMNS),)](
            states_ptr=states, transitions_ptr=transitions, start_ptr=start,
            segments_of_documents_ptr=self.segments_of_documents, last_ptr=last, HV=self.HV, Y=self.K, Z=self.V,
            BY=_padded(self.K), BZ=SCAN_VALUE_COLUMNS, TRANSITION="matrix", REVERSE=reverse,
            EXACT=self.flags["EXACT"])

    def states(self, results: _ForwardResults, decayed: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
        """The corrections Y [B, T, HV, V] and the states before every chunk [P, HV, K, V]."""
        y, states = self.empty(*self.x.v.shape), self.empty(self.tables.num_chunks, self.HV, self.K, self.V)
        self.scan(results, decayed, "states", results.starts if self.in_segments else self.x.state, y=y,
                  states=states)
        return y, states

    def scan_back(self, results: _ForwardResults, decayed: tuple[Tensor | None, ...], do: Tensor, d_last: Tensor | None,
                  d_first: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tensor Z [B, T, HV, V] and the gradients of the states after every chunk [P, HV, K, V].

        Those of the last states, `d_last`, are zero where None; `d_first` is filled with those of the initial states.
        """
        z, d_states = self.empty(*self.x.v.shape), self.empty(self.tables.num_chunks, self.HV, self.K, self.V)
        arguments = self._scan_arguments(results, decayed)
        grid = self._scan_grid(self._blocks_of_values)

        def launch(d_last: Tensor | None, d_states: Tensor | None, z: Tensor | None, d_first: Tensor | None) -> None:
            scan_back_kernel[grid](do_ptr=do, d_last_ptr=d_last, d_states_ptr=d_states, z_ptr=z, d_state_ptr=d_first,
                                   FIRST_STATES_ONLY=z is None, **arguments)

        if results.transitions is None:
            launch(d_last, d_states, z, d_first)
        else:
            ends = self.wide(len(self.segments), self.HV, self.K, self.V)
            launch(None, None, None, ends)
            self.join(ends, results.transitions, d_last, d_first, reverse=True)
            launch(ends, d_states, z, None)
        return z, d_states

    def gradients(self, results: _ForwardResults, sums: Tensor | None, do: Tensor, y: Tensor, z: Tensor,
                  states: Tensor, d_states: Tensor, dv: Tensor, needed: tuple[bool, ...]) -> list[Tensor | None]:
        """Gradients of q, p, k, value keys, v, g, beta, A_log and dt_bias, None for absent inputs and those not
        `needed`; `dv` is memory for those of v, or where erase vectors are free the gradients themselves."""
        x, P = self.x, self.tables.num_chunks
        dq, dk = (self.empty(self.B, T, self.HV, self.K) for T in (self.tokens_of_queries, self.T))
        dp, dn = (torch.empty_like(dk) if there else None for there in (self.own, self.free))
        dg = torch.empty_like(x.g) if x.g is not None and any((needed[5], needed[7], needed[8])) else None
        d_beta = torch.empty_like(x.beta) if x.beta is not None and needed[6] else None
        d_A_log = self.wide(P, self.HV) if x.A_log is not None and needed[7] else None
        d_bias = self.wide(P, *x.dt_bias.shape) if x.dt_bias is not None and needed[8] else None
        scratch = self.empty(2, self.tokens, self.HV, CHUNK_TOKENS)
        shared: dict[str, Any] = self.sizes | {
            "q_ptr": x.q, "p_ptr": x.p, "k_ptr": x.k, "do_ptr": do, "y_ptr": y, "z_ptr": z,
            "factors_ptr": results.factors, "sums_ptr": sums, "chunks_ptr": self.tables.chunks, "scratch_ptr": scratch,
            "dv_ptr": None if self.free else dv, "d_beta_ptr": d_beta, "beta_scale": self.beta_scale, "K": self.K,
            "V": self.V, "OWN": self.own}
        shared |= {name: self.flags[name] for name in ("SIGMOID", "BEFORE", "STEPS", "EXACT")}
        if self.decay == "channel":
            terms = {f"{name}_pairs_ptr": None if like is None else torch.empty_like(like)
                     for name, like in (("dq", dq), ("dp", dp), ("dk", dk))}
            terms["dg_pairs_ptr"] = None if dg is None else torch.empty_like(dk, dtype=dg.dtype)  # of every row
            shared |= terms | {"itself_ptr": self.wide(self.HV, self.tokens)}
            pair_gradients_kernel[(P, self.HV)](MERGED=self.merged, VALUE_KEYS=False, **shared)
            if self.free:
                with_values = {name: None if like is None else torch.empty_like(like) for name, like in terms.items()
                               if name != "dk_pairs_ptr"}
                of_values = shared | with_values | {
                    "k_ptr": x.value_keys, "y_ptr": x.v, "dk_pairs_ptr": dn, "d_beta_ptr": None,
                    "itself_ptr": self.wide(self.HV, self.tokens)}
                pair_gradients_kernel[(P, self.HV)](MERGED=self.merged, VALUE_KEYS=True, **of_values)
                triton_value_keys.value_key_gradients_kernel[(P, self.HV)](
                    value_keys_ptr=x.value_keys, v_ptr=x.v, dS_ptr=d_states, d_value_keys_ptr=dn,
                    from_vectors_dq_ptr=terms["dq_pairs_ptr"], from_vectors_dp_ptr=terms["dp_pairs_ptr"],
                    from_vectors_dg_ptr=terms["dg_pairs_ptr"], **with_values, **self.sizes,
                    **triton_value_keys.KEY_GRADIENTS, num_warps=4, num_stages=1,
                    **{name: of_values[name] for name in ("q_ptr", "factors_ptr", "sums_ptr", "chunks_ptr",
                                                          "itself_ptr", "K", "V", "EXACT")})
                shared |= with_values
        else:
            shared |= dict.fromkeys(("dq_pairs_ptr", "dp_pairs_ptr", "dk_pairs_ptr", "dg_pairs_ptr", "itself_ptr"))
        gradients_kernel[(P, self.HV)](
            total_ptr=results.total, S_ptr=states, dS_ptr=d_states, dq_ptr=dq, dp_ptr=dp, dk_ptr=dk, dg_ptr=dg,
            d_A_log_ptr=d_A_log, d_bias_ptr=d_bias,
            inverse_scale=1.0 / self.options.scale if self.options.scale else 0.0, DECAY=self.decay,
            GATE=self.flags["GATE"], L2NORM=self.flags["L2NORM"], **self.gate_arguments, **shared)

        def sum_value_heads(d: Tensor | None) -> Tensor | None:
            return d if d is None or self.H == self.HV else d.unflatten(2, (self.H, -1)).sum(3)

        def sum_chunks(d: Tensor | None, like: Tensor | None) -> Tensor | None:
            return None if d is None or like is None else d.sum(0).to(like.dtype)

        return [*map(sum_value_heads, (dq, dp, dk, dn)), dv, dg if needed[5] else None, d_beta,
                sum_chunks(d_A_log, x.A_log), sum_chunks(d_bias, x.dt_bias)]


class _TritonDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, p: Tensor | None, k: Tensor, value_keys: Tensor | None, v: Tensor,
                g: Tensor | None, beta: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None,
                state: Tensor | None, options: _DeltaRuleOptions) -> Any:
        inputs = _DeltaRuleInputs(q, p, k, value_keys, v, g, beta, A_log, dt_bias, state)
        ctx.options = options
        ctx.set_materialize_grads(False)
        results, o, last = _DeltaRuleLaunches(inputs, options).forward()
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*vars(inputs).values(), *vars(results).values())
        return o, last

    @staticmethod
    @plain_backward
    def backward(ctx: Any, do: Tensor | None, d_last: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # read once: a checkpointed layer unpacks each saved tensor a single time
        inputs, results = _DeltaRuleInputs(*saved[:10]), _ForwardResults(*saved[10:])
        launches = _DeltaRuleLaunches(inputs, ctx.options)
        decayed, sums = launches.decayed(results, factors=False)
        y, states = launches.states(results, decayed)
        shape = (*inputs.q.shape[:2], *inputs.v.shape[2:])
        do = inputs.v.new_zeros(shape) if do is None else do.contiguous()
        d_last = None if d_last is None or not d_last.numel() else d_last.contiguous()
        d_first = None if inputs.state is None or not ctx.needs_input_grad[9] else launches.states_of_documents()
        dv = launches.empty(*inputs.v.shape)
        z, d_states = launches.scan_back(results, decayed, do, d_last, d_first)
        if launches.free:
            triton_value_keys.written_value_gradients_kernel[(launches.tables.num_chunks, launches.HV)](
                value_writes_ptr=decayed[3], value_A_ptr=results.value_A, value_L_ptr=results.value_L, do_ptr=do,
                z_ptr=z, dS_ptr=d_states, chunks_ptr=launches.tables.chunks, dv_ptr=dv, HV=launches.HV, K=launches.K,
                V=launches.V, EXACT=launches.flags["EXACT"])
        del decayed  # with a decay per channel: memory that the terms of pairs can take
        gradients = launches.gradients(results, sums, do, y, z, states, d_states, dv, ctx.needs_input_grad)
        return *gradients, None if inputs.state is None or d_first is None else d_first.to(inputs.state.dtype), None


def _padded(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))
