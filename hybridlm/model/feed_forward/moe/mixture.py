"""Mixture of experts: every token meets a few routed experts, and the shared ones.

B rows, T tokens, N = B*T, D model width, Z width of routed experts, A experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.decode_step import DecodeStep, has_hooks, is_plain, linear_step
from hybridlm.model.feed_forward.contract import (
    ExpertStack,
    FeedForward,
    FeedForwardConfig,
    build_feed_forward,
    register_feed_forward,
)
from hybridlm.model.feed_forward.moe.config import MoEConfig
from hybridlm.model.feed_forward.moe.experts import Experts
from hybridlm.model.feed_forward.moe.router import Router
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.contract import Aux
from hybridlm.model.norm import RMSNorm
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.decoding import moe_experts_step
from hybridlm_kernels.precision import wide


@register_feed_forward("moe", MoEConfig)
class MixtureOfExperts(FeedForward):
    """The module of a mixture: y = sum_a w_a expert_a(x) + gate(x) * shared(x), no token dropped.

    With `latent_size` routed experts work in a latent of Z dims: up(norm(sum_a w_a expert_a(down(x)))).
    Source: DeepSeek-V3, section 2.1.2. Parameters router.weight, experts.gate_up, experts.down, shared.*,
    shared_gate.weight, latent_down, latent_up, latent_norm; buffers router.bias, router.load,
    router.quantiles and router.table.
    """

    fp32_parameters = ("router.weight", "router.bias", "router.quantiles", "latent_norm.weight")

    @classmethod
    def build(cls, config: FeedForwardConfig, context: LayerContext) -> FeedForward:
        assert isinstance(config, MoEConfig)
        dense = config.dense_config(context)
        return cls(config, context) if dense is None else build_feed_forward(dense, context)

    def __init__(self, config: MoEConfig, context: LayerContext):
        super().__init__()
        self.config = config
        hashed = config.is_hashed(context.layer_index)
        self.router = Router(config, context.hidden_size, context.vocab_size if hashed else None)
        self.experts = Experts(config, config.routed_experts().width(context.hidden_size))
        self.latent_down: nn.Linear | None = None
        self.latent_up: nn.Linear | None = None
        self.latent_norm: RMSNorm | None = None
        if config.latent_size is not None:
            self.latent_down = nn.Linear(context.hidden_size, config.latent_size, bias=False)
            self.latent_up = nn.Linear(config.latent_size, context.hidden_size, bias=False)
            self.latent_norm = RMSNorm.of(context.norm, config.latent_size) if config.latent_norm else None
        self.shared: FeedForward | None = None
        self.shared_gate: nn.Linear | None = None
        if config.num_shared_experts:
            self.shared = build_feed_forward(config.swiglu_config(config.shared_width), context)
        if config.shared_gate:
            self.shared_gate = nn.Linear(context.hidden_size, 1, bias=False)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"balance": self.config.balance_loss, "router_z": self.config.router_z_loss}

    def forward(self, x_BTD: Tensor, seq: SequenceInfo, state: None = None) -> tuple[Tensor, Aux]:
        ids_NA, weights_NA, aux = self.router(x_BTD, seq)
        z_BTZ = x_BTD if self.latent_down is None else self.latent_down(x_BTD)
        y_NZ = self.experts(z_BTZ.reshape(-1, z_BTZ.shape[-1]), ids_NA, weights_NA)
        y_BTD = self._from_latent(y_NZ.view(z_BTZ.shape))
        if self.shared is not None:
            shared_BTD, _ = self.shared(x_BTD, seq)
            if self.shared_gate is not None:
                shared_BTD = torch.sigmoid(self.shared_gate(x_BTD)) * shared_BTD
            y_BTD = y_BTD + shared_BTD
        return y_BTD, aux

    def _from_latent(self, y_BTZ: Tensor) -> Tensor:
        """The routed experts' sum in the width of the model."""
        if self.latent_up is None:
            return y_BTZ
        return self.latent_up(y_BTZ if self.latent_norm is None else self.latent_norm(y_BTZ))

    def prepare_step(self) -> DecodeStep | None:
        """One token goes through its experts one after the other; several go as in `forward`."""
        if self.latent_down is not None or self.router.table is not None:
            return None
        if self.experts.dispatch is not None or not (is_plain(self.router, Router) and is_plain(self.experts, Experts)):
            return None
        router, experts = self.router, self.experts
        shared = None if self.shared is None or has_hooks(self.shared) else self.shared.prepare_step()
        if self.shared is not None and shared is None:
            return None
        shared_gate = None if self.shared_gate is None else linear_step(self.shared_gate)

        def step(x_B1D: Tensor, seq: SequenceInfo, state: None) -> Tensor:
            x_BD = x_B1D[:, 0]
            _, ids_BA, weights_BA = router.choose(F.linear(wide(x_BD), wide(router.weight)))
            if len(x_BD) == 1:
                y_BD = moe_experts_step(x_BD, experts.gate_up.to(x_BD.dtype), experts.down.to(x_BD.dtype),
                                        ids_BA[0].tolist(), weights_BA[0], experts.limit, experts.soft_caps)
            else:
                y_BD = experts(x_BD, ids_BA, weights_BA)
            y_B1D = y_BD.unsqueeze(1)
            if shared is not None:
                shared_B1D = shared(x_B1D, seq, None)
                if shared_gate is not None:
                    shared_B1D = torch.sigmoid(shared_gate(x_B1D)) * shared_B1D
                y_B1D = y_B1D + shared_B1D
            return y_B1D

        return step

    def expert_stacks(self) -> dict[str, ExpertStack]:
        return {"experts": self.experts}

    def router_load(self) -> Tensor:
        return self.router.load

    def record(self, aux: Aux) -> None:
        self.router.record(aux)

    def step_sums(self) -> list[Tensor]:
        return self.router.step_sums()

    def balanced_weight(self) -> nn.Parameter | None:
        # Not as an attribute: under ZeRO-3 that brings the weight together, and not every rank may ask for it.
        return dict(self.router.named_parameters())["weight"] if self.router.moves_bias else None

    def post_optimizer_step(self, update: bool = True) -> None:
        self.router.balance(update)

    def init_weights(self, std: float) -> None:
        self.router.init_weights(std)
        self.experts.init_weights(std)
        if self.shared is not None:
            self.shared.init_weights(std)
        for linear in (self.shared_gate, self.latent_down, self.latent_up):
            if linear is not None:
                nn.init.normal_(linear.weight, std=std)
        if self.latent_norm is not None:
            self.latent_norm.reset_parameters()
