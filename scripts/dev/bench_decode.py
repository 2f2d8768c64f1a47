"""Times decoding on a CPU: prepared steps against the modules' forward, and against `generate` of transformers.

    OMP_NUM_THREADS=1 python scripts/dev/bench_decode.py --json decode.json

Greedy decoding of random models. What is compared runs in turn in one process, as many rounds as fit into `--seconds`
per row. Times are CPU time of the process, with one thread that of a free core; the median round counts. The tokens of
both sides are compared first. `prepared` is `HybridLM.forward` as it is, `modules` the same forward with the plan
switched off.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from hybridlm import build_model, load_config
from hybridlm.interop import import_hf
from hybridlm.model import HybridLM, generate
from hybridlm.model import model as model_module

PROMPT_TOKENS = 16
MIN_ROUNDS = 5
LLAMAS = {  # hidden size, heads, key/value heads, inner width, vocabulary; 30 layers each
    "llama, hidden 128": (128, 4, 2, 256, 512),
    "llama, hidden 256": (256, 4, 4, 768, 4096),
    "llama, hidden 576": (576, 9, 3, 1536, 49152),
}
OURS = {"quickstart": ("quickstart", []), "qwen3_next_tiny": ("train", ["model=qwen3_next_tiny"]),
        "kimi_linear_tiny": ("train", ["model=kimi_linear_tiny"]),
        "minimax_01_tiny": ("train", ["model=minimax_01_tiny"])}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="per row")
    parser.add_argument("--tokens", type=int, default=64, help="decoded per round")
    parser.add_argument("--only", help="rows whose name holds this text")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    rows = []
    print(f"{'model':<20} {'rows':>4} {'ours, ms':>9} {'against':<12} {'ms':>9} {'ratio':>6} {'tokens/s':>9}")
    for name, batch, sides in cases(args.tokens):
        if args.only and args.only not in name:
            continue
        row = measure(sides(), args.seconds, args.tokens) | {"model": name, "rows": batch}
        rows.append(row)
        print(f"{name:<20} {batch:>4} {row['ours_ms']:>9.2f} {row['against']:<12} {row['theirs_ms']:>9.2f} "
              f"{row['theirs_ms'] / row['ours_ms']:>6.2f} {batch * 1000 / row['ours_ms']:>9.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}))


def cases(tokens: int) -> list[tuple[str, int, Callable[[], dict[str, Callable[[], list[int]]]]]]:
    """Every row of the table: name, rows of the batch, and what makes the two sides."""
    made: list[tuple[str, int, Any]] = []
    for name in OURS:
        for batch in (1, 8):
            made.append((name, batch, lambda name=name, batch=batch: against_modules(name, batch, tokens)))
    for name in LLAMAS:
        for batch in (1, 8) if name == "llama, hidden 128" else (1,):
            made.append((name, batch, lambda name=name, batch=batch: against_transformers(name, batch, tokens)))
    return made


def against_modules(name: str, batch: int, tokens: int) -> dict[str, Callable[[], list[int]]]:
    """One of our models by prepared steps, and by the forward of its modules."""
    config, overrides = OURS[name]
    model = build_model(load_config(config, overrides)).eval()
    ids = prompt(model.config.vocab_size, batch)

    def by_modules() -> list[int]:
        with mock.patch.object(model_module, "find_plan", return_value=None):
            return ours(model, ids, tokens)

    return {"prepared": lambda: ours(model, ids, tokens), "modules": by_modules}


def against_transformers(name: str, batch: int, tokens: int) -> dict[str, Callable[[], list[int]]]:
    """A Llama of transformers with its `generate`, and the same weights in our model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, heads, kv_heads, width, vocabulary = LLAMAS[name]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=width, num_hidden_layers=30,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
                         eos_token_id=None, bos_token_id=None, pad_token_id=0, initializer_range=0.1)
    theirs = LlamaForCausalLM(config).eval()
    model = import_hf(theirs).eval()
    ids = prompt(vocabulary, batch)

    def by_transformers() -> list[int]:
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)[
            :, PROMPT_TOKENS:].flatten().tolist()

    return {"prepared": lambda: ours(model, ids, tokens), "transformers": by_transformers}


def prompt(vocabulary: int, batch: int) -> torch.Tensor:
    """Random ids [B, T]."""
    return torch.randint(1, min(vocabulary, 250), (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))


def ours(model: HybridLM, ids: torch.Tensor, tokens: int) -> list[int]:
    """New tokens of all rows, one row after the other."""
    return torch.stack(list(generate(model, ids, tokens, temperature=0)), 1).flatten().tolist()


def measure(sides: dict[str, Callable[[], list[int]]], seconds: float, tokens: int) -> dict[str, Any]:
    """Run both sides in turn; CPU milliseconds per step of the median round of each, the prompt included."""
    (ours_name, run_ours), (other, run_theirs) = sides.items()
    if run_ours() != run_theirs():
        raise SystemExit(f"{ours_name} and {other} write different tokens")
    times: dict[str, list[float]] = {ours_name: [], other: []}
    end = time.perf_counter() + seconds
    while len(times[other]) < MIN_ROUNDS or time.perf_counter() < end:
        for name, run in sides.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) / tokens * 1000)
    return {"ours_ms": median(times[ours_name]), "against": other, "theirs_ms": median(times[other])}


if __name__ == "__main__":
    main()
