"""Imports and exports checkpoint folders tensor by tensor: memory holds one group of tensors, not the model."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hybridlm import checkpoint as ckpt
from hybridlm.config.serialization import to_dict
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import CheckpointError, ConfigError, DataError, counted
from hybridlm.interop.family_registry import read_config_json
from hybridlm.interop.hub_folder import find_checkpoint_folder
from hybridlm.interop.import_export import ExportPlan, ImportPlan
from hybridlm.interop.safetensors_writer import SHARD_BYTES, SafetensorsWriter, create_folder
from hybridlm.interop.surgery import add_indexer, replace_mixers
from hybridlm.interop.tensor_source import SafetensorsSource, StateDictSource
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM

log = logging.getLogger("hybridlm")

HF_CONFIG_FILE = "hf_config.json"  # the config.json of the source, kept for an export
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model", "chat_template.jinja")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPE_BY_NAME = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PathLike = str | os.PathLike[str]


def parse_dtype(name: str | torch.dtype | None) -> torch.dtype | None:
    """The torch.dtype of fp32, bf16 or fp16; None stays None.

    Raises:
        ConfigError: another name.

    >>> parse_dtype("bf16")
    torch.bfloat16
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPE_BY_NAME:
        raise ConfigError("dtype", "unknown", got=name, expected=f"one of {', '.join(DTYPE_BY_NAME)}")
    return DTYPE_BY_NAME[name]


def import_checkpoint(source: PathLike, dest: PathLike, *, dtype: str | torch.dtype | None = None, mtp: bool = True,
                      indexer: Mapping[str, Any] | None = None,
                      replace: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """Turn a checkpoint folder of transformers into a checkpoint of ours.

    Tokenizer and generation_config.json are copied. With `indexer` or `replace` the whole model is in memory.

    Args:
        source: the folder of transformers, or owner/name on the Hugging Face hub.
        dest: a new folder.
        dtype: fp32, bf16 or fp16; None: as in the source, and bf16 for the fp8 weights of DeepSeek.
        mtp: import multi-token prediction weights.
        indexer: fields of `IndexerConfig` ({} for its defaults): adds an indexer to every softmax layer, see
            `hybridlm.interop.add_indexer`.
        replace: {mixer preset: layers}: replaces mixers, before the indexer is added, see
            `hybridlm.interop.replace_mixers`.

    Returns:
        What was done: family, layers, MTP depth, files and bytes; `kept` and `fresh` parameters of changed layers.

    Raises:
        CheckpointError: an unknown architecture, tensors that do not fit it, damaged files, no space, `dest` in use.
        ConfigError: the config asks for something that hybridlm does not have, or a change that cannot be made.
    """
    folder = find_checkpoint_folder(source)
    raw = read_config_json(folder)
    wanted_dtype = parse_dtype(dtype)
    with create_folder(Path(dest)) as target:
        plan = ImportPlan(raw, SafetensorsSource(folder), mtp=mtp)
        family = plan.family.name
        config = plan.config
        changes: dict[str, Any] = {}
        if indexer is None and not replace:
            _write_tensors(target, plan, wanted_dtype, ckpt.SHARD_BYTES, index=False)
        else:
            model = plan.build_model(wanted_dtype or next(plan.specs(None))[1].dtype)
            model, changes = _edit_model(model, indexer, replace or {})
            config = model.config
            _write_model(target, model)
        _write_text_files(target, config, None)
        raw_unquantized = {key: value for key, value in raw.items() if key != "quantization_config"}
        (target / HF_CONFIG_FILE).write_text(json.dumps(raw_unquantized, indent=2), encoding="utf-8")
        _copy_files(folder, target, (GENERATION_FILE, *TOKENIZER_FILES))
        _drop_unusable_tokenizer(target)
        ckpt.seal(target, 0)
    return _describe_result(family, config, Path(dest)) | changes


def _edit_model(model: HybridLM, indexer: Mapping[str, Any] | None,
             replace: Mapping[str, Sequence[int]]) -> tuple[HybridLM, dict[str, Any]]:
    """The model with other mixers and an indexer, and the parameters of changed layers that were kept or are fresh."""
    changes: dict[str, Any] = {"kept": [], "fresh": []}
    for preset, layers in replace.items():
        model, transfer = replace_mixers(model, layers, preset)
        changes["kept"] += transfer.kept
        changes["fresh"] += transfer.fresh
    if indexer is not None:
        model, transfer = add_indexer(model, indexer)
        changes["fresh"] += transfer.fresh
    return model, changes


def export_checkpoint(checkpoint: PathLike, dest: PathLike, *, family: str | None = None,
                      dtype: str | torch.dtype | None = None, mtp: bool = True,
                      shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write a checkpoint of ours as a folder that transformers loads.

    Args:
        checkpoint: a checkpoint, or a run folder, which means its newest.
        dest: a new folder.
        family: the model type; None: the one that computes exactly this model, or `hybridlm` where transformers has
            none.
        dtype: fp32, bf16 or fp16; None: that of the source. Parameters that need fp32 stay fp32.
        mtp: export multi-token prediction weights.
        shard_bytes: largest number of bytes per file.

    Returns:
        What was done: family, layers, MTP depth, files and bytes.

    Raises:
        CheckpointError: a damaged checkpoint, no space, `dest` in use.
        ConfigError: `family` cannot hold the model; the message names the field.
    """
    folder = ckpt.resolve(checkpoint)
    config = ckpt.read_model_config(folder)
    source = SafetensorsSource(folder, ckpt.checkpoint_tensors(folder))
    return _export(config, source, dest, folder, family, parse_dtype(dtype), mtp, shard_bytes)


def export_hf(model: HybridLM, dest: PathLike, *, family: str | None = None, dtype: str | torch.dtype | None = None,
              mtp: bool = True, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write a model in memory like `export_checkpoint`, with its `tokenizer` if it has one."""
    source = StateDictSource(ckpt.unique_tensors(model))
    return _export(model.config, source, dest, None, family, parse_dtype(dtype), mtp, shard_bytes,
                   getattr(model, "tokenizer", None))


def save_checkpoint(model: HybridLM, dest: PathLike) -> None:
    """Write a model in memory as a checkpoint of ours, with its `tokenizer` if it has one.

    Raises:
        CheckpointError: no space, or `dest` in use.
    """
    with create_folder(Path(dest)) as target:
        _write_model(target, model)
        _write_text_files(target, model.config, getattr(model, "tokenizer", None))
        ckpt.seal(target, 0)


def _write_model(target: Path, model: HybridLM) -> None:
    source = StateDictSource(ckpt.unique_tensors(model))
    writer = SafetensorsWriter(target, source.specs.items(), shard_bytes=ckpt.SHARD_BYTES, index=False)
    try:
        for name in source.specs:
            writer.write(name, source.read(name))
        writer.finish()
    finally:
        writer.close()


def _write_text_files(target: Path, config: ModelConfig, tokenizer: Any) -> None:
    for name, text in ckpt.model_texts({"model": to_dict(config)}, config, tokenizer).items():
        (target / name).write_text(text, encoding="utf-8")


def summarize(report: Mapping[str, Any]) -> str:
    """One line about what an import or export did."""
    kinds = ", ".join(f"{report['layers'].count(name)} {name}" for name in dict.fromkeys(report["layers"]))
    text = (f"{report['family']}: {len(report['layers'])} layers ({kinds}), "
            f"{report['mtp']} MTP, {report['bytes'] / 1e9:.3f} GB in {counted(report['files'], 'file')} at "
            f"{report['dest']}")
    if "fresh" in report:
        text += f"; {len(report['kept'])} tensors of changed layers kept, {len(report['fresh'])} start fresh"
    return text


def _write_tensors(target: Path, plan: ImportPlan | ExportPlan, dtype: torch.dtype | None, shard_bytes: int,
                   index: bool) -> None:
    writer = SafetensorsWriter(target, plan.specs(dtype), shard_bytes=shard_bytes, index=index)
    try:
        for name, tensor in plan.tensors():
            writer.write(name, tensor)
        writer.finish()
    finally:
        writer.close()


def _export(config: ModelConfig, source: SafetensorsSource | StateDictSource, dest: PathLike, folder: Path | None,
            family: str | None, dtype: torch.dtype | None, mtp: bool, shard_bytes: int,
            tokenizer: Any = None) -> dict[str, Any]:
    with create_folder(Path(dest)) as target:
        plan = ExportPlan(config, source, family=family, mtp=mtp)
        _write_tensors(target, plan, dtype, shard_bytes, index=True)
        if folder is not None:
            _copy_files(folder, target, (GENERATION_FILE, *TOKENIZER_FILES))
        elif tokenizer is not None:
            tokenizer.save(target)
        ids = _find_token_ids(folder, target, config)
        stored = dtype or source.specs["embed.weight"].dtype
        dtype_name = str(stored).removeprefix("torch.")
        raw = plan.raw | ids | {"dtype": dtype_name, "torch_dtype": dtype_name,  # the latter for transformers 4
                                "transformers_version": _transformers_version()}
        (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        if not (target / GENERATION_FILE).exists():
            known = {key: value for key, value in ids.items() if value is not None}
            text = {"_from_model_config": True, **known, "transformers_version": _transformers_version()}
            (target / GENERATION_FILE).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    return _describe_result(plan.family.name, plan.config, Path(dest))


def _find_token_ids(folder: Path | None, target: Path, config: ModelConfig) -> dict[str, Any]:
    """Token ids for config.json: those of the source, else of the tokenizer; ids outside the vocabulary are dropped."""
    ids: dict[str, Any] = dict.fromkeys(TOKEN_IDS)
    tokenizer = Tokenizer.from_folder(target) if (target / "tokenizer.json").exists() else None
    if folder is not None and (folder / HF_CONFIG_FILE).exists():
        raw = json.loads((folder / HF_CONFIG_FILE).read_text(encoding="utf-8"))
        text: Mapping[str, Any] = raw.get("text_config") or {}
        ids.update({key: raw.get(key, text.get(key)) for key in TOKEN_IDS})
    elif tokenizer is not None:
        ids["eos_token_id"] = tokenizer.eos_id
    if tokenizer is not None:
        ids.update({key: value for key, value in _named_tokens(target, tokenizer).items() if ids[key] is None})
    return {key: value for key, value in ids.items() if _in_vocabulary(value, config.vocab_size)}


def _named_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that tokenizer_config.json names for the start of a text and for padding."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = {}
    for key in ("bos_token", "pad_token"):
        token = config.get(key)
        token_id = tokenizer.backend.token_to_id(str(token.get("content") if isinstance(token, dict) else token))
        if token_id is not None:
            found[f"{key}_id"] = token_id
    return found


def _in_vocabulary(ids: Any, vocab_size: int) -> bool:
    listed = ids if isinstance(ids, list) else [ids]
    return all(i is None or (isinstance(i, int) and 0 <= i < vocab_size) for i in listed)


def _copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _drop_unusable_tokenizer(target: Path) -> None:
    """Delete a tokenizer that hybridlm cannot use, so that the checkpoint stays usable; a warning says so."""
    if not (target / "tokenizer.json").exists():
        return
    try:
        Tokenizer.from_folder(target)
    except DataError as error:
        log.warning("the tokenizer was left out: %s", error)
        for name in TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)


def _transformers_version() -> str:
    return importlib.metadata.version("transformers")


def _describe_result(family: str, config: ModelConfig, dest: Path) -> dict[str, Any]:
    files = sorted(dest.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{dest} holds no weights")
    return {"family": family, "layers": config.layers(), "mtp": config.mtp.depth, "dest": str(dest),
            "files": len(files), "bytes": sum(file.stat().st_size for file in files)}
