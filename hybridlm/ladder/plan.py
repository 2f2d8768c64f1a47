"""Plans a ladder: points of a sweep, at every rung with a matched budget and carried hyperparameters."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

from hybridlm.config.checks import validate
from hybridlm.config.schema import Config, StageConfig
from hybridlm.errors import ConfigError, did_you_mean, rename_keys
from hybridlm.ladder.pilot import PILOT_FOLDER
from hybridlm.ladder.pilot_report import PILOT_FILE, RATE_KEY, best_rate, describe_use, read_pilot
from hybridlm.ladder.request import LadderConfig, LadderRequest, architecture_words, check_projections
from hybridlm.ladder.rungs import RungConfig, carry
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters, decode_state_bytes
from hybridlm.run_config import load_config
from hybridlm.sweep.match import match_points
from hybridlm.sweep.plan import FIXED_KEYS, SweepPlan
from hybridlm.sweep.point import SEED_KEY, Point
from hybridlm.sweep.probe_tasks import PointWork
from hybridlm.sweep.request import SweepConfig
from hybridlm.training.stage_flops import run_flops
from hybridlm.training.stages import plan_stages

ARCHITECTURE_KEY = "architecture"
RUNG_KEY = "rung"
CARRIED_KEYS = ("training.seed", "training.steps", "training.tokens", "training.sequence_length", "training.batch_size",
                "training.eval_batches", "model.hidden_size", "model.num_layers", "model.parametrization")
BEFORE_PILOT = "a ladder that began before its pilot goes on with ladder.pilot.use=false"
COORDINATES_FILE = "coordinates.json"  # of the coordinate check, which may come before the ladder
DECODED_TOKENS = 64  # room behind the context at which decoding is timed


@dataclass(frozen=True)
class PointCost:
    """Costs of one point, from its config alone.

    Args:
        parameters: that a token meets, without embedding and head.
        tokens: of training on text.
        compute: FLOPs of training on text in all stages, head included.
        flops_per_token: of a training step of the last stage, head included.
        steps: optimizer steps on text.
        lr: peak learning rate, before the factors per parameter.
        state_bytes: decode state at the context of the ladder, in bf16.
    """

    parameters: int
    tokens: int
    compute: float
    flops_per_token: float
    steps: int
    lr: float
    state_bytes: int


@dataclass(kw_only=True)
class LadderPlan:
    """All points of a ladder.

    Attributes:
        ladder: the ladder's own settings.
        sweep: the points as a sweep, which runs them.
        costs: by name of the point.
    """

    ladder: LadderConfig
    sweep: SweepPlan
    costs: dict[str, PointCost]


def make_ladder_plan(request: LadderRequest) -> LadderPlan:
    """Make the points of a ladder, each with its complete config.

    Args:
        request: of `read_ladder_request`.

    Raises:
        ConfigError: a setting that the ladder decides itself, architectures that cannot be resized or matched, a
            projection far beyond all points, a pilot whose rates cannot be used.
    """
    ladder = request.ladder
    for word in request.fixed:
        key = word.partition("=")[0].lstrip("+")
        if key in FIXED_KEYS or any(key == carried or key.startswith(f"{carried}.") for carried in CARRIED_KEYS):
            raise ConfigError(key, "is decided by the ladder", got=word.partition("=")[2],
                              expected="ladder.rungs, ladder.seeds, ladder.tokens_per_parameter, "
                              "ladder.parametrization")
    read_pilot(ladder.folder)  # what cannot be read is said before anything is trained, also where it is not used
    configs = {name: architecture_config(request, name) for name in ladder.architectures}
    reference = ladder.reference_name
    base_tokens = _tokens(configs[reference].model, ladder.base_size, ladder)
    points: list[Point] = []
    notes: list[str] = []
    for rung in ladder.sizes:
        tokens = _tokens(configs[reference].model, rung, ladder)
        rung_points = [_make_point(ladder, rung, name, configs[name], seed, tokens, tokens / base_tokens)
                       for seed in ladder.seeds for name in ladder.architectures]  # one seed of all is soon comparable
        matching = SweepConfig(name=ladder.name, match=ladder.match, state_context=ladder.state_context,
                               reference=_point_name(reference, rung, ladder.seeds[0]))
        notes += [f"{rung.name}: {rename_keys(note, 'sweep.', 'ladder.')}"
                  for note in match_points(rung_points, matching)]
        if ladder.validation_tokens % rung.tokens_per_step:
            notes.append(f"{rung.name}: batches of {rung.tokens_per_step:,} tokens do not divide the "
                         f"{ladder.validation_tokens:,} of a validation, so it has a few more than other rungs")
        points += rung_points
    costs = {point.name: _cost(point, ladder) for point in points}
    check_projections(ladder.gate, max(cost.compute for cost in costs.values()))
    tuned = describe_use(ladder)
    notes += [*_transfer_notes(ladder, points), *tuned]
    sweep = SweepConfig(name=ladder.name, match=ladder.match, dir=str(ladder.folder), probes=ladder.probes,
                        state_context=ladder.state_context, launcher=ladder.launcher, slurm=ladder.slurm,
                        ray=ladder.ray)
    vary = {ARCHITECTURE_KEY: list(ladder.architectures), RUNG_KEY: [rung.name for rung in ladder.sizes],
            SEED_KEY: [str(seed) for seed in ladder.seeds]}
    return LadderPlan(ladder=ladder, costs=costs,
                      sweep=SweepPlan(sweep=sweep, folder=ladder.folder, vary=vary, points=points, notes=notes,
                                      other_files=(COORDINATES_FILE, PILOT_FILE, PILOT_FOLDER),
                                      other_run_hint=BEFORE_PILOT if tuned else ""))


def architecture_config(request: LadderRequest, name: str) -> Config:
    """The config of a run with an architecture, at the size that its model file says.

    Args:
        request: of `read_ladder_request`.
        name: one of the ladder's architectures.

    Returns:
        The config, with the best learning rate of the ladder's pilot where that is used.

    Raises:
        ConfigError: a setting that no run has, a pilot whose rates cannot be used.
    """
    words = [*request.fixed, *architecture_words(request.ladder, name)]
    config = load_config(request.root, words, request.config_dir)
    rate = best_rate(request.ladder, name, config.optimizer)
    if rate is None:
        return config
    return load_config(request.root, [*words, f"{RATE_KEY}={rate!r}"], request.config_dir)


def _point_name(architecture: str, rung: RungConfig, seed: int) -> str:
    return f"{architecture}_{rung.name}_seed-{seed}"


def resize_model(model: ModelConfig, rung: RungConfig, ladder: LadderConfig) -> ModelConfig:
    """The model at a rung, with its parametrization; `model.init_std` is that of the base rung.

    Args:
        model: of any size.
        rung: the size.
        ladder: names the base rung and the parametrization.
    """
    resized = carry(model, ladder.parametrization, rung.shape, ladder.base_size.shape)
    longest = 0 if ladder.decode_context is None else ladder.decode_context + DECODED_TOKENS
    return replace(resized, max_position=max(model.max_position, rung.sequence_length, longest))


def _tokens(model: ModelConfig, rung: RungConfig, ladder: LadderConfig) -> int:
    """Tokens of training at a rung, whole steps."""
    if rung.tokens is not None:
        wanted = float(rung.tokens)
    else:
        per_parameter = rung.tokens_per_parameter or ladder.tokens_per_parameter
        wanted = per_parameter * count_parameters(resize_model(model, rung, ladder)).active
    return math.ceil(wanted / rung.tokens_per_step) * rung.tokens_per_step


def _make_point(ladder: LadderConfig, rung: RungConfig, name: str, start: Config, seed: int, tokens: int,
                tokens_ratio: float) -> Point:
    """One point: the architecture's config at the size of the rung."""
    config = copy.deepcopy(start)
    config.model = resize_model(config.model, rung, ladder)
    batch_ratio = rung.tokens_per_step / ladder.base_size.tokens_per_step
    lr_factor = batch_ratio**ladder.lr_batch_exponent * tokens_ratio**ladder.lr_tokens_exponent
    config.training = replace(
        config.training, seed=seed, tokens=None, steps=tokens // rung.tokens_per_step,
        sequence_length=rung.sequence_length, batch_size=rung.batch_size, resume="auto",
        eval_batches=math.ceil(ladder.validation_tokens / rung.tokens_per_step))
    config.recipe = replace(config.recipe, stages=_divide_steps(
        config.recipe.stages, config.training.steps, ladder.architectures[name].get("stages", {}), name,
        config.optimizer.lr, lr_factor))
    point_name = _point_name(name, rung, seed)
    config.run_dir = str(ladder.folder / "points" / point_name)
    if config.tracking.run_name is None:
        config.tracking = replace(config.tracking, run_name=f"{ladder.name}/{point_name}")
    validate(config)
    last = rung.name == ladder.sizes[-1].name
    return Point(name=point_name, settings={ARCHITECTURE_KEY: name, RUNG_KEY: rung.name, SEED_KEY: seed}, config=config,
                 work=PointWork(probes=ladder.probes if last else [], decode_context=ladder.decode_context))


def _divide_steps(stages: list[StageConfig], steps: int, fractions: dict[str, float], architecture: str, lr: float,
                  lr_factor: float) -> list[StageConfig]:
    """The stages of a recipe with their parts of all steps, and their learning rates.

    Args:
        stages: of the recipe; the last one gets what the others leave.
        steps: of the whole training.
        fractions: part of the steps by name of a stage.
        architecture: its name, for errors.
        lr: peak of stages that have none of their own.
        lr_factor: what batch and tokens make of it.
    """
    names = [stage.name for stage in stages]
    key = f"ladder.architectures.{architecture}.stages"
    for name in fractions:
        if name not in names[:-1]:
            raise ConfigError(key, "names no stage before the last", got=name,
                              expected=f"among {', '.join(names[:-1])}" if names[:-1] else "a recipe with stages",
                              hint=did_you_mean(name, names))
    divided = []
    left = steps
    for stage in stages:
        own = left
        if stage is not stages[-1]:
            if stage.name not in fractions:
                raise ConfigError(key, f"does not say what part of the tokens stage '{stage.name}' gets",
                                  expected=f"stages: {{{stage.name}: 0.1}}")
            own = max(1, round(fractions[stage.name] * steps))
            left -= own
        if own < 1:
            raise ConfigError(key, f"leaves no step for stage '{stage.name}'", got=fractions)
        divided.append(replace(stage, steps=own, tokens=None, lr=(stage.lr or lr) * lr_factor, batch_size=None,
                               sequence_length=None))
    return divided


def _transfer_notes(ladder: LadderConfig, points: list[Point]) -> list[str]:
    """Say by which rule hyperparameters are carried, and for which parts nobody has checked it."""
    base = ladder.base_size
    carried = f"learning rate and initial values are those of {base.name}"
    if ladder.parametrization == "standard":
        return [f"{carried}; width and depth change no learning rate (ladder.parametrization=standard)"]
    said = [f"{carried}, carried by {ladder.parametrization}"]
    gaps: dict[str, list[str]] = {}
    for point in points:
        for name in dict.fromkeys(point.config.model.layers()):
            for gap in point.config.model.mixers[name].transfer_gaps():
                found = gaps.setdefault(gap, [])
                if point.settings[ARCHITECTURE_KEY] not in found:
                    found.append(point.settings[ARCHITECTURE_KEY])
    said += [f"no published rule carries {gap} ({', '.join(names)}): they get the factors of their shape"
             for gap, names in gaps.items()]
    return said


def _cost(point: Point, ladder: LadderConfig) -> PointCost:
    """Costs of a point: FLOPs are those that its run reports."""
    model = point.config.model
    stages = plan_stages(point.config)
    tokens = [stage.steps * stage.tokens_per_step for stage in stages]
    per_token = run_flops(point.config)
    return PointCost(parameters=count_parameters(model).active, tokens=sum(tokens),
                     compute=sum(flops * count for flops, count in zip(per_token, tokens, strict=True)),
                     flops_per_token=per_token[-1], steps=sum(stage.steps for stage in stages), lr=stages[-1].lr,
                     state_bytes=decode_state_bytes(model, ladder.state_context))


def describe_costs(costs: dict[str, PointCost]) -> dict[str, dict[str, Any]]:
    """Costs as plain data."""
    return {name: dict(vars(cost)) for name, cost in costs.items()}
