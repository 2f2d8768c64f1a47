"""The folder of a sweep: what it holds, whose it is, and how far each point is.

    DIR/
      sweep.json        what is varied and every point with its costs
      results.csv, results.json
      points/NAME/      the run folder of a point, and in it:
        point.yaml      the resolved config that `hybridlm train` gets
        work.yaml       what the point is trained on besides: probes
        probes/         what they gave, a file each
        outcome.json    how the last start ended
        output.txt      what it printed
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hybridlm.config.serialization import load_yaml, to_dict, to_yaml
from hybridlm.errors import ConfigError, UserError
from hybridlm.files import is_locked, try_lock, write_json, write_text
from hybridlm.sweep.plan import Point, SweepPlan
from hybridlm.sweep.probes import WORK_FILE, ProbeTask, read_result
from hybridlm.training.run_folder import LOCK_FILE, compare

POINT_FILE, OUTCOME_FILE, OUTPUT_FILE = "point.yaml", "outcome.json", "output.txt"


class SweepFolder:
    """Holds a sweep's folder for one process; `close()` lets it go.

    Raises:
        ConfigError: it cannot be written, belongs to another sweep, or another process runs this one.
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
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def write_plan(self, report: dict[str, Any]) -> None:
        """What is planned; how far each point is stands with the point."""
        rows = [{key: value for key, value in row.items() if key != "status"} for row in report["points"]]
        write_json(self.path / "sweep.json", {**report, "points": rows})


def is_busy(run_dir: Path) -> bool:
    """Does another process train in this run folder?"""
    return is_locked(run_dir / LOCK_FILE)


def read_plan(folder: Path) -> dict[str, Any] | None:
    """sweep.json, None where there is none.

    Raises:
        ConfigError: a file that is none of ours.
    """
    path = folder / "sweep.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        [(row["point"], row["settings"]) for row in data["points"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError("sweep.dir", "holds a sweep.json that cannot be read", got=str(path),
                          hint="delete it: the same sweep started again writes a new one") from None
    return data


def check_owner(plan: SweepPlan) -> None:
    """A folder that already holds a sweep must hold this one; lists may have grown since.

    Raises:
        ConfigError: it is another sweep's, or no sweep's.
    """
    folder, hint = plan.folder, "take another sweep.dir=..., its results stay as they are"
    if folder.exists() and not folder.is_dir():
        raise ConfigError("sweep.dir", "is not a folder", got=str(folder))
    saved = read_plan(folder)
    if saved is None:
        strange = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK_FILE, "points", "jobs")) \
            if folder.exists() else []
        if strange:
            raise ConfigError("sweep.dir", f"holds something that is no sweep ({strange[0]})", got=str(folder),
                              hint="take another sweep.dir=...")
        return
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
                compare(load_yaml(file), point.config, file.parent)
            except UserError as error:
                what = str(error).split("; got ")[0].split(". Take another")[0]
                raise ConfigError("sweep.dir", f"holds another sweep, point {name} is not the same: {what}",
                                  got=str(folder), hint=hint) from None


def outcome(point: Point) -> dict[str, Any]:
    """How the last start of a point ended; {"status": "waiting"} before the first, and where more is asked."""
    return read_outcome(Path(point.config.run_dir), point.steps, point.work.probes)


def read_outcome(run_dir: Path, steps: int, probes: list[ProbeTask]) -> dict[str, Any]:
    """The outcome of a point that is to train for `steps` on text, and on `probes`."""
    try:
        data = json.loads((run_dir / OUTCOME_FILE).read_text(encoding="utf-8"))
        done = data["step"] == steps and all(read_result(run_dir, task) is not None for task in probes) \
            if data["status"] == "finished" else True
        return data if done else {"status": "waiting"}
    except (OSError, ValueError, KeyError, TypeError):
        return {"status": "waiting"}


def begin(point: Point) -> Path:
    """Writes the config of a point and returns its run folder; the outcome of an earlier start goes."""
    folder = Path(point.config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        (folder / OUTCOME_FILE).unlink()
    write_text(folder / POINT_FILE, to_yaml(point.config))
    write_text(folder / WORK_FILE, to_yaml(point.work))
    return folder
