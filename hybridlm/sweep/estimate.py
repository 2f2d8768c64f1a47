"""How long points will take: from a short measurement, or from FLOPs alone."""

from __future__ import annotations

import time

import torch

from hybridlm.distributed.engine import pick_device, pick_precision
from hybridlm.model.cost import training_flops
from hybridlm.model.model import build_model
from hybridlm.sweep.plan import Point, identity
from hybridlm.training.metrics import peak_flops
from hybridlm.training.stages import Stage
from hybridlm.training.stages import plan as stages_of

WARM_UP, MEASURED = 1, 2  # passes

BY_FLOPS = "at least: training FLOPs at the rate of this machine's matrix products"
BY_MEASUREMENT = "forward and backward passes on random tokens, without optimizer, validation and start"


def by_flops(points: list[Point]) -> tuple[list[float], str]:
    """Seconds of each point if everything ran like large matrix products (small models are far slower), and how
    that was found."""
    config = points[0].config
    device = pick_device(config.engine)
    rate, source = peak_flops(device, pick_precision(config.training.precision, device))
    seconds = [sum(training_flops(point.config.model, stage.sequence_length) * stage.steps * stage.tokens_per_step
                   for stage in stages_of(point.config)) / rate for point in points]
    return seconds, f"{BY_FLOPS} ({rate / 1e9:.3g} GFLOP/s, {source})"


def by_measurement(points: list[Point]) -> tuple[list[float], str]:
    """Seconds of each point, from passes of each different model; seeds are taken as equally fast."""
    known: dict[str, float] = {}
    seconds = []
    for point in points:
        seed, point.config.training.seed = point.config.training.seed, 0
        key = identity(point.config)
        point.config.training.seed = seed
        if key not in known:
            known[key] = sum(stage.steps * _step_seconds(point, stage) for stage in stages_of(point.config))
        seconds.append(known[key])
    return seconds, f"measured: {BY_MEASUREMENT}"


def _step_seconds(point: Point, stage: Stage) -> float:
    """Of one step: one part of a batch is timed, as many as a step has are counted."""
    config = point.config
    device = pick_device(config.engine)
    rows = min(config.training.micro_batch_size or stage.batch_size, stage.batch_size)
    model = build_model(config, device=device)
    model.activation_checkpointing = config.training.activation_checkpointing
    model.train()
    generator = torch.Generator().manual_seed(0)
    shape = (rows, stage.sequence_length)
    ids_BT = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    targets_BTM = torch.randint(config.model.vocab_size, (*shape, 1 + config.model.mtp.depth),
                                generator=generator).to(device)
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
    return (time.perf_counter() - start) / MEASURED * stage.batch_size / rows
