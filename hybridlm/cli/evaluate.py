"""`hybridlm eval`: a checkpoint measured, or a fresh model trained on probes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from hybridlm.cli.parser import Parser, load
from hybridlm.errors import ConfigError

PROBE_ONLY = ("steps", "lr", "seed", "length", "lengths", "examples")
CHECKPOINT_ONLY = ("windows", "sequence_length", "contexts", "decode_tokens", "only")


def eval_command(argv: Sequence[str]) -> int:
    args = _parser().parse_intermixed_args(argv)
    foreign = CHECKPOINT_ONLY if args.probe else PROBE_ONLY
    for name in foreign:
        if getattr(args, name) is not None:
            where = "an evaluation of a checkpoint, without --probe" if args.probe else "--probe"
            raise ConfigError(f"--{name.replace('_', '-')}", f"goes with {where}", got=getattr(args, name))
    if args.probe:
        report, show = _probes(args), _show_probes
    else:
        report, show = _checkpoint(args), _show_checkpoint
    if args.json:
        print(json.dumps(report))
    else:
        show(report)
    return 0


def _parser() -> Parser:
    parser = Parser("eval", "Measure a checkpoint: perplexity by position, bits per byte, decode speed and state.\n"
                            "With --probe: train a fresh model on a small task, and score it at longer lengths too.",
                    """\
  hybridlm eval runs/first
  hybridlm eval runs/first data.path=held_out.txt --windows 0 --json
  hybridlm eval runs/first --only decode --contexts 1024,8192
  hybridlm eval --probe mqar model=hybrid_tiny model.schedule.ratio=7 --steps 1000
  hybridlm eval --probe mqar:num_pairs=16 --probe s5 runs/first --length 64 --lengths 64,256""")
    parser.add_argument("overrides", nargs="*", metavar="CHECKPOINT | key=value",
                        help="a checkpoint or run folder, then data.* settings; with --probe a run folder for its "
                             "architecture, or settings of the model")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder of your own configs, searched first")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.json()
    group = parser.add_argument_group("a checkpoint")
    group.add_argument("--only", choices=("perplexity", "decode"), help="leave the other out")
    group.add_argument("--windows", type=int, metavar="N", help="of text; default as in the run's validation, 0 all")
    group.add_argument("--sequence-length", type=int, metavar="TOKENS", help="of a window; default the run's")
    group.add_argument("--contexts", metavar="128,512,2048", help="where decoding is timed")
    group.add_argument("--decode-tokens", type=int, metavar="N", help="decoded at each context (default 32)")
    group = parser.add_argument_group("probes")
    group.add_argument("--probe", action="append", metavar="NAME[:key=value,...]",
                       help="mqar, needle_single, needle_multi_key, needle_multi_value, variable_tracking, copy, "
                            "selective_copy, parity, s3, s5, modular_arithmetic, ngram or key_value_updates; may be "
                            "given again")
    group.add_argument("--steps", type=int, metavar="N", help="of training (default 1000)")
    group.add_argument("--lr", type=float, help="peak learning rate (default 1e-3)")
    group.add_argument("--seed", type=int, help="of weights and examples (default 0)")
    group.add_argument("--length", type=int, metavar="TOKENS", help="trained at (default 64, or the least that fits)")
    group.add_argument("--lengths", metavar="64,128,256", help="scored at (default: length, times 2, times 4)")
    group.add_argument("--examples", type=int, metavar="N", help="scored at each length (default 256)")
    return parser


def _device(args: argparse.Namespace) -> str:
    import torch

    if args.device not in (None, "cpu", "cuda"):
        raise ConfigError("--device", "unknown", got=args.device, expected="cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device", "torch sees no GPU", got="cuda", expected="cpu")
    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(option, "must be whole numbers between commas", got=text,
                          expected="such as 64,128,256") from None


def _given(**options: Any) -> dict[str, Any]:
    """Only what was given: the defaults are those of the function that is called."""
    return {name: value for name, value in options.items() if value is not None}


def _checkpoint(args: argparse.Namespace) -> dict[str, Any]:
    if not args.overrides:
        raise ConfigError("", "nothing to evaluate", expected="a checkpoint or run folder, or --probe NAME",
                          hint="see `hybridlm eval --help`")
    from hybridlm.evaluation.evaluate import evaluate_checkpoint

    contexts = _numbers("--contexts", args.contexts)
    options = _given(windows=args.windows, sequence_length=args.sequence_length, batch_size=args.batch_size,
                     contexts=contexts, decode_tokens=args.decode_tokens, parts=args.only and [args.only])
    path, *overrides = args.overrides
    return evaluate_checkpoint(path, overrides, device=_device(args), config_dir=args.config_dir, **options)


def _probes(args: argparse.Namespace) -> dict[str, Any]:
    from hybridlm.checkpoint import read_model_config, resolve
    from hybridlm.evaluation.probe_training import train_on_probe
    from hybridlm.evaluation.probes import make_probe

    asked = []
    for text in args.probe:
        name, _, settings = text.partition(":")
        asked.append((name, make_probe(name, _parameters(text, settings))))
    if len(args.overrides) == 1 and os.path.isdir(args.overrides[0]):
        model = read_model_config(resolve(args.overrides[0]))
    else:
        model = load(args).model
    options = _given(steps=args.steps, lr=args.lr, seed=args.seed, length=args.length, batch_size=args.batch_size,
                     eval_lengths=_numbers("--lengths", args.lengths), examples=args.examples)
    rows = [{**train_on_probe(model, probe, device=_device(args), **options).to_dict(), "probe": name}
            for name, probe in asked]
    return {"model": model.name, "layers": model.layers(), "probes": rows}


def _parameters(text: str, settings: str) -> dict[str, Any]:
    found = {}
    for setting in settings.split(",") if settings else ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError("--probe", "cannot be read", got=text, expected="NAME or NAME:key=value,key=value")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found


def _show_probes(report: dict[str, Any]) -> None:
    print(f"{report['model']}: {' '.join(report['layers'])}")
    for row in report["probes"]:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        print(f"\n{row['probe']}: {row['steps']} steps at length {row['length']}, loss {loss}, "
              f"{row['seconds']:.1f} s, chance {row['chance']:.3f}")
        print(f"{'length':>8}  {'tokens right':>12}  {'examples right':>14}")
        for length, score in row["accuracy"].items():
            print(f"{length:>8}  {score['token']:>12.3f}  {score['exact']:>14.3f}")


def _show_checkpoint(report: dict[str, Any]) -> None:
    print(f"{report['checkpoint']}: {report['model']}, {report['params']:,} parameters, on {report['device']}")
    if "perplexity" in report:
        result, data = report["perplexity"], report["data"]
        bits = "" if result["bits_per_byte"] is None else f", {result['bits_per_byte']:.4f} bits per byte"
        print(f"\n{data['source']}: {data['windows']} of {data['of']} windows of {result['sequence_length']} tokens")
        print(f"loss {result['loss']:.4f} a token, perplexity {result['perplexity']:.3f}{bits}")
        print(f"{'tokens before':>15}  {'tokens':>10}  {'loss':>8}  {'perplexity':>10}")
        for row in result["by_position"]:
            if row["tokens"]:
                print(f"{row['start']:>7}-{row['stop'] - 1:<7}  {row['tokens']:>10,}  {row['loss']:>8.4f}  "
                      f"{row['perplexity']:>10.3f}")
    if "decode" in report:
        print(f"\n{'context':>9}  {'prefill tok/s':>13}  {'decode tok/s':>12}  {'state bytes':>13}")
        for row in report["decode"]:
            print(f"{row['context']:>9,}  {row['prefill_tokens_per_second']:>13,.0f}  "
                  f"{row['decode_tokens_per_second']:>12,.1f}  {row['state_bytes']:>13,}")
