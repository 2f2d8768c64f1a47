"""Columns of Arrow tables as documents, for parquet files and data sets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from hybridlm.errors import DataError
from hybridlm.sources.contract import Document, InvalidUTF8, utf8_document

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024  # rows of a table in memory at once


def column_documents(column: pyarrow.Array | pyarrow.ChunkedArray, policy: InvalidUTF8, label: str, field: str,
                     row: int) -> Iterator[Document]:
    """Yield the texts of an Arrow column; nulls are empty documents.

    Args:
        column: the texts.
        policy: `data.invalid_utf8`.
        label: name of the table in errors.
        field: name of the column.
        row: number of the column's first row in its table.

    Raises:
        DataError: the column holds no text, or text that is not UTF-8 under the policy `error`.
    """
    import pyarrow as pa

    try:
        texts = column.cast(pa.large_binary()).to_pylist()
    except pa.ArrowException:
        raise DataError(f"{label}: field '{field}' holds {column.type}; expected text") from None
    for number, text in enumerate(texts, start=row):
        yield utf8_document(text or b"", policy, partial("{}, row {}".format, label, number))
