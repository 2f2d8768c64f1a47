"""minGRU and minLSTM: recurrent networks whose gates read the token alone, so that they can be scanned.

    minGRU    z = sigmoid(W_z x);                          h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t)
    minLSTM   f = sigmoid(W_f x), i = sigmoid(W_i x);      h_t = f/(f+i) h_{t-1} + i/(f+i) g(W_h x_t)
    g(u) = u + 1/2 for u >= 0, sigmoid(u) below;           out = W_o h

Source: Feng et al. 2024 (Were RNNs all we needed?), sections 3.1, 3.2 and appendix B.

B rows, T tokens, D hidden size, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps, check_taps_in_shards, conv_traffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.scan import FP32_BYTES, scan_tokens, scan_traffic
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class MinRNNConfig(MixerConfig):
    """Configuration of minGRU and minLSTM.

    Args:
        rule: gru with one gate, or lstm with two that are normalised to one.
        expand: channels C per dim of the model.
        conv_size: taps of a convolution over the input; 0 has none. The paper's language model has 4.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "min_rnn"
    rule: Literal["gru", "lstm"] = "gru"
    expand: float = 1.5
    conv_size: int = 4
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.expand > 0, "expand", "must be positive", got=self.expand)
        check_taps(self.conv_size, optional=True)

    def channels(self, context: LayerContext) -> int:
        """Channels C of the recurrence."""
        return int(self.expand * context.hidden_size)

    @property
    def gates(self) -> tuple[str, ...]:
        """Names of the gates."""
        return ("z",) if self.rule == "gru" else ("f", "i")

    def _weights(self, context: LayerContext) -> int:
        return (2 + len(self.gates)) * context.hidden_size * self.channels(context)

    def num_params(self, context: LayerContext) -> int:
        return self._weights(context) + (context.hidden_size * (self.conv_size + 1) if self.conv_size else 0)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        return {"projections": 2.0 * self._weights(context), "conv": 2.0 * self.conv_size * context.hidden_size,
                "recurrence": 4.0 * self.channels(context)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of h in fp32 and of the inputs of the convolution in the dtype of the model."""
        taps = max(self.conv_size - 1, 0)
        return FP32_BYTES * self.channels(context) + element_bytes * taps * context.hidden_size

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the input, and gates, factors and states in fp32."""
        C, gates = self.channels(context), len(self.gates)
        return element_bytes * (3 * context.hidden_size + C) + FP32_BYTES * (6 + 3 * gates) * C

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_taps_in_shards(self.conv_size, length)

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return [*conv_traffic(rows, self.conv_size, context.hidden_size, element_bytes),
                scan_traffic(rows, self.channels(context))]


@register_mixer("min_rnn", MinRNNConfig)
class MinRNN(TensorStateMixer):
    """Parameters: h_proj and a projection per gate (z_proj, or f_proj and i_proj) [C, D], out_proj [D, C], conv."""

    config: MinRNNConfig

    def __init__(self, config: MinRNNConfig, context: LayerContext):
        super().__init__()
        self.config = config
        C = config.channels(context)
        self.conv = CausalConv(context.hidden_size, config.conv_size, activation=None) if config.conv_size else None
        self.h_proj = nn.Linear(context.hidden_size, C, bias=False)
        for name in config.gates:
            setattr(self, f"{name}_proj", nn.Linear(context.hidden_size, C, bias=False))
        self.out_proj = nn.Linear(C, context.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        x_BTD = x_BTD if self.conv is None else self.conv(x_BTD, seq, state)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        logits = [getattr(self, f"{name}_proj")(x_BTD).to(wide) for name in self.config.gates]
        if self.config.rule == "gru":
            write_BTC, keep_BTC = logits[0].sigmoid(), (-logits[0]).sigmoid()
        else:
            forget_BTC, enter_BTC = (x.sigmoid() for x in logits)
            total_BTC = forget_BTC + enter_BTC
            write_BTC, keep_BTC = enter_BTC / total_BTC, forget_BTC / total_BTC
        h_BTC = scan_tokens(write_BTC * positive(self.h_proj(x_BTD).to(wide)), keep_BTC, seq, state)
        return self.out_proj(h_BTC.to(x_BTD.dtype)), {}

    def init_weights(self, std: float) -> None:
        init_projections(self, std)
        if self.conv is not None:
            self.conv.reset_parameters()


def positive(x: Tensor) -> Tensor:
    """g of the paper, which keeps candidates positive: x + 1/2 from 0 on, the sigmoid of x below.

    >>> positive(torch.tensor([0.0, 2.0, -100.0]))
    tensor([0.5000, 2.5000, 0.0000])
    """
    return torch.where(x >= 0, x + 0.5, x.sigmoid())
