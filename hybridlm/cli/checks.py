"""`hybridlm doctor` and `hybridlm bench`."""

from __future__ import annotations

from collections.abc import Sequence

from hybridlm.cli.parser import Parser


def doctor_command(argv: Sequence[str]) -> int:
    parser = Parser("doctor", "Can this machine train? Versions, device, and every kernel against its reference.",
                    "  hybridlm doctor\n  hybridlm doctor --json")
    parser.json()
    args = parser.parse_args(argv)
    from hybridlm.doctor import run_doctor

    return run_doctor(args.json)


def bench_command(argv: Sequence[str]) -> int:
    from hybridlm_kernels.tools import bench

    parser = Parser("bench", "Time every kernel backend, side by side, against this machine's copy and matrix product.",
                    "  hybridlm bench kernels\n  hybridlm bench kernels delta_rule --shapes 'B1 T8192 H96 D128' --json")
    parser.add_argument("what", choices=["kernels"])
    bench.add_arguments(parser)
    parser.json()
    return bench.show(parser.parse_args(argv))
