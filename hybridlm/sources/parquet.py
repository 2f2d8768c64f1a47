"""Parquet files: a row is one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hybridlm.errors import DataError
from hybridlm.sources.arrow import BATCH_ROWS, column_documents
from hybridlm.sources.contract import Document, SourceOptions, missing_field, register_file_reader


@register_file_reader("parquet", ".parquet")
def read_parquet(path: Path, options: SourceOptions, skip: int) -> Iterator[Document]:
    """Yield the column `text_field` row by row; row groups that lie before row `skip` are not read.

    Args:
        path: the file.
        options: `text_field` and `invalid_utf8`.
        skip: rows to leave out at the start.

    Raises:
        DataError: not a parquet file, no such column, or one that holds no text.
    """
    field = options.text_field
    with _open(path, field) as table:
        groups: list[int] = []
        row = 0
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if not groups and rows <= skip - row:
                row += rows
            else:
                groups.append(group)
        for batch in table.iter_batches(batch_size=BATCH_ROWS, row_groups=groups, columns=[field]):
            ahead = min(max(skip - row, 0), batch.num_rows)
            texts = batch.column(0).slice(ahead)
            yield from column_documents(texts, options.invalid_utf8, str(path), field, row + ahead)
            row += batch.num_rows


def _open(path: Path, field: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: not a parquet file, or damaged ({reason}); get it again") from None
    if field not in table.schema_arrow.names:
        raise missing_field(str(path), field, table.schema_arrow.names)
    return table
