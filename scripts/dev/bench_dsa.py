#!/usr/bin/env python
"""Sparse attention against dense attention by length: rates, the warm-up's price, and where sparse becomes faster.

    python scripts/dev/bench_dsa.py [--lengths 4096 16384] [--json FILE]

One MLA layer's attention without its projections, B = 1. Dense is the expanded form (K = nope + rope, V), sparse the
indexer's scores and selection and then the absorbed form (one key head of rank + rope, its first `rank` dims the
values). The warm-up is the indexer's loss over all keys, forward and backward, beside the dense forward that it needs
anyway. DeepSeek-V3.2's widths on CUDA, an eighth of everything on a CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels import attention, indexer_kl, indexer_topk, sparse_attention
from hybridlm_kernels.tools.bench import median_seconds


@dataclass(frozen=True)
class Widths:
    """Heads and dims of the layer and its indexer."""

    heads: int = 128
    nope: int = 128
    rope: int = 64
    value: int = 128
    rank: int = 512
    index_heads: int = 64
    index_dim: int = 128
    topk: int = 2048

    def over(self, n: int) -> Widths:
        return Widths(*(value // n for value in asdict(self).values()))


def measure(w: Widths, S: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Seconds and TFLOP/s at one length. FLOPs: 2 per multiply-add, visible keys only; a backward twice the forward."""

    def random(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(1, S, *shape, device=device, dtype=dtype, requires_grad=grad)

    dense = [random(w.heads, w.nope + w.rope), random(w.heads, w.nope + w.rope), random(w.heads, w.value)]
    q, latent = random(w.heads, w.rank + w.rope), random(1, w.rank + w.rope)
    index = [random(w.index_heads, w.index_dim), random(w.index_dim), random(w.index_heads)]
    topk = min(w.topk, S)
    with torch.no_grad():
        selected = indexer_topk(*index, topk)

    def sparse() -> Tensor:
        return sparse_attention(q, latent, latent[..., : w.rank], selected)

    def with_gradients(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
        upstream = torch.randn_like(run())
        return lambda: torch.autograd.grad(run(), inputs, upstream)

    def forward(run: Callable[[], Any]) -> Callable[[], Any]:
        def without() -> Any:
            with torch.no_grad():
                return run()

        return without

    seconds = median_seconds({
        "dense forward": forward(lambda: attention(*dense)),
        "dense both": with_gradients(lambda: attention(*dense), dense),
        "indexer": forward(lambda: indexer_topk(*index, topk)),
        "sparse forward": forward(sparse),
        "sparse both": with_gradients(sparse, [q, latent]),
        "warm-up loss both": with_gradients(lambda: indexer_kl(*index, dense[0], dense[1]).loss, index)}, device)
    listed = float((selected >= 0).sum())
    flops = 2 * listed * w.heads * (2 * w.rank + w.rope)
    return {"length": S, "topk": topk, **{f"{name} ms": 1e3 * value for name, value in seconds.items()},
            "sparse forward TFLOP/s": flops / seconds["sparse forward"] / 1e12,
            "sparse backward TFLOP/s": 2 * flops / (seconds["sparse both"] - seconds["sparse forward"]) / 1e12,
            "forward, sparse over dense": (seconds["indexer"] + seconds["sparse forward"]) / seconds["dense forward"],
            "both, sparse over dense": (seconds["indexer"] + seconds["sparse both"]) / seconds["dense both"],
            "warm-up over dense forward": 1 + seconds["warm-up loss both"] / seconds["dense forward"]}


def crossover(rows: list[dict[str, Any]], key: str) -> str:
    """The first length at which sparse is faster."""
    faster = [row["length"] for row in rows if row[key] < 1]
    return str(faster[0]) if faster else f"above {rows[-1]['length']}"


def main() -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+",
                        default=[4096, 8192, 16384, 32768, 65536] if cuda else [512, 1024, 2048])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    if min(args.lengths) < 1:
        parser.error("--lengths must be positive")
    device, dtype, widths = ("cuda", torch.bfloat16, Widths()) if cuda else ("cpu", torch.float32, Widths().over(8))
    rows: list[dict[str, Any]] = []
    for length in sorted(args.lengths):
        try:
            rows.append(measure(widths, length, dtype, device))
        except torch.OutOfMemoryError:
            print(f"{length} tokens do not fit the GPU", file=sys.stderr)
            break
    if not rows:
        return 1
    machine = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(f"{machine}, {dtype}, torch {torch.__version__}, {widths}")
    for key in rows[0]:
        print(f"{key:28}", *(f"{row[key]:>12.6g}" for row in rows))
    found = {key: crossover(rows, key) for key in ("forward, sparse over dense", "both, sparse over dense")}
    for key, length in found.items():
        print(f"{key}: faster from {length} tokens")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "dtype": str(dtype), "torch": torch.__version__,
                                         "widths": asdict(widths), "rows": rows, "crossover": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
