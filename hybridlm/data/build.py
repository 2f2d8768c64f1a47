"""Turns one source into a folder of token shards, once, and goes on from the finished shards after a crash.

    KEY.partial/               while it is being built
      train-00000.bin, .ends   finished shards
      part-00000.json          what is finished, and the first document that is not; written after its shards
    KEY/                       the finished folder, renamed once manifest.json is in it
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybridlm.data.shards import FORMAT, MANIFEST, Shard, ShardWriter, check_shard
from hybridlm.data.split import Part, Split
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import DataError
from hybridlm.files import try_lock, wait_for_lock, write_json
from hybridlm.sources import Document, Source

BATCH_BYTES = 1 << 22  # text that is encoded at once, at most
BATCH_DOCUMENTS = 1024  # documents that are encoded at once, at most
PARTS: tuple[Part, Part] = ("train", "validation")

log = logging.getLogger("hybridlm")
Advance = Callable[[float], None]


@contextlib.contextmanager
def locked(root: Path, key: str) -> Iterator[None]:
    """Let one process at a time prepare the data `key` of a cache; the others wait.

    Args:
        root: the cache folder.
        key: name of the data.
    """
    file = root / "locks" / f"{key}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = try_lock(file)
    if lock is None:
        log.info("another process is preparing the same data: waiting for it")
        lock = wait_for_lock(file)
    try:
        yield
    finally:
        lock.release()


@dataclass
class State:
    """Progress of a build: all documents before number `next_document` of unit `unit` are in finished shards."""

    unit: int = 0
    next_document: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"empty_documents": 0, "replaced_documents": 0})
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {part: [] for part in PARTS})
    commits: int = 0

    def commit(self, folder: Path, new: dict[Part, Shard]) -> None:
        """Record finished shards on disk and here."""
        for part, shard in new.items():
            self.shards[part].append(shard)
        write_json(folder / f"part-{self.commits:05d}.json", {
            "shards": {part: asdict(shard) for part, shard in new.items()},
            "next": [self.unit, self.next_document], "counts": self.counts}, flush=True)
        self.commits += 1

    @classmethod
    def recover(cls, folder: Path) -> State:
        """Read the progress of an earlier process from `folder`; from a damaged shard on, all is built again."""
        state = cls()
        for index in range(1_000_000):
            file = folder / f"part-{index:05d}.json"
            try:
                part = json.loads(file.read_text(encoding="utf-8"))
                shards = {name: Shard(**shard) for name, shard in part["shards"].items()}
                for shard in shards.values():
                    check_shard(folder, shard, hashes=True)
            except FileNotFoundError:
                break
            except (DataError, ValueError, KeyError, TypeError) as error:
                log.warning("unfinished data in %s is damaged: going on from before it (%s)", folder, error)
                break
            for name, shard in shards.items():
                state.shards[name].append(shard)
            (state.unit, state.next_document), state.counts = part["next"], part["counts"]
            state.commits = index + 1
        return state


def build(source: Source, tokenizer: Tokenizer, split: Callable[[], Split], target: Path, shard_tokens: int,
          description: dict[str, Any], advance: Advance) -> None:
    """Turn a source into the folder `target` of token shards, going on from what an earlier process finished.

    The caller has the lock and has seen that `target` is not there.

    Args:
        source: the documents.
        tokenizer: makes their tokens.
        split: makes the rule of training and validation; called only where shards are missing.
        target: the folder.
        shard_tokens: tokens per shard, about.
        description: facts for the manifest.
        advance: is told the bytes of text that are done.

    Raises:
        DataError: what a source can raise; no text; no room to write.
    """
    folder = target.with_name(f"{target.name}.partial")
    try:
        if not (folder / MANIFEST).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            state = State.recover(folder)
            if state.commits:
                log.info("going on with %s from finished shard %d", source.label, state.commits)
            _write_shards(source, tokenizer, split(), folder, shard_tokens, state, advance)
            write_json(folder / MANIFEST, _manifest(source, tokenizer, state, description), flush=True)
        for leftover in (*folder.glob("part-*.json"), *folder.glob("*.tmp*")):
            leftover.unlink()
        os.replace(folder, target)
    except OSError as error:
        raise DataError(f"{target.parent}: prepared tokens cannot be written there ({error}); "
                        "make room, or set data.cache_dir to another folder") from error


def _write_shards(source: Source, tokenizer: Tokenizer, split: Split, folder: Path, shard_tokens: int,
                  state: State, advance: Advance) -> None:
    writers: dict[Part, ShardWriter] = {}
    finished = sum(unit.size for unit in source.units[:state.unit])
    in_unit = 0
    try:
        for batch in _batches(source.documents(state.unit, state.next_document)):
            texts: list[tuple[Part, bytes]] = []
            for unit, place, document in batch:
                if unit != state.unit:
                    finished += sum(u.size for u in source.units[state.unit:unit])
                    in_unit = 0
                in_unit += len(document.text)
                state.unit, state.next_document = unit, place + 1
                state.counts["replaced_documents"] += document.replaced
                state.counts["empty_documents"] += not document.text
                texts += split.parts(document.text) if document.text else ()
            encoded = tokenizer.encode_documents([text for _, text in texts])
            for (part, text), ids in zip(texts, encoded, strict=True):
                if len(ids) == 0:  # a normaliser can leave nothing of a text
                    state.counts["empty_documents"] += 1
                    continue
                if part not in writers:
                    writers[part] = ShardWriter(folder, f"{part}-{state.commits:05d}", tokenizer.dtype)
                writers[part].add(ids, tokenizer.eos_id, len(text))
            advance(finished + min(in_unit, source.units[state.unit].size))
            if any(writer.tokens >= shard_tokens for writer in writers.values()):
                state.commit(folder, {part: writer.finish() for part, writer in writers.items()})
                writers.clear()
        if writers:
            state.commit(folder, {part: writer.finish() for part, writer in writers.items()})
    finally:
        for writer in writers.values():
            writer.close()
    advance(sum(unit.size for unit in source.units))


def _batches(documents: Iterator[tuple[int, int, Document]]) -> Iterator[list[tuple[int, int, Document]]]:
    batch, size = [], 0
    for item in documents:
        batch.append(item)
        size += len(item[2].text)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _manifest(source: Source, tokenizer: Tokenizer, state: State, description: dict[str, Any]) -> dict[str, Any]:
    if not any(state.shards.values()):
        raise DataError(f"{source.label}: no text found; all {state.counts['empty_documents']} documents are empty")
    wanted = [description["everything"]] if description.get("everything") else PARTS
    for part in wanted:
        if not state.shards[part]:
            raise DataError(f"{source.label}: the split leaves no {part} documents; add text, change "
                            "data.validation_fraction, or set data.validation_path")
    return {"format": FORMAT, "source": source.label, **description,
            "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "eos_id": tokenizer.eos_id,
                          "vocab_size": tokenizer.vocab_size},
            "counts": {"files": len(source.units), "ignored_files": source.ignored,
                       "left_out_files": source.left_out, **state.counts},
            "shards": {part: [asdict(shard) for shard in state.shards[part]] for part in PARTS}}
