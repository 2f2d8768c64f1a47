"""Configuration of a mixture of experts, with its costs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from hybridlm.errors import require
from hybridlm.model.feed_forward.activation import SITU_CAPS, Activation, soft_caps_of
from hybridlm.model.feed_forward.contract import FEED_FORWARDS, FeedForwardConfig, RoutedExperts
from hybridlm.model.layer_context import LayerContext
from hybridlm.plain_data import to_dict
from hybridlm_kernels import SoftCaps

FP32_BYTES = 4


@dataclass(kw_only=True)
class MoEConfig(FeedForwardConfig):
    """Configuration of routed SwiGLU experts with shared ones; layers in `dense_layers` are one SwiGLU instead.

    The router scores all experts in fp32 and takes the best `num_experts_per_tok` by score plus correction bias,
    within the best `topk_groups` of `num_groups` groups; their weights are the scores alone. Defaults are those of a
    plain softmax router (Qwen3-Next, MiniMax-01); DeepSeek-V3 and Kimi Linear use `router: sigmoid`, a bias and a
    scaling factor.

    Args:
        num_experts: routed experts E of each layer.
        num_experts_per_tok: experts A that each token meets.
        moe_intermediate_size: inner width of one expert.
        num_shared_experts: experts that every token meets.
        shared_intermediate_size: inner width of all shared experts together; null is their number times that of one.
        shared_gate: whether sigmoid(w x) scales the shared experts' output (Qwen).
        dense_layers: layers that are one SwiGLU, counted from 0.
        intermediate_size: inner width of the dense layers.
        router: how scores are made from logits; `sqrt_softplus` is sqrt(log(1 + e^logit)) (DeepSeek-V4).
        hash_layers: layers whose experts are chosen by a fixed table of token ids; scores weigh them alone.
        latent_size: width in which routed experts work, between two projections that all of them share (Nemotron 3,
            Kimi K3); null is the model's.
        latent_norm: whether the sum of routed experts is normalised in that width.
        norm_topk_prob: whether the weights of a token's experts sum to one.
        routed_scaling_factor: factor on the routed experts' output.
        num_groups: groups of equal size that the experts are divided into.
        topk_groups: groups that a token's experts may come from.
        bias_update_rate: step u by which the bias balances the loads without a loss, whatever their distance from the
            mean (the published rule). Null takes steps in proportion to that distance, at most `MAX_BIAS_STEP`, which
            balances runs of any length.
        correction_bias: null has a bias where it is updated; true keeps one that does not move.
        balance_loss: coefficient of the balance loss per document.
        router_z_loss: coefficient of the mean of logsumexp(router logits)^2.
        bias_update: `load` moves the bias by the loads of experts, `quantile` sets it after each step to what would
            have balanced it: a quantile of the experts' scores over the thresholds of tokens (Su 2026, Kimi K3).
        swiglu_limit: bound inside every SwiGLU; null has none.
        activation: of all experts and of dense layers; `situ` caps both factors of SwiGLU by tanh (Kimi K3).
        situ_caps: caps of SiTU, of the gate and of the up projection; null for the second one has none there.
    """

    kind: str = "moe"
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_shared_experts: int = 0
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    dense_layers: list[int] = field(default_factory=list)
    intermediate_size: int | None = None
    router: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    hash_layers: list[int] = field(default_factory=list)
    latent_size: int | None = None
    latent_norm: bool = False
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    topk_groups: int = 1
    bias_update_rate: float | None = 0.0
    correction_bias: bool | None = None
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    bias_update: Literal["load", "quantile"] = "load"
    swiglu_limit: float | None = None
    activation: Activation = "swiglu"
    situ_caps: list[float | None] = field(default_factory=lambda: list(SITU_CAPS))
    TRAINING_FIELDS: ClassVar[tuple[str, ...]] = ("bias_update", "bias_update_rate", "balance_loss", "router_z_loss")
    loss_names: ClassVar[tuple[str, ...]] = ("balance", "router_z")

    def __post_init__(self) -> None:
        for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "num_groups", "topk_groups"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        for key in ("num_shared_experts", "bias_update_rate", "balance_loss", "router_z_loss"):
            require((getattr(self, key) or 0) >= 0, key, "must not be negative", got=getattr(self, key))
        require(self.num_experts_per_tok <= self.num_experts, "num_experts_per_tok",
                "is more than there are experts", got=self.num_experts_per_tok,
                expected=f"at most num_experts = {self.num_experts}")
        require(self.latent_size is None or self.latent_size > 0, "latent_size", "must be positive",
                got=self.latent_size)
        require(self.latent_size is not None or not self.latent_norm, "latent_norm", "needs latent_size", got=True,
                expected="false")
        require(not set(self.hash_layers) & set(self.dense_layers), "hash_layers", "are dense layers too",
                got=self.hash_layers, expected="layers that dense_layers does not name")
        self._check_groups()
        self._check_shared()
        require(self.routed_scaling_factor > 0, "routed_scaling_factor", "must be positive",
                got=self.routed_scaling_factor)
        mover, still = (("bias_update=quantile", "bias_update=load") if self.bias_update == "quantile" else
                        ("bias_update_rate", "bias_update_rate=0"))
        require(not (self.correction_bias is False and self.updates_bias), "correction_bias",
                f"is off, but {mover} would move it", got=self.correction_bias, expected=f"true or null, or {still}")
        require(not self.dense_layers or (self.intermediate_size or 0) > 0, "intermediate_size",
                "is needed for the dense layers", got=self.intermediate_size, expected="their width")
        require(all(layer >= 0 for layer in self.dense_layers), "dense_layers", "counts from layer 0",
                got=self.dense_layers)
        self.swiglu_config(self.moe_intermediate_size)  # refuses a limit that is not positive

    def _check_groups(self) -> None:
        require(self.num_experts % self.num_groups == 0, "num_groups", "must divide num_experts",
                got=self.num_groups, expected=f"a divisor of {self.num_experts}")
        require(self.topk_groups <= self.num_groups, "topk_groups", "is more than there are groups",
                got=self.topk_groups, expected=f"at most num_groups = {self.num_groups}")
        if self.bias_update == "quantile":
            require(not self.bias_update_rate, "bias_update_rate", "is not used by bias_update=quantile",
                    got=self.bias_update_rate, expected="0 or null")
            require(self.topk_groups == self.num_groups, "topk_groups", "cannot limit experts beside "
                    "bias_update=quantile, whose threshold is over all of them", got=self.topk_groups,
                    expected=f"num_groups = {self.num_groups}")
            require(self.num_experts_per_tok < self.num_experts, "num_experts_per_tok",
                    "leaves bias_update=quantile nothing to balance", got=self.num_experts_per_tok,
                    expected=f"fewer than num_experts = {self.num_experts}")
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

    def own_losses(self) -> tuple[str, ...]:
        coefficients = {"balance": self.balance_loss, "router_z": self.router_z_loss}
        return tuple(name for name, coefficient in coefficients.items() if coefficient)

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together."""
        return self.shared_intermediate_size or self.moe_intermediate_size * self.num_shared_experts

    @property
    def has_bias(self) -> bool:
        """Whether the router has a correction bias."""
        return self.updates_bias if self.correction_bias is None else self.correction_bias

    @property
    def updates_bias(self) -> bool:
        """Whether the bias follows the loads."""
        rate = self.bias_update_rate
        return self.bias_update == "quantile" or rate is None or rate > 0

    def routed_experts(self) -> RoutedExperts:
        return RoutedExperts(self.num_experts, self.num_experts_per_tok, self.num_groups, self.topk_groups,
                             self.latent_size)

    def balance_warning(self) -> str:
        if self.updates_bias or self.balance_loss or self.num_experts_per_tok == self.num_experts:
            return ""
        return ("nothing balances the loads of the experts (balance_loss and bias_update_rate are 0), so some may get "
                "no token any more; model.feed_forward.balance_loss=0.01 balances them")

    def balance_advice(self) -> str:
        if self.bias_update_rate and self.bias_update == "load":
            rate = f"bias_update_rate=null (now {self.bias_update_rate:g})"
            return f"model.feed_forward.{rate} balances them faster: its steps follow the violation"
        loss = f"balance_loss={max(3 * self.balance_loss, 0.01):g} (now {self.balance_loss:g})"
        return f"model.feed_forward.{loss} balances them better"

    def is_moe(self, layer_index: int) -> bool:
        return layer_index not in self.dense_layers

    def layer_kind(self, layer_index: int) -> str:
        return self.kind if self.is_moe(layer_index) else "dense"

    def swiglu_config(self, width: int) -> FeedForwardConfig:
        """The config of one SwiGLU of this inner width, as dense layers and shared experts have it."""
        return FEED_FORWARDS.config_class("dense")(intermediate_size=width, swiglu_limit=self.swiglu_limit,
                                                   activation=self.activation, situ_caps=list(self.situ_caps))

    def soft_caps(self) -> SoftCaps | None:
        """Caps of SiTU; None for SwiGLU."""
        return soft_caps_of(self.activation, self.situ_caps)

    def is_hashed(self, layer_index: int) -> bool:
        """Whether a table of token ids chooses the experts of the layer."""
        return layer_index in self.hash_layers

    def dense_config(self, context: LayerContext) -> FeedForwardConfig | None:
        """The config of this layer where it is a dense one, else None.

        Raises:
            ConfigError: a dense layer that the model does not have.
        """
        for key in ("dense_layers", "hash_layers"):
            layers = getattr(self, key)
            require(max(layers, default=0) < context.num_layers, f"feed_forward.{key}",
                    "names a layer the model does not have", got=layers,
                    expected=f"layers 0 to {context.num_layers - 1}")
        if self.is_moe(context.layer_index):
            return None
        assert self.intermediate_size is not None
        return self.swiglu_config(self.intermediate_size)

    def num_params(self, context: LayerContext, *, active: bool = False) -> int:
        if (dense := self.dense_config(context)) is not None:
            return dense.num_params(context)
        hidden = context.hidden_size
        experts = self.num_experts_per_tok if active else self.num_experts
        gate = hidden if self.shared_gate else 0
        around = 0 if self.latent_size is None else self.latent_size * (2 * hidden + self.latent_norm)
        width = self.routed_experts().width(hidden)
        return (hidden * self.num_experts + 3 * width * self.moe_intermediate_size * experts
                + around + 3 * hidden * self.shared_width + gate)

    def activation_bytes(self, context: LayerContext, element_bytes: int) -> float:
        if not self.is_moe(context.layer_index):
            return super().activation_bytes(context, element_bytes)
        gate_and_up = self.num_experts_per_tok * 2 * self.moe_intermediate_size
        scores = 2 * FP32_BYTES * self.num_experts
        latents = (2 + self.latent_norm) * (self.latent_size or 0)
        return element_bytes * (gate_and_up + latents + 3 * self.shared_width) + scores

    def canonical(self, context: LayerContext) -> dict[str, Any]:
        dense = self.dense_config(context)
        if dense is not None:
            return dense.canonical(context)
        data = to_dict(self)
        for key in (*self.TRAINING_FIELDS, "dense_layers", "intermediate_size", "residual", "num_shared_experts"):
            data.pop(key)
        data["hash_layers"] = self.is_hashed(context.layer_index)
        data["correction_bias"] = self.has_bias
        if self.activation == "swiglu":
            data["situ_caps"] = None
        data["shared_intermediate_size"] = self.shared_width
        if self.topk_groups == self.num_groups:
            data["num_groups"] = data["topk_groups"] = 1
        return data

    def width(self) -> int:
        return self.moe_intermediate_size

    def with_width(self, width: int) -> Self:
        sizes = {"moe_intermediate_size": width}
        for key in ("shared_intermediate_size", "intermediate_size"):
            value = getattr(self, key)
            if value is not None:
                sizes[key] = max(1, round(value * width / self.moe_intermediate_size))
        return dataclasses.replace(self, **sizes)  # type: ignore[arg-type]

    def routed_params(self, context: LayerContext) -> int:
        each = 3 * self.routed_experts().width(context.hidden_size) * self.moe_intermediate_size
        return each * self.num_experts if self.is_moe(context.layer_index) else 0

    def step_sum_numbers(self, layer_index: int) -> int:
        """Loads, and with quantile balancing the quantiles and their number."""
        loads = super().step_sum_numbers(layer_index)
        moves = self.bias_update == "quantile" and not self.is_hashed(layer_index)
        return loads + (loads + 1 if loads and moves else 0)

    def flops_per_token(self, context: LayerContext) -> dict[str, float]:
        if (dense := self.dense_config(context)) is not None:
            return dense.flops_per_token(context)
        hidden = context.hidden_size
        width = self.routed_experts().width(hidden)
        parts = {
            "router": 2.0 * hidden * self.num_experts,
            "experts": 6.0 * width * self.moe_intermediate_size * self.num_experts_per_tok,
            "shared_experts": 6.0 * hidden * self.shared_width + (2.0 * hidden if self.shared_gate else 0.0),
        }
        return parts if self.latent_size is None else parts | {"latents": 4.0 * hidden * self.latent_size}
