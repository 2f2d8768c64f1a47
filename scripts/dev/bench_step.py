#!/usr/bin/env python
"""A training step of a model of KDA layers with routed experts, with and without torch.compile, on this machine.

    python scripts/dev/bench_step.py [--layers 4] [--tokens 8192] [--json FILE]

Forward, backward and AdamW on one row of random tokens, bf16 autocast on CUDA. On a CPU the sizes are an eighth. The
eager step is timed and printed first; the two are then timed in turn, and their losses at the same weights compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm.model.config import ModelConfig
from hybridlm.model.feed_forward.moe import MoEConfig
from hybridlm.model.mixers.delta_rule import DeltaRuleConfig
from hybridlm.model.model import HybridLM
from hybridlm.model.schedule import ScheduleConfig
from hybridlm_kernels.tools.bench import median_seconds

MAX_LOSS_DIFFERENCE = 0.02  # relative, in bf16: fused formulas round elsewhere


def make_model(layers: int, divisor: int, device: str) -> HybridLM:
    """A model of KDA layers with routed experts, a width of 2048 / divisor."""
    heads, hidden = 16 // divisor, 2048 // divisor
    config = ModelConfig(
        vocab_size=32768 // divisor, hidden_size=hidden, num_layers=layers, schedule=ScheduleConfig(pattern=["kda"]),
        mixers={"kda": DeltaRuleConfig(num_heads=heads, head_dim=128 // divisor)},
        feed_forward=MoEConfig(num_experts=64 // divisor, num_experts_per_tok=4, moe_intermediate_size=512 // divisor,
                               router="sigmoid"))
    torch.manual_seed(0)
    model = HybridLM(config)
    model.init_weights()
    return model.to(device)


def step_of(model: HybridLM, ids_BT: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """The loss with its gradients, and a whole step, as functions without arguments."""
    device = ids_BT.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")

    def gradients() -> Tensor:
        with torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext():
            loss = model(ids_BT, labels=ids_BT).loss
        loss.backward()
        return loss.detach()

    def step() -> None:
        gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return gradients, step


def measure(layers: int, tokens: int, device: str) -> dict[str, Any]:
    """Milliseconds of a step and peak memory, eager and compiled, and the difference of their losses."""
    divisor = 1 if device == "cuda" else 8
    ids_BT = torch.randint(32768 // divisor, (1, tokens), device=device)
    eager = make_model(layers, divisor, device)
    compiled = copy.deepcopy(eager)
    compiled.compile_layers()
    found: dict[str, Any] = {"layers": layers, "tokens": tokens, "device": device}
    losses, steps = {}, {}
    for name, model in (("eager", eager), ("compiled", compiled)):
        gradients, steps[name] = step_of(model, ids_BT)
        start = time.monotonic()
        losses[name] = float(gradients())
        model.zero_grad(set_to_none=True)
        found[f"{name}_first_s"] = round(time.monotonic() - start, 1)
        if name == "eager":
            found["eager_ms"] = 1e3 * median_seconds({name: steps[name]}, device)[name]
            print(f"eager: {found['eager_ms']:.1f} ms per step of {tokens} tokens", flush=True)
    for name, seconds in median_seconds(steps, device).items():
        found[f"{name}_ms"] = 1e3 * seconds
    if device == "cuda":
        found["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    found["losses"] = losses
    found["loss_difference"] = abs(losses["compiled"] - losses["eager"]) / losses["eager"]
    return found


def main() -> int:
    """Prints the figures; returns 1 where the losses of the two differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    found = measure(options.layers, options.tokens, "cuda" if torch.cuda.is_available() else "cpu")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"eager {found['eager_ms']:.1f} ms, compiled {found['compiled_ms']:.1f} ms per step (compiling took "
          f"{found['compiled_first_s']:.0f} s), losses differ by {found['loss_difference']:.1e}")
    return int(not found["loss_difference"] <= MAX_LOSS_DIFFERENCE)


if __name__ == "__main__":
    sys.exit(main())
