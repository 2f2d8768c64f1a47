"""Ramps over layers and channels from which parameters of RWKV start, as in the authors' code (RWKV-LM)."""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm.model.layer_context import LayerContext


def depth_ratio(context: LayerContext) -> tuple[float, float]:
    """The place of a layer in the model: 0 to 1 from the first to the last layer, and 1 to nearly 0.

    >>> from hybridlm.model.layer_context import NormConfig
    >>> depth_ratio(LayerContext(hidden_size=8, layer_index=3, num_layers=4, norm=NormConfig(), max_position=16))
    (1.0, 0.25)
    """
    layer = min(context.layer_index, context.num_layers - 1)
    return layer / max(context.num_layers - 1, 1), 1.0 - layer / context.num_layers


def channel_ramp(size: int) -> Tensor:
    """The place of each channel, i / size.

    >>> channel_ramp(4).tolist()
    [0.0, 0.25, 0.5, 0.75]
    """
    return torch.arange(size, dtype=torch.float32) / size


def zigzag(size: int) -> Tensor:
    """A small pattern of three values over the channels, which tells neighbours apart.

    >>> zigzag(3).tolist()
    [0.0, 0.10000000149011612, -0.10000000149011612]
    """
    return 0.1 * ((torch.arange(size) + 1) % 3 - 1).float()
