"""`hybridlm select`: which attention layers to keep when the others get another mixer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlm.cli.parser import Parser, choose_device
from hybridlm.errors import ConfigError

TEACHER = "teacher="


def run(argv: Sequence[str]) -> int:
    """Choose layers and write them to a file; returns the exit code."""
    parser = Parser("select", "Measure what each attention layer of a model is worth, and choose those that stay\n"
                    "when the others get another mixer. The file that is written goes into recipe.convert.keep.", """\
  hybridlm select teacher=runs/first
  hybridlm select teacher=runs/first --method greedy --keep 1 --window 32 --out layers.json
  hybridlm select teacher=runs/first data.path=held_out.txt --json""")
    parser.add_argument("overrides", nargs="*", metavar="teacher=RUN | key=value",
                        help="the run or checkpoint folder, and data.* settings; by default its validation text")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder of your own configs, searched first")
    parser.add_argument("--method", default="window", metavar="window | greedy | swap | uniform",
                        help="window: each layer alone limited to a window; greedy: candidates of window, taken out "
                             "one after the other; swap: with the mixers of --student; uniform: evenly spread")
    parser.add_argument("--keep", type=int, metavar="N", help="layers that stay (default a quarter)")
    parser.add_argument("--window", type=int, default=64, metavar="TOKENS", help="of a limited layer (default 64)")
    parser.add_argument("--first-tokens", type=int, default=1, metavar="N",
                        help="tokens at the start of the text that it sees besides (default 1)")
    parser.add_argument("--student", metavar="RUN", help="of recipe=linearize with recipe.convert.keep=0, for swap")
    parser.add_argument("--windows", type=int, default=2, metavar="N", help="of text (default 2)")
    parser.add_argument("--sequence-length", type=int, default=512, metavar="TOKENS", help="of a window (default 512)")
    parser.add_argument("--out", default="layers.json", metavar="FILE", help="written (default layers.json)")
    parser.add_argument("--figure", metavar="FILE.png", help="draw what each layer is worth")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    teachers = [word.removeprefix(TEACHER) for word in args.overrides if word.startswith(TEACHER)]
    if len(teachers) != 1:
        raise ConfigError("teacher", "is missing" if not teachers else "is given twice", got=teachers or None,
                          expected="teacher=RUN, a run or checkpoint folder")
    others = [word for word in args.overrides if not word.startswith(TEACHER)]
    out = Path(args.out).expanduser()
    check_target(out)
    from hybridlm.evaluation.layer_selection import select_layers
    from hybridlm.files import write_json

    report = select_layers(teachers[0], others, method=args.method, keep=args.keep, window=args.window,
                           first_tokens=args.first_tokens, student=args.student, windows=args.windows,
                           sequence_length=args.sequence_length, device=choose_device(args.device),
                           config_dir=args.config_dir)
    write_json(out, report)
    if args.figure is not None:
        draw(report, Path(args.figure))
    if args.json:
        print(json.dumps(report))
    else:
        show(report, out, others)
    return 0


def check_target(out: Path) -> None:
    """Check that a selection may be written to a file, before anything is measured.

    Raises:
        ConfigError: it holds something else, or its folder is not there.
    """
    from hybridlm.interop.linearization import read_selection

    if not out.absolute().parent.is_dir():
        raise ConfigError("--out", "is in a folder that is not there", got=str(out))
    if out.exists():
        try:
            read_selection(str(out))
        except ConfigError:
            raise ConfigError("--out", "is there already, and is no selection", got=str(out),
                              expected="another name") from None


def show(report: dict[str, Any], out: Path, settings: Sequence[str] = ()) -> None:
    """Print what each layer is worth, the chosen layers beside an even spread, and the command that uses them.

    Args:
        report: what was measured.
        out: the file that holds the selection.
        settings: of the data, for that command.
    """
    if report["layers"]:
        limit = "the student's mixer" if report["window"] is None else f"a window of {report['window']}"
        print(f"one layer at a time with {limit}, against the teacher, in nats:")
        print(f"{'layer':>5}  {'loss':>8}  {'repeated tokens':>15}")
        teacher = report["measured"]["teacher"]
        for row in sorted(report["layers"], key=lambda row: -row["damage"]):
            mark = "  kept" if row["layer"] in report["keep"] else ""
            print(f"{row['layer']:>5}  {row['loss'] - teacher['loss']:>+8.4f}  "
                  f"{row['repeat_nll'] - teacher['repeat_nll']:>+15.4f}{mark}")
    print(f"{'kept':<24}  {'loss':>8}  {'repeated tokens':>15}")
    for name, found in report["measured"].items():
        layers = {"chosen": report["keep"], "uniform": found.get("layers")}.get(name)
        label = name if layers is None else f"{name} {layers}"
        print(f"{label:<24}  {found['loss']:>8.4f}  {found['repeat_nll']:>15.4f}")
    command = shlex.join(["hybridlm", "train", "recipe=linearize_tiny", f"teacher={report['teacher']}",
                          f"recipe.convert.keep={out}", *settings])
    print(f"wrote {out}; use it: {command}")


def draw(report: dict[str, Any], file: Path) -> None:
    """Draw the damage of each layer.

    Raises:
        ConfigError: matplotlib is not there, or nothing was measured by layer.
    """
    from hybridlm.report.figures import Axis, Chart, Panel, Series
    from hybridlm.report.palette import TRAINING, VALIDATION

    if not report["layers"]:
        raise ConfigError("--figure", "has nothing to show", got=report["method"], expected="another --method")
    try:
        from hybridlm.report.png import write_png
        layers = [row["layer"] for row in report["layers"]]
        teacher = report["measured"]["teacher"]
        series = [Series(name, style, layers, [row[key] - teacher[key] for row in report["layers"]], points=True)
                  for name, key, style in (("loss on text", "loss", TRAINING),
                                           ("repeated tokens", "repeat_nll", VALIDATION))]
        write_png(Chart("selection", "What each attention layer is worth", "One layer at a time without its attention.",
                        Axis("layer"), Axis("damage in nats"), [Panel("", series)]), file)
    except ImportError as error:
        raise ConfigError("--figure", f"needs matplotlib ({error})", hint="pip install 'hybridlm[report]'") from None
