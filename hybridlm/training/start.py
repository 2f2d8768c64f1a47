"""Start of a run: its model, the weights it begins with, and the files that it takes from a checkpoint."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from hybridlm import checkpoint
from hybridlm.config.schema import Config, ConvertConfig, DataConfig, selector_patterns
from hybridlm.data import PackedDataset, PreparedData, Tokenizer, check_vocab, tokenizer_differences
from hybridlm.distributed.engine import Engine
from hybridlm.errors import CheckpointError
from hybridlm.interop.checkpoint_folders import save_checkpoint
from hybridlm.interop.surgery import convert_attention
from hybridlm.model.calibration import calibrate
from hybridlm.model.model import HybridLM, build_model
from hybridlm.training.branch import Branch

log = logging.getLogger("hybridlm")
CONVERTED_START = "converted"  # in the run folder: the checkpoint that a converting run starts from
CALIBRATION_LENGTH = 512  # most tokens of a sequence that calibration looks at


def build_run_model(config: Config, engine: Engine, data: PreparedData, weights: Path | None) -> HybridLM:
    """Build the model, with the weights of a checkpoint where the run begins with them (`init_from`)."""
    check_vocab(data.tokenizer, config.model.vocab_size)
    model = build_model(config, device=engine.device, shard_experts=engine.shard_experts,
                        shard_weights=engine.shard_weights)
    model.activation_checkpointing = config.training.activation_checkpointing
    if config.training.compile:
        model.compile_layers()
    if weights is not None:
        if config.recipe.convert is not None:
            weights = _make_converted_start(config, config.recipe.convert, engine, data, weights)
        if config.recipe.indexer is not None:
            _load_to_convert(model, config, weights, engine)
        else:
            changes = checkpoint.layer_diff(checkpoint.layer_list(checkpoint.read_model_config(weights)),
                                            checkpoint.layer_list(config.model))
            if changes:
                raise CheckpointError(f"init_from={weights} is another architecture: {'; '.join(changes[:6])}; leave "
                                      "model=... out, and the run takes the checkpoint's model")
            checkpoint.load_weights(model, weights, local_shard=engine.local_shard)
        log.info("weights from %s", weights)
        if (weights / "tokenizer.json").is_file():
            differ = tokenizer_differences(Tokenizer.from_folder(weights), data.tokenizer)
            if differ:
                log.warning("the tokenizer is not the one these weights were trained with: it differs in %s; leave "
                            "data.tokenizer out, or set data.tokenizer=%s", ", ".join(differ[:3]), weights)
    return model


def _make_converted_start(config: Config, convert: ConvertConfig, engine: Engine, data: PreparedData,
                          teacher: Path) -> Path:
    """Write the converted teacher, calibrated where the recipe says so, as a checkpoint in the run folder.

    Returns:
        Its folder, from which all ranks take their weights.
    """
    folder = Path(config.run_dir).expanduser() / CONVERTED_START

    def write() -> None:
        assert convert.converted is not None
        model = checkpoint.load_checkpoint(teacher)
        calibrated = convert.init == "calibrated"
        longest = config.recipe.longest_sequence(config.training.sequence_length)
        student, transfer = convert_attention(model, convert.converted, convert.mixer, context_length=longest,
                                              calibrated=calibrated, seed=config.training.seed)
        log.info("converted layers %s to %s: %d tensors taken over, %d fresh", convert.converted,
                 convert.mixer if isinstance(convert.mixer, str) else convert.mixer.get("kind"), len(transfer.kept),
                 len(transfer.fresh))
        if calibrated:
            first = config.recipe.stages[0].sequence_length or config.training.sequence_length
            length = max(2, min(first, CALIBRATION_LENGTH, convert.calibration_tokens))
            dataset = PackedDataset(data.train, length, seed=config.training.seed)
            rows = dataset.batch(range(max(1, convert.calibration_tokens // length)))
            fits = calibrate(model, student, convert.converted, [(rows.input_ids, rows.cu_seqlens)])
            for fit in fits:
                reach = f"{min(fit.look_back):.0f} to {max(fit.look_back):.0f} tokens" if fit.look_back else "(unknown)"
                log.info("layer %d: looks back %s; error of its output %.3g as copied, %.3g calibrated", fit.layer,
                         reach, fit.error_before, fit.error)
        if folder.exists():
            shutil.rmtree(folder)
        save_checkpoint(student, folder)

    engine.on_main(write)
    return folder


def _load_to_convert(model: HybridLM, config: Config, folder: Path, engine: Engine) -> None:
    """Load all weights except those of indexers that the checkpoint does not have yet."""
    may_lack = selector_patterns(config.model)
    fresh = checkpoint.load_weights(model, folder, may_lack, local_shard=engine.local_shard)
    new = list(dict.fromkeys(name.split(".mixer.")[0] for name in fresh))
    if new:
        log.info("fresh indexers in %s", ", ".join(new))
    names = config.model.layers()
    kept = {f"layers.{index}": topk for index, name in enumerate(names)
            if (topk := config.model.mixers[name].indexer_topk()) is not None and f"layers.{index}" not in new}
    if not kept:
        return
    recipe = config.recipe.indexer or {}
    topks = ", ".join(str(topk) for topk in sorted(set(kept.values())))
    text = (f"{folder} has indexers in these layers already: {', '.join(kept)}; they are trained further as they are, "
            f"with top-k {topks}")
    if not new:
        text += ", and recipe.indexer changes nothing"
        if recipe.get("topk") not in (None, *kept.values()):
            text += f" (recipe.stages.N.topk={recipe['topk']} sets its top-k for a stage)"
    log.warning("%s", text)


def initial_weights(config: Config, engine: Engine) -> Path | None:
    """Find the checkpoint of `init_from`; None where the run has fresh weights."""
    return None if config.init_from is None else checkpoint.resolve(config.init_from, engine)


def data_config(config: Config, start: Path | None) -> DataConfig:
    """The data section, with the run's own copy of a tokenizer whose file is gone."""
    spec = config.data.tokenizer
    gone = ("/" in spec or spec.endswith(".json")) and not Path(spec).expanduser().exists()
    if start is None or not gone or not (start / "tokenizer.json").is_file():
        return config.data
    log.warning("data.tokenizer=%s is gone: the run goes on with the copy in %s", spec, start)
    return replace(config.data, tokenizer=str(start / "tokenizer.json"))


def lineage_file(origin: Path | None, branch: Branch | None) -> dict[str, str]:
    """Make lineage.json, by its name, for a run that begins from a checkpoint."""
    if origin is None:
        return {}
    changes = [] if branch is None else [(change.key, change.old, change.new) for change in branch.changes]
    lineage = checkpoint.make_lineage("init" if branch is None else "branch", origin, changes,
                                      datetime.now(UTC).isoformat(timespec="seconds"))
    return {checkpoint.LINEAGE_FILE: json.dumps(lineage, indent=1)}
