"""Exported models in a fresh process: transformers alone for its own classes, one import for the type `hybridlm`."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, GenerationConfig

from hybridlm import build_model, load_checkpoint
from hybridlm.cli import main
from hybridlm.data.tokenizer import train_bpe
from hybridlm.interop import export_checkpoint, export_hf, import_checkpoint
from hybridlm.model.generation import generate
from hybridlm.run_config import load_model_config
from tests.support.hf_zoo import build

PROMPT = "def main("
FRESH_PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
own_class, hybridlm_type, prompt = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(own_class)
model, info = AutoModelForCausalLM.from_pretrained(own_class, output_loading_info=True)
ids = tokenizer(prompt, return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=24, do_sample=False)
try:
    AutoModelForCausalLM.from_pretrained(hybridlm_type)
    refused = ""
except ValueError as error:
    refused = str(error)
imported = [name for name in sys.modules if name.startswith("hybridlm")]
import hybridlm.interop.auto
loaded = AutoModelForCausalLM.from_pretrained(hybridlm_type)
print(json.dumps({"ids": out[0, ids.shape[1]:].tolist(), "class": type(model).__name__, "imported": imported,
                  "missing": list(info["missing_keys"]), "unexpected": list(info["unexpected_keys"]),
                  "refused": refused, "loaded": type(loaded).__name__}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text.py"
    text.write_text("".join(f"def name_{i}(value):\n    return value * {i}\n\n\n" for i in range(400)))
    assert main(["train", "experiment=quickstart", f"data.path={text}", f"data.cache_dir={folder / 'cache'}",
                 f"run_dir={folder / 'run'}", "training.steps=8", "training.sequence_length=64",
                 "training.eval_batches=1"]) == 0
    return folder / "run"


def test_transformers_loads_the_quickstart_alone_and_the_type_hybridlm_after_one_import(run, tmp_path, capsys):
    quickstart = tmp_path / "quickstart"
    assert main(["export", str(run), str(quickstart), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "kimi_linear"
    mixed = build_model(load_model_config("hybrid_tiny", ["model.schedule.pattern=[kda, lightning, full]"]))
    assert export_hf(mixed, tmp_path / "mixed")["family"] == "hybridlm"
    done = subprocess.run([sys.executable, "-c", FRESH_PROCESS, str(quickstart), str(tmp_path / "mixed"), PROMPT],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert (theirs["class"], theirs["missing"], theirs["unexpected"]) == ("KimiLinearForCausalLM", [], [])
    model = load_checkpoint(run)
    ids = model.tokenizer.encode(PROMPT)
    ours = [int(token[0]) for token in generate(model, ids, 24, temperature=0)]
    assert ours == theirs["ids"]
    assert len(set(ours)) > 1  # the model has learnt something
    assert theirs["imported"] == []
    assert "hybridlm" in theirs["refused"]
    assert theirs["loaded"] == "HybridLMForCausalLM"


def test_verify_finds_no_difference(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "kimi_linear: 4 layers (3 kda, 1 full)" in capsys.readouterr().out
    assert main(["verify", str(run), str(tmp_path / "out"), "--text", PROMPT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(part["max_logit_diff"] < 2e-5 and part["top1"] == 1.0 for part in found.values())
    assert set(found) == {"random", "given"}


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A released chat model in miniature: template, special tokens, generation settings, lengths."""
    folder = tmp_path_factory.mktemp("chat") / "released"
    backend = train_bpe(["".join(f"def name_{i}(value):\n    return value\n" for i in range(40))], 300).backend
    backend.add_special_tokens(["<s>", "<pad>", "<|im_end|>"])
    build("qwen3", vocab_size=320, bos_token_id=backend.token_to_id("<s>"), eos_token_id=0).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>",
        "pad_token": {"__type": "AddedToken", "content": "<pad>", "special": True}, "model_max_length": 256}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    ends = [0, backend.token_to_id("<|im_end|>")]
    GenerationConfig(temperature=0.6, do_sample=True, eos_token_id=ends, pad_token_id=1).save_pretrained(folder)
    return folder


def describe_chat(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {"chat": tokenizer.apply_chat_template([{"role": "user", "content": "value"}], tokenize=False),
            "tokens": (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token),
            "length": tokenizer.model_max_length}


@pytest.mark.parametrize("way", ["imported", "in memory", "trained from it", "trained afresh on its tokenizer"])
def test_chat_template_special_tokens_and_lengths_survive(way, chat_model, run, tmp_path):
    expected = describe_chat(chat_model)
    assert expected["tokens"] == ("<s>", "<|im_end|>", "<pad>")
    ours, out = tmp_path / "ours", tmp_path / "out"
    import_checkpoint(chat_model, ours)
    if way.startswith("trained"):
        start = [f"model={ours / 'config.yaml'}", f"init_from={ours}"] if way == "trained from it" else [
            "model=hybrid_tiny", f"data.tokenizer={chat_model}"]
        assert main(["train", *start, f"data.path={run.parent / 'text.py'}", f"data.cache_dir={run.parent / 'cache'}",
                     f"run_dir={tmp_path / 'run'}", "training.steps=1", "training.sequence_length=64",
                     "training.batch_size=2", "training.eval_batches=1"]) == 0
        ours = tmp_path / "run"
    if way == "in memory":
        export_hf(load_checkpoint(ours), out)
    else:
        export_checkpoint(ours, out)
    assert describe_chat(out) == expected
    config, generation = (json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json"))
    backend = AutoTokenizer.from_pretrained(out)
    assert (config["bos_token_id"], config["pad_token_id"]) == (backend.bos_token_id, backend.pad_token_id)
    if way in ("imported", "trained from it"):
        assert (generation["temperature"], generation["eos_token_id"]) == (0.6, [0, backend.eos_token_id])
        assert config["eos_token_id"] == 0
    else:
        assert config["eos_token_id"] == generation["eos_token_id"] == backend.eos_token_id
