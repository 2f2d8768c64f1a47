"""From a recipe to stages with every number settled, and what a stage trains."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from hybridlm.config.checks import check_patterns
from hybridlm.config.schema import Config, StageConfig
from hybridlm.optimizers import OptimizerSet
from hybridlm.optimizers.lr_schedule import check_schedule


@dataclass(frozen=True)
class Stage:
    """One stage of a run. `first_step` counts from the start of the run."""

    index: int
    name: str
    steps: int
    first_step: int
    sequence_length: int
    batch_size: int
    lr: float
    trainable: tuple[str, ...]
    attention_mode: Literal["dense", "sparse"] | None = None  # null: as in the model's config; topk likewise
    topk: int | None = None
    loss_weights: dict[str, float] = field(default_factory=dict)
    eval_recall: bool = False
    recall_every: int | None = None

    @property
    def last_step(self) -> int:
        """The run's step after which the stage is done."""
        return self.first_step + self.steps

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.sequence_length


def plan(config: Config) -> list[Stage]:
    """The stages of a run, every null filled from `training` and `optimizer`.

    Raises:
        ConfigError: a schedule whose warm-up and decay do not fit into a stage.
    """
    stages: list[Stage] = []
    for index, stage in enumerate(config.recipe.stages):
        length = stage.sequence_length or config.training.sequence_length
        batch = stage.batch_size or config.training.batch_size
        steps = _steps(stage, config, length * batch)
        check_schedule(config.optimizer.schedule, steps)
        stages.append(Stage(index, stage.name, steps, stages[-1].last_step if stages else 0, length, batch,
                            stage.lr or config.optimizer.lr, tuple(stage.trainable), stage.attention_mode, stage.topk,
                            dict(stage.loss_weights), stage.eval_recall, stage.recall_every))
    return stages


def _steps(stage: StageConfig, config: Config, tokens_per_step: int) -> int:
    if stage.steps is not None:
        return stage.steps
    tokens = stage.tokens if stage.tokens is not None else config.training.tokens
    return config.training.steps if tokens is None else math.ceil(tokens / tokens_per_step)


def set_trainable(model: nn.Module, stage: Stage) -> list[str]:
    """Freeze all parameters but those that match the stage's patterns; the names of the trained ones.

    Raises:
        ConfigError: a pattern that names nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    check_patterns(list(stage.trainable), names, f"recipe.stages.{stage.index}.trainable")
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in stage.trainable))
        if parameter.requires_grad:
            trained.append(name)
    return trained


def audit(model: nn.Module, trained: list[str], optimizers: OptimizerSet) -> None:
    """What requires a gradient and what the optimizer holds are the trained parameters, and nothing else.

    Raises:
        RuntimeError: they differ; the text names a parameter.
    """
    wanted = set(trained)
    held = {optimizers.names[id(parameter)] for parameter in optimizers.parameters()}
    for what, names in (("require a gradient", {n for n, p in model.named_parameters() if p.requires_grad}),
                        ("are in the optimizer", held)):
        if wrong := sorted(names ^ wanted):
            raise RuntimeError(f"the parameters that {what} are not those of the stage: '{wrong[0]}' "
                               f"{'should not be' if wrong[0] in names else 'is not'} among them")


@dataclass
class Progress:
    """Where a run stands: all that is not a weight or an optimizer's memory. Saved in each checkpoint.

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
        return asdict(self)

    def advance(self, stage: Stage) -> None:
        """One step of `stage` is done."""
        self.step += 1
        self.step_in_stage += 1
        self.samples += stage.batch_size
        self.tokens += stage.tokens_per_step

    def enter(self, stage: Stage) -> None:
        """`stage` begins, unless the run is already in it."""
        if self.stage != stage.index:
            self.stage, self.step_in_stage = stage.index, 0
