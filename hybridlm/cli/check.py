"""`hybridlm check`: the contract of mixers and feed-forwards, run on one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hybridlm.cli.parser import Parser
from hybridlm.errors import ConfigError, counted, did_you_mean, did_you_mean_or_own

HIDDEN_SIZE = 32  # of the layer that is checked, unless asked otherwise
# Sizes of a small feed-forward, for options that a kind or preset leaves open; mixers know theirs from the layer.
FEED_FORWARD_SIZES = {"intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
STYLES = {"passed": "green", "failed": "red", "skipped": "dim"}


def run(argv: Sequence[str]) -> int:
    """Check one mixer or feed-forward and print a verdict per check; returns 1 when one fails."""
    parser = Parser("check", "Test a mixer or feed-forward, ours or yours, against what every one of them must do:\n"
                             "causality, packed documents, decoding, gradients, costs, initialisation, context "
                             "parallelism.\nEverything runs in seconds, on the CPU, at small sizes.", """\
  hybridlm check kda
  hybridlm check attention num_heads=4 num_kv_heads=2 head_dim=8 window=9
  hybridlm check my_mixer --import my_mixer.py
  hybridlm check my_mixer width=64 --import my_mixer.py --only gradients --json""")
    parser.add_argument("kind", metavar="KIND",
                        help="a kind of mixer or feed-forward, or a preset of the config groups mixer and feed_forward")
    parser.add_argument("options", nargs="*", metavar="key=value", help="options of the kind; small sizes by default")
    parser.add_argument("--hidden-size", type=int, default=HIDDEN_SIZE, metavar="D",
                        help=f"width of the residual stream (default {HIDDEN_SIZE})")
    parser.add_argument("--source", metavar="KIND",
                        help="kind or preset of the layer before, for a mixer that reads from another layer")
    parser.add_argument("--only", action="append", default=[], metavar="CHECK",
                        help="run this check alone, for example causality; may be given again")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder of your own presets, searched first")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    if args.hidden_size < 1:
        raise ConfigError("--hidden-size", "must be positive", got=args.hidden_size)
    from hybridlm.config.serialization import to_dict
    from hybridlm.model.contract_check import CHECKS, Subject, run_checks, small_context

    for name in args.only:
        if name not in CHECKS:
            raise ConfigError("--only", "no such check", got=name, expected=f"one of {', '.join(CHECKS)}",
                              hint=did_you_mean(name, CHECKS))
    noun, config = _config(args.kind, args.options, args.config_dir, args.hidden_size)
    if not config.is_branch:
        raise ConfigError("KIND", "stands for no mixer or feed-forward: there is nothing to check", got=args.kind)
    checks = {name: check for name, check in CHECKS.items() if not args.only or name in args.only}
    source = None
    if args.source is not None:
        if noun != "mixer":
            raise ConfigError("--source", "goes with a mixer", got=args.source)
        source_noun, source = _config(args.source, [], args.config_dir, args.hidden_size)
        if source_noun != "mixer":
            raise ConfigError("--source", "must be a mixer", got=args.source)
    subject = Subject(config, small_context(config, args.hidden_size, source=source))
    verdicts = list(run_checks(subject, checks))
    ok = all(verdict.verdict != "failed" for verdict in verdicts)
    report = {"name": args.kind, "what": noun, "kind": config.kind, "hidden_size": args.hidden_size,
              "config": to_dict(config), "checks": [asdict(verdict) for verdict in verdicts], "ok": ok}
    print(json.dumps(report)) if args.json else _show(report)
    return 0 if ok else 1


def _config(name: str, options: Sequence[str], config_dir: str | None, hidden_size: int) -> tuple[str, Any]:
    """Read the config that is checked.

    Args:
        name: a preset or a kind; a preset is taken before a kind of the same name.
        options: key=value words that go on top.
        config_dir: a folder of the user's own presets, searched first.
        hidden_size: width of the layer, which decides small sizes of what is left open.

    Returns:
        "mixer" or "feed-forward", and the config.

    Raises:
        ConfigError: there is no such preset or kind, or its options cannot be used.
    """
    from hybridlm.config.compose import compose_option
    from hybridlm.config.legacy import RENAMED_VALUES
    from hybridlm.config.paths import find_option
    from hybridlm.config.paths import options as option_names
    from hybridlm.config.serialization import from_dict
    from hybridlm.kind_registry import registry_of
    from hybridlm.model.feed_forward.contract import FeedForwardConfig
    from hybridlm.model.mixers.contract import MixerConfig

    bases = {"mixer": MixerConfig, "feed_forward": FeedForwardConfig}
    known: list[str] = []
    for group, base in bases.items():
        registry = registry_of(base)
        assert registry is not None
        preset = find_option(group, name, config_dir)
        known += [*option_names(group, config_dir), *registry]
        if preset is None and name not in registry:
            continue
        data = {"kind": name} if preset is None else compose_option(group, name, config_dir=config_dir)
        data = _merge(data, _given(options))
        return registry.noun, from_dict(base, _with_sizes(registry.config_class(data["kind"]), data, hidden_size), name)
    renamed = RENAMED_VALUES["model.mixers.*.kind"].get(name)
    if renamed is not None:
        raise ConfigError("KIND", "was renamed", got=name, expected=renamed)
    names = sorted(set(known))
    raise ConfigError("KIND", "no such mixer or feed-forward", got=name, expected=f"one of {', '.join(names)}",
                      hint=did_you_mean_or_own(name, names))


def _given(options: Sequence[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    for option in options:
        if "=" not in option:
            raise ConfigError(option, "is not an option", expected="key=value")
    found = OmegaConf.to_container(OmegaConf.from_dotlist(list(options)))
    assert isinstance(found, dict)
    if "kind" in found:
        raise ConfigError("kind", "is named by KIND", got=found["kind"])
    return found  # type: ignore[return-value]


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from hybridlm.config.composed_values import merge_options

    merged = OmegaConf.to_container(merge_options(OmegaConf.create(base), changes))
    assert isinstance(merged, dict)
    return merged  # type: ignore[return-value]


def _with_sizes(config_class: Any, data: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """`data` with small sizes for the required options that it leaves open."""
    from hybridlm.config.serialization import MISSING
    from hybridlm.model.mixers.contract import MixerConfig
    from hybridlm.model.mixers.sizing import ModelSizes, fill_missing, missing_fields

    given = {name: value for name, value in data.items() if value != MISSING}
    if issubclass(config_class, MixerConfig):
        return config_class.fill_sizes(given, ModelSizes(hidden_size, max_position=256))
    return fill_missing(given, {name: FEED_FORWARD_SIZES.get(name) for name in missing_fields(config_class, given)})


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table("check", "verdict", "reason", box=None, pad_edge=False,
                  title=f"{report['what']} {report['name']}, hidden size {report['hidden_size']}", title_justify="left")
    for row in report["checks"]:
        table.add_row(row["check"], row["verdict"], Text(row["reason"]), style=STYLES[row["verdict"]])
    console.print(table, highlight=False)
    failed = sum(row["verdict"] == "failed" for row in report["checks"])
    console.print(f"{counted(failed, 'check')} failed" if failed else "all that is claimed holds")
