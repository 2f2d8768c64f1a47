"""`hybridlm import`, `export` and `verify`: checkpoints in and out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hybridlm.cli.parser import Parser
from hybridlm.errors import ConfigError


def import_command(argv: Sequence[str]) -> int:
    parser = Parser("import", "Turn a transformers checkpoint folder into a checkpoint of ours.", """\
  hybridlm import Qwen3-Next-80B-A3B/ checkpoints/qwen3-next
  hybridlm import Qwen3-0.6B/ checkpoints/start --replace gdn=0,1,2,4,5,6""")
    parser.add_argument("source", metavar="SOURCE", help="folder with config.json and safetensors")
    parser.add_argument("dest", metavar="DEST", help="folder to make")
    _common(parser)
    parser.add_argument("--replace", action="append", default=[], metavar="MIXER=LAYERS",
                        help="put a linear mixer (a preset such as gdn) in place of these softmax layers, started from "
                             "their projections where shapes allow; may be given again")
    parser.add_argument("--indexer", action="append", default=[], metavar="KEY=VALUE",
                        help="add a DSA indexer to every softmax layer, for example topk=2048; may be given again")
    args = parser.parse_args(argv)
    from hybridlm.interop import import_checkpoint

    replace = {}
    for text in args.replace:
        mixer, _, layers = text.partition("=")
        replace[mixer] = _whole_numbers("--replace", layers)
    indexer = {key: _value(value) for key, _, value in (text.partition("=") for text in args.indexer)} or None
    return _done(import_checkpoint(args.source, args.dest, dtype=args.dtype, mtp=not args.no_mtp, indexer=indexer,
                                   replace=replace), args.json)


def export_command(argv: Sequence[str]) -> int:
    parser = Parser("export", "Turn a checkpoint of ours into a folder that transformers loads.", """\
  hybridlm export runs/quickstart exported/
  hybridlm export runs/mine exported/ --dtype bf16""")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or a run folder (its newest)")
    parser.add_argument("dest", metavar="DEST", help="folder to make")
    _common(parser)
    parser.add_argument("--family", help="a transformers model type; by default the one that computes this model, or "
                                         "hybridlm where there is none")
    args = parser.parse_args(argv)
    from hybridlm.interop import export_checkpoint

    return _done(export_checkpoint(args.checkpoint, args.dest, family=args.family, dtype=args.dtype,
                                   mtp=not args.no_mtp), args.json)


def verify_command(argv: Sequence[str]) -> int:
    parser = Parser("verify", "Compare a checkpoint of ours with a transformers folder, in fp32 on the CPU.", """\
  hybridlm verify runs/quickstart exported/
  hybridlm verify checkpoints/qwen3-next Qwen3-Next-80B-A3B/ --text "def main("
""")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("hf_dir", metavar="HF_DIR")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--text", help="compare on this text too")
    given.add_argument("--token-ids", metavar="1,2,3", help="compare on these tokens too")
    parser.json()
    args = parser.parse_args(argv)
    from hybridlm.interop import verify
    from hybridlm.interop.compare import render

    ids = None if args.token_ids is None else _whole_numbers("--token-ids", args.token_ids)
    result = verify(args.checkpoint, args.hf_dir, text=args.text, token_ids=ids)
    print(json.dumps(result) if args.json else render(result))
    return 0


def _common(parser: Parser) -> None:
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights; by default as they are")
    parser.add_argument("--no-mtp", action="store_true", help="leave multi-token prediction weights out")
    parser.json()


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(option, "must be whole numbers between commas", got=text, expected="such as 0,1,2") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _done(report: dict[str, Any], as_json: bool) -> int:
    from hybridlm.interop.folders import summary

    print(json.dumps(report) if as_json else summary(report))
    return 0
