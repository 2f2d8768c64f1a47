"""Imports functions of optional packages by name when they are first asked for; a failure becomes a reason."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from typing import Any


@functools.cache
def find(module: str, name: str, package: str, at_least: str) -> tuple[Any, str]:
    """The function `module.name` and "", or None and the reason; pip knows the package as `package`."""
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
    """The numbers at the front of a version.

    >>> version_numbers("2.7.4.post1")
    (2, 7, 4)
    """
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
