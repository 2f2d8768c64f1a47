"""`hybridlm bench`: kernel backends timed side by side."""

from __future__ import annotations

from collections.abc import Sequence

from hybridlm.cli.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Time kernels and print the table; returns the exit code."""
    from hybridlm_kernels.tools import bench

    parser = Parser("bench", "Time every kernel backend, side by side, against this machine's copy and matrix product.",
                    "  hybridlm bench kernels\n  hybridlm bench kernels delta_rule --shapes 'B1 T8192 H96 D128' --json",
                    imports=False)
    parser.add_argument("what", choices=["kernels"])
    bench.add_arguments(parser)
    parser.add_json()
    return bench.show(parser.parse_args(argv))
