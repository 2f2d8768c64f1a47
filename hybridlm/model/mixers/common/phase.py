"""Phases that add up along a document: what turns the states of GateLoop and Mamba-3 by an angle per token.

B rows, T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.decode_state import TensorState
from hybridlm.model.mixers.common.scan import scan_tokens
from hybridlm.model.sequence import SequenceInfo


def accumulate_phase(angle_BTC: Tensor, seq: SequenceInfo, state: TensorState | None = None,
                     name: str = "phase") -> tuple[Tensor, Tensor]:
    """Cosine and sine of the sum of all angles of a document up to each token, its own included.

    Turns are multiplied as complex numbers: a sum of angles would lose a bit of its fraction whenever it doubles.

    Args:
        angle_BTC: angle in radians by which each token turns each channel, fp32 at least.
        seq: borders of the documents, and the shard of the rows held here.
        state: decode state that holds the phase of the last token under `name`, and then that of this call.
        name: key of the phase in the state.

    Returns:
        cos and sin, [B, T, C] each.

    >>> cos, sin = accumulate_phase(torch.full((1, 3, 1), torch.pi / 2), SequenceInfo.make(1, 3, torch.device("cpu")))
    >>> cos.round().flatten().tolist(), sin.round().flatten().tolist()
    ([-0.0, -1.0, 0.0], [1.0, -0.0, -1.0])
    """
    turn_BTC = torch.polar(torch.ones_like(angle_BTC), angle_BTC)
    first_BT1 = (seq.positions_BT == 0)[..., None]
    phase_BTC = scan_tokens(torch.where(first_BT1, turn_BTC, torch.zeros_like(turn_BTC)), turn_BTC, seq, state, name)
    return phase_BTC.real, phase_BTC.imag
