"""The figures of one run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from hybridlm.report.figures import (
    MAX_HEAT_COLUMNS,
    Axis,
    Chart,
    Figure,
    Heat,
    Panel,
    Series,
    Value,
    averaged,
    thinned,
)
from hybridlm.report.palette import LIMIT, TRAINING, VALIDATION, Style
from hybridlm.report.read import Run

STEP = Axis("step")
MUTED_LINE = Style(TRAINING.colour, dash="dot")
MAX_VIOLATION_PREFIX = "moe/max_violation/"


def run_figures(run: Run, metrics: Sequence[str] = ()) -> tuple[list[Figure], list[str]]:
    """Draw the figures for which a run has data; returns them and the names of those that lack data."""
    figures: list[Figure] = []
    missing: list[str] = []
    for found, lacking in (
            (_loss(run), "loss"), (_learning_rate(run), "learning rate"), (_gradient(run), "norm of the gradient"),
            (_speed(run), "tokens/s"), (_memory(run), "memory"),
            (_overload(run), "expert load over time"), (_experts(run), "load of each expert"),
            (_indexer_over_time(run, "recall"), "DSA recall"),
            (_indexer_by_layer(run, "recall"), "DSA recall by layer"),
            (_indexer_over_time(run, "kl"), "DSA KL"), (_indexer_by_layer(run, "kl"), "DSA KL by layer")):
        if found is None:
            missing.append(lacking)
        else:
            figures.append(found)
    figures += _against_teacher(run)
    figures += [_over_steps(run, f"metric-{index}", name, "", Axis(name), [(name, name, TRAINING)])
                for index, name in enumerate(metrics)]
    return figures, missing


def _over_steps(run: Run, id: str, title: str, note: str, y: Axis, lines: list[tuple[str, str, Style]]) -> Chart:
    """Lines over the steps, each of (metric, name, style), with the stages' borders; validation has points."""
    series, most = [], 1
    for metric, name, style in lines:
        if metric in run.curves:
            x, values, n = thinned(*run.curves[metric])
            sparse = metric.startswith("validation") or len(x) == 1
            series.append(Series(name, style, x, values, points=sparse))
            most = max(most, n)
    borders = [(step - 1.0, stage) for step, stage in run.stages] if len(run.stages) > 1 else []
    return Chart(id, title, note + averaged(most), STEP, y, [Panel("", series)], borders)


def _loss(run: Run) -> Chart | None:
    if "loss" not in run.curves and "validation_loss" not in run.curves:
        return None
    lines = [("loss", "training", TRAINING), ("validation_loss", "validation", VALIDATION)]
    return replace(_over_steps(run, "loss", "Loss", "Nats per token, of the next token alone.", Axis("loss"), lines),
                   wide=True)


def _learning_rate(run: Run) -> Chart | None:
    if "lr" not in run.curves:
        return None
    return _over_steps(run, "learning-rate", "Learning rate", "That of the stage; other groups of parameters have a "
                       "multiple of it.", Axis("learning rate"), [("lr", "learning rate", TRAINING)])


def _gradient(run: Run) -> Chart | None:
    if "grad_norm" not in run.curves:
        return None
    return _over_steps(run, "gradient-norm", "Norm of the gradient", "Of all parameters together, before clipping.",
                       Axis("norm", log=True), [("grad_norm", "norm of the gradient", TRAINING)])


def _speed(run: Run) -> Chart | None:
    if "tokens_per_second" not in run.curves:
        return None
    return _over_steps(run, "speed", "Speed", "Tokens per second in each step.", Axis("tokens/s", "count"),
                       [("tokens_per_second", "tokens/s", TRAINING)])


def _memory(run: Run) -> Chart | None:
    if "peak_memory_bytes" not in run.curves:
        return None
    return _over_steps(run, "memory", "Memory", "The most so far: of the GPU's allocator, or resident on a CPU.",
                       Axis("peak memory", "bytes"), [("peak_memory_bytes", "peak memory", TRAINING)])


def layer_order(names: Sequence[str]) -> list[str]:
    """Layers by depth, those of multi-token prediction last."""
    return sorted(names, key=lambda name: (not name.isdigit(), [int(part) for part in re.findall(r"\d+", name)], name))


def _by_layer(run: Run, prefix: str) -> list[str]:
    return layer_order([name.removeprefix(prefix) for name in run.curves if name.startswith(prefix)])


def _overload(run: Run) -> Heat | None:
    layers = _by_layer(run, MAX_VIOLATION_PREFIX)
    if not layers:
        return None
    columns: list[Value] = []
    z: list[list[Value]] = []
    for layer in layers:
        x, values, n = thinned(*run.curves[MAX_VIOLATION_PREFIX + layer], most=MAX_HEAT_COLUMNS)
        columns = list(x) if len(x) > len(columns) else columns
        z.append(list(values))
    z = [[*row, *[None] * (len(columns) - len(row))] for row in z]
    note = "How much more than the mean the busiest expert of a layer got: 0 is balanced." + (
        f" Each column is the mean of {n} steps." if n > 1 else "")
    return Heat("expert-overload", "Expert load over layers and time", note, STEP, Axis("layer"), "max / mean - 1",
                columns, layers, z)


def _experts(run: Run) -> Heat | None:
    if not run.loads:
        return None
    step = max(run.loads)
    layers = layer_order(list(run.loads[step]))
    width = max(len(load) for load in run.loads[step].values())
    z: list[list[Value]] = []
    for layer in layers:
        load = run.loads[step][layer]
        mean = sum(load) / len(load) or 1.0
        z.append([*(tokens / mean for tokens in load), *[None] * (width - len(load))])
    return Heat("experts", "Load of each expert", f"Tokens in step {step} over the mean of the layer: 1 is balanced.",
                Axis("expert"), Axis("layer"), "load / mean", list(range(width)), layers, z)


def _against_teacher(run: Run) -> list[Figure]:
    """Draw a run with a teacher: loss and recall beside the teacher and its window, errors by layer; else nothing."""
    if "validation_gap/teacher_loss" not in run.curves:
        return []
    baselines = [("teacher", MUTED_LINE), ("window", LIMIT)]
    figures: list[Figure] = [_over_steps(
        run, "teacher-loss", "Loss beside the teacher", "Of validation, in nats per token. The window is the teacher "
        "with a window of 64 and the first token in the converted layers, untrained.", Axis("loss"),
        [("validation_loss", "student", VALIDATION), *(
            (f"validation_gap/{name}_loss", name, style) for name, style in baselines)])]
    for kind, title in (("repeat", "Recall of repeated tokens"), ("needle", "Recall of a needle")):
        if f"validation_recall/{kind}_nll" in run.curves:
            figures.append(_over_steps(
                run, f"teacher-{kind}", title, "Negative log-likelihood of random tokens that were seen before: low is "
                "good.", Axis("nats"), [(f"validation_recall/{kind}_nll", "student", VALIDATION), *(
                    (f"validation_recall/{kind}_{name}", name, style) for name, style in baselines)]))
    for prefix, id, title, note in (
            ("validation_align/error/", "alignment", "Alignment error by layer", "Of the output of each new mixer on "
             "the teacher's input: an output of zero has 1."),
            ("validation_hidden/error/", "hidden-error", "Error of the stream by depth", "After each layer, on the "
             "student's own input, relative to the teacher's.")):
        layers = _by_layer(run, prefix)
        if layers:
            step = int(max(run.curves[prefix + layer][0][-1] for layer in layers))
            series = Series("error", VALIDATION, layers, [run.last(prefix + layer) for layer in layers], points=True)
            figures.append(Chart(id, title, f"{note} In validation after step {step}.",
                                 Axis("layer", categories=tuple(layers)), Axis("relative error", log=True),
                                 [Panel("", [series])]))
    return figures


def _indexer_over_time(run: Run, what: str) -> Chart | None:
    """In training and in validation, each the mean over layers."""
    trained, held_out = f"dsa/indexer_{what}", f"validation_dsa/indexer_{what}"
    if trained not in run.curves and held_out not in run.curves:
        return None
    if what == "kl":
        return _over_steps(run, "indexer-kl", "Indexer KL", "Mean over layers. A KL over the selected keys (sparse) is "
                           "not comparable to one over all keys (dense).", Axis("KL (nats)", log=True),
                           [(trained, "training", TRAINING), (held_out, "validation", VALIDATION)])
    return _over_steps(run, "indexer-recall", "Indexer recall", "Share of the dense attention that lies on the "
                       "selected keys, mean over layers; attainable is the most that as many keys hold.",
                       Axis("recall", "share"),
                       [(trained, "training", TRAINING), (held_out, "validation", VALIDATION),
                        (held_out.replace("recall", "attainable"), "attainable", LIMIT)])


def _indexer_by_layer(run: Run, what: str) -> Chart | None:
    """The last measured values by layer, of validation if there are any."""
    for start in ("validation_dsa/indexer_", "dsa/indexer_"):
        layers = _by_layer(run, f"{start}{what}/")
        if layers:
            break
    else:
        return None
    step = max(run.curves[f"{start}{what}/{layer}"][0][-1] for layer in layers)
    where = "validation" if start.startswith("validation") else "training"
    lines = [(what, "recall" if what == "recall" else "KL", VALIDATION if where == "validation" else TRAINING),
             *([("attainable", "attainable", LIMIT)] if what == "recall" else [])]
    series = [Series(name, style, layers, [run.last(f"{start}{metric}/{layer}") for layer in layers], points=True)
              for metric, name, style in lines]
    x = Axis("layer", categories=tuple(layers))
    y = Axis("recall", "share") if what == "recall" else Axis("KL (nats)", log=True)
    title = "Indexer recall by layer" if what == "recall" else "Indexer KL by layer"
    return Chart(f"indexer-{what}-layers", title, f"In {where} after step {step}.", x, y, [Panel("", series)])
