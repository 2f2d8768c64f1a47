"""`hybridlm eval`: a checkpoint measured, its tasks of lm-eval, and probes."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from hybridlm.cli.parser import Parser, choose_device, load_run_config, read_integers, read_value
from hybridlm.errors import ConfigError, counted

# The three things that can be measured, and the options that only one of them takes.
CHECKPOINT = "an evaluation of a checkpoint, without --probe and --tasks"
PROBE = "--probe"
TASKS = "--tasks"
OPTIONS = {CHECKPOINT: ("windows", "sequence_length", "contexts", "decode_tokens", "only", "sparse", "indexers"),
           PROBE: ("steps", "lr", "seed", "length", "lengths", "examples", "zero_shot", "fine_tune"),
           TASKS: ("task_folder", "num_fewshot", "limit")}


def run(argv: Sequence[str]) -> int:
    """Evaluate a checkpoint, or an architecture on probes; returns the exit code."""
    args = _parser().parse_intermixed_args(argv)
    if args.probe and args.tasks:
        raise ConfigError("--tasks", "goes without --probe", got=args.tasks)
    asked = CHECKPOINT
    if args.probe or args.tasks:
        asked = PROBE if args.probe else TASKS
    for owner, names in OPTIONS.items():
        for name in names:
            if owner != asked and getattr(args, name) not in (None, False):
                raise ConfigError(f"--{name.replace('_', '-')}", f"goes with {owner}", got=getattr(args, name))
    measure, show = {CHECKPOINT: (_evaluate, _show_evaluation), PROBE: (_train_on_probes, _show_probes),
                     TASKS: (_run_tasks, _show_tasks)}[asked]
    report = measure(args)
    if args.json:
        print(json.dumps(report))
    else:
        show(report)
    return 0


def _parser() -> Parser:
    parser = Parser("eval", "Measure a checkpoint: perplexity by position, bits per byte, decode speed and state.\n"
                            "With --tasks: its scores in tasks of lm-eval.\n"
                            "With --probe: train a fresh model on a small task, and score it at longer lengths too.",
                    """\
  hybridlm eval runs/first
  hybridlm eval runs/first data.path=held_out.txt --windows 0 --json
  hybridlm eval runs/first --only decode --contexts 1024,8192
  hybridlm eval runs/first --sparse exact:budget=128 --sparse streaming:budget=128
  hybridlm eval runs/first_dsa --indexers
  hybridlm eval runs/first --tasks arc_easy,lambada_openai --limit 100
  hybridlm eval --probe mqar model=hybrid_tiny model.schedule.ratio=7 --steps 1000
  hybridlm eval --probe mqar:num_pairs=16 --probe s5 runs/first --length 64 --lengths 64,256
  hybridlm eval --probe mqar:num_pairs=4 runs/first --zero-shot""")
    parser.add_argument("overrides", nargs="*", metavar="CHECKPOINT | key=value",
                        help="a checkpoint or run folder, then data.* settings; with --probe a run folder for its "
                             "architecture (or, when asked, its weights), or settings of the model")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder of your own configs, searched first")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_argument("--batch-size", type=int, metavar="N")
    parser.add_json()
    group = parser.add_argument_group("a checkpoint")
    group.add_argument("--only", choices=("perplexity", "decode"), help="leave the other out")
    group.add_argument("--windows", type=int, metavar="N", help="of text; default as in the run's validation, 0 all")
    group.add_argument("--sequence-length", type=int, metavar="TOKENS", help="of a window; default the run's")
    group.add_argument("--contexts", metavar="128,512,2048", help="where decoding is timed")
    group.add_argument("--decode-tokens", type=int, metavar="N", help="decoded at each context (default 32)")
    sparse = group.add_argument("--sparse", action="append", metavar="NAME[:key=value,...]")
    sparse.help = ("try a sparse attention on the softmax layers beside the dense one; names: %(names)s; "
                   "docs/evaluation.md has their options; may be given again")
    parser.list_names(sparse, _sparse_names)
    group.add_argument("--indexers", action="store_true",
                       help="also the attention that indexers recall, by layer and by position, beside random keys, a "
                            "window, a window with the first token, and the most that is attainable")
    group = parser.add_argument_group("probes")
    probe = group.add_argument("--probe", action="append", metavar="NAME[:key=value,...]")
    probe.help = "a small task that a fresh model is trained on; names: %(names)s; may be given again"
    parser.list_names(probe, _probe_names)
    weights = group.add_mutually_exclusive_group()
    weights.add_argument("--zero-shot", action="store_true", help="ask the checkpoint as it is, without training")
    weights.add_argument("--fine-tune", action="store_true", help="train on from the checkpoint's weights")
    group.add_argument("--steps", type=int, metavar="N", help="of training (default 1000)")
    group.add_argument("--lr", type=float, help="peak learning rate (default 1e-3)")
    group.add_argument("--seed", type=int, help="of weights and examples (default 0)")
    group.add_argument("--length", type=int, metavar="TOKENS", help="trained at (default 64, or the least that fits)")
    group.add_argument("--lengths", metavar="64,128,256", help="scored at (default: length, times 2, times 4)")
    group.add_argument("--examples", type=int, metavar="N", help="scored at each length (default 256)")
    group = parser.add_argument_group("tasks of lm-eval")
    group.add_argument("--tasks", metavar="NAME,...", help="tasks, groups, or YAML files that define one")
    group.add_argument("--task-folder", metavar="FOLDER", help="definitions of your own (lm-eval runs code they name)")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    group.add_argument("--limit", type=int, metavar="N", help="examples per task (default all)")
    return parser


def _sparse_names() -> list[str]:
    from hybridlm.evaluation.sparse import SPARSE_METHODS

    return list(SPARSE_METHODS)


def _probe_names() -> list[str]:
    from hybridlm.evaluation.probes import PROBES

    return list(PROBES)


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None. For the others the defaults of the called function hold."""
    return {name: value for name, value in options.items() if value is not None}


def _lengths(option: str, text: str | None) -> list[int] | None:
    return None if text is None else read_integers(option, text, "64,128,256")


def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    if not args.overrides:
        raise ConfigError("", "nothing to evaluate", expected="a checkpoint or run folder, or --probe NAME",
                          hint="see `hybridlm eval --help`")
    from hybridlm.evaluation.evaluate import evaluate_checkpoint

    contexts = _lengths("--contexts", args.contexts)
    if args.sparse and args.only == "decode":
        raise ConfigError("--sparse", "measures perplexity", got="--only decode", expected="without --only decode")
    if args.indexers and args.only == "decode":
        raise ConfigError("--indexers", "reads text", got="--only decode", expected="without --only decode")
    sparse = [_sparse_method(text) for text in args.sparse or ()]
    options = _given(sparse=sparse or None, indexers=args.indexers or None, windows=args.windows,
                     sequence_length=args.sequence_length, batch_size=args.batch_size, contexts=contexts,
                     decode_tokens=args.decode_tokens, parts=args.only and [args.only])
    path, *overrides = args.overrides
    return evaluate_checkpoint(path, overrides, device=choose_device(args.device), config_dir=args.config_dir,
                               **options)


def _run_tasks(args: argparse.Namespace) -> dict[str, Any]:
    try:
        from hybridlm.evaluation.harness import evaluate_tasks
    except ImportError as error:
        raise ConfigError("--tasks", f"needs lm-eval ({error})", hint="pip install 'hybridlm[eval]'") from None
    if len(args.overrides) != 1:
        raise ConfigError("--tasks", "takes a checkpoint or run folder, and nothing else", got=args.overrides)
    options = _given(task_folder=args.task_folder, fewshot=args.num_fewshot, limit=args.limit,
                     batch_size=args.batch_size)
    names = [name for name in args.tasks.split(",") if name]
    return evaluate_tasks(args.overrides[0], names, device=choose_device(args.device), **options)


def _train_on_probes(args: argparse.Namespace) -> dict[str, Any]:
    from hybridlm.checkpoint import load_checkpoint, read_model_config, resolve
    from hybridlm.evaluation.pretrained import check_zero_shot, model_with_pretrained_weights
    from hybridlm.evaluation.probe_training import probe_lengths, train_on_probe
    from hybridlm.evaluation.probes import make_probe

    asked = []
    for text in args.probe:
        name, _, settings = text.partition(":")
        asked.append((name, make_probe(name, _parameters("--probe", text, settings))))
    folder = args.overrides[0] if len(args.overrides) == 1 and os.path.isdir(args.overrides[0]) else None
    how = "fresh weights"
    if args.zero_shot or args.fine_tune:
        how = "zero-shot" if args.zero_shot else "fine-tune"
    if how != "fresh weights" and folder is None:
        raise ConfigError(f"--{how}", "needs a checkpoint or run folder", got=" ".join(args.overrides) or None)
    if args.zero_shot and args.steps is not None:
        raise ConfigError("--steps", "goes with training, not with --zero-shot", got=args.steps)
    for _, probe in asked if args.zero_shot else ():
        check_zero_shot(probe)
    device = choose_device(args.device)
    model = None if how == "fresh weights" else load_checkpoint(str(folder), device)
    if model is not None:
        config = model.config
    else:
        config = load_run_config(args).model if folder is None else read_model_config(resolve(folder))
    options = _given(steps=0 if args.zero_shot else args.steps, lr=args.lr, seed=args.seed, batch_size=args.batch_size,
                     examples=args.examples)
    rows = []
    for name, probe in asked:
        length, lengths = probe_lengths(probe, args.length, _lengths("--lengths", args.lengths))
        start = model and model_with_pretrained_weights(model, probe, max(length, *lengths), options.get("seed", 0))
        result = train_on_probe(config, probe, device=device, length=length, eval_lengths=lengths, start=start,
                                **options)
        rows.append({**result.to_dict(), "probe": name})
    return {"model": config.name, "layers": config.layers(), "weights": how, "probes": rows}


def _sparse_method(text: str) -> tuple[str, Any]:
    """The name of a sparse method and the method, from NAME[:key=value,...]."""
    from hybridlm.evaluation.sparse import make_sparse_method

    name, _, settings = text.partition(":")
    return text, make_sparse_method(name, _parameters("--sparse", text, settings))


def _parameters(option: str, text: str, settings: str) -> dict[str, Any]:
    """The parameters of a probe or method from `key=value,...`; `text` is what stands behind the option."""
    found = {}
    for setting in settings.split(",") if settings else ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(option, "cannot be read", got=text, expected="NAME or NAME:key=value,key=value")
        found[key] = read_value(value)
    return found


def _show_probes(report: dict[str, Any]) -> None:
    print(f"{report['model']}: {' '.join(report['layers'])} ({report['weights']})")
    for row in report["probes"]:
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        trained = f"{counted(row['steps'], 'step')} at length {row['length']}, loss {loss}" if row["steps"] else \
            "not trained"
        print(f"\n{row['probe']}: {trained}, {row['seconds']:.1f} s, chance {row['chance']:.3f}")
        print(f"{'length':>8}  {'tokens right':>12}  {'examples right':>14}")
        for length, score in row["accuracy"].items():
            print(f"{length:>8}  {score['token']:>12.3f}  {score['exact']:>14.3f}")


def _show_tasks(report: dict[str, Any]) -> None:
    print(f"{report['checkpoint']}: {report['model']}, {report['params']:,} parameters, on {report['device']}")
    for note in report["notes"]:
        print(f"note: {note}")
    print(f"\n{'task':<32}  {'metric':<24}  {'value':>8}  {'+-':>7}  {'shots':>5}  {'examples':>8}")
    for name, row in report["tasks"].items():
        for metric, measured in row["metrics"].items():
            error = "" if measured["stderr"] is None else f"{measured['stderr']:.4f}"
            shots = "" if row["fewshot"] is None else row["fewshot"]
            print(f"{name:<32}  {metric:<24}  {measured['value']:>8.4f}  {error:>7}  {shots:>5}  "
                  f"{row['examples'] or '':>8}")


def _show_evaluation(report: dict[str, Any]) -> None:
    print(f"{report['checkpoint']}: {report['model']}, {report['params']:,} parameters, on {report['device']}")
    if "perplexity" in report:
        result, data = report["perplexity"], report["data"]
        bits = "" if result["bits_per_byte"] is None else f", {result['bits_per_byte']:.4f} bits per byte"
        print(f"\n{data['source']}: {data['windows']} of {data['of']} windows of {result['sequence_length']} tokens")
        print(f"loss {result['loss']:.4f} per token, perplexity {result['perplexity']:.3f}{bits}")
        print(f"{'tokens before':>15}  {'tokens':>10}  {'loss':>8}  {'perplexity':>10}")
        for row in result["by_position"]:
            if row["tokens"]:
                print(f"{row['start']:>7}-{row['stop'] - 1:<7}  {row['tokens']:>10,}  {row['loss']:>8.4f}  "
                      f"{row['perplexity']:>10.3f}")
    if "sparse" in report:
        _show_sparse(report)
    if "indexers" in report:
        _show_indexers(report["indexers"])
    if "decode" in report:
        print(f"\n{'context':>9}  {'prefill tok/s':>13}  {'decode tok/s':>12}  {'state bytes':>13}")
        for row in report["decode"]:
            print(f"{row['context']:>9,}  {row['prefill_tokens_per_second']:>13,.0f}  "
                  f"{row['decode_tokens_per_second']:>12,.1f}  {row['state_bytes']:>13,}")


def _show_sparse(report: dict[str, Any]) -> None:
    """Print the dense attention and every sparse method in one table."""
    rows, dense = report["sparse"], report["perplexity"]["loss"]
    visible = rows[0]["keys_visible"]
    print(f"\nsparse attention in {rows[0]['sparse_layers']} of {counted(rows[0]['softmax_layers'], 'softmax layer')}, "
          "or as dense_layers says; recall is the share of dense attention on the keys that are read")
    print(f"{'method':<32}  {'loss':>8}  {'- dense':>8}  {'recall':>7}  {'keys read':>10}  {'of':>9}")
    print(f"{'dense':<32}  {dense:>8.4f}  {0:>8.4f}  {1:>7.4f}  {'all':>10}  "
          f"{'' if visible is None else format(visible, '.1f'):>9}")
    for row in rows:
        read = "  no query behind a prompt was sparse" if row["recall"] is None else (
            f"  {row['recall']:>7.4f}  {row['keys_read']:>10.1f}  {row['keys_visible']:>9.1f}")
        print(f"{row['method']:<32}  {row['loss']:>8.4f}  {row['loss'] - dense:>8.4f}{read}")
    if any(row["recall"] is not None and row["keys_read"] == row["keys_visible"] for row in rows):
        print("a method that reads all keys is dense attention: give it a smaller budget, or longer windows")


def _show_indexers(found: dict[str, Any]) -> None:
    """Print what the indexers recall: a row per layer, and the mean over layers by position."""
    counts = " or ".join(str(count) for count in sorted({row["topk"] for row in found["layers"]}))
    print(f"\nshare of dense attention on {counts} keys, over queries that see more")
    print(f"{'layer':>15}  {'KL':>7}  {'indexer':>8}  {'attainable':>10}  {'window':>7}  {'+ first':>7}  {'first':>7}  "
          f"{'random':>7}  {'queries':>9}")
    rows = [(str(row["layer"]), row) for row in found["layers"]] + [("all", found["mean"])]
    rows += [(f"{row['start']}-{row['stop'] - 1} before", row) for row in found["mean"]["by_position"]]
    for name, row in rows:
        if row["queries"] == 0:
            print(f"{name:>15}  no query sees more keys than are selected: give longer windows with --sequence-length")
            continue
        shares = (f"{row[key]:>{width}.3f}" for key, width in (
            ("recall", 8), ("attainable", 10), ("window", 7), ("window_first", 7), ("first", 7), ("random", 7)))
        print(f"{name:>15}  {format(row['kl'], '.3f') if 'kl' in row else '':>7}  {'  '.join(shares)}  "
              f"{row['queries']:>9,}")
