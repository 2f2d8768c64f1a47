"""sLSTM of xLSTM: a recurrent network with exponential gates, whose hidden state feeds the gates of its head.

    u = SiLU(conv(x));   z~ = W_z x + R_z h_{t-1} + b_z,  o~ likewise;   i~ = W_i u + R_i h_{t-1} + b_i,  f~ likewise
    c_t = f c_{t-1} + e^{i~} tanh(z~),   n_t = f n_{t-1} + e^{i~};   h_t = sigmoid(o~) c_t / n_t
    y = LayerNorm(h),   over each head

All W and R are block-diagonal, one block per head. There is no projection behind the norm.
Source: Beck et al. 2024, xLSTM, section 2.2 and figure 10.

B rows, T tokens, D hidden size, H heads, K = D / H dims per head; the gates are in the order z, i, f, o.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv
from hybridlm.model.mixers.common.dense_attention import check_heads
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.rwkv import depth_ratio
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import HeadGroupNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import slstm

FP32_BYTES = 4  # bytes per element
GATES = "zifo"


@dataclass(kw_only=True)
class SLSTMConfig(StateHeadsConfig):
    """Configuration of sLSTM.

    Args:
        num_heads: heads H, which divide the model's width.
        conv_size: taps of the convolution before the input and forget gates.
        norm_eps: of the norm over each head.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "slstm"
    num_heads: int
    conv_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for key in ("num_heads", "norm_eps"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        require(self.conv_size >= 2, "conv_size", "is not a convolution", got=self.conv_size,
                expected="2 taps and more")

    def dims(self, context: LayerContext) -> int:
        """Dims K of a head.

        Raises:
            ConfigError: the heads do not divide the width.
        """
        require(context.hidden_size % self.num_heads == 0, "num_heads", "must divide the width of the model",
                got=self.num_heads, expected=f"a divisor of {context.hidden_size}")
        return context.hidden_size // self.num_heads

    def num_params(self, context: LayerContext) -> int:
        return context.hidden_size * (8 * self.dims(context) + self.conv_size + 6)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D, K = context.hidden_size, self.dims(context)
        return {"projections": 8.0 * D * K, "conv": 2.0 * self.conv_size * D, "recurrence": D * (8.0 * K + 20.0)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of h, c, n and m in fp32, and of the last inputs of the convolution."""
        return context.hidden_size * (4 * FP32_BYTES + (self.conv_size - 1) * element_bytes)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: inputs and norm, and 9 numbers per channel of the recurrence."""
        return context.hidden_size * (5.0 * element_bytes + 13.0 * FP32_BYTES)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Heads are divided between the processes: a shard of a row cannot start before the one before it ends."""
        check_heads(self.num_heads, shards)
        require(self.conv_size <= length + 1, "conv_size", "reaches over more than one shard of a split row",
                got=self.conv_size, expected=f"at most {length + 1} taps",
                hint="a smaller engine.context_parallel, or longer sequences")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes of the inputs of the convolution, of the gates' inputs, and of the outputs."""
        tail = rows * (self.conv_size - 1) * context.hidden_size * element_bytes
        sent = rows * length * element_bytes * 5 * context.hidden_size
        return [ShardTraffic("from_previous", tail, tail), ShardTraffic("exchange", sent, sent)]

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads of the model's nearest mixer, where they divide its width; else one."""
        heads = model.heads_for(cls).num_heads
        return {"num_heads": heads if model.hidden_size % heads == 0 else 1}


@register_mixer("slstm", SLSTMConfig)
class SLSTM(TensorStateMixer):
    """Parameters: conv, z_map, i_map, f_map, o_map [H, K, K], recurrence [4 H, K, K] and gate_bias [4 D], both gate by
    gate in the order z, i, f, o, and o_norm [D].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("gate_bias", "o_norm.weight")
    config: SLSTMConfig

    def __init__(self, config: SLSTMConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.depth = depth_ratio(context)[0]
        D, H, K = context.hidden_size, config.num_heads, config.dims(context)
        self.conv = CausalConv(D, config.conv_size)
        for name in GATES:
            setattr(self, f"{name}_map", nn.Parameter(torch.zeros(H, K, K)))
        self.recurrence = nn.Parameter(torch.zeros(4 * H, K, K))
        self.gate_bias = nn.Parameter(torch.zeros(4 * D))
        self.o_norm = HeadGroupNorm(H, D, config.norm_eps, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        H = self.config.num_heads
        u_BTD = self.conv(x_BTD, seq, state)
        x_BTHK, u_BTHK = (x.unflatten(-1, (H, -1)) for x in (x_BTD, u_BTD))
        gates = [torch.einsum("bthk,hjk->bthj", source, getattr(self, f"{name}_map").to(source.dtype))
                 for name, source in zip(GATES, (x_BTHK, u_BTHK, u_BTHK, x_BTHK), strict=True)]
        gates_BTH4K = torch.stack(gates, 3)
        bias_H4K = self.gate_bias.view(4, H, -1).transpose(0, 1)
        R_H4KK = self.recurrence.unflatten(0, (4, H)).transpose(0, 1)
        borders, shard = seq.cu_seqlens, seq.shard
        if shard is not None:
            (gates_BTHX,) = shard.by_heads(gates_BTH4K.flatten(3))
            gates_BTH4K, borders = gates_BTHX.unflatten(-1, (4, -1)), shard.borders
            bias_H4K, R_H4KK = shard.local_heads(bias_H4K), shard.local_heads(R_H4KK)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        start = None if state is None else state.tensors.get("cell")
        h_BTHK, last_NH4K = slstm(gates_BTH4K.to(wide) + bias_H4K, R_H4KK, initial_state=start, cu_seqlens=borders)
        if state is not None:
            state.tensors["cell"] = last_NH4K
        h_BTHK = h_BTHK.to(x_BTD.dtype)
        if shard is not None:
            h_BTHK = shard.by_tokens(h_BTHK)
        return self.o_norm(h_BTHK.flatten(-2)), {}

    def parameter_roles(self) -> dict[str, ParameterRole]:
        names = [*(f"{name}_map" for name in GATES), "recurrence"]
        return find_roles(self, dict.fromkeys(names, ParameterRole("expert_stack")))

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Recurrent weights are 0; biases of the forget gates fall over the dims of a head, faster in early layers."""
        init_projections(self, std)
        self.conv.reset_parameters()
        D, H = len(self.gate_bias) // 4, self.config.num_heads
        for name in GATES:
            nn.init.normal_(getattr(self, f"{name}_map"), std=(2.0 / (5.0 * D)) ** 0.5)
        nn.init.zeros_(self.recurrence)
        nn.init.zeros_(self.gate_bias)
        K = D // H
        place_K = torch.arange(K, dtype=torch.float32) / max(K - 1, 1)
        forget_K = 5.0 - 12.0 * place_K ** (0.3 + 1.3 * self.depth)
        self.gate_bias.view(4, H, K)[GATES.index("f")].copy_(forget_K.expand(H, K))
