"""The one family of errors a user can cause. Each is one line: what, got, expected, what to do."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path


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


def did_you_mean_or_own(name: str, known: Iterable[str], noun: str = "kind") -> str:
    """The hint of an error about a name that the user's own code may define.

    >>> did_you_mean_or_own("kdaa", ["kda"])
    "did you mean 'kda'? A kind of your own is registered with --import FILE"
    >>> did_you_mean_or_own("mine", ["kda"], "probe")
    'a probe of your own is registered with --import FILE'
    """
    near = did_you_mean(name, known)
    own = f"{noun} of your own is registered with --import FILE"
    return f"{near} A {own}" if near else f"a {own}"


def did_you_mean_path(path: str | Path) -> str:
    """The hint of an error about a path that does not exist: the closest one beside its first part that is missing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "first").mkdir()
    ...     did_you_mean_path(Path(folder) / "frist").removeprefix("did you mean '" + folder)
    "/first'?"
    """
    missing = Path(path).expanduser()
    while not missing.parent.exists():
        missing = missing.parent
    try:
        close = nearest(missing.name, [entry.name for entry in missing.parent.iterdir()])
    except OSError:  # a file, or a folder that must not be read
        return ""
    return f"did you mean '{missing.parent / close}'?" if close else ""


def rename_keys(text: str, old: str, new: str) -> str:
    """Let dotted keys in a text that begin with `old` begin with `new`; paths stay.

    >>> rename_keys("sweep.reference of runs/sweep.d/a", "sweep.", "ladder.")
    'ladder.reference of runs/sweep.d/a'
    """
    return re.sub(rf"(?<![\w./-]){re.escape(old)}(?=\w)", new, text)


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

    def renamed(self, old: str, new: str) -> ConfigError:
        """The same error in a command whose keys begin with `new` where those of the raiser begin with `old`.

        >>> error = ConfigError("sweep.dir", "is not a folder", hint="take another sweep.dir")
        >>> print(error.renamed("sweep.", "ladder."))
        ladder.dir: is not a folder; take another ladder.dir
        """
        key, what, expected, hint = (rename_keys(text, old, new)
                                     for text in (self.key, self.what, self.expected, self.hint))
        return type(self)(key, what, got=self.got, expected=expected, hint=hint)

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


# How allocators that raise a plain RuntimeError say that there is no memory: torch on a CPU, CUDA, cuBLAS, C++.
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|CUDA(?: error:)? out of memory|"
                        r"CUBLAS_STATUS_ALLOC_FAILED|std::bad_alloc|Cannot allocate memory")
_ASKED = re.compile(r"(?:tried to allocate|Unable to allocate) ([\d.]+ ?(?:[KMGTP]iB|bytes))", re.IGNORECASE)


def out_of_memory(error: BaseException) -> str | None:
    """Say that memory has run out, where this is what an error says; None for any other error.

    Args:
        error: of Python, numpy, the operating system, or torch on a CPU or GPU.

    >>> out_of_memory(MemoryError())
    'out of memory'
    >>> out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."))
    'out of GPU memory: 2.00 GiB were asked for'
    >>> out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    """
    text = str(error)
    ran_out = (isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
               or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text) is not None))
    if not ran_out:
        return None
    where = "out of GPU memory" if re.search("CUDA|CUBLAS", text) else "out of memory"
    found = _ASKED.search(text)
    if found is None:
        return where
    size = re.fullmatch(r"(\d+) bytes", found[1])
    asked = found[1] if size is None else f"{int(size[1]) / 2**20:,.0f} MiB"
    return f"{where}: {asked} were asked for"
