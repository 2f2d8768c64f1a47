"""FLOPs per token of a training step of a stage, which may train a part of the model or learn from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hybridlm import checkpoint
from hybridlm.config.checks import parameter_names
from hybridlm.config.schema import Config, selector_patterns
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import (
    BACKWARD,
    forward_flops,
    mixer_forward_flops,
    selector_loss_flops,
    training_parts,
)
from hybridlm.model.loss_names import trains_next_token
from hybridlm.training.sparse_attention import stage_model
from hybridlm.training.stages import Stage, plan_stages


@dataclass(frozen=True)
class TeacherCost:
    """The parts of a teacher that a stage computes.

    Args:
        model: the teacher.
        converted: layers of the student that replace its attention.
    """

    model: ModelConfig
    converted: Sequence[int] = ()


def stage_flops(config: ModelConfig, stage: Stage, trained: Sequence[str],
                teacher: TeacherCost | None = None) -> float:
    """FLOPs per token of a training step of a stage.

    Forwards are those of the model, of the teacher's predictions where the stage learns from these, and of the
    teacher's attention in converted layers that learn its output. Backwards reach from the losses down to what is
    trained:

        selectors of keys alone                none but that of their own loss
        converted mixers, on teacher inputs    the mixers, each from its own loss
        anything else                          the whole model

    In the first two, logits are computed only where a loss asks for them. A backward counts as two forwards, also where
    the gradient of an input is not needed.

    Args:
        config: the model.
        stage: the stage.
        trained: names of the parameters that it trains.
        teacher: the teacher of the run; None where it has none.
    """
    length, weights = stage.sequence_length, stage.loss_weights
    model = stage_model(config, stage)
    parts = training_parts(model, length)
    forward, backward = parts["forward"], parts["backward"]
    compares = teacher is not None and stage.compares_models()
    aligns = teacher is not None and stage.aligns_layers()
    partial = True
    selectors = selector_patterns(config)
    if all(any(fnmatchcase(name, pattern) for pattern in selectors) for name in trained):
        backward = 0.0
    elif teacher is not None and stage.inputs == "teacher" and not compares and _are_mixers(trained, teacher.converted):
        backward = BACKWARD * mixer_forward_flops(model, teacher.converted, length)
    else:
        partial = False
    if partial and not compares and not trains_next_token(weights, model.z_loss):
        forward -= forward_flops(model, length)["head"]
    total = forward + backward + selector_loss_flops(model, length, weights)
    if teacher is not None and compares:
        total += sum(forward_flops(teacher.model, length, mtp=False).values())
    if teacher is not None and aligns:
        total += mixer_forward_flops(teacher.model, teacher.converted, length)
    return total


def run_flops(config: Config) -> list[float]:
    """FLOPs per token of a training step of every stage of a run, from its config alone.

    Args:
        config: of the run.

    Returns:
        `stage_flops` of each of `plan_stages`.

    Raises:
        CheckpointError: the teacher of the run cannot be read.

    >>> from hybridlm.run_config import load_config
    >>> dense, sparse = run_flops(load_config("train", ["model=kda_dsa_tiny", "recipe=dsa_scratch"]))
    >>> dense != sparse
    True
    """
    teacher = None
    if config.teacher is not None:
        convert = config.recipe.convert
        teacher = TeacherCost(checkpoint.read_model_config(checkpoint.resolve(config.teacher, hashes=False)),
                              [] if convert is None else convert.converted or [])
    return [stage_flops(config.model, stage, _trained_names(config, stage.trainable), teacher)
            for stage in plan_stages(config)]


def _trained_names(config: Config, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that match; "*" stands for all of them, which need not be listed."""
    if "*" in patterns:
        return ["*"]
    return [name for name in parameter_names(config) if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _are_mixers(trained: Sequence[str], layers: Sequence[int]) -> bool:
    """Whether all these parameters are of the mixers of these layers."""
    return all(name.startswith(tuple(f"layers.{layer}.mixer." for layer in layers)) for name in trained)
