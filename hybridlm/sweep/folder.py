"""The folder of a sweep: its files, which sweep it belongs to, and how far each point is.

    DIR/
      sweep.json        what is varied and every point with its costs
      results.csv, results.json
      jobs/N/           a submission to a cluster, see `hybridlm.sweep.slurm_jobs`
      points/NAME/      the run folder of a point, and in it:
        point.yaml      the resolved config that `hybridlm train` gets
        work.yaml       the work of the point besides text: probes, timing of decoding
        probes/         the results of probes, one file each
        decode.json     the time of a decoded token
        outcome.json    the outcome of the last start
        output.txt      its printed output
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridlm.config.legacy import load_saved_config
from hybridlm.config.serialization import to_dict, to_yaml
from hybridlm.errors import ConfigError, UserError
from hybridlm.files import is_locked, try_lock, write_json, write_text
from hybridlm.sweep.plan import SweepPlan
from hybridlm.sweep.point import Point
from hybridlm.sweep.probe_tasks import WORK_FILE, ProbeTask, decoding_is_done, read_probe_result
from hybridlm.training.run_changes import check_same_run
from hybridlm.training.run_folder import LOCK_FILE

POINT_FILE = "point.yaml"
OUTCOME_FILE = "outcome.json"
OUTPUT_FILE = "output.txt"
LAUNCH_FILE = "launch.json"  # in jobs/N: the points of a launcher, and its options
STOP_FILE = "stop"  # in jobs/N: asks the points there to save and end


class SweepFolder:
    """Locks the folder of a sweep for one process, until `close()`.

    Raises:
        ConfigError: the folder cannot be written or belongs to another sweep, or another process runs this one.
    """

    def __init__(self, plan: SweepPlan):
        self.path = plan.folder
        check_owner(plan)
        try:
            (self.path / "points").mkdir(parents=True, exist_ok=True)
            self._lock = try_lock(self.path / LOCK_FILE)
        except OSError as error:
            raise ConfigError("sweep.dir", f"cannot be written ({error.strerror})", got=str(self.path)) from None
        if self._lock is None:
            raise ConfigError("sweep.dir", "another process runs this sweep", got=str(self.path),
                              hint="wait for it, or take another sweep.dir")

    def close(self) -> None:
        """Free the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write_plan(self, report: dict[str, Any]) -> None:
        """Write sweep.json: the plan, without the status of points, which is in their own folders."""
        rows = [{key: value for key, value in row.items() if key != "status"} for row in report["points"]]
        write_json(self.path / "sweep.json", {**report, "points": rows})


def is_busy(run_dir: Path) -> bool:
    """Whether a process trains in this run folder."""
    return is_locked(run_dir / LOCK_FILE)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """The content of sweep.json; None where there is no such file.

    Raises:
        ConfigError: a file that no sweep wrote.
    """
    path = folder / "sweep.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        [(row["point"], row["settings"]) for row in data["points"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("sweep.dir", "holds a plan that cannot be read", got=str(path),
                          hint="delete it: the same sweep started again writes a new one") from None
    return data


def check_owner(plan: SweepPlan) -> None:
    """Check that a folder that already holds a sweep holds this one; lists may have grown since.

    Raises:
        ConfigError: the folder belongs to another sweep, or to no sweep.
    """
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise ConfigError("sweep.dir", "is not a folder", got=str(folder))
    saved = read_plan(folder)
    if saved is None:
        _check_no_other_files(folder, plan.other_files)
        return
    hint = "take another sweep.dir=..., its results stay as they are"
    for task in saved.get("probes", []):
        now = next((asked for asked in plan.sweep.probes if asked.label == task["label"]), None)
        if now is None or to_dict(now) != task:
            raise ConfigError("sweep.dir", f"holds another sweep: its probe {task['label']} is not the same here",
                              got=str(folder), hint=hint)
    points = {point.name: point for point in plan.points}
    if missing := [row["point"] for row in saved["points"] if row["point"] not in points]:
        raise ConfigError("sweep.dir", f"holds another sweep: it has the point {missing[0]}, this one has not",
                          got=str(folder), hint=hint)
    for name, point in points.items():
        file = folder / "points" / name / POINT_FILE
        if file.exists():
            try:
                check_same_run(load_saved_config(file), point.config, file.parent)
            except UserError as error:
                what = str(error).split("; got ")[0].split(". Take another")[0]
                more = f"; {plan.other_run_hint}" if plan.other_run_hint else ""
                raise ConfigError("sweep.dir", f"holds another sweep, point {name} is not the same: {what}",
                                  got=str(folder), hint=f"{hint}{more}") from None


def _check_no_other_files(folder: Path, allowed: tuple[str, ...]) -> None:
    if not folder.exists():
        return
    known = (LOCK_FILE, "points", "jobs", *allowed)
    strange = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if strange:
        raise ConfigError("sweep.dir", f"holds something that is no sweep ({strange[0]})", got=str(folder),
                          hint="take another sweep.dir=...")


def point_outcome(point: Point) -> dict[str, Any]:
    """The outcome of the last start of a point; {"status": "waiting"} before the first, or if it is to do more now."""
    return read_outcome(Path(point.config.run_dir), point.steps, point.work.probes, point.work.decode_context)


def read_outcome(run_dir: Path, steps: int, probes: list[ProbeTask],
                 decode_context: int | None = None) -> dict[str, Any]:
    """The outcome of a point that is to train for `steps` on text, to decode, and to train on `probes`.

    Returns:
        outcome.json, or {"status": "waiting"} where there is none, or where it finished with less than this.
    """
    try:
        data = json.loads((run_dir / OUTCOME_FILE).read_text(encoding="utf-8"))
        if data["status"] != "finished":
            return data
        complete = (data["step"] == steps and decoding_is_done(run_dir, decode_context)
                    and all(read_probe_result(run_dir, task) is not None for task in probes))
        return data if complete else {"status": "waiting"}
    except (OSError, ValueError, KeyError, TypeError):
        return {"status": "waiting"}


def points_to_start(points: list[Point], retry_failed: bool) -> list[Point]:
    """The points that are not finished; failed ones only where they are to be tried again."""
    done = {"finished"} if retry_failed else {"finished", "failed"}
    return [point for point in points if point_outcome(point)["status"] not in done]


def prepare_point(point: Point) -> Path:
    """Write the config of a point, delete the outcome of an earlier start, and return the run folder."""
    folder = Path(point.config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        (folder / OUTCOME_FILE).unlink()
    write_text(folder / POINT_FILE, to_yaml(point.config))
    write_text(folder / WORK_FILE, to_yaml(point.work))
    return folder
