#!/usr/bin/env python
"""Does the conversion into sparse attention keep what a dense model has learned?

A small hybrid model is pretrained dense on a mix of the default corpus and an in-context recall task, then converted
with `recipe=dsa_tiny` at a top-k of an eighth of the length. Beside it, the dense model trains on for the tokens of the
sparse stage. Measured on held-out text: loss, accuracy of the recall task, and the recall of attention mass of the
indexer's selection against a random one and a sliding window of the same size.

    python scripts/experiments/dsa_conversion.py --out runs/dsa_conversion          # the whole experiment
    python scripts/experiments/dsa_conversion.py --out runs/smoke --smoke           # a minute: does it run?

Writes result.json, table.md and figure.svg into --out. What has been trained already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm.checkpoint import load_checkpoint, resolve, step_folders
from hybridlm.config.schema import Config
from hybridlm.data import PackedDataset, prepare
from hybridlm.model.mixers.common.indexed_attention import indexed_mixers
from hybridlm.model.model import HybridLM
from hybridlm.model.sequence import SequenceInfo
from hybridlm.run_config import load_config
from hybridlm.training import train
from hybridlm.training.sparse_attention import measuring_recall

SHARE = 8  # top-k is the length over this
COLUMNS = ("indexer_recall", "task_indexer_recall", "indexer_attainable", "task_indexer_attainable")
Choose = Callable[[Any, SequenceInfo], Tensor]


def recall_document(seed: int, length: int) -> tuple[str, list[int]]:
    """Keys drawn at random, each with its value behind it, 'kQb7..': a key has the same value all through the document.

    Also the places of values that are repeated: they can be known, and only from the context.
    """
    rng = random.Random(seed)
    keys = rng.sample(string.ascii_lowercase + string.digits, min(max(2, length // 8), 12))
    values = {key: rng.choice(string.ascii_uppercase) for key in keys}
    drawn = [rng.choice(keys) for _ in range((length - 1) // 2)]
    answers = [2 * i + 1 for i, key in enumerate(drawn) if key in drawn[:i]]
    return "".join(key + values[key] for key in drawn), answers


def write_corpus(path: Path, documents: int, length: int) -> Path:
    """The recall task as JSONL: documents of 16 tokens up to `length`, so that short ones are learned first."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        lengths = [int(16 * (length / 16) ** rng.random()) for _ in range(documents)]
        lines = (json.dumps({"text": recall_document(seed, size)[0]}) for seed, size in enumerate(lengths))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def configs(out: Path, args: argparse.Namespace) -> dict[str, Callable[[], Config]]:
    """The three runs: dense, its conversion, and the dense control that trains on."""
    corpus = write_corpus(out / "recall.jsonl", args.documents, args.length)
    shared = [f"data.mixture=[{{path: stdlib}}, {{path: '{corpus}'}}]", "data.tokenizer=bytes",
              "training.eval_every=0", f"training.eval_batches={args.eval_batches}", "optimizer.weight_decay=0.01",
              f"training.sequence_length={args.length}", f"training.batch_size={args.batch}", "training.log_every=50",
              "training.keep_checkpoints=100", "training.checkpoint_every=1000000"]
    model = [*shared, "model=hybrid_tiny", "model.num_layers=2", "model.schedule.pattern=[kda,full]",
             "model.hidden_size=128", "model.feed_forward={kind: dense, intermediate_size: 256}",
             "model.mixers.kda.num_heads=1",
             "model.mixers.full={num_heads: 2, num_kv_heads: 1, head_dim: 32, qk_norm: none}",
             "model.mixers.full.rope.partial_rotary_factor=0.5"]
    sparse_rate = f"{args.sparse_lr}"

    def dense() -> Config:
        return load_config("train", [*model, f"run_dir={out}/dense", f"training.steps={args.dense_steps}",
                                     "optimizer=muon", f"optimizer.lr={args.lr}"])

    def converted() -> Config:
        stages = [f"recipe.stages.{i}.{key}={value}" for i, steps, lr in (
            (0, args.warmup_steps, args.warmup_lr), (1, args.sparse_steps, sparse_rate)) for key, value in {
            "steps": steps, "lr": lr, "sequence_length": args.length, "batch_size": args.batch}.items()]
        return load_config("train", [*shared, "recipe=dsa_tiny", f"init_from={out}/dense", f"run_dir={out}/sparse",
                                     f"recipe.indexer.topk={args.length // SHARE}", "recipe.indexer.head_dim=32",
                                     *stages])

    def control() -> Config:
        return load_config("train", [*model, f"init_from={out}/dense", f"run_dir={out}/control",
                                     f"training.steps={args.sparse_steps}", f"optimizer.lr={sparse_rate}"])

    return {"dense": dense, "sparse": converted, "control": control}


def random_choice(topk: int) -> Choose:
    """Chooses random keys, as many as the indexer would."""
    generator = torch.Generator().manual_seed(0)

    def choose(index: Any, seq: SequenceInfo) -> Tensor:
        first_BT1 = first_keys(index[0], seq)[..., None]
        t_T1 = torch.arange(index[0].shape[1])[:, None]
        s_S = torch.arange(index[0].shape[1])
        score = torch.rand(*index[0].shape[:2], len(s_S), generator=generator)
        top = score.masked_fill((s_S > t_T1) | (s_S < first_BT1), -1.0).topk(topk, -1)
        return top.indices.masked_fill(top.values < 0, -1).int()

    return choose


def window_choice(topk: int) -> Choose:
    """The last keys, up to the token itself."""

    def choose(index: Any, seq: SequenceInfo) -> Tensor:
        place = torch.arange(index[0].shape[1])[:, None] - torch.arange(topk)
        return torch.where(place >= first_keys(index[0], seq)[..., None], place, -1).int()

    return choose


def first_keys(q: Tensor, seq: SequenceInfo) -> Tensor:
    """[B, T]: the first token of each token's document."""
    return torch.arange(q.shape[1]) - seq.positions_BT


@contextmanager
def selection(model: HybridLM, choose: Choose | None) -> Iterator[None]:
    """Within it, indexers select by `choose` (None: by themselves)."""
    indexers = [m.indexer for m in indexed_mixers(model) if m.indexer is not None]
    for indexer in indexers if choose else ():
        indexer.choose = choose  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for indexer in indexers:
            indexer.__dict__.pop("choose", None)


@torch.no_grad()
def evaluate(model: HybridLM, config: Config, args: argparse.Namespace, *, recall: bool = True) -> dict[str, float]:
    """Loss on held-out text, accuracy of the recall task, and what the indexers select."""
    model.eval()
    store = prepare(config.data, progress=False).validation
    dataset = PackedDataset([store], args.length, 0, seed=0)  # type: ignore[list-item]
    windows = min(args.eval_batches * args.batch, len(dataset))
    totals: dict[str, float] = {}
    with measuring_recall(model, recall):
        for start in range(0, windows, args.batch):
            part = dataset.batch(range(start, min(start + args.batch, windows)))
            output = model(part.input_ids, targets=part.targets, cu_seqlens=part.cu_seqlens)
            for name, value in {"loss": output.losses["lm"], **output.stats}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * len(part.input_ids) / windows
        totals["task_accuracy"], task = recall_task(model, args)
    return totals | {f"task_{name}": value for name, value in task.items()}


@torch.no_grad()
def recall_task(model: HybridLM, args: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Share of the answers that are the likeliest token in documents that were not trained on, and the statistics of
    the indexers there."""
    right = count = 0
    totals: dict[str, float] = {}
    for seed in range(10**6, 10**6 + args.task_documents):
        text, answers = recall_document(seed, args.length)
        ids = torch.tensor(list(text.encode()))[None]
        output = model(ids)
        place = torch.tensor(answers)
        right += int((output.logits[0].argmax(-1)[place - 1] == ids[0, place]).sum())
        count += len(answers)
        for name, value in output.stats.items():
            totals[name] = totals.get(name, 0.0) + float(value) / args.task_documents
    return right / count, totals


def measure(out: Path, args: argparse.Namespace, config: Config) -> dict[str, dict[str, float]]:
    """Every model and selection of the table."""
    topk = args.length // SHARE
    warm = next(f for f in step_folders(out / "sparse" / "checkpoints") if f.name == f"step-{args.warmup_steps}")
    rows = {"dense": evaluate(load_checkpoint(str(out / "dense")), config, args),
            "dense, trained on": evaluate(load_checkpoint(str(out / "control")), config, args)}
    for title, folder in (("after the warm-up", warm), ("after the sparse stage", resolve(out / "sparse"))):
        model = load_checkpoint(str(folder))
        for mixer in indexed_mixers(model):
            mixer.attention_mode = "sparse"
        choices: dict[str, Choose | None] = {"indexer": None}
        if folder == warm:
            choices |= {"random": random_choice(topk), "sliding window": window_choice(topk)}
        for name, choose in choices.items():
            with selection(model, choose):
                rows[f"{name}, {title}"] = evaluate(model, config, args)
    return rows


def table(rows: dict[str, dict[str, float]], facts: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| model and selection | validation loss | accuracy of the task | recall of attention: text | task "
             "| attainable: text | task |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        selected = " | ".join(f"{row[key]:.3f}" if key in row else "" for key in COLUMNS)
        lines.append(f"| {name} | {row['loss']:.4f} | {row['task_accuracy']:.3f} | {selected} |")
    lines += ["", f"Warm-up KL: {facts['kl_first']:.4f} at the first step, {facts['kl_last']:.4f} over the last tenth "
              f"({facts['kl_first'] / facts['kl_last']:.1f} times less).",
              f"Loss after the sparse stage over that of the dense model trained on: {facts['loss_ratio']:.4f}.",
              f"{facts['seconds']:.0f} seconds in all, {facts['cpu_seconds']:.0f} of a core; "
              f"{torch.get_num_threads()} threads."]
    return "\n".join(lines) + "\n"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def figure(warmup: list[dict[str, Any]], rows: dict[str, dict[str, float]]) -> str:
    """KL and recall over the warm-up, with the recall of the controls as lines: an SVG without dependencies."""
    width, height, pad = 640, 300, 45
    kl = [r["loss/indexer_kl"] for r in warmup]
    recall = [r["dsa/indexer_recall"] for r in warmup]
    top = max(kl)

    def points(values: list[float], limit: float) -> str:
        step = (width - 2 * pad) / max(len(values) - 1, 1)
        return " ".join(f"{pad + i * step:.1f},{height - pad - v / limit * (height - 2 * pad):.1f}"
                        for i, v in enumerate(values))

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
             f'<path d="M{pad} {pad}V{height - pad}H{width - pad}V{pad}" fill="none" stroke="#444"/>',
             f'<polyline points="{points(kl, top)}" fill="none" stroke="#b33"/>',
             f'<polyline points="{points(recall, 1.0)}" fill="none" stroke="#36a"/>',
             f'<text x="{pad}" y="{pad - 12}" fill="#b33">KL, 0 to {top:.3g} nats</text>',
             f'<text x="{width - pad}" y="{pad - 12}" fill="#36a" text-anchor="end">recall of attention mass, 0 to 1'
             '</text>', f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">step of the warm-up, 1 to '
             f'{len(kl)}</text>']
    for name, color in (("random", "#999"), ("sliding window", "#777")):
        level = rows[f"{name}, after the warm-up"]["indexer_recall"]
        y = height - pad - level * (height - 2 * pad)
        parts.append(f'<path d="M{pad} {y:.1f}H{width - pad}" stroke="{color}" stroke-dasharray="4 4"/>'
                     f'<text x="{width - pad - 4}" y="{y - 4:.1f}" fill="{color}" text-anchor="end">recall, {name}'
                     '</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/dsa_conversion"))
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps of everything")
    for name, value in {"length": 512, "batch": 4, "dense-steps": 1600, "warmup-steps": 500, "sparse-steps": 300,
                        "documents": 30000, "eval-batches": 16, "task-documents": 40}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, rate in {"lr": 1e-2, "warmup-lr": 3e-3, "sparse-lr": 3e-4}.items():
        parser.add_argument(f"--{name}", type=float, default=rate)
    args = parser.parse_args()
    if args.smoke:
        small = {"length": 128, "batch": 2, "dense_steps": 4, "warmup_steps": 4, "sparse_steps": 2, "documents": 200,
                 "eval_batches": 1, "task_documents": 2}
        vars(args).update(small)
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    made = configs(args.out.resolve(), args)
    for name in ("dense", "sparse", "control"):
        train(made[name]())
    rows = measure(args.out, args, made["dense"]())
    warmup = [r for r in records(args.out / "sparse") if r["stage"] == "indexer_warmup"]
    tail = warmup[-max(1, len(warmup) // 10):]
    facts = {"kl_first": warmup[0]["loss/indexer_kl"], "kl_last": sum(r["loss/indexer_kl"] for r in tail) / len(tail),
             "loss_ratio": rows["indexer, after the sparse stage"]["loss"] / rows["dense, trained on"]["loss"],
             "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    result = {"settings": settings, "facts": facts, "rows": rows}
    (args.out / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (args.out / "table.md").write_text(table(rows, facts), encoding="utf-8")
    (args.out / "figure.svg").write_text(figure(warmup, rows), encoding="utf-8")
    print((args.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
