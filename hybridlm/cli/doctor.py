"""`hybridlm doctor`: versions, device and kernels of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from hybridlm.cli.parser import Parser


def run(argv: Sequence[str]) -> int:
    """Check this machine; returns 0 when training can start on it."""
    parser = Parser("doctor", "Can this machine train? Versions, device, and every kernel against its reference.",
                    "  hybridlm doctor\n  hybridlm doctor --json", imports=False)
    parser.add_json()
    args = parser.parse_args(argv)
    from hybridlm.doctor import run_doctor

    return run_doctor(args.json)
