"""Typed configuration of a run, all but the model (`hybridlm.model.config`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from hybridlm.distributed.engine_config import EngineConfig
from hybridlm.distributed.engines.single import SingleConfig
from hybridlm.errors import require
from hybridlm.model.config import ModelConfig
from hybridlm.model.loss_names import known_losses
from hybridlm.optimizers import AdamWConfig, OptimizerConfig


@dataclass(kw_only=True)
class DataSourceConfig:
    """One source of documents.

    `path`: `stdlib` (the Python standard library's own sources), a file, folder or glob pattern (.txt .md .py
    .jsonl .jsonl.gz .parquet), or a `datasets` dataset by name (owner/name) or saved folder.
    """

    path: str = "stdlib"
    format: Literal["auto", "stdlib", "text", "jsonl", "parquet", "dataset"] = "auto"
    text_field: str = "text"
    split: str = "train"
    name: str | None = None  # configuration name of a `datasets` dataset
    document_separator: str | None = None  # text files: cut each file into documents here
    weight: float = 1.0  # share of the samples in a mixture, relative to the other sources
    invalid_utf8: Literal["error", "replace"] = "error"

    def __post_init__(self) -> None:
        require(0 < self.weight < math.inf, "weight", "must be positive and finite", got=self.weight)
        require(self.document_separator != "", "document_separator", "is empty",
                expected="a text that stands between documents, or null")


@dataclass(kw_only=True)
class DataConfig(DataSourceConfig):
    """Where tokens come from. `mixture` replaces `path` by several weighted sources."""

    mixture: list[DataSourceConfig] = field(default_factory=list)
    tokenizer: str = "bytes"  # bytes | bpe (trained on the corpus) | a tokenizer.json, folder or name
    tokenizer_vocab_size: int = 4096  # for bpe
    tokenizer_eos: str | None = None  # the end-of-text token, where the tokenizer's files do not name it
    validation_fraction: float = 0.02  # of the documents, chosen by a hash of their content
    validation_path: str | None = None  # another source for validation; then the fraction is unused
    validation_split: str | None = None  # split of a `datasets` dataset to validate on; then likewise
    cache_dir: str | None = None  # prepared shards; default: a folder in the user's cache
    shard_tokens: int = 50_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.validation_fraction < 1, "validation_fraction", "must be a share of the documents",
                got=self.validation_fraction, expected="at least 0 and below 1")
        require(not (self.mixture and self.validation_split and not self.validation_path), "validation_split",
                "needs validation_path beside a mixture", got=self.validation_split)
        for key in ("shard_tokens", "tokenizer_vocab_size"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))


@dataclass(kw_only=True)
class StageConfig:
    """One stage of a recipe. null takes the value of `training` (or `optimizer.lr`), or of the model's indexers.

    `attention_mode` and `topk` are those of layers with an indexer. `loss_weights` replaces the weights of losses by
    name. `eval_recall`: validation also measures the selections against the dense attention, at its cost.
    `recall_every`: so does one training step in so many; null: none.
    """

    name: str
    steps: int | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    trainable: list[str] = field(default_factory=lambda: ["*"])  # shell patterns over parameter names
    attention_mode: Literal["dense", "sparse"] | None = None
    topk: int | None = None
    loss_weights: dict[str, float] = field(default_factory=dict)
    eval_recall: bool = False
    recall_every: int | None = None

    def __post_init__(self) -> None:
        for key in ("steps", "tokens", "sequence_length", "batch_size", "lr", "topk", "recall_every"):
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, key, "must be positive and finite", got=value)
        require(self.steps is None or self.tokens is None, "tokens", "cannot stand beside 'steps'",
                got=self.tokens, expected="one of the two")
        require(len(self.trainable) > 0, "trainable", "names no parameter", got=self.trainable,
                expected="patterns over parameter names; ['*'] is all of them")
        for name, weight in self.loss_weights.items():
            losses = known_losses()
            require(name in losses, f"loss_weights.{name}", "is not a loss", expected=f"one of {', '.join(losses)}")
            require(weight >= 0, f"loss_weights.{name}", "must not be negative", got=weight)


@dataclass(kw_only=True)
class RecipeConfig:
    """A run is a list of stages, one after the other.

    With `indexer` (options of an IndexerConfig) the run converts the checkpoint `init_from` into sparse attention: the
    model is the checkpoint's, with that indexer in `layers` (null: every full attention layer).
    """

    name: str = "pretrain"
    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig(name="pretrain")])
    indexer: dict[str, Any] | None = None
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        require(len(self.stages) > 0, "stages", "is empty", expected="at least one stage")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), "stages", "two stages have one name", got=names)
        require(self.layers is None or self.indexer is not None, "layers", "needs an indexer to put into them",
                got=self.layers, hint="recipe=dsa_tiny, or set recipe.indexer")


@dataclass(kw_only=True)
class TrainingConfig:
    """One training run. Batch size is global, in sequences."""

    steps: int = 1000
    tokens: int | None = None  # instead of steps: rounded up to whole steps
    sequence_length: int = 512
    batch_size: int = 8
    micro_batch_size: int | None = None  # sequences a forward; the rest is gradient accumulation
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU that has it, else fp32
    grad_clip: float = 1.0
    activation_checkpointing: bool = False
    log_every: int = 10  # steps between printed lines; metrics.jsonl has every step
    eval_every: int = 100  # 0: only at the end
    eval_batches: int = 16
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    async_checkpoint: bool = True  # written while training goes on, from a copy on the host; false: training waits
    resume: Literal["auto", "never", "require"] = "auto"
    max_bad_steps: int = 10  # non-finite steps in a row before the run stops
    record_samples: bool = False  # which samples each process computed in each step, in samples-RANK.jsonl

    def __post_init__(self) -> None:
        for key in ("steps", "sequence_length", "batch_size", "log_every", "checkpoint_every",
                    "keep_checkpoints", "max_bad_steps"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        require(self.tokens is None or self.tokens > 0, "tokens", "must be positive", got=self.tokens)
        for key in ("grad_clip", "eval_every", "eval_batches"):
            require(getattr(self, key) >= 0, key, "must not be negative", got=getattr(self, key))
        micro = self.micro_batch_size
        require(micro is None or (micro > 0 and self.batch_size % micro == 0), "micro_batch_size",
                "must divide batch_size", got=micro, expected=f"a divisor of {self.batch_size}")


@dataclass(kw_only=True)
class TrackingConfig:
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "hybridlm"
    run_name: str | None = None


@dataclass(kw_only=True)
class Config:
    """A whole run, as `hybridlm train` composes it."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=SingleConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    kernels: dict[str, Any] = field(default_factory=dict)  # operation -> backend, and strict
    run_dir: str = "runs/default"
    init_from: str | None = None

    def __post_init__(self) -> None:
        require(bool(self.run_dir.strip()), "run_dir", "is empty", expected="a folder; run_dir=. is this one")
