"""The source that a data config names: `stdlib`, files, a data set, or one of the user's own."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from hybridlm.errors import DataError
from hybridlm.sources.contract import AUTO, SOURCES, Source, SourceOptions
from hybridlm.sources.dataset import is_saved_dataset
from hybridlm.sources.find_files import open_files, path_exists, suffix_of

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
OPTION_NAMES = ("path", "text_field", "split", "name", "document_separator", "invalid_utf8")


def open_source(options: SourceOptions, leave_out: frozenset[str] = frozenset()) -> Source:
    """Open what a data config names; documents are read only later, by `Source.documents`.

    Args:
        options: a source of the data config.
        leave_out: real paths of files that belong to validation and are not read here.

    Raises:
        DataError: nothing there, an empty file, a folder without known files, or a format that does not fit.
    """
    source = _open(options)
    kept = [unit for unit in source.units if unit.path not in leave_out]
    if not kept:
        raise DataError(f"{options.path}: all {len(source.units)} files of the training data belong to "
                        "validation_path; give training other files")
    if all(unit.path is not None and unit.size == 0 for unit in kept):
        what = "the file is empty" if len(kept) == 1 else f"all {len(kept)} files are empty"
        raise DataError(f"{source.label}: {what}; expected text")
    return replace(source, units=kept, left_out=len(source.units) - len(kept))


def is_hub_name(options: SourceOptions) -> bool:
    """Whether the source is a data set on the hub, so that opening it may ask the network."""
    return _format_of(options) == "dataset" and not is_saved_dataset(Path(options.path).expanduser())


def _open(options: SourceOptions) -> Source:
    opener = SOURCES.get(_format_of(options))
    if opener is None:
        return open_files(options)
    source = opener.open(options)
    if not isinstance(source, Source):
        raise DataError(f"data.format={options.format}: its function returns {type(source).__name__}; expected "
                        "hybridlm.sources.Source")
    if not source.units:
        raise DataError(f"{source.label}: the source has no units; expected documents")
    if opener.code:  # of the user's own: any option and any change of its file may change the documents
        used = {name: getattr(options, name) for name in OPTION_NAMES}
        source = replace(source, options={**source.options, **used, "code": opener.code})
    return source


def _format_of(options: SourceOptions) -> str:
    """The format; `auto` where the suffix of each file decides."""
    path = options.path
    if options.format != AUTO:
        return options.format
    if not path.strip():
        raise DataError("data.path: is empty; expected stdlib, a file, a folder or a data set")
    if path == "stdlib":
        return "stdlib"
    if is_saved_dataset(Path(path).expanduser()):
        return "dataset"
    looks_like_hub_name = HUB_NAME.fullmatch(path) is not None and suffix_of(path) is None
    if looks_like_hub_name and not path_exists(path) and not os.path.exists(path.split("/")[0]):
        return "dataset"
    return AUTO
