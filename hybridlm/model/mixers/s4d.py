"""S4D: a diagonal state space model per channel that is the same at every token, and a gated linear unit behind it.

    y = SSM(x) + D x;   out = a * sigmoid(b),   [a, b] = W gelu(y) + bias

Source: Gu et al. 2022, On the parameterization and initialization of diagonal state space models, and the authors' code
(state-spaces/s4, models/s4/s4d.py).

B rows, T tokens, D hidden size and channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.diagonal_ssm import (
    SSM_PARAMETERS,
    DiagonalSSM,
    count_ssm_params,
    ssm_activation_bytes,
    ssm_flops,
    ssm_state_bytes,
    ssm_traffic,
)
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.contract import Aux, MixerConfig, register_mixer
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class S4DConfig(MixerConfig):
    """Configuration of S4D.

    Args:
        state_size: real states per channel, two for each complex mode.

    Raises:
        ConfigError: a state size that is not even and positive.
    """

    kind: str = "s4d"
    state_size: int = 64
    is_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.state_size > 0 and self.state_size % 2 == 0, "state_size", "must be even and positive",
                got=self.state_size)

    @property
    def modes(self) -> int:
        """Pairs of modes per channel."""
        return self.state_size // 2

    def num_params(self, context: LayerContext) -> int:
        D = context.hidden_size
        return 2 * D * D + 2 * D + count_ssm_params(D, self.modes, "zoh")

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        D = context.hidden_size
        return {"projections": 4.0 * D * D, "recurrence": ssm_flops(D, self.modes)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return ssm_state_bytes(context.hidden_size, self.modes)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        D = context.hidden_size
        return element_bytes * 7 * D + ssm_activation_bytes(D, self.modes)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        return [ssm_traffic(rows, context.hidden_size, context.hidden_size, self.modes)]


@register_mixer("s4d", S4DConfig)
class S4D(TensorStateMixer):
    """Parameters: ssm.{A_log, A_imag, log_dt, C, D}, out_proj [2 D, D] with a bias."""

    fp32_parameters: ClassVar[tuple[str, ...]] = SSM_PARAMETERS
    config: S4DConfig

    def __init__(self, config: S4DConfig, context: LayerContext):
        super().__init__()
        self.config = config
        D = context.hidden_size
        self.ssm = DiagonalSSM(D, config.modes, "zoh")
        self.out_proj = nn.Linear(D, 2 * D)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        y_BTD = self.ssm(x_BTD[..., None], seq, state)[..., 0]
        return F.glu(self.out_proj(F.gelu(y_BTD).to(x_BTD.dtype))), {}

    def init_weights(self, std: float) -> None:
        """The model is S4D-Lin, the projection uniform in +-D^-0.5, as in the authors' code."""
        self.ssm.reset_parameters()
        self.out_proj.reset_parameters()
