"""How long points will take: from a short measurement, from points that have finished, or from FLOPs alone."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
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
from hybridlm.sweep.folder import outcome
from hybridlm.sweep.plan import Point, identity
from hybridlm.sweep.probes import read_result
from hybridlm.training.metrics import peak_flops

WARM_UP, MEASURED = 1, 2  # passes

BY_FLOPS = "at least: training FLOPs at the rate of this machine's matrix products"
BY_MEASUREMENT = "forward and backward passes on random tokens, without optimizer, validation and start"


def estimate(points: list[Point], *, measure: bool) -> tuple[list[float], str]:
    """Seconds of each point, and how that was found."""
    return by_measurement(points) if measure else by_finished(points) or by_flops(points)


def by_finished(points: list[Point]) -> tuple[list[float], str] | None:
    """From the training time of finished points, FLOPs for FLOPs; None where there are none."""
    took = {point.name: seconds for point in points if outcome(point)["status"] == "finished"
            and (seconds := _training_seconds(point)) > 0}
    if not took:
        return None
    pace = statistics.median(took[point.name] / _flops(point) for point in points if point.name in took)
    return ([took.get(point.name, _flops(point) * pace) for point in points],
            f"from the training time of {counted(len(took), 'finished point')}, by FLOPs")


def _training_seconds(point: Point) -> float:
    """Of a finished point, on text and on probes."""
    run_dir = Path(point.config.run_dir)
    text = summarize(read_metrics(run_dir / "metrics.jsonl")[0]).get("seconds", 0.0)
    return text + sum((read_result(run_dir, task) or {"seconds": 0.0})["seconds"] for task in point.work.probes)


@dataclass(frozen=True)
class _Training:
    """One training of a point: `steps` of `batch_size` examples, `rows` of them at a time."""

    model: ModelConfig
    sequence_length: int
    steps: int
    batch_size: int
    rows: int


def _trainings(point: Point) -> list[_Training]:
    """On text, stage by stage, and on each probe."""
    config, found = point.config, []
    for stage in point.stages:
        rows = min(config.training.micro_batch_size or stage.batch_size, stage.batch_size)
        found.append(_Training(config.model, stage.sequence_length, stage.steps, stage.batch_size, rows))
    for task in point.work.probes:
        assert task.length is not None
        model = model_for_probe(config.model, task.probe(), task.length)
        found.append(_Training(model, task.length, task.steps, task.batch_size, task.batch_size))
    return found


def _flops(point: Point) -> float:
    """Of the whole training of a point."""
    return sum(training_flops(each.model, each.sequence_length) * each.steps * each.batch_size * each.sequence_length
               for each in _trainings(point))


def by_flops(points: list[Point]) -> tuple[list[float], str]:
    """Seconds of each point if everything ran like large matrix products (small models are far slower), and how
    that was found."""
    config = points[0].config
    device = pick_device(config.engine)
    rate, source = peak_flops(device, pick_precision(config.training.precision, device))
    return [_flops(point) / rate for point in points], f"{BY_FLOPS} ({rate / 1e9:.3g} GFLOP/s, {source})"


def by_measurement(points: list[Point]) -> tuple[list[float], str]:
    """Seconds of each point, from passes of each different model; seeds are taken as equally fast."""
    known: dict[str, float] = {}
    seconds = []
    for point in points:
        seed, point.config.training.seed = point.config.training.seed, 0
        key = identity(point.config)
        point.config.training.seed = seed
        if key not in known:
            known[key] = sum(each.steps * _step_seconds(point.config, each) for each in _trainings(point))
        seconds.append(known[key])
    return seconds, f"measured: {BY_MEASUREMENT}"


def _step_seconds(config: Config, training: _Training) -> float:
    """Of one step: one part of a batch is timed, as many as a step has are counted."""
    device = pick_device(config.engine)
    model = build_model(training.model, device=device)
    model.activation_checkpointing = config.training.activation_checkpointing
    model.train()
    generator = torch.Generator().manual_seed(0)
    vocab, shape = training.model.vocab_size, (training.rows, training.sequence_length)
    ids_BT = torch.randint(vocab, shape, generator=generator).to(device)
    targets_BTM = torch.randint(vocab, (*shape, 1 + training.model.mtp.depth), generator=generator).to(device)
    half = pick_precision(config.training.precision, device) == "bf16"
    start = 0.0
    for index in range(WARM_UP + MEASURED):
        if index == WARM_UP:
            start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            model(ids_BT, targets=targets_BTM).loss.backward()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / MEASURED * training.batch_size / training.rows
