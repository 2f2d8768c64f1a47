"""The engine that divides optimizer state, gradients and weights over ranks: DeepSpeed ZeRO through Accelerate.

DeepSpeed sees fp32 parameters and no precision of its own: its bf16 mode would cast every parameter. bf16 is autocast
here as in the other engines. Accumulation, learning rate and what a step does with a NaN are decided here too.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.config.schema import EngineConfig
from hybridlm.distributed.engine import Engine, Update, assign_owners, check_fp32
from hybridlm.distributed.expert_parallel import ExpertParallel, expert_parameters
from hybridlm.distributed.launch import free_port
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.distributed.zero import experts as zero_experts
from hybridlm.distributed.zero.optimizer import FlatOptimizer
from hybridlm.distributed.zero.partition import Fragment, gathered, held, locate
from hybridlm.errors import ConfigError
from hybridlm.model.output import ModelOutput
from hybridlm.optimizers.optimizer_set import RULE, OptimizerSet, check_state_shape
from hybridlm.tensor_storage import StoredTensor

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
NEVER = 2**31 - 1
LINEAR = F.linear
LEFT_BEHIND = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "_external_params", "_original_parameters")


def deepspeed_config(config: EngineConfig) -> dict[str, Any]:
    """DeepSpeed's configuration: all that it is told. The run's folder keeps it as deepspeed.json."""
    stage = STAGES[config.kind]
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": config.overlap, "contiguous_gradients": True,
                            "reduce_scatter": True, "reduce_bucket_size": config.bucket_elements,
                            "allgather_bucket_size": config.bucket_elements}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.device != "cpu"}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": config.bucket_elements,
                 "stage3_param_persistence_threshold": config.persistence_threshold}
        if config.offload_parameters:
            zero["offload_param"] = {"device": "cpu", "pin_memory": config.device != "cpu"}
    # Sizes of batches have no meaning here, but DeepSpeed asks for them; accumulation goes by explicit boundaries.
    told = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
            "steps_per_print": NEVER, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero}
    if config.communication_dtype == "bf16":  # of no module's weights but those that `prepare` marks
        told["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return told


class Outer(nn.Module):
    """Gives DeepSpeed's engine the loss to hook on, and the caller the model's whole output."""

    def __init__(self, engine: nn.Module):
        super().__init__()
        self.engine = engine

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        loss, rest = self.engine(*args, **kwargs)
        rest.output.loss = loss
        return rest.output


class Rest:
    """What of the model's output DeepSpeed must not look into."""

    def __init__(self, output: ModelOutput):
        self.output = output


class ZeroEngine(Engine):
    """ZeRO-1, -2 or -3. fp32 parameters stay fp32; with bf16 the forward runs under autocast."""

    def __init__(self, config: EngineConfig, precision: str = "auto"):
        _check_device(config)
        if not RankEnvironment.here().launched:  # DeepSpeed wants a process group for a single process too
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(free_port())}
        _import_quietly()
        super().__init__(config, precision)
        from accelerate import DistributedType

        kind = self.accelerator.distributed_type
        if kind != DistributedType.DEEPSPEED:  # Accelerate turns its plugin off without a word
            error = ConfigError("engine.kind", "Accelerate was told to run without DeepSpeed", got=kind.value,
                                hint="unset ACCELERATE_USE_CPU, and give accelerate launch no --cpu")
            error.shared = True
            raise error
        self.zero: Any = None  # DeepSpeed's engine
        self.fragments: dict[str, Fragment] = {}  # of the trained parameters
        self.rules: dict[str, str] = {}  # the optimizer kind that updates each of them

    def _accelerator_options(self, config: EngineConfig) -> dict[str, Any]:
        from accelerate import DeepSpeedPlugin

        self.settings = deepspeed_config(config)
        return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=self.settings)}

    def _make_experts(self, size: int) -> ExpertParallel:
        return zero_experts.make_groups(size)

    def divide(self, module: nn.Module) -> None:
        if self.config.kind == "zero3":
            import deepspeed

            if self.experts is not None:
                zero_experts.mark_parameters(module, self.config.expert_parallel)
            deepspeed.zero.Init(module=module, config_dict_or_path=self.settings)

    def prepare(self, model: nn.Module, optimizers: OptimizerSet | None, fp32_names: Sequence[str] = (),
                state: Mapping[str, StoredTensor] | None = None, *, strict: bool = True) -> None:
        assert optimizers is not None  # divided weights are of no use but to DeepSpeed's engine
        self._take(model)
        self.divide(model)
        self.optimizers, state = optimizers, state or {}
        matching = optimizers.matching_state(state, strict=strict)
        # DeepSpeed lays a group out flat, with one count of steps: parameters that began later make another group.
        experts = expert_parameters(model) if self.experts is not None else {}
        steps = {name: float(state[f"step/{name}"].read()) for name, keys in matching.items() if "step" in keys}
        optimizers.subdivide_groups(lambda name: (steps.get(name, 0.0), name in experts))
        if len(optimizers.members) > 1 or optimizers.needs_whole_matrices:
            optimizers.merge(lambda members: FlatOptimizer(members, optimizers.rules))
        optimizer, = optimizers.members
        if self.experts is not None:
            zero_experts.mark(model, optimizer, self.config.expert_parallel, divided=self.config.kind == "zero3")
        groups = [[(optimizers.names[id(p)], p) for p in group["params"]] for group in optimizer.param_groups]
        self.rules = {name: group[RULE] for group, members in zip(optimizer.param_groups, groups, strict=True)
                      for name, _ in members}
        if self.config.communication_dtype == "bf16":
            _travel_in_bf16(model)
        model.forward = self._inner(model.forward)  # type: ignore[method-assign]
        self.zero, _ = self.accelerator.prepare(model, optimizer)
        self.model = Outer(self.zero)
        check_fp32(model, [name for name, p in model.named_parameters() if p.is_floating_point()])
        check_fp32(model, fp32_names)
        self.fragments = {name: locate(self.zero.optimizer, p, index)
                          for index, group in enumerate(groups) for name, p in group}
        if isinstance(optimizer, FlatOptimizer):
            optimizer.fragments = self.fragments
        for name, keys in matching.items():
            self._load_state(name, {key: state[f"{key}/{name}"] for key in keys})

    def _load_state(self, name: str, saved: dict[str, StoredTensor]) -> None:
        fragment, optimizer = self.fragments[name], self.zero.optimizer.optimizer
        of_matrix: dict[str, Any] = {}
        if isinstance(optimizer, FlatOptimizer):
            of_matrix = optimizer.matrix_state_shapes(name, self.rules[name])
            if of_matrix:
                optimizer.load_matrix_state(name, saved, self.rules[name])
        state = optimizer.state[fragment.flat]
        for key in saved.keys() - of_matrix.keys():
            value = saved[key]
            if value.dim() == 0:  # the count of steps
                state[key] = value.read().to(fragment.flat.device, torch.float32)
            else:
                check_state_shape(name, value.shape, fragment.shape)
                flat = state.setdefault(key, torch.zeros_like(fragment.flat))
                fragment.elements(flat).copy_(value.elements(fragment.start, fragment.numel))

    def optimizer_share(self, *, copied: bool = False) -> dict[str, Tensor]:
        mine: dict[str, Tensor] = {}
        sizes = {name: fragment.shape.numel() for name, fragment in self.fragments.items()}
        owner = assign_owners(sizes, self.world_size)
        optimizer = self.zero.optimizer.optimizer
        for name, fragment in self.fragments.items():
            whole = {key: value.clone() if value.dim() == 0 else fragment.whole(value, self.device)
                     for key, value in optimizer.state[fragment.flat].items()}
            if isinstance(optimizer, FlatOptimizer):
                whole |= optimizer.gather_matrix_state(name, self.rules[name], self.device)
            for key, value in whole.items():
                value = super()._whole_weight(name, value)
                if owner[name] == self.rank:
                    mine[f"{key}/{name}"] = value.cpu()
        return mine

    def _whole_weight(self, name: str, tensor: Tensor) -> Tensor:
        return super()._whole_weight(name, gathered(tensor) if hasattr(tensor, "ds_id") else tensor)

    def local_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().local_weights():
            yield name, held(tensor)

    def _inner(self, forward: Callable[..., ModelOutput]) -> Callable[..., tuple[Tensor | None, Rest]]:
        def run(*args: Any, **kwargs: Any) -> tuple[Tensor | None, Rest]:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                output = forward(*args, **kwargs)
            return output.loss, Rest(output)

        return run

    def release(self) -> None:
        if self.zero is not None:
            self.zero.destroy()
            self.zero, self.fragments = None, {}
            for module in self.bare.modules():
                _make_whole(module)
                if module._parameters:
                    self.divide(module)
            gc.collect()  # parameters of ZeRO-3 hold on to themselves
            F.linear = LINEAR  # ZeRO-3 puts one in its place that does not hold on to gathered weights
            zero_experts.unmark(self.bare)
        super().release()

    @contextlib.contextmanager
    def _accumulating(self, last: bool) -> Iterator[None]:
        self.zero.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # A loss that is not finite spoils the gradients, whatever they are: one check of their norm covers both.
        self.zero.backward(loss * (1 + 0 * loss.detach()))

    def update(self, values: dict[str, Tensor], *, lr: float, clip: float, balance: bool = True) -> Update:
        assert self.optimizers is not None
        self.optimizers.set_lr(lr)
        self.zero.optimizer.clip_grad = clip
        self.zero.step()  # clips; a norm that is not finite only forgets the gradients, on all ranks alike
        applied, norm = self.zero.was_step_applied(), float(self.zero.get_global_grad_norm())
        numbers = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        assert applied == math.isfinite(norm)
        return self._updated(Update(numbers, norm, applied), balance)


def _check_device(config: EngineConfig) -> None:
    if config.device == "cpu" and torch.cuda.is_available():
        raise ConfigError("engine.device", "ZeRO takes the GPUs it sees", got="cpu",
                          hint="hide them with CUDA_VISIBLE_DEVICES=")


def _import_quietly() -> None:
    """DeepSpeed says what it found on standard output, and on a CPU would compile an all-reduce of its own for half a
    minute: it is told the device, and gloo does the work."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", r".*torch.distributed\.\w+. is deprecated", FutureWarning)


def _travel_in_bf16(model: nn.Module) -> None:
    """The weights and gradients that autocast rounds to bf16 in any case; DeepSpeed sorts its buckets by the mark."""
    from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME

    for parameter in model.autocast_parameters().values():  # type: ignore[operator]
        setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)


def _make_whole(module: nn.Module) -> None:
    """Undo what DeepSpeed has done to the parameters that `module` has itself, and to the module."""
    for name, parameter in module.named_parameters(recurse=False):
        if hasattr(parameter, "ds_id"):
            module._parameters[name] = nn.Parameter(gathered(parameter), parameter.requires_grad)
    module._parameters = dict(module._parameters)
    for name in [name for name in module.__dict__ if name.startswith("ds_") or name in LEFT_BEHIND]:
        del module.__dict__[name]
