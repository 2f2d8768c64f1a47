"""From a data config to tokens on disk: find the sources, load or train the tokenizer, build what is missing.

Every source is prepared on its own under a key of all that matters (files with sizes and times, reading options,
tokenizer, split, format), so a run with other mixture weights, or another run on the same data, reuses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hybridlm.config.schema import DataConfig, DataSourceConfig
from hybridlm.data.build import Advance, build, locked
from hybridlm.data.shards import FORMAT, TokenStore, read_manifest, shards_of, verify
from hybridlm.data.split import Part, Split, plan_split, plan_split_by_documents
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from hybridlm.errors import DataError
from hybridlm.sources import Source, is_hub_name, open_source

DATA_RULES = 2  # version of the split and of the order of samples; 1: by documents, and whole blocks of a mixture
BPE_BYTES = 1 << 28  # text that a tokenizer is trained on, divided among the sources by weight


@dataclass
class PreparedSource:
    """One source and the folder of its tokens."""

    path: str
    weight: float
    folder: Path
    manifest: dict[str, Any]

    def summary(self, part: str) -> dict[str, int]:
        """Count documents, tokens, bytes and the tokens of the longest document in `train` or `validation`."""
        shards = shards_of(self.manifest, part)
        return {"documents": sum(s.documents for s in shards), "tokens": sum(s.tokens for s in shards),
                "bytes": sum(s.bytes for s in shards), "longest_document": max((s.longest for s in shards), default=0)}

    def held_out(self) -> float:
        """The fraction of the text's bytes that is validation text."""
        train, validation = (self.summary(part)["bytes"] for part in ("train", "validation"))
        return validation / (train + validation)


@dataclass
class PreparedData:
    """The tokens that a run reads.

    `train` has one store per source, with its weight; `validation` all held-out documents, or None when the config asks
    for none (validation_fraction=0). `rules` is the version of the split and of the order of samples: a run that an
    earlier version began goes on with its own.
    """

    tokenizer: Tokenizer
    train: list[TokenStore]
    validation: TokenStore | None
    sources: list[PreparedSource]
    cache: Path
    rules: int = DATA_RULES

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the tokenizer, all tokens and borders, and the weights; the place of files does not count."""
        return digest([self.tokenizer.fingerprint, [[s.weight, s.manifest["shards"]] for s in self.sources]])

    @property
    def tokens(self) -> int:
        """Training tokens of all sources, each counted once."""
        return sum(store.num_tokens for store in self.train)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the training text of all sources."""
        return sum(store.num_bytes for store in self.train)

    @property
    def documents(self) -> int:
        """Training documents of all sources."""
        return sum(store.num_documents for store in self.train)

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per training token, ends of text included, with the sources mixed by their weights."""
        total = sum(store.weight for store in self.train)
        return sum(store.weight / total * store.num_bytes / store.num_tokens for store in self.train)

    def epochs(self, num_tokens: int) -> list[float]:
        """Passes over each training source that a run of `num_tokens` tokens makes, in the order of `train`.

        Args:
            num_tokens: tokens that the run reads, of all sources together.
        """
        total = sum(store.weight for store in self.train)
        return [num_tokens * store.weight / total / store.num_tokens for store in self.train]

    def unread_sources(self, num_samples: int) -> list[str]:
        """Names of training sources whose weight gives them less than one of `num_samples` samples."""
        total = sum(store.weight for store in self.train)
        return [store.name for store in self.train if num_samples * store.weight < total]

    @property
    def held_out(self) -> float:
        """The fraction of the text's bytes that is validation text."""
        validation = 0 if self.validation is None else self.validation.num_bytes
        return validation / (self.bytes + validation)

    def report(self) -> dict[str, Any]:
        """Make the report that `hybridlm prepare` prints, as plain data."""
        rows = [{"path": s.path, "weight": s.weight, "folder": str(s.folder), **s.manifest["counts"],
                 "held_out": s.held_out(), "train": s.summary("train"), "validation": s.summary("validation")}
                for s in self.sources]
        total = {part: {key: sum(row[part][key] for row in rows) for key in ("documents", "tokens", "bytes")}
                 for part in ("train", "validation")}
        return {"tokenizer": {"name": self.tokenizer.name, "vocab_size": self.tokenizer.vocab_size,
                              "eos": self.tokenizer.eos, "eos_id": self.tokenizer.eos_id},
                "cache": str(self.cache), "fingerprint": self.fingerprint, "bytes_per_token": self.bytes_per_token,
                "sources": rows, **total}


@dataclass
class _SourceJob:
    """One source to prepare; `everything` names the part that gets all of it, None splits it."""

    config: DataSourceConfig
    source: Source
    fraction: float
    everything: Part | None
    rules: int
    identity: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.identity = {"source": self.source.fingerprint(), "fraction": self.fraction, "everything": self.everything}
        if self.rules > 1 and not self.everything:
            self.identity["split"] = "bytes"

    @cached_property
    def split(self) -> Split:
        if self.everything:
            return Split(everything=self.everything)
        texts = (document.text for _, _, document in self.source.documents())
        plan = plan_split if self.rules > 1 else plan_split_by_documents
        return plan(texts, self.fraction, self.source.label)

    def training_texts(self, limit: float) -> Iterator[str]:
        """Yield training documents up to `limit` bytes, the last one cut."""
        for _, _, document in self.source.documents():
            for part, text in self.split.parts(document.text) if document.text else ():
                if part == "train":
                    yield text[:int(limit)].decode("utf-8", "ignore")
                    limit -= len(text)
                    if limit < 1:
                        return


def digest(value: Any) -> str:
    """Hash anything that JSON can hold into 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def cache_root(config: DataConfig) -> Path:
    """The folder of prepared data: `cache_dir`, or `hybridlm` in the user's cache folder."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "hybridlm"


def _make_cache(config: DataConfig) -> Path:
    root = cache_root(config)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{root}: the cache folder cannot be made ({error.strerror}); set data.cache_dir") from error
    return root


def prepare(config: DataConfig, progress: bool = True, verify: bool = False,
            rules: int = DATA_RULES) -> PreparedData:
    """Make the tokens of all sources, or find them in the cache.

    Processes may call this at the same time: one builds, the others wait. A call that was killed is continued
    from its finished shards.

    Args:
        config: the data section of a run.
        progress: show progress bars on a terminal.
        verify: recompute every checksum, also of large shards.
        rules: version of the split and of the order of samples; `checkpoint.data_rules` says that of a checkpoint.

    Raises:
        DataError: a source, tokenizer or prepared shard that cannot be used.
    """
    root = _make_cache(config)
    jobs = _jobs(config, rules)
    tokenizer = _tokenizer(config, jobs, root)
    with ExitStack() as stack:
        bar = _ProgressBars(stack) if progress else None
        folders = [_build(job, tokenizer, config, root, bar) for job in jobs]
    sources, train, held_out = [], [], []
    for job, folder in zip(jobs, folders, strict=True):
        manifest = _open(folder, verify)
        sources.append(PreparedSource(job.source.label, job.config.weight, folder, manifest))
        shards = {part: [(folder, shard) for shard in shards_of(manifest, part)] for part in ("train", "validation")}
        held_out += shards["validation"]
        if job.everything != "validation":
            train.append(TokenStore(shards["train"], tokenizer.byte_lengths, name=job.source.label,
                                    weight=job.config.weight))
    validation = TokenStore(held_out, tokenizer.byte_lengths, name="validation") if held_out else None
    return PreparedData(tokenizer, train, validation, sources, root, rules)


def train_tokenizer(config: DataConfig) -> Tokenizer:
    """Train the tokenizer that `data.tokenizer=bpe` gives for these sources, or find it in the cache.

    Args:
        config: the data section of a run; its `tokenizer` is not read.

    Raises:
        DataError: a source that cannot be used, or a vocabulary without room for every byte.
    """
    root = _make_cache(config)
    return _tokenizer(replace(config, tokenizer="bpe"), _jobs(config, DATA_RULES), root)


def check_sources(config: DataConfig) -> None:
    """Check that the sources of a run are there, without reading them; names on the hub are not looked up.

    Raises:
        DataError: as `prepare`, where a file or folder is missing, empty or of no known kind.
    """
    held_out = [replace(config, path=config.validation_path, format="auto")] if config.validation_path else []
    for source in [*config.sources(), *held_out]:
        if not is_hub_name(source):
            open_source(source)


def _jobs(config: DataConfig, rules: int) -> list[_SourceJob]:
    fraction = config.validation_fraction
    held_out = []
    if config.validation_path or config.validation_split:
        given = replace(config, path=config.validation_path or config.path, weight=1.0,
                        format="auto" if config.validation_path else config.format,
                        split=config.validation_split or config.split)
        held_out = [_SourceJob(given, open_source(given), 0.0, "validation", rules)]
        fraction = 0.0
    files = frozenset(unit.path for job in held_out for unit in job.source.units if unit.path)
    everything: Part | None = None if fraction else "train"
    return [_SourceJob(c, open_source(c, files), fraction, everything, rules)
            for c in config.sources()] + held_out


def _tokenizer(config: DataConfig, jobs: list[_SourceJob], root: Path) -> Tokenizer:
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer, config.tokenizer_eos)
    jobs = [job for job in jobs if job.everything != "validation"]
    fractions = [job.config.weight / sum(j.config.weight for j in jobs) for job in jobs]
    key = digest([FORMAT, config.tokenizer_vocab_size, BPE_BYTES, fractions, [job.identity for job in jobs]])
    folder = root / "tokenizers" / key
    if not folder.is_dir():
        with locked(root, f"tokenizer-{key}"):
            if not folder.is_dir():
                _train_tokenizer(config.tokenizer_vocab_size, jobs, fractions, folder)
    return Tokenizer.from_folder(folder)


def _train_tokenizer(vocab_size: int, jobs: list[_SourceJob], fractions: list[float], folder: Path) -> None:
    texts = (t for job, fraction in zip(jobs, fractions, strict=True) for t in job.training_texts(BPE_BYTES * fraction))
    trained = train_bpe(texts, vocab_size)
    draft = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    trained.save(draft)
    os.replace(draft, folder)


def _build(job: _SourceJob, tokenizer: Tokenizer, config: DataConfig, root: Path, bar: _ProgressBars | None) -> Path:
    identity = {"format": FORMAT, **job.identity, "tokenizer": tokenizer.fingerprint, "shard": config.shard_tokens}
    if tokenizer.acts_at_edges and job.rules > 1:
        identity["edges"] = "of documents"  # not of the pieces of long ones, as in version 1
    folder = root / "data" / digest(identity)
    if not folder.is_dir():
        description = {"key": folder.name, "fraction": job.fraction, "everything": job.everything,
                       "options": job.source.options}
        with locked(root, folder.name):
            if not folder.is_dir():
                advance = bar.task(job.source) if bar else lambda done: None
                build(job.source, tokenizer, lambda: job.split, folder, config.shard_tokens, description, advance)
    return folder


def _open(folder: Path, force: bool) -> dict[str, Any]:
    manifest = read_manifest(folder)
    verify(folder, manifest, force)
    return manifest


class _ProgressBars:
    """One progress bar per source on the error stream; silent where that is not a terminal."""

    def __init__(self, stack: ExitStack):
        self.stack = stack
        self.bars: Any = None

    def task(self, source: Source) -> Advance:
        """Add a bar and return the function that is told the bytes done."""
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        if self.bars is None:
            console = Console(stderr=True)
            self.bars = self.stack.enter_context(Progress(
                TextColumn("preparing {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
                console=console, disable=not console.is_terminal))
        task = self.bars.add_task(source.label, total=sum(unit.size for unit in source.units))
        return lambda done: self.bars.update(task, completed=done)
