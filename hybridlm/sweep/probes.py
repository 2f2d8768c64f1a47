"""Probes of a sweep: the architecture of every point is trained on each of them.

The process of a point does them one after the other, behind its training on text. What a probe gave stands in a file of
its own as soon as it is known, so whatever ends the process costs one training at most:

    points/NAME/
      work.yaml             what the process is asked beside point.yaml
      probes/LABEL.json     a task and its ProbeResult
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridlm.config.schema import Config
from hybridlm.config.serialization import from_dict, load_yaml, to_dict
from hybridlm.errors import ConfigError, UserError, require
from hybridlm.evaluation.probe_training import probe_lengths, train_on_probe
from hybridlm.evaluation.probes import Probe, make_probe
from hybridlm.files import write_json
from hybridlm.training.run_folder import RunFolder

WORK_FILE, RESULTS_FOLDER = "work.yaml", "probes"


@dataclass(kw_only=True)
class ProbeTask:
    """A probe and how each point is trained on it, as in `train_on_probe`. Its results go by `label` (null: the name of
    the probe). `lengths` (null: `length`, twice and four times that) are those it is scored at."""

    name: str
    label: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    steps: int = 1000
    lr: float = 1e-3
    batch_size: int = 32
    length: int | None = None
    lengths: list[int] | None = None
    examples: int = 256

    def __post_init__(self) -> None:
        for key in ("steps", "lr", "batch_size", "examples"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        self.label = self.name if self.label is None else self.label
        require(re.fullmatch(r"[\w.-]+", self.label) is not None, "label", "cannot name a file", got=self.label,
                expected="letters, digits, '_', '-' and '.'")
        self.length, lengths = probe_lengths(self.probe(), self.length, self.lengths)
        self.lengths = list(lengths)

    def probe(self) -> Probe:
        """Raises ConfigError where there is no such probe or parameter."""
        return make_probe(self.name, self.parameters)

    @property
    def tokens(self) -> int:
        """Of training."""
        assert self.length is not None
        return self.steps * self.batch_size * self.length


@dataclass(kw_only=True)
class PointWork:
    """What each point of a sweep is trained on, besides what its config says."""

    language_model: bool = True
    probes: list[ProbeTask] = field(default_factory=list)


def read_tasks(data: Any, path: str = "sweep.probes") -> list[ProbeTask]:
    """Tasks from names and mappings.

    Raises:
        ConfigError: an unknown probe, parameter or key, a length it does not fit into, a label twice.
    """
    if not isinstance(data, list):
        raise ConfigError(path, "must be a list", got=data, expected="names of probes, or mappings with a name")
    tasks = [from_dict(ProbeTask, {"name": item} if isinstance(item, str) else item, f"{path}.{index}")
             for index, item in enumerate(data)]
    labels = [task.label for task in tasks]
    for label in labels:
        require(labels.count(label) == 1, path, "names two probes alike", got=label, expected="a label for each")
    return tasks


def read_result(run_dir: Path, task: ProbeTask) -> dict[str, Any] | None:
    """What a finished training on the probe gave; None before that, and where the file is of another task."""
    try:
        data = json.loads((run_dir / RESULTS_FOLDER / f"{task.label}.json").read_text(encoding="utf-8"))
        return data["result"] if data["task"] == to_dict(task) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_point(run_dir: Path) -> int:
    """Does what is left of the point in `run_dir`, and prints how it ended as JSON. A probe that fails is reported and
    does not keep the others from running.

    Raises:
        ConfigError: another process works there.
    """
    from hybridlm.config.compose import load_config
    from hybridlm.sweep.folder import POINT_FILE

    config, work = load_config(str(run_dir / POINT_FILE)), from_dict(PointWork, load_yaml(run_dir / WORK_FILE))
    ended: dict[str, Any] = {"status": "finished", "step": 0, "validation": None, "bigram_bits_per_byte": None,
                             "checkpoint": None}
    if work.language_model:
        from hybridlm.training import train

        ended = train(config, to_stderr=True).to_dict()
    failed = 0
    if ended["status"] == "finished":
        with closing(RunFolder(run_dir)):  # for others it is busy
            failed = _run_probes(run_dir, config, work.probes)
    print(json.dumps(ended))
    return 1 if failed else 0


def _run_probes(run_dir: Path, config: Config, tasks: list[ProbeTask]) -> int:
    """How many of them failed."""
    from hybridlm.distributed.engine import pick_device

    device = pick_device(config.engine).type
    (run_dir / RESULTS_FOLDER).mkdir(exist_ok=True)
    failed = 0
    for task in tasks:
        if read_result(run_dir, task) is not None:
            continue
        print(f"probe {task.label}: {task.steps} steps", file=sys.stderr, flush=True)
        try:
            result = train_on_probe(config.model, task.probe(), task.steps, task.lr, config.training.seed,
                                    length=task.length, eval_lengths=task.lengths, batch_size=task.batch_size,
                                    examples=task.examples, device=device)
        except (UserError, RuntimeError) as error:  # torch's own, such as a GPU without enough memory
            print(f"error: probe {task.label}: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
            failed += 1
            continue
        write_json(run_dir / RESULTS_FOLDER / f"{task.label}.json", {"task": to_dict(task), "result": result.to_dict()})
    return failed


if __name__ == "__main__":
    try:
        code = run_point(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(code)
