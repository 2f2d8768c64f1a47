"""The delta rule with decay: DeltaNet, Gated DeltaNet and Kimi Delta Attention (KDA).

    S_t = Diag(e^{g_t}) S_{t-1};   S_t += beta_t k_t (v_t - S_t^T k_t)^T;   o_t = S_t^T q_t / sqrt(K)
    y_t = W_o (norm(o_t) * act(W_g x_t)),   q, k = l2norm(silu(conv(W x))),   v = silu(conv(W x))

Sources: Yang et al. 2024 (DeltaNet; Gated Delta Networks), Kimi Linear 2025 (KDA), Qwen3-Next, OLMo-Hybrid.
B rows, T tokens, D hidden size, H key heads, HV value heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.context_parallel import RowShard
from hybridlm.model.decode_state import RecurrentState
from hybridlm.model.decode_step import DecodeStep, linear_step
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.matrix_state import read_incoming_state
from hybridlm.model.mixers.common.recurrent import RecurrentConfig, RecurrentMixer
from hybridlm.model.mixers.common.recurrent_step import (
    decode_log_decay,
    prepare_forget_gate,
    prepare_inputs,
    prepare_output,
    state_matrix,
)
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import delta_rule
from hybridlm_kernels.decoding import delta_rule_step
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
    """

    kind: str = "delta_rule"
    decay: Literal["none", "scalar", "channel"] = "channel"
    gate: Literal["softplus", "lower_bounded"] = "softplus"
    conv_size: int = 4
    beta_scale: float = 1.0
    qk_l2norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.beta_scale <= 2, "beta_scale", "must keep the state stable", got=self.beta_scale,
                expected="above 0, at most 2")

    def num_params(self, context: LayerContext) -> int:
        return super().num_params(context) + context.hidden_size * self.value_heads + self.value_dim

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        parts = super().flops_per_token(context, context_length)
        parts["projections"] += 2.0 * context.hidden_size * self.value_heads
        return parts

    def _flops_per_state_entry(self) -> int:
        return super()._flops_per_state_entry() + 2  # S^T k, besides S^T q and the outer product

    def _shard_transition_size(self) -> int:
        return self.value_heads * self.head_dim**2  # the product of Diag(e^g) - beta k k^T


    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Sizes as for every linear mixer; the gates of KDA have the rank of one head, as published."""
        sizes = super().sizes_from(options, model)
        if options.get("decay", "channel") == "channel":
            rank = options.get("head_dim") or sizes["head_dim"]
            sizes |= {"gate_rank": rank, "output_gate_rank": rank}
        return sizes


@register_mixer("delta_rule", DeltaRuleConfig)
class DeltaRule(RecurrentMixer):
    """The module: parameters of `RecurrentMixer`, b_proj with HV rows, and o_norm over the dims of one head."""

    config: DeltaRuleConfig

    def __init__(self, config: DeltaRuleConfig, context: LayerContext):
        super().__init__(config, context)
        self.b_proj = nn.Linear(context.hidden_size, config.value_heads, bias=False)
        self.o_norm = self.build_output_norm(config.value_dim, context)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: RecurrentState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        q_BTC, k_BTC, v_BTC = self.project_inputs(x_BTD, seq, state)
        q_BTHK, k_BTHK = (x.unflatten(-1, (config.num_heads, config.head_dim)) for x in (q_BTC, k_BTC))
        v_BTHvV = v_BTC.unflatten(-1, (config.value_heads, config.value_dim))
        g, gate = None, None
        if config.decay != "none":
            g, gate = self.prepare_decay(self.project_forget_gate(x_BTD), x_BTD.dtype)
        rule = partial(delta_rule, q_BTHK, k_BTHK, g=g, gate=gate, beta=self.b_proj(x_BTD),
                       beta_sigmoid=config.beta_scale, qk_l2norm=config.qk_l2norm, cu_seqlens=seq.cu_seqlens)
        if seq.shard is not None:
            o_BTHvV = run_over_shards(rule, v_BTHvV, config.head_dim, seq.shard)
        else:
            o_BTHvV, matrix = rule(v_BTHvV, initial_state=None if state is None else state.matrix)
            if state is not None:
                state.matrix = matrix
        return self.project_output(o_BTHvV, x_BTD, self.o_norm, all_heads=False), {}

    def prepare_step(self) -> DecodeStep:
        config = self.config
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


def run_over_shards(rule: Callable[..., tuple[Tensor, Tensor]], v_BTHvV: Tensor, key_dim: int,
                    shard: RowShard) -> Tensor:
    """The outputs [B, T, HV, V] of the delta rule over rows that are divided into shards, by one pass over each.

    The columns of a state do not mix, and the rule is linear in them. V columns start at zero and take the values: N.
    K more start as the identity and take none: M, a product of Diag(e^g) - beta k k^T. With the state S that the
    earlier shards leave, the states here are N_t + M_t S, and the outputs those of N_t plus S^T times those of M_t.

    Args:
        rule: the operation, given values [B, T, HV, V] and `initial_state`.
        v_BTHvV: values of this shard.
        key_dim: K.
        shard: this process's shard of the rows.
    """
    batch, _, heads, width = v_BTHvV.shape
    eye_BHvKK = torch.eye(key_dim, dtype=math_dtype(v_BTHvV), device=v_BTHvV.device).expand(batch, heads, -1, -1)
    eye_BHvKK = eye_BHvKK * shard.continues_B[:, None, None, None]
    start = shard.at_start(F.pad(eye_BHvKK, (width, 0)))
    o_BTHvX, state_NHvKX = rule(F.pad(v_BTHvV, (0, key_dim)), initial_state=start)
    local_BHvKV, through_BHvKK = shard.at_end(state_NHvKX).split([width, key_dim], -1)
    incoming_BHvKV = shard.incoming(local_BHvKV, through_BHvKK, torch.matmul)
    o_BTHvV, reach_BTHvK = o_BTHvX.split([width, key_dim], -1)
    return o_BTHvV + read_incoming_state(reach_BTHvK, incoming_BHvKV).to(o_BTHvV.dtype)
