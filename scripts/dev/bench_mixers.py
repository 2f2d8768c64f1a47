#!/usr/bin/env python
r"""One layer of every mixer preset on the CPU, forward and backward, at two lengths, beside that of transformers.

    OMP_NUM_THREADS=1 python scripts/dev/bench_mixers.py [PRESET ...] [--hidden 256] [--lengths 1024 4096] \
        [--rounds 3] [--json FILE]

Each preset stands in one layer of a model of this width with 4 heads of 64 dims, alone in a process of its own, which
also gives its peak memory. Times are CPU time, the fastest of the rounds; a step that takes seconds runs once more and
no further. Where transformers has the layer, both run in turn in the same process, and its memory comes from a process
of its own. `growth` is time per token at the last length over that at the first.

Progress goes to stderr, a table in Markdown to stdout. With --json FILE the rows are kept, and a second run goes on
with the presets that FILE lacks.
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
SLOW_MS = 2000.0  # a step that takes longer is run once more, that of transformers not at longer lengths
SOURCES = {"gmu": "mamba", "shared_attention": "swa"}  # presets of the layer before, for those that read from one


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


def build_ours(preset: str, hidden: int) -> Any:
    """The mixer of a preset as the contract checks take it, in the second layer of hybrid_tiny at this width."""
    from hybridlm.model.contract_check import Subject
    from hybridlm.run_config import load_config

    # The heads of hybrid_tiny's own mixers are those that other presets follow.
    sizes = [f"model.mixers.{name}.{key}={value}" for name in ("kda", "gdn", "deltanet", "lightning", "full", "swa")
             for key, value in (("num_heads", HEADS), ("head_dim", HEAD_DIM))]
    source = [f"model.schedule.override={{0: {SOURCES[preset]}}}"] if preset in SOURCES else []
    config = load_config("train", ["model=hybrid_tiny", f"model.hidden_size={hidden}", *sizes,
                                   f"model.schedule.linear={preset}", *source]).model
    return Subject(config.mixers[preset], config.layer_context(1))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(preset: str, hidden: int, lengths: list[int], rounds: int, only_theirs: bool) -> dict[str, Any]:
    """Milliseconds per length of our layer and theirs, and the peak memory in MiB that a step of ours adds.

    Args:
        preset: its name.
        hidden: width of the model.
        lengths: tokens of the one row.
        rounds: steps of each layer.
        only_theirs: measure the memory of the layer of transformers and nothing else.
    """
    import torch

    from hybridlm.model.sequence import SequenceInfo

    torch.manual_seed(0)
    make_theirs = their_layers(hidden).get(preset)
    theirs = make_theirs().train() if make_theirs is not None else None

    def their_step(x: torch.Tensor, seq: Any) -> None:
        out = theirs(x)  # type: ignore[misc]
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()

    if only_theirs:
        found = {}
        for length in lengths:
            before = peak_mib()
            their_step(torch.randn(1, length, hidden, requires_grad=True), None)
            found[f"theirs_mib_{length}"] = peak_mib() - before
        return found
    subject = build_ours(preset, hidden)
    if not subject.config.is_branch:
        return {"problem": "computes nothing"}
    mixer = subject.new_module()
    mixer.init_weights(0.02)
    row: dict[str, Any] = {"preset": preset, "kind": subject.config.kind,
                           "parameters": sum(p.numel() for p in mixer.parameters())}

    def our_step(x: torch.Tensor, seq: Any) -> None:
        mixer(x, seq)[0].square().sum().backward()

    for length in lengths:
        x = torch.randn(1, length, hidden, requires_grad=True)

        def prepared(x: torch.Tensor = x, length: int = length) -> Any:
            seq = SequenceInfo.make(1, length, x.device)
            subject.run_sources(x, seq)
            return seq

        seq, before = prepared(), peak_mib()
        our_step(x, seq)
        row[f"mib_{length}"] = peak_mib() - before
        steps = {"ms": our_step}
        if theirs is not None and row.get(f"theirs_ms_{lengths[0]}", 0.0) < SLOW_MS:
            steps["theirs_ms"] = their_step
        for _ in range(rounds):
            for name, step in steps.items():
                key = f"{name}_{length}"
                if row.get(key, 0.0) > SLOW_MS:
                    continue
                seq = prepared()
                start = time.process_time()
                step(x, seq)
                row[key] = min(row.get(key, float("inf")), 1e3 * (time.process_time() - start))
    row["growth"] = row[f"ms_{lengths[-1]}"] * lengths[0] / (row[f"ms_{lengths[0]}"] * lengths[-1])
    return row


def table(rows: list[dict[str, Any]], lengths: list[int]) -> list[str]:
    """The lines of a Markdown table, and one line per preset that gave no figures.

    >>> print(*table([{"preset": "kda", "kind": "delta_rule", "parameters": 1024, "ms_8": 1.0, "mib_8": 2.0,
    ...                "growth": 1.0, "theirs_ms_8": 3.0}], [8]), sep=chr(10))
    | preset | kind | parameters | us per token at 8 | growth | MiB at 8 | transformers at 8: time | memory |
    |---|---|---|---|---|---|---|---|
    | kda | delta_rule | 1,024 | 125.0 | 1.00 | 2 | 3.00 |  |
    """
    titles = ["preset", "kind", "parameters", *(f"us per token at {n}" for n in lengths), "growth",
              *(f"MiB at {n}" for n in lengths)]
    for n in lengths:
        titles += [f"transformers at {n}: time", "memory"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in (row for row in rows if "problem" not in row):
        cells = [row["preset"], row["kind"], f"{row['parameters']:,}",
                 *(f"{1e3 * row[f'ms_{n}'] / n:.1f}" for n in lengths), f"{row['growth']:.2f}",
                 *(f"{row[f'mib_{n}']:.0f}" for n in lengths)]
        for n in lengths:
            cells += [over(row, "ms", n), over(row, "mib", n)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *(f"{row['preset']}: {row['problem']}" for row in rows if "problem" in row)]


def over(row: dict[str, Any], what: str, length: int) -> str:
    """The ratio of a measure of transformers to ours; empty where it was not measured."""
    theirs, ours = row.get(f"theirs_{what}_{length}"), row[f"{what}_{length}"]
    return f"{theirs / ours:.2f}" if theirs is not None and ours > 0 else ""


def run_child(words: list[str], seconds: float) -> dict[str, Any]:
    """The figures that a process of its own measures, or its `problem`."""
    try:
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"problem": f"took more than {seconds:.0f} s"}
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> str:
    """Versions of what was measured, for the line above the table."""
    import platform

    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip() or "unknown"
    return (f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}, "
            f"commit {commit}, {torch.get_num_threads()} thread(s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="all of configs/mixer by default")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600.0, help="after which a preset is given up")
    parser.add_argument("--json", help="file that keeps the rows; presets that it has are not run again")
    parser.add_argument("--child", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.presets[0], args.hidden, args.lengths, args.rounds, args.child == "theirs")))
        return
    from hybridlm.config.paths import options

    file = Path(args.json) if args.json else None
    rows = json.loads(file.read_text()) if file is not None and file.exists() else []
    known = {row["preset"] for row in rows}
    sizes = ["--hidden", str(args.hidden), "--rounds", str(args.rounds), "--lengths", *map(str, args.lengths)]
    for preset in (name for name in args.presets or options("mixer") if name not in known):
        row = {"preset": preset} | run_child([preset, "--child", "ours", *sizes], args.seconds)
        timed = [str(n) for n in args.lengths if f"theirs_ms_{n}" in row]
        if timed:  # at the lengths at which both ran
            memory = run_child([preset, "--child", "theirs", *sizes, "--lengths", *timed], args.seconds)
            row |= {key: value for key, value in memory.items() if key != "problem"}
        rows.append(row)
        print(f"{preset}: {row.get('problem') or 'growth {growth:.2f}'.format(**row)}", file=sys.stderr, flush=True)
        if file is not None:
            file.write_text(json.dumps(rows, indent=1) + "\n")
    print(versions() + "\n")
    print(*table(rows, args.lengths), sep="\n")


if __name__ == "__main__":
    main()
