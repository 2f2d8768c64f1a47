"""SmolLM2 as a checkpoint of ours, and trainings that stop after some minutes; for the scripts beside it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path


def hybridlm(*words: str, minutes: float | None = None) -> bool:
    """Run a command of hybridlm; returns whether it came to its end before `minutes` were over."""
    process = subprocess.Popen([sys.executable, "-m", "hybridlm.cli", *words])
    try:
        code = process.wait(None if minutes is None else 60 * minutes)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if code:
        raise SystemExit(code)
    return True


def train_run(run: Path, *words: str, minutes: float | None = None) -> bool:
    """Train a run, or go on with it, unless the file RUN.done beside it says that it has come to its end.

    Args:
        run: its folder.
        words: settings.
        minutes: stop after so long; None: train to the end.

    Returns:
        Whether it has come to its end, however it was stopped.
    """
    done = run.with_name(f"{run.name}.done")
    if not done.exists():
        hybridlm("train", f"run_dir={run}", *words, minutes=minutes)
        if is_finished(run):
            done.touch()
    return done.exists()


def is_finished(run: Path) -> bool:
    """Whether the newest checkpoint of a run has all steps of its plan; a run without one has not begun."""
    from hybridlm import load_config
    from hybridlm.checkpoint import newest
    from hybridlm.files import step_of
    from hybridlm.training.stages import plan_stages

    found = newest(run / "checkpoints", hashes=False)
    if found is None:
        return False
    return step_of(found) == sum(stage.steps for stage in plan_stages(load_config(str(run / "config.yaml"))))


def import_model(folder: Path, gguf: Path | None, model: Path | None) -> None:
    """Make the teacher, a checkpoint of ours, from quantised weights or from a folder of transformers."""
    if (folder / "teacher").exists():
        return
    if model is None:
        if gguf is None:
            raise SystemExit("import: give --gguf FILE or --model FOLDER")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = folder / "transformers"
        quantised = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        if hasattr(quantised.config, "quantization_config"):
            del quantised.config.quantization_config
        plain = type(quantised)(quantised.config)  # without what remembers the quantisation
        plain.load_state_dict(quantised.state_dict())
        plain.save_pretrained(model)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(model)
    hybridlm("import", str(model), str(folder / "teacher"))
