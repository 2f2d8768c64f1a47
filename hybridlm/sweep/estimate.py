"""Estimates how long points will take: from steps measured here, corrected by finished points, or from FLOPs alone."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hybridlm.config.schema import Config
from hybridlm.distributed.engine import pick_device, pick_precision
from hybridlm.errors import counted
from hybridlm.evaluation.probe_training import model_for_probe
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import count_parameters, training_flops
from hybridlm.model.model import build_model
from hybridlm.optimizers import OPTIMIZERS, OptimizerConfig, build_optimizer
from hybridlm.planning.machine_memory import host_memory_bytes
from hybridlm.sweep.collect import read_metrics, summarize
from hybridlm.sweep.folder import point_outcome
from hybridlm.sweep.point import Point, identify_run
from hybridlm.sweep.probe_tasks import read_probe_result
from hybridlm.sweep.process import child_environment
from hybridlm.training.metrics import peak_flops
from hybridlm.training.sparse_attention import stage_model
from hybridlm.training.stage_flops import run_flops

MEASURED_STEPS = 2  # timed steps, after one that warms up
MEASURE_BY_DEFAULT_MAX_S = 20.0  # of all measuring, at the rate of large matrix products; small models are far slower
TRAINING_BYTES_PER_PARAMETER = 20  # weights, gradients, AdamW's state and a margin for activations
MAX_MEMORY_FRACTION = 0.25  # of the machine's memory or of what is free on its GPU, for a measured model
# What a point's process does before its first step, in seconds: it imports, makes an engine, measures the machine.
START_OF_A_POINT = """
import hybridlm.training.run
from hybridlm.distributed.engines import make_engine
from hybridlm.distributed.engines.single import SingleConfig
from hybridlm.training.metrics import peak_flops
engine = make_engine(SingleConfig())
peak_flops(engine.device, engine.precision)
"""

BY_FLOPS = "at least: training FLOPs at the rate of this machine's matrix products"
BY_MEASUREMENT = "steps on random tokens, validation, and a start of each point"


def estimate(points: list[Point], *, measure: bool | None) -> tuple[list[float], str]:
    """Estimate the seconds that each point takes.

    Points that differ in their seed alone are of one kind: a finished one tells how long the others take. Without one,
    a step of the kind is measured, or its FLOPs are counted; where points of other kinds have finished, that estimate
    is corrected by what they took.

    Args:
        points: the points of a sweep.
        measure: measure steps on this machine; None: where this takes only seconds; False: count FLOPs.

    Returns:
        Seconds per point, and a text that says how they were estimated.
    """
    took = {point.name: seconds for point in points
            if point_outcome(point)["status"] == "finished" and (seconds := _seconds_taken(point)) > 0}
    kinds = {point.name: point_kind(point) for point in points}
    open_kinds = {kinds[point.name] for point in points} - {kinds[name] for name in took}
    unknown = [point for point in points if kinds[point.name] in open_kinds]
    if not unknown:
        guessed, how = [0.0] * len(points), ""
    elif measure or (measure is None and _is_cheap_to_measure(unknown)):
        guessed, how = estimate_by_measurement(points)
    else:
        guessed, how = estimate_by_flops(points)
    if not took:
        return guessed, how
    corrected = correct(points, guessed, took)
    from_finished = f"from what {counted(len(took), 'finished point')} took"
    return corrected, from_finished + (f"; {how}, corrected by that" if unknown else "")


def correct(points: Sequence[Point], guessed: Sequence[float], took: dict[str, float]) -> list[float]:
    """Replace guesses by what points have taken, or correct them by how wrong they were for others.

    Args:
        points: the points.
        guessed: seconds per point.
        took: seconds of the points that have finished, or are known better, by name.

    Returns:
        Seconds per point: its own if known, else the mean of its kind, else the guess times the median ratio of what
        was taken to what was guessed.
    """
    kinds: dict[str, list[float]] = {}
    ratios = []
    for point, guess in zip(points, guessed, strict=True):
        if point.name in took:
            kinds.setdefault(point_kind(point), []).append(took[point.name])
            if guess > 0:
                ratios.append(took[point.name] / guess)
    ratio = statistics.median(ratios) if ratios else 1.0
    seconds = []
    for point, guess in zip(points, guessed, strict=True):
        kin = kinds.get(point_kind(point))
        seconds.append(took.get(point.name, statistics.mean(kin) if kin else guess * ratio))
    return seconds


def point_kind(point: Point) -> str:
    """A text that is equal for points that differ in their seed alone."""
    return identify_run(replace(point.config, training=replace(point.config.training, seed=0)))


def _seconds_taken(point: Point) -> float:
    """Seconds of a finished point: of its process where one start was enough, else at least those of its training."""
    return max(float(point_outcome(point).get("seconds", 0.0)), _training_seconds(point))


def _training_seconds(point: Point) -> float:
    """Seconds that a finished point was trained, on text and on probes."""
    run_dir = Path(point.config.run_dir)
    seconds = summarize(read_metrics(run_dir / "metrics.jsonl")[0]).get("seconds", 0.0)
    for task in point.work.probes:
        result = read_probe_result(run_dir, task)
        seconds += 0.0 if result is None else result["seconds"]
    return seconds


@dataclass(frozen=True)
class _Training:
    """One training of a point: `steps` of `batch_size` rows, `micro_batch_size` of them at a time."""

    model: ModelConfig
    sequence_length: int
    steps: int
    batch_size: int
    micro_batch_size: int
    optimizer: OptimizerConfig
    evaluated_rows: int  # rows of validation, over all its runs
    flops_per_token: float  # of a training step; one that is measured trains the whole model


def _trainings(point: Point) -> list[_Training]:
    """The trainings of a point: on text stage by stage, and on each probe."""
    config = point.config
    found = []
    for stage, flops in zip(point.stages, run_flops(config) if point.stages else [], strict=True):
        micro_batch_size = min(config.training.micro_batch_size or stage.batch_size, stage.batch_size)
        every = config.training.eval_every
        evaluations = 1 + (stage.steps // every if every else 0)
        found.append(_Training(stage_model(config.model, stage), stage.sequence_length, stage.steps, stage.batch_size,
                               micro_batch_size, config.optimizer,
                               evaluations * config.training.eval_batches * stage.batch_size, flops))
    for task in point.work.probes:
        assert task.length is not None
        model = model_for_probe(config.model, task.probe(), task.length)
        rows = task.examples * (1 + len(task.lengths or ()))
        found.append(_Training(model, task.length, task.steps, task.batch_size, task.batch_size,
                               OPTIMIZERS.config_class("adamw")(lr=task.lr), rows,
                               training_flops(model, task.length)))
    return found


def _training_flops(point: Point) -> float:
    """FLOPs of all training of a point."""
    return sum(each.flops_per_token * each.steps * each.batch_size * each.sequence_length
               for each in _trainings(point))


def estimate_by_flops(points: list[Point]) -> tuple[list[float], str]:
    """Estimate seconds as if all FLOPs ran at the speed of large matrix products; small models are far slower."""
    config = points[0].config
    device = pick_device(config.engine)
    rate, source = peak_flops(device, pick_precision(config.training.precision, device))
    return [_training_flops(point) / rate for point in points], f"{BY_FLOPS} ({rate / 1e9:.3g} GFLOP/s, {source})"


def _is_cheap_to_measure(points: list[Point]) -> bool:
    """Whether measuring a step of each kind of point takes seconds, and the models are small for the memory here."""
    config = points[0].config
    device = pick_device(config.engine)
    rate, _ = peak_flops(device, pick_precision(config.training.precision, device))
    trainings = [each for point in {point_kind(point): point for point in points}.values()
                 for each in _trainings(point)]
    flops = sum(training_flops(each.model, each.sequence_length) * each.micro_batch_size * each.sequence_length
                for each in trainings)
    largest = max(count_parameters(each.model).total_with_mtp for each in trainings)
    memory = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory_bytes() or 0
    return ((1 + MEASURED_STEPS) * flops / rate <= MEASURE_BY_DEFAULT_MAX_S
            and TRAINING_BYTES_PER_PARAMETER * largest <= MAX_MEMORY_FRACTION * memory)


def estimate_by_measurement(points: list[Point]) -> tuple[list[float], str]:
    """Measure a few steps of each kind of point, and how long a point's process takes to start."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", START_OF_A_POINT], check=False, env=child_environment(jobs=1),
                   stdin=subprocess.DEVNULL, capture_output=True)
    start_s = time.perf_counter() - begin
    known: dict[str, float] = {}
    for point in points:
        key = point_kind(point)
        if key not in known:
            known[key] = start_s + sum(_training_time(point.config, each) for each in _trainings(point))
    return [known[point_kind(point)] for point in points], f"measured: {BY_MEASUREMENT}"


def _training_time(config: Config, training: _Training) -> float:
    """Seconds of a training: one micro batch is timed, and counted as often as there are of its size."""
    device = pick_device(config.engine)
    model = build_model(training.model, device=device)
    model.activation_checkpointing = config.training.activation_checkpointing
    if config.training.compile:
        model.compile_layers()
    model.train()
    optimizers = build_optimizer(model, training.optimizer)
    generator = torch.Generator().manual_seed(0)
    vocab = training.model.vocab_size
    shape = (training.micro_batch_size, training.sequence_length)
    ids_BT = torch.randint(vocab, shape, generator=generator).to(device)
    targets_BTM = torch.randint(vocab, (*shape, 1 + training.model.mtp.depth), generator=generator).to(device)
    half = pick_precision(config.training.precision, device) == "bf16"

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return model(ids_BT, targets=targets_BTM).loss

    passes_s, updates_s = [], []
    for _ in range(1 + MEASURED_STEPS):
        begin = clock()
        forward().backward()
        middle = clock()
        optimizers.step()
        optimizers.zero_grad()
        passes_s.append(middle - begin)
        updates_s.append(clock() - middle)
    begin = clock()
    with torch.no_grad():
        forward()
    forward_s = clock() - begin
    step_s = (statistics.mean(passes_s[1:]) * training.batch_size / training.micro_batch_size
              + statistics.mean(updates_s[1:]))
    warm_up_s = max(0.0, passes_s[0] + updates_s[0] - step_s)
    return warm_up_s + training.steps * step_s + forward_s * training.evaluated_rows / training.micro_batch_size
