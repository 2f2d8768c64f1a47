#!/usr/bin/env python
"""Bytes that a rank hands to collective operations in a training step: counted, against the formulas.

    python scripts/dev/bench_scaling.py [--model qwen3_next_tiny ...] [--ranks 4] [--json]

Starts `--ranks` processes on this machine, which take two training steps under every engine and layout, and count the
second one.
The formulas are those of hybridlm.planning.communication.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from hybridlm import load_config
from hybridlm.config.schema import Config
from hybridlm.data.packing import Batch
from hybridlm.distributed.collective_counter import CountCollectives
from hybridlm.distributed.engine_config import ENGINES, EngineConfig
from hybridlm.distributed.engines import make_engine
from hybridlm.distributed.launch import free_port
from hybridlm.model.model import build_model
from hybridlm.optimizers import build_optimizer
from hybridlm.optimizers.roles import fp32_names
from hybridlm.planning.communication import ParallelPlan, step_traffic
from hybridlm.training.losses import step_loss
from hybridlm_kernels import CuSeqlens

LENGTH, MICRO_BATCHES = 64, 2
KINDS = ("ddp", "zero1", "zero2", "zero3")


def engine_configs(ranks: int, kinds: list[str], dtype: str) -> Iterator[EngineConfig]:
    """Yield every engine alone, with experts or rows over all ranks, and with both over half of them."""
    for kind in kinds:
        for experts, shards in dict.fromkeys(((1, 1), (ranks, 1), (1, ranks), (ranks // 2, ranks // 2))):
            options = {"expert_parallel": experts, "context_parallel": shards}
            if kind != "ddp":
                options["communication_dtype"] = dtype
            if kind == "zero3":
                options["persistence_threshold"] = 0
            yield ENGINES.config_class(kind)(**options)


def batch(config: Config, engine: Any) -> list[Batch]:
    """Make random tokens, one row per micro batch; ranks that share rows make the same."""
    torch.manual_seed(engine.dp_rank)
    model, made = config.model, []
    for index in range(MICRO_BATCHES):
        ids = torch.randint(model.vocab_size, (1, LENGTH + 1 + model.mtp.depth))
        targets = torch.stack([ids[:, 1 + d:1 + d + LENGTH] for d in range(1 + model.mtp.depth)], dim=-1)
        made.append(Batch(ids[:, :LENGTH], targets, CuSeqlens([0, LENGTH]), LENGTH, LENGTH, (index,)))
    return made


def step(config: Config, dtype: str) -> tuple[Any, CountCollectives]:
    """Take two steps; return the engine, and what this rank handed to collective operations in the second one."""
    engine = make_engine(config.engine, dtype)
    model = build_model(config, device=engine.device, shard_experts=engine.shard_experts,
                        shard_weights=engine.shard_weights).train()
    optimizers = build_optimizer(model, config.optimizer)
    engine.prepare(model, optimizers, fp32_names(model))
    for _ in range(2):
        with CountCollectives() as counted:
            parts = batch(config, engine)
            values = engine.compute_gradients(step_loss(parts, engine.all_sum), parts)
            engine.update(values, lr=1e-3, clip=1.0)
    engine.release()
    return engine, counted


def compare(name: str, engine_config: EngineConfig, dtype: str) -> list[dict[str, Any]]:
    """Make a row for each kind of collective operation and size of its group; the mean over ranks."""
    config = load_config("train", [f"model={name}", "data.tokenizer=bytes"])
    config.engine = engine_config
    engine, counted = step(config, dtype)
    found: Counter[tuple[str, int]] = Counter()
    for payload in engine.gather(counted.payload):
        found.update(payload)
    wanted: Counter[tuple[str, int]] = Counter()
    plan = ParallelPlan(ranks=engine.world_size, engine=engine_config, length=LENGTH, micro_batches=MICRO_BATCHES,
                        element_bytes={"fp32": 4, "bf16": 2}[dtype])
    for one in step_traffic(config.model, plan):
        wanted[one.kind, one.ranks] += one.payload  # type: ignore[assignment]
    about = {"model": name, "engine": engine_config.kind, "expert_parallel": engine_config.expert_parallel,
             "context_parallel": engine_config.context_parallel, "dtype": dtype}
    return [about | {"operation": kind, "ranks": ranks, "measured": found[kind, ranks] / engine.world_size,
                     "formula": wanted[kind, ranks], "formula_per_layer": wanted[kind, ranks] / config.model.num_layers}
            for kind, ranks in sorted(found | wanted) if ranks > 1]


def start_ranks(number: int) -> int:
    """Run this script in `number` processes, of which the first prints; returns the largest exit code."""
    shared = os.environ | {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(free_port())}
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(number)]
    try:
        return max(abs(rank.wait()) for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["qwen3_next_tiny"], help="presets, small ones")
    parser.add_argument("--engine", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"),
                        help="bf16: autocast, and what travels under zero* (engine.communication_dtype)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        return start_ranks(args.ranks)
    torch.set_num_threads(1)
    rows = [row for name in args.model for engine_config in engine_configs(args.ranks, args.engine, args.dtype)
            for row in compare(name, engine_config, args.dtype)]
    if dist.get_rank() == 0:
        if args.json:
            print(json.dumps(rows))
        else:
            show(rows)
    dist.destroy_process_group()
    return 0


def show(rows: list[dict[str, Any]]) -> None:
    print("| model | engine | experts over | rows over | operation | ranks | measured, B | formula, B | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        ratio = f"{row['measured'] / row['formula']:.3f}" if row["formula"] else ""
        print(f"| {row['model']} | {row['engine']} | {row['expert_parallel']} | {row['context_parallel']} | "
              f"{row['operation']} | {row['ranks']} | {row['measured']:,.0f} | {row['formula']:,.0f} | {ratio} |")


if __name__ == "__main__":
    raise SystemExit(main())
