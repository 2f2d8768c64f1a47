"""`hybridlm doctor`."""

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
