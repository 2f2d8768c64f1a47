"""Data sources by format, one file each. Importing this package registers every format. See docs/data.md."""

from hybridlm.sources import dataset as dataset
from hybridlm.sources import jsonl as jsonl
from hybridlm.sources import parquet as parquet
from hybridlm.sources import stdlib as stdlib
from hybridlm.sources import text as text
from hybridlm.sources.compression import open_decompressed as open_decompressed
from hybridlm.sources.contract import Document as Document
from hybridlm.sources.contract import Source as Source
from hybridlm.sources.contract import SourceOptions as SourceOptions
from hybridlm.sources.contract import Unit as Unit
from hybridlm.sources.contract import check_format as check_format
from hybridlm.sources.contract import known_formats as known_formats
from hybridlm.sources.contract import register_file_reader as register_file_reader
from hybridlm.sources.contract import register_source as register_source
from hybridlm.sources.contract import utf8_document as utf8_document
from hybridlm.sources.resolve_source import is_hub_name as is_hub_name
from hybridlm.sources.resolve_source import open_source as open_source
