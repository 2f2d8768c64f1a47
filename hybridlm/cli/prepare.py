"""`hybridlm prepare`: a data source into token shards."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hybridlm.cli.parser import Parser, split_config_words
from hybridlm.errors import counted

# What a source's report counts beside its documents: the key, the noun, and what was done with them.
PASSED_OVER = {"ignored_files": ("file", "of another kind passed over"),
               "left_out_files": ("file", "left to validation"), "empty_documents": ("empty document", "skipped"),
               "replaced_documents": ("document", "with replaced bytes")}


def run(argv: Sequence[str]) -> int:
    """Prepare the data of a run and print its counts; returns the exit code."""
    parser = Parser("prepare", "Read a data source into token shards, as a run would; it then starts at once.", """\
  hybridlm prepare data.path=texts/ data.tokenizer=bpe data.tokenizer_vocab_size=8192
  hybridlm prepare data.path=corpus.jsonl data.text_field=body --json""")
    parser.add_overrides()
    parser.add_argument("--verify", action="store_true", help="compute the checksums of all that is there again")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    from hybridlm.data import prepare
    from hybridlm.run_config import load_data_config

    config = load_data_config(*split_config_words(args.overrides), config_dir=args.config_dir)
    report = prepare(config, verify=args.verify).report()
    if args.json:
        print(json.dumps(report))
        return 0
    tokenizer = report["tokenizer"]
    print(f"tokenizer {tokenizer['name']}: {tokenizer['vocab_size']} ids, {tokenizer['eos']} ends a text, "
          f"{report['bytes_per_token']:.2f} bytes per token; a model needs "
          f"model.vocab_size={tokenizer['vocab_size']} or more")
    for source in report["sources"]:
        for part in ("train", "validation"):
            counts = source[part]
            print(f"{source['path']}  {part:<10}  {counted(counts['documents'], 'document')}  "
                  f"{counts['tokens']:,} tokens  {counts['bytes']:,} bytes  "
                  f"longest {counts['longest_document']:,} tokens")
        if 0 < source["held_out"] < 1:
            print(f"{source['path']}  {source['held_out']:.2%} of the bytes held out")
        passed = [f"{counted(source[key], noun)} {words}" for key, (noun, words) in PASSED_OVER.items()
                  if source.get(key)]
        if passed:
            print(f"{source['path']}  {', '.join(passed)}")
        print(f"{source['path']}  in {source['folder']}")
    return 0
