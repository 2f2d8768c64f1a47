"""Writes checkpoints: a thread of each rank writes under a temporary name, then all ranks together rename."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridlm.checkpoint.folder import DRAFT_PREFIX, manifest_entry, seal, swap_in
from hybridlm.distributed.communicator import SINGLE_PROCESS, Communicator

SHARD_BYTES = 4 * 2**30  # per file; a file's tensors are freed once it is written


class Save:
    """A checkpoint that is being written to `root/step-N`, where it appears complete or not at all.

    1. All ranks make it together, each with the tensors it owns, which must not change until they are written: the
       first opens a draft, and files are numbered through all ranks.
    2. A thread of each rank, which calls no collective operation, writes, flushes and hashes the rank's files.
    3. `publish`, by all ranks together: the first writes the manifest and gives the draft its name.

    A process that is killed before the draft has its name leaves a draft that is never taken for a checkpoint.
    """

    def __init__(self, root: Path, step: int, texts: dict[str, str], tensors: dict[str, dict[str, Tensor]],
                 ranks: Communicator = SINGLE_PROCESS):
        self.step = step
        self.ranks = ranks
        self.target = root / f"step-{step}"
        self._draft: Path = ranks.on_main(lambda: _open_draft(root, step))
        files = _files(tensors, ranks)
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[dict[str, Any]] = thread.submit(
            _write_files, self._draft, files, texts if ranks.rank == 0 else {})
        thread.shutdown(wait=False)

    @property
    def written(self) -> bool:
        """Whether this rank's thread has ended, with success or not."""
        return self._writing.done()

    def publish(self) -> Path:
        """Wait for the threads of all ranks and make the checkpoint visible; returns its folder.

        Raises:
            OSError: the disk is full or fails for one of the ranks; nothing but older checkpoints is left then.
        """
        try:
            by_rank = self.ranks.run_on_all(self._writing.result)
            written = {name: one for entries in by_rank for name, one in entries.items()}
            self.ranks.on_main(lambda: self._name(written))
        except BaseException:
            if self.ranks.rank == 0:
                shutil.rmtree(self._draft, ignore_errors=True)
            raise
        return self.target

    def _name(self, written: dict[str, Any]) -> None:
        seal(self._draft, self.step, written)
        swap_in(self._draft, self.target)


def write(root: Path, step: int, texts: dict[str, str], tensors: dict[str, dict[str, Tensor]],
          ranks: Communicator = SINGLE_PROCESS) -> Path:
    """Write `root/step-N` and wait for it; returns the folder. An older folder of the same name is replaced.

    Args:
        root: folder of checkpoints.
        step: N.
        texts: text files by name.
        tensors: tensors by name, by the stem of their safetensors file.
        ranks: processes that each write their own tensors.

    Raises:
        OSError: as `Save.publish`.
    """
    return Save(root, step, texts, tensors, ranks).publish()


def _open_draft(root: Path, step: int) -> Path:
    draft = root / f"{DRAFT_PREFIX}step-{step}-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def _files(tensors: dict[str, dict[str, Tensor]], ranks: Communicator) -> dict[str, dict[str, Tensor]]:
    """Return this rank's tensors by the file they go to; files are numbered through all ranks."""
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
        shards[-1][name] = tensor.detach()
        used += size
    return shards


def _write_files(folder: Path, files: dict[str, dict[str, Tensor]], texts: dict[str, str]) -> dict[str, Any]:
    """Write files and return their entries in the manifest, by name."""
    written = {name: _write_tensors(folder / name, files.pop(name)) for name in list(files)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        written[name] = manifest_entry(folder / name)
    return written


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors raises this for errors of the disk too
        raise OSError(str(error)) from error
    return manifest_entry(file)
