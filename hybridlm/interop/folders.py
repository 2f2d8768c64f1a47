"""Import and export of checkpoint folders, tensor by tensor: memory holds one group of tensors, not the model."""

from __future__ import annotations

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
from hybridlm.errors import CheckpointError, ConfigError, DataError, counted
from hybridlm.interop.family_registry import read_raw
from hybridlm.interop.import_export import Export, Import
from hybridlm.interop.reader import SafetensorsFolder, StateDict
from hybridlm.interop.surgery import add_indexer, replace_mixers
from hybridlm.interop.writer import SHARD_BYTES, ShardWriter, draft
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM

log = logging.getLogger("hybridlm")

HF_CONFIG, GENERATION = "hf_config.json", "generation_config.json"  # kept from the source, for the way back
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model", "tiktoken.model", "chat_template.jinja")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PathLike = str | os.PathLike[str]


def dtype_named(name: str | torch.dtype | None) -> torch.dtype | None:
    """torch.dtype of fp32, bf16 or fp16; None keeps what is there.

    Raises:
        ConfigError: another name.
    """
    if name is None or isinstance(name, torch.dtype):
        return name
    if name not in DTYPES:
        raise ConfigError("dtype", "unknown", got=name, expected=f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def import_checkpoint(source: PathLike, dest: PathLike, *, dtype: str | torch.dtype | None = None, mtp: bool = True,
                      indexer: Mapping[str, Any] | None = None,
                      replace: Mapping[str, Sequence[int]] | None = None) -> dict[str, Any]:
    """Turn a checkpoint folder of transformers into a checkpoint of ours at `dest`; returns what was done.

    Weights keep their dtype (fp8 in DeepSeek's format becomes bf16) unless `dtype` names another. `mtp=False` leaves
    multi-token prediction weights out. Tokenizer and generation_config.json come along.
    `indexer` (options of `IndexerConfig`, {} for its defaults) adds one to every softmax layer, and `replace`
    ({mixer preset: layers}) puts linear mixers in place of softmax ones, before the indexer; see `surgery`. With
    either the whole model is in memory.

    Raises:
        CheckpointError: an unknown architecture, tensors that do not fit it, damaged files, no space, `dest` in use.
        ConfigError: the config asks for what we do not have, or surgery that cannot be done.
    """
    folder = Path(source).expanduser()
    raw, wanted = read_raw(folder), dtype_named(dtype)
    with draft(Path(dest)) as target:
        plan = Import(raw, SafetensorsFolder(folder), mtp=mtp)
        family, config = plan.family.name, plan.config
        done: dict[str, Any] = {}
        if indexer is None and not replace:
            _write_tensors(target, plan, wanted, ckpt.SHARD_BYTES, index=False)
        else:
            model = plan.model(wanted or next(plan.specs(None))[1].dtype)
            model, done = _operate(model, indexer, replace or {})
            config = model.config
            _write_model(target, model)
        _write_texts(target, config, None)
        kept = {key: value for key, value in raw.items() if key != "quantization_config"}
        (target / HF_CONFIG).write_text(json.dumps(kept, indent=2), encoding="utf-8")
        _copy(folder, target, (GENERATION, *TOKENIZER_FILES))
        _check_tokenizer(target)
        ckpt.seal(target, 0)
    return _report(family, config, Path(dest)) | done


def _operate(model: HybridLM, indexer: Mapping[str, Any] | None,
             replace: Mapping[str, Sequence[int]]) -> tuple[HybridLM, dict[str, Any]]:
    """The changed model, and the parameters of changed layers that were kept and those that start fresh."""
    done: dict[str, Any] = {"kept": [], "fresh": []}
    for preset, layers in replace.items():
        model, transfer = replace_mixers(model, layers, preset)
        done["kept"] += transfer.kept
        done["fresh"] += transfer.fresh
    if indexer is not None:
        model, transfer = add_indexer(model, indexer)
        done["fresh"] += transfer.fresh
    return model, done


def export_checkpoint(checkpoint: PathLike, dest: PathLike, *, family: str | None = None,
                      dtype: str | torch.dtype | None = None, mtp: bool = True,
                      shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Write a checkpoint of ours (or a run folder's newest) as a folder that transformers loads; returns what was done.

    `family` null takes the model type that computes exactly this model, or `hybridlm` where transformers has none.
    Weights keep their dtype unless `dtype` names another; parameters that need fp32 stay fp32.

    Raises:
        CheckpointError: a damaged checkpoint, no space, `dest` in use.
        ConfigError: `family` cannot hold the model; the message names the field.
    """
    folder = ckpt.resolve(checkpoint)
    config = ckpt.read_model_config(folder)
    source = SafetensorsFolder(folder, ckpt.checkpoint_tensors(folder))
    return _export(config, source, dest, folder, family, dtype_named(dtype), mtp, shard_bytes)


def export_hf(model: HybridLM, dest: PathLike, *, family: str | None = None, dtype: str | torch.dtype | None = None,
              mtp: bool = True, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """As `export_checkpoint`, for a model in memory; its `tokenizer`, where it has one, is written as well."""
    source = StateDict(ckpt.unique_tensors(model))
    return _export(model.config, source, dest, None, family, dtype_named(dtype), mtp, shard_bytes,
                   getattr(model, "tokenizer", None))


def save_checkpoint(model: HybridLM, dest: PathLike) -> None:
    """Write a model in memory as a checkpoint of ours.

    Raises:
        CheckpointError: no space, or `dest` in use.
    """
    with draft(Path(dest)) as target:
        _write_model(target, model)
        _write_texts(target, model.config, getattr(model, "tokenizer", None))
        ckpt.seal(target, 0)


def _write_model(target: Path, model: HybridLM) -> None:
    source = StateDict(ckpt.unique_tensors(model))
    writer = ShardWriter(target, source.specs.items(), shard_bytes=ckpt.SHARD_BYTES, index=False)
    try:
        for name in source.specs:
            writer.write(name, source.read(name))
        writer.finish()
    finally:
        writer.close()


def _write_texts(target: Path, config: ModelConfig, tokenizer: Any) -> None:
    for name, text in ckpt.model_texts({"model": to_dict(config)}, config, tokenizer).items():
        (target / name).write_text(text, encoding="utf-8")


def summary(report: Mapping[str, Any]) -> str:
    """One line about an import or export."""
    kinds = ", ".join(f"{report['layers'].count(name)} {name}" for name in dict.fromkeys(report["layers"]))
    text = (f"{report['family']}: {len(report['layers'])} layers ({kinds}), "
            f"{report['mtp']} MTP, {report['bytes'] / 1e9:.3f} GB in {counted(report['files'], 'file')} at "
            f"{report['dest']}")
    if "fresh" in report:
        text += f"; {len(report['kept'])} tensors of changed layers kept, {len(report['fresh'])} start fresh"
    return text


def _write_tensors(target: Path, plan: Import | Export, dtype: torch.dtype | None, shard_bytes: int,
                   index: bool) -> None:
    writer = ShardWriter(target, plan.specs(dtype), shard_bytes=shard_bytes, index=index)
    try:
        for name, tensor in plan.tensors():
            writer.write(name, tensor)
        writer.finish()
    finally:
        writer.close()


def _export(config: ModelConfig, source: SafetensorsFolder | StateDict, dest: PathLike, folder: Path | None,
            family: str | None, dtype: torch.dtype | None, mtp: bool, shard_bytes: int,
            tokenizer: Any = None) -> dict[str, Any]:
    with draft(Path(dest)) as target:
        plan = Export(config, source, family=family, mtp=mtp)
        _write_tensors(target, plan, dtype, shard_bytes, index=True)
        if folder is not None:
            _copy(folder, target, (GENERATION, *TOKENIZER_FILES))
        elif tokenizer is not None:
            tokenizer.save(target)
        ids = _token_ids(folder, target, config)
        stored = dtype or source.specs["embed.weight"].dtype
        raw = plan.raw | ids | {"dtype": str(stored).removeprefix("torch."),
                                "transformers_version": _transformers_version()}
        (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        if not (target / GENERATION).exists():
            known = {key: value for key, value in ids.items() if value is not None}
            text = {"_from_model_config": True, **known, "transformers_version": _transformers_version()}
            (target / GENERATION).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    return _report(plan.family.name, plan.config, Path(dest))


def _token_ids(folder: Path | None, target: Path, config: ModelConfig) -> dict[str, Any]:
    """Token ids for config.json: what the source had, else what the tokenizer says. Ids outside the vocabulary drop."""
    ids: dict[str, Any] = dict.fromkeys(TOKEN_IDS)
    if folder is not None and (folder / HF_CONFIG).exists():
        raw = json.loads((folder / HF_CONFIG).read_text(encoding="utf-8"))
        text: Mapping[str, Any] = raw.get("text_config") or {}
        ids.update({key: raw.get(key, text.get(key)) for key in TOKEN_IDS})
    elif (target / "tokenizer.json").exists():
        from hybridlm.data.tokenizer import Tokenizer

        ids["eos_token_id"] = Tokenizer.from_folder(target).eos_id
    return {key: value for key, value in ids.items() if _inside(value, config.vocab_size)}


def _inside(ids: Any, vocab_size: int) -> bool:
    listed = ids if isinstance(ids, list) else [ids]
    return all(i is None or (isinstance(i, int) and 0 <= i < vocab_size) for i in listed)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_tokenizer(target: Path) -> None:
    """A tokenizer that we cannot use must not make the checkpoint unusable."""
    from hybridlm.data.tokenizer import Tokenizer

    if not (target / "tokenizer.json").exists():
        return
    try:
        Tokenizer.from_folder(target)
    except DataError as error:
        log.warning("the tokenizer was left out: %s", error)
        for name in TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)


def _transformers_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("transformers")


def _report(family: str, config: ModelConfig, dest: Path) -> dict[str, Any]:
    files = sorted(dest.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{dest} holds no weights")
    return {"family": family, "layers": config.layers(), "mtp": config.mtp.depth, "dest": str(dest),
            "files": len(files), "bytes": sum(file.stat().st_size for file in files)}
