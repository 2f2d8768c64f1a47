"""`hybridlm generate`: text from a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hybridlm.cli.parser import Parser, choose_device
from hybridlm.errors import ConfigError, counted

if TYPE_CHECKING:
    from hybridlm.evaluation.completion import Writer


def run(argv: Sequence[str]) -> int:
    """Print prompts and what the model makes of them; returns the exit code."""
    args = _parser().parse_args(argv)
    sources = [args.prompt is not None, args.prompt_file is not None, args.interactive]
    if sum(sources) != 1:
        what = "goes without --prompt-file and --interactive" if any(sources) else "is missing"
        raise ConfigError("--prompt", what,
                          expected="one of --prompt TEXT, --prompt-file FILE and --interactive")
    for name, given, owner, there in (("--system", args.system, "--chat", args.chat),
                                      ("--batch-size", args.batch_size, "several prompts", not args.interactive)):
        if given is not None and not there:
            raise ConfigError(name, f"goes with {owner}", got=given)
    if args.chat and args.special_tokens:
        raise ConfigError("--special-tokens", "goes without --chat, whose template writes them")
    if args.interactive and args.json:
        raise ConfigError("--json", "goes without --interactive")
    prompts = [] if args.interactive else _prompts(args)
    from hybridlm.evaluation.completion import Writer
    from hybridlm.model.generation import Sampling

    writer = Writer(args.checkpoint, device=choose_device(args.device), max_new_tokens=args.max_new_tokens,
                    sampling=Sampling(args.temperature, args.top_k, args.top_p, args.min_p), seed=args.seed,
                    stops=args.stop)
    if args.max_new_tokens >= writer.model.config.max_position:
        print(f"warning: --max-new-tokens {args.max_new_tokens} goes beyond the {writer.model.config.max_position} "
              "tokens (max_position) that the model is meant for", file=sys.stderr)
    if args.interactive:
        _converse(writer, args)
    elif len(prompts) == 1:
        _write_one(writer, prompts[0], args)
    else:
        _write_several(writer, prompts, args)
    return 0


def _parser() -> Parser:
    parser = Parser("generate", "Go on with a text. CHECKPOINT is a checkpoint, or a run folder (its newest).", """\
  hybridlm generate runs/first --prompt "import " --max-new-tokens 200
  hybridlm generate runs/first/checkpoints/step-300 --prompt "def main(" --temperature 0
  hybridlm generate runs/first --prompt "def a" --prompt "class B" --stop "def " --json
  hybridlm generate imported --chat --interactive""")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", metavar="TEXT",
                       help="the text to go on with; - reads standard input; may be given again")
    group.add_argument("--prompt-file", metavar="FILE", help="one prompt per line; of a .jsonl file, the text `prompt` "
                                                             "of each line")
    group.add_argument("--interactive", action="store_true", help="ask for one prompt after the other, to the end of "
                                                                  "the input (Ctrl-D)")
    group.add_argument("--special-tokens", action="store_true",
                       help="read prompts as transformers does: what spells a special token is that token, and the "
                            "token that begins texts is put in front")
    group.add_argument("--chat", action="store_true", help="prompts are messages of a user, written by the "
                                                           "checkpoint's chat template")
    group.add_argument("--system", metavar="TEXT", help="the message of the system before the user's")
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    group.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    group.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens (default all)")
    group.add_argument("--top-p", type=float, default=0.95, help="sample among the likeliest tokens that together "
                                                                 "have this probability (default 0.95)")
    group.add_argument("--min-p", type=float, default=0.0, help="sample among tokens of at least this share of the "
                                                                "likeliest one's probability (default 0)")
    group.add_argument("--seed", type=int, help="of the sampling; by default every call differs")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end before this text, or with this special token; may be given again")
    parser.add_argument("--batch-size", type=int, metavar="N", help="prompts at a time (default 16)")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_json()
    return parser


def _prompts(args: argparse.Namespace) -> list[bytes]:
    """The prompts of the arguments or of the file.

    Raises:
        ConfigError: a file that cannot be read, or holds no prompt.
    """
    if args.prompt is not None:
        return [sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt) for prompt in args.prompt]
    try:
        with open(args.prompt_file, "rb") as file:
            lines = [line.rstrip(b"\r\n") for line in file if line.strip()]
    except OSError as error:
        raise ConfigError("--prompt-file", f"cannot be read ({error.strerror})", got=args.prompt_file) from None
    if args.prompt_file.endswith(".jsonl"):
        lines = [_prompt_of(line, number) for number, line in enumerate(lines, start=1)]
    if not lines:
        raise ConfigError("--prompt-file", "holds no prompt", got=args.prompt_file)
    return lines


def _prompt_of(line: bytes, number: int) -> bytes:
    try:
        prompt = json.loads(line)["prompt"]
        return prompt.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError("--prompt-file", f"line {number} cannot be read", got=line[:60].decode("utf-8", "replace"),
                          expected='an object {"prompt": "a text"}') from None


def _encode(writer: Writer, prompt: bytes, args: argparse.Namespace) -> list[int]:
    if not args.chat:
        return writer.encode(prompt, special_tokens=args.special_tokens)
    return writer.encode_chat([*_system(args), {"role": "user", "content": prompt.decode("utf-8", "replace")}])


def _system(args: argparse.Namespace) -> list[dict[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _write_one(writer: Writer, prompt: bytes, args: argparse.Namespace) -> None:
    """Write behind one prompt, token by token unless as JSON."""
    from hybridlm.evaluation.completion import Completion

    ids = _encode(writer, prompt, args)
    result = Completion(prompt.decode("utf-8", "replace"))
    if args.json:
        for _ in writer.stream(ids, result):
            pass
        print(json.dumps({**asdict(result), **_speed(writer, result.tokens)}))
        return
    pieces = writer.stream(ids, result)
    first = next(pieces)  # what is wrong with the sampling is said before anything is written
    write_text("" if args.chat else result.prompt)
    write_text(first)
    for text in pieces:
        write_text(text)
    write_text("\n")
    _say_speed(writer, result.tokens)


def _write_several(writer: Writer, prompts: list[bytes], args: argparse.Namespace) -> None:
    results = writer.write([_encode(writer, prompt, args) for prompt in prompts],
                           [prompt.decode("utf-8", "replace") for prompt in prompts], args.batch_size or 16)
    tokens = sum(result.tokens for result in results)
    if args.json:
        print(json.dumps({"completions": [asdict(result) for result in results], "tokens": tokens,
                          **_speed(writer, tokens)}))
        return
    for number, result in enumerate(results, start=1):
        write_text(f"--- {number}\n{'' if args.chat else result.prompt}{result.text}\n")
    _say_speed(writer, tokens)


def _converse(writer: Writer, args: argparse.Namespace) -> None:
    """Ask for prompts to the end of the input; with `--chat` the conversation goes on."""
    from hybridlm.evaluation.completion import Completion

    messages = _system(args)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr)
            return
        prompt = line.rstrip("\n")
        if not prompt:
            continue
        if args.chat:
            messages.append({"role": "user", "content": prompt})
            ids = writer.encode_chat(messages)
        else:
            ids = writer.encode(prompt.encode("utf-8", "surrogateescape"), special_tokens=args.special_tokens)
        result = Completion(prompt)
        for text in writer.stream(ids, result):
            write_text(text)
        write_text("\n")
        _say_speed(writer, result.tokens)
        messages.append({"role": "assistant", "content": result.text})


def _speed(writer: Writer, tokens: int) -> dict[str, Any]:
    return {"seconds": writer.seconds, "tokens_per_second": tokens / writer.seconds}


def _say_speed(writer: Writer, tokens: int) -> None:
    print(f"{counted(tokens, 'token')} in {writer.seconds:.2f} s, {tokens / writer.seconds:.1f} tokens/s",
          file=sys.stderr)


def write_text(text: str) -> None:
    """Write text to standard output at once, in whatever encoding that has.

    On a terminal, control characters become U+FFFD: a model must not be able to move the cursor or rename the window.
    """
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
