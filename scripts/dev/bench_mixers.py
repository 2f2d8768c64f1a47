#!/usr/bin/env python
r"""One layer of every mixer preset on the CPU, forward and backward, at two lengths, beside that of transformers.

    OMP_NUM_THREADS=1 python scripts/dev/bench_mixers.py [PRESET ...] [--hidden 256] [--lengths 1024 4096] \
        [--rounds 3] [--json FILE]

Each preset stands in one layer of a model of this width with 4 heads of 64 dims, alone in a process of its own, which
also gives its peak memory. Milliseconds are CPU time, the fastest of the rounds. Where transformers has the layer, both
run in turn in the same process; theirs runs once, and at the first length alone, where a step takes seconds. `growth`
is time per token at the last length over that at the first.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HEADS, HEAD_DIM = 4, 64
SLOW_MS = 2000.0  # a layer of transformers whose step takes longer is not run again


def their_layers(hidden: int) -> dict[str, Callable[[], Any]]:
    """Layers of transformers by preset, each as a function of hidden states."""
    import transformers as hf

    def mamba() -> Any:
        from transformers.models.mamba.modeling_mamba import MambaMixer

        return MambaMixer(hf.MambaConfig(hidden_size=hidden), 0)

    def falcon_mamba() -> Any:
        from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer

        return FalconMambaMixer(hf.FalconMambaConfig(hidden_size=hidden), 0, initialize_mixer_weights=False)

    def jamba() -> Any:
        from transformers.models.jamba.modeling_jamba import JambaMambaMixer

        return JambaMambaMixer(hf.JambaConfig(hidden_size=hidden, use_mamba_kernels=False), 0)

    def mamba2() -> Any:
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        return Mamba2Mixer(hf.Mamba2Config(hidden_size=hidden, head_dim=HEAD_DIM, num_heads=2 * hidden // HEAD_DIM,
                                           state_size=128, n_groups=1), 0)

    def lfm2() -> Any:
        from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

        return Lfm2ShortConv(hf.Lfm2Config(hidden_size=hidden), 0)

    def gdn() -> Any:
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        return Qwen3NextGatedDeltaNet(hf.Qwen3NextConfig(
            hidden_size=hidden, linear_num_key_heads=HEADS, linear_num_value_heads=HEADS,
            linear_key_head_dim=HEAD_DIM, linear_value_head_dim=HEAD_DIM), 0)

    def kda() -> Any:
        from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

        config = hf.KimiLinearConfig(hidden_size=hidden, num_attention_heads=HEADS, num_key_value_heads=HEADS)
        config.linear_attn_config = {**config.linear_attn_config, "num_heads": HEADS, "head_dim": HEAD_DIM}
        return KimiLinearDeltaAttention(config, 0)

    return {"mamba": mamba, "falcon_mamba": falcon_mamba, "jamba_mamba": jamba, "mamba2": mamba2, "lfm2_conv": lfm2,
            "gdn": gdn, "kda": kda}


def measure(preset: str, hidden: int, lengths: list[int], rounds: int) -> dict[str, Any]:
    """Milliseconds per length of our layer and theirs, and the peak memory that ours adds, in MiB."""
    import torch

    from hybridlm.model.mixers import build_mixer
    from hybridlm.model.sequence import SequenceInfo
    from hybridlm.run_config import load_config

    torch.manual_seed(0)
    # The heads of hybrid_tiny's own mixers are those that other presets follow.
    sizes = [f"model.mixers.{name}.{key}={value}" for name in ("kda", "gdn", "deltanet", "lightning", "full", "swa")
             for key, value in (("num_heads", HEADS), ("head_dim", HEAD_DIM))]
    config = load_config("train", ["model=hybrid_tiny", f"model.hidden_size={hidden}", *sizes,
                                   f"model.schedule.linear={preset}"]).model
    mixer = build_mixer(config.mixers[preset], config.layer_context(0))
    mixer.init_weights(0.02)
    row: dict[str, Any] = {"preset": preset, "kind": config.mixers[preset].kind,
                           "parameters": sum(p.numel() for p in mixer.parameters())}
    make_theirs = their_layers(hidden).get(preset)
    theirs = None
    if make_theirs is not None:
        theirs = make_theirs().train()

    def ours_step(x: torch.Tensor) -> None:
        mixer(x, SequenceInfo.make(1, x.shape[1], x.device))[0].square().sum().backward()

    def their_step(x: torch.Tensor) -> None:
        out = theirs(x)  # type: ignore[misc]
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()

    for length in lengths:
        x = torch.randn(1, length, hidden, requires_grad=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ours_step(x)
        row[f"mib_{length}"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        steps = {"ms": ours_step}
        if theirs is not None and row.get(f"theirs_ms_{lengths[0]}", 0.0) < SLOW_MS:
            steps["theirs_ms"] = their_step
        for _ in range(rounds):
            for name, step in steps.items():
                key = f"{name}_{length}"
                if name == "theirs_ms" and row.get(key, 0.0) > SLOW_MS:
                    continue
                start = time.process_time()
                step(x)
                row[key] = min(row.get(key, float("inf")), 1e3 * (time.process_time() - start))
    row["growth"] = row[f"ms_{lengths[-1]}"] * lengths[0] / (row[f"ms_{lengths[0]}"] * lengths[-1])
    return row


def print_row(row: dict[str, Any], lengths: list[int]) -> None:
    """One line per preset, or why there is none."""
    if "problem" in row:
        print(f"{row['preset']:<20} {row['problem']}", flush=True)
        return
    times = "  ".join(f"{row[f'ms_{n}']:8.1f} ms{theirs(row, n)} {row[f'mib_{n}']:6.0f} MiB" for n in lengths)
    print(f"{row['preset']:<20} {row['parameters']:>9,}  {times}  growth {row['growth']:.2f}", flush=True)


def theirs(row: dict[str, Any], length: int) -> str:
    """The time of transformers over ours, where it has the layer."""
    other = row.get(f"theirs_ms_{length}")
    return f" ({other / row[f'ms_{length}']:4.1f}x)" if other is not None else "        "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="all of configs/mixer by default")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.presets[0], args.hidden, args.lengths, args.rounds)))
        return
    from hybridlm.config.paths import options

    rows = []
    for preset in args.presets or options("mixer"):
        done = subprocess.run([sys.executable, __file__, preset, "--child", "--hidden", str(args.hidden), "--rounds",
                               str(args.rounds), "--lengths", *map(str, args.lengths)], capture_output=True, text=True)
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        rows.append(json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else
                    {"preset": preset, "problem": said})
        print_row(rows[-1], args.lengths)
        if args.json:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
