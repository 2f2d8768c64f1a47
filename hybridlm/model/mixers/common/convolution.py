"""A short causal convolution as a module, with bias and over any channels (Mamba, xLSTM, Griffin, LFM2).

B rows, T tokens, C channels, W taps.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import ShardTraffic
from hybridlm.model.mixers.common.init import init_conv
from hybridlm.model.parameter_roles import CONVOLUTION, VECTOR, ParameterRole
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import short_conv
from hybridlm_kernels.ops.short_conv import MAX_TAPS


def check_taps(taps: int, optional: bool = False) -> None:
    """Raise ConfigError unless `conv_size` is a number of taps; 0 stands for no convolution where it is optional."""
    require(taps >= 2 or (optional and taps == 0), "conv_size", "is not a convolution", got=taps,
            expected="0 (none), or 2 taps and more" if optional else "2 taps or more")


def check_taps_in_shards(taps: int, length: int, option: str = "conv_size") -> None:
    """Raise ConfigError where a convolution reaches over more than one shard of `length` tokens."""
    require(taps <= length + 1, option, "reaches over more than one shard of a split row", got=taps,
            expected=f"at most {length + 1} taps", hint="a smaller engine.context_parallel, or longer sequences")


def conv_traffic(rows: int, taps: int, channels: int, element_bytes: int) -> list[ShardTraffic]:
    """Bytes of the inputs of a convolution that a shard gets from the one before it.

    >>> conv_traffic(rows=2, taps=4, channels=8, element_bytes=2)
    [ShardTraffic(kind='from_previous', forward=96, backward=96)]
    """
    tail = rows * max(taps - 1, 0) * channels * element_bytes
    return [ShardTraffic("from_previous", tail, tail)] if tail else []


def spread_taps(weight_CW: Tensor, dilation: int) -> Tensor:
    """Filters with `dilation` - 1 zeros between two taps.

    >>> spread_taps(torch.tensor([[1.0, 2.0]]), 3).tolist()
    [[1.0, 0.0, 0.0, 2.0]]
    """
    spread_CX = F.pad(weight_CW[..., None], (0, dilation - 1)).flatten(1)
    return spread_CX[:, : spread_CX.shape[1] - dilation + 1]


class CausalConv(nn.Module):
    """Depthwise causal convolution along time that starts anew at every document.

    Args:
        channels: channels C, each with a filter of its own.
        taps: taps W of each filter; the last one multiplies the current token.
        bias: whether a bias is added before the activation.
        activation: "silu" or None.
        dilation: tokens from one tap to the next.

    Example:
        >>> conv = CausalConv(channels=2, taps=3, bias=True)
        >>> conv.reset_parameters()
        >>> conv(torch.ones(1, 4, 2), SequenceInfo.make(1, 4, torch.device("cpu"))).shape
        torch.Size([1, 4, 2])
    """

    def __init__(self, channels: int, taps: int, bias: bool = True, activation: Literal["silu"] | None = "silu",
                 dilation: int = 1):
        super().__init__()
        self.dilation = dilation
        self.weight = nn.Parameter(torch.zeros(channels, taps))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.activation: Literal["silu"] | None = activation

    def forward(self, x_BTC: Tensor, seq: SequenceInfo, state: TensorState | None = None,
                name: str = "conv") -> Tensor:
        """Convolve.

        Args:
            x_BTC: inputs of every token.
            seq: borders of the documents, and the shard of the rows held here.
            state: decode state that holds the last inputs under `name`, as many as the filters reach back, and then
                those of this call.
            name: key of these inputs in the state.

        Returns:
            [B, T, C] in the dtype of x.
        """
        weight_CW = self.weight if self.dilation == 1 else spread_taps(self.weight, self.dilation)
        start = None if state is None else state.tensors.get(name)
        if seq.shard is not None:
            start = seq.shard.at_start(seq.shard.tail(x_BTC, weight_CW.shape[1] - 1).mT)
        long = weight_CW.shape[1] > MAX_TAPS  # of which there is no kernel: a choice, not a fall-back
        y_BTC, inputs = short_conv(x_BTC, weight_CW, self.bias, activation=self.activation,
                                   cu_seqlens=seq.cu_seqlens, initial_state=start, backend="torch" if long else None)
        if state is not None:
            state.tensors[name] = inputs
        return y_BTC

    def reset_parameters(self) -> None:
        """Weights and bias are uniform in +-W^-0.5, torch's default, as in published models."""
        init_conv(self.weight)
        if self.bias is not None:
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        """The filters are a convolution, the bias a vector."""
        return {"weight": CONVOLUTION} | ({} if self.bias is None else {"bias": VECTOR})
