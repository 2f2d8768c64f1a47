"""Saves the checkpoints of a run, in the background, and counts the saves that the disk refuses."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from hybridlm import checkpoint
from hybridlm.distributed.engine import Engine
from hybridlm.training.guards import TrainingStopped

MAX_FAILED_SAVES = 3  # failures in a row after which the run stops

log = logging.getLogger("hybridlm")


class Saver:
    """Writes at most one checkpoint at a time. All ranks call its methods together.

    A save begins with `begin` and is complete after `finish`. In between, a thread of each rank writes, while the
    run continues; `writing` says whether this rank's thread still does.

    Args:
        root: the folder of the checkpoints.
        keep: how many of the newest to keep.
        engine: the ranks.
        flush: writes to disk the records that must be there before a checkpoint is.
    """

    def __init__(self, root: Path, keep: int, engine: Engine, flush: Callable[[], None]):
        self.root = root
        self.keep = keep
        self.engine = engine
        self.flush = flush
        self.newest: Path | None = None
        self.failed = 0
        self.current_save: checkpoint.Save | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self.current_save is not None and not self.current_save.written

    def saved(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step`."""
        return self.newest is not None and self.newest.name == f"step-{step}"

    @property
    def newest_text(self) -> str:
        """Text that names the newest checkpoint, for messages about a run that ends."""
        return f"the newest checkpoint is {self.newest}" if self.newest else "there is no checkpoint"

    def begin(self, step: int, texts: dict[str, str], tensors: dict[str, dict[str, Tensor]], *, required: bool) -> None:
        """Start to write; `tensors` must not change before the save is finished, and none may be under way.

        Raises:
            TrainingStopped: as `finish`.
        """
        assert self.current_save is None
        try:
            self.current_save = checkpoint.Save(self.root, step, texts, tensors, self.engine)
        except OSError as error:
            self._count_failure(f"step-{step}", error, required)

    def finish(self, *, required: bool = False) -> None:
        """Wait for the save that is under way, make it visible and drop the oldest checkpoints.

        Raises:
            TrainingStopped: the disk refused too often, or refused a save that is `required`.
        """
        save, self.current_save = self.current_save, None
        if save is None:
            return
        try:
            self.engine.on_main(self.flush)
            self.newest = save.publish()
            self.engine.on_main(lambda: checkpoint.prune(self.root, self.keep))
            self.failed = 0
        except OSError as error:
            self._count_failure(save.target.name, error, required)

    def abandon(self) -> None:
        """End a save after an error of this rank: a single process finishes it, several leave an incomplete draft.

        Other ranks may not have met the error, so a collective finish could wait for ever.
        """
        if self.engine.world_size == 1:
            with contextlib.suppress(TrainingStopped):
                self.finish()

    def _count_failure(self, what: str, error: OSError, required: bool) -> None:
        self.failed += 1
        if required or self.failed >= MAX_FAILED_SAVES:
            times = f" {self.failed} times in a row" if self.failed > 1 else ""
            raise TrainingStopped(f"{what} could not be saved{times}: {error}; {self.newest_text}; make room on the "
                                  "disk and start again with the same command") from error
        log.warning("%s could not be saved (%s); going on, %s", what, error, self.newest_text)
