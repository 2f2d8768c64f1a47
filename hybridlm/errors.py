"""The one family of errors a user can cause. Each is one line: what, got, expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when nothing is close."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The hint of an error that names the known name closest to `name`; empty when nothing is close.

    >>> did_you_mean("validation_lose", ["loss", "validation_loss"])
    "did you mean 'validation_loss'?"
    """
    close = nearest(name, known)
    return f"did you mean '{close}'?" if close else ""


def counted(number: int, noun: str) -> str:
    """1 step, 2 steps."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


class UserError(Exception):
    """Something the user can mend. The command line prints it in one line and exits with 2.

    `shared`: every process of the run raises it, so the first one alone says it.
    """

    exit_code = 2
    shared = False


class ConfigError(UserError):
    """A configuration value that cannot be used.

    `key` is the dotted path as far as the raiser knows it; the config layer prefixes the rest with `within`.
    """

    def __init__(self, key: str, what: str, *, got: object = None, expected: str = "", hint: str = ""):
        self.key, self.what, self.got, self.expected, self.hint = key, what, got, expected, hint
        super().__init__(key, what)

    def within(self, path: str) -> ConfigError:
        """The same error seen from the enclosing config at `path`."""
        key = ".".join(part for part in (path, self.key) if part)
        return type(self)(key, self.what, got=self.got, expected=self.expected, hint=self.hint)

    def __str__(self) -> str:
        text = f"{self.key}: {self.what}" if self.key else self.what
        if self.got is not None:
            text += f"; got {self.got!r}"
        if self.expected:
            text += f"; expected {self.expected}"
        if self.hint:
            text += f"; {self.hint}"
        return text


def require(condition: bool, key: str, what: str, *, got: object = None, expected: str = "", hint: str = "") -> None:
    """Raise ConfigError(key, ...) unless `condition` holds."""
    if not condition:
        raise ConfigError(key, what, got=got, expected=expected, hint=hint)


class DataError(UserError):
    """A data source, tokenizer or token shard that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is missing, torn, or does not fit what is asked of it."""
