"""The command line `hybridlm`: one file per command, named after it. `dispatch.py` finds the command and turns errors
into exit codes, `parser.py` reads arguments."""

from hybridlm.cli.dispatch import main as main
