"""`hybridlm generate`: prompts of every source, stops, special tokens, chats, several at once, and a conversation."""

import io
import json
import sys

import pytest
import torch

from hybridlm.cli import main
from hybridlm.data.chat import TextConventions
from hybridlm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from hybridlm.errors import DataError
from hybridlm.evaluation.completion import StopWatch, Writer
from hybridlm.interop import export_checkpoint, import_checkpoint, save_checkpoint
from hybridlm.model.generation import Sampling, generate
from tests.support.tiny_lm import model

TEXT = "one two three four five six seven. the quick brown fox, and the lazy dog: an answer to the question? "
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a random model whose tokenizer knows the marks of a chat."""
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    backend = train_bpe([TEXT], 300).backend
    backend.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    lm = model(vocab_size=310, max_position=4096, init_std=0.4)
    lm.tokenizer = Tokenizer(backend, "<|endoftext|>", "chat")
    save_checkpoint(lm, folder)
    return folder


@pytest.fixture(scope="module")
def chat_folder(folder, tmp_path_factory):
    """The same model, imported from a folder of transformers that has a chat template."""
    theirs = tmp_path_factory.mktemp("theirs") / "model"
    export_checkpoint(folder, theirs)
    (theirs / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((theirs / "tokenizer_config.json").read_text())
    (theirs / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>"}))
    import_checkpoint(theirs, theirs.parent / "ours")
    return theirs.parent / "ours"


def run(capsys, folder, *words, code=0):
    capsys.readouterr()
    assert main(["generate", str(folder), "--device", "cpu", "--temperature", "0", *map(str, words)]) == code
    return capsys.readouterr()


def run_json(capsys, folder, *words):
    return json.loads(run(capsys, folder, *words, "--json").out)


def test_several_prompts_are_what_each_is_alone(folder, tmp_path, capsys):
    prompts = ["one two", "the lazy dog: an", "x"]
    alone = [run_json(capsys, folder, "--prompt", prompt, "--max-new-tokens", 9) for prompt in prompts]
    assert [row["prompt"] for row in alone] == prompts
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    for source in (words, ["--prompt-file", tmp_path / "prompts.txt"], ["--prompt-file", tmp_path / "prompts.jsonl"],
                   [*words, "--batch-size", 2]):
        found = run_json(capsys, folder, *source, "--max-new-tokens", 9)
        assert [row["text"] for row in found["completions"]] == [row["text"] for row in alone]
        assert found["tokens"] == sum(row["tokens"] for row in alone)
        assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    shown = run(capsys, folder, *words, "--max-new-tokens", 9)
    assert f"--- 2\n{prompts[1]}{alone[1]['text']}\n" in shown.out
    assert "tokens/s" in shown.err


def test_a_stop_ends_the_text_before_it(folder, capsys):
    whole = run_json(capsys, folder, "--prompt", "one two", "--max-new-tokens", 20)
    text = whole["text"]
    assert whole["ended_by"] == "length"
    stop = text[5:8]
    for words in (["--prompt", "one two"], ["--prompt", "one two", "--prompt", "one two"]):
        found = run_json(capsys, folder, *words, "--max-new-tokens", 20, "--stop", "never there", "--stop", stop)
        for row in found.get("completions", [found]):
            assert row["text"] == text[: text.index(stop)]
            assert row["ended_by"] == stop
            assert row["tokens"] < 20
    assert run(capsys, folder, "--prompt", "one two", "--max-new-tokens", 20, "--stop", stop).out == \
        f"one two{text[: text.index(stop)]}\n"


def test_a_stop_may_be_a_special_token(folder):
    writer = Writer(folder, stops=["<|im_end|>", "one"])
    assert writer.ends == {0: "end", writer.tokenizer.backend.token_to_id("<|im_end|>"): "<|im_end|>"}
    assert writer.stops == ["one"]


@pytest.mark.parametrize(("pieces", "stops", "shown", "found"), [
    (["ab", "cd", "ef"], ["cde"], "ab", "cde"), (["ab", "cd", "xx"], ["cde"], "abcdxx", None),
    (["aab"], ["ab"], "a", "ab"), (["a", "aa", "b"], ["aab"], "a", "aab"), (["xyab"], ["ab", "y"], "x", "y"),
    (["abc"], ["abcd"], "abc", None), (["a"], [""], "a", None)])
def test_a_stop_watch_releases_what_is_certain(pieces, stops, shown, found):
    watch = StopWatch(load_tokenizer("bytes").stream(), stops)
    text = "".join(watch.push(byte) for byte in "".join(pieces).encode())
    assert (text + watch.finish(), watch.found) == (shown, found)


def test_special_tokens_are_text_unless_asked_for(folder):
    writer = Writer(folder)
    prompt, token = "<|im_start|>user", writer.tokenizer.backend.token_to_id("<|im_start|>")
    assert token not in writer.encode(prompt.encode())
    assert writer.encode(prompt.encode(), special_tokens=True)[0] == token
    assert writer.tokenizer.decode(writer.encode(prompt.encode())) == prompt


def test_a_chat_is_what_the_template_and_transformers_make_of_it(chat_folder, capsys):
    from transformers import AutoTokenizer

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " hello "}]
    writer = Writer(chat_folder)
    theirs = AutoTokenizer.from_pretrained(chat_folder)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert writer.encode_chat(messages) == expected
    assert expected[0] == writer.tokenizer.backend.token_to_id("<s>")
    found = run_json(capsys, chat_folder, "--chat", "--system", "be brief", "--prompt", " hello ",
                     "--max-new-tokens", 8)
    tokens = torch.cat(list(generate(writer.model, expected, 8, temperature=0, eos=0,
                                     vocab_size=writer.tokenizer.vocab_size)))
    assert found["text"] == writer.tokenizer.decode(tokens.tolist())
    with pytest.raises(DataError, match="refuses these messages: no tools"):
        writer.encode_chat([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(("template", "says"), [("{% for %}", "refuses"), ("{{ messages[7].content }}", "refuses"),
                                                ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses")])
def test_a_broken_or_hostile_template_is_one_line(template, says):
    with pytest.raises(DataError, match=says):
        TextConventions(chat_template=template).chat([{"role": "user", "content": "x"}])


def test_a_conversation(chat_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand now?\n"))
    shown = run(capsys, chat_folder, "--chat", "--interactive", "--max-new-tokens", 6)
    writer = Writer(chat_folder, max_new_tokens=6, sampling=Sampling(temperature=0))
    messages, answers = [], []
    for prompt in ("hello", "and now?"):
        messages.append({"role": "user", "content": prompt})
        answer, = writer.write([writer.encode_chat(messages)], [prompt])
        messages.append({"role": "assistant", "content": answer.text})
        answers.append(answer.text)
    assert shown.out == "".join(f"{answer}\n" for answer in answers)
    assert shown.err.count("tokens/s") == 2


@pytest.mark.parametrize(("words", "says"), [
    ([], "--prompt: is missing"), (["--prompt", "a", "--interactive"], "--prompt: goes without"),
    (["--prompt", "a", "--system", "b"], "--system: goes with --chat"),
    (["--prompt", "a", "--chat"], "has no chat template"), (["--prompt", "a", "--top-k", 0], "top_k: must be positive"),
    (["--prompt", "a", "--min-p", 2], "min_p"), (["--prompt", "a", "--stop", ""], "--stop: is empty"),
    (["--interactive", "--json"], "--json: goes without"),
    (["--prompt-file", "nowhere"], "--prompt-file: cannot be read"),
    (["--prompt", "a", "--prompt", ""], "holds no token"), (["--prompt", "a", "--max-new-tokens", 0], "max_new_tokens"),
    (["--chat", "--special-tokens", "--prompt", "a"], "--special-tokens: goes without --chat")])
def test_a_mistake_is_one_line(folder, capsys, words, says):
    line = run(capsys, folder, *words, code=2).err.splitlines()[-1]
    assert line.startswith("error: ")
    assert says in line


def test_a_prompt_file_that_cannot_be_read(folder, tmp_path, capsys):
    for text, says in (("", "holds no prompt"), ('{"prompt": "a"}\n{"text": 1}\n', "line 2 cannot be read")):
        (tmp_path / "bad.jsonl").write_text(text)
        assert says in run(capsys, folder, "--prompt-file", tmp_path / "bad.jsonl", code=2).err
