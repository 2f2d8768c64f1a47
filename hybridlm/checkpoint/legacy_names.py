"""Parameter names of earlier versions, and the tensors of a checkpoint under the names of this one.

Until checkpoint format 1 the norm and the body of a branch were `layers.3.mixer.norm` and `layers.3.mixer.f`; since
format 2 they are `layers.3.mixer_norm` and `layers.3.mixer`, and the same for feed-forwards and for the blocks of
multi-token prediction. A name alone does not say which it is (a mixer may have a part called `norm`), so old names are
recognised by the format of the checkpoint, or by the names of all tensors together.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

from hybridlm.checkpoint.folder import MANIFEST
from hybridlm.tensor_storage import StoredTensor, stored_tensors

WRAPPED_BRANCHES_FORMAT = 1  # last checkpoint format with `mixer.f` and `mixer.norm`

_WRAPPED = re.compile(r"((?:^|[./])(?:layers\.\d+|mtp\.\d+\.block)\.(?:mixer|feed_forward))\.(f|norm)\.")


def current_name(old: str) -> str:
    """The name of this version for a parameter or an optimizer state of checkpoint format 1.

    >>> current_name("layers.3.mixer.f.q_proj.weight")
    'layers.3.mixer.q_proj.weight'
    >>> current_name("exp_avg/mtp.0.block.feed_forward.norm.weight")
    'exp_avg/mtp.0.block.feed_forward_norm.weight'
    """
    return _WRAPPED.sub(lambda found: f"{found[1]}{'' if found[2] == 'f' else '_norm'}.", old)


def are_legacy(names: Iterable[str]) -> bool:
    """Whether these are all the tensor names of a model written before `mixer.f` and `mixer.norm` were renamed."""
    return not any("mixer_norm." in name for name in names) and any(".mixer.norm." in name for name in names)


def checkpoint_tensors(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """All tensors of `stem` in a checkpoint, by the names of this version; nothing of them is read yet.

    Args:
        folder: a checkpoint folder of any format.
        stem: "model", or "optimizer" for the optimizer state, named `exp_avg/layers.3.mixer.q_proj.weight`.

    Raises:
        CheckpointError: no such file, or one that is not what its header says.
    """
    stored = stored_tensors(folder, stem)
    if _format(folder) > WRAPPED_BRANCHES_FORMAT:
        return stored
    return {new: dataclasses.replace(tensor, name=new)
            for new, tensor in ((current_name(old), tensor) for old, tensor in stored.items())}


def _format(folder: Path) -> int:
    return int(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["format"])
