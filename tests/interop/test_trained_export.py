"""A trained model leaves for transformers alone: nothing of ours is imported there, and the greedy text is the same."""

import json
import subprocess
import sys

import pytest

from hybridlm import load_checkpoint
from hybridlm.cli import main
from hybridlm.model.generation import generate

PROMPT = "def main("
SINGLE_PROCESS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=24, do_sample=False)
assert not any(name.startswith("hybridlm") for name in sys.modules)
print(json.dumps({"ids": out[0, ids.shape[1]:].tolist(), "class": type(model).__name__,
                  "missing": list(info["missing_keys"]), "unexpected": list(info["unexpected_keys"])}))
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


def test_the_quickstart_model_speaks_the_same_in_transformers_alone(run, tmp_path, capsys):
    out = tmp_path / "exported"
    assert main(["export", str(run), str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "kimi_linear"
    done = subprocess.run([sys.executable, "-c", SINGLE_PROCESS, str(out), PROMPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert (theirs["class"], theirs["missing"], theirs["unexpected"]) == ("KimiLinearForCausalLM", [], [])
    model = load_checkpoint(run)
    ids = model.tokenizer.encode(PROMPT)
    ours = [int(token[0]) for token in generate(model, ids, 24, temperature=0)]
    assert ours == theirs["ids"]
    assert len(set(ours)) > 1  # it has learnt to say something


def test_verify_finds_no_difference(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "kimi_linear: 4 layers (3 kda, 1 full)" in capsys.readouterr().out
    assert main(["verify", str(run), str(tmp_path / "out"), "--text", PROMPT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(part["max_logit_diff"] < 2e-5 and part["top1"] == 1.0 for part in found.values())
    assert set(found) == {"random", "given"}
