"""Entry point of `python -m hybridlm`, the same as the command `hybridlm`."""

from hybridlm.cli import __main__ as __main__
