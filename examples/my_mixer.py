"""A mixer of one's own: a gated moving average, the linear recurrence of minGRU (Feng et al. 2024, section 3.1).

    a_t = sigmoid(W_a x_t + b),   h_t = a_t * h_{t-1} + (1 - a_t) * W_v x_t,   y_t = W_o (h_t * silu(W_g x_t))

    hybridlm check my_mixer --import examples/my_mixer.py
    hybridlm train model=hybrid_tiny model.schedule.linear=my_mixer --import examples/my_mixer.py

B rows, T tokens, D hidden size, W width of the average.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.decode_state import RecurrentState
from hybridlm.model.layer_context import LayerContext, ShardTraffic
from hybridlm.model.mixers import MixerConfig, SequenceMixer, register_mixer
from hybridlm.model.sequence import SequenceInfo


@dataclass(kw_only=True)
class GatedAverageConfig(MixerConfig):
    """A gated moving average over the tokens. `width`: its channels; null takes the hidden size of the model."""

    kind: str = "my_mixer"
    width: int | None = None
    is_linear: ClassVar[bool] = True  # the decode state keeps its size

    def channels(self, context: LayerContext) -> int:
        return context.hidden_size if self.width is None else self.width

    def num_params(self, context: LayerContext) -> int:
        return self.channels(context) * (4 * context.hidden_size + 1)

    def flops_per_token(self, context: LayerContext, context_length: int) -> dict[str, float]:
        return {"projections": 8.0 * context.hidden_size * self.channels(context),
                "average": 3.0 * self.channels(context)}

    def state_bytes(self, context: LayerContext, context_length: int, element_bytes: int = 2) -> int:
        return 4 * self.channels(context)  # fp32

    def check_context_parallel(self, shards: int, length: int) -> None:
        """Rows may be cut into any number of shards: the recurrence is linear in its state."""

    def shard_traffic(self, context: LayerContext, rows: int, length: int, shards: int,
                      element_bytes: int = 2) -> list[ShardTraffic]:
        sent = 2 * 4 * rows * self.channels(context)  # the state at the end of a shard, and what is left of one
        return [ShardTraffic("gather", sent, sent)]


@register_mixer("my_mixer", GatedAverageConfig)
class GatedAverage(SequenceMixer):
    """Parameters: value_proj, keep_proj, gate_proj [W, D], out_proj [D, W], keep_bias [W]."""

    fp32_parameters: ClassVar[tuple[str, ...]] = ("keep_bias",)

    def __init__(self, config: GatedAverageConfig, context: LayerContext):
        super().__init__()
        width = config.channels(context)
        self.value_proj = nn.Linear(context.hidden_size, width, bias=False)
        self.keep_proj = nn.Linear(context.hidden_size, width, bias=False)
        self.gate_proj = nn.Linear(context.hidden_size, width, bias=False)
        self.out_proj = nn.Linear(width, context.hidden_size, bias=False)
        self.keep_bias = nn.Parameter(torch.empty(width))

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: RecurrentState | None = None):
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        keep_BTW = (self.keep_proj(x_BTD).to(dtype) + self.keep_bias).sigmoid()
        new_BTW = (1 - keep_BTW) * self.value_proj(x_BTD)
        keep_BTW = keep_BTW.masked_fill((seq.positions_BT == 0)[..., None], 0.0)  # a document begins: nothing is kept
        h_BTW, left_BTW = scan(keep_BTW, new_BTW)
        if state is not None:
            h_BTW = h_BTW if state.matrix is None else h_BTW + left_BTW * state.matrix
            state.matrix = h_BTW[:, -1:].detach()
        if seq.shard is not None:
            h_end, left_end = h_BTW[:, -1, None, :, None], left_BTW[:, -1, None, :, None]
            h_BTW = h_BTW + left_BTW * seq.shard.incoming(h_end, left_end, torch.mul)[..., 0]
        return self.out_proj(h_BTW.to(x_BTD.dtype) * F.silu(self.gate_proj(x_BTD))), {}

    def new_state(self, batch: int, max_length: int) -> RecurrentState:
        return RecurrentState()

    def init_weights(self, std: float) -> None:
        for projection in (self.value_proj, self.keep_proj, self.gate_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=std)
        nn.init.uniform_(self.keep_bias, 1.0, 5.0)  # averages over about 4 to 150 tokens


def scan(keep_BTW: Tensor, new_BTW: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = keep_t h_{t-1} + new_t for all t, and the product of keep up to t, in log2(T) steps (Hillis, Steele)."""
    step = 1
    while step < new_BTW.shape[1]:
        new_BTW = new_BTW + keep_BTW * F.pad(new_BTW[:, :-step], (0, 0, step, 0))
        keep_BTW = keep_BTW * F.pad(keep_BTW[:, :-step], (0, 0, step, 0), value=1.0)
        step *= 2
    return new_BTW, keep_BTW
