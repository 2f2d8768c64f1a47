"""The folders of config files: the built-in one, a user's own before it, and the options of a group."""

from __future__ import annotations

from pathlib import Path

from hybridlm.errors import ConfigError


def config_dir() -> Path:
    """The folder of the built-in configs: inside the package when installed from a wheel, else the checkout's.

    Raises:
        ConfigError: neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError("", "the built-in configs are missing", got=str(package / "configs"), hint="reinstall hybridlm")


def search_folders(own: str | Path | None = None) -> list[Path]:
    """The folders in which a config is looked for, in this order: the user's own (if given), the built-in one.

    Raises:
        ConfigError: `own` is not a folder.
    """
    if own is None:
        return [config_dir()]
    folder = Path(own).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError("config_dir", "is not a folder", got=str(own))
    return [folder, config_dir()]


def options(group: str, own: str | Path | None = None) -> list[str]:
    """Names that may stand in `group=NAME`, sorted.

    Args:
        group: a folder of configs, such as "model" or "mixer".
        own: a folder of the user's own configs, searched besides the built-in one.

    Example:
        >>> options("engine")
        ['ddp', 'single', 'zero1', 'zero2', 'zero3']
    """
    return sorted({path.stem for folder in search_folders(own) for path in (folder / group).glob("*.yaml")})


def find_option(group: str, name: str, own: str | Path | None = None) -> Path | None:
    """The file of `group=name`, the user's own before the built-in one; None where there is none."""
    files = [folder / group / f"{name}.yaml" for folder in search_folders(own)]
    return next((file for file in files if file.is_file()), None)
