"""Adapters to other people's kernels: imported by name when first asked for, whatever goes wrong then is the reason."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any


@functools.cache
def find(module: str, name: str, package: str, at_least: str) -> tuple[Any, str]:
    """(`module.name`, "") or (None, why not). `package` is what pip calls it, `at_least` its oldest version."""
    wanted = f"pip install '{package}>={at_least}'"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None, f"{package} is not installed ({wanted})"
    if version_numbers(version) < version_numbers(at_least):
        return None, f"{package} {version} is too old ({wanted})"
    try:
        return getattr(importlib.import_module(module), name), ""
    except Exception as error:  # such packages probe drivers and compilers when they are imported
        return None, f"{module}.{name} of {package} {version} cannot be imported: {type(error).__name__}: {error}"


def version_numbers(version: str) -> tuple[int, ...]:
    """(2, 7, 4) of "2.7.4.post1"."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
