"""The mLSTM block of the first xLSTM: the recurrence inside an up-projection, behind a convolution and before a gate.

    (u, z) = W_up x;   c = SiLU(conv(u));   q, k = blocks of 4 of c;   v = blocks of 4 of u
    i, f = W [q, k, v] + b;   h = mLSTM(q, k, v, i, f)
    y = W_down ((LayerNorm(h) + s * c) * SiLU(z)),   the norm over each head, s one number per channel

Source: Beck et al. 2024, xLSTM, section 2.3 and figure 11.

B rows, T tokens, D hidden size, C channels of the block, H heads, K = C / H dims of queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv
from hybridlm.model.mixers.common.exponential_gates import (
    FP32_BYTES,
    count_activations,
    count_state,
    init_gates,
    read_exponential_state,
    state_traffic,
)
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.mixers.sizing import ModelSizes
from hybridlm.model.norm import HeadGroupNorm
from hybridlm.model.parameter_roles import ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo

MAPS = ("q", "k", "v")


@dataclass(kw_only=True)
class MLSTMBlockConfig(StateHeadsConfig):
    """Configuration of the mLSTM block.

    Args:
        num_heads: heads H, which divide the channels.
        expand: channels C per dim of the model.
        conv_size: taps of the convolution before queries and keys.
        map_size: dims of each block of the block-diagonal maps to queries, keys and values; divides the channels.
        norm_eps: of the norm over each head.

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "mlstm_block"
    num_heads: int
    expand: float = 2.0
    conv_size: int = 4
    map_size: int = 4
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for key in ("num_heads", "expand", "map_size", "norm_eps"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        require(self.conv_size >= 2, "conv_size", "is not a convolution", got=self.conv_size,
                expected="2 taps and more")

    def channels(self, context: LayerContext) -> int:
        """Channels C of the block.

        Raises:
            ConfigError: heads or maps do not divide them.
        """
        C = int(self.expand * context.hidden_size)
        for key in ("num_heads", "map_size"):
            require(C % getattr(self, key) == 0, key, "must divide the channels of the block", got=getattr(self, key),
                    expected=f"a divisor of {C}")
        return C

    def _matrix_params(self, context: LayerContext) -> int:
        C = self.channels(context)
        return C * (3 * context.hidden_size + 3 * self.map_size + 6 * self.num_heads)

    def num_params(self, context: LayerContext) -> int:
        return self._matrix_params(context) + self.channels(context) * (self.conv_size + 3) + 2 * self.num_heads

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it, with the normaliser."""
        C = self.channels(context)
        return {"projections": 2.0 * self._matrix_params(context), "conv": 2.0 * self.conv_size * C,
                "recurrence": 5.0 * C * (C // self.num_heads + 1)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        C = self.channels(context)
        K = C // self.num_heads
        return FP32_BYTES * count_state(self.num_heads, K, K) + element_bytes * (self.conv_size - 1) * C

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the input, the block's channels, and the recurrence."""
        C = self.channels(context)
        K = C // self.num_heads
        kept = element_bytes * (context.hidden_size + 12 * C)
        return kept + FP32_BYTES * (3 * C + count_activations(self.num_heads, K, K))

    def check_context_parallel(self, shards: int, length: int) -> None:
        require(self.conv_size <= length + 1, "conv_size", "reaches over more than one shard of a split row",
                got=self.conv_size, expected=f"at most {length + 1} taps",
                hint="a smaller engine.context_parallel, or longer sequences")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        C = self.channels(context)
        K = C // self.num_heads
        tail = rows * (self.conv_size - 1) * C * element_bytes
        return [ShardTraffic("from_previous", tail, tail), *state_traffic(rows, self.num_heads, K, K)]

    @classmethod
    def sizes_from(cls, options: Mapping[str, Any], model: ModelSizes) -> dict[str, Any]:
        """Heads of the model's nearest mixer."""
        return {"num_heads": model.heads_for(cls).num_heads}


@register_mixer("mlstm_block", MLSTMBlockConfig)
class MLSTMBlock(TensorStateMixer):
    """Parameters: up_proj [2 C, D], down_proj [D, C], conv, q_map, k_map, v_map [C / M, M, M], i_proj, f_proj [H, 3 C]
    with i_bias, f_bias [H], o_norm [C], skip [C].
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("i_bias", "f_bias", "o_norm.weight", "skip")
    config: MLSTMBlockConfig

    def __init__(self, config: MLSTMBlockConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D, C, H, M = context.hidden_size, config.channels(context), config.num_heads, config.map_size
        self.up_proj, self.down_proj = nn.Linear(D, 2 * C, bias=False), nn.Linear(C, D, bias=False)
        self.conv = CausalConv(C, config.conv_size)
        for name in MAPS:
            setattr(self, f"{name}_map", nn.Parameter(torch.zeros(C // M, M, M)))
        self.i_proj, self.f_proj = (nn.Linear(3 * C, H, bias=False) for _ in range(2))
        self.i_bias, self.f_bias = (nn.Parameter(torch.zeros(H)) for _ in range(2))
        self.o_norm = HeadGroupNorm(H, C, config.norm_eps, bias=False)
        self.skip = nn.Parameter(torch.ones(C))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        u_BTC, z_BTC = self.up_proj(x_BTD).chunk(2, -1)
        c_BTC = self.conv(u_BTC, seq, state)
        q_BTC, k_BTC, v_BTC = (self._map(name, x) for name, x in zip(MAPS, (c_BTC, c_BTC, u_BTC), strict=True))
        all_BTX = torch.cat([q_BTC, k_BTC, v_BTC], -1)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        i_BTH, f_BTH = self.i_proj(all_BTX).to(wide) + self.i_bias, self.f_proj(all_BTX).to(wide) + self.f_bias
        q_BTHK, k_BTHK, v_BTHK = (x.unflatten(-1, (self.config.num_heads, -1)) for x in (q_BTC, k_BTC, v_BTC))
        h_BTC = read_exponential_state(q_BTHK, k_BTHK, v_BTHK, i_BTH, f_BTH, seq, state).flatten(-2)
        h_BTC = (self.o_norm(h_BTC) + self.skip * c_BTC).to(x_BTD.dtype)
        return self.down_proj(h_BTC * F.silu(z_BTC)), {}

    def _map(self, name: str, x_BTC: Tensor) -> Tensor:
        """A block-diagonal map of the channels, [B, T, C]."""
        weight = getattr(self, f"{name}_map").to(x_BTC.dtype)
        return torch.einsum("btgi,goi->btgo", x_BTC.unflatten(-1, (-1, weight.shape[-1])), weight).flatten(-2)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        maps = {f"{name}_map": ParameterRole("expert_stack") for name in MAPS}
        return find_roles(self, maps, self.head_rows())

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("i_proj", "f_proj"), self.config.num_heads)

    def init_weights(self, std: float) -> None:
        """Block-diagonal maps are normal with variance 2 / 5 C; gates start from their biases, inputs N(0, 0.1)."""
        init_projections(self, std)
        self.conv.reset_parameters()
        for name in MAPS:
            nn.init.normal_(getattr(self, f"{name}_map"), std=(2.0 / (5.0 * len(self.skip))) ** 0.5)
        init_gates(self.i_proj.weight, self.f_proj.weight, self.f_bias)
        nn.init.normal_(self.i_bias, std=0.1)
        nn.init.ones_(self.skip)
