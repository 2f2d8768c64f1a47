"""Evaluation of a checkpoint on the validation text of its run or on another text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hybridlm import checkpoint as ckpt
from hybridlm.config.schema import Config
from hybridlm.data import DATA_RULES, PackedDataset, check_vocab, prepare
from hybridlm.data.packing import Batch
from hybridlm.errors import ConfigError, DataError, require
from hybridlm.evaluation.decode_speed import decode_speed
from hybridlm.evaluation.indexer_recall import indexer_recall
from hybridlm.evaluation.perplexity import perplexity_by_position
from hybridlm.evaluation.sparse import SparseMethod, sparse_softmax
from hybridlm.model.model import HybridLM
from hybridlm.run_config import load_config
from hybridlm.training.stages import plan_stages

MEASUREMENTS = ("perplexity", "decode")
DEFAULT_CONTEXTS = (128, 512, 2048)  # tokens

log = logging.getLogger("hybridlm")


def evaluate_checkpoint(path: str | Path, overrides: Sequence[str] = (), *, parts: Sequence[str] = MEASUREMENTS,
                        windows: int | None = None, sequence_length: int | None = None, batch_size: int | None = None,
                        contexts: Sequence[int] = DEFAULT_CONTEXTS, decode_tokens: int = 32,
                        sparse: Sequence[tuple[str, SparseMethod]] = (), indexers: bool = False, device: str = "cpu",
                        config_dir: str | None = None) -> dict[str, Any]:
    """Measure a checkpoint and return the report of `hybridlm eval CHECKPOINT`, as plain data.

    Args:
        path: a checkpoint, or a run folder (its newest one).
        overrides: `data.*` settings that replace those of the run; see `evaluation_data`.
        parts: some of `MEASUREMENTS`.
        windows: number of windows of text; default that of the run's own validation, 0 for all.
        sequence_length: tokens per window; default those of the run's last stage.
        batch_size: windows per forward; default that of the run.
        contexts: tokens of context at which decoding is measured.
        decode_tokens: tokens decoded at each context.
        sparse: methods by name, each of which is tried on the softmax layers, on the same windows of text.
        indexers: also measure the recall of the model's indexers, by layer and by position.
        device: where the model runs.
        config_dir: a folder with configs of your own.

    Raises:
        CheckpointError, ConfigError, DataError: something cannot be read, or does not fit.
    """
    for key, value, least in (("windows", windows, 0), ("sequence_length", sequence_length, 2),
                              ("batch_size", batch_size, 1)):
        require(value is None or value >= least, key, "is too small", got=value, expected=f"at least {least}")
    folder = ckpt.resolve(path)
    model = ckpt.load_checkpoint(folder, device)
    report: dict[str, Any] = {"checkpoint": str(folder), "model": model.config.name, "params": model.num_params(),
                              "device": str(model.device)}
    if "perplexity" in parts:
        config = run_config(folder, overrides, config_dir)
        stage = plan_stages(config)[-1]
        length = sequence_length or stage.sequence_length
        dataset, source = evaluation_data(config, overrides, length, ckpt.data_rules(folder))
        default = config.training.eval_batches * stage.batch_size
        count = min(default if windows is None else windows or len(dataset), len(dataset))
        rows = batch_size or config.training.micro_batch_size or stage.batch_size
        report["data"] = {"source": source, "windows": count, "of": len(dataset)}
        report["perplexity"] = perplexity_by_position(model, dataset.batches(0, count, rows), length)
        if sparse:
            report["sparse"] = [_try_sparse(model, name, method, dataset.batches(0, count, rows), length)
                                for name, method in sparse]
        if indexers:
            report["indexers"] = indexer_recall(model, dataset.batches(0, count, rows))
    if "decode" in parts:
        report["decode"] = decode_speed(model, contexts, decode_tokens)
    return report


def _try_sparse(model: HybridLM, name: str, method: SparseMethod, batches: Iterable[Batch],
                length: int) -> dict[str, Any]:
    """Loss of the text under a sparse method, and what its queries read.

    Raises:
        ConfigError: the model has no layer that the method could change.
    """
    with sparse_softmax(model, method) as tally:
        found = perplexity_by_position(model, batches, length)
    counts = tally.to_dict()
    if not counts["sparse_layers"]:
        raise ConfigError("--sparse", "changes no layer of this model", got=name,
                          expected=f"dense_layers below the number of softmax layers, {counts['softmax_layers']}",
                          hint="recurrent layers, and layers that are sparse by themselves, stay as they are")
    return {"method": name, "options": asdict(method), "loss": found["loss"], "perplexity": found["perplexity"],
            **counts, "by_position": found["by_position"]}


def run_config(folder: Path, overrides: Sequence[str] = (), config_dir: str | None = None) -> Config:
    """The config of the run that wrote a checkpoint, with `data.*` replaced.

    Another text is read with the checkpoint's own tokenizer: one that is trained on it would not fit the model.

    Raises:
        ConfigError: an override of something else than data.
    """
    for override in overrides:
        require(override.startswith("data.") and "=" in override, override.split("=")[0],
                "cannot be changed in an evaluation", expected="data.path=... or another key of data")
    imported = "data" not in ckpt.read_config(folder)
    config = load_config(str(folder / "config.yaml"), overrides, config_dir=config_dir)
    asked = any(override.startswith("data.tokenizer") for override in overrides)
    if (overrides or imported) and not asked and (folder / "tokenizer.json").exists():
        config.data = replace(config.data, tokenizer=str(folder), tokenizer_eos=None)
    return config


def evaluation_data(config: Config, overrides: Sequence[str], length: int,
                    rules: int = DATA_RULES) -> tuple[PackedDataset, str]:
    """Open windows of held-out text; returns them and the name of the text.

    By default the run's validation text, in the order in which the run validates. With `data.path=...` all of that
    text, unless the overrides have a `data.validation_*` key, which then chooses the part. `rules` are those of the
    run's split, so that no text that it was trained on is taken for held-out text.

    Raises:
        DataError: the run holds no text out.
    """
    keys = {override.split("=")[0] for override in overrides}
    all_of_another_text = "data.path" in keys and not any(key.startswith("data.validation_") for key in keys)
    if all_of_another_text:
        config.data = replace(config.data, mixture=[], validation_fraction=0.0, validation_path=None,
                              validation_split=None)
    data = prepare(config.data, progress=False, rules=rules)
    check_vocab(data.tokenizer, config.model.vocab_size)
    held_out = [data.validation] if data.validation is not None else []
    stores = data.train if all_of_another_text else held_out
    if not stores:
        raise DataError("the run holds no text out; give data.path=... to evaluate on")
    source = config.data.path if all_of_another_text else f"validation text of {config.data.path}"
    return PackedDataset(stores, length, seed=0), source
