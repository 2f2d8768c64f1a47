"""Every command line that README, docs, `--help`, scripts and messages print does what it says, as printed.

Cheap commands run. A training command runs as far as its plan (`--dry-run`), a sweep as far as its points, and what
needs a GPU, a cluster or the network as far as its arguments. All stand in a folder that has what the pages name:
texts/, runs/first, mine.yaml. Extra words at the end only make a command shorter.
"""

import contextlib
import importlib.util
import io
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from hybridlm import checkpoint as saved
from hybridlm.cli import dispatch, main
from hybridlm.cli.parser import Parser
from hybridlm.config.schema import Config
from hybridlm.config.serialization import to_yaml
from hybridlm.distributed.engine_config import ENGINES
from hybridlm.model.model import build_model
from hybridlm.planning import machine_memory
from hybridlm.report import watch
from hybridlm.run_config import load_config
from hybridlm.sweep import estimate
from tests.support import printed_commands as printed
from tests.support import report_folders
from tests.support.ladder_folders import ladder_folder
from tests.support.printed_commands import ROOT

PARSED_ONLY = {"import", "export", "verify", "doctor", "bench"}  # slow, or of other programs; tests of their own


class Parsed(Exception):
    """Raised in place of running a command whose arguments were accepted."""


def shorter(command, rest):
    """What is added to a command so that it is cheap."""
    if command == "train":  # a run that begins, in a folder that is not there yet
        if "runs/first/config.yaml" in rest:  # it has the checkpoints of more steps than were made
            return ["--dry-run", "training.steps=100000"]
        return ["--dry-run", *([] if any(word.endswith("config.yaml") for word in rest) else ["run_dir=fresh"])]
    if command == "sweep":
        return [] if "--collect" in rest else ["--dry-run", "sweep.dir=dry"]
    if command == "ladder":
        return ["ladder.fit.bootstrap=2"] if "--fit-only" in rest else ["--dry-run", "ladder.dir=dry"]
    if command == "generate":
        return ["--max-new-tokens", "2"]
    if command == "check":
        return [] if "--only" in rest else ["--only", "initialisation"]
    if command == "select":
        return ["--windows", "1", "--sequence-length", "32"]
    if command == "eval" and "--probe" in rest:
        return ["--examples", "2", *([] if "--zero-shot" in rest else ["--steps", "1"])]
    if command == "eval":
        return ["--windows", "1", *([] if "perplexity" in rest else ["--contexts", "8,16", "--decode-tokens", "2"])]
    return []


def help_texts():
    """What `hybridlm` and every `hybridlm COMMAND --help` print."""
    texts = {}
    for command in ("", *dispatch.COMMANDS):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            dispatch.run([command, "--help"] if command else [])
        texts[command] = out.getvalue()
    return texts


def collect():
    """All printed commands by their words, each with the places that print it."""
    found = defaultdict(list)
    for command in (*printed.of_pages(), *printed.of_help(help_texts()), *printed.of_scripts(), *printed.of_source()):
        words = [word for word in command.words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words[0].endswith("torchrun.sh") or words[0].endswith("deepspeed.sh") or "slurm.sbatch" in " ".join(words):
            start = next(i for i, word in enumerate(words) if "launch/" in word)
            words = ["hybridlm", "train", *words[start + 1:]]
        if words[0] == "torchrun" and "hybridlm.cli" in words:
            words = ["hybridlm", *words[words.index("hybridlm.cli") + 1:]]
        if words[0].endswith("hybridlm"):
            words[0] = "hybridlm"
        found[tuple(words)].append(command)
    return found


COMMANDS = collect()
OURS = [words for words in COMMANDS if words[0] == "hybridlm" and len(words) > 1 and not words[1].startswith("-")]
HERE = {"sweep.dir=/shared/sweeps/ratio": "sweep.dir=runs/sweeps/ratios",  # what a page names, what is here
        "runs/first_dsa": "runs/trained_dsa",
        **dict.fromkeys(("my_mixer.py", "examples/my_mixer.py"), str(ROOT / "examples" / "my_mixer.py"))}
OTHERS = [words for words in COMMANDS if words[0] in ("bash", "python")]


def _named(pattern):
    """What the group of a pattern matches at the start of any word of the printed commands."""
    return {found[1] for words in COMMANDS for word in words if (found := re.match(pattern, word))}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the texts, configs, runs and sweeps that the pages name."""
    top = tmp_path_factory.mktemp("printed")
    text = "".join(f"def read_{i}(self, key):\n    return self.table[key] + {i}\n\n" for i in range(400))
    for folder in ("texts", *_named(r"data\.path=(\w+)/")):
        (top / folder).mkdir(exist_ok=True)
        (top / folder / "a.txt").write_text(text, encoding="utf-8")
    (top / "prompts.txt").write_text("def read(\nimport \n", encoding="utf-8")
    (top / "held_out.txt").write_text(text, encoding="utf-8")
    (top / "layers.json").write_text('{"keep": [7]}', encoding="utf-8")
    (top / "corpus.jsonl").write_text('{"body": "some text"}\n' * 200, encoding="utf-8")
    tutorial = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    model, = re.findall(r"^```yaml\n(# A small hybrid.*?)^```", tutorial, flags=re.DOTALL | re.MULTILINE)
    (top / "mine.yaml").write_text(model, encoding="utf-8")
    (top / "path" / "to").mkdir(parents=True)
    (top / "path" / "to" / "mine.yaml").write_text(model, encoding="utf-8")
    with contextlib.chdir(top), contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "model=hybrid_tiny", "model.num_layers=8", "model.max_position=131072",
                     "data.path=texts/", "training.steps=2", "training.batch_size=2",
                     "training.sequence_length=32", "training.eval_batches=1",
                     "run_dir=runs/first"]) == 0
        checkpoint = top / "runs/first/checkpoints/step-2"
        for name in _named(r"(?:\w+=)?runs/first/(checkpoints/step-\d+)"):
            shutil.copytree(checkpoint, top / "runs/first" / name)
        for name in _named(r"(?:\w+=)?(checkpoints/[\w-]+)"):
            shutil.copytree(checkpoint, top / name)
        for name in _named(r"(?:(?:init|branch)_from=)?runs/(\w+)") - {"first", "first_dsa", "sweeps"}:
            shutil.copytree(top / "runs" / "first", top / "runs" / name)
        converted = load_config("train", ["recipe=dsa_tiny", "init_from=runs/first", "run_dir=runs/first_dsa",
                                          "data.path=texts/"])
        (top / "runs/first_dsa").mkdir()
        (top / "runs/first_dsa/config.yaml").write_text(to_yaml(converted), encoding="utf-8")
        saved.write(top / "runs/trained_dsa/checkpoints", 1,
                    saved.model_texts(converted, converted.model, saved.load_tokenizer(checkpoint)),
                    {"model": saved.unique_tensors(build_model(converted.model))})
    vary = {"model.schedule.linear": ["kda", "gdn"], "model.schedule.ratio": [0, 1]}
    for name in ("hybrid_ratio", "first", "ratios"):
        report_folders.sweep_folder(top / "runs" / "sweeps" / name, vary, steps=5)
    ladder_folder(top / "runs" / "ladders" / "tiny", "ladder=tiny", "ladder.fit.bootstrap=2")
    return top


@pytest.fixture
def cheap(place, monkeypatch):
    """A machine of enough memory whose speed is not measured, and a watch that ends at its first look."""
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(place)
    monkeypatch.setattr(machine_memory, "host_memory_bytes", lambda: 2**50)
    monkeypatch.setattr(estimate, "peak_flops", lambda *_: (1e9, "made up"))
    monkeypatch.setattr(watch.time, "sleep", stop)
    monkeypatch.setenv("COLUMNS", "200")


def parse_only(monkeypatch):
    def stop(self, parsed):
        raise Parsed

    monkeypatch.setattr(Parser, "_with_user_code", stop)


def is_run(words):
    """Whether a command runs: what needs a network, other programs' folders or more time is parsed alone."""
    command, rest = words[1], words[2:]
    if command in PARSED_ONLY or not any(seen.whole for seen in COMMANDS[words]):
        return False
    # the network, a person, minutes, a trained run with indexers
    if {"--tasks", "--interactive", "--check-coordinates", "--indexers"} & set(rest):
        return False
    return (bool(rest) or command == "configs")


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_a_printed_command_works(words, cheap, monkeypatch, capsys):
    places = ", ".join(dict.fromkeys(command.place for command in COMMANDS[words]))
    command, rest = words[1], [HERE.get(word, word) for word in words[2:]]
    assert command in dispatch.COMMANDS, places
    if not any(seen.whole for seen in COMMANDS[words]) or _names_only(words):
        _check_options(command, rest, places)
        return
    if not is_run(words):
        parse_only(monkeypatch)
        if rest or command in ("doctor", "configs"):
            with pytest.raises(Parsed):
                dispatch.run([command, *rest])
        return
    code = main([command, *rest, *shorter(command, rest)])
    said = capsys.readouterr()
    assert code == 0, f"{places}: {said.err}"


def _names_only(words):
    """Whether a text names a command without what it needs: `hybridlm eval --probe`, `hybridlm tokenizer show`."""
    in_source = all(seen.place.endswith(".py") for seen in COMMANDS[words])
    return "--help" in words or (len(words) == 3 and (words[2].startswith("--") or in_source))


def _check_options(command, rest, places):
    """Options of a command line with parts left out; settings among its words compose."""
    known = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", HELP[command]))
    unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known | {"--help"}]
    assert not unknown, f"{places}: {unknown}"
    settings = [word for word in rest if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word)]
    if settings and command in ("train", "inspect"):
        load_config("train", settings)


HELP = help_texts()


@pytest.mark.parametrize("words", OTHERS, ids=" ".join)
def test_a_printed_script_exists_and_has_the_options(words):
    places = ", ".join(dict.fromkeys(command.place for command in COMMANDS[words]))
    if words[1] == "-m":
        module = importlib.util.find_spec(words[2])
        assert module is not None, places
        file = module.origin
    elif words[1] == "-c":
        compile(words[2], places, "exec")
        return
    else:
        file = ROOT / words[1]
        assert file.is_file(), places
    if words[0] == "bash":
        subprocess.run(["bash", "-n", str(file)], check=True)
        return
    if "pytest" not in words:
        text = Path(file).read_text(encoding="utf-8")
        given = [word.split("=")[0] for word in words if word.startswith("--")]
        assert [option for option in given if f'"{option}"' not in text] == [], places


def test_commands_of_every_kind_of_place_were_found():
    """A collector that finds nothing would make all of this pass."""
    places = {command.place for commands in COMMANDS.values() for command in commands}
    for name in ("README.md", "docs/tutorial.md", "docs/sweeps.md", "hybridlm train --help", "hybridlm  --help",
                 "scripts/quickstart.sh", "scripts/launch/slurm.sbatch", "configs/recipe/dsa.yaml",
                 "hybridlm/distributed/engine.py", "examples/my_mixer.py"):
        assert name in places, name
    assert len(OURS) > 90
    assert ("hybridlm", "train", "model=mine.yaml", "training.steps=300", "training.sequence_length=256",
            "training.batch_size=8", "optimizer.lr=3e-3", "run_dir=runs/mine") in COMMANDS


@pytest.mark.parametrize(("line", "code"), [(["train", "model=hybrid_tiny", "--dryrun"], 2),
                                            (["train", "model=hybrid_tinny"], 2), (["configs", "mixr"], 2)])
def test_a_wrong_command_is_found(line, code, cheap, capsys):
    assert main(line) == code


def setting_exists(key):
    """Whether a dotted key is one of the schema; a section that is chosen by kind has the keys of all kinds."""
    section, *rest = key.split(".")
    if section == "engine":
        return any(rest[0] in {field.name for field in fields(config)} for config, _ in dict(ENGINES.items()).values())
    kind = {field.name: field for field in fields(Config)}[section].type
    config = getattr(__import__("hybridlm.config.schema", fromlist=["x"]), str(kind).split(".")[-1], None)
    return not is_dataclass(config) or rest[0] in {field.name for field in fields(config)}


def test_settings_that_messages_name_exist():
    named = set(printed.setting_advice())
    assert len({key for _, key in named}) > 20
    wrong = sorted(f"{place}: {key}" for place, key in named if not setting_exists(key))
    assert not wrong, wrong
    assert not setting_exists("training.microbatch")
    assert not setting_exists("engine.processes")
