"""Output gate of softmax attention: a sigmoid of the input scales every element or every head of the output.

Source: Qwen3-Next (per element), Ling 3.0 (per head).
B rows, T tokens, D hidden size, H heads, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

OutputGate = Literal["none", "element", "head"]


def gate_width(kind: OutputGate, heads: int, dim: int) -> int:
    """Outputs of the projection to the gate: one per element, one per head, or none.

    >>> gate_width("element", heads=4, dim=8), gate_width("head", heads=4, dim=8), gate_width("none", heads=4, dim=8)
    (32, 4, 0)
    """
    return {"none": 0, "element": heads * dim, "head": heads}[kind]


def build_output_gate(kind: OutputGate, hidden_size: int, heads: int, dim: int, *, bias: bool) -> nn.Linear | None:
    """Build the projection from the input to the gate; None for the kind `none`.

    Args:
        kind: whether each element has a gate, or each head.
        hidden_size: width of the input.
        heads: heads of the output.
        dim: dims of one head.
        bias: whether the projection has one.
    """
    if kind == "none":
        return None
    return nn.Linear(hidden_size, gate_width(kind, heads, dim), bias=bias)


def apply_output_gate(o_BTHV: Tensor, x_BTD: Tensor, g_proj: Callable[[Tensor], Tensor] | None,
                      kind: OutputGate) -> Tensor:
    """Multiply the output of attention by sigmoid(g_proj(x)), and flatten its heads: [B, T, H * V]."""
    if g_proj is None:
        return o_BTHV.flatten(-2)
    gate = g_proj(x_BTD).sigmoid()
    return o_BTHV.flatten(-2) * gate if kind == "element" else (o_BTHV * gate[..., None]).flatten(-2)
