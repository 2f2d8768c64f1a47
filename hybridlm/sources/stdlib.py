"""The Python standard library's own sources: text that is there without a download."""

from __future__ import annotations

import sysconfig

from hybridlm.errors import DataError
from hybridlm.sources.contract import Source, SourceOptions, register_source
from hybridlm.sources.find_files import file_unit, walk

# Folders below the standard library that are not part of it, or hold tests.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@register_source("stdlib")
def open_stdlib(options: SourceOptions) -> Source:
    """Find the sources of the standard library, without tests and installed packages, sorted by relative path.

    Args:
        options: `invalid_utf8`.

    Raises:
        DataError: this Python keeps no sources.
    """
    root = sysconfig.get_paths()["stdlib"]
    files = [file for file in walk(root, lambda folder: folder in SKIPPED_FOLDERS) if file.endswith(".py")]
    if not files:
        raise DataError(f"stdlib: this Python keeps no sources in {root}; set data.path to a text file or folder")
    units = [file_unit(file, options, "text") for file in files]
    return Source("stdlib", units, {"invalid_utf8": options.invalid_utf8})
