"""The delta rule with decay: DeltaNet, Gated DeltaNet, Kimi Delta Attention (KDA), and what others erase and write.

    S_t = Diag(e^{g_t}) S_{t-1};   S_t += beta_t k_t (v_t - S_t^T k_t)^T;   o_t = S_t^T q_t / sqrt(K)
    y_t = W_o (norm(o_t) * act(W_g x_t)),   q, k = l2norm(silu(conv(W x))),   v = silu(conv(W x))

With `steps` n a token writes n times; `read` takes S_t^T k_t before the decay; `strength` gives every channel its own
beta; `precondition` scales the key that is written; `levels` reads blocks of the past with scales of their own
(log-linear attention). See `docs/mixers/delta_rule.md`.

Sources: Yang et al. 2024 (DeltaNet; Gated Delta Networks), Kimi Linear 2025 (KDA), Qwen3-Next, OLMo-Hybrid, Siems et
al. 2025 (DeltaProduct), Hu et al. 2025 (Comba), Liu et al. 2024 (Longhorn); Gated DeltaNet 2, Preconditioned DeltaNet;
Guo et al. 2025 (log-linear attention).
B rows, T tokens, D hidden size, H key heads, HV value heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import RecurrentState
from hybridlm.model.decode_step import DecodeStep, linear_step
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.key_preconditioner import SQUASH, KeyPreconditioner
from hybridlm.model.mixers.common.levels import (
    check_levels,
    compute_level_scales,
    count_calls,
    count_states,
    level_activations,
    level_flops,
    refuse_split_rows,
    run_levels,
)
from hybridlm.model.mixers.common.matrix_state import run_over_shards
from hybridlm.model.mixers.common.recurrent import FP32_BYTES, RecurrentConfig, RecurrentMixer
from hybridlm.model.mixers.common.recurrent_step import (
    decode_log_decay,
    prepare_forget_gate,
    prepare_inputs,
    prepare_output,
    state_matrix,
)
from hybridlm.model.mixers.common.scan import scan_traffic
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes, size_of
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import Gate, delta_rule, l2_norm
from hybridlm_kernels.decoding import delta_rule_step
from hybridlm_kernels.precision import wide
from hybridlm_kernels.recurrence.arguments import math_dtype
from hybridlm_kernels.recurrence.gates import write_strength


@dataclass(kw_only=True)
class DeltaRuleConfig(RecurrentConfig):
    """Configuration of the delta rule; the options it shares with other linear mixers are those of `RecurrentConfig`.

    Args:
        decay: none (DeltaNet), scalar (one per value head: Gated DeltaNet) or channel (one per key channel: KDA).
        gate: form of the forget gate.
        conv_size: taps of the convolutions over q, k and v.
        beta_scale: beta = beta_scale * sigmoid(W_b x); 2 allows negative eigenvalues (Grazzi et al. 2024).
        qk_l2norm: whether q and k are divided by their length.
        steps: writes per token, each with a key, a value and a beta of its own (DeltaProduct).
        read: whether what the state recalls for the key is read `after` the decay or `before` it (Comba).
        strength: `head` has one beta per value head; `channel` erases at beta * k, one beta per key channel, and writes
            sigmoid(W_w x) * v, one per value channel (Gated DeltaNet 2).
        implicit: beta / (1 + beta |k|^2) in place of beta: the exact minimum of beta |S^T k - v|^2 + |S - S_{t-1}|^2
            (Longhorn).
        query_correction: q - d sigmoid(c) k in place of q, with d and c per key head (Comba).
        correction_init: start of d.
        precondition: scale the written key by 1.5^-s, where s in (-1, 1) grows with the past squares of its channel
            (preconditioned Gated DeltaNet and KDA).
        levels: levels L of log-linear attention: the past is cut into blocks of 1, 2, 4, ... tokens, and whatever is
            older than 2^(L-2) tokens, that are read with learned scales; null reads one state.

    Raises:
        ConfigError: an option out of its range, or two that do not go together.
    """

    kind: str = "delta_rule"
    decay: Literal["none", "scalar", "channel"] = "channel"
    gate: Literal["softplus", "lower_bounded"] = "softplus"
    conv_size: int = 4
    beta_scale: float = 1.0
    qk_l2norm: bool = True
    steps: int = 1
    read: Literal["after", "before"] = "after"
    strength: Literal["head", "channel"] = "head"
    implicit: bool = False
    query_correction: bool = False
    correction_init: float = 1.0
    precondition: bool = False
    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 2.0 / SQUASH if self.precondition else 2.0  # no factor of a state may pass -1
        require(0 < self.beta_scale <= most, "beta_scale", "must keep the state stable", got=self.beta_scale,
                expected=f"above 0, at most {most:.4g}")
        require(self.steps >= 1, "steps", "must be positive", got=self.steps)
        for key in ("query_correction", "precondition"):
            require(self.steps == 1 or not getattr(self, key), key, "is not defined for several writes per token",
                    got=True, expected="false, or steps=1")
        require(not self.implicit or self.strength == "head", "implicit", "needs one beta per head", got=True,
                expected="false with strength=channel")
        check_levels(self.levels)
        require(self.levels is None or (self.is_plain and not self.implicit), "levels",
                "are defined for one plain write per token", got=self.levels,
                expected="null, or steps=1, read=after, strength=head and none of implicit, query_correction and "
                "precondition")

    @property
    def is_plain(self) -> bool:
        """Whether a token erases and writes once, at its key, with one beta per head."""
        return ((self.steps, self.read, self.strength) == (1, "after", "head") and not self.query_correction
                and not self.precondition)

    @property
    def level_width(self) -> int:
        """Outputs of the projection that scales the levels."""
        return self.value_heads * (self.levels or 0)

    def check_context_parallel(self, shards: int, length: int) -> None:
        if self.levels is not None:
            refuse_split_rows(self.kind)
        super().check_context_parallel(shards, length)

    def transfer_gaps(self) -> list[str]:
        published = self.decay == "scalar" and self.steps == 1 and self.strength == "head"  # arXiv 2606.04048
        name = "KDA's decays per channel and low-rank gates" if self.decay == "channel" else "this delta rule"
        return [] if published else [name]

    @property
    def channels(self) -> dict[str, int]:
        keys = self.num_heads * self.head_dim
        return {"q": keys, "k": self.steps * keys, "v": self.steps * self.value_heads * self.value_dim}

    @property
    def strengths(self) -> dict[str, int]:
        """Width of each projection that says how strongly a token erases and writes."""
        if self.strength == "head":
            return {"b": self.steps * self.value_heads}
        return {"b": self.steps * self.num_heads * self.head_dim, "w": self.steps * self.output_width}

    def _strength_params(self, context: LayerContext) -> int:
        heads = 2 * self.num_heads if self.precondition else 0
        return context.hidden_size * (sum(self.strengths.values()) + heads + self.level_width)

    def num_params(self, context: LayerContext) -> int:
        vectors = self.value_dim + self.num_heads * (2 * self.query_correction + 3 * self.precondition)
        vectors += self.level_width
        return super().num_params(context) + self._strength_params(context) + vectors

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        parts = super().flops_per_token(context, context_length)
        parts["projections"] += 2.0 * self._strength_params(context)
        if self.precondition:
            parts["recurrence"] += 4.0 * self.num_heads * self.head_dim
        parts["recurrence"] += level_flops(self.levels) * self.head_dim * self.output_width
        return parts

    def _flops_per_state_entry(self) -> int:
        # S^T q and the decay once; S^T k and the outer product at every write
        return super()._flops_per_state_entry() - 2 + 4 * self.steps

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        scan = FP32_BYTES * self.num_heads * self.head_dim if self.precondition else 0
        more = FP32_BYTES * (count_states(self.levels) - 1) * self.head_dim * self.output_width
        return super().state_bytes(context, context_length, element_bytes) + scan + more

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        keys = self.num_heads * self.head_dim
        more = 8 * keys * self.precondition + 3 * keys * self.query_correction
        if self.strength == "channel":
            more += 3 * sum(self.strengths.values())
        if self.steps > 1:
            more += self.steps * (keys + self.gate_width)
        calls = count_calls(self.levels, context.max_position)
        more += level_activations(self.levels, self.value_heads)
        return super().activation_bytes(context, element_bytes) * calls + FP32_BYTES * more

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        found = super().shard_traffic(context, rows, length, shards, element_bytes)
        return [*found, scan_traffic(rows, self.num_heads * self.head_dim)] if self.precondition else found

    def _shard_transition_size(self) -> int:
        return self.value_heads * self.head_dim**2  # the product of Diag(e^g) - beta k k^T

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        data.pop("correction_init")
        return data

    def initial_weights_from(self, old: MixerConfig, tensors: Mapping[str, Tensor],
                             norm: NormConfig) -> dict[str, Tensor]:
        """Projections of softmax attention, where they fit; all writes of a token start from equal keys and values."""
        found = super().initial_weights_from(old, tensors, norm)
        return {name: weight.repeat(self.steps, 1) if name in ("k_proj.weight", "v_proj.weight") else weight
                for name, weight in found.items()}

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Sizes as for every linear mixer; the gates of KDA have the rank of one head, as published."""
        sizes = super().sizes_from(options, model)
        if options.get("decay", "channel") == "channel":
            rank = size_of(options, "head_dim", sizes["head_dim"])
            sizes |= {"gate_rank": rank, "output_gate_rank": rank}
        return sizes


@register_mixer("delta_rule", DeltaRuleConfig)
class DeltaRule(RecurrentMixer):
    """The module: parameters of `RecurrentMixer`, b_proj with n HV rows, and o_norm over the dims of one head.

    With `strength: channel` b_proj has n H K rows, and w_proj n HV V; rows of k, v, b and w are (n, head, dim).
    `query_correction` adds correction and correction_gate [H], `precondition` a preconditioner, `levels` l_proj
    [HV L, D] and level_scale [HV L].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = (*RecurrentMixer.fp32_parameters, "correction", "correction_gate",
                                                 "preconditioner.center", "level_scale")
    config: DeltaRuleConfig
    b_proj: nn.Linear
    w_proj: nn.Linear

    def __init__(self, config: DeltaRuleConfig, context: LayerContext):
        super().__init__(config, context)
        for name, width in config.strengths.items():
            setattr(self, f"{name}_proj", nn.Linear(context.hidden_size, width, bias=False))
        self.o_norm = self.build_output_norm(config.value_dim, context)
        if config.query_correction:
            self.correction = nn.Parameter(torch.zeros(config.num_heads))
            self.correction_gate = nn.Parameter(torch.zeros(config.num_heads))
        if config.precondition:
            self.preconditioner = KeyPreconditioner(context.hidden_size, config.num_heads, config.a_init,
                                                    config.dt_init)
        if config.levels is not None:
            self.l_proj = nn.Linear(context.hidden_size, config.level_width, bias=False)
            self.level_scale = nn.Parameter(torch.zeros(config.level_width))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: RecurrentState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTC, k_BTC, v_BTC = self.project_inputs(x_BTD, seq, state)
        q_BTHK = q_BTC.unflatten(-1, (config.num_heads, config.head_dim))
        k_BRHK = self._rows(k_BTC, config.num_heads, config.head_dim)
        v_BRHvV = self._rows(v_BTC, config.value_heads, config.value_dim)
        g, gate = None, None
        if config.decay != "none":
            g, gate = self.prepare_decay(self.project_forget_gate(x_BTD), x_BTD.dtype)
        if config.levels is not None:
            o_BTHvV = self._run_levels(x_BTD, q_BTHK, k_BRHK, v_BRHvV, g, gate, seq, state)
            return self.project_output(o_BTHvV, x_BTD, self.o_norm, all_heads=False), {}
        q_BTHK, k_BRHK, v_BRHvV, options = self._prepare_writes(x_BTD, q_BTHK, k_BRHK, v_BRHvV, seq, state)
        rule: Callable[..., tuple[Tensor, Tensor]] = partial(delta_rule, q_BTHK, k_BRHK, g=g, gate=gate,
                                                             cu_seqlens=seq.cu_seqlens, **options)
        if seq.shard is not None:
            o_BTHvV = run_over_shards(rule, v_BRHvV, config.head_dim, seq.shard)
        else:
            o_BTHvV, matrix = rule(v_BRHvV, initial_state=None if state is None else state.matrix,
                                   final_state=state is not None)
            if state is not None:
                state.matrix = matrix
        return self.project_output(o_BTHvV, x_BTD, self.o_norm, all_heads=False), {}

    def _run_levels(self, x_BTD: Tensor, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHvV: Tensor, g: Tensor | None,
                    gate: Gate | None, seq: SequenceInfo, state: RecurrentState | None) -> Tensor:
        """Outputs [B, T, HV, V] of the log-linear form; its queries have no factor, as the authors' scales undo it."""
        if self.config.qk_l2norm:
            q_BTHK, k_BTHK = l2_norm(q_BTHK), l2_norm(k_BTHK)
        beta_BTHv = write_strength(self.b_proj(x_BTD), self.config.beta_scale)
        scales_BTHvL = compute_level_scales(self.l_proj(x_BTD), self.level_scale, self.config.value_heads)
        start = None if state is None else state.matrix
        o_BTHvV, levels = run_levels(q_BTHK, k_BTHK, v_BTHvV, scales_BTHvL, seq, start, decodes=state is not None, g=g,
                                     gate=gate, beta=beta_BTHv, scale=1.0)
        if state is not None:
            state.matrix = levels
        return o_BTHvV

    def _rows(self, x_BTC: Tensor, heads: int, dim: int) -> Tensor:
        """Split a projection into the writes of each token, one after the other: [B, R, heads, dim], R = T n."""
        if self.config.steps == 1:
            return x_BTC.unflatten(-1, (heads, dim))
        return x_BTC.unflatten(-1, (self.config.steps, heads, dim)).flatten(1, 2)

    def _prepare_writes(self, x_BTD: Tensor, q_BTHK: Tensor, k_BRHK: Tensor, v_BRHvV: Tensor, seq: SequenceInfo,
                        state: RecurrentState | None) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Queries, keys and values as the operation takes them, and its options beside the decay."""
        config = self.config
        options: dict[str, Any] = {"qk_l2norm": config.qk_l2norm}
        if config.steps > 1:
            options["steps"] = config.steps
        if config.read == "before":
            options["erase_before_decay"] = True
        if config.query_correction:
            share_H1 = self.correction_gate.sigmoid()[:, None].to(k_BRHK.dtype)
            p_BTHK = share_H1 * k_BRHK
            q_BTHK = q_BTHK - self.correction[:, None].to(q_BTHK.dtype) * p_BTHK
            if not config.qk_l2norm:  # a length of one forgets the factor on p
                options["erase_key"] = p_BTHK
        if config.strength == "head":
            raw_BRHv = self._rows(self.b_proj(x_BTD), config.value_heads, 1)[..., 0]
            options |= {"beta": raw_BRHv, "beta_sigmoid": config.beta_scale}
            if config.implicit:
                square_BRH = self._squared_lengths(k_BRHK).repeat_interleave(config.value_heads // config.num_heads, 2)
                beta_BRHv = config.beta_scale * wide(raw_BRHv).sigmoid()
                options |= {"beta": beta_BRHv / (1 + beta_BRHv * square_BRH), "beta_sigmoid": None}
        if config.strength == "channel" or config.precondition:
            # The erase key and the written key differ: the operation would normalise only the latter.
            if config.qk_l2norm:
                q_BTHK, k_BRHK, options["qk_l2norm"] = l2_norm(q_BTHK), l2_norm(k_BRHK), False
            options["erase_key"] = k_BRHK
        if config.strength == "channel":
            erase_BRHK = self._rows(self.b_proj(x_BTD), config.num_heads, config.head_dim).sigmoid()
            write_BRHvV = self._rows(self.w_proj(x_BTD), config.value_heads, config.value_dim).sigmoid()
            options["erase_key"] = config.beta_scale * erase_BRHK * k_BRHK
            v_BRHvV = v_BRHvV * write_BRHvV
        if config.precondition:
            scan = None if state is None else state.scan
            k_BRHK = k_BRHK * self.preconditioner(x_BTD, k_BRHK, seq, scan).to(k_BRHK.dtype)
        return q_BTHK, k_BRHK, v_BRHvV, options

    def _squared_lengths(self, k_BRHK: Tensor) -> Tensor:
        """The squared length of each key as the operation uses it, [B, R, H], in fp32 at least."""
        k_BRHK = l2_norm(k_BRHK) if self.config.qk_l2norm else k_BRHK
        return k_BRHK.to(math_dtype(k_BRHK)).square().sum(-1)

    def head_rows(self) -> dict[str, int]:
        config = self.config
        writes = {"k_proj": config.steps * config.num_heads, "v_proj": config.steps * config.value_heads}
        if config.strength == "channel":
            writes |= {"b_proj": config.steps * config.num_heads, "w_proj": config.steps * config.value_heads}
        return super().head_rows() | writes

    @torch.no_grad()
    def calibrate(self, half_life_H: Tensor) -> None:
        """Set what every linear mixer sets; the strength of writes starts at half of its largest value."""
        super().calibrate(half_life_H)
        for name in self.config.strengths:
            getattr(self, f"{name}_proj").weight.zero_()

    def init_weights(self, std: float) -> None:
        super().init_weights(std)
        if self.config.query_correction:
            nn.init.constant_(self.correction, self.config.correction_init)
            nn.init.ones_(self.correction_gate)
        if self.config.precondition:
            self.preconditioner.init_vectors()
        if self.config.levels is not None:
            nn.init.ones_(self.level_scale)

    @property
    def decodes_padded_rows(self) -> bool:
        return self.config.levels is None  # blocks of rows of unlike lengths end apart

    def prepare_step(self) -> DecodeStep | None:
        config = self.config
        if not config.is_plain or config.implicit or config.levels is not None:
            return super().prepare_step()
        project = prepare_inputs(self)
        project_gate = None if config.decay == "none" else prepare_forget_gate(self)
        b_proj, finish = linear_step(self.b_proj), prepare_output(self, self.o_norm, all_heads=False)
        keys, values = (-1, config.num_heads, config.head_dim), (-1, config.value_heads, config.value_dim)
        scale = config.head_dim**-0.5

        def step(x_B1D: Tensor, seq: SequenceInfo, state: RecurrentState) -> Tensor:
            x_BD = x_B1D[:, 0]
            q_BC, k_BC, v_BC = project(x_BD, state)
            v_BHvV = v_BC.view(values)
            g = None if project_gate is None else decode_log_decay(self, project_gate(x_BD))
            beta_BHv = write_strength(b_proj(x_BD), config.beta_scale)
            o_BHvV = delta_rule_step(q_BC.view(keys), k_BC.view(keys), v_BHvV, g, beta_BHv, scale,
                                     state_matrix(state, v_BHvV, config.head_dim), config.qk_l2norm)
            return finish(o_BHvV, x_BD).unsqueeze(1)

        return step
