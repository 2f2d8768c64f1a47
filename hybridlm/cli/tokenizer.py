"""`hybridlm tokenizer train|show`: train a byte-level BPE on a data source, or show what one makes of a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridlm.cli.parser import Parser, split_config_words
from hybridlm.errors import ConfigError, UserError, counted

if TYPE_CHECKING:
    from hybridlm.config.schema import DataConfig

ACTIONS = ("train", "show")


def run(argv: Sequence[str]) -> int:
    """Run `tokenizer train` or `tokenizer show`; returns the exit code."""
    action = argv[0] if argv else None
    if action == "train":
        return _train(argv[1:])
    if action == "show":
        return _show(argv[1:])
    parser = Parser("tokenizer", "Train a byte-level BPE on a data source (train), or show a tokenizer: its "
                                 "vocabulary, its special tokens, and the tokens of a text (show).", """\
  hybridlm tokenizer train texts/ --vocab-size 8192 --to tokenizers/mine
  hybridlm tokenizer show tokenizers/mine --text "def main(" --file texts/a.txt
  hybridlm tokenizer train --help""")
    parser.add_argument("action", choices=ACTIONS, help="each has a --help of its own")
    parser.parse_args(argv[:1])
    raise UserError(f"hybridlm tokenizer: expected one of {', '.join(ACTIONS)}; see `hybridlm tokenizer --help`")


def _train(argv: Sequence[str]) -> int:
    parser = Parser("tokenizer train", "Train a byte-level BPE on the training documents of a data source. It is the "
                                       "tokenizer that data.tokenizer=bpe gives for the same data.", """\
  hybridlm tokenizer train texts/ --vocab-size 8192 --to tokenizers/mine
  hybridlm tokenizer train code/ news.jsonl.zst --vocab-size 16384 --to tokenizers/mixed --json
  hybridlm tokenizer train data.path=corpus.jsonl data.text_field=body --vocab-size 8192 --to tokenizers/mine""")
    parser.add_argument("words", nargs="+", metavar="PATH | key=value",
                        help="files, folders or patterns of text, equally weighted; or settings of a run's data "
                             "section; the YAML file of a complete config may stand first")
    parser.add_argument("--vocab-size", type=int, metavar="N",
                        help="ids at most; default: data.tokenizer_vocab_size of the settings")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="folder to write tokenizer.json into")
    parser.add_argument("--config-dir", metavar="FOLDER", help="a folder of your own configs, searched first")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    from hybridlm.data import train_tokenizer

    target = Path(args.to).expanduser()
    if (target / "tokenizer.json").exists():
        raise ConfigError("--to", "already holds a tokenizer", got=args.to, expected="a new folder")
    config = _data_config(args.words, args.config_dir)
    if args.vocab_size is not None:
        config = replace(config, tokenizer_vocab_size=args.vocab_size)
    tokenizer = train_tokenizer(config)
    try:
        tokenizer.save(target)
    except OSError as error:
        raise ConfigError("--to", f"cannot be written ({error.strerror})", got=args.to) from None
    report = {"folder": str(target), "vocab_size": tokenizer.vocab_size, "eos": tokenizer.eos,
              "eos_id": tokenizer.eos_id, "fingerprint": tokenizer.fingerprint}
    if args.json:
        print(json.dumps(report))
        return 0
    print(f"{target}: {tokenizer.vocab_size} ids, {tokenizer.eos} ends a text")
    print(f"use it with data.tokenizer={target} model.vocab_size={tokenizer.vocab_size}")
    return 0


def _data_config(words: Sequence[str], config_dir: str | None) -> DataConfig:
    """The data section that paths and settings name."""
    from hybridlm.config.schema import DataSourceConfig
    from hybridlm.run_config import load_data_config

    settings = [word for word in words if _is_setting(word)]
    paths = [word for word in words if not _is_setting(word)]
    if paths and paths[0].endswith((".yaml", ".yml")):
        settings.insert(0, paths.pop(0))
    config = load_data_config(*split_config_words(settings), config_dir=config_dir)
    if not paths:
        return config
    if any(word.startswith(("data.path=", "data.mixture=")) for word in settings):
        raise ConfigError("PATH", "stands beside data.path or data.mixture", got=paths[0], expected="one of the two")
    if len(paths) == 1:
        return replace(config, path=paths[0], mixture=[])
    options = {key: getattr(config, key) for key in ("text_field", "document_separator", "invalid_utf8")}
    return replace(config, mixture=[DataSourceConfig(path=path, **options) for path in paths])


def _is_setting(word: str) -> bool:
    """Whether a word is key=value or ~key, as the command line of a run has them, and no path."""
    return ("=" in word and not Path(word).exists()) or (word.startswith("~") and not word.startswith("~/"))


def _show(argv: Sequence[str]) -> int:
    parser = Parser("tokenizer show", "Show a tokenizer: vocabulary, special tokens, the tokens of a text, bytes per "
                                      "token on a file.", """\
  hybridlm tokenizer show tokenizers/mine --text "def main("
  hybridlm tokenizer show runs/first --file texts/ --json
  hybridlm tokenizer show bytes --text "naïve" """.rstrip())
    parser.add_argument("tokenizer", metavar="TOKENIZER",
                        help="as data.tokenizer: bytes, a tokenizer.json, a folder with one, a run or checkpoint "
                             "folder, or a name on the hub")
    parser.add_argument("--text", help="show the tokens of this text")
    parser.add_argument("--file", metavar="PATH", help="count the bytes per token of a file, a folder or a pattern")
    parser.add_argument("--eos", metavar="TOKEN", help="the token that ends a text, where the files do not name it")
    parser.add_json()
    args = parser.parse_args(argv)
    from hybridlm.config.schema import DataSourceConfig
    from hybridlm.data import load_tokenizer
    from hybridlm.data.tokenizer_report import count_tokens, describe_tokenizer, text_pieces
    from hybridlm.sources import open_source

    tokenizer = load_tokenizer(args.tokenizer, args.eos)
    report = describe_tokenizer(tokenizer)
    if args.text is not None:
        report["pieces"] = text_pieces(tokenizer, args.text)
    if args.file is not None:
        report["file"] = count_tokens(tokenizer, open_source(DataSourceConfig(path=args.file)))
    print(json.dumps(report) if args.json else _render(report))
    return 0


def _render(report: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {report[key] or 'none'}"
                       for key, name in (("normalizer", "normaliser"), ("pre_tokenizer", "pre-tokenizer")))
    lines = [f"tokenizer {report['name']}: {report['vocab_size']:,} ids, {report['kind']} with "
             f"{counted(report['merges'], 'merge')}; {stages}",
             f"{report['eos']} (id {report['eos_id']}) ends a text",
             "special tokens: " + (", ".join(f"{t['token']} {t['id']}" for t in report["special_tokens"]) or "none")]
    if "pieces" in report:
        lines.append(f"{counted(len(report['pieces']), 'token')}:")
        lines += [f"{piece['id']:>8}  {piece['text']!r}" for piece in report["pieces"]]
    if "file" in report:
        file = report["file"]
        rate = "no text" if file["bytes_per_token"] is None else f"{file['bytes_per_token']:.3f} bytes per token"
        lines.append(f"{file['path']}: {counted(file['documents'], 'document')}, {file['bytes']:,} bytes, "
                     f"{file['tokens']:,} tokens with ends of text, {rate}")
    return "\n".join(lines)
