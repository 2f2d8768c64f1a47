"""Token shift: the input of the token before, beside that of each token.

B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.decode_state import TensorState
from hybridlm.model.sequence import SequenceInfo


def previous_tokens(x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None,
                    name: str = "shift") -> Tensor:
    """The values of the token before each token, within its document.

    Args:
        x_BTD: values of every token.
        seq: positions, which say where documents begin, and the shard of the rows held here.
        state: decode state that holds the last token of the earlier call under `name`; it then holds that of this one.
        name: key of that token in the state; a layer with several shifts has one key for each.

    Returns:
        [B, T, D]; zeros for the first token of each document.

    Source: Peng et al. 2023, RWKV, section 3.1.1 (token shift).

    >>> x = torch.arange(1.0, 5.0).view(1, 4, 1)
    >>> previous_tokens(x, SequenceInfo.make(1, 4, x.device)).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    first_B1D = torch.zeros_like(x_BTD[:, :1])
    if seq.shard is not None:
        first_B1D = seq.shard.tail(x_BTD, 1)
    elif state is not None and name in state.tensors:
        first_B1D = state.tensors[name][:, None].to(x_BTD.dtype)
    if state is not None:
        state.tensors[name] = x_BTD[:, -1].detach().clone()
    before_BTD = torch.cat([first_B1D, x_BTD[:, :-1]], 1)
    return torch.where((seq.positions_BT > 0)[..., None], before_BTD, 0.0)


def lerp_with_previous(x_BTD: Tensor, before_BTD: Tensor, mix_D: Tensor) -> Tensor:
    """Mix each token with the one before it: x + (before - x) * mix.

    Args:
        x_BTD: values of every token.
        before_BTD: those of the token before, from `previous_tokens`.
        mix_D: share of the token before, per channel, or [B, T, D] where it depends on the token.

    >>> lerp_with_previous(torch.tensor([4.0]), torch.tensor([0.0]), torch.tensor([0.25]))
    tensor([3.])
    """
    return x_BTD + (before_BTD - x_BTD) * mix_D
