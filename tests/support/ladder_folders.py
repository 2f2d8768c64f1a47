"""Finished points of ladders with losses that are known, as training leaves them."""

import json

from hybridlm.files import write_json
from hybridlm.ladder.analysis import analyse, describe_ladder
from hybridlm.ladder.law import Law
from hybridlm.ladder.plan import make_ladder_plan
from hybridlm.ladder.request import read_ladder_request
from hybridlm.sweep.folder import SweepFolder, prepare_point
from hybridlm.sweep.probe_tasks import DECODE_FILE
from hybridlm.sweep.table import describe_plan
from hybridlm.training.run_folder import LOCK_FILE

LAWS = {"full": Law(0.0, 30.0, 0.09), "kda": Law(0.0, 29.0, 0.09)}


def finish_point(point, compute):
    """Write the results of a point: the loss of its architecture's law, and noise that is the seed's."""
    name, seed = point.settings["architecture"], point.settings["training.seed"]
    finish_with_loss(point, LAWS[name].loss(compute) + 0.02 * seed + 0.0005 * (name == "kda") * (-1) ** seed)


def finish_with_loss(point, loss):
    """Write the results of a point with this loss."""
    folder = prepare_point(point)
    (folder / LOCK_FILE).touch()
    records = [{"step": point.steps, "loss": 3.0, "tokens_per_second": 1000.0, "epochs": 5.0},
               {"step": point.steps, "validation_bits_per_byte": loss}]
    if point.work.decode_context is not None:
        write_json(folder / DECODE_FILE, {"context": point.work.decode_context, "batch": 1,
                                          "decode_tokens_per_second": 400.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_json(folder / "outcome.json", {"status": "finished", "step": point.steps})


def ladder_folder(folder, *words):
    """A ladder all of whose points have finished."""
    plan = make_ladder_plan(read_ladder_request([*words, f"ladder.dir={folder}"]))
    count = len(plan.sweep.points)
    shown = describe_plan(plan.sweep, [1.0] * count, "by hand", ["waiting"] * count, 1)
    opened = SweepFolder(plan.sweep)
    opened.write_plan({**shown, "ladder": describe_ladder(plan)})
    for point in plan.sweep.points:
        finish_point(point, plan.costs[point.name].compute)
    opened.close()
    analyse(folder, plan.ladder, {name: vars(cost) for name, cost in plan.costs.items()})
    return folder
