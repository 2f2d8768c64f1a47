"""Options and estimates that the three ZeRO stages share, and what DeepSpeed is told of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hybridlm.distributed.engine_config import FP32_BYTES, Collective, EngineConfig, RankMemory, StepMemory
from hybridlm.errors import ConfigError, require
from hybridlm.optimizers.contract import OptimizerConfig

BF16_BYTES = 2
NEVER_PRINT_STEPS = 2**31 - 1  # DeepSpeed prints a line every so many steps


@dataclass(kw_only=True)
class ZeroConfig(EngineConfig):
    """DeepSpeed ZeRO of one stage. Weights, gradients and optimizer state are fp32.

    Args:
        offload_optimizer: keep the optimizer state, and make its step, on the host.
        overlap: send gradients beside the backward.
        bucket_elements: elements that travel at once.
        communication_dtype: what gradients of the matrices that autocast multiplies travel in (under zero3 also their
            weights); everything else travels in fp32.
    """

    offload_optimizer: bool = False
    overlap: bool = True
    bucket_elements: int = 50_000_000
    communication_dtype: Literal["fp32", "bf16"] = "fp32"

    required_package: ClassVar[str | None] = "deepspeed"
    stage: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bucket_elements > 0, "bucket_elements", "must be positive", got=self.bucket_elements)

    @property
    def matrix_bytes(self) -> int:
        return BF16_BYTES if self.communication_dtype == "bf16" else FP32_BYTES

    def check_run(self, optimizer: OptimizerConfig, precision: str) -> None:
        if self.offload_optimizer and optimizer.whole_matrices:
            raise ConfigError("engine.offload_optimizer", f"does not go with optimizer.kind={optimizer.kind}, whose "
                              "matrices travel between devices",
                              expected="optimizer=adamw, or engine.offload_optimizer=false")
        if self.communication_dtype == "bf16" and precision != "bf16":
            raise ConfigError("engine.communication_dtype", "rounds what was computed in more digits", got="bf16",
                              expected="fp32, or training.precision=bf16")

    def deepspeed_settings(self) -> dict[str, Any]:
        """Return DeepSpeed's configuration: all that it is told. The run folder keeps it as deepspeed.json."""
        settings = {
            # Batch sizes have no meaning here, but DeepSpeed asks for them; accumulation goes by explicit boundaries.
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
            "steps_per_print": NEVER_PRINT_STEPS, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "zero_optimization": self._zero_settings()}
        if self.communication_dtype == "bf16":  # of no module's weights but those that `prepare` marks
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return settings

    def _zero_settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "stage": self.stage, "overlap_comm": self.overlap, "contiguous_gradients": True, "reduce_scatter": True,
            "reduce_bucket_size": self.bucket_elements, "allgather_bucket_size": self.bucket_elements}
        if self.offload_optimizer:
            settings["offload_optimizer"] = self._host_settings()
        return settings

    def _host_settings(self) -> dict[str, Any]:
        return {"device": "cpu", "pin_memory": self.device != "cpu"}

    @abstractmethod
    def _gradient_bytes(self, weights: float, shard: float) -> float:
        """Bytes of gradients on one rank, where `weights` are those of its parameters and `shard` those of one shard
        of all parameters, in fp32."""

    def rank_memory(self, step: StepMemory) -> RankMemory:
        weights, shard = FP32_BYTES * step.local_params, FP32_BYTES * step.params / step.ranks
        wire_bytes = FP32_BYTES if self.communication_dtype == "fp32" else FP32_BYTES + BF16_BYTES  # a bucket per dtype
        optimizer, host = shard + step.optimizer / step.ranks, 0.0  # `shard`: the optimizer's own fp32 copy of weights
        if self.offload_optimizer:
            optimizer, host = 0.0, optimizer + shard  # and the gradients that it reads
        return RankMemory(weights=weights + step.bf16_copies, gradients=self._gradient_bytes(weights, shard),
                          optimizer=optimizer, buffers=2 * wire_bytes * min(self.bucket_elements, step.params),
                          host=host)

    def _wire_bytes(self, params: float, matrices: float) -> float:
        """Bytes in which `params` parameters travel once, `matrices` of them in `communication_dtype`."""
        return FP32_BYTES * params + (self.matrix_bytes - FP32_BYTES) * matrices

    def _parameter_traffic(self, params: float, gradients: float) -> Iterator[Collective]:
        """Yield what ZeRO-1 and -2 send: they reduce whole buckets of gradients and keep their shard (DeepSpeed's
        `use_multi_rank_bucket_allreduce`), and gather the updated weights."""
        yield Collective("gradients", "all_reduce", gradients)
        yield Collective("weights", "all_gather", FP32_BYTES * params)
