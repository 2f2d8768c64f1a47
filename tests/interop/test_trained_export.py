"""Exported models in a fresh process: transformers alone for its own classes, one import for the type `hybridlm`."""

import json
import subprocess
import sys

import pytest

from hybridlm import build_model, load_checkpoint
from hybridlm.cli import main
from hybridlm.interop import export_hf
from hybridlm.model.generation import generate
from hybridlm.run_config import load_model_config

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
