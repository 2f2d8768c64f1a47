"""Reads the model of a checkpoint: its config, its explicit list of layers, its weights and its tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hybridlm.checkpoint.folder import MANIFEST, resolve
from hybridlm.checkpoint.legacy_names import checkpoint_tensors
from hybridlm.checkpoint.lineage import LINEAGE_FILE
from hybridlm.config.legacy import load_saved_config, upgrade_layers
from hybridlm.config.serialization import from_dict, to_yaml
from hybridlm.data import DATA_RULES
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.data.tokenizer_comparison import tokenizer_differences
from hybridlm.distributed.zero.partition import read_weight
from hybridlm.errors import CheckpointError
from hybridlm.model.config import ModelConfig
from hybridlm.model.model import HybridLM, build_model
from hybridlm.tensor_storage import StoredTensor, full_shape, unique_tensors

# Files of a checkpoint that every save writes anew.
RUN_FILES = ("config.yaml", "layers.json", "trainer.json", MANIFEST, "model.safetensors.index.json")


def read_config(folder: Path) -> dict[str, Any]:
    """Read the resolved config of the run that wrote the checkpoint, as plain data in the names of this version."""
    return load_saved_config(folder / "config.yaml")


def read_model_config(folder: Path) -> ModelConfig:
    """Read the config of the checkpoint's model, checked against its explicit layer list.

    Raises:
        CheckpointError: the list is not what the config says now.
    """
    config = from_dict(ModelConfig, read_config(folder)["model"], "model")
    saved = upgrade_layers(json.loads((folder / "layers.json").read_text(encoding="utf-8")))
    if saved != layer_list(config):
        raise CheckpointError(f"the layer list of {folder} is not what its config gives: "
                              + "; ".join(layer_diff(saved, layer_list(config))))
    return config


def data_rules(folder: Path) -> int:
    """Read the version of the data rules (split, order of samples) under which the checkpoint's run reads its data.

    Checkpoints of earlier versions name none: theirs is 1. A checkpoint without the state of a run, such as an imported
    one, has read no data of ours: the rules are those of this version.
    """
    try:
        state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return DATA_RULES
    return int(state.get("data_rules", 1))


def layer_list(config: ModelConfig) -> list[dict[str, Any]]:
    """List the layers of a model, one entry per layer: mixer name, mixer kind, and dense, moe or none.

    Layers that run several times say how often.
    """
    order = config.runs()

    def feed_forward(index: int, name: str) -> str:
        config_after = config.feed_forward_after(name)
        return "moe" if config_after.is_moe(index) else "dense" if config_after.is_branch else "none"

    return [{"layer": index, "mixer": name, "kind": config.mixers[name].kind, "feed_forward": feed_forward(index, name),
             **({"runs": order.count(index)} if order.count(index) > 1 else {})}
            for index, name in enumerate(config.layers())]


def layer_diff(saved: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Describe the differences between two layer lists, one line each."""
    lines = [f"{len(saved)} layers saved, {len(now)} asked for"] if len(saved) != len(now) else []
    for a, b in zip(saved, now, strict=False):
        changes = [f"{key} {a.get(key)} -> {b.get(key)}" for key in ("mixer", "kind", "feed_forward", "runs")
                   if a.get(key) != b.get(key)]
        if changes:
            lines.append(f"layer {a['layer']}: {', '.join(changes)}")
    return lines


def load_weights(model: nn.Module, folder: Path, may_lack: Sequence[str] = (),
                 local_shard: Callable[[str, StoredTensor], StoredTensor] | None = None) -> list[str]:
    """Copy the checkpoint's weights into a model, by name.

    Of weights that are sharded over ranks only this rank's shards are read.

    Args:
        model: as `build_model` made it, on any number of ranks.
        folder: a checkpoint.
        may_lack: shell patterns over names; weights that match one keep their values where the checkpoint lacks them.
        local_shard: slices a stored tensor to what the model holds of it (`Engine.local_shard`); None: all of it.

    Returns:
        The names of weights that the checkpoint lacks, sorted.

    Raises:
        CheckpointError: another weight is missing, one is left over, or of another shape.
    """
    wanted = unique_tensors(model)
    problems = []
    left = set(wanted)
    with torch.no_grad():
        for name, complete in checkpoint_tensors(folder).items():
            stored = complete if local_shard is None else local_shard(name, complete)
            if name not in wanted:
                problems.append(f"the model has no '{name}'")
            elif full_shape(wanted[name]) != stored.shape:
                problems.append(f"'{name}' is {list(stored.shape)} there and {list(full_shape(wanted[name]))} here")
            else:
                read_weight(wanted[name], stored)
            left.discard(name)
    lacking = sorted(name for name in left if any(fnmatchcase(name, pattern) for pattern in may_lack))
    problems += [f"'{name}' is not in the checkpoint" for name in sorted(left - set(lacking))]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"the weights of {folder} do not fit the model: " + "; ".join(problems[:4]) + more)
    return lacking


def load_checkpoint(path: str | os.PathLike[str], device: str = "cpu") -> HybridLM:
    """Load the model of a checkpoint, or of the newest checkpoint of a run folder, in evaluation mode.

    Args:
        path: a checkpoint folder (step-300), or a run folder.
        device: device of the weights.

    Returns:
        The model, with `.tokenizer` set, or None where the checkpoint has no tokenizer.

    Raises:
        CheckpointError: nothing there, damaged files, or weights that do not fit.

    >>> import tempfile
    >>> from hybridlm import checkpoint, load_config
    >>> config = load_config("train", ["model=hybrid_tiny", "model.hidden_size=32", "model.num_layers=1"])
    >>> texts = model_texts(config, config.model, tokenizer=None)
    >>> root = Path(tempfile.mkdtemp())
    >>> checkpoint.write(root, 300, texts, {"model": unique_tensors(build_model(config))}).name
    'step-300'
    >>> load_checkpoint(root).config.num_layers
    1
    """
    folder = resolve(path)
    model = build_model(read_model_config(folder), device=device)
    load_weights(model, folder)
    has_tokenizer = (folder / "tokenizer.json").exists()
    model.tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None  # type: ignore[assignment]
    return model.eval()


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer a checkpoint was trained with.

    Raises:
        CheckpointError: the checkpoint holds none.
    """
    folder = resolve(path)
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"checkpoint {folder} holds no tokenizer.json")
    return Tokenizer.from_folder(folder)


def model_texts(config: Any, model: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """Make the text files of a checkpoint: config.yaml, layers.json, and those of the tokenizer.

    Args:
        config: the resolved config of a run, or `{"model": ...}`.
        model: the config of the model.
        tokenizer: its tokenizer, if it has one.

    Returns:
        The content by file name.
    """
    texts = {"config.yaml": to_yaml(config), "layers.json": json.dumps(layer_list(model), indent=1)}
    if tokenizer is not None:
        texts |= tokenizer.files()
    return texts


def carried_texts(folder: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Read the text files that later checkpoints of the same model keep: chat template, generation config, lineage.

    Those are all files that a run does not write itself, and the tokenizer's own files where it is the tokenizer that
    the run uses: they may name a padding token or hold a chat template, which a run would not write again.

    Args:
        folder: a checkpoint.
        tokenizer: of the run. Where it gives other ids than the checkpoint's, only the lineage is kept.

    Returns:
        The content by file name.
    """
    same = (folder / "tokenizer.json").is_file() and not tokenizer_differences(Tokenizer.from_folder(folder), tokenizer)
    texts = {}
    for file in sorted(folder.iterdir()):
        own = file.name in RUN_FILES or file.suffix == ".safetensors"
        if own or not file.is_file() or not (same or file.name == LINEAGE_FILE):
            continue
        try:
            texts[file.name] = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue  # such as tokenizer.model, whose tokens tokenizer.json has
    return texts
