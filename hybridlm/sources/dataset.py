"""Data sets of the `datasets` library: saved folders, and names on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError
from hybridlm.sources.arrow import BATCH_ROWS, column_documents
from hybridlm.sources.contract import (
    Document,
    InvalidUTF8,
    Source,
    SourceOptions,
    Unit,
    missing_field,
    register_source,
)
from hybridlm.sources.hub import NotFound, look_up


@register_source("dataset")
def open_dataset(options: SourceOptions) -> Source:
    """Open a saved `datasets` folder, or load a data set by name: the only source that may use the network.

    Args:
        options: `path` (the folder or name), `name`, `split`, `text_field` and `invalid_utf8`.

    Raises:
        DataError: no such data set, split or column, no rows, or a folder that cannot be read.
    """
    data = _load(options)
    label = f"{options.path} [{options.split}]"
    if options.text_field not in data.column_names:
        raise missing_field(label, options.text_field, data.column_names)
    if len(data) == 0:
        raise DataError(f"{label}: the data set has no rows")
    column = data.data.column(options.text_field)
    unit = Unit(label, column.nbytes, ("dataset", data._fingerprint, len(data)),
                partial(read_dataset, data, label, options.invalid_utf8, options.text_field))
    return Source(label, [unit], {"invalid_utf8": options.invalid_utf8, "text_field": options.text_field})


def read_dataset(dataset: Any, label: str, policy: InvalidUTF8, field: str, skip: int) -> Iterator[Document]:
    """Yield the column `field` of a `datasets.Dataset`, from row `skip` on."""
    if skip >= len(dataset):
        return
    rows = dataset.select_columns([field]).select(range(skip, len(dataset))).with_format("arrow")
    for table in rows.iter(batch_size=BATCH_ROWS):
        yield from column_documents(table.column(field), policy, label, field, skip)
        skip += table.num_rows


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file())


def _load(options: SourceOptions) -> Any:
    import datasets

    folder = Path(options.path).expanduser()
    try:
        if not is_saved_dataset(folder):
            return look_up(lambda: datasets.load_dataset(options.path, options.name, split=options.split))
        data = datasets.load_from_disk(str(folder))
    except NotFound as error:
        raise DataError(f"{options.path}: no such file or folder here, and no data set of this name could be loaded "
                        f"({error})") from error
    except Exception as error:  # the library and its back ends raise dozens of kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"{options.path}: the saved data set cannot be read ({type(error).__name__}: {reason})"
                        ) from error
    if not isinstance(data, datasets.DatasetDict):
        return data
    if options.split not in data:
        raise DataError(f"{options.path}: no split '{options.split}'; it has: {', '.join(data)}; set data.split")
    return data[options.split]
