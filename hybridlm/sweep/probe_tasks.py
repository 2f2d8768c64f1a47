"""The work of a point besides training on text: probes, on each of which it trains from fresh weights, and decoding.

    points/NAME/
      work.yaml             PointWork: what the process of the point does beside point.yaml
      probes/LABEL.json     a task and its ProbeResult
      decode.json           a row of `decode_speed`, or the context at which it failed and why
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridlm.config.serialization import from_dict, to_dict
from hybridlm.errors import ConfigError, require
from hybridlm.evaluation.probe_training import probe_lengths
from hybridlm.evaluation.probes import Probe, make_probe
from hybridlm.files import write_json

WORK_FILE = "work.yaml"
PROBE_RESULTS_FOLDER = "probes"
DECODE_FILE = "decode.json"
DECODE_METRIC = "decode_milliseconds_per_token"


@dataclass(kw_only=True)
class ProbeTask:
    """A probe and how each point is trained on it, with the arguments of `train_on_probe`.

    >>> task = ProbeTask(name="parity", length=16, steps=100)
    >>> task.label, task.lengths, task.tokens
    ('parity', [16, 32, 64], 51200)
    """

    name: str
    label: str | None = None  # name of its results; null: the name of the probe
    parameters: dict[str, Any] = field(default_factory=dict)
    steps: int = 1000
    lr: float = 1e-3
    batch_size: int = 32  # examples per step
    length: int | None = None  # tokens per example; null: the probe's own
    lengths: list[int] | None = None  # tokens per example it is scored at; null: `length`, twice and four times that
    examples: int = 256  # that it is scored on

    def __post_init__(self) -> None:
        for key in ("steps", "lr", "batch_size", "examples"):
            require(getattr(self, key) > 0, key, "must be positive", got=getattr(self, key))
        self.label = self.name if self.label is None else self.label
        require(re.fullmatch(r"[\w.-]+", self.label) is not None, "label", "cannot name a file", got=self.label,
                expected="letters, digits, '_', '-' and '.'")
        self.length, lengths = probe_lengths(self.probe(), self.length, self.lengths)
        self.lengths = list(lengths)

    def probe(self) -> Probe:
        """The probe with the task's parameters.

        Raises:
            ConfigError: there is no such probe or parameter.
        """
        return make_probe(self.name, self.parameters)

    @property
    def tokens(self) -> int:
        """Tokens that one point is trained on."""
        assert self.length is not None
        return self.steps * self.batch_size * self.length


@dataclass(kw_only=True)
class PointWork:
    """The work of the process of each point that its config does not describe.

    Args:
        language_model: train on text.
        probes: train on these, with fresh weights each.
        decode_context: tokens of context behind which decoding is timed after training on text; null: it is not.
    """

    language_model: bool = True
    probes: list[ProbeTask] = field(default_factory=list)
    decode_context: int | None = None


def read_tasks(data: Any, path: str = "sweep.probes") -> list[ProbeTask]:
    """Probe tasks from names and mappings.

    Args:
        data: a list whose elements are names of probes or mappings with the fields of `ProbeTask`.
        path: the key that errors name.

    Raises:
        ConfigError: an unknown probe, parameter or key, a length the probe does not fit into, a label twice.

    >>> [task.label for task in read_tasks(["mqar", {"name": "mqar", "label": "hard", "steps": 5}])]
    ['mqar', 'hard']
    """
    if not isinstance(data, list):
        raise ConfigError(path, "must be a list", got=data, expected="names of probes, or mappings with a name")
    tasks = [from_dict(ProbeTask, {"name": item} if isinstance(item, str) else item, f"{path}.{index}")
             for index, item in enumerate(data)]
    labels = [task.label for task in tasks]
    for label in labels:
        require(labels.count(label) == 1, path, "names two probes alike", got=label, expected="a label for each")
    return tasks


def read_probe_result(run_dir: Path, task: ProbeTask) -> dict[str, Any] | None:
    """The result of a finished training on the probe; None before that, and where the file belongs to another task."""
    try:
        data = json.loads(_result_file(run_dir, task).read_text(encoding="utf-8"))
        return data["result"] if data["task"] == to_dict(task) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_probe_result(run_dir: Path, task: ProbeTask, result: dict[str, Any]) -> None:
    """Write what training on the probe gave, for `read_probe_result`."""
    file = _result_file(run_dir, task)
    file.parent.mkdir(exist_ok=True)
    write_json(file, {"task": to_dict(task), "result": result})


def _result_file(run_dir: Path, task: ProbeTask) -> Path:
    return run_dir / PROBE_RESULTS_FOLDER / f"{task.label}.json"


def decoding_is_done(run_dir: Path, context: int | None) -> bool:
    """Whether decoding behind `context` tokens was timed, or cannot be; true where `context` is null."""
    return context is None or _read_decoding(run_dir, context) is not None


def read_decode_metrics(run_dir: Path, context: int | None) -> dict[str, float]:
    """The time of a decoded token behind `context` tokens as a metric of a point; empty where it was not measured."""
    row = None if context is None else _read_decoding(run_dir, context)
    try:
        return {} if row is None else {DECODE_METRIC: 1000.0 * row["batch"] / row["decode_tokens_per_second"]}
    except (KeyError, TypeError, ZeroDivisionError):
        return {}


def write_decoding(run_dir: Path, row: dict[str, Any]) -> None:
    """Write a row of `decode_speed`, or `context` and `error` where decoding failed."""
    write_json(run_dir / DECODE_FILE, row)


def _read_decoding(run_dir: Path, context: int) -> dict[str, Any] | None:
    """The content of decode.json; None where it is of another context, or is not there."""
    try:
        row = json.loads((run_dir / DECODE_FILE).read_text(encoding="utf-8"))
        return row if row["context"] == context else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
