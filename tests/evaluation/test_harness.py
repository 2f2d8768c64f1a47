"""Tasks of lm-eval on a checkpoint: scores against the model's own logits, and a task defined in a temporary folder."""

import json
import math

import pytest
import torch

from hybridlm.checkpoint import load_checkpoint
from hybridlm.cli import main

pytest.importorskip("lm_eval", reason="lm-eval is not installed (hybridlm[eval])")

from huggingface_hub import constants
from lm_eval.api.instance import Instance

from hybridlm.errors import ConfigError
from hybridlm.evaluation import harness
from hybridlm.evaluation.harness import HarnessLM
from hybridlm.model.generation import generate

QUESTIONS = [{"question": "what comes after one", "choices": ["two", "seven"], "answer": 0},
             {"question": "what comes after two", "choices": ["nine", "three"], "answer": 1},
             {"question": "what comes after three, in a longer question than the others", "choices": ["four", "one"],
              "answer": 0}]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
KINDS = {"choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}:'\ndoc_to_choice: '{{choices}}'\n"
                   "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n",
         "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
                    "metric_list: [{metric: bits_per_byte}]\n",
         "writing": "output_type: generate_until\ndoc_to_text: '{{question}}:'\ndoc_to_target: '{{choices[answer]}}'\n"
                    "generation_kwargs: {until: [e], max_gen_toks: 4, do_sample: false}\n"
                    "metric_list: [{metric: exact_match}]\n"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of a few steps, and tasks."""
    folder = tmp_path_factory.mktemp("harness")
    (folder / "text.txt").write_text("one two three four five six seven. " * 200)
    settings = ["model=hybrid_tiny", "model.num_layers=2", "model.hidden_size=32", "model.schedule.ratio=1",
                "model.feed_forward={kind: dense, intermediate_size: 64}", f"data.path={folder}/text.txt",
                f"data.cache_dir={folder}/cache", "data.tokenizer=bpe", "data.tokenizer_vocab_size=280",
                "training.batch_size=4", "training.sequence_length=48", "training.steps=3", f"run_dir={folder}/run"]
    assert main(["train", *settings]) == 0
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "tasks").mkdir()
    for name, kind in KINDS.items():
        text = TASK.format(name=f"local_{name}", data=folder / "data.jsonl") + kind
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return load_checkpoint(folder / "run")


def direct(model, before, after):
    """Log-probability of `after` behind `before`, alone, and whether greedy decoding would say it."""
    ids = torch.tensor([[*before, *after]])
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].double().log_softmax(-1)[len(before) - 1:]
    asked = ids[0, len(before):]
    return float(log_p.gather(1, asked[:, None]).sum()), bool((log_p.argmax(-1) == asked).all())


def ask(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=args, idx=0) for args in arguments]


@pytest.mark.parametrize("pack", [8, 10_000])
def test_log_likelihoods_are_those_of_the_model_alone(model, pack):
    lm, encode = HarnessLM(model, model.tokenizer, pack=pack), model.tokenizer.encode
    pairs = [("one two", " three"), ("", "seven"), ("a much longer context, one two three four", " five six"),
             ("x ", "y")]
    found = lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (log_p, greedy) in zip(pairs, found, strict=True):
        before = encode(context.rstrip()).tolist() if context else [model.tokenizer.eos_id]
        after = encode(context + continuation).tolist()[len(before) if context else 0:]
        expected, is_greedy = direct(model, before, after)
        assert log_p == pytest.approx(expected, rel=1e-4)
        assert greedy == is_greedy


def test_what_greedy_decoding_says_is_greedy(model):
    before = model.tokenizer.encode("one two").tolist()
    said = [int(token) for token in generate(model, before, 5, temperature=0)]
    other = [*said[:-1], (said[-1] + 1) % model.tokenizer.vocab_size]
    lm = HarnessLM(model, model.tokenizer)
    answers = lm._loglikelihood_tokens([(None, before, said), (None, before, other), (None, before, [])])
    assert [greedy for _, greedy in answers] == [True, False, True]
    assert answers[2][0] == 0.0


def test_whole_texts_are_cut_into_windows_where_they_are_too_long(model):
    lm, text = HarnessLM(model, model.tokenizer), "one two three four five"
    ids, start = lm.tok_encode(text), [model.tokenizer.eos_id]
    whole, = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    assert whole == pytest.approx(direct(model, start, ids)[0], rel=1e-4)
    lm.max_length = size = len(ids) - 2
    cut, = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    rest = direct(model, ids[-size - 1:-2], ids[-2:])[0]  # the last window, as full as it can be
    assert cut == pytest.approx(direct(model, start, ids[:size])[0] + rest, rel=1e-4)


def test_a_context_that_is_too_long_loses_its_first_tokens(model):
    lm = HarnessLM(model, model.tokenizer)
    lm.max_length = 4
    before, after = lm.tok_encode("one two three four five six"), lm.tok_encode(" seven")
    (log_p, _), = lm._loglikelihood_tokens([(None, before, after)])
    kept = [*before, *after][-5:]
    assert log_p == pytest.approx(direct(model, kept[:-len(after)], after)[0], rel=1e-4)


def test_texts_end_before_their_stop_and_do_not_depend_on_company(model):
    lm = HarnessLM(model, model.tokenizer, rows=2)
    free = ("one two", {"until": [], "max_gen_toks": 6})
    text, = lm.generate_until(ask("generate_until", free))
    stop = text[len(text) // 2]
    stopped = {"until": [stop], "max_gen_toks": 6}
    prompts = [("one two", stopped), ("two one", stopped), free]
    assert lm.generate_until(ask("generate_until", *prompts))[::2] == [text.split(stop)[0], text]


@pytest.mark.parametrize(("settings", "same_as"), [
    ({"until": [""]}, {"until": []}), ({"until": None}, {"until": []}), ({"until": "e"}, {"until": ["e"]}),
    ({"num_beams": 1}, {}), ({"do_sample": False, "temperature": 0.7}, {}), ({"temperature": 0.0}, {}),
    ({"max_gen_toks": None, "max_new_tokens": 6}, {}), ({"max_tokens": 3}, {}),
    ({"max_gen_toks": None, "max_completion_tokens": 4}, {"max_gen_toks": 4}),
    ({"temperature": 1e-4}, {}), ({"do_sample": True, "temperature": 9.0, "top_k": 1}, {}),
    ({"do_sample": True, "temperature": 9.0, "min_p": 1.0, "top_k": 0}, {})])
def test_generation_settings_that_mean_the_same(model, settings, same_as):
    lm = HarnessLM(model, model.tokenizer)
    texts = [lm.generate_until(ask("generate_until", ("one two", {"max_gen_toks": 6} | options)))
             for options in (settings, same_as)]
    assert texts[0] == texts[1] != [""]


def test_a_temperature_samples_without_do_sample(model):
    lm = HarnessLM(model, model.tokenizer)
    greedy, warm = (lm.generate_until(ask("generate_until", ("one", {"max_gen_toks": 20} | options)))
                    for options in ({}, {"temperature": 5.0}))
    assert greedy != warm


def test_token_limits(model):
    lm, length = HarnessLM(model, model.tokenizer), len(model.tokenizer.encode("one two"))
    limited, total, none = (lm.generate_until(ask("generate_until", ("one two", {"until": [], **limit}))) for limit in
                            ({"max_gen_toks": 3}, {"max_length": length + 3}, {"max_gen_toks": 0}))
    assert limited == total != none == [""]
    lm.generate_until(ask("generate_until", ("one", {"max_gen_toks": 2, "max_new_tokens": 5})))
    assert any("max_gen_toks=2 and max_new_tokens=5" in note for note in lm.notes)


@pytest.mark.parametrize(("settings", "says"), [
    ({"num_beams": 4}, "num_beams: is not supported"), ({"seed": 1}, "seed: is not known here"),
    ({"do_sample": True, "temperature": 0.0}, "temperature: must be positive where do_sample is true"),
    ({"do_sample": True}, "temperature: must be positive"), ({"temperature": 1.0, "top_p": 2.0}, "top_p: must be a"),
    ({"until": 3}, "until: is no text"), ({"max_length": 1}, "max_length: is no longer than a context"),
    ({"max_gen_toks": 10**6}, "max_gen_toks: leaves no room for the context"), ({"max_gen_toks": -1}, "max_gen_toks")])
def test_settings_that_cannot_be_obeyed_are_refused(model, settings, says):
    with pytest.raises(ConfigError, match=rf"generation_kwargs\.{says}"):
        HarnessLM(model, model.tokenizer).generate_until(ask("generate_until", ("one two", settings)))


def test_what_is_cut_is_said(model, caplog):
    lm = HarnessLM(model, model.tokenizer)
    lm.max_length = 4
    lm._loglikelihood_tokens([(None, [1] * 9, [2]), (None, [1], [2] * 6), (None, [1], [2])])
    lm.generate_until(ask("generate_until", ("one two three four five", {"max_gen_toks": 1})))
    for note in ("1 of 3 continuations are longer than 4 tokens", "1 of 3 requests are longer",
                 "1 of 1 contexts are longer than 3 tokens"):
        assert any(note in line for line in lm.notes), note
        assert note in caplog.text


def test_tasks_of_a_folder_from_the_command_line(folder, model, capfd, monkeypatch):
    monkeypatch.chdir(folder)  # no repository, of which git would complain
    words = ["eval", str(folder / "run"), "--device", "cpu", "--task-folder", str(folder / "tasks"), "--tasks",
             "local_choice,local_rolling,local_writing"]
    capfd.readouterr()
    assert main([*words, "--json"]) == 0
    printed = capfd.readouterr()
    assert "not a git repository" not in printed.err
    tasks = json.loads(printed.out)["tasks"]
    assert {name: row["examples"] for name, row in tasks.items()} == dict.fromkeys(tasks, 3)
    encode = model.tokenizer.encode
    right = 0
    for item in QUESTIONS:
        before = encode(item["question"] + ":").tolist()
        scores = [direct(model, before, encode(f"{item['question']}: {choice}").tolist()[len(before):])[0]
                  for choice in item["choices"]]
        right += scores.index(max(scores)) == item["answer"]
    assert tasks["local_choice"]["metrics"]["acc"]["value"] == pytest.approx(right / 3)
    nats = sum(direct(model, [model.tokenizer.eos_id], encode(item["question"]).tolist())[0] for item in QUESTIONS)
    size = sum(len(item["question"]) for item in QUESTIONS)
    bits = tasks["local_rolling"]["metrics"]["bits_per_byte"]["value"]
    assert bits == pytest.approx(-nats / size / math.log(2), rel=1e-4)
    assert main([*words[:-1], str(folder / "tasks" / "choice.yaml"), "--limit", "2"]) == 0
    out = capfd.readouterr().out
    assert "local_choice" in out
    assert "acc" in out


@pytest.mark.parametrize(("words", "says"), [
    (["--tasks", "local_choise", "--task-folder", "TASKS"], ["--tasks", "did you mean 'local_choice'"]),
    (["--tasks", "local_choice", "--task-folder", "/nowhere"], ["--task-folder", "is not a folder"]),
    (["--tasks", "BROKEN"], ["task", "cannot be loaded", "HF_HUB_OFFLINE"]),
    (["--tasks", "local_choice", "--task-folder", "TASKS", "--limit", "0"], ["limit", "at least 1"]),
    (["data.path=x", "--tasks", "local_choice"], ["--tasks", "and nothing else"]),
])
def test_a_mistake_is_one_line(folder, tmp_path, capsys, monkeypatch, words, says):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    own = harness.TaskManager(include_path=folder / "tasks", include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: own)  # lm-eval's own tasks take long to read
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: far\ndataset_path: nobody/no_such_data\ntest_split: test\noutput_type: multiple_choice\n")
    capsys.readouterr()
    words = [{"TASKS": str(folder / "tasks"), "BROKEN": str(broken)}.get(word, word) for word in words]
    assert main(["eval", str(folder / "run"), "--device", "cpu", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert all(part in line for part in says), line
