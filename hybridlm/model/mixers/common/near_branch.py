"""A window with keys and values of its own beside attention that reads an earlier layer's: same queries, another gate.

    o'_t = sigmoid(W_g x_t) * sum_s softmax_s(q_t . k'_s / sqrt(K)) v'_s     the last w tokens s, k' = rope(norm(W_k x))

Source: HySparse (arXiv 2602.03560): the window must not share keys and values.
B rows, T tokens, D hidden size, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybridlm.model.decode_state import AttentionState
from hybridlm.model.layer_context import NormConfig
from hybridlm.model.mixers.common.dense_attention import dense_attention
from hybridlm.model.mixers.common.key_sharing import HeadNorm, KeyLayout, rotated_heads
from hybridlm.model.mixers.common.output_gate import OutputGate, apply_output_gate, build_output_gate, gate_width
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo


class NearBranch(nn.Module):
    """The module. Parameters: k_proj and v_proj [G K, D], g_proj, and by option k_norm and sinks [H].

    `heads` are those of the queries; keys and values have the heads and the rotation of `layout`.
    """

    def __init__(self, window: int, layout: KeyLayout, hidden_size: int, heads: int, *, gate: OutputGate,
                 k_norm: HeadNorm, norm: NormConfig, norm_eps: float | None, sinks: bool):
        super().__init__()
        self.window = window
        self.layout = layout
        self.heads = heads
        self.gate = gate
        self.norm_over = k_norm
        width = layout.num_kv_heads * layout.head_dim
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.g_proj = build_output_gate(gate, hidden_size, heads, layout.head_dim, bias=False)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.k_norm = None
        if k_norm != "none":
            self.k_norm = RMSNorm.of(norm, layout.head_dim if k_norm == "head" else width, norm_eps)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        keys = self.layout.num_kv_heads
        gates = {"g_proj": self.heads} if self.gate == "element" else {}
        return find_roles(self, head_rows={"k_proj": keys, "v_proj": keys, **gates})

    def forward(self, x_BTD: Tensor, q_BTHK: Tensor, seq: SequenceInfo, state: AttentionState | None) -> Tensor:
        """The gated output [B, T, H K] for the rotated queries of the layer."""
        k_BSGK = rotated_heads(self.k_proj(x_BTD), self.k_norm, self.norm_over, self.layout.head_dim, self.layout.rope,
                               seq)
        v_BSGK = self.v_proj(x_BTD).unflatten(-1, (-1, self.layout.head_dim))
        if state is not None:
            k_BSGK, v_BSGK = state.keys.append(k_BSGK), state.values.append(v_BSGK)
        o_BTHK = dense_attention(q_BTHK, k_BSGK, v_BSGK, seq, window=self.window, sinks_H=self.sinks)
        return apply_output_gate(o_BTHK, x_BTD, self.g_proj, self.gate)


def near_branch_params(layout: KeyLayout, hidden_size: int, heads: int, *, gate: OutputGate, k_norm: HeadNorm,
                       sinks: bool) -> tuple[int, int]:
    """Count the weights of the projections of a NearBranch, and its other parameters."""
    width = layout.num_kv_heads * layout.head_dim
    norm = {"none": 0, "head": layout.head_dim, "full": width}[k_norm]
    return (2 * width + gate_width(gate, heads, layout.head_dim)) * hidden_size, norm + heads * sinks
