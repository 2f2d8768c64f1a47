"""The entry point `train(config)`: everything around the loop, from the run folder to the last printed lines."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hybridlm import checkpoint
from hybridlm.config.checks import model_has_indexer
from hybridlm.config.schema import Config, DataConfig
from hybridlm.config.serialization import to_dict
from hybridlm.data import (
    DATA_RULES,
    PreparedData,
    bigram_entropy,
    prepare,
)
from hybridlm.distributed.engine import Engine, lost_rank
from hybridlm.distributed.engines import make_engine
from hybridlm.distributed.rank_environment import RankEnvironment
from hybridlm.distributed.rendezvous import check_same, check_shared_folder
from hybridlm.errors import UserError, counted, out_of_memory
from hybridlm.model.cost import count_parameters
from hybridlm.planning.machine_memory import check_memory, out_of_memory_advice
from hybridlm.planning.process_count import check_process_count
from hybridlm.planning.rank_memory import rank_memory
from hybridlm.training.branch import Branch, check_tokenizer, lr_change, open_branch, previous_stages
from hybridlm.training.display import Display, format_count, format_duration
from hybridlm.training.distillation import WINDOW, check_teacher, load_teacher
from hybridlm.training.guards import TrainingDiverged, TrainingStopped
from hybridlm.training.interrupt import StoppedBeforeTraining, StopSignal
from hybridlm.training.metrics import PeakRate, peak_flops, peak_measurement
from hybridlm.training.run_changes import flatten
from hybridlm.training.run_folder import RunFolder, versions
from hybridlm.training.stages import plan_stages
from hybridlm.training.start import build_run_model, data_config, initial_weights, lineage_file
from hybridlm.training.tracking import Tracker, check_tracking, make_tracker
from hybridlm.training.trainer import Trainer
from hybridlm.user_code import import_arguments
from hybridlm_kernels import registry

log = logging.getLogger("hybridlm")
BIGRAM_ENTROPY_MAX_TOKENS = 8_000_000  # of the validation text, for its bigram entropy


@dataclass
class RunResult:
    """Result of a run. `status` is "finished", or "interrupted" (saved; `resume_command` resumes it).

    `loss` is that of the last step in nats per token; `validation` the last one's metrics;
    `bigram_bits_per_byte` the bigram entropy of the validation text, which counting pairs of bytes reaches.
    """

    status: str
    run_dir: Path
    step: int = 0
    loss: float | None = None
    validation: dict[str, Any] = field(default_factory=dict)
    bigram_bits_per_byte: float | None = None
    checkpoint: Path | None = None
    resume_command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def train(config: Config, *, command: Sequence[str] | None = None, to_stderr: bool = False) -> RunResult:
    """Train all stages of a config, or those that are left when its run folder holds a checkpoint.

    Args:
        config: the run's config, as `load_config` composes it.
        command: the words that started the run, for its resume command.
        to_stderr: print to standard error and leave standard output to a result.

    Raises:
        UserError: a config, data source or checkpoint that cannot be used.
        TrainingStopped: the run could not continue.

    Example:
        >>> import argparse, tempfile
        >>> from hybridlm import load_config
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = load_config("train", [
        ...         "model=quickstart", "model.hidden_size=32", f"data.path={argparse.__file__}",
        ...         f"data.cache_dir={folder}/cache", "training.steps=2", "training.batch_size=2",
        ...         "training.sequence_length=32", "training.eval_batches=1", f"run_dir={folder}/run"])
        ...     result = train(config, to_stderr=True)
        >>> result.status, result.step
        ('finished', 2)
    """
    stages = plan_stages(config)
    world = RankEnvironment.from_launcher()
    check_process_count(config, world.size)
    check_tracking(config.tracking)
    tight = check_memory(config, world.size)
    registry.configure(config.kernels)
    main = world.rank == 0
    with closing(_open_folder(config, main)) as run, StopSignal() as stop, Display(
            run.log_file, log_every=config.training.log_every, to_stderr=to_stderr, silent=not main) as display:
        resume = resume_command(command, run.path)
        try:
            engine = make_engine(config.engine, config.training.precision)
            _check_ranks(engine, config)
            check_shared_folder(engine, run.path, "run_dir")
            if tight is not None:
                log.warning("this may run out of memory: %s", tight.describe())
            if run.kept_aside is not None:
                log.info("an earlier attempt here left no checkpoint; its log and metrics are kept in %s",
                         run.kept_aside)
            start = run.start_from(config, engine, command)
            branch = None
            if start is None and config.branch_from is not None:
                branch = open_branch(config, stages, engine)
            origin = start or (branch.folder if branch is not None else initial_weights(config, engine))
            with engine.main_first():
                saved = start or (None if branch is None else branch.folder)
                rules = DATA_RULES if saved is None else checkpoint.data_rules(saved)
                data = prepare(data_config(config, start), progress=main, rules=rules)
            if branch is not None:
                check_tokenizer(branch, data.tokenizer)
            check_same(engine, "data", {"fingerprint": data.fingerprint}, "let all machines read the same files")
            check_teacher(config, engine, data.tokenizer)
            if world.size > 1:
                log.info("memory of each process, an estimate: %s", _memory_text(config, world.size))
            model = build_run_model(config, engine, data, origin if start is None and branch is None else None)
            distillation = load_teacher(config, engine)
            flops, source = engine.on_main(lambda: peak_flops(engine.device, engine.precision))
            peak = PeakRate(flops, source, peak_measurement(engine.device, engine.precision))
            facts = _session_facts(config, engine, resume, peak)
            sessions = run.sessions()
            carried = {} if origin is None else checkpoint.carried_texts(origin, data.tokenizer)
            if start is None:
                carried |= lineage_file(origin, branch)
            if main:
                run.begin_session(config, facts, engine.settings, carried.get(checkpoint.LINEAGE_FILE))
            tracker = make_tracker(config.tracking, run.path, to_dict(config),
                                   _wandb_id(run, sessions)) if main else Tracker()
            trainer = Trainer(config=config, stages=stages, run=run, engine=engine, model=model, data=data,
                              display=display, tracker=tracker, stop=stop, peak=peak if main else None,
                              distillation=distillation, carried=carried, command=command)
            _announce(config, trainer, start, facts)
            if start is not None:
                trainer.restore(start)
            elif branch is not None:
                trainer.restore_branch(branch)
            _announce_changes(trainer, branch, run.previous if start is not None else None)
            with closing(tracker):
                stopped = trainer.fit()
        except StoppedBeforeTraining as asked:
            log.info("%s before the first step: nothing to save. Start again with: %s", asked, resume)
            return RunResult("interrupted", run.path, resume_command=resume)
        except (MemoryError, OSError, RuntimeError) as error:
            said = out_of_memory(error)
            if said is not None:
                raise TrainingStopped(f"{said}; {out_of_memory_advice(config)}") from error
            if world.size == 1 or not isinstance(error, RuntimeError) or not lost_rank(error):
                raise
            raise TrainingStopped(f"rank {world.rank} lost another process of this run, which hangs or has ended; the "
                                  "same command goes on from the last checkpoint (--restarts N does so by itself): "
                                  f"{str(error).splitlines()[0]}") from error
        finally:
            display.stop()
        return _finish(trainer, stopped, resume)


def _open_folder(config: Config, main: bool) -> RunFolder:
    """Lock the run folder and make room in it, before the log is opened there."""
    run = RunFolder(config.run_dir, main)
    try:
        run.set_aside(config)
    except BaseException:
        run.close()
        raise
    return run


def _check_ranks(engine: Engine, config: Config) -> None:
    """Check that all machines have the same packages and config; their folders may differ."""
    packages = {name: found for name, found in versions().items() if name != "platform"}
    check_same(engine, "versions", packages, "install the same packages on every machine")
    folders = ("run_dir", "data.cache_dir")
    same = {key: value for key, value in flatten(to_dict(config)).items() if key not in folders}
    check_same(engine, "a config", same, "give every machine the same command")


def resume_command(command: Sequence[str] | None, run_dir: Path) -> str:
    """Build the command that resumes a run: the same words, without those that forbid resuming.

    Example:
        >>> resume_command(["model=quickstart", "training.resume=never"], Path("runs/a"))
        'hybridlm train model=quickstart'
    """
    if command is None:
        return f"hybridlm train {shlex.quote(str(run_dir / 'config.yaml'))} training.resume=auto"
    words = [word for word in command if word.lstrip("+") != "training.resume=never"]
    return shlex.join(["hybridlm", "train", *words])


def _announce_changes(trainer: Trainer, branch: Branch | None, previous: Any) -> None:
    """Log what differs from the run that a branch leaves, and what other steps do to the learning rate."""
    if branch is not None:
        for line in branch.describe(trainer.data.fingerprint):
            log.info("%s", line)
        before = None if branch.config is None else plan_stages(branch.config)
        at = branch.saved_progress
    else:
        before, at = None if previous is None else previous_stages(previous), trainer.progress
    change = None if before is None else lr_change(before, at, trainer.stages, trainer.progress)
    if change is not None:
        log.info("%s", change)


def _session_facts(config: Config, engine: Engine, resume: str, peak: PeakRate) -> dict[str, Any]:
    device = torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu"
    counts = count_parameters(config.model)
    return {"command": resume, "argv": sys.argv, "versions": versions(), "device": device,
            "processes": engine.world_size, "precision": engine.precision, "threads": torch.get_num_threads(),
            "parameters": counts.total_with_mtp,
            "active_parameters": counts.active_with_head, "peak_flops": peak.flops, "peak_flops_source": peak.source}


def _memory_text(config: Config, world: int) -> str:
    parts = {name: f"{value / 2**30:.2f}" for name, value in rank_memory(config, world).to_dict().items() if value}
    total, host, snapshot = (parts.pop(name, None) for name in ("total", "host", "snapshot"))
    return (f"{total} GiB ({', '.join(f'{name} {value}' for name, value in parts.items())})"
            + (f" and {host} GiB on the host" if host else "")
            + (f"; {snapshot} GiB on the host while a checkpoint is written" if snapshot else ""))


def _wandb_id(run: RunFolder, sessions: list[dict[str, Any]]) -> str | None:
    """Make the id of a run from its folder and first start, so that a resumed run keeps it."""
    import hashlib

    first = (sessions or run.sessions())[0]["started"]
    return hashlib.sha256(f"{run.path.resolve()} {first}".encode()).hexdigest()[:12]


def _announce(config: Config, trainer: Trainer, start: Path | None, facts: dict[str, Any]) -> None:
    model = config.model
    data = trainer.data
    log.info("model %s: %s parameters, %s active; layers %s", model.name or "(unnamed)",
             format_count(facts["parameters"]), format_count(facts["active_parameters"]),
             _format_layers(model.layers()))
    held_out = data.validation.num_tokens if data.validation is not None else 0
    planned = sum(stage.steps * stage.tokens_per_step for stage in trainer.stages)
    sources = " and ".join(source.path for source in config.data.sources())
    log.info("data: %s, %s training tokens of %.2f bytes, %s held out (%.2g%% of the bytes), tokenizer %s; the run "
             "reads %s tokens, %s", sources, format_count(data.tokens), data.bytes_per_token, format_count(held_out),
             100 * data.held_out, data.tokenizer.name, format_count(planned), _format_epochs(data, planned))
    samples = sum(stage.steps * stage.batch_size for stage in trainer.stages)
    if unread := data.unread_sources(samples):
        log.warning("data.mixture: the weights give less than one of this run's %d samples to %s", samples,
                    ", ".join(unread))
    ranks = f"{facts['processes']} x " if facts["processes"] > 1 else ""
    log.info("run: %s, %s%s, %s; %s", trainer.run.path, ranks, facts["device"], facts["precision"],
             counted(sum(stage.steps for stage in trainer.stages), "step"))
    if start is not None:
        log.info("going on from %s", start)
        return
    if config.init_from is not None and (read := text_of_weights(config)):
        log.warning("this run reads %s, the default; its weights were trained on %s", sources, read)
    if warning := model.feed_forward.balance_warning():
        log.warning("%s", warning)


def text_of_weights(config: Config) -> str:
    """Name the text that the weights of `init_from` were trained on, if this run reads the default and they did not."""
    usual = DataConfig().path
    if config.data.mixture or config.data.path != usual:
        return ""
    try:
        saved = checkpoint.read_config(checkpoint.resolve(str(config.init_from))).get("data") or {}
        sources = [str(source["path"]) for source in saved.get("mixture") or [saved]]
    except (UserError, KeyError, TypeError, AttributeError):
        return ""
    named = " and ".join(sources)
    return "" if named == usual else f"{named}; data.path={sources[0]} takes that" if len(sources) == 1 else named


def _format_epochs(data: PreparedData, tokens: int) -> str:
    """Format how often a run of so many tokens reads each source of its data."""
    passes = data.epochs(tokens)
    each = [f"{each:.3g} of {source.path}" for each, source in zip(passes, data.sources, strict=False)]
    if len(passes) == 1 or len(each) != len(passes):
        return f"{max(passes):.3g} epochs"
    return f"epochs: {', '.join(each)}"


def _format_layers(layers: list[str]) -> str:
    """Format a layer list, with a count before equal neighbours.

    Example:
        >>> _format_layers(["kda", "kda", "kda", "full"])
        '3 x kda, full'
    """
    runs: list[list[Any]] = []
    for name in layers:
        if runs and runs[-1][1] == name:
            runs[-1][0] += 1
        else:
            runs.append([1, name])
    return ", ".join(f"{n} x {name}" if n > 1 else name for n, name in runs)


def _finish(trainer: Trainer, stopped: str | None, resume: str) -> RunResult:
    """Log the last lines of a run and return its result."""
    progress = trainer.progress
    path = trainer.run.path
    result = RunResult("finished" if stopped is None else "interrupted", path, progress.step,
                       trainer.record.get("loss"), trainer.validation, None, trainer.saver.newest, resume)
    if stopped is not None:
        where = f"saved {trainer.saver.newest}" if trainer.saver.newest else "nothing to save"
        log.info("%s: stopped after step %d, %s. Go on with: %s", stopped, progress.step, where, resume)
        return result
    log.info("finished: %s, %s tokens, %s", counted(progress.step, "step"), format_count(progress.tokens),
             format_duration(progress.seconds))
    if progress.skipped_steps:
        log.warning("%s skipped, not finite", counted(progress.skipped_steps, "step"))
    if trainer.validation and not math.isfinite(trainer.validation["validation_loss"]):
        raise TrainingDiverged(f"its validation loss after step {progress.step} is "
                               f"{trainer.validation['validation_loss']}; try a lower optimizer.lr than "
                               f"{trainer.config.optimizer.lr:g} in another run_dir (saved: {trainer.saver.newest})")
    if trainer.validation:
        result.bigram_bits_per_byte = _bigram_entropy(trainer.data)
        _report_validation(trainer.validation, result.bigram_bits_per_byte)
    _report_teacher(trainer)
    _report_recall(trainer)
    log.info("checkpoint  %s", trainer.saver.newest)
    log.info("metrics     %s", trainer.run.metrics_file)
    words = ["hybridlm", "generate", str(path), "--prompt", "import ", "--max-new-tokens", "200", *import_arguments()]
    log.info("try         %s", shlex.join(words))
    return result


def _report_validation(validation: dict[str, Any], bigram: float | None) -> None:
    bits = validation["validation_bits_per_byte"]
    log.info("validation  loss %.4f per token, perplexity %.3f%s", validation["validation_loss"],
             validation["validation_perplexity"], f", {bits:.4f} bits per byte" if bits is not None else "")
    if bigram is not None and bits is not None:
        verdict = "below" if bits < bigram else "not yet below"
        log.info("            %s the bigram entropy of the validation text, %.4f bits per byte", verdict, bigram)


def _report_teacher(trainer: Trainer) -> None:
    """Log the losses and the recall of the teacher, of the teacher with a window, and of the student side by side."""
    values = {name.removeprefix("validation_"): value for name, value in trainer.validation.items()}
    if "gap/teacher_loss" not in values:
        return
    rows = {"loss": ("gap/teacher_loss", "gap/window_loss", "loss"),
            "repeats": ("recall/repeat_teacher", "recall/repeat_window", "recall/repeat_nll"),
            "needle": ("recall/needle_teacher", "recall/needle_window", "recall/needle_nll")}
    for name, keys in rows.items():
        found = [f"{label} {values[key]:.4f}" for label, key in zip(
            ("teacher", f"window of {WINDOW} and first token", "student"), keys, strict=True) if key in values]
        if found:
            log.info("%-11s %s", name, ", ".join(found))


def _report_recall(trainer: Trainer) -> None:
    """Log how much of dense attention the indexers select, against the most that as many keys can hold."""
    if not model_has_indexer(trainer.model.config):
        return
    found = {layer: (trainer.validation.get(f"validation_dsa/indexer_recall{layer}"),
                     trainer.validation.get(f"validation_dsa/indexer_attainable{layer}"))
             for layer in ("", *(name.removeprefix("validation_dsa/indexer_recall") for name in trainer.validation
                                 if name.startswith("validation_dsa/indexer_recall/")))}
    recall, attainable = found.pop("")
    if recall is None or attainable is None:
        key = f"recipe.stages.{trainer.stages[-1].index}.eval_recall=true"
        words = ["hybridlm", "train", str(trainer.run.path / "config.yaml"), key, *import_arguments()]
        log.info("recall      not measured; measure it with: %s", shlex.join(words))
        return
    gaps = {layer: best - got for layer, (got, best) in found.items() if got is not None and best is not None}
    worst = ""
    if len(gaps) > 1 and max(gaps.values()) > 0.001:
        layer = max(gaps, key=gaps.__getitem__)
        got, best = found[layer]
        worst = f"; worst in layer {layer.removeprefix('/')}: {got:.3f} of {best:.3f}"
    log.info("recall      indexers select keys with %.3f of dense attention; attainable is %.3f%s", recall, attainable,
             worst)


def _bigram_entropy(data: PreparedData) -> float | None:
    assert data.validation is not None
    documents = data.validation.documents(BIGRAM_ENTROPY_MAX_TOKENS)
    try:
        return bigram_entropy(data.tokenizer.decode_bytes(ids) for ids in documents)
    except ValueError:  # a text without two bytes in a row
        return None


