"""Finds the folder of a checkpoint that a person names: a folder here, or a name on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hybridlm.errors import CheckpointError
from hybridlm.sources.hub import NotFound, look_up

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")  # no pickles, and no code


def find_checkpoint_folder(source: str | os.PathLike[str]) -> Path:
    """The folder of a transformers checkpoint; one that is named on the hub is fetched into the hub's cache.

    Args:
        source: a folder, or owner/name on the hub.

    Raises:
        CheckpointError: neither exists, or the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.exists() or not HUB_NAME.fullmatch(str(source)):
        return folder  # whoever reads it says what is wrong with it
    from huggingface_hub import snapshot_download

    try:
        return Path(look_up(lambda: snapshot_download(str(source), allow_patterns=list(FETCHED))))
    except NotFound as error:
        raise CheckpointError(f"{source} does not exist: no such folder here, and nothing of that name could be taken "
                              f"from the hub ({error})") from None
