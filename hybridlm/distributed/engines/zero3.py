"""Engine `zero3`: weights, gradients and optimizer state are sharded over processes (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn

from hybridlm.distributed.engine_config import ENGINES, FP32_BYTES, Collective, RankMemory, StepMemory
from hybridlm.distributed.zero import experts as zero_experts
from hybridlm.distributed.zero.config import ZeroConfig
from hybridlm.distributed.zero.engine import ZeroEngine
from hybridlm.errors import require

MAX_LIVE_PARAMETERS = 1_000_000_000  # gathered weights that DeepSpeed keeps for their next use, its own default


@dataclass(kw_only=True)
class Zero3Config(ZeroConfig):
    """DeepSpeed ZeRO-3: weights, gradients and optimizer state are sharded.

    Args:
        offload_parameters: keep this rank's shard of the weights on the host.
        persistence_threshold: weights of fewer elements stay complete on every rank.
    """

    kind: Literal["zero3"] = "zero3"  # type: ignore[mutable-override]
    offload_parameters: bool = False
    persistence_threshold: int = 100_000
    stage: ClassVar[int] = 3
    why_not_compiled: ClassVar[str | None] = "gathers weights in the middle of a layer's graph"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.persistence_threshold >= 0, "persistence_threshold", "must not be negative",
                got=self.persistence_threshold)

    def _zero_settings(self) -> dict[str, Any]:
        settings = super()._zero_settings() | {
            "stage3_prefetch_bucket_size": self.bucket_elements,
            "stage3_param_persistence_threshold": self.persistence_threshold}
        return settings | ({"offload_param": self._host_settings()} if self.offload_parameters else {})

    def _gradient_bytes(self, weights: float, shard: float) -> float:
        return shard

    def rank_memory(self, step: StepMemory) -> RankMemory:
        """Estimate as the other stages do, with this rank's shard of the weights and what it gathers of the others'.

        Copies of weights in bf16 live through the backward, complete: only `training.activation_checkpointing` lets
        them go after each layer.
        """
        weights, shard = FP32_BYTES * step.local_params, FP32_BYTES * step.params / step.ranks
        layer = FP32_BYTES * step.layer_params
        copies = step.bf16_copies * (layer / weights if step.activation_checkpointing else 1.0)
        gathered = max(min(weights, FP32_BYTES * MAX_LIVE_PARAMETERS), layer) + copies
        memory = replace(super().rank_memory(step), weights=shard, gathered=gathered)
        return replace(memory, weights=0.0, host=memory.host + shard) if self.offload_parameters else memory

    def parameter_traffic(self, params: float, matrices: float, micro_batches: int) -> Iterator[Collective]:
        """Yield what gathers the weights for a forward, and again for its backward but for the last
        `MAX_LIVE_PARAMETERS`, and what reduces the gradients."""
        size = self._wire_bytes(params, matrices)
        again = size * max(0.0, 1 - MAX_LIVE_PARAMETERS / params)
        yield Collective("weights", "all_gather", micro_batches * (size + again))
        yield Collective("gradients", "reduce_scatter", micro_batches * size)


class Zero3Engine(ZeroEngine):
    """ZeRO of stage 3: a module's weights are sharded as soon as they have their values."""

    shards_weights = True

    def shard_weights(self, module: nn.Module) -> None:
        import deepspeed  # an optional package, and slow to import

        if self.experts is not None:
            zero_experts.mark_parameters(module, self.config.expert_parallel)
        deepspeed.zero.Init(module=module, config_dict_or_path=self.settings)


ENGINES.register("zero3", Zero3Config, Zero3Engine)
