"""`hybridlm verify`: a checkpoint of ours beside a transformers folder."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hybridlm.cli.parser import Parser, read_integers


def run(argv: Sequence[str]) -> int:
    """Compare two checkpoints; returns the exit code, which is 1 where they differ."""
    parser = Parser("verify", "Compare a checkpoint of ours with a transformers folder, in fp32 on the CPU. "
                    "Ends with 1 where they differ.", """\
  hybridlm verify runs/quickstart exported/
  hybridlm verify checkpoints/qwen3-next Qwen3-Next-80B-A3B/ --text "def main("
""")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("hf_dir", metavar="HF_DIR")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--text", help="compare on this text too")
    given.add_argument("--token-ids", metavar="1,2,3", help="compare on these tokens too")
    parser.add_json()
    args = parser.parse_args(argv)
    from hybridlm.interop import verify
    from hybridlm.interop.compare import describe, differs

    token_ids = None if args.token_ids is None else read_integers("--token-ids", args.token_ids, "0,1,2")
    result = verify(args.checkpoint, args.hf_dir, text=args.text, token_ids=token_ids)
    print(json.dumps(result) if args.json else describe(result))
    return int(differs(result))
