"""Checkpoints: a folder of plain files that appears whole or not at all, and is never unpickled.

    step-N/
      model.safetensors       weights by parameter name (model-00001-of-00003.safetensors, ... when large
                            or written by several processes)
      config.yaml             the resolved config of the run, all of it
      layers.json             the explicit layer list, compared on load
      tokenizer.json          the tokenizer, in the format of the `tokenizers` library (and tokenizer_config.json)
      optimizer.safetensors   optimizer state by parameter name
      trainer.json            step, stage, samples consumed: all else that a run needs to go on
      manifest.json           format version, size and SHA-256 of every file above, and the SHA-256 of all this

A folder is written under a temporary name, flushed to disk and renamed. Whatever a crash, a full disk or a
bad copy leaves behind does not match its manifest, and is passed over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from hybridlm import __version__
from hybridlm.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.config import ModelConfig
    from hybridlm.model.model import HybridLM

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
SHARD_BYTES = 4 * 2**30  # safetensors copies a file's tensors before writing them: bounds that copy

log = logging.getLogger("hybridlm")


def step_of(folder: Path) -> int | None:
    """N of a folder named step-N, else None."""
    number = folder.name.removeprefix("step-")
    return int(number) if folder.name.startswith("step-") and number.isdecimal() else None


def step_folders(root: Path) -> list[Path]:
    """The step-N folders under `root`, newest first, whole or not."""
    found = [(step_of(f), f) for f in root.iterdir() if f.is_dir()] if root.is_dir() else []
    return [f for n, f in sorted(((n, f) for n, f in found if n is not None), reverse=True)]


class Writers(Protocol):
    """The processes that write a checkpoint together; `hybridlm.distributed.engine.Engine` is one."""

    rank: int

    def gather(self, value: Any) -> list[Any]: ...
    def together(self, run: Callable[[], Any]) -> list[Any]: ...
    def on_main(self, run: Callable[[], Any]) -> Any: ...


class Alone:
    """One process."""

    rank = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def together(self, run: Callable[[], Any]) -> list[Any]:
        return [run()]

    def on_main(self, run: Callable[[], Any]) -> Any:
        return run()


ALONE = Alone()


def write(root: Path, step: int, texts: dict[str, str], tensors: dict[str, dict[str, Tensor]],
          ranks: Writers = ALONE) -> Path:
    """Write `root/step-N` so that it is there whole or not at all; returns the folder.

    `texts` are files by name, `tensors` safetensors files by stem. An older folder of the same name is replaced.
    Several `ranks` call it together, each with its share of the tensors, and write side by side into one folder.

    Raises:
        OSError: the disk is full or fails for one of the ranks; nothing but older checkpoints is left then.
    """
    target = root / f"step-{step}"
    draft = ranks.on_main(lambda: _open_draft(root, step))
    try:
        files = _files(tensors, ranks)
        by_rank = ranks.together(lambda: {name: _write_tensors(draft / name, group) for name, group in files.items()})
        written = {name: entry for entries in by_rank for name, entry in entries.items()}
        ranks.on_main(lambda: _publish(draft, target, step, texts, written))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def _open_draft(root: Path, step: int) -> Path:
    draft = root / f"{TEMPORARY}step-{step}-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def _files(tensors: dict[str, dict[str, Tensor]], ranks: Writers) -> dict[str, dict[str, Tensor]]:
    """This rank's tensors by the file they go to; files are numbered through all ranks."""
    shards = {stem: _shards(group) for stem, group in tensors.items()}
    counts = ranks.gather({stem: len(found) for stem, found in shards.items()})
    files = {}
    for stem, found in shards.items():
        first, total = (sum(count[stem] for count in some) for some in (counts[:ranks.rank], counts))
        for index, shard in enumerate(found, start=first + 1):
            part = "" if total == 1 else f"-{index:05d}-of-{total:05d}"
            files[f"{stem}{part}.safetensors"] = shard
    return files


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.detach().contiguous()
        used += size
    return shards


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The file's entry for the manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # what the disk refuses comes back as the library's own error
        raise OSError(str(error)) from error
    return _entry(file)


def _entry(file: Path) -> dict[str, Any]:
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _publish(draft: Path, target: Path, step: int, texts: dict[str, str], written: dict[str, Any]) -> None:
    for name, text in texts.items():
        (draft / name).write_text(text, encoding="utf-8")
    seal(draft, step, written)
    _swap_in(draft, target)


def seal(folder: Path, step: int, written: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Flush every file of `folder` to disk and write the manifest that makes it a checkpoint.

    `written`: entries of files that those who wrote them have flushed already.
    """
    files = {file.name: written.get(file.name) or _entry(file) for file in sorted(folder.iterdir())}
    manifest = {"format": FORMAT_VERSION, "hybridlm": __version__, "step": step, "files": files}
    manifest["sha256"] = _own_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def _swap_in(draft: Path, target: Path) -> None:
    old = target.with_name(f"{TEMPORARY}old-{target.name}")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    draft.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk; folders cannot be flushed on every system."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _own_hash(manifest: dict[str, Any]) -> str:
    """Of a manifest without its own hash, however its JSON is laid out."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def remove_drafts(root: Path) -> None:
    """Delete what an interrupted save left under a temporary name. The caller holds the run folder."""
    for folder in root.glob(f"{TEMPORARY}*") if root.is_dir() else ():
        shutil.rmtree(folder, ignore_errors=True)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints; torn ones older than those go too."""
    whole = 0
    for folder in step_folders(root):
        if whole >= keep:
            grave = folder.with_name(f"{TEMPORARY}old-{folder.name}")
            with contextlib.suppress(OSError):
                folder.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)
        else:
            whole += not _fault(folder, hashes=False)


def _fault(folder: Path, *, hashes: bool = True) -> str:
    """What is wrong with the folder, or nothing. `hashes=False` looks at names and sizes alone."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files, own_hash = manifest["files"].items(), manifest["sha256"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if own_hash != _own_hash(manifest):
        return f"its {MANIFEST} has changed since it was written"
    for name, expected in files:
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
        if hashes and _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return ""


def verify(folder: Path) -> None:
    """Check the folder against its manifest.

    Raises:
        CheckpointError: torn, truncated or altered files, or a format of a newer version.
    """
    fault = _fault(folder)
    if fault:
        raise CheckpointError(f"checkpoint {folder} is damaged: {fault}; use an older checkpoint of the run")
    _check_format(folder)


def _check_format(folder: Path) -> None:
    version = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CheckpointError(f"checkpoint {folder} has format {version}; this version reads up to "
                              f"{FORMAT_VERSION}; update hybridlm")


def newest(root: Path) -> Path | None:
    """The newest whole checkpoint under `root`; damaged ones are passed over with a warning each.

    Raises:
        CheckpointError: it has a format of a newer version.
    """
    for folder in step_folders(root):
        fault = _fault(folder)
        if not fault:
            _check_format(folder)
            return folder
        log.warning("checkpoint %s is damaged (%s): looking for an older one", folder, fault)
    return None


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by `path`: a checkpoint itself, or the newest whole one of a run folder.

    Raises:
        CheckpointError: nothing there, or nothing whole; or a format of a newer version.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise CheckpointError(f"no checkpoint at {folder}: the path does not exist")
    if (folder / MANIFEST).exists() or step_of(folder) is not None:
        verify(folder)
        return folder
    root = folder if step_folders(folder) else folder / "checkpoints"
    found = newest(root)
    if found is None:
        raise CheckpointError(f"no whole checkpoint in {folder}: expected a checkpoint folder (step-N) or a "
                              "run folder that has one")
    return found


def read_tensors(folder: Path, stem: str, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `stem`, one at a time."""
    from safetensors import safe_open

    for file in sorted([*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")]):
        with safe_open(file, framework="pt", device=device) as reader:
            for name in reader.keys():  # noqa: SIM118  (not a dict)
                yield name, reader.get_tensor(name)


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of the run that wrote the checkpoint."""
    from hybridlm.config.convert import load_yaml

    return load_yaml(folder / "config.yaml")


def read_model_config(folder: Path) -> ModelConfig:
    """The checkpoint's model, checked against its explicit layer list.

    Raises:
        CheckpointError: the list is not what the config says now.
    """
    from hybridlm.config.convert import from_dict
    from hybridlm.model.config import ModelConfig

    config = from_dict(ModelConfig, read_config(folder)["model"], "model")
    saved = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    if saved != layer_list(config):
        raise CheckpointError(f"the layer list of {folder} is not what its config gives: "
                              + "; ".join(layer_diff(saved, layer_list(config))))
    return config


def layer_list(config: ModelConfig) -> list[dict[str, Any]]:
    """One entry a layer: mixer name, mixer kind, kind of feed-forward."""
    return [{"layer": index, "mixer": name, "kind": config.mixers[name].kind,
             "feed_forward": "moe" if config.feed_forward.is_moe(index) else "dense"}
            for index, name in enumerate(config.layers())]


def layer_diff(saved: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Readable differences between two layer lists."""
    lines = [f"{len(saved)} layers saved, {len(now)} asked for"] if len(saved) != len(now) else []
    for a, b in zip(saved, now, strict=False):
        changes = [f"{key} {a.get(key)} -> {b.get(key)}" for key in ("mixer", "kind", "feed_forward")
                   if a.get(key) != b.get(key)]
        if changes:
            lines.append(f"layer {a['layer']}: {', '.join(changes)}")
    return lines


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and saved buffers; a tensor with several names (tied) under its first."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def load_weights(model: nn.Module, folder: Path, may_lack: str | None = None,
                 part: Callable[[str, Tensor], Tensor] | None = None) -> list[str]:
    """Copy the checkpoint's weights into `model`, all of them by name; the names of those it lacks.

    `may_lack` is a shell pattern over names: these stay as they are where the checkpoint does not have them.
    `part` gives what the model holds of a named tensor, where it is not all of it.

    Raises:
        CheckpointError: another weight is missing, one is left over, or of another shape.
    """
    import torch

    from hybridlm.distributed.partition import fill, shape_of

    wanted = unique_tensors(model)
    problems, left = [], set(wanted)
    with torch.no_grad():
        for name, whole in read_tensors(folder, "model"):
            tensor = whole if part is None else part(name, whole)
            if name not in wanted:
                problems.append(f"the model has no '{name}'")
            elif shape_of(wanted[name]) != tensor.shape:
                problems.append(f"'{name}' is {list(tensor.shape)} there and {list(shape_of(wanted[name]))} here")
            else:
                fill(wanted[name], tensor)
            left.discard(name)
    lacking = sorted(name for name in left if may_lack is not None and fnmatchcase(name, may_lack))
    problems += [f"'{name}' is not in the checkpoint" for name in sorted(left - set(lacking))]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise CheckpointError(f"the weights of {folder} do not fit the model: " + "; ".join(problems[:4]) + more)
    return lacking


def load_checkpoint(path: str | os.PathLike[str], device: str = "cpu") -> HybridLM:
    """The model of a checkpoint or of a run folder's newest one, in evaluation mode, with `.tokenizer` set.

    Raises:
        CheckpointError: nothing there, damaged files, or weights that do not fit.
    """
    from hybridlm.data.tokenizer import Tokenizer
    from hybridlm.model.model import build_model

    folder = resolve(path)
    model = build_model(read_model_config(folder), device=device)
    load_weights(model, folder)
    has_tokenizer = (folder / "tokenizer.json").exists()
    model.tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None  # type: ignore[assignment]
    return model.eval()


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer a checkpoint was trained with.

    Raises:
        CheckpointError: the checkpoint holds none.
    """
    from hybridlm.data.tokenizer import Tokenizer

    folder = resolve(path)
    if not (folder / "tokenizer.json").exists():
        raise CheckpointError(f"checkpoint {folder} holds no tokenizer.json")
    return Tokenizer.from_folder(folder)


def model_texts(config: Any, model: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, str]:
    """The files that let a checkpoint be used without its run; `config` is the resolved one, of a run or of
    `{"model": ...}` alone."""
    from hybridlm.config.convert import to_yaml

    texts = {"config.yaml": to_yaml(config), "layers.json": json.dumps(layer_list(model), indent=1)}
    if tokenizer is not None:
        texts |= tokenizer.files()
    return texts
