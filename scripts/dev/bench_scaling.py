#!/usr/bin/env python
"""Bytes that a rank hands to collective operations in a training step: counted, against the formulas.

    python scripts/dev/bench_scaling.py [--model qwen3_next_tiny ...] [--ranks 4] [--json]

Starts `--ranks` processes on this machine, which take two training steps in every layout and count the second one.
The formulas are those of hybridlm.distributed.cost.
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
from hybridlm.config.schema import Config, EngineConfig
from hybridlm.data.packing import Batch
from hybridlm.distributed.collective_counter import CountCollectives
from hybridlm.distributed.cost import Layout, traffic
from hybridlm.distributed.engine import make_engine
from hybridlm.distributed.launch import free_port
from hybridlm.model.model import build_model
from hybridlm.optimizers import build_optimizer
from hybridlm.optimizers.roles import fp32_names
from hybridlm.training.objective import global_batch, language_model
from hybridlm_kernels import CuSeqlens

LENGTH, MICRO_BATCHES = 64, 2
ENGINES = ("ddp", "zero1", "zero2", "zero3")


def layouts(ranks: int, engines: list[str], dtype: str) -> Iterator[EngineConfig]:
    """Every engine alone, with experts and with rows over all ranks, and with both over half of them."""
    for kind in engines:
        for experts, pieces in dict.fromkeys(((1, 1), (ranks, 1), (1, ranks), (ranks // 2, ranks // 2))):
            yield EngineConfig(kind=kind, expert_parallel=experts,  # type: ignore[arg-type]
                               context_parallel=pieces, persistence_threshold=0,
                               communication_dtype="fp32" if kind == "ddp" else dtype)  # type: ignore[arg-type]


def batch(config: Config, engine: Any) -> list[Batch]:
    """Random tokens, one row a micro batch; ranks that share rows make the same."""
    torch.manual_seed(engine.replica)
    model, made = config.model, []
    for index in range(MICRO_BATCHES):
        ids = torch.randint(model.vocab_size, (1, LENGTH + 1 + model.mtp.depth))
        targets = torch.stack([ids[:, 1 + d:1 + d + LENGTH] for d in range(1 + model.mtp.depth)], dim=-1)
        made.append(Batch(ids[:, :LENGTH], targets, CuSeqlens([0, LENGTH]), LENGTH, LENGTH, (index,)))
    return made


def step(config: Config, dtype: str) -> tuple[Any, CountCollectives]:
    """The engine, and what this rank handed to collective operations in its second step."""
    engine = make_engine(config.engine, dtype)
    model = build_model(config, device=engine.device, split=engine.split, divide=engine.divide).train()
    optimizers = build_optimizer(model, config.optimizer)
    engine.prepare(model, optimizers, fp32_names(model))
    for _ in range(2):
        with CountCollectives() as counted:
            parts = batch(config, engine)
            values = engine.gradients(language_model(global_batch(parts, engine.total)), parts)
            engine.update(values, lr=1e-3, clip=1.0)
    engine.release()
    return engine, counted


def compare(name: str, layout: EngineConfig, dtype: str) -> list[dict[str, Any]]:
    """A row for each kind of collective operation and size of its group; the mean over ranks."""
    config = load_config("train", [f"model={name}", "data.tokenizer=bytes"])
    config.engine = layout
    engine, counted = step(config, dtype)
    found: Counter[tuple[str, int]] = Counter()
    for payload in engine.gather(counted.payload):
        found.update(payload)
    wanted: Counter[tuple[str, int]] = Counter()
    size = {"fp32": 4, "bf16": 2}
    plan = Layout(ranks=engine.world_size, engine=layout.kind,  # type: ignore[arg-type]
                  expert_parallel=layout.expert_parallel, context_parallel=layout.context_parallel, length=LENGTH,
                  micro_batches=MICRO_BATCHES, element_bytes=size[dtype],
                  matrix_bytes=size[layout.communication_dtype])
    for one in traffic(config.model, plan):
        wanted[one.kind, one.ranks] += one.payload  # type: ignore[assignment]
    about = {"model": name, "engine": layout.kind, "expert_parallel": layout.expert_parallel,
             "context_parallel": layout.context_parallel, "dtype": dtype}
    return [about | {"operation": kind, "ranks": ranks, "measured": found[kind, ranks] / engine.world_size,
                     "formula": wanted[kind, ranks], "formula_a_layer": wanted[kind, ranks] / config.model.num_layers}
            for kind, ranks in sorted(found | wanted) if ranks > 1]


def start_ranks(number: int) -> int:
    """This script again, in `number` processes; the first one prints."""
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
    parser.add_argument("--engine", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"),
                        help="bf16: autocast, and what travels under zero* (engine.communication_dtype)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        return start_ranks(args.ranks)
    torch.set_num_threads(1)
    rows = [row for name in args.model for layout in layouts(args.ranks, args.engine, args.dtype)
            for row in compare(name, layout, args.dtype)]
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
