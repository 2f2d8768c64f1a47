"""H3: two state space models between products, the first a shift that compares a key with those of the last tokens.

    k' = shift(k) + D_k * k,   shift a learned filter over the last tokens of each channel
    y_t = SSM(k' v^T)_t^T q_t,   SSM diagonal, the same for all K x K products of a head;   out = W_o y + b_o

With heads of one dim, k' v^T is a product of channels. Source: Fu et al. 2022, Hungry Hungry Hippos, section 3, and the
authors' code (HazyResearch/H3, src/models/ssm/h3.py).

B rows, T tokens, D hidden size, H heads, K dims per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.convolution import CausalConv, check_taps_in_shards, conv_traffic
from hybridlm.model.mixers.common.diagonal_ssm import (
    SSM_PARAMETERS,
    DiagonalSSM,
    count_ssm_params,
    ssm_activation_bytes,
    ssm_flops,
    ssm_state_bytes,
    ssm_traffic,
)
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.precision import wide


@dataclass(kw_only=True)
class H3Config(MixerConfig):
    """Configuration of H3.

    Args:
        head_dim: dims K of a head; a divisor of the hidden size. The published models have 1, the largest 8.
        state_size: real states of the diagonal model per product, two for each complex mode, and taps of the shift.

    Raises:
        ConfigError: a size that is not positive, or an odd number of states.
    """

    kind: str = "h3"
    head_dim: int = 1
    state_size: int = 64
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.head_dim > 0, "head_dim", "must be positive", got=self.head_dim)
        require(self.state_size > 0 and self.state_size % 2 == 0, "state_size", "must be even and positive",
                got=self.state_size)

    @property
    def modes(self) -> int:
        """Pairs of modes per product."""
        return self.state_size // 2

    def heads(self, context: LayerContext) -> int:
        """Heads H.

        Raises:
            ConfigError: heads that do not fill the hidden size.
        """
        require(context.hidden_size % self.head_dim == 0, "head_dim", "must divide the hidden size", got=self.head_dim,
                expected=f"a divisor of {context.hidden_size}")
        return context.hidden_size // self.head_dim

    def num_params(self, context: LayerContext) -> int:
        D = context.hidden_size
        return 4 * D * (D + 1) + D * (self.state_size + 1) + count_ssm_params(self.heads(context), self.modes,
                                                                              "bilinear")

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D = context.hidden_size
        products = D * self.head_dim
        return {"projections": 8.0 * D * D, "conv": 2.0 * D * (self.state_size + 1),
                "recurrence": ssm_flops(products, self.modes) + 3.0 * products}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the modes in fp32, and of the last keys in the dtype of the model."""
        D = context.hidden_size
        return ssm_state_bytes(D * self.head_dim, self.modes) + element_bytes * (self.state_size - 1) * D

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        D = context.hidden_size
        products = D * self.head_dim
        return element_bytes * (9 * D + 2 * products) + ssm_activation_bytes(products, self.modes)

    def check_context_parallel(self, shards: int, length: int) -> None:
        check_taps_in_shards(self.state_size, length, "state_size")

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        D = context.hidden_size
        return [*conv_traffic(rows, self.state_size, D, element_bytes),
                ssm_traffic(rows, self.heads(context), D * self.head_dim, self.modes)]


@register_mixer("h3", H3Config)
class H3(TensorStateMixer):
    """Parameters: q_proj, k_proj, v_proj, o_proj [D, D] with biases, shift [D, taps], k_skip [D], ssm.{A_log, A_imag,
    log_dt, B, C, D} over heads.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = (*SSM_PARAMETERS, "k_skip")
    config: H3Config

    def __init__(self, config: H3Config, context: LayerContext):
        super().__init__()
        self.config = config
        D = context.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))
        self.shift = CausalConv(D, config.state_size, bias=False, activation=None)
        self.k_skip = nn.Parameter(torch.zeros(D))
        self.ssm = DiagonalSSM(config.heads(context), config.modes, "bilinear")

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        K = self.config.head_dim
        q_BTHK, v_BTHK = (projection(x_BTD).unflatten(-1, (-1, K)) for projection in (self.q_proj, self.v_proj))
        k_BTD = self.k_proj(x_BTD)
        k_BTHK = (self.shift(k_BTD, seq, state) + self.k_skip * k_BTD).to(x_BTD.dtype).unflatten(-1, (-1, K))
        products_BTHKK = k_BTHK[..., :, None] * v_BTHK[..., None, :]
        y_BTHKK = self.ssm(products_BTHKK.flatten(-2), seq, state).unflatten(-1, (K, K))
        y_BTHK = (wide(q_BTHK)[..., :, None] * y_BTHKK).sum(-2)
        return self.o_proj(y_BTHK.flatten(-2).to(x_BTD.dtype)), {}

    def init_weights(self, std: float) -> None:
        """The shift is uniform in +-taps^-0.5, k_skip normal, the model S4D-Lin (the authors' code)."""
        init_projections(self, std)
        self.shift.reset_parameters()
        nn.init.normal_(self.k_skip)
        self.ssm.reset_parameters()
