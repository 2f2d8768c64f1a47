"""Run and sweep folders with numbers that are known, as training leaves them."""

import copy
import functools
import itertools
import json
import math
from functools import cache

from hybridlm.config.serialization import to_dict, to_yaml
from hybridlm.files import write_json
from hybridlm.run_config import load_config
from hybridlm.sweep.plan import SweepPlan, merge_same_runs
from hybridlm.sweep.point import Point
from hybridlm.sweep.probe_tasks import PointWork, read_tasks
from hybridlm.sweep.request import SweepConfig
from hybridlm.sweep.table import describe_plan

LAYERS = ("1", "2")


def record(step, *, dsa=False, every=5, shift=0.0, stage="pretrain"):
    """Loss 6 - log(step), four experts in two layers, the first of which gets all; validation every 5 steps."""
    row = {"step": step, "loss": 6 - math.log(step) + shift, "stage": stage, "tokens": 1000 * step,
           "seconds": 0.5 * step, "tokens_per_second": 2000.0 + step, "peak_memory_bytes": (400 + step) << 20,
           "grad_norm": 1 / step, "lr": 1e-3 / step,
           **{f"moe/max_violation/{layer}": 3.0 / step for layer in LAYERS}}
    if step % every == 0:
        row |= {"validation_loss": 6.5 - math.log(step) + shift, "validation_bits_per_byte": 2.0,
                "validation_perplexity": 9.0, **{f"moe/load/{layer}": [40, 0, 0, 0] for layer in LAYERS}}
    if dsa:
        row |= {"dsa/indexer_kl": 1 / step, "dsa/indexer_kl/1": 0.5 / step, "dsa/indexer_kl/2": 1.5 / step}
        if step % every == 0:
            row |= {"validation_dsa/indexer_recall": 0.5, "validation_dsa/indexer_recall/1": 0.25,
                    "validation_dsa/indexer_recall/2": 0.75, "validation_dsa/indexer_attainable": 0.8,
                    "validation_dsa/indexer_attainable/1": 0.7, "validation_dsa/indexer_attainable/2": 0.9}
    return row


def write_records(folder, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))


def run_folder(folder, steps=20, command="hybridlm train model=tiny", **options):
    """Two stages of `steps` steps in all."""
    write_records(folder, [record(step, stage="first" if step <= steps // 2 else "second", **options)
                           for step in range(1, steps + 1)])
    (folder / "config.yaml").write_text(to_yaml(kimi()))
    session = {"started": "2026-01-01T00:00:00+00:00", "command": command, "device": "cpu", "precision": "fp32",
               "threads": 1, "versions": {"python": "3.11.7", "torch": "2.13.0"}}
    (folder / "run.json").write_text(json.dumps({"sessions": [session]}))
    return folder


@cache
def kimi():
    return load_config("train", ["model=kimi_linear_tiny"])


@cache
def tiny():
    return load_config("train", ["model=hybrid_tiny"])


def points(folder, vary, steps, probes=()):
    """The points of a sweep, made without composing a config for each."""
    made = []
    for values in itertools.product(*vary.values()):
        config = copy.deepcopy(tiny())
        for key, value in zip(vary, values, strict=True):
            *path, name = key.split(".")
            setattr(functools.reduce(getattr, path, config), name, math.inf if value == "inf" else value)
        config.training.steps = steps
        short = "_".join(f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in zip(vary, values, strict=True))
        config.run_dir = str(folder / "points" / short)
        made.append(Point(name=short, settings=dict(zip(vary, values, strict=True)), config=config,
                          work=PointWork(probes=list(probes))))
    return merge_same_runs(made)


def sweep_folder(folder, vary, *, probes=(), unfinished=(), steps=20):
    """All points finished but those named in `unfinished`. Losses rise with the ratio and the seed; probes reach 0.9 at
    ratio 0 and half of it at others, at twice the length 0.1 less."""
    sweep = SweepConfig(name="test", probes=read_tasks(list(probes)))
    plan = SweepPlan(sweep=sweep, folder=folder, vary={key: [str(value) for value in vary[key]] for key in vary},
                     points=points(folder, vary, steps, sweep.probes))
    shown = describe_plan(plan, [1.0] * len(plan.points), "by hand", ["waiting"] * len(plan.points), 1)
    folder.mkdir(parents=True)
    write_json(folder / "sweep.json", {**shown, "command": "hybridlm sweep model=hybrid_tiny"})
    for point in plan.points:
        run_dir, ratio = folder / "points" / point.name, point.config.model.schedule.ratio
        shift = min(ratio, 10) / 10 + point.config.training.seed / 100
        done = steps // 2 if point.name in unfinished else steps
        write_records(run_dir, [record(step, shift=shift) for step in range(1, done + 1)])
        if point.name not in unfinished:
            write_json(run_dir / "outcome.json", {"status": "finished", "step": steps})
            for task in sweep.probes:
                _write_probe(run_dir / "probes", task, 0.9 if ratio == 0 else 0.45)
    (folder / "points" / plan.points[0].name / "config.yaml").write_text(to_yaml(plan.points[0].config))
    return folder


def _write_probe(folder, task, score):
    folder.mkdir(exist_ok=True)
    accuracy = {str(length): {"token": score - 0.1 * (length > task.length), "exact": 0.0, "tokens": 1, "examples": 1}
                for length in task.lengths}
    write_json(folder / f"{task.label}.json", {"task": to_dict(task), "result": {"loss": 1.0, "seconds": 1.0,
                                                                                 "accuracy": accuracy}})
