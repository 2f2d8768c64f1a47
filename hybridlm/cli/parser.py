"""How every subcommand reads its arguments and says what is wrong with them."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, NoReturn

from hybridlm.errors import UserError, nearest

if TYPE_CHECKING:
    from hybridlm.config.schema import Config


class Parser(argparse.ArgumentParser):
    """argparse with this program's way of saying what is wrong."""

    def __init__(self, name: str, description: str, examples: str):
        super().__init__(prog=f"hybridlm {name}", description=description, epilog=f"examples:\n{examples}",
                         formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
        close = nearest(unknown, self._option_string_actions) if message.startswith("unrecognized") else None
        hint = f"did you mean '{close}'? " if close else ""
        raise UserError(f"{message}; {hint}see `{self.prog} --help`")

    def overrides(self, what: str = "a run") -> None:
        self.add_argument("overrides", nargs="*", metavar="key=value",
                          help=f"settings of {what}: model=NAME, training.steps=100, ...; the name or YAML file of "
                               "a whole config may stand first")
        self.add_argument("--config-dir", metavar="FOLDER",
                          help="a folder of your own configs (model/, experiment/, ...), searched first")

    def json(self) -> None:
        self.add_argument("--json", action="store_true", help="print JSON instead of text")


def load(args: argparse.Namespace) -> Config:
    """The config that positional arguments name: [config] key=value ..."""
    from hybridlm.config.compose import load_config

    words = list(args.overrides)
    name = "train"
    if words and ("=" not in words[0] or os.path.isfile(words[0])) and not words[0].startswith("~"):
        name = words.pop(0)
    return load_config(name, words, config_dir=args.config_dir)
