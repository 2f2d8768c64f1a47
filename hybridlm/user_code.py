"""Imports code of the user's own that registers kinds: mixers, feed-forwards, residuals, optimizers, probes, sources.

Only the person at the command line can name code to import: by `--import`, by the variable HYBRIDLM_IMPORT, or by
installing a package with an entry point in the group `hybridlm.kinds`. No config, checkpoint or folder is asked.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from hybridlm.errors import ConfigError

VARIABLE = "HYBRIDLM_IMPORT"  # files and modules, separated as in PATH
ENTRY_POINTS = "hybridlm.kinds"
HINT = "--import FILE.py registers kinds of your own"  # for errors about a kind that is not there

_imported: dict[str, None] = {}  # absolute files and module names, in the order in which they were imported
_loaded_entry_points: set[str] = set()


def import_user_code(names: Iterable[str] = ()) -> None:
    """Import installed kinds, what HYBRIDLM_IMPORT names, and `names`: Python files or dotted modules.

    A file may import its neighbours, and a module may stand in the current folder. Importing something twice changes
    nothing.

    Raises:
        ConfigError: there is no such file or module, or it fails; the error names the file, the line and the cause.
    """
    _import_installed()
    for name in os.environ.get(VARIABLE, "").split(os.pathsep):
        if name:
            _import(name, VARIABLE)
    for name in names:
        _import(name, "--import")


def imported_user_code() -> list[str]:
    """Files (absolute) and modules that were imported: what another process of the same user must import too."""
    return list(_imported)


def import_arguments() -> list[str]:
    """Arguments that make another `hybridlm` command import the same code."""
    return [word for name in _imported for word in ("--import", name)]


def _import(name: str, source: str) -> None:
    path = Path(name).expanduser()
    if name.endswith(".py") or os.sep in name:
        _import_file(path, name, source)
    else:
        _import_module(name, source)


def _import_file(path: Path, name: str, source: str) -> None:
    if not path.exists():
        raise ConfigError(source, "no such file", got=name, expected="FILE.py or a dotted module")
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(source, "is no Python file", got=name, expected="FILE.py or a dotted module")
    path = path.resolve()
    if not _is_loaded(path):
        # A name of its own, so that my_mixer.py of two folders do not meet, and nothing installed is hidden.
        module_name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        _search(path.parent)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise _broken(error, source, name, path) from error
    _imported[str(path)] = None


def _import_module(name: str, source: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(source, "is neither a file nor a module", got=name, expected="FILE.py or a dotted module")
    _search(Path.cwd())
    try:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(name=name)
        if spec.origin is None:
            raise ConfigError(source, "is a folder without code of its own", got=name,
                              expected="FILE.py or a dotted module")
        if not _is_loaded(Path(spec.origin).resolve()):
            importlib.import_module(name)
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(source, "no such module", got=name, expected="FILE.py or a dotted module") from None
        raise _broken(error, source, name, None) from error
    except (Exception, SystemExit) as error:
        raise _broken(error, source, name, None) from error
    _imported[name] = None


def _is_loaded(path: Path) -> bool:
    """Whether the file runs in this process already, under whatever name it was imported."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is not None and os.path.basename(file) == path.name and Path(file).resolve() == path:
            return True
    return False


def _import_installed() -> None:
    for entry_point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry_point.value in _loaded_entry_points:
            continue
        try:
            entry_point.load()
        except (Exception, SystemExit) as error:
            package = entry_point.dist.name if entry_point.dist is not None else "an installed package"
            raise _broken(error, f"entry point {entry_point.name} of {package}", entry_point.value, None) from error
        _loaded_entry_points.add(entry_point.value)


def _search(folder: Path) -> None:
    """Let imports find modules in `folder`, behind everything that is installed."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _broken(error: BaseException, source: str, name: str, file: Path | None) -> ConfigError:
    """One line with the place in the user's code where the import failed, and the cause."""
    if isinstance(error, SyntaxError) and error.filename:
        where, cause = f"{error.filename}, line {error.lineno}", f"{type(error).__name__}: {error.msg}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        # The last line of the file itself, or for a module the last line outside Python's own import machinery.
        own = [frame for frame in frames if file is not None and frame.filename == str(file)]
        other = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
        frame = (own or other or frames)[-1]
        where, cause = f"{frame.filename}, line {frame.lineno}", f"{type(error).__name__}: {error}"
    return ConfigError(source, f"cannot import {name}: {where}: {' '.join(cause.split())}")
