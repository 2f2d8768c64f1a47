#!/usr/bin/env python
"""Turns SmolLM2-135M into sparse attention on two cores, and measures what its indexers find.

    python scripts/experiments/dsa_real_model.py --out runs/dsa_real import --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python scripts/experiments/dsa_real_model.py --out runs/dsa_real warmup --minutes 30     # indexers, 1024 tokens
    python scripts/experiments/dsa_real_model.py --out runs/dsa_real warmup_2048             # indexers, 2048 tokens
    python scripts/experiments/dsa_real_model.py --out runs/dsa_real sparse                  # everything, 256 keys
    python scripts/experiments/dsa_real_model.py --out runs/dsa_real control                 # the same steps dense
    python scripts/experiments/dsa_real_model.py --out runs/dsa_real copies                  # indexers, text twice
    python scripts/experiments/dsa_real_model.py --out runs/dsa_real measure --minutes 30
    python scripts/experiments/dsa_real_model.py --out runs/dsa_real table
    python scripts/experiments/dsa_real_model.py --out runs/dsa_real figure
    python scripts/experiments/dsa_real_model.py --out runs/smoke --smoke                    # a minute: does it run?

A piece that `--minutes` stops, or Ctrl-C, goes on where it was when it is called again; one that is done does nothing.
`--teacher FOLDER` takes an imported checkpoint in place of the piece `import`, such as that of linearize_smollm2.py.
`import` needs the packages transformers and gguf. Text: sources of the standard library and the manual's pages that
Python ships for its `help`; whole files and whole pages are held out. Layers 0 and 1 stay dense: their attention is
spread over more keys than are read (`measure` reports what is attainable in every layer).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dsa_real_tables import TEXTS, make_figure, tabulate  # the files beside this one
from smollm2 import import_model, train_run

from hybridlm.checkpoint import load_checkpoint, resolve
from hybridlm.config.schema import DataConfig
from hybridlm.data import PackedDataset
from hybridlm.data.packing import Batch
from hybridlm.data.split import content_hash
from hybridlm.evaluation.evaluate import evaluation_data, run_config
from hybridlm.evaluation.indexer_recall import indexer_recall
from hybridlm.evaluation.perplexity import perplexity_by_position
from hybridlm.evaluation.sparse import make_sparse_method, sparse_softmax
from hybridlm.files import write_json, write_text
from hybridlm.interop.surgery import add_indexer
from hybridlm.model.mixers.common.indexed_attention import indexed_mixers
from hybridlm.model.model import HybridLM
from hybridlm.model.targets import IGNORE
from hybridlm.report.png import write_png
from hybridlm.sources.stdlib import open_stdlib
from hybridlm.training.recall import RecallSamples, recall_nll, repeated_samples
from hybridlm_kernels import CuSeqlens

REPEATED = "repeated tokens"  # random ones, twice
HELD_OUT = {"prose": 0.2, "code": 0.02}  # of the documents
PROSE_WEIGHT = 0.2  # of the training text; there is little of it
COPIES_WEIGHT = 0.3  # of the training text of the piece `copies`
COPIED_WORDS = (80, 200)  # words of a copy


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment: lengths in tokens, steps, and what is measured."""

    layers: str = "[" + ", ".join(map(str, range(2, 30))) + "]"
    topk: int = 256
    num_heads: int = 8
    head_dim: int = 64
    length: int = 1024
    long_length: int = 2048
    batch: int = 2
    warmup_steps: int = 350
    long_steps: int = 60
    copies_steps: int = 100
    sparse_steps: int = 130
    checkpoint_every: int = 25
    loss_windows: int = 12
    recall_windows: int = 8  # of `length`; half as many of `long_length`
    repeat_rows: int = 4


SMOKE = Sizes(layers="[2, 3]", topk=16, num_heads=2, head_dim=8, length=64, long_length=128, warmup_steps=4,
              long_steps=2, copies_steps=2, sparse_steps=2, checkpoint_every=2, loss_windows=2, recall_windows=2,
              repeat_rows=2)
STOPPED = 3  # exit code of a piece that --minutes has stopped


class Experiment:
    """The pieces of the experiment, over one folder.

    Args:
        out: folder of everything.
        teacher: the imported checkpoint.
        sizes: of the experiment.
        minutes: stop a piece after so long; None: run to the end.
    """

    def __init__(self, out: Path, teacher: Path, sizes: Sizes, minutes: float | None):
        self.out, self.teacher, self.sizes, self.minutes = out, teacher, sizes, minutes

    def write_texts(self) -> None:
        """Write the training text and the held-out text as JSONL, one document per line, unless it is there."""
        folder = self.out / "texts"
        if (folder / "held_out_code.jsonl").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name, documents in (("prose", manual_pages()), ("code", library_sources())):
            parts: dict[str, list[str]] = {"train": [], "held_out": []}
            for text in documents:
                held_out = content_hash(text.encode()) < HELD_OUT[name] * 2.0**64
                parts["held_out" if held_out else "train"].append(json.dumps({"text": text}))
            for part, lines in parts.items():
                write_text(folder / f"{part}_{name}.jsonl", "\n".join(lines) + "\n")

    def write_copies(self) -> None:
        """Write text that comes twice, unless it is there: words of each training file, every other time shuffled."""
        folder = self.out / "texts"
        if (folder / "train_copies.jsonl").exists():
            return
        draw, lines = random.Random(0), []
        for index, line in enumerate((folder / "train_code.jsonl").read_text(encoding="utf-8").splitlines()):
            words = json.loads(line)["text"].split()
            count = min(draw.randint(*COPIED_WORDS), len(words))
            start = draw.randint(0, len(words) - count)
            copied = words[start : start + count]
            if index % 2:
                draw.shuffle(copied)
            lines.append(json.dumps({"text": " ".join([*copied, *copied])}))
        write_text(folder / "train_copies.jsonl", "\n".join(lines) + "\n")

    def train(self, name: str, *words: str, copies: bool = False) -> bool:
        """Train the run `name`, or go on with it; returns whether it has come to its end."""
        self.write_texts()
        texts = (self.out / "texts").resolve()
        weights = {"train_code": 1 - PROSE_WEIGHT, "train_prose": PROSE_WEIGHT}
        if copies:
            weights = {file: weight * (1 - COPIES_WEIGHT) for file, weight in weights.items()}
            weights["train_copies"] = COPIES_WEIGHT
            self.write_copies()
        sources = [f"{{path: '{texts}/{file}.jsonl', weight: {weight:g}}}" for file, weight in weights.items()]
        return train_run(
            self.out / name, *words, f"data.mixture=[{', '.join(sources)}]",
            f"data.validation_path='{texts}/held_out_code.jsonl'",
            f"training.checkpoint_every={self.sizes.checkpoint_every}", "training.eval_batches=4",
            "training.eval_every=0", "optimizer.weight_decay=0.01", minutes=self.minutes)

    def warmup(self) -> bool:
        """Train the indexers under dense attention."""
        return self._train_stage("warmup", self.teacher, self._warmup_stage(self.sizes.warmup_steps, self.sizes.length))

    def warmup_2048(self) -> bool:
        """Train them further on longer text."""
        stage = self._warmup_stage(self.sizes.long_steps, self.sizes.long_length)
        return self._train_stage("warmup_2048", self.out / "warmup", stage)

    def copies(self) -> bool:
        """Train the indexers further on text of which a part comes twice."""
        return self._train_stage("copies", self.out / "warmup_2048",
                                 self._warmup_stage(self.sizes.copies_steps, self.sizes.length), copies=True)

    def sparse(self) -> bool:
        """Train everything under sparse attention."""
        stage = (f"{{name: sparse, attention_mode: sparse, steps: {self.sizes.sparse_steps}, batch_size: 1, "
                 f"sequence_length: {self.sizes.length}, lr: 2e-5, schedule: {{kind: cosine, warmup: 0.05, "
                 "min_ratio: 0.1}}")
        return self._train_stage("sparse", self.out / "warmup_2048", stage)

    def control(self) -> bool:
        """Train the dense model for the steps of the sparse stage, on the same samples at the same rate."""
        return self.train("control", "recipe=pretrain", f"init_from={self.teacher}",
                          f"training.steps={self.sizes.sparse_steps}", f"training.sequence_length={self.sizes.length}",
                          "optimizer.lr=2e-5", "optimizer.schedule={kind: cosine, warmup: 0.05, min_ratio: 0.1}",
                          "recipe.stages=[{name: pretrain, batch_size: 1}]")

    def _warmup_stage(self, steps: int, length: int) -> str:
        return (f"{{name: indexer_warmup, attention_mode: dense, trainable: ['*.indexer.*'], steps: {steps}, "
                f"loss_weights: {{lm: 0, mtp: 0, z: 0, balance: 0, router_z: 0}}, batch_size: {self.sizes.batch}, "
                f"sequence_length: {length}, lr: 1e-3, eval_recall: true, "
                "schedule: {kind: cosine, warmup: 0.05, min_ratio: 0.1}}")

    def _train_stage(self, name: str, start: Path, stage: str, copies: bool = False) -> bool:
        if not (self.out / f"{name}.done").exists() and start != self.teacher and not Path(f"{start}.done").exists():
            raise SystemExit(f"{name} starts from {start}, which is not done: run the piece {start.name} first")
        sizes = self.sizes
        indexer = (f"{{num_heads: {sizes.num_heads}, head_dim: {sizes.head_dim}, topk: {sizes.topk}, num_first: 1}}")
        return self.train(name, "recipe=dsa_small", f"init_from={start}", f"recipe.indexer={indexer}",
                          f"recipe.layers={sizes.layers}", f"recipe.stages=[{stage}]", copies=copies)

    def measure(self) -> bool:
        """Measure what is not measured yet, one result after the other; returns whether all of it is there."""
        self.write_texts()
        file = self.out / "measured.json"
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        begin = time.perf_counter()
        for name, take in self.measurements():
            if name in found:
                continue
            if self.minutes is not None and time.perf_counter() - begin > 60 * self.minutes:
                print(f"stopped before {name}; the same command goes on", flush=True)
                return False
            start = time.perf_counter()
            found[name] = {**take(), "seconds": time.perf_counter() - start}
            found["versions"] = {"torch": torch.__version__, "python": platform.python_version(),
                                 "machine": platform.machine(), "threads": torch.get_num_threads()}
            write_json(file, found)
            print(f"{name}: {found[name]['seconds']:.0f} s", flush=True)
        return True

    def measurements(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        """Yield the name of every result and the function that measures it."""
        sizes = self.sizes
        for model in ("fresh", "warmup", "warmup_2048", "sparse"):
            for text in TEXTS:
                for length in (sizes.length,) if model == "warmup" else (sizes.length, sizes.long_length):
                    yield (f"recall/{model}/{text}/{length}",
                           lambda model=model, text=text, length=length: self._recall(model, text, length))
        for model in ("warmup_2048", "copies"):
            yield (f"recall/{model}/{REPEATED}/{sizes.length}",
                   lambda model=model: self._recall(model, REPEATED, sizes.length))
        for model, mode in (("teacher", "dense"), ("teacher", "window"), ("teacher", "exact"), ("teacher", "shared"),
                            ("fresh", "sparse"), ("warmup_2048", "sparse"), ("copies", "sparse"),
                            ("sparse", "sparse"), ("sparse", "dense"), ("control", "dense")):
            for text in TEXTS:
                yield f"loss/{model}/{mode}/{text}", lambda model=model, mode=mode, text=text: self._loss(
                    model, mode, text)
            yield f"repeat/{model}/{mode}", lambda model=model, mode=mode: self._repeat(model, mode)

    def load(self, name: str) -> HybridLM:
        """Load a model: `teacher`, `fresh` (with an untrained indexer in every layer), or that of a run."""
        if name == "teacher":
            return load_checkpoint(str(self.teacher)).eval()
        if name == "fresh":
            sizes = self.sizes
            return add_indexer(load_checkpoint(str(self.teacher)), {
                "num_heads": sizes.num_heads, "head_dim": sizes.head_dim, "topk": sizes.topk, "num_first": 1})[0].eval()
        if not (self.out / f"{name}.done").exists():
            raise SystemExit(f"{name} has not finished: run that piece first")
        return load_checkpoint(str(self.out / name)).eval()

    def dataset(self, text: str, length: int) -> PackedDataset:
        """Windows of held-out text with the teacher's tokenizer."""
        overrides = [f"data.path={self.out / 'texts' / f'held_out_{text}.jsonl'}"]
        return evaluation_data(run_config(resolve(self.teacher), overrides), overrides, length)[0]

    def _recall(self, name: str, text: str, length: int) -> dict[str, Any]:
        model = self.load(name)
        for mixer in indexed_mixers(model):
            mixer.attention_mode = "dense"
        if text == REPEATED:
            rows = repeated_samples(model.config.vocab_size, length // 2, rows=self.sizes.repeat_rows)
            return indexer_recall(model, map(as_batch, rows.ids, rows.labels))
        windows = max(1, self.sizes.recall_windows * self.sizes.length // length)
        data = self.dataset(text, length)
        return indexer_recall(model, (data.batch([index]) for index in range(min(windows, len(data)))))

    def _attending(self, name: str, mode: str) -> tuple[HybridLM, Any]:
        """A model, and the context in which it attends as `mode` says."""
        model = self.load(name)
        converted = json.loads(self.sizes.layers)
        for mixer in indexed_mixers(model):
            mixer.attention_mode = "sparse" if mode == "sparse" and mixer.layer_index in converted else "dense"
        kind, options = {"window": ("streaming", {}), "exact": ("exact", {}),
                         "shared": ("exact", {"shared": True})}.get(mode, (None, {}))
        if kind is None:
            return model, None
        options |= {"budget": self.sizes.topk, "first": 1, "dense_layers": min(converted)}
        return model, sparse_softmax(model, make_sparse_method(kind, options))

    def _loss(self, name: str, mode: str, text: str) -> dict[str, Any]:
        model, context = self._attending(name, mode)
        data = self.dataset(text, self.sizes.length)
        batches = (data.batch([index]) for index in range(min(self.sizes.loss_windows, len(data))))
        if context is None:
            return perplexity_by_position(model, batches, self.sizes.length)
        with context:
            return perplexity_by_position(model, batches, self.sizes.length)

    def _repeat(self, name: str, mode: str) -> dict[str, Any]:
        """Negative log-likelihood of the second of two copies: of random tokens, and of held-out code."""
        model, context = self._attending(name, mode)
        half, rows = self.sizes.length // 2, self.sizes.repeat_rows
        text = self.dataset("code", half).batch(range(rows)).input_ids
        samples = {"random": repeated_samples(model.config.vocab_size, half, rows=rows), "code": repeated_text(text)}

        def nll() -> dict[str, Any]:
            return {kind: recall_nll(model, each, torch.device("cpu")) for kind, each in samples.items()}

        if context is None:
            return nll()
        with context:
            return nll()


def repeated_text(text_BT: torch.Tensor) -> RecallSamples:
    """Rows of text that come twice; the second copy is scored from its second token on."""
    labels = torch.full((text_BT.shape[0], 2 * text_BT.shape[1]), IGNORE)
    labels[:, text_BT.shape[1] + 1 :] = text_BT[:, 1:]
    return RecallSamples(torch.cat([text_BT, text_BT], 1), labels)


def as_batch(ids_T: torch.Tensor, labels_T: torch.Tensor) -> Batch:
    """One row as a batch."""
    return Batch(ids_T[None], labels_T[None, :, None], CuSeqlens([0, len(ids_T)], ids_T.device), num_bytes=len(ids_T),
                 num_tokens=int((labels_T != IGNORE).sum()), sample_ids=(0,))


def manual_pages() -> list[str]:
    """The pages of the language reference that Python ships for `help`."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def library_sources() -> list[str]:
    """Sources of the standard library, without the file that holds the manual's pages."""
    source = open_stdlib(DataConfig(path="stdlib", invalid_utf8="replace"))
    return [document.text.decode() for unit, _, document in source.documents()
            if "pydoc_data" not in source.units[unit].name]


def make_smoke_model(folder: Path) -> Path:
    """Write a tiny Llama with random weights and a tokenizer of bytes as a folder of transformers."""
    if (folder / "config.json").exists():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate([*letters, "<end>"])},
                                     merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(letters) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=len(letters),
        eos_token_id=len(letters))).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>").save_pretrained(folder)
    return folder


PIECES = ("import", "warmup", "warmup_2048", "sparse", "control", "copies", "measure", "table", "figure")


def main(argv: list[str] | None = None) -> int:
    """Run one piece of the experiment, or with --smoke all of them; returns the exit code, 3 for a stopped piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", nargs="?", choices=PIECES)
    parser.add_argument("--out", type=Path, default=Path("runs/dsa_real_model"), help="folder of the experiment")
    parser.add_argument("--teacher", type=Path, help="an imported checkpoint; default: that of the piece import")
    parser.add_argument("--gguf", type=Path, help="file of quantised weights, for import")
    parser.add_argument("--model", type=Path, help="folder of transformers, for import")
    parser.add_argument("--minutes", type=float, help="stop the piece after so long")
    parser.add_argument("--smoke", action="store_true", help="a tiny model with random weights; without a piece all")
    args = parser.parse_args(argv)
    if args.piece is None and not args.smoke:
        parser.error("name a piece")
    sizes = SMOKE if args.smoke else Sizes()
    args.out.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(args.out, args.teacher or args.out / "teacher", sizes, args.minutes)
    for piece in PIECES if args.piece is None else (args.piece,):
        if piece == "import":
            if args.teacher is None:
                model = make_smoke_model(args.out / "smoke_model") if args.smoke else args.model
                import_model(args.out, args.gguf, model)
        elif piece in ("table", "figure"):
            measured = args.out / "measured.json"
            if not measured.is_file():
                parser.error(f"nothing has been measured in {args.out}: run the piece measure first")
            found = json.loads(measured.read_text(encoding="utf-8"))
            if piece == "table":
                write_text(args.out / "table.md", tabulate(found, sizes))
                print(tabulate(found, sizes))
            else:
                write_png(make_figure(found, sizes), args.out / "recall_by_layer.png")
        elif not getattr(experiment, piece)():
            return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main())
