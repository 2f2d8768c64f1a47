"""Records which backend ran each operation in each layer, and why, during the first step of a run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from hybridlm.model.model import HybridLM
from hybridlm_kernels import registry
from hybridlm_kernels.compiling.operation import fused_operations

log = logging.getLogger("hybridlm")
BACKENDS_FILE = "backends.json"  # in the run folder


@dataclass(frozen=True)
class BackendUse:
    """One backend of one operation, and the layers it ran in.

    `layers` are ranges of layer numbers, "mtp", or "model" for what stands outside of layers (last norm, loss);
    `rejected` are the backends of higher priority, each with the reason why it did not run.
    """

    layers: str
    operation: str
    backend: str
    why: str
    rejected: tuple[str, ...]


@contextmanager
def recording_backends(model: HybridLM) -> Iterator[Callable[[], list[BackendUse]]]:
    """Record every call of an operation under the layer that makes it; yields a function that returns the record."""
    where: list[str] = []
    seen: dict[registry.Choice, list[str]] = {}

    def note(choice: registry.Choice) -> None:
        places = seen.setdefault(choice, [])
        place = where[-1] if where else "model"
        if place not in places:
            places.append(place)

    def enter(place: str) -> Callable[..., None]:
        return lambda *_: where.append(place)

    def leave(*_: object) -> None:
        where.pop()

    named: list[tuple[str, nn.Module]] = [*((str(i), block) for i, block in enumerate(model.layers)),
                                          *(("mtp", module) for module in model.mtp)]
    hooks = [hook for place, module in named for hook in (
        module.register_forward_pre_hook(enter(place)), module.register_forward_hook(leave, always_call=True))]
    try:
        with registry.watching(note):
            yield lambda: [
                BackendUse(format_layer_ranges(places), choice.operation, choice.backend, choice.why, choice.rejected)
                for choice, places in seen.items()]
    finally:
        for hook in hooks:
            hook.remove()


def format_layer_ranges(places: Sequence[str]) -> str:
    """Join layer names, with runs of numbers as ranges.

    Example:
        >>> format_layer_ranges(["0", "1", "2", "4", "mtp"])
        '0-2, 4, mtp'
    """
    runs: list[list[str]] = []
    for place in places:
        follows = runs and place.isdigit() and runs[-1][-1].isdigit() and int(place) == int(runs[-1][-1]) + 1
        if follows:
            runs[-1] = [runs[-1][0], place]
        else:
            runs.append([place])
    return ", ".join("-".join(run) for run in runs)


def report_backends(rows: Sequence[BackendUse], folder: Path, compiled: bool = False) -> None:
    """Log which backend ran the operations, in one line where all ran the same; keep the table in the run folder.

    Rows that differ from the rest follow, each with what was rejected where it is a fall-back. Where layers are
    `compiled`, operations with a formula are part of their graphs and not in the record: one line names them.
    """
    most = Counter(row.backend for row in rows).most_common(1)
    usual = most[0][0] if most else ""
    others = [row for row in rows if row.backend != usual or (row.rejected and row.why != registry.PREFERRED)]
    names = list(dict.fromkeys(row.operation for row in rows if row not in others))
    if names:
        log.info("kernels: %s for %s", usual, ", ".join(names) if others else f"all {len(names)} operations")
    widths = [max((len(getattr(row, key)) for row in others), default=0) for key in ("layers", "operation", "backend")]
    for row in others:
        why = row.why if row.why == registry.PREFERRED else "; ".join((row.why, *row.rejected))
        log.info("kernels: %-*s  %-*s  %-*s  %s", widths[0], row.layers, widths[1], row.operation, widths[2],
                 row.backend, why)
    if compiled:
        log.info("kernels: torch.compile fuses %s into the graphs of the layers", ", ".join(fused_operations()))
    (folder / BACKENDS_FILE).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
