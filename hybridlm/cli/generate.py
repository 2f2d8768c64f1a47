"""`hybridlm generate`: text from a checkpoint."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from hybridlm.cli.parser import Parser, choose_device
from hybridlm.errors import CheckpointError, ConfigError


def run(argv: Sequence[str]) -> int:
    """Print a prompt and what the model makes of it; returns the exit code."""
    parser = Parser("generate", "Go on with a text. CHECKPOINT is a checkpoint, or a run folder (its newest).", """\
  hybridlm generate runs/first --prompt "import " --max-new-tokens 200
  hybridlm generate runs/first/checkpoints/step-300 --prompt "def main(" --temperature 0""")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--prompt", required=True, help="the text to go on with; - reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="sample among the likeliest tokens that together "
                                                                  "have this probability (default 0.95)")
    parser.add_argument("--seed", type=int, help="of the sampling; by default every call differs")
    parser.add_argument("--device", help="cpu or cuda; by default a GPU where there is one")
    parser.add_json()
    args = parser.parse_args(argv)
    from hybridlm.checkpoint import load_checkpoint
    from hybridlm.model.generation import generate

    prompt = sys.stdin.buffer.read() if args.prompt == "-" else os.fsencode(args.prompt)
    model = load_checkpoint(args.checkpoint, choose_device(args.device))
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise CheckpointError(f"checkpoint {args.checkpoint} holds no tokenizer, so it cannot read a prompt")
    try:
        ids = tokenizer.encode(prompt)
    except UnicodeDecodeError:
        raise ConfigError("--prompt", "is not UTF-8", got=prompt[:40]) from None
    if len(ids) == 0:
        raise ConfigError("--prompt", "holds no token", expected="at least one character")
    decoder = tokenizer.stream()
    shown: list[str] = []
    show = shown.append if args.json else write_text
    start = time.perf_counter()
    count = 0
    tokens = generate(model, ids.tolist(), args.max_new_tokens, temperature=args.temperature, top_p=args.top_p,
                      seed=args.seed, eos=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    show(prompt.decode("utf-8", "replace"))
    for token in tokens:
        count += 1
        show(decoder.push(int(token[0])))
    show(decoder.finish())
    if args.json:
        print(json.dumps({"prompt": shown[0], "text": "".join(shown[1:]), "tokens": count,
                          "seconds": time.perf_counter() - start}))
    else:
        write_text("\n")
    return 0


def write_text(text: str) -> None:
    """Write text to standard output at once, in whatever encoding that has.

    On a terminal, control characters become U+FFFD: a model must not be able to move the cursor or rename the window.
    """
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
