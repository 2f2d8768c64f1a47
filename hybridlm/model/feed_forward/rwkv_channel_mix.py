"""Channel mix of RWKV: a squared ReLU on the token mixed with the one before it.

    y = W_v relu(W_k x_k)^2,   times sigmoid(W_r x_r) up to RWKV-6

DeepEmbed multiplies by a table of the token's id, at the output (RWKV-8) or inside (RWKV-7a):

    y = E[id] * W_v relu(W_k x_k)^2,      y = W_v (relu(W_k x_k)^2 * (W_b (M[id] W_a x) + s)),   M[id] an R x R matrix

Sources: Peng et al. 2023 (RWKV-4), section 3.1.2; Peng et al. 2024 (Eagle and Finch); Peng et al. 2025 (RWKV-7);
DeepEmbed: RWKV-LM, rwkv_v7a_demo.py and rwkv_v8_rc00_demo.py.
B rows, T tokens, D hidden size, I inner width, R rank, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_state import TensorState
from hybridlm.model.feed_forward.contract import FeedForward, FeedForwardConfig, register_feed_forward
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers.common.rwkv import channel_ramp, depth_ratio
from hybridlm.model.mixers.common.token_shift import lerp_with_previous, previous_tokens
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.token_table import look_up, token_ids


@dataclass(kw_only=True)
class RWKVChannelMixConfig(FeedForwardConfig):
    """Configuration of RWKV's channel mix.

    Args:
        intermediate_size: inner width I; RWKV-4 and 7 have four times the hidden size, RWKV-5 and 6 seven halves of it.
        receptance: whether the output is gated by the token mixed with the one before it (up to RWKV-6).
        deep_embed: whether a table of token ids multiplies the output (RWKV-8), or the inner tensor (RWKV-7a).
        deep_embed_rank: rank R of the inner one, whose table has R^2 numbers per token.

    Raises:
        ConfigError: a width that is not positive.
    """

    kind: str = "rwkv_channel_mix"
    intermediate_size: int
    receptance: bool = False
    deep_embed: Literal["none", "output", "inner"] = "none"
    deep_embed_rank: int = 32
    keeps_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for key in ("intermediate_size", "deep_embed_rank"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))

    def _matrix_params(self, context: LayerContext) -> int:
        return context.hidden_size * (2 * self.intermediate_size + context.hidden_size * self.receptance)

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        count = self._matrix_params(context) + context.hidden_size * (1 + self.receptance)
        if self.deep_embed == "inner":
            count += self.deep_embed_rank * (context.hidden_size + self.intermediate_size) + self.intermediate_size
        return count + self.lookup_params(context)

    def lookup_params(self, context: LayerContext) -> int:
        width = {"none": 0, "output": context.hidden_size, "inner": self.deep_embed_rank**2}[self.deep_embed]
        return context.vocab_size * width

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        parts = {"channel mix": 2.0 * self._matrix_params(context)}
        if self.deep_embed == "inner":
            rank = self.deep_embed_rank
            parts["deep embed"] = 2.0 * rank * (context.hidden_size + self.intermediate_size + rank)
        return parts

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        """Bytes per token kept for the backward pass: the mixed inputs, and the inner tensors around the square."""
        mixed = 1 + (4 if self.receptance else 2)
        deep = {"none": 0, "output": 2 * context.hidden_size,
                "inner": 2 * self.intermediate_size + self.deep_embed_rank**2}[self.deep_embed]
        return element_bytes * (mixed * context.hidden_size + 3 * self.intermediate_size + deep)

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        """Bytes of the last token."""
        return element_bytes * context.hidden_size

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut anywhere: each shard needs the token before it."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        tail = rows * element_bytes * context.hidden_size
        return [ShardTraffic("from_previous", tail, tail)]

    def canonical(self, context: LayerContext) -> dict[str, Any]:
        data = super().canonical(context)
        return data if self.deep_embed == "inner" else {k: v for k, v in data.items() if k != "deep_embed_rank"}


@register_feed_forward("rwkv_channel_mix", RWKVChannelMixConfig)
class RWKVChannelMix(FeedForward):
    """Parameters: key_proj [I, D], value_proj [D, I], mix_k [D]; with receptance r_proj [D, D] and mix_r [D].

    DeepEmbed: deep_embed [V, D]; inside, deep_embed [V, R * R], deep_a_proj [R, D], deep_b_proj [I, R], deep_scale [I].
    The table may lie on another device than the tokens, such as the host: rows are looked up there.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ("mix_k", "mix_r", "deep_scale")

    def __init__(self, config: RWKVChannelMixConfig, context: LayerContext):
        super().__init__()
        D = context.hidden_size
        self.receptance = config.receptance
        self.remaining_depth = depth_ratio(context)[1]
        self.key_proj = nn.Linear(D, config.intermediate_size, bias=False)
        self.value_proj = nn.Linear(config.intermediate_size, D, bias=False)
        self.mix_k = nn.Parameter(torch.zeros(D))
        if config.receptance:
            self.r_proj = nn.Linear(D, D, bias=False)
            self.mix_r = nn.Parameter(torch.zeros(D))
        self.deep_embed: nn.Embedding | None = None
        self.deep_is_inner = config.deep_embed == "inner"
        if config.deep_embed != "none":
            rank = config.deep_embed_rank
            self.deep_embed = nn.Embedding(context.vocab_size, rank**2 if self.deep_is_inner else D)
        if self.deep_is_inner:
            self.deep_a_proj = nn.Linear(D, rank, bias=False)
            self.deep_b_proj = nn.Linear(rank, config.intermediate_size, bias=False)
            self.deep_scale = nn.Parameter(torch.zeros(config.intermediate_size))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: TensorState | None = None) -> tuple[Tensor, Aux]:
        before_BTD = previous_tokens(x_BTD, seq, state)
        k_BTI = self.key_proj(lerp_with_previous(x_BTD, before_BTD, self.mix_k).to(x_BTD.dtype))
        k_BTI = F.relu(k_BTI).square()
        if self.deep_embed is not None and self.deep_is_inner:
            a_BTR = self.deep_a_proj(x_BTD)
            rows_BTRR = self._look_up(self.deep_embed, seq, x_BTD).unflatten(-1, (-1, a_BTR.shape[-1])).to(a_BTR.dtype)
            gate_BTI = self.deep_b_proj((a_BTR[..., None, :] @ rows_BTRR).squeeze(-2)) + self.deep_scale
            k_BTI = k_BTI * gate_BTI.to(k_BTI.dtype)
        y_BTD = self.value_proj(k_BTI)
        if self.deep_embed is not None and not self.deep_is_inner:
            y_BTD = y_BTD * self._look_up(self.deep_embed, seq, x_BTD).to(y_BTD.dtype)
        if self.receptance:
            y_BTD = self.r_proj(lerp_with_previous(x_BTD, before_BTD, self.mix_r).to(x_BTD.dtype)).sigmoid() * y_BTD
        return y_BTD, {}

    @staticmethod
    def _look_up(table: nn.Embedding, seq: SequenceInfo, x_BTD: Tensor) -> Tensor:
        """The rows of the tokens, on the device of x."""
        return look_up(table, token_ids(seq, "a feed-forward with deep_embed"), x_BTD.device)

    def new_state(self, batch: int, max_length: int) -> TensorState:
        return TensorState()

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Mixes are ramps over channels and layers, steeper without receptance (RWKV-LM, x052, x060 and x070).

        DeepEmbed multiplies by one at the start: the authors' files hold trained tables, and no start is published.
        """
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(linear.weight, std=std)
        if self.deep_embed is not None and self.deep_is_inner:
            rank = self.deep_a_proj.out_features
            self.deep_embed.weight.copy_(torch.eye(rank).flatten().expand_as(self.deep_embed.weight))
            nn.init.zeros_(self.deep_b_proj.weight)
            nn.init.ones_(self.deep_scale)
        elif self.deep_embed is not None:
            nn.init.ones_(self.deep_embed.weight)
        power = self.remaining_depth if self.receptance else self.remaining_depth**4
        start_D = 1.0 - channel_ramp(self.mix_k.shape[0]) ** power
        self.mix_k.copy_(start_D)
        if self.receptance:
            self.mix_r.copy_(start_D)
