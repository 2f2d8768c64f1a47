"""The stages of a run with all defaults filled in, the parameters a stage trains, and the progress of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hybridlm.config.checks import check_patterns
from hybridlm.config.schema import Config, StageConfig
from hybridlm.errors import ConfigError
from hybridlm.optimizers import OptimizerSet
from hybridlm.optimizers.lr_schedule import LRScheduleConfig, check_schedule, lr_factor
from hybridlm.training.backends import format_layer_ranges


@dataclass(kw_only=True)
class Stage(StageConfig):
    """A stage of a run: its config with all defaults filled in, and its index among the stages.

    A stage without anything to train has no steps: it is passed over.
    """

    index: int
    steps: int
    sequence_length: int
    batch_size: int
    lr: float
    schedule: LRScheduleConfig

    def __post_init__(self) -> None:
        """Check nothing: the config has been checked, and a stage may have no steps."""

    def lr_at(self, step: int) -> float:
        """Compute the learning rate of step number `step` of the stage, 0 the first."""
        return self.lr * lr_factor(self.schedule, step, self.steps)

    def lr_factor_of(self, name: str) -> float:
        """Find the factor of the learning rate of a parameter: that of the first pattern that it matches, or 1."""
        return next((factor for pattern, factor in self.lr_scale.items() if fnmatchcase(name, pattern)), 1.0)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a global batch."""
        return self.batch_size * self.sequence_length


def plan_stages(config: Config) -> list[Stage]:
    """List the stages of a run, every null filled from `training` and `optimizer`.

    Raises:
        ConfigError: a schedule whose warm-up and decay do not fit into a stage.

    Example:
        >>> from hybridlm import load_config
        >>> config = load_config("train", ["model=kda_dsa_tiny", "recipe=dsa_scratch"])
        >>> [stage.name for stage in plan_stages(config)]
        ['dense', 'sparse']
    """
    stages: list[Stage] = []
    for index, stage in enumerate(config.recipe.stages):
        length = stage.sequence_length or config.training.sequence_length
        batch_size = stage.batch_size or config.training.batch_size
        patterns = config.recipe.parameter_patterns(stage.trainable, config.model)
        steps = _count_steps(stage, config, length * batch_size) if patterns else 0
        schedule = stage.schedule or config.optimizer.schedule
        if steps:
            key = f"recipe.stages.{index}.schedule" if stage.schedule else "optimizer.schedule"
            check_schedule(schedule, steps, key)
        options = {field.name: getattr(stage, field.name) for field in fields(StageConfig)}
        stages.append(Stage(**options | {
            "index": index, "steps": steps, "tokens": None, "sequence_length": length, "batch_size": batch_size,
            "lr": stage.lr or config.optimizer.lr, "schedule": schedule,
            "trainable": patterns, "attention_mode": config.recipe.mode_of(stage, length),
            "dense_layers": sorted({layer % config.model.num_layers for layer in stage.dense_layers}),
            "lr_scale": {pattern: factor for name, factor in stage.lr_scale.items()
                         for pattern in config.recipe.parameter_patterns([name], config.model)}}))
    return stages


def _count_steps(stage: StageConfig, config: Config, tokens_per_step: int) -> int:
    if stage.steps is not None:
        return stage.steps
    tokens = stage.tokens if stage.tokens is not None else config.training.tokens
    return config.training.steps if tokens is None else math.ceil(tokens / tokens_per_step)


def check_steps_left(config: Config, stages: Sequence[Stage], made: int) -> None:
    """Check that the plan of a run has the steps that it has made.

    Args:
        config: of the run.
        stages: its plan.
        made: steps of the checkpoint from which it goes on.

    Raises:
        ConfigError: it has fewer.
    """
    planned = sum(stage.steps for stage in stages)
    if made <= planned:
        return
    last = config.recipe.stages[-1]
    if last.steps is None and last.tokens is None:
        key = "training.steps" if config.training.tokens is None else "training.tokens"
    else:
        key = f"recipe.stages.{len(stages) - 1}.{'steps' if last.tokens is None else 'tokens'}"
    raise ConfigError(key, f"leaves {planned} steps, and this run has made {made}", expected=f"at least {made} steps",
                      hint="branch_from= an earlier checkpoint and another run_dir go on from there")


def set_trainable(model: nn.Module, stage: Stage) -> list[str]:
    """Freeze all parameters but those that match the stage's patterns, and return the names of the trained ones.

    Raises:
        ConfigError: a pattern that names nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    check_patterns(stage.trainable, names, f"recipe.stages.{stage.index}.trainable")
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in stage.trainable))
        if parameter.requires_grad:
            trained.append(name)
    return trained


def describe_names(names: Sequence[str]) -> str:
    """Describe names of parameters in one line: those of several layers once, with the numbers of the layers.

    Example:
        >>> describe_names(["embed.weight", "layers.0.norm.weight", "layers.1.norm.weight", "layers.3.norm.weight"])
        'embed.weight, layers.{0-1,3}.norm.weight'
    """
    layers: dict[str, list[str]] = {}  # numbers of layers by the name within them; none of a name outside
    for name in names:
        found = re.fullmatch(r"layers\.(\d+)(\..*)", name)
        if found is None:
            layers[name] = []
        else:
            layers.setdefault(found[2], []).append(found[1])
    return ", ".join(_describe_layers(numbers) + name for name, numbers in layers.items())


def _describe_layers(numbers: Sequence[str]) -> str:
    if len(numbers) < 2:
        return "".join(f"layers.{number}" for number in numbers)
    return "layers.{" + format_layer_ranges(numbers).replace(", ", ",") + "}"


def check_trained(model: nn.Module, trained: list[str], optimizers: OptimizerSet) -> None:
    """Check that exactly the trained parameters require a gradient and are updated by the optimizer.

    Raises:
        RuntimeError: they differ; the text names a parameter.
    """
    wanted = set(trained)
    updated = {optimizers.names[id(parameter)] for parameter in optimizers.parameters()}
    for what, names in (("require a gradient", {n for n, p in model.named_parameters() if p.requires_grad}),
                        ("are in the optimizer", updated)):
        if wrong := sorted(names ^ wanted):
            raise RuntimeError(f"the parameters that {what} are not those of the stage: '{wrong[0]}' "
                               f"{'should not be' if wrong[0] in names else 'is not'} among them")


@dataclass
class Progress:
    """Position of a run: everything a checkpoint keeps beside weights and optimizer state.

    `samples` is the data cursor: the next global batch starts with that sample, whatever the number of ranks.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    stage: int = 0
    step_in_stage: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0  # of training, over all sessions

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> Progress:
        """Read the progress in a checkpoint; keys that this version does not have are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in saved.items() if key in known})

    def advance(self, stage: Stage) -> None:
        """Count one step of `stage`."""
        self.step += 1
        self.step_in_stage += 1
        self.samples += stage.batch_size
        self.tokens += stage.tokens_per_step

    def enter(self, stage: Stage) -> None:
        """Begin `stage`, unless the run is already in it."""
        if self.stage != stage.index:
            self.stage = stage.index
            self.step_in_stage = 0
