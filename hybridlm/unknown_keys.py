"""The error for a key that no config has: the nearest key, or ours for the name that another trainer uses.

Nothing is imported here, so that the command line can refuse a mistyped key at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from hybridlm.errors import ConfigError

# Names that other trainers use (transformers, nanoGPT, Megatron-LM, torchtitan) -> what to write here.
NAMES_ELSEWHERE: dict[str, str] = {
    **dict.fromkeys(("gradient_accumulation_steps", "gradient_accumulation", "accumulate_grad_batches",
                     "accumulation_steps", "grad_accum"),
                    "training.micro_batch_size=N: sequences per forward; gradients accumulate over the "
                    "training.batch_size sequences of a step, so N is that number divided by the accumulation steps"),
    **dict.fromkeys(("per_device_train_batch_size", "microbatch_size", "micro_batch", "device_batch_size"),
                    "training.micro_batch_size"),
    **dict.fromkeys(("train_batch_size", "global_batch_size", "total_batch_size"), "training.batch_size"),
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr"), "optimizer.lr"),
    **dict.fromkeys(("max_steps", "max_iters", "num_steps", "total_steps", "train_steps", "train_iters",
                     "num_iterations"), "training.steps"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs"), "training.tokens=N: epochs times the data's tokens"),
    **dict.fromkeys(("seq_len", "seq_length", "max_seq_len", "max_seq_length", "block_size", "context_length"),
                    "training.sequence_length"),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "warmup_iters"), "optimizer.schedule.warmup"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "lr_decay_style"), "optimizer.schedule.kind"),
    "min_lr": "optimizer.schedule.min_ratio",
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "gradient_clip_val", "clip_grad"), "training.grad_clip"),
    **dict.fromkeys(("bf16", "fp16", "mixed_precision", "dtype", "torch_dtype"), "training.precision"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "save_folder", "checkpoint_dir"), "run_dir"),
    **dict.fromkeys(("save_steps", "save_interval", "save_every"), "training.checkpoint_every"),
    **dict.fromkeys(("eval_steps", "eval_interval", "val_every"), "training.eval_every"),
    **dict.fromkeys(("logging_steps", "log_interval"), "training.log_every"),
    **dict.fromkeys(("save_total_limit", "keep_last"), "training.keep_checkpoints"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpoint", "recompute"),
                    "training.activation_checkpointing"),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from", "load_path"),
                    "run_dir=THE RUN'S FOLDER to go on with it, branch_from=CHECKPOINT with other settings"),
    **dict.fromkeys(("num_gpus", "gpus", "devices", "nproc_per_node", "world_size"), "engine.num_processes"),
    **dict.fromkeys(("dataset", "dataset_path", "data_path", "train_file", "data_dir"), "data.path"),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), "model.num_layers"),
    **dict.fromkeys(("d_model", "n_embd"), "model.hidden_size"),
    "deepspeed": "engine=zero2",
}
NEAR = 0.6  # similarity above which a key is suggested
VERY_NEAR = 0.8  # similarity above which a key of the same section is meant


def unknown_key(path: str, key: object, names: Sequence[str], paths: Sequence[str],
                owners: tuple[str, Sequence[str]] | None = None) -> ConfigError:
    """Make the error for a key that a section does not have.

    Args:
        path: dotted path of the section; empty for the whole config.
        key: the key.
        names: keys of the section.
        paths: all dotted paths of the config, among which a misplaced key is looked for, the shortest first.
        owners: the key that chooses a kind, and the kinds that do have the option.

    Example:
        >>> print(unknown_key("training", "stepz", ["steps", "seed"], ["training.steps"]))
        training.stepz: unknown key; did you mean 'steps'?
    """
    full = f"{path}.{key}" if path else str(key)
    text = key if isinstance(key, str) else ""
    close = difflib.get_close_matches(text, names, n=1, cutoff=NEAR)
    hint = f"did you mean '{close[0]}'?" if close else ""
    near = bool(difflib.get_close_matches(text, names, n=1, cutoff=VERY_NEAR))
    elsewhere = [p for p in paths if p.split(".")[-1] == key and p != full]
    if not near and elsewhere:
        hint = f"did you mean '{elsewhere[0]}'?"
    elif not near and text in NAMES_ELSEWHERE:
        hint = f"here it is {NAMES_ELSEWHERE[text]}"
    if owners is not None and owners[1]:
        hint = f"it is an option of {owners[0]} {' and '.join(repr(kind) for kind in owners[1])}"
    return ConfigError(full, "unknown key", expected="" if hint else f"one of {', '.join(names)}", hint=hint)
