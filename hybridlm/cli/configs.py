"""`hybridlm configs`: everything that can be chosen by name."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hybridlm.cli.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Print the config groups, the options of one, or one option; returns the exit code."""
    parser = Parser("configs", "List the groups of configs, the options of one group, or show one option with its "
                               "comments.", """\
  hybridlm configs
  hybridlm configs mixer
  hybridlm configs model kimi_linear_48b
  hybridlm configs experiment --json""")
    parser.add_argument("group", nargs="?", metavar="GROUP", help="such as model, mixer or optimizer")
    parser.add_argument("name", nargs="?", metavar="NAME", help="an option of the group")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder of your own configs, listed too")
    parser.add_json()
    args = parser.parse_args(argv)
    from hybridlm.config.catalog import describe_configs, render

    catalog = describe_configs(args.group, args.name, args.config_dir)
    print(json.dumps(catalog) if args.json else render(catalog), end="\n" if args.json else "")
    return 0
