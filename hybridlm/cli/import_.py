"""`hybridlm import`: a transformers folder becomes a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Sequence

from hybridlm.cli.export import add_weight_options, print_summary
from hybridlm.cli.parser import Parser, read_integers, read_value


def run(argv: Sequence[str]) -> int:
    """Import a checkpoint; returns the exit code."""
    parser = Parser("import", "Turn a transformers checkpoint folder into a checkpoint of ours.", """\
  hybridlm import Qwen3-Next-80B-A3B/ checkpoints/qwen3-next
  hybridlm import Qwen/Qwen3-0.6B checkpoints/qwen3
  hybridlm import Qwen3-0.6B/ checkpoints/start --replace gdn=0,1,2,4,5,6""")
    parser.add_argument("source", metavar="SOURCE", help="folder with config.json and safetensors, or OWNER/NAME")
    parser.add_argument("dest", metavar="DEST", help="folder to make")
    add_weight_options(parser)
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
        replace[mixer] = read_integers("--replace", layers, "0,1,2")
    indexer = {}
    for text in args.indexer:
        key, _, value = text.partition("=")
        indexer[key] = read_value(value)
    print_summary(import_checkpoint(args.source, args.dest, dtype=args.dtype, mtp=not args.no_mtp,
                                    indexer=indexer or None, replace=replace), args.json)
    return 0
