"""The typed config of a run, section by section.

The model's stands in `hybridlm.model.config`, those of kinds (mixers, feed-forwards, residuals, optimizers, engines) in
the files of the kinds. docs/configuration.md lists all keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from hybridlm.distributed.engines import ENGINES, EngineConfig
from hybridlm.errors import require
from hybridlm.model.config import ModelConfig
from hybridlm.model.loss_names import known_losses
from hybridlm.model.mixers.contract import AttentionMode
from hybridlm.optimizers import OPTIMIZERS, OptimizerConfig
from hybridlm.optimizers.lr_schedule import LRScheduleConfig
from hybridlm.sources import check_format

NEW_MIXERS = "@new"  # among patterns over parameter names: those of converted mixers
SELECTORS_OF_KEYS = "@selector"  # those of selectors that a loss of their own trains


@dataclass(kw_only=True)
class DataSourceConfig:
    """One source of documents."""

    path: str = "stdlib"
    """`stdlib` (the Python standard library's own sources), a file, folder or glob pattern (.txt .md .py .jsonl
    .json .parquet, also compressed: .gz .zst .bz2 .xz), or a `datasets` dataset by name (owner/name) or a saved
    folder."""
    format: str = "auto"
    """The format of `path`: stdlib, text, jsonl, parquet, dataset, or one of your own; `auto` recognises it by its name
    and by what is there."""
    text_field: str = "text"
    """The field that holds the text, of JSON lines, parquet files and datasets."""
    split: str = "train"
    """Split of a `datasets` dataset."""
    name: str | None = None
    """Configuration name of a `datasets` dataset."""
    document_separator: str | None = None
    """Text files are cut into documents at this text; null: each file is one document."""
    weight: float = 1.0
    """Proportion of the samples in a mixture, relative to the weights of the other sources."""
    invalid_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are not UTF-8: stop, or put U+FFFD in their place."""

    def options(self) -> dict[str, Any]:
        """Return the path and those options that are not the default.

        Example:
            >>> DataSourceConfig(path="texts/", weight=3).options()
            {'path': 'texts/', 'weight': 3}
        """
        usual = DataSourceConfig(path=self.path)
        named = ((option.name, getattr(self, option.name)) for option in fields(DataSourceConfig))
        return {name: value for name, value in named if name == "path" or value != getattr(usual, name)}

    def __post_init__(self) -> None:
        check_format(self.format)
        require(0 < self.weight < math.inf, "weight", "must be positive and finite", got=self.weight)
        require(self.document_separator != "", "document_separator", "is empty",
                expected="a text that stands between documents, or null")


@dataclass(kw_only=True)
class DataConfig(DataSourceConfig):
    """The source of a run's tokens, its tokenizer and its validation documents."""

    mixture: list[DataSourceConfig] = field(default_factory=list)
    """Several weighted sources, in place of `path`."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe` (trained on the corpus), or a tokenizer.json, a folder with one, a run or checkpoint folder, or a
    name on the hub."""
    tokenizer_vocab_size: int = 4096
    """Tokens of a `bpe` tokenizer."""
    tokenizer_eos: str | None = None
    """The end-of-text token, where the tokenizer's files do not name it."""
    validation_fraction: float = 0.02
    """Fraction of the text's bytes that is kept for validation, documents chosen by a hash of their content."""
    validation_path: str | None = None
    """Another source for validation, in place of the fraction."""
    validation_split: str | None = None
    """Split of a `datasets` dataset for validation, in place of the fraction."""
    cache_dir: str | None = None
    """Folder for prepared token shards; null: one in the user's cache."""
    shard_tokens: int = 50_000_000
    """Tokens per shard file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.validation_fraction < 1, "validation_fraction", "must be a fraction of the bytes",
                got=self.validation_fraction, expected="at least 0 and below 1")
        require(not (self.mixture and self.validation_split and not self.validation_path), "validation_split",
                "needs validation_path beside a mixture", got=self.validation_split)
        for key in ("shard_tokens", "tokenizer_vocab_size"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))

    def sources(self) -> list[DataSourceConfig]:
        """The sources of training text: those of the mixture, or this one."""
        return list(self.mixture) or [self]


# By setting of a run: the keys of a stage any of which replaces it there, as `plan_stages` reads them.
REPLACED_BY_STAGE = {"training.steps": ("steps", "tokens"), "training.tokens": ("steps", "tokens"),
                     "training.sequence_length": ("sequence_length",), "training.batch_size": ("batch_size",),
                     "optimizer.lr": ("lr",), "optimizer.schedule": ("schedule",)}


@dataclass(kw_only=True)
class StageConfig:
    """One stage of a recipe. Options that are null take their value from `training`, `optimizer` or the model."""

    name: str
    """Name in logs and metrics; no two stages share one."""
    steps: int | None = None
    """Optimizer steps; null with `tokens` null: those that `training` says."""
    tokens: int | None = None
    """Tokens in place of steps, rounded up to whole steps."""
    sequence_length: int | None = None
    """Tokens per sequence; null: `training.sequence_length`."""
    batch_size: int | None = None
    """Sequences per step over all processes; null: `training.batch_size`."""
    lr: float | None = None
    """Peak learning rate; null: `optimizer.lr`."""
    schedule: LRScheduleConfig | None = None
    """Learning-rate schedule of this stage, with the keys of `optimizer.schedule`; null: `optimizer.schedule`."""
    trainable: list[str] = field(default_factory=lambda: ["*"])
    """Shell patterns over parameter names; all other parameters are frozen. `@new` stands for the mixers that
    `recipe.convert` has put in, `@selector` for the selectors of sparse attention that learn from a loss of their own:
    a stage that trains them alone is left out of a model whose selectors have no parameters."""
    attention_mode: AttentionMode | None = None
    """What layers with a selector of keys attend to: all keys, or those that it selects; null: the model's own."""
    dense_layers: list[int] = field(default_factory=list)
    """Layers with a selector that attend to all keys in this stage whatever `attention_mode` says, negative ones
    from the end."""
    topk: int | None = None
    """Keys that a query selects, whole blocks of them where blocks are selected; null: the model's own."""
    loss_weights: dict[str, float] = field(default_factory=dict)
    """Weights of losses by name (lm, mtp, z, balance, router_z, indexer_kl, selector_kl), in place of the model's own;
    with a teacher also layer_output, hidden and teacher_kl, which have none of their own."""
    eval_recall: bool = False
    """Validation also compares selections of keys with dense attention, which costs as much as that."""
    inputs: Literal["student", "teacher"] = "student"
    """What converted layers read and pass on: the model's own stream, or the teacher's, so that each learns its layer
    by itself, side by side with the others."""
    lr_scale: dict[str, float] = field(default_factory=dict)
    """Factors of the learning rate by shell pattern over parameter names; the first that matches counts."""
    temperature: float = 1.0
    """Temperature of both distributions in the loss teacher_kl."""
    recall_every: int | None = None
    """Training steps from one such comparison to the next; null: none in training."""

    def __post_init__(self) -> None:
        for key in ("steps", "tokens", "sequence_length", "batch_size", "lr", "topk", "recall_every"):
            value = getattr(self, key)
            require(value is None or 0 < value < math.inf, key, "must be positive and finite", got=value)
        require(self.steps is None or self.tokens is None, "tokens", "cannot stand beside 'steps'",
                got=self.tokens, expected="one of the two")
        require(self.temperature > 0, "temperature", "must be positive", got=self.temperature)
        for pattern, factor in self.lr_scale.items():
            require(0 < factor < math.inf, f"lr_scale.{pattern}", "must be positive and finite", got=factor)
        require(len(self.trainable) > 0, "trainable", "names no parameter", got=self.trainable,
                expected="patterns over parameter names; ['*'] is all of them")
        for name, weight in self.loss_weights.items():
            losses = known_losses()
            require(name in losses, f"loss_weights.{name}", "is not a loss", expected=f"one of {', '.join(losses)}")
            require(weight >= 0, f"loss_weights.{name}", "must not be negative", got=weight)

    def aligns_layers(self) -> bool:
        """Whether converted layers read the teacher's stream, or learn the outputs of its attention."""
        return self.inputs == "teacher" or self.loss_weights.get("layer_output", 0) > 0

    def compares_models(self) -> bool:
        """Whether the model learns from the teacher's predictions, or from its stream behind each layer."""
        return any(self.loss_weights.get(name, 0) > 0 for name in ("teacher_kl", "hidden"))


@dataclass(kw_only=True)
class ConvertConfig:
    """Other mixers in place of softmax attention of the checkpoint that a run starts from."""

    mixer: str | dict[str, Any] = "kda"
    """The new mixer: a name of `configs/mixer`, or options of a kind. Sizes that are left open follow the attention,
    blocks and budgets the longest sequence of the stages. A mixer that is itself attention with an indexer gives its
    indexer to the attention that is there."""
    keep: int | list[int] | str | None = None
    """Attention that stays: so many layers, evenly spread, or a list of layers, negative ones from the end, or a file
    of `hybridlm select`; null: a quarter, evenly spread. A run writes the list of layers here."""
    init: Literal["copy", "calibrated"] = "calibrated"
    """Start of the new mixers: `copy` takes q, k, v and o and leaves the rest as in pretraining; `calibrated` also sets
    decays, convolutions, gates and the scale of each head so that the layer starts near the attention."""
    calibration_tokens: int = 1024
    """Tokens of training text that `calibrated` looks at."""
    converted: list[int] | None = None
    """Layers that get the new mixer; a run writes them here."""

    def __post_init__(self) -> None:
        require(self.calibration_tokens > 1, "calibration_tokens", "must be two or more", got=self.calibration_tokens)


@dataclass(kw_only=True)
class RecipeConfig:
    """The stages of a run, one after the other, and what the run converts before the first."""

    name: str = "pretrain"
    """Name of the recipe, in error messages."""
    stages: list[StageConfig] = field(default_factory=lambda: [StageConfig(name="pretrain")])
    """At least one stage; each goes on with the weights of the one before."""
    indexer: dict[str, Any] | None = None
    """Options of an IndexerConfig: the model is that of `init_from`, with this indexer in `layers`. null: no
    conversion."""
    layers: list[int] | None = None
    """Layers that get the indexer, negative ones from the end; null: every full attention layer."""
    convert: ConvertConfig | None = None
    """Mixers that replace attention: the model is that of `teacher`, or of `init_from` where no stage compares with a
    teacher, with these in all but the kept layers. null: no conversion."""
    dense_below: int | None = None
    """Stages whose sequences are shorter attend to all keys, whatever their `attention_mode`; null: there is no such
    length."""

    def __post_init__(self) -> None:
        require(len(self.stages) > 0, "stages", "is empty", expected="at least one stage")
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names), "stages", "two stages have one name", got=names)
        require(self.layers is None or self.indexer is not None, "layers", "needs an indexer to put into them",
                got=self.layers, hint="recipe=dsa_tiny, or set recipe.indexer")
        require(self.dense_below is None or self.dense_below > 0, "dense_below", "must be positive",
                got=self.dense_below, hint="null has no such length")

    def parameter_patterns(self, patterns: Sequence[str], model: ModelConfig) -> list[str]:
        """Write `@new` and `@selector` among patterns out as parameters of the model; all others stay.

        Args:
            patterns: shell patterns over parameter names.
            model: whose selectors `@selector` names.

        Example:
            >>> from hybridlm import load_config
            >>> model = load_config("train", ["model=hybrid_tiny", "model.schedule.full=msa"]).model
            >>> recipe = RecipeConfig(convert=ConvertConfig(converted=[0, 2]))
            >>> recipe.parameter_patterns(["@new", "norm.weight", "@selector"], model)
            ['layers.0.mixer.*', 'layers.2.mixer.*', 'norm.weight', 'layers.3.mixer.selector.*']
        """
        converted = [] if self.convert is None else self.convert.converted or []
        places = {NEW_MIXERS: [f"layers.{layer}.mixer.*" for layer in converted],
                  SELECTORS_OF_KEYS: selector_patterns(model) if SELECTORS_OF_KEYS in patterns else []}
        return [name for pattern in patterns for name in places.get(pattern, [pattern])]

    def longest_sequence(self, otherwise: int) -> int:
        """Find the most tokens of a sequence in any stage; `otherwise` are those of a stage that leaves them open."""
        return max(stage.sequence_length or otherwise for stage in self.stages)

    def mode_of(self, stage: StageConfig, sequence_length: int) -> AttentionMode | None:
        """Find the mode of layers with a selector in a stage of sequences of this length."""
        short = self.dense_below is not None and sequence_length < self.dense_below
        return "dense" if short else stage.attention_mode


def selector_patterns(model: ModelConfig) -> list[str]:
    """List patterns over the names of all parameters of selectors that a loss of their own trains."""
    mixers = [(f"layers.{index}.mixer", name) for index, name in enumerate(model.layers())]
    if model.mtp.depth:
        mixers.append(("mtp.*.block.mixer", model.mtp.mixer or model.layers()[-1]))
    return [f"{place}.{pattern}" for place, name in mixers for pattern in model.mixers[name].selector_parameters()]


@dataclass(kw_only=True)
class TrainingConfig:
    """Length, batches and bookkeeping of a training run. A step is one update of the optimizer."""

    steps: int = 1000
    """Optimizer steps."""
    tokens: int | None = None
    """Tokens in place of steps, rounded up to whole steps."""
    sequence_length: int = 512
    """Tokens per sequence."""
    batch_size: int = 8
    """Sequences per step, over all processes."""
    micro_batch_size: int | None = None
    """Sequences per forward; gradients accumulate until the batch is complete. null: the whole batch at once."""
    seed: int = 0
    """Seed of the first weights and of the data order."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is autocast over fp32 weights; auto takes it on a GPU that has it."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass and compute everything else again."""
    compile: bool = False
    """Run each layer as one graph of torch.compile: the first steps take minutes, the others less time."""
    log_every: int = 10
    """Steps between printed lines; metrics.jsonl has every step."""
    eval_every: int = 100
    """Steps between validations; 0: only at the end."""
    eval_batches: int = 16
    """Batches of one validation."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay; older ones are deleted."""
    async_checkpoint: bool = True
    """A thread writes a copy of the state while training goes on; false: training waits."""
    resume: Literal["auto", "never", "require"] = "auto"
    """auto goes on where `run_dir` stopped, if it holds a run; `never` refuses such a folder, `require` any other."""
    max_bad_steps: int = 10
    """Steps in a row with a gradient that is not finite before the run stops."""
    record_samples: bool = False
    """Write down which samples each process computed in each step, in samples-RANK.jsonl."""

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
    """Tracking of metrics beside the run folder, by Weights & Biases."""

    wandb: Literal["off", "offline", "online"] = "off"
    """`offline` writes to the run folder, for `wandb sync`; `online` sends at once."""
    project: str = "hybridlm"
    """Project to which the run belongs."""
    run_name: str | None = None
    """Name of the run; null: the name of its folder."""


@dataclass(kw_only=True)
class Config:
    """A whole run, as `hybridlm train` composes it."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OPTIMIZERS.default_config)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    engine: EngineConfig = field(default_factory=ENGINES.default_config)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    kernels: dict[str, Any] = field(default_factory=dict)
    """Operation -> the backend it must use; and `strict`: whether falling back from the best backend is an error
    (null: on a GPU)."""
    run_dir: str = "runs/default"
    """Folder of everything that the run writes."""
    init_from: str | None = None
    """Run or checkpoint folder whose weights the run starts from, at step 0; null: fresh weights."""
    teacher: str | None = None
    """Run or checkpoint folder whose layers and predictions the run learns from; it is only read. With `recipe.convert`
    the model and its first weights come from it, too."""
    branch_from: str | None = None
    """Run or checkpoint folder that the run goes on from, with its weights, optimizer state, step and data cursor; the
    settings are those of that run, with what the command line changes."""

    def __post_init__(self) -> None:
        require(bool(self.run_dir.strip()), "run_dir", "is empty", expected="a folder; run_dir=. is this one")
        require(self.init_from is None or self.branch_from is None, "branch_from", "cannot stand beside init_from",
                got=self.branch_from, expected="one of the two",
                hint="branch_from takes weights, optimizer state and step, init_from the weights alone")
