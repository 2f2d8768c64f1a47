"""Mixture of experts: every token meets a few routed experts, and the shared ones.

B rows, T tokens, N = B*T, D model width, E experts, A experts a token, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from hybridlm.model.config import FeedForwardConfig, LayerContext, require
from hybridlm.model.feed_forward.contract import FeedForward, register_feed_forward
from hybridlm.model.feed_forward.dense import DenseConfig, SwiGLU, check_limit
from hybridlm.model.feed_forward.router import Router
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels import moe_experts


@dataclass(kw_only=True)
class MoEConfig(FeedForwardConfig):
    """Routed SwiGLU experts with shared ones; the layers in `dense_layers` are one SwiGLU instead.

    The router scores all experts in fp32 and takes the best `num_experts_per_tok` by score plus correction bias,
    within the best `topk_groups` of `num_groups` groups; their weights are the scores alone.
    Defaults are those of a plain softmax router (Qwen3-Next, MiniMax-01). DeepSeek-V3 and Kimi Linear use
    `router: sigmoid`, a bias and a scaling factor.
    """

    kind: str = "moe"
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_shared_experts: int = 0
    shared_intermediate_size: int | None = None  # all shared experts together; null: their number x expert width
    shared_gate: bool = False  # sigmoid(w x) on the shared output (Qwen)
    dense_layers: list[int] = field(default_factory=list)
    intermediate_size: int | None = None  # of the dense layers
    router: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = True  # weights of a token's experts sum to one
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    bias_update_rate: float = 0.0  # u of the auxiliary-loss-free balancing
    correction_bias: bool | None = None  # null: present when it is updated; true keeps a frozen one
    balance_loss: float = 0.0  # coefficient of the sequence-wise balance loss
    router_z_loss: float = 0.0  # coefficient of logsumexp(router logits)^2
    swiglu_limit: float | None = None

    def __post_init__(self) -> None:
        for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_groups", "topk_groups"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        for key in ("num_shared_experts", "bias_update_rate", "balance_loss", "router_z_loss"):
            require(getattr(self, key) >= 0, key, "must not be negative", got=getattr(self, key))
        require(self.num_experts_per_tok <= self.num_experts, "num_experts_per_tok",
                "is more than there are experts", got=self.num_experts_per_tok,
                expected=f"at most num_experts = {self.num_experts}")
        self._check_groups()
        self._check_shared()
        require(self.routed_scaling_factor > 0, "routed_scaling_factor", "must be positive",
                got=self.routed_scaling_factor)
        require(not (self.correction_bias is False and self.bias_update_rate > 0), "correction_bias",
                "is off, but bias_update_rate would move it", got=self.correction_bias,
                expected="true or null, or bias_update_rate=0")
        require(not self.dense_layers or (self.intermediate_size or 0) > 0, "intermediate_size",
                "is needed for the dense layers", got=self.intermediate_size, expected="their width")
        require(all(layer >= 0 for layer in self.dense_layers), "dense_layers", "counts from layer 0",
                got=self.dense_layers)
        check_limit(self.swiglu_limit)

    def _check_groups(self) -> None:
        require(self.num_experts % self.num_groups == 0, "num_groups", "must divide num_experts",
                got=self.num_groups, expected=f"a divisor of {self.num_experts}")
        require(self.topk_groups <= self.num_groups, "topk_groups", "is more than there are groups",
                got=self.topk_groups, expected=f"at most num_groups = {self.num_groups}")
        reach = self.topk_groups * (self.num_experts // self.num_groups)
        require(self.num_experts_per_tok <= reach, "num_experts_per_tok",
                f"is more than the {self.topk_groups} chosen groups hold", got=self.num_experts_per_tok,
                expected=f"at most {reach}", hint="raise topk_groups")

    def _check_shared(self) -> None:
        width = self.shared_intermediate_size
        require(width is None or width > 0, "shared_intermediate_size", "must be positive", got=width)
        for key, on in (("shared_intermediate_size", width is not None), ("shared_gate", self.shared_gate)):
            require(not on or self.num_shared_experts > 0, key, "is set without a shared expert",
                    got=getattr(self, key), expected="num_shared_experts of at least 1")

    @property
    def shared_width(self) -> int:
        return self.shared_intermediate_size or self.moe_intermediate_size * self.num_shared_experts

    @property
    def has_bias(self) -> bool:
        return self.bias_update_rate > 0 if self.correction_bias is None else self.correction_bias

    def is_moe(self, layer_index: int) -> bool:
        return layer_index not in self.dense_layers

    def dense_config(self, context: LayerContext) -> DenseConfig | None:
        """The config of this layer where it is a dense one.

        Raises:
            ConfigError: a dense layer that the model does not have.
        """
        require(max(self.dense_layers, default=0) < context.num_layers, "feed_forward.dense_layers",
                "names a layer the model does not have", got=self.dense_layers,
                expected=f"layers 0 to {context.num_layers - 1}")
        if self.is_moe(context.layer_index):
            return None
        assert self.intermediate_size is not None
        return DenseConfig(intermediate_size=self.intermediate_size, swiglu_limit=self.swiglu_limit)

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        if (dense := self.dense_config(context)) is not None:
            return dense.num_params(context)
        hidden = context.hidden_size
        experts = self.num_experts_per_tok if active else self.num_experts
        gate = hidden if self.shared_gate else 0
        return (hidden * self.num_experts + 3 * hidden * self.moe_intermediate_size * experts
                + 3 * hidden * self.shared_width + gate)

    def routed_params(self, context: LayerContext) -> int:
        each = 3 * context.hidden_size * self.moe_intermediate_size
        return each * self.num_experts if self.is_moe(context.layer_index) else 0

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        if (dense := self.dense_config(context)) is not None:
            return dense.flops_per_token(context)
        hidden = context.hidden_size
        return {
            "router": 2.0 * hidden * self.num_experts,
            "experts": 6.0 * hidden * self.moe_intermediate_size * self.num_experts_per_tok,
            "shared_experts": 6.0 * hidden * self.shared_width + (2.0 * hidden if self.shared_gate else 0.0),
        }


# Brings tokens [N, D] with their expert ids and weights [N, A] to `compute`, wherever that is, and the results back.
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
Dispatch = Callable[[Compute, Tensor, Tensor, Tensor], Tensor]


class Experts(nn.Module):
    """Weights of the routed experts: gate_up [E, 2I, D] (gate rows first) and down [E, D, I].

    Where other processes hold the rest (`hold`), E counts those of `held`, and `dispatch` takes tokens to their
    experts.
    """

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__()
        experts, width = config.num_experts, config.moe_intermediate_size
        self.limit = config.swiglu_limit
        self.num_experts = experts
        self.held = range(experts)
        self.dispatch: Dispatch | None = None
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, width))

    def forward(self, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        device, dtype = x_ND.device.type, x_ND.dtype
        if torch.is_autocast_enabled(device):  # a fused operation does not take part in autocast
            dtype = torch.get_autocast_dtype(device)
        run = self._compute if self.dispatch is None else partial(self.dispatch, self._compute)
        return run(x_ND.to(dtype), ids_NA, weights_NA)

    def _compute(self, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """`ids_NA` count from the first expert held."""
        return moe_experts(x_ND, self.gate_up.to(x_ND.dtype), self.down.to(x_ND.dtype), ids_NA, weights_NA,
                           limit=self.limit)

    def hold(self, held: range, dispatch: Dispatch) -> None:
        """Keep the experts of `held` alone."""
        for name in ("gate_up", "down"):
            whole = getattr(self, name)
            setattr(self, name, nn.Parameter(whole.detach()[held.start:held.stop].clone(), whole.requires_grad))
        self.held, self.dispatch = held, dispatch

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """The values of an expert do not depend on which others are held."""
        for weight in (self.gate_up, self.down):
            whole = weight if len(weight) == self.num_experts else weight.new_empty(self.num_experts, *weight.shape[1:])
            nn.init.normal_(whole, std=std)
            if whole is not weight:
                weight.copy_(whole[self.held.start:self.held.stop])


@register_feed_forward("moe", MoEConfig)
class MixtureOfExperts(FeedForward):
    """y = sum_a w_a expert_a(x) + gate(x) * shared(x), no token dropped.

    DeepSeek-V3 section 2.1.2; parameters router.weight, experts.gate_up, experts.down, shared.*, shared_gate.weight,
    buffers router.bias and router.load.
    """

    fp32_parameters = ("router.weight", "router.bias")

    @classmethod
    def build(cls, config: FeedForwardConfig, context: LayerContext) -> FeedForward:
        assert isinstance(config, MoEConfig)
        dense = config.dense_config(context)
        return cls(config, context) if dense is None else SwiGLU(dense, context)

    def __init__(self, config: MoEConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.router = Router(config, context.hidden_size)
        self.experts = Experts(config, context.hidden_size)
        self.shared: SwiGLU | None = None
        self.shared_gate: nn.Linear | None = None
        if config.num_shared_experts:
            self.shared = SwiGLU(
                DenseConfig(intermediate_size=config.shared_width, swiglu_limit=config.swiglu_limit), context)
        if config.shared_gate:
            self.shared_gate = nn.Linear(context.hidden_size, 1, bias=False)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"balance": self.config.balance_loss, "router_z": self.config.router_z_loss}

    def forward(self, x_BTD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Aux]:
        ids_NA, weights_NA, aux = self.router(x_BTD, seq)
        y_ND = self.experts(x_BTD.reshape(-1, x_BTD.shape[-1]), ids_NA, weights_NA)
        y_BTD = y_ND.view(x_BTD.shape)
        if self.shared is not None:
            shared_BTD, _ = self.shared(x_BTD, seq)
            if self.shared_gate is not None:
                shared_BTD = torch.sigmoid(self.shared_gate(x_BTD)) * shared_BTD
            y_BTD = y_BTD + shared_BTD
        return y_BTD, aux

    def record(self, aux: Aux) -> None:
        self.router.load += aux["load"]

    def post_optimizer_step(self, update: bool = True) -> None:
        self.router.balance(update)

    def init_weights(self, std: float) -> None:
        self.router.init_weights(std)
        self.experts.init_weights(std)
        if self.shared is not None:
            self.shared.init_weights(std)
        if self.shared_gate is not None:
            nn.init.normal_(self.shared_gate.weight, std=std)
