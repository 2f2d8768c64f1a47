"""The keys and values of attention, which later layers read in place of their own, and the heads of queries and keys.

B rows, T tokens, S keys, H query heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hybridlm.model.norm import RMSNorm
from hybridlm.model.rope import RopeConfig, rotate
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.sharing import SharedKind

# Keys, normalised and rotated, and values: two tensors [B, S, G, K]. While decoding, S counts all tokens that are kept.
KEYS_VALUES = SharedKind("the keys and values of attention", gradient=True)
HeadNorm = Literal["none", "head", "full"]


@dataclass(frozen=True)
class KeyLayout:
    """Facts about keys and values that a layer which reads them from another one has to know.

    Args:
        num_heads: query heads H of the layer that leaves them.
        num_kv_heads: key/value heads G.
        head_dim: dims per head K.
        rope: how the keys are rotated.
        window: keys that a token sees; None: all earlier ones.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    window: int | None


def rotated_heads(projected_BTX: Tensor, norm: RMSNorm | None, over: HeadNorm, head_dim: int, rope: RopeConfig,
                  seq: SequenceInfo) -> Tensor:
    """Normalise a projection over each head, or over all together, and rotate its heads by position.

    Args:
        projected_BTX: queries or keys [B, T, H * K].
        norm: the norm; None without one.
        over: what it is over: a `head`, or all of them, `full`.
        head_dim: dims per head K.
        rope: the rotary embedding.
        seq: positions of the tokens.

    Returns:
        [B, T, H, K].
    """
    if norm is not None and over == "full":
        projected_BTX = norm(projected_BTX)
    x_BTHK = projected_BTX.unflatten(-1, (-1, head_dim))
    if norm is not None and over == "head":
        x_BTHK = norm(x_BTHK)
    return rotate(x_BTHK, rope, rope.rotary_dim(head_dim), seq)
