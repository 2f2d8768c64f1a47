"""Turns SmolLM2-135M into a hybrid on two cores: selection, start, alignment, distillation, and their measurements.

    python scripts/experiments/linearize_smollm2.py import --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    python scripts/experiments/linearize_smollm2.py select
    python scripts/experiments/linearize_smollm2.py chosen --minutes 30
    python scripts/experiments/linearize_smollm2.py uniform --minutes 30
    python scripts/experiments/linearize_smollm2.py copy
    python scripts/experiments/linearize_smollm2.py table
    python scripts/experiments/linearize_smollm2.py figures

Each piece leaves its results in the folder of the experiment and does nothing where they are there. A training piece
that `--minutes` stops goes on where it was when it is called again. `import` needs the packages transformers and gguf,
and takes a file of quantised weights or, without `--gguf`, a folder of transformers given by `--model`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from smollm2 import hybridlm, import_model, train_run  # the file beside this one

KEEP = 7  # of 30 attention layers
ALIGN_STEPS, DISTILL_STEPS = 150, 150  # of 2 sequences of 512 tokens
COPY_STEPS = 50  # of the comparison of starts
BATCH, LENGTH = 2, 512


def select(folder: Path) -> None:
    """Choose the layers that stay, by a window of 32 tokens, and measure the choice against an even spread."""
    out = folder / "layers.json"
    if not out.exists():
        hybridlm("select", f"teacher={folder / 'teacher'}", "data.path=stdlib", "--method", "window", "--keep",
                 str(KEEP), "--window", "32", "--windows", "1", "--out", str(out))


def train(folder: Path, name: str, keep: str, stages: list[str], minutes: float | None, *more: str) -> None:
    """Train a conversion in the folder `name`, or go on with it."""
    train_run(
        folder / name, "recipe=linearize_tiny", f"teacher={folder / 'teacher'}", f"recipe.convert.keep={keep}",
        f"recipe.stages=[{', '.join(stages)}]", "data.path=stdlib", f"training.batch_size={BATCH}",
        f"training.sequence_length={LENGTH}", "training.eval_batches=4", "training.eval_every=75",
        "training.checkpoint_every=25", *more, minutes=minutes)


def align(steps: int) -> str:
    """The stage in which each new mixer learns its layer."""
    return (f"{{name: align, inputs: teacher, trainable: ['@new'], loss_weights: {{lm: 0, layer_output: 1}}, "
            f"steps: {steps}, lr: 1e-3, schedule: {{kind: cosine, warmup: 10, min_ratio: 0.01}}}}")


def distill(steps: int) -> str:
    """The stage in which the model learns the teacher's predictions."""
    return (f"{{name: distill, loss_weights: {{lm: 0, teacher_kl: 1}}, steps: {steps}, lr: 1e-4, "
            "schedule: {kind: cosine, warmup: 10, min_ratio: 0.1}}")


def table(folder: Path) -> None:
    """Print what was measured at the end of each stage, and the work in FLOPs from the configs."""
    from hybridlm.checkpoint import read_model_config
    from hybridlm.model.cost import training_flops

    if (folder / "layers.json").exists():
        for name, found in json.loads((folder / "layers.json").read_text(encoding="utf-8"))["measured"].items():
            print(f"| select: {name} | {found['loss']:.3f} | {found['repeat_nll']:.2f} |")
    keys = ("validation_loss", "validation_gap/teacher_loss", "validation_gap/window_loss",
            "validation_ablation/linear_branch_cut", "validation_recall/repeat_nll", "validation_recall/repeat_teacher",
            "validation_recall/repeat_window", "validation_align/error", "validation_distill/agreement")
    print("| run | stage | step |", " | ".join(key.removeprefix("validation_") for key in keys), "|")
    for name in ("chosen", "uniform", "copy", "calibrated"):
        file = folder / name / "metrics.jsonl"
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        last = {record["stage"]: record for record in records if "validation_loss" in record}
        for stage, record in last.items():
            cells = ["" if record.get(key) is None else f"{record[key]:.3f}" for key in keys]
            print(f"| {name} | {stage} | {record['step']} | {' | '.join(cells)} |")
    student = folder / "chosen" / "converted"
    if student.exists():
        flops = training_flops(read_model_config(student), LENGTH)
        print(f"a training step of the student takes {flops / 1e9:.2f} GFLOP per token; 60 M tokens of distillation "
              f"with the teacher's forward {60e6 * flops * 4 / 3:.1e} FLOP")


def figures(folder: Path) -> None:
    """Draw what each layer is worth, the error of each new mixer, and how errors add up, as PNG files in the folder."""
    from hybridlm.report.figures import Axis, Chart, Panel, Series
    from hybridlm.report.palette import Palette
    from hybridlm.report.png import write_png

    layer = Axis("layer")
    chosen = json.loads((folder / "layers.json").read_text(encoding="utf-8"))
    palette = Palette(["one layer", "kept"])
    rows = chosen["layers"]
    worth = [Series("one layer", palette["one layer"], [row["layer"] for row in rows],
                    [row["repeat_nll"] for row in rows], points=True)]
    kept = [row for row in rows if row["layer"] in chosen["keep"]]
    worth.append(Series("kept", palette["kept"], [row["layer"] for row in kept], [row["repeat_nll"] for row in kept],
                        line=False, points=True))
    level = (chosen["measured"]["teacher"]["repeat_nll"], "teacher")
    write_png(Chart("selection", "One layer limited to a window of 32 and the first token", "", layer,
                    Axis("NLL of repeated tokens"), [Panel("", worth, level=level)]), folder / "selection.png")
    ends = {}
    for name in ("copy", "calibrated", "chosen", "uniform"):
        file = folder / name / "metrics.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            record = json.loads(line)
            if "validation_loss" in record:
                ends.pop(f"{name}, {record['stage']}", None)
                ends[f"{name}, {record['stage']}"] = record
    palette = Palette(ends)
    for metric, title in (("validation_align/error/", "Error of a new mixer on what the teacher's layer reads"),
                          ("validation_hidden/error/", "Error of the stream behind each layer")):
        series = []
        for name, record in ends.items():
            found = {int(key.removeprefix(metric)): value for key, value in record.items() if key.startswith(metric)}
            if found:
                series.append(Series(name, palette[name], list(found), list(found.values()), points=True))
        if series:
            write_png(Chart(metric, title, "", layer, Axis("relative error", log=True), [Panel("", series)]),
                      folder / f"{metric.split('/')[0].removeprefix('validation_')}.png")


def main() -> None:
    """Run one piece of the experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=("import", "select", "chosen", "uniform", "copy", "table", "figures"))
    parser.add_argument("--folder", type=Path, default=Path("runs/linearize_smollm2"))
    parser.add_argument("--gguf", type=Path, help="file of quantised weights, for import")
    parser.add_argument("--model", type=Path, help="folder of transformers, for import")
    parser.add_argument("--minutes", type=float, help="stop training after so long")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    layers = str(args.folder / "layers.json")
    pieces = {
        "import": lambda: import_model(args.folder, args.gguf, args.model),
        "select": lambda: select(args.folder),
        "chosen": lambda: train(args.folder, "chosen", layers, [align(ALIGN_STEPS), distill(DISTILL_STEPS)],
                                args.minutes),
        "uniform": lambda: train(args.folder, "uniform", str(KEEP), [align(ALIGN_STEPS)], args.minutes),
        "copy": lambda: [train(args.folder, init, layers, [align(COPY_STEPS)], args.minutes,
                               f"recipe.convert.init={init}") for init in ("copy", "calibrated")],
        "table": lambda: table(args.folder),
        "figures": lambda: figures(args.folder)}
    pieces[args.piece]()


if __name__ == "__main__":
    main()
