"""The parser of every command, with one way of saying what is wrong with a word, and readers of common values."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from hybridlm.cli.key_check import setting_for_option
from hybridlm.errors import ConfigError, UserError, nearest

if TYPE_CHECKING:
    from hybridlm.config.schema import Config
    from hybridlm.planning.machine_memory import MemoryFit


class Parser(argparse.ArgumentParser):
    """An argument parser that raises errors instead of printing usage, and imports the code named by `--import`.

    Args:
        name: the command.
        description: what the command does, for its help.
        examples: command lines that can be pasted, one per line.
        imports: whether the command takes `--import`, so that kinds of the user's own can be used.
    """

    def __init__(self, name: str, description: str, examples: str, *, imports: bool = True):
        super().__init__(prog=f"hybridlm {name}", description=description, epilog=f"examples:\n{examples}",
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        self.imports = imports
        self.words: list[str] = []
        self.settings = False  # whether the command takes key=value
        self.registered: dict[argparse.Action, Callable[[], Iterable[str]]] = {}  # options that take a registered name
        if imports:
            self.add_argument("--import", action="append", default=[], dest="user_code", metavar="FILE | MODULE",
                              help="import a Python file or module that registers kinds of your own (mixers, "
                                   "feed-forwards, optimizers, probes, ...); may be given again")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        self.words = list(args or ())
        return self._with_user_code(super().parse_args(args, namespace))

    def parse_intermixed_args(self, args: Sequence[str] | None = None,  # type: ignore[override]
                              namespace: Any = None) -> Any:
        self.words = list(args or ())
        return self._with_user_code(super().parse_intermixed_args(args, namespace))

    def _value_of(self, option: str) -> str:
        """The word that follows an option on the command line, as its value; `...` where there is none."""
        for word, following in zip(self.words, [*self.words[1:], "-"], strict=True):
            if word.startswith(f"{option}="):
                return word.partition("=")[2]
            if word == option and not following.startswith("-"):
                return following
        return "..."

    def _with_user_code(self, parsed: argparse.Namespace) -> argparse.Namespace:
        if self.imports:
            from hybridlm.user_code import import_user_code

            import_user_code(parsed.user_code)
        return parsed

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        close = nearest(unknown, self._option_string_actions) if message.startswith("unrecognized") else None
        hint = f"did you mean '{close}'? " if close else ""
        if message.startswith("unrecognized") and self.settings and (key := setting_for_option(unknown)):
            hint = f"settings are written without dashes: {key}{'' if '=' in key else '=' + self._value_of(unknown)}; "
        raise UserError(f"{message}; {hint}see `{self.prog} --help`")

    def list_names(self, option: argparse.Action, names: Callable[[], Iterable[str]]) -> None:
        """Let the help of an option list the names that are registered, those of `--import` too.

        Args:
            option: one of this parser, with `%(names)s` in its help.
            names: finds the names; it is called only when help is asked for, for it may import much.
        """
        self.registered[option] = names

    def format_help(self) -> str:
        if self.registered and self.imports:
            first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            first.add_argument("--import", action="append", default=[], dest="user_code")
            self._with_user_code(first.parse_known_args(self.words)[0])
        for option, names in self.registered.items():
            option.names = ", ".join(names())  # type: ignore[attr-defined]  # its help is filled from its attributes
        return super().format_help()

    def add_overrides(self, what: str = "a run") -> None:
        """Add `key=value ...` and `--config-dir`; `what` names in the help what the settings are of."""
        self.settings = True
        self.add_argument("overrides", nargs="*", metavar="key=value",
                          help=f"settings of {what}: model=NAME, training.steps=100, ...; the name or YAML file of "
                               "a complete config may stand first")
        self.add_argument("--config-dir", metavar="FOLDER",
                          help="a folder of your own configs (model/, experiment/, ...), searched first")

    def add_device_memory(self) -> None:
        """Add `--device-memory`, for plans of another machine."""
        self.add_argument("--device-memory", type=float, metavar="GIB",
                          help="memory of one device that the plan is for (default: of this machine)")

    def add_json(self) -> None:
        """Add `--json`."""
        self.add_argument("--json", action="store_true", help="print JSON instead of text")


def load_run_config(args: argparse.Namespace) -> Config:
    """The config of a run that the positional arguments name: [config] key=value ..."""
    from hybridlm.run_config import load_config

    return load_config(*split_config_words(args.overrides), config_dir=args.config_dir)


def split_config_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of a complete config that stands first, `train` where none does, and the overrides behind it.

    >>> split_config_words(["quickstart", "training.steps=5"])
    ('quickstart', ['training.steps=5'])
    """
    if words and ("=" not in words[0] or os.path.isfile(words[0])) and not words[0].startswith("~"):
        return words[0], list(words[1:])
    return "train", list(words)


def planned_memory(args: argparse.Namespace, config: Config, processes: int) -> MemoryFit | None:
    """Compare what each process of a run needs with `--device-memory`, or with this machine.

    Raises:
        ConfigError: a memory that is not positive.
    """
    from hybridlm.planning.machine_memory import memory_fit

    given = args.device_memory
    if given is not None and not given > 0:
        raise ConfigError("--device-memory", "must be positive", got=given)
    return memory_fit(config, processes, device_bytes=None if given is None else given * 2**30)


def choose_device(asked: str | None) -> str:
    """The device of `--device`: cpu or cuda; without one, a GPU where there is one.

    Raises:
        ConfigError: another word, or cuda where torch sees no GPU.
    """
    import torch

    if asked not in (None, "cpu", "cuda"):
        raise ConfigError("--device", "unknown", got=asked, expected="cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "torch sees no GPU", got="cuda", expected="cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def read_integers(option: str, text: str, example: str) -> list[int]:
    """Whole numbers between commas.

    >>> read_integers("--lengths", "64,128", "64,128,256")
    [64, 128]

    Raises:
        ConfigError: anything else.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(option, "must be whole numbers between commas", got=text,
                          expected=f"such as {example}") from None


def read_value(text: str) -> Any:
    """A value as JSON would read it; text where it is not JSON.

    >>> read_value("16"), read_value("true"), read_value("half")
    (16, True, 'half')
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def printer(as_json: bool) -> Callable[[str], None]:
    """A function that prints a line at once: to standard error where standard output belongs to a JSON result."""
    return lambda text: print(text, file=sys.stderr if as_json else sys.stdout, flush=True)
