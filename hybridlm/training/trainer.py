"""The training loop: it makes steps from batches and writes records and checkpoints."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hybridlm import checkpoint
from hybridlm.config.schema import Config
from hybridlm.data import PackedDataset, PreparedData
from hybridlm.distributed.engine import Engine, LossFunction, Update
from hybridlm.errors import CheckpointError, counted
from hybridlm.model.model import HybridLM
from hybridlm.optimizers import OptimizerSet, build_optimizer
from hybridlm.optimizers.roles import fp32_names
from hybridlm.training import backends
from hybridlm.training.branch import Branch
from hybridlm.training.display import Display
from hybridlm.training.distillation import Distillation
from hybridlm.training.guards import (
    NOTHING_BAD,
    BadStepGuard,
    GradientNormWatch,
    TrainingDiverged,
    bad_weight,
    first_bad_layer,
)
from hybridlm.training.interrupt import SIGNALS, StopSignal
from hybridlm.training.loader import global_batches, micro_batches
from hybridlm.training.losses import step_loss
from hybridlm.training.metrics import MetricsFile, PeakRate, bits_per_byte, layer_loads, perplexity, router_panel
from hybridlm.training.moe_health import RoutingWatch
from hybridlm.training.run_changes import branch_command, free_folder
from hybridlm.training.run_folder import RunFolder
from hybridlm.training.saver import Saver
from hybridlm.training.sparse_attention import (
    describe_attention,
    freeze_idle_indexers,
    measuring_recall,
    set_attention,
    stage_model,
)
from hybridlm.training.stage_flops import stage_flops
from hybridlm.training.stages import Progress, Stage, check_steps_left, check_trained, describe_names, set_trainable
from hybridlm.training.tracking import Tracker
from hybridlm.training.validation import validate

log = logging.getLogger("hybridlm")


@dataclass
class Trainer:
    """Trains one run, in every process that takes part in it.

    `peak`: FLOP/s of one process at 100 % utilisation, on the main rank; `carried`: text files that every
    checkpoint holds, by name; `command`: the words after `hybridlm train`, None where the run was not started by them.
    """

    config: Config
    stages: list[Stage]
    run: RunFolder
    engine: Engine
    model: HybridLM
    data: PreparedData
    display: Display
    tracker: Tracker
    stop: StopSignal
    peak: PeakRate | None
    distillation: Distillation | None = None
    carried: dict[str, str] = field(default_factory=dict)
    command: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.progress = Progress()
        self.metrics = MetricsFile(self.run.metrics_file)
        self.samples = MetricsFile(self.run.samples_file(self.engine.rank))
        self.guard = BadStepGuard(self.config.training.max_bad_steps)
        self.routing = RoutingWatch(self.config.model.feed_forward.balance_advice())
        self.optimizers: OptimizerSet | None = None
        self.saver = Saver(self.run.checkpoints, self.config.training.keep_checkpoints, self.engine, self.metrics.sync)
        self.record: dict[str, Any] = {}  # of the last step
        self.validation: dict[str, Any] = {}  # metrics of the last validation
        self.validated_at: int | None = None  # step of the last validation
        self.backends_reported = False
        self.branched_from: Path | None = None  # has the optimizer state until there is a checkpoint of this run
        self.state_stage: int | None = None  # the stage that the newest optimizer state is of; None: of no stage here

    def restore(self, folder: Path) -> None:
        """Restore weights and progress from a checkpoint of this run.

        Raises:
            CheckpointError: weights that do not fit, or data that has changed.
            ConfigError: the plan has fewer steps than the run has made.
        """
        saved = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        if saved["data"] != self.data.fingerprint:
            raise CheckpointError(
                f"the data has changed since {folder} was saved: its files, tokenizer or mixture differ; to go on with "
                f"them: hybridlm train branch_from={self.run.path} run_dir={free_folder(self.run.path)}")
        checkpoint.load_weights(self.model, folder, local_shard=self.engine.local_shard)
        self.progress = Progress.from_dict(saved["progress"])
        check_steps_left(self.config, self.stages, self.progress.step)
        self.state_stage = self.progress.stage
        self.saver.newest = folder

    def restore_branch(self, branch: Branch) -> None:
        """Take weights and progress from a checkpoint of another run.

        Raises:
            CheckpointError: weights that do not fit.
        """
        checkpoint.load_weights(self.model, branch.folder, local_shard=self.engine.local_shard)
        self.progress = replace(branch.progress)
        self.state_stage = self.progress.stage if branch.strict else None
        self.branched_from = branch.folder

    def fit(self) -> str | None:
        """Train all stages that are left, and return what asked the run to stop before its end, or None."""
        self.engine.on_main(self._forget_later_records)
        left = sum(stage.steps for stage in self.stages[self.progress.stage:]) - self.progress.step_in_stage
        self.display.begin(self.progress.step, self.progress.step + max(left, 0))
        self.stop.enter_loop()
        try:
            for stage in self.stages[self.progress.stage:]:
                self.progress.enter(stage)
                if not stage.steps:
                    log.info("stage %s: left out, for the selectors that it trains have no parameters", stage.name)
                if self.progress.step_in_stage < stage.steps and not self._run_stage(stage):
                    return self.stop.requested
        except BaseException:
            self.saver.abandon()
            raise
        if self.validated_at != self.progress.step:  # a finished run that was started again
            last = next(stage for stage in reversed(self.stages) if stage.steps)
            self._begin_stage(last)
            self._validate(last, True)
        return None

    def _forget_later_records(self) -> None:
        """Drop the records of steps that are computed again, whatever number of ranks wrote them."""
        for file in (self.run.metrics_file, *self.run.path.glob("samples-*.jsonl")):
            MetricsFile(file).truncate(self.progress.step)

    def _run_stage(self, stage: Stage) -> bool:
        """Make the steps that are left of a stage; return False when asked to stop between two of them."""
        self._begin_stage(stage)
        training = self.config.training
        dataset = self._dataset(stage, train=True)
        batches = global_batches(dataset, first_sample=self.progress.samples, batch_size=stage.batch_size,
                                 rows=self.engine.local_rows(stage.batch_size), pin=self.engine.device.type == "cuda",
                                 micro_batch_size=training.micro_batch_size)
        with closing(batches):
            while self.progress.step_in_stage < stage.steps:
                if self._between_steps():
                    self.save(required=True)
                    return False
                start = time.perf_counter()
                self._step(stage, next(batches), start)
                if self.progress.step % training.checkpoint_every == 0 and not self.guard.in_a_row:
                    self.save()
        self.save(required=True)
        self.state_stage = stage.index
        return True

    def _between_steps(self) -> bool:
        """Finish a save that all ranks have written. Returns whether any rank was asked to stop; all find the same."""
        asked = SIGNALS.index(self.stop.requested) + 1 if self.stop.requested else 0
        asked, writing = self.engine.all_max([asked, self.saver.writing])
        if not writing:
            self.saver.finish()
        if asked:  # a signal since the exchange is handled before the next step, so that all ranks agree
            self.stop.requested = SIGNALS[asked - 1]
        return bool(asked)

    def _begin_stage(self, stage: Stage) -> None:
        self.engine.release()
        chosen = set_trainable(self.model, stage)
        set_attention(self.model, stage)
        freeze_idle_indexers(self.model)
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        if len(self.stages) > 1 or frozen:
            log.info("stage %s: %s, %d of %d parameters train", stage.name, counted(stage.steps, "step"), len(trained),
                     len(trained) + len(frozen))
        if len(chosen) < len(trained) + len(frozen):
            log.info("trained: %s", describe_names(trained))
        elif frozen:  # the stage trains everything, but these have no loss
            log.info("not trained: %s", describe_names(frozen))
        recipe = self.config.recipe
        describe_attention(self.model, stage, recipe.stages[stage.index], recipe.dense_below)
        self.stage_config = replace(self.config, model=stage_model(self.config.model, stage))
        self.flops_per_token = stage_flops(self.config.model, stage, trained, None if self.distillation is None else
                                           self.distillation.cost())
        self.balance = any(name.endswith("router.weight") for name in trained)
        if self.distillation is not None:
            self.distillation.begin_stage(self.model, self.stages[: stage.index + 1])
        self.norms = GradientNormWatch(stage.name)
        self.optimizers = build_optimizer(self.model, self.config.optimizer, lr=stage.lr)
        self.optimizers.scale_lr(stage.lr_factor_of)
        check_trained(self.model, trained, self.optimizers)
        # A stage starts at the newest checkpoint, of this session or of an earlier one.
        newest = self.saver.newest or self.branched_from
        stored = {} if newest is None else checkpoint.checkpoint_tensors(newest, "optimizer")
        state = {name: self.engine.local_shard(name, tensor) for name, tensor in stored.items()}
        self.engine.prepare(self.model, self.optimizers, sorted(fp32_names(self.model)), state,
                            strict=self.state_stage == stage.index)
        self.model.train()

    def _dataset(self, stage: Stage, *, train: bool) -> PackedDataset:
        """Return the packed samples; validation always sees the same windows, spread over the text in a fixed order."""
        stores = self.data.train if train else [self.data.validation]
        return PackedDataset(stores, stage.sequence_length, self.config.model.mtp.depth,  # type: ignore[arg-type]
                             seed=self.config.training.seed if train else 0, whole_blocks=self.data.rules < 2)

    def _step(self, stage: Stage, batch: Sequence[Any], start: float) -> None:
        self.engine.begin_step(self.config.training.seed, self.progress.step)
        compute_loss = step_loss(batch, self.engine.all_sum)
        due = stage.recall_every is not None and (self.progress.step_in_stage + 1) % stage.recall_every == 0
        with measuring_recall(self.model, due):
            values = self._gradients(compute_loss, batch)
        loads = layer_loads(self.model.router_loads())
        values |= router_panel(loads)
        lr = stage.lr_at(self.progress.step_in_stage)
        update = self.engine.update(values, lr=lr, clip=self.config.training.grad_clip, balance=self.balance)
        seconds = time.perf_counter() - start
        self.progress.advance(stage)
        self.progress.seconds += seconds
        self.progress.skipped_steps += not update.applied
        self.record = self._describe(stage, batch, update, lr, seconds)
        last = self.progress.step_in_stage >= stage.steps
        every = self.config.training.eval_every
        if last or (every and self.progress.step % every == 0):
            self.record |= {f"moe/load/{layer}": load_E.tolist() for layer, load_E in loads.items()}
            self.record |= self._validate(stage, last)
        if self.engine.is_main:
            self.metrics.write(self.record)
        if self.config.training.record_samples:
            samples = [sample for micro_batch in batch for sample in micro_batch.sample_ids]
            self.samples.write({"step": self.progress.step, "samples": samples})
        self.tracker.log(self.record, self.progress.step)
        self.display.step(self.record, final=last)
        said = self.routing.add(loads) if self.engine.is_main and self.balance else None
        if said is not None:
            log.warning("%s", said)
        if self.distillation is not None and self.distillation.converted and self.engine.is_main:
            self.norms.add(update.grad_norm)
        if self.guard.count_step(update.applied):
            self._raise_diverged(compute_loss, batch)

    def _gradients(self, compute_loss: LossFunction, batch: Sequence[Any]) -> dict[str, Tensor]:
        """Compute the gradients; the first time, report the kernel backends that ran."""
        if self.backends_reported:
            return self.engine.compute_gradients(compute_loss, batch)
        with backends.recording_backends(self.model) as rows:
            values = self.engine.compute_gradients(compute_loss, batch)
        if self.engine.is_main:
            backends.report_backends(rows(), self.run.path, self.model.compiled)
        self.backends_reported = True
        return values

    def _describe(self, stage: Stage, batch: Sequence[Any], update: Update, lr: float,
                  seconds: float) -> dict[str, Any]:
        """Build the record of one step. `loss` is that of the next token, `total_loss` what was minimised.

        The first is None where no stage's weight asks for it.
        """
        values = dict(update.values)
        total = values.pop("loss")
        loss = values.get("loss/lm")
        tokens, num_bytes = self.engine.all_sum([sum(micro_batch.num_tokens for micro_batch in batch),
                                               sum(micro_batch.num_bytes for micro_batch in batch)])
        speed = stage.tokens_per_step / seconds
        flops = speed * self.flops_per_token
        return {"step": self.progress.step, "loss": loss, "total_loss": total, **values,
                "perplexity": None if loss is None else perplexity(loss),
                "bits_per_byte": None if loss is None else bits_per_byte(loss * tokens, num_bytes),
                "grad_norm": update.grad_norm, "lr": lr, "skipped": not update.applied,
                "skipped_steps": self.progress.skipped_steps, "tokens_per_second": speed,
                "flops_per_second": flops,
                "mfu": None if self.peak is None else self.peak.utilisation(flops, self.engine.world_size),
                "peak_memory_bytes": self.engine.peak_memory(), "tokens": self.progress.tokens,
                "epochs": max(self.data.epochs(self.progress.tokens)), "samples": self.progress.samples,
                "stage": stage.name, "seconds": self.progress.seconds}

    def _validate(self, stage: Stage, last: bool) -> dict[str, Any]:
        if self.data.validation is None:
            return {}
        dataset = self._dataset(stage, train=False)
        windows = min(self.config.training.eval_batches * stage.batch_size, len(dataset))
        if windows:
            size = self.config.training.micro_batch_size or stage.batch_size
            own, most = (range(rank, windows, self.engine.dp_size) for rank in (self.engine.dp_rank, 0))
            missing = math.ceil(len(most) / size) - math.ceil(len(own) / size)

            def batches() -> tuple[Iterable[Any], Iterable[Any]]:
                return micro_batches(dataset, own, size), micro_batches(dataset, [0] * missing, 1)

            teacher = self.distillation
            with measuring_recall(self.model, stage.eval_recall), \
                    nullcontext() if teacher is None else teacher.comparing(self.model):
                self.validation = validate(self.engine, *batches())
            if teacher is not None:
                self.validation |= teacher.measure(self.engine, self.model, stage, batches, thoroughly=last)
        self.validated_at = self.progress.step
        return self.validation

    def _raise_diverged(self, compute_loss: LossFunction, batch: Sequence[Any]) -> None:
        found = self.engine.gather(first_bad_layer(self.engine, compute_loss, batch))
        where = next((place for place in found if place != NOTHING_BAD), NOTHING_BAD)
        self.saver.finish()
        raise TrainingDiverged(f"{self.guard.in_a_row} steps in a row were not finite (the last is step "
                               f"{self.progress.step}); first bad: {where}; {self.saver.newest_text}; "
                               f"{self._lower_rate()}")

    def _lower_rate(self) -> str:
        """Say how to go on with a lower learning rate and other samples, as a command that can be typed."""
        stage = self.config.recipe.stages[self.progress.stage]
        key = "optimizer.lr" if stage.lr is None else f"recipe.stages.{self.progress.stage}.lr"
        rate = f"{key}={self.stages[self.progress.stage].lr / 2:g}"
        newest = self.saver.newest or self.branched_from
        if newest is None:
            return f"start the same command again with a lower rate, such as {rate}"
        other = [rate, f"training.seed={self.config.training.seed + 1}"]
        return "go on from it with a lower rate and other samples: " + branch_command(
            self.run.path, self.command, self.config, more=other, source=newest)

    def save(self, *, required: bool = False) -> None:
        """Save a checkpoint of this step, unless there is one. `required`: wait for it, and end the run if it fails.

        Raises:
            TrainingStopped: the disk refused too often, or a weight is not finite.
        """
        self.saver.finish()
        step = self.progress.step
        in_background = self.config.training.async_checkpoint and not required
        if step == 0 or self.saver.saved(step):
            return
        # Found after a step of finite gradients: far too large a learning rate.
        weight = next(filter(None, self.engine.gather(bad_weight(self.engine))), None)
        if weight is not None:
            raise TrainingDiverged(f"weight '{weight}' is not finite after step {step}, which is not saved; "
                                   f"{self.saver.newest_text}; {self._lower_rate()}")
        state = {"progress": self.progress.to_dict(), "data": self.data.fingerprint,
                 "data_rules": self.data.rules}
        texts = checkpoint.model_texts(self.stage_config, self.stage_config.model, self.data.tokenizer)
        texts |= self.carried
        texts["trainer.json"] = json.dumps(state, indent=1)
        tensors = {"model": self.engine.owned_tensors(checkpoint.unique_tensors(self.model), copied=in_background),
                   "optimizer": self.engine.owned_optimizer_state(copied=in_background)}
        self.saver.begin(step, texts, tensors, required=required)
        if not in_background:
            self.saver.finish(required=required)
