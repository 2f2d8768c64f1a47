"""Learning from a teacher: from outputs of its layers and from its predictions, and how far the student is from both.

The teacher is a checkpoint that is read and never written. Converted layers of the student learn side by side: each
gets what the teacher's attention got, and the teacher's output goes on to the next layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridlm import checkpoint
from hybridlm.config.schema import NEW_MIXERS, Config
from hybridlm.data import Tokenizer, tokenizer_differences
from hybridlm.distributed.engine import Engine
from hybridlm.errors import ConfigError, did_you_mean_path
from hybridlm.model.block import MixerStandIn
from hybridlm.model.config import ModelConfig
from hybridlm.model.guide import GuidedForward, chunked_kl, relative_errors
from hybridlm.model.mixers.contract import Aux, SequenceMixer
from hybridlm.model.model import HybridLM
from hybridlm.model.sequence import SequenceInfo
from hybridlm.model.stand_ins import block_of, mixer_stand_ins, windowed_attention, without_linear_branch
from hybridlm.training.recall import RecallSamples, needle_samples, recall_nll, repeated_samples
from hybridlm.training.stage_flops import TeacherCost
from hybridlm.training.stages import Stage
from hybridlm.training.validation import validate

log = logging.getLogger("hybridlm")
WINDOW, FIRST_TOKENS = 64, 1  # of the baseline: converted layers of the teacher with a window, untrained
REPEATED_TOKENS = 128  # of one copy, where the model is meant for twice as many
Batches = Callable[[], tuple[Iterable[Any], Iterable[Any]]]  # micro batches that count, and those that do not


class LayerTarget:
    """Compares a converted layer with the attention it replaces, on the same input.

    Args:
        attention: the teacher's mixer.
        passes_teacher: whether the teacher's output goes on to the next layer, in place of the student's.
    """

    def __init__(self, attention: SequenceMixer, passes_teacher: bool):
        self.attention = attention
        self.passes_teacher = passes_teacher

    def __call__(self, mixer: SequenceMixer, x_BTD: Tensor, seq: SequenceInfo) -> tuple[Tensor, Aux]:
        """Run both; the loss is |student - teacher|^2 / |teacher|^2 over the tokens of this forward."""
        with torch.no_grad():
            target_BTD = self.attention(x_BTD.detach(), seq)[0]
        y_BTD, aux = mixer(x_BTD, seq)
        error = relative_errors([y_BTD], [target_BTD], seq.text_BT)[0]
        y_ND, target_ND = (seq.text_of(x.detach().float().flatten(0, 1)) for x in (y_BTD, target_BTD))
        cosine = torch.cosine_similarity(y_ND.flatten(), target_ND.flatten(), dim=0)
        aux = {**aux, "loss/layer_output": error, "layer/align_error": error.detach(), "layer/align_cosine": cosine}
        return (target_BTD if self.passes_teacher else y_BTD), aux


class TeacherGuide:
    """Compares the predictions of a forward, and the stream after each layer, with the teacher's.

    Args:
        teacher: the model to compare with.
        temperature: of both distributions.
        hidden: whether the stream is compared.
        measures: whether the loss of the teacher is computed too, for the gap.
    """

    def __init__(self, teacher: HybridLM, *, temperature: float = 1.0, hidden: bool = False, measures: bool = False):
        self.teacher = teacher
        self.temperature = temperature
        self.reads_hidden_states = hidden
        self.measures = measures

    def __call__(self, forward: GuidedForward) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        teacher, counts_BT = self.teacher, forward.labels_BT >= 0
        with torch.no_grad():
            teacher.shard_group = forward.model.shard_group
            output = teacher(forward.input_ids, cu_seqlens=forward.cu_seqlens, logits_to_keep=1,
                             return_hidden_states=True if self.reads_hidden_states else "last")
        assert output.hidden_states is not None
        teacher_BTD = output.hidden_states[-1]
        kl, same = chunked_kl(forward.x_BTD[counts_BT], teacher_BTD[counts_BT], forward.model.logits, teacher.logits,
                              vocab_size=teacher.config.vocab_size, temperature=self.temperature)
        here = counts_BT.sum().clamp(min=1)
        losses = {"teacher_kl": kl / (here if forward.count is None else max(forward.count, 1))}
        stats = {"distill_agreement": same / here}
        if self.reads_hidden_states:
            student = [*forward.hidden_states[1:-1], forward.x_BTD]
            errors = relative_errors(student, output.hidden_states[1:], forward.text_BT)
            losses["hidden"] = errors.mean() * forward.batch_fraction
            stats |= {f"hidden_error/{place}": error for place, error in enumerate(errors.detach())}
        if self.measures:
            with torch.no_grad():
                loss = teacher.cross_entropy(teacher_BTD, forward.labels_BT, forward.count)[0]
            stats |= {"gap_teacher_loss": loss, "gap_ce": forward.loss.detach() - loss}
        return losses, stats


@dataclass
class Baselines:
    """Measurements of models that do not change: loss in nats per token, and recall in nats per scored token."""

    window_loss: float | None
    recall: dict[str, float]


class Distillation:
    """The teacher of a run, and what stages do with it.

    Args:
        teacher: its model, in evaluation mode, without gradients.
        folder: its checkpoint.
        converted: layers of the student that replace attention.
        config: of the run.
    """

    def __init__(self, teacher: HybridLM, folder: Path, converted: Sequence[int], config: Config):
        self.teacher = teacher
        self.folder = folder
        self.converted = list(converted)
        self.config = config
        self.shared: set[str] = set()  # names of parameters whose memory is the student's
        self._baselines: Baselines | None = None

    def cost(self) -> TeacherCost:
        """Describe the teacher for counts of FLOPs."""
        return TeacherCost(self.teacher.config, self.converted)

    # --- stages

    def begin_stage(self, model: HybridLM, stages: Sequence[Stage]) -> None:
        """Set what converted layers learn and what forwards are compared with.

        Args:
            model: the student.
            stages: those up to the one that begins.
        """
        stage = stages[-1]
        self._baselines = None  # lengths and batches of validations follow the stage
        self._share_tensors(model, [pattern for each in stages for pattern in each.trainable])
        targets: dict[int, MixerStandIn] = {
            layer: LayerTarget(block_of(self.teacher, layer).mixer, stage.inputs == "teacher")
            for layer in (self.converted if stage.aligns_layers() else ())}
        for layer in self.converted:
            block_of(model, layer).mixer_stand_in = targets.get(layer)
        model.guide = None
        if stage.compares_models():
            model.guide = TeacherGuide(self.teacher, temperature=stage.temperature,
                                       hidden=bool(stage.loss_weights.get("hidden")))

    def _share_tensors(self, model: HybridLM, trained: Sequence[str]) -> None:
        """Let the teacher use the student's memory for the parameters that both have and nothing has trained.

        Args:
            model: the student.
            trained: patterns over the names of all parameters that have been trained or will be in this stage.
        """
        mine, theirs = dict(self.teacher.named_parameters()), dict(model.named_parameters())
        equal: set[str] = set()
        starts_equal = self.config.recipe.convert is not None and self.config.init_from == self.config.teacher
        if starts_equal and not any(hasattr(p, "ds_id") for p in theirs.values()):  # ZeRO-3 holds shards
            own = [*self.config.recipe.parameter_patterns([NEW_MIXERS], self.config.model), *trained]
            equal = {name for name in mine.keys() & theirs.keys()  # not the experts of other processes
                     if not any(fnmatchcase(name, pattern) for pattern in own)
                     and (mine[name].dtype, mine[name].shape) == (theirs[name].dtype, theirs[name].shape)}
        if self.shared - equal:  # they begin to train: the teacher needs its own again
            for name in self.shared:
                mine[name].data = torch.empty_like(mine[name])
            checkpoint.load_weights(self.teacher, self.folder)
        for name in equal:
            mine[name].data = theirs[name].data
        self.shared = equal

    # --- measurements

    @contextmanager
    def comparing(self, model: HybridLM) -> Iterator[None]:
        """Let forwards run the student by itself, and measure it against the teacher."""
        with mixer_stand_ins(model, dict.fromkeys(self.converted)), _guide(model, TeacherGuide(
                self.teacher, hidden=self.teacher.config.hidden_size == model.config.hidden_size
                and len(self.teacher.runs) == len(model.runs), measures=True)):
            yield

    def measure(self, engine: Engine, model: HybridLM, stage: Stage, batches: Batches, *,
                thoroughly: bool) -> dict[str, float | int | None]:
        """Measure what one validation pass of the student does not: alignment, baselines, recall, the linear branch.

        Args:
            engine: that of the run.
            model: the student.
            stage: the current stage.
            batches: makes the micro batches of a validation.
            thoroughly: also the loss without what converted layers keep in their states, which takes one more pass.

        Returns:
            Values by name, each with the prefix `validation_`.
        """
        found: dict[str, float | int | None] = {}
        if any(block_of(model, layer).mixer_stand_in is not None for layer in self.converted):
            with _guide(model, None):
                values = validate(engine, *batches())
            found |= {name: value for name, value in values.items()
                      if name.startswith(("validation_align/", "validation_loss/layer_output"))}
        with _guide(model, None), mixer_stand_ins(model, dict.fromkeys(self.converted)):
            samples = self._recall_samples(engine, batches)
            if self._baselines is None:
                self._baselines = self._measure_baselines(engine, batches, samples)
            with engine.evaluating() as wrapped:
                found |= {f"validation_recall/{name}": recall_nll(wrapped, rows, engine.device)
                          for name, rows in samples.items()}
        if thoroughly and self.converted:
            cut: dict[int, MixerStandIn | None] = dict.fromkeys(self.converted, without_linear_branch)
            with _guide(model, None), mixer_stand_ins(model, cut):
                found["validation_ablation/linear_branch_cut"] = validate(engine, *batches())["validation_loss"]
        if self._baselines.window_loss is not None:
            found["validation_gap/window_loss"] = self._baselines.window_loss
        return found | {f"validation_recall/{name}": value for name, value in self._baselines.recall.items()}

    def _recall_samples(self, engine: Engine, batches: Batches) -> dict[str, RecallSamples]:
        """Rows that ask for recall, by name; none where rows are divided between processes."""
        if engine.context_parallel_size > 1:
            return {}
        vocab, limit = self.config.model.vocab_size, self.config.model.max_position
        samples = {"repeat_nll": repeated_samples(vocab, min(REPEATED_TOKENS, limit // 2))}
        text = next(chain(*batches()), None)  # one that does not count where this process has no other
        if text is not None and text.input_ids.shape[1] >= 64:
            samples["needle_nll"] = needle_samples(text.input_ids[:4].cpu(), vocab)
        return samples

    def _measure_baselines(self, engine: Engine, batches: Batches, samples: dict[str, RecallSamples]) -> Baselines:
        """Measure the teacher, and the teacher with a window and the first token in the converted layers."""
        windows: dict[int, MixerStandIn | None] = {
            layer: windowed_attention(self.teacher, layer, WINDOW, FIRST_TOKENS) for layer in self.converted}
        recall: dict[str, float] = {}
        self.teacher.shard_group = engine.shard_group
        with engine.autocast():
            for label, stand_ins in (("teacher", {}), ("window", windows)):
                with mixer_stand_ins(self.teacher, stand_ins):
                    recall |= {f"{name.replace('_nll', '')}_{label}": recall_nll(self.teacher, rows, engine.device)
                               for name, rows in samples.items() if label == "teacher" or windows}
            loss = None
            if windows:
                with mixer_stand_ins(self.teacher, windows):
                    loss = validate(engine, *batches(), model=self.teacher)["validation_loss"]
        return Baselines(loss, recall)


def check_teacher(config: Config, engine: Engine, tokenizer: Tokenizer) -> None:
    """Check that a run can compare itself with its teacher, if it has one, before anything is built or converted.

    Raises:
        ConfigError: its tokenizer or vocabulary is another than the run's.
        CheckpointError: it cannot be used.
    """
    if config.teacher is None:
        return
    if not Path(config.teacher).expanduser().exists():
        raise ConfigError("teacher", "no such checkpoint", got=config.teacher,
                          expected="the run or checkpoint folder that this run learns from",
                          hint=did_you_mean_path(config.teacher) or "put it back where it was")
    folder = checkpoint.resolve(config.teacher, engine, hashes=False)
    saved = checkpoint.read_model_config(folder)
    if saved.vocab_size != config.model.vocab_size:
        raise ConfigError("teacher", "has another vocabulary than the model", got=f"{saved.vocab_size} tokens",
                          expected=f"{config.model.vocab_size} tokens")
    theirs, ours = ((len(model.runs()), model.hidden_size) for model in (saved, config.model))
    if theirs != ours and any(stage.loss_weights.get("hidden") for stage in config.recipe.stages):
        raise ConfigError("teacher", "has other layers than the model, so their streams cannot be compared",
                          got=_describe_stream(saved), expected=_describe_stream(config.model),
                          hint="leave hidden out of loss_weights")
    if (folder / "tokenizer.json").is_file():
        differ = tokenizer_differences(Tokenizer.from_folder(folder), tokenizer)
        if differ:
            raise ConfigError("data.tokenizer", f"is not the teacher's: it differs in {', '.join(differ[:3])}",
                              got=tokenizer.name, expected=f"data.tokenizer={config.teacher}",
                              hint="leave data.tokenizer out, and the run takes the teacher's")


def _describe_stream(model: ModelConfig) -> str:
    """Number of layers, of their runs where some run several times, and the width of the stream."""
    runs = len(model.runs())
    several = f" in {runs} runs" if runs > model.num_layers else ""
    return f"{model.num_layers} layers{several}, {model.hidden_size} wide"


def load_teacher(config: Config, engine: Engine) -> Distillation | None:
    """Load the teacher of a run, which `check_teacher` has seen; None where it has none.

    Raises:
        CheckpointError: it cannot be used.
    """
    if config.teacher is None:
        return None
    folder = checkpoint.resolve(config.teacher, engine)
    teacher = checkpoint.load_checkpoint(folder, device=str(engine.device)).requires_grad_(False)
    converted = [] if config.recipe.convert is None else config.recipe.convert.converted or []
    log.info("teacher %s", folder)
    return Distillation(teacher, folder, converted, config)


@contextmanager
def _guide(model: HybridLM, guide: TeacherGuide | None) -> Iterator[None]:
    before, model.guide = model.guide, guide
    try:
        yield
    finally:
        model.guide = before

