#!/usr/bin/env python
"""Layouts for the full-size systems on many GPUs, computed from their configs: nothing here is measured.

    python scripts/dev/scaling_layouts.py [--gpus 64 512 2048] [--memory 80 141] [--length 4096] [--batch 2048] [--json]

For each system, number and size of GPUs: of the layouts whose memory per rank (as `hybridlm inspect` estimates it) fits
with a tenth left free, the one that needs the least time. A step's time is that of its FLOPs at `--mfu` of `--tflops`,
plus that of its bytes (hybridlm.planning.communication) as if nothing overlapped: those of groups within a node of 8 at
`--fast` GB/s per GPU, the others at `--slow`. Every row of `--length` tokens is a micro batch of its own, with
activation checkpointing. The optimizer goes to the host only where nothing else fits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import groupby

from hybridlm import load_config
from hybridlm.config.schema import Config
from hybridlm.distributed.engine_config import ENGINES
from hybridlm.model.cost import training_flops
from hybridlm.planning.communication import ParallelPlan, matrix_params, step_traffic
from hybridlm.planning.rank_memory import rank_memory

SYSTEMS = ("kimi_linear_48b", "qwen3_next_80b", "minimax_01_456b", "deepseek_v32_671b")
GPUS_PER_NODE = 8
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout of one system on a number of GPUs: memory of a rank, and time of a step."""

    system: str
    gpus: int
    engine: str
    expert_parallel: int
    offload_optimizer: bool
    micro_batches: int
    memory_gib: float  # per rank
    host_gib: float
    sent_gb: float  # per rank and step, all groups
    slow_gb: float  # of it, between nodes
    compute_s: float
    network_s: float

    @property
    def seconds(self) -> float:
        return self.compute_s + self.network_s


def candidates(config: Config, matrices: int, gpus: int, args: argparse.Namespace) -> Iterator[Candidate]:
    """Yield every layout of one system, whose `matrix_params` are `matrices`: one row of `--length` tokens per micro
    batch, with activation checkpointing."""
    routed, micro = config.model.feed_forward.routed_experts(), args.batch // gpus
    assert routed is not None
    # A forward more for what checkpointing computes again.
    flops = training_flops(config.model, args.length) * 4 / 3 * micro * args.length
    training = replace(config.training, batch_size=args.batch, micro_batch_size=1, sequence_length=args.length,
                       activation_checkpointing=True, precision="bf16")
    for kind in ("zero1", "zero2", "zero3"):
        for experts in (n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if routed.total % n == 0 and gpus % n == 0):
            engine = ENGINES.config_class(kind)(expert_parallel=experts, communication_dtype=args.communication_dtype)
            parallel = ParallelPlan(ranks=gpus, engine=engine, length=args.length, micro_batches=micro,
                                    activation_checkpointing=True)
            sent = step_traffic(config.model, parallel, matrices)
            # Ranks that exchange rows are consecutive; those that hold the same experts are `experts` apart.
            fast = sum(one.sent for one in sent if one.ranks <= GPUS_PER_NODE and one.name == "expert rows")
            slow = sum(one.sent for one in sent) - fast
            for offload in (False, True):
                offloaded = replace(engine, offload_optimizer=offload)
                memory = rank_memory(replace(config, engine=offloaded, training=training), gpus).to_dict()
                yield Candidate(system=config.model.name, gpus=gpus, engine=kind, expert_parallel=experts,
                           offload_optimizer=offload, micro_batches=micro, memory_gib=memory["total"] / GIB,
                           host_gib=memory["host"] / GIB, sent_gb=(fast + slow) / 1e9, slow_gb=slow / 1e9,
                           compute_s=flops / (args.mfu * args.tflops * 1e12),
                           network_s=fast / (args.fast * 1e9) + slow / (args.slow * 1e9))


def best(found: list[Candidate], gpu_gib: int) -> Candidate | None:
    """Return the fastest layout that fits; with the optimizer on the host where nothing else does."""
    fitting = [plan for plan in found if plan.memory_gib <= 0.9 * gpu_gib]
    return min(fitting, key=lambda plan: (plan.offload_optimizer, plan.seconds), default=None)


COLUMNS = ("system", "GPUs", "of GiB", "engine", "experts over", "micro batches", "memory, GiB", "sent, GB",
           "between nodes, GB", "compute, s", "network, s")


def cells(plan: Candidate) -> list[str]:
    host = f", optimizer on the host ({plan.host_gib:.0f} GiB)" if plan.offload_optimizer else ""
    numbers = (plan.sent_gb, plan.slow_gb, plan.compute_s, plan.network_s)
    return [f"{plan.engine}{host}", str(plan.expert_parallel), str(plan.micro_batches), f"{plan.memory_gib:.1f}",
            *(f"{number:.1f}" for number in numbers)]


def show(rows: list[tuple[str, int, int, Candidate | None]]) -> None:
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for (system, gpus, plan), same in groupby(rows, key=lambda row: (row[0], row[1], row[3])):
        sizes = ", ".join(str(size) for _, _, size, _ in same)
        print(f"| {system} | {gpus} | {sizes} | {'none fits' if plan is None else ' | '.join(cells(plan))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", nargs="+", default=SYSTEMS)
    parser.add_argument("--gpus", nargs="+", type=int, default=[64, 512, 2048])
    parser.add_argument("--memory", nargs="+", type=int, default=[80, 141], help="GiB of the GPUs to choose from")
    parser.add_argument("--length", type=int, default=4096, help="tokens per row")
    parser.add_argument("--batch", type=int, default=2048, help="rows per step")
    parser.add_argument("--communication-dtype", default="bf16", choices=("fp32", "bf16"), help="the engine's option")
    parser.add_argument("--tflops", type=float, default=989, help="peak of a GPU in bf16")
    parser.add_argument("--mfu", type=float, default=0.4, help="fraction of the peak at which the FLOPs are computed")
    parser.add_argument("--fast", type=float, default=300, help="GB/s that a GPU sends within a node")
    parser.add_argument("--slow", type=float, default=40, help="GB/s that a GPU sends to other nodes")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[tuple[str, int, int, Candidate | None]] = []
    for system in args.system:
        config = load_config("train", [f"model={system}", "data.tokenizer=bytes"])
        matrices = matrix_params(config.model)
        for gpus in args.gpus:
            found = list(candidates(config, matrices, gpus, args))
            rows += [(system, gpus, size, best(found, size)) for size in args.memory]
    if args.json:
        print(json.dumps([{"system": system, "gpus": gpus, "gpu_gib": size, "plan": plan and asdict(plan)}
                          for system, gpus, size, plan in rows]))
    else:
        show(rows)


if __name__ == "__main__":
    main()
