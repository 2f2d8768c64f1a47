"""RWKV-5 (Eagle) and RWKV-6 (Finch): linear attention whose query reads the state before the token is written.

    y_t = r_t^T (S_{t-1} + Diag(u) k_t v_t^T);   S_t = Diag(w_t) S_{t-1} + k_t v_t^T
    out = W_o (norm(y) * silu(g)),   norm over each head

r, k, v, g (and w) are projections of the token mixed with the one before it. Eagle has one decay w = exp(-exp(.)) per
channel and one mix per input; in Finch both depend on the token, through low-rank maps.
Source: Peng et al. 2024 (Eagle and Finch), sections 3 and 4.

B rows, T tokens, D hidden size, H heads, K dims per head, R rank, M mixed inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.layer_context import LayerContext, NormConfig, ShardTraffic
from hybridlm.model.mixers.common.init import init_projections
from hybridlm.model.mixers.common.matrix_state import matrix_traffic, scan_matrix_state
from hybridlm.model.mixers.common.rwkv import channel_ramp, depth_ratio, zigzag
from hybridlm.model.mixers.common.state_heads import StateHeadsConfig
from hybridlm.model.mixers.common.tensor_state_mixer import TensorStateMixer
from hybridlm.model.mixers.common.token_shift import lerp_with_previous, previous_tokens
from hybridlm.model.mixers.contract import Aux, register_mixer
from hybridlm.model.norm import HeadGroupNorm
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm.model.sequence import SequenceInfo

FP32_BYTES = 4  # bytes per element
CHUNK_TOKENS = 32  # tokens per chunk of the operation, assumed by the estimate of activations
NORM_EPS = 64e-5  # of the published norm, y / 8 normalised with 1e-5


@dataclass(kw_only=True)
class RWKV6Config(StateHeadsConfig):
    """Configuration of the time mix of RWKV-5 and RWKV-6.

    Args:
        num_heads: heads H.
        head_dim: dims K of a head, for keys and values.
        version: 5 (Eagle: decays and mixes do not depend on the token) or 6 (Finch).
        decay_rank: rank of the map from the token to its decay (Finch).
        mix_rank: rank of the maps from the token to its mixes (Finch).

    Raises:
        ConfigError: a size that is not positive.
    """

    kind: str = "rwkv6"
    num_heads: int
    head_dim: int
    version: Literal[5, 6] = 6
    decay_rank: int = 64
    mix_rank: int = 32

    def __post_init__(self) -> None:
        for key in ("num_heads", "head_dim", "decay_rank", "mix_rank"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))

    @property
    def channels(self) -> int:
        """Channels H K of each projection."""
        return self.num_heads * self.head_dim

    @property
    def inputs(self) -> str:
        """Letters of the mixed inputs, in the order of their parameters."""
        return "rkvg" if self.version == 5 else "wkvrg"

    def _matrix_params(self, context: LayerContext) -> int:
        D, C = context.hidden_size, self.channels
        low_rank = 2 * D * self.mix_rank * len(self.inputs) + self.decay_rank * (D + C) if self.version == 6 else 0
        return 5 * D * C + low_rank

    def num_params(self, context: LayerContext) -> int:
        mixes = context.hidden_size * (len(self.inputs) + (self.version == 6))
        return self._matrix_params(context) + mixes + 4 * self.channels  # decay, bonus, weight and bias of the norm

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        """The recurrence is counted as the paper writes it, with the bonus of the token itself."""
        return {"projections": 2.0 * self._matrix_params(context),
                "recurrence": self.channels * (5.0 * self.head_dim + 5.0)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the state and the last decay in fp32, and of the last token, key and value."""
        C = self.channels
        return FP32_BYTES * C * (self.head_dim + 1) + element_bytes * (context.hidden_size + 2 * C)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: mixed inputs, and the chunked operation in fp32."""
        D, C, M = context.hidden_size, self.channels, len(self.inputs)
        mixed = (2 + 2 * M) * D + (M * (D + 2 * self.mix_rank) if self.version == 6 else 0)
        chunk = self.num_heads * (self.head_dim**2 / CHUNK_TOKENS + 2 * CHUNK_TOKENS)
        return element_bytes * (mixed + 9 * C) + FP32_BYTES * (12 * C + chunk)

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: the recurrence is linear in its state, and the shift needs one token."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        """Bytes of the last token, key, value and decay, and in fp32 of the state and its decay over the shard."""
        C = self.channels
        tail = rows * (element_bytes * (context.hidden_size + 2 * C) + FP32_BYTES * C)
        return [ShardTraffic("from_previous", tail, tail),
                matrix_traffic(rows, self.num_heads, self.head_dim, self.head_dim, C)]

    def canonical(self, norm: NormConfig) -> dict[str, Any]:
        data = super().canonical(norm)
        void = ("decay_rank", "mix_rank") if self.version == 5 else ()
        return {key: value for key, value in data.items() if key not in void}


@register_mixer("rwkv6", RWKV6Config)
class RWKV6(TensorStateMixer):
    """Parameters: r_proj, k_proj, v_proj, g_proj [H K, D], o_proj [D, H K], mix [M, D], decay and bonus [H, K], o_norm;
    in Finch also mix_base [D], mix_a [M, D, R], mix_b [M, R, D], decay_a_proj and decay_b_proj.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("decay", "bonus", "mix", "mix_base", "o_norm.weight", "o_norm.bias")
    config: RWKV6Config

    def __init__(self, config: RWKV6Config, context: LayerContext):
        super().__init__()
        self.config = config
        self.ratios = depth_ratio(context)
        D, C, M = context.hidden_size, config.channels, len(config.inputs)
        self.r_proj, self.k_proj, self.v_proj, self.g_proj = (nn.Linear(D, C, bias=False) for _ in range(4))
        self.o_proj = nn.Linear(C, D, bias=False)
        self.mix = nn.Parameter(torch.zeros(M, D))
        self.decay = nn.Parameter(torch.zeros(config.num_heads, config.head_dim))
        self.bonus = nn.Parameter(torch.zeros(config.num_heads, config.head_dim))
        if config.version == 6:
            self.mix_base = nn.Parameter(torch.zeros(D))
            self.mix_a = nn.Parameter(torch.zeros(M, D, config.mix_rank))
            self.mix_b = nn.Parameter(torch.zeros(M, config.mix_rank, D))
            self.decay_a_proj = nn.Linear(D, config.decay_rank, bias=False)
            self.decay_b_proj = nn.Linear(config.decay_rank, C, bias=False)
        self.o_norm = HeadGroupNorm(config.num_heads, C, NORM_EPS)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        config = self.config
        mixed = self.mix_inputs(x_BTD, previous_tokens(x_BTD, seq, state))
        shape = (config.num_heads, config.head_dim)
        r_BTHK, k_BTHK, v_BTHK = (projection(mixed[name]).unflatten(-1, shape) for name, projection in (
            ("r", self.r_proj), ("k", self.k_proj), ("v", self.v_proj)))
        g_BTHK = -self._log_decay(mixed, x_BTD).exp()
        o_BTHK = self._read_before_writing(r_BTHK, k_BTHK, v_BTHK, g_BTHK, seq, state)
        wide = o_BTHK.dtype if o_BTHK.dtype == torch.float64 else torch.float32
        own_BTH1 = (r_BTHK.to(wide) * self.bonus * k_BTHK.to(wide)).sum(-1, keepdim=True)
        y_BTC = self.o_norm((o_BTHK + own_BTH1 * v_BTHK).to(x_BTD.dtype).flatten(-2))
        return self.o_proj(y_BTC * F.silu(self.g_proj(mixed["g"]))), {}

    def mix_inputs(self, x_BTD: Tensor, before_BTD: Tensor) -> dict[str, Tensor]:
        """Mix each token with the one before it: the inputs [B, T, D] of the projections, by their letters."""
        names = self.config.inputs
        if self.config.version == 5:
            return {name: lerp_with_previous(x_BTD, before_BTD, mix).to(x_BTD.dtype)
                    for name, mix in zip(names, self.mix, strict=True)}
        base_BTD = lerp_with_previous(x_BTD, before_BTD, self.mix_base).to(x_BTD.dtype)
        mixed = {}
        for name, mix_D, a_DR, b_RD in zip(names, self.mix, self.mix_a, self.mix_b, strict=True):
            share_BTD = mix_D + (base_BTD @ a_DR.to(base_BTD.dtype)).tanh() @ b_RD.to(base_BTD.dtype)
            mixed[name] = lerp_with_previous(x_BTD, before_BTD, share_BTD).to(x_BTD.dtype)
        return mixed

    def _log_decay(self, mixed: Mapping[str, Tensor], x_BTD: Tensor) -> Tensor:
        """The logarithm of -log(w), [B, T, H, K], in fp32 at least."""
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        if self.config.version == 5:
            return self.decay.to(wide).expand(*x_BTD.shape[:2], -1, -1)
        low_BTC = self.decay_b_proj(self.decay_a_proj(mixed["w"]).tanh())
        return self.decay + low_BTC.to(wide).unflatten(-1, self.decay.shape)

    def _read_before_writing(self, r_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, g_BTHK: Tensor, seq: SequenceInfo,
                             state: TensorState | None) -> Tensor:
        """S_{t-1}^T r_t, [B, T, H, K]: the operation on the keys, values and decays of the token before.

        What the query reads was written up to the token before. So each token writes the key of the one before it,
        behind that one's decay, and reads what is then there.
        """
        last = [previous_tokens(x.flatten(-2), seq, state, name).unflatten(-1, x.shape[-2:])
                for name, x in (("key", k_BTHK), ("value", v_BTHK), ("decay", g_BTHK))]
        return scan_matrix_state(r_BTHK, last[0], last[1], last[2], seq, state)

    def head_rows(self) -> dict[str, int]:
        return dict.fromkeys(("r_proj", "k_proj", "v_proj", "g_proj", "decay_b_proj"), self.config.num_heads)

    def parameter_roles(self) -> dict[str, ParameterRole]:
        stacks = {name: ParameterRole("expert_stack") for name in ("mix_a", "mix_b")}
        return find_roles(self, stacks | dict.fromkeys(("mix", "decay", "bonus"), VECTOR), self.head_rows())

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Ramps over channels and layers, as in the authors' code (RWKV-LM, x052 and x060)."""
        init_projections(self, std)
        config, (r01, r10) = self.config, self.ratios
        C = config.channels
        position = torch.arange(C, dtype=torch.float32) / max(C - 1, 1)
        speed = -6.0 + 5.0 * position ** (0.7 + 1.3 * r01)
        self.decay.copy_(speed.view_as(self.decay))
        self.bonus.copy_((r01 * (1.0 - position) + zigzag(C)).view_as(self.bonus))
        ramp_D = channel_ramp(self.mix.shape[1])
        keys = 1.0 - ramp_D**r10
        starts = {"r": 1.0 - ramp_D ** (0.5 * r10), "k": keys, "v": keys - 0.3 * r01, "w": keys,
                  "g": 1.0 - ramp_D ** (0.5 * r10)}
        self.mix.copy_(torch.stack([starts[name] for name in config.inputs]))
        if config.version == 6:
            self.mix_base.copy_(keys)
            nn.init.zeros_(self.mix_a)
            nn.init.uniform_(self.mix_b, -0.01, 0.01)
            nn.init.zeros_(self.decay_a_proj.weight)
            nn.init.uniform_(self.decay_b_proj.weight, -0.01, 0.01)
