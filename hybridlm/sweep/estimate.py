"""Estimates how long points will take: from a short measurement, from finished points, or from FLOPs alone."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hybridlm.config.schema import Config
from hybridlm.distributed.engine import pick_device, pick_precision
from hybridlm.errors import counted
from hybridlm.evaluation.probe_training import model_for_probe
from hybridlm.model.config import ModelConfig
from hybridlm.model.cost import training_flops
from hybridlm.model.model import build_model
from hybridlm.sweep.collect import read_metrics, summarize
from hybridlm.sweep.folder import point_outcome
from hybridlm.sweep.point import Point, identify_run
from hybridlm.sweep.probe_tasks import read_probe_result
from hybridlm.training.metrics import peak_flops

WARM_UP_PASSES = 1  # passes before the clock starts
MEASURED_PASSES = 2  # timed passes

BY_FLOPS = "at least: training FLOPs at the rate of this machine's matrix products"
BY_MEASUREMENT = "forward and backward passes on random tokens, without optimizer, validation and start"


def estimate(points: list[Point], *, measure: bool) -> tuple[list[float], str]:
    """Estimate the seconds that each point takes.

    Args:
        points: the points of a sweep.
        measure: run a few passes of each different model instead of using finished points or counting FLOPs.

    Returns:
        Seconds per point, and a text that says how they were estimated.
    """
    if measure:
        return estimate_by_measurement(points)
    return estimate_by_finished(points) or estimate_by_flops(points)


def estimate_by_finished(points: list[Point]) -> tuple[list[float], str] | None:
    """Estimate seconds from FLOPs at the speed of the finished points; None where none has finished."""
    measured: dict[str, float] = {}
    for point in points:
        if point_outcome(point)["status"] == "finished" and (seconds := _training_seconds(point)) > 0:
            measured[point.name] = seconds
    if not measured:
        return None
    seconds_per_flop = statistics.median(measured[point.name] / _training_flops(point) for point in points
                                         if point.name in measured)
    return ([measured.get(point.name, _training_flops(point) * seconds_per_flop) for point in points],
            f"from the training time of {counted(len(measured), 'finished point')}, by FLOPs")


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


def _trainings(point: Point) -> list[_Training]:
    """The trainings of a point: on text stage by stage, and on each probe."""
    config = point.config
    found = []
    for stage in point.stages:
        micro_batch_size = min(config.training.micro_batch_size or stage.batch_size, stage.batch_size)
        found.append(_Training(config.model, stage.sequence_length, stage.steps, stage.batch_size, micro_batch_size))
    for task in point.work.probes:
        assert task.length is not None
        model = model_for_probe(config.model, task.probe(), task.length)
        found.append(_Training(model, task.length, task.steps, task.batch_size, task.batch_size))
    return found


def _training_flops(point: Point) -> float:
    """FLOPs of all training of a point."""
    return sum(training_flops(each.model, each.sequence_length) * each.steps * each.batch_size * each.sequence_length
               for each in _trainings(point))


def estimate_by_flops(points: list[Point]) -> tuple[list[float], str]:
    """Estimate seconds as if all FLOPs ran at the speed of large matrix products; small models are far slower."""
    config = points[0].config
    device = pick_device(config.engine)
    rate, source = peak_flops(device, pick_precision(config.training.precision, device))
    return [_training_flops(point) / rate for point in points], f"{BY_FLOPS} ({rate / 1e9:.3g} GFLOP/s, {source})"


def estimate_by_measurement(points: list[Point]) -> tuple[list[float], str]:
    """Measure a few passes of each different model; points that differ in their seed alone are measured once."""
    known: dict[str, float] = {}
    seconds = []
    for point in points:
        training = replace(point.config.training, seed=0)
        key = identify_run(replace(point.config, training=training))
        if key not in known:
            known[key] = sum(each.steps * _step_seconds(point.config, each) for each in _trainings(point))
        seconds.append(known[key])
    return seconds, f"measured: {BY_MEASUREMENT}"


def _step_seconds(config: Config, training: _Training) -> float:
    """Seconds of one step: one micro batch is timed, and counted as often as the step has micro batches."""
    device = pick_device(config.engine)
    model = build_model(training.model, device=device)
    model.activation_checkpointing = config.training.activation_checkpointing
    model.train()
    generator = torch.Generator().manual_seed(0)
    vocab = training.model.vocab_size
    shape = (training.micro_batch_size, training.sequence_length)
    ids_BT = torch.randint(vocab, shape, generator=generator).to(device)
    targets_BTM = torch.randint(vocab, (*shape, 1 + training.model.mtp.depth), generator=generator).to(device)
    half = pick_precision(config.training.precision, device) == "bf16"
    start = 0.0
    for index in range(WARM_UP_PASSES + MEASURED_PASSES):
        if index == WARM_UP_PASSES:
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            model(ids_BT, targets=targets_BTM).loss.backward()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / MEASURED_PASSES * training.batch_size / training.micro_batch_size
