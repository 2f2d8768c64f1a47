#!/usr/bin/env python
"""Our models against transformers' on the CPU: forward + loss + backward, same weights, same process, in turn.

    .venv/bin/python scripts/dev/bench_vs_transformers.py [--systems kimi_linear ...] [--sizes tiny mid] [--json FILE]

For each system and size transformers builds the model from the configuration exported from ours, ours takes over its
weights, and the losses must agree before anything is timed. The two then run alternately; the median counts. Peak
memory is read in a fresh process for each model: the growth of the resident set over one forward and backward.
`--compiled` times our model with compiled layers beside both, and prints the seconds of its first step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SYSTEMS = {
    "kimi_linear": "kimi_linear_tiny",
    "qwen3_next": "qwen3_next_tiny",
    "minimax_01": "minimax_01_tiny",
    "deepseek_v32": "deepseek_v32_tiny",
}
# Changes to the tiny presets (hidden 64, heads of 16). MTP is off, as transformers has none to train, and MiniMax
# rotates whole heads, as transformers does whatever the config says. `mid` has hidden 256 and heads of 64: about 5M
# parameters.


def overrides(system: str, size: str) -> list[str]:
    """Overrides of the tiny preset that make `system` of `size`."""
    head, hidden = {"tiny": (16, 64), "mid": (64, 256)}[size]
    common = [f"hidden_size={hidden}", "mtp.depth=0", f"feed_forward.moe_intermediate_size={hidden // 2}"]
    mla = [f"kv_lora_rank={2 * head}", f"qk_nope_head_dim={head}", f"qk_rope_head_dim={head // 2}",
           f"v_head_dim={head}"]
    dense = f"feed_forward.intermediate_size={2 * hidden}"
    changes = common + {
        "kimi_linear": [f"mixers.kda.{key}={head}" for key in ("head_dim", "gate_rank", "output_gate_rank")]
        + [f"mixers.full.{key}" for key in mla] + [dense, "num_layers=4"],
        "qwen3_next": [f"mixers.gdn.head_dim={head}", f"mixers.full.head_dim={head}"],
        "minimax_01": [f"mixers.lightning.head_dim={head}", f"mixers.full.head_dim={head}",
                       "mixers.full.rope.partial_rotary_factor=1.0",
                       f"feed_forward.moe_intermediate_size={hidden // 4}"],
        "deepseek_v32": [f"mixers.dsa.{key}" for key in
                         [*mla, f"q_lora_rank={2 * head}", f"indexer.head_dim={head}"]] + [dense],
    }[system]
    return [f"model.{change}" for change in changes]


def build(system: str, size: str, threads: int) -> tuple[Any, Any]:
    """Our model and that of transformers, with the same weights, in fp32 and training mode."""
    import torch
    from transformers import AutoModelForCausalLM

    from hybridlm.interop import import_hf, to_hf_config
    from hybridlm.run_config import load_model_config

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = load_model_config(SYSTEMS[system], overrides(system, size))
    hf_config = to_hf_config(config)
    hf_config.use_cache = False
    theirs = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).train()
    ours = import_hf(theirs).train()
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(".indexer." not in name)  # theirs has no loss that trains it, so neither has ours here
    return ours, theirs


def step(model: Any, ids: Any) -> float:
    """Forward, loss and backward of the next-token loss. Both take labels in the transformers convention."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    value = float(loss.detach())
    for parameter in model.parameters():
        parameter.grad = None
    return value


def tokens(model: Any, length: int) -> Any:
    import torch

    return torch.randint(0, 500, (1, length), generator=torch.Generator().manual_seed(length))


def time_models(models: dict[str, Any], length: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, run in turn for about `seconds` per pair, at least three rounds."""
    ids = tokens(models["ours"], length)
    losses, first = {}, {}
    for name, model in models.items():
        start = time.perf_counter()
        losses[name] = step(model, ids)
        first[name] = time.perf_counter() - start
    for name, loss in losses.items():
        if abs(loss - losses["theirs"]) > 1e-3 * abs(losses["theirs"]):
            raise SystemExit(f"not the same model: loss {loss} of {name} against {losses['theirs']}")
    times: dict[str, list[float]] = {name: [] for name in models}
    began = time.perf_counter()
    while len(times["ours"]) < 3 or time.perf_counter() - began < seconds:
        for name, model in models.items():
            gc.collect()
            start = time.perf_counter()
            step(model, ids)
            times[name].append(1e3 * (time.perf_counter() - start))
    found = {name: statistics.median(values) for name, values in times.items()} | {"rounds": len(times["ours"])}
    return found | ({"first_step_seconds": first["compiled"]} if "compiled" in first else {})


def status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {key}: memory is measured on Linux only")


def memory_child(system: str, size: str, length: int, which: str, threads: int) -> None:
    """Prints the growth of the resident set over one step, in MiB."""
    ours, theirs = build(system, size, threads)
    model = ours if which == "ours" else theirs
    del ours, theirs
    step(model, tokens(model, 64))
    gc.collect()
    ids = tokens(model, length)
    Path("/proc/self/clear_refs").write_text("5")  # start the high-water mark anew
    before = status_mib("VmRSS")
    step(model, ids)
    print(status_mib("VmHWM") - before)


def peak_memory(system: str, size: str, length: int, which: str, threads: int) -> float:
    command = [sys.executable, __file__, "--child", system, size, str(length), which, "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


def bench(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for size in args.sizes:
        for system in args.systems:
            ours, theirs = build(system, size, args.threads)
            parameters = sum(p.numel() for p in ours.parameters())
            models = {"ours": ours, "theirs": theirs}
            if args.compiled:
                models["compiled"] = copy.deepcopy(ours)
                models["compiled"].compile_layers()
            for length in args.lengths:
                row: dict[str, Any] = {"system": system, "size": size, "parameters": parameters, "length": length}
                row |= time_models(models, length, args.seconds)
                row["ratio"] = row["theirs"] / row["ours"]
                if args.compiled:
                    row["ratio_compiled"] = row["theirs"] / row["compiled"]
                row["tokens_per_second"] = 1e3 * length / row["ours"]
                if not args.no_memory:
                    for which in ("ours", "theirs"):
                        row[f"peak_mib_{which}"] = peak_memory(system, size, length, which, args.threads)
                rows.append(row)
                print_row(row)
    return rows


def time_growth(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time per token of one linear layer each, at 4096 tokens over 1024: linear mixers must stay near 1."""
    import torch

    from hybridlm.model.mixers import build_mixer
    from hybridlm.model.sequence import SequenceInfo
    from hybridlm.run_config import load_model_config

    rows = []
    for size in args.sizes:
        for system in ("kimi_linear", "qwen3_next", "minimax_01"):
            config = load_model_config(SYSTEMS[system], overrides(system, size))
            name = config.layers()[1]
            torch.manual_seed(0)
            mixer = build_mixer(config.mixers[name], config.layer_context(1))
            mixer.init_weights(config.init_std)
            per_token = {}
            for length in (1024, 4096):
                x = torch.randn(1, length, config.hidden_size, requires_grad=True)
                seq = SequenceInfo.make(1, length, x.device)
                runs = []
                for _ in range(9):
                    start = time.perf_counter()
                    mixer(x, seq)[0].sum().backward()
                    runs.append(time.perf_counter() - start)
                per_token[length] = statistics.median(runs[2:]) / length
            rows.append({"system": system, "size": size, "mixer": name,
                         "us_per_token_1024": 1e6 * per_token[1024], "us_per_token_4096": 1e6 * per_token[4096],
                         "growth": per_token[4096] / per_token[1024]})
            print("{system:<14}{size:<6}{mixer:<12} {us_per_token_1024:7.2f} us/token at 1024, "
                  "{us_per_token_4096:7.2f} at 4096: growth {growth:.2f}".format(**rows[-1]), flush=True)
    return rows


def print_row(row: dict[str, Any]) -> None:
    text = ("{system:<14}{size:<6}{length:>6} tokens  ours {ours:8.1f} ms  transformers {theirs:8.1f} ms  "
            "ratio {ratio:5.2f}  {tokens_per_second:9.0f} tokens/s").format(**row)
    if "compiled" in row:
        text += ("  compiled {compiled:8.1f} ms  ratio {ratio_compiled:5.2f}  first step {first_step_seconds:5.0f} s"
                 ).format(**row)
    if "peak_mib_ours" in row:
        text += "  peak {peak_mib_ours:6.0f} / {peak_mib_theirs:6.0f} MiB".format(**row)
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--sizes", nargs="+", default=["tiny", "mid"], choices=["tiny", "mid"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="time spent on each pair")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory processes")
    parser.add_argument("--compiled", action="store_true", help="also time our model with compiled layers")
    parser.add_argument("--no-growth", action="store_true", help="skip the time per token of single layers")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        system, size, length, which = args.child
        memory_child(system, size, int(length), which, args.threads)
        return
    import torch
    import transformers

    about = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
             "threads": args.threads,
             "environment": {k: v for k, v in os.environ.items() if k.startswith(("MALLOC", "OMP"))}}
    print(json.dumps(about))
    rows = bench(args)
    growth = [] if args.no_growth else time_growth(args)
    if args.json:
        Path(args.json).write_text(json.dumps({"about": about, "rows": rows, "growth": growth}, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; for both sides alike
    main()
