"""Mixture of experts: every token meets a few routed experts, and the shared ones.

B rows, T tokens, N = B*T, D model width, A experts per token.
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
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.decoding import moe_experts_step
from hybridlm_kernels.precision import wide


@register_feed_forward("moe", MoEConfig)
class MixtureOfExperts(FeedForward):
    """The module of a mixture: y = sum_a w_a expert_a(x) + gate(x) * shared(x), no token dropped.

    Source: DeepSeek-V3, section 2.1.2. Parameters router.weight, experts.gate_up, experts.down, shared.*,
    shared_gate.weight; buffers router.bias and router.load.
    """

    fp32_parameters = ("router.weight", "router.bias")

    @classmethod
    def build(cls, config: FeedForwardConfig, context: LayerContext) -> FeedForward:
        assert isinstance(config, MoEConfig)
        dense = config.dense_config(context)
        return cls(config, context) if dense is None else build_feed_forward(dense, context)

    def __init__(self, config: MoEConfig, context: LayerContext):
        super().__init__()
        self.config = config
        self.router = Router(config, context.hidden_size)
        self.experts = Experts(config, context.hidden_size)
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
        y_ND = self.experts(x_BTD.reshape(-1, x_BTD.shape[-1]), ids_NA, weights_NA)
        y_BTD = y_ND.view(x_BTD.shape)
        if self.shared is not None:
            shared_BTD, _ = self.shared(x_BTD, seq)
            if self.shared_gate is not None:
                shared_BTD = torch.sigmoid(self.shared_gate(x_BTD)) * shared_BTD
            y_BTD = y_BTD + shared_BTD
        return y_BTD, aux

    def prepare_step(self) -> DecodeStep | None:
        """One token goes through its experts one after the other; several go as in `forward`."""
        if self.experts.dispatch is not None or not (is_plain(self.router, Router) and is_plain(self.experts, Experts)):
            return None
        router, experts, limit = self.router, self.experts, self.config.swiglu_limit
        shared = None if self.shared is None or has_hooks(self.shared) else self.shared.prepare_step()
        if self.shared is not None and shared is None:
            return None
        shared_gate = None if self.shared_gate is None else linear_step(self.shared_gate)

        def step(x_B1D: Tensor, seq: SequenceInfo, state: None) -> Tensor:
            x_BD = x_B1D[:, 0]
            _, ids_BA, weights_BA = router.choose(F.linear(wide(x_BD), wide(router.weight)))
            if len(x_BD) == 1:
                y_BD = moe_experts_step(x_BD, experts.gate_up.to(x_BD.dtype), experts.down.to(x_BD.dtype),
                                        ids_BA[0].tolist(), weights_BA[0], limit)
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
        self.router.load += aux["load"]

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
        if self.shared_gate is not None:
            nn.init.normal_(self.shared_gate.weight, std=std)
