"""Dense gated feed-forward.

    y = W_down (silu(W_gate x) * W_up x)                                                   SwiGLU
    y = W_down (a tanh(g / a) sigmoid(g) * b tanh(u / b)),  g = W_gate x,  u = W_up x      SiTU
    y = W_down (gelu(W_gate x) * W_up x)                                                   GeGLU

Sources: Shazeer 2020 (GLU variants improve transformer); SiTU: Kimi K3, 2026.
B rows, T tokens, D hidden size, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.model.decode_step import DecodeStep, linear_step
from hybridlm.model.feed_forward.activation import SITU_CAPS, DenseActivation, check_situ, geglu, soft_caps_of
from hybridlm.model.feed_forward.contract import FeedForward, FeedForwardConfig, register_feed_forward
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import SoftCaps, swiglu
from hybridlm_kernels.decoding import swiglu_step


@dataclass(kw_only=True)
class DenseConfig(FeedForwardConfig):
    """Configuration of one gated feed-forward per layer.

    Args:
        intermediate_size: the inner width I.
        activation: `situ` caps both factors of SwiGLU by tanh (Kimi K3); `geglu` has gelu by the error function
            (Zamba2), `geglu_tanh` its approximation by tanh (Gemma).
        situ_caps: caps a and b of SiTU; a b of null leaves the up projection as it is.
        gate_scale: factor of the gate as it is projected (Falcon-H1).
        swiglu_limit: bound of the gate from above, and of the up projection on both sides, before they are multiplied
            (GLM-5.3); null has none.
    """

    kind: str = "dense"
    intermediate_size: int
    activation: DenseActivation = "swiglu"
    situ_caps: list[float | None] = field(default_factory=lambda: list(SITU_CAPS))
    swiglu_limit: float | None = None
    gate_scale: float = 1.0

    def __post_init__(self) -> None:
        require(self.intermediate_size > 0, "intermediate_size", "must be positive", got=self.intermediate_size)
        require(self.swiglu_limit is None or self.swiglu_limit > 0, "swiglu_limit", "must be positive",
                got=self.swiglu_limit, expected="a bound, or null for none")
        check_situ(self.activation, self.situ_caps, self.swiglu_limit)

    def soft_caps(self) -> SoftCaps | None:
        """Caps of SiTU; None for SwiGLU."""
        return soft_caps_of(self.activation, self.situ_caps)

    def canonical(self, context: LayerContext) -> dict[str, Any]:
        data = super().canonical(context)
        return data if self.activation == "situ" else data | {"situ_caps": None}

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        return 3 * context.hidden_size * self.intermediate_size

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        return {"dense": 2.0 * self.num_params(context)}


@register_feed_forward("dense", DenseConfig)
class SwiGLU(FeedForward):
    """The module of one gated feed-forward of any activation: gate_proj and up_proj [I, D], down_proj [D, I]."""

    def __init__(self, config: DenseConfig, context: LayerContext):
        super().__init__()
        hidden = context.hidden_size
        width = config.intermediate_size
        self.gelu = {"geglu": "none", "geglu_tanh": "tanh"}.get(config.activation)  # its form; None for SwiGLU and SiTU
        self.bounds: dict[str, Any] = {"limit": config.swiglu_limit, "soft_caps": config.soft_caps()}
        self.gate_scale = config.gate_scale
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: None = None) -> tuple[Tensor, Aux]:
        gate_BTI, up_BTI = self._scaled(self.gate_proj(x_BTD)), self.up_proj(x_BTD)
        return self.down_proj(self._activate(gate_BTI, up_BTI, swiglu)), {}

    def _activate(self, gate_BTI: Tensor, up_BTI: Tensor, product: Callable[..., Tensor]) -> Tensor:
        """The gated activation; `product` is SwiGLU in the form for many tokens or for one."""
        if self.gelu is not None:
            return geglu(gate_BTI, up_BTI, tanh=self.gelu == "tanh")
        return product(gate_BTI, up_BTI, **self.bounds)

    def _scaled(self, gate_BTI: Tensor) -> Tensor:
        return gate_BTI if self.gate_scale == 1.0 else self.gate_scale * gate_BTI

    def prepare_step(self) -> DecodeStep:
        gate_proj, up_proj, down_proj = map(linear_step, (self.gate_proj, self.up_proj, self.down_proj))

        def step(x_B1D: Tensor, seq: SequenceInfo, state: None) -> Tensor:
            return down_proj(self._activate(self._scaled(gate_proj(x_B1D)), up_proj(x_B1D), swiglu_step))

        return step

    def init_weights(self, std: float) -> None:
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            nn.init.normal_(linear.weight, std=std)
