"""Code of the user's own: what can name it, what registers, and how a broken file is told."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys

import pytest

from hybridlm import user_code
from hybridlm.cli import main
from hybridlm.model.mixers import MIXERS
from hybridlm.user_code import import_arguments, import_user_code, imported_user_code
from tests.support.example_mixer import EXAMPLE

KIND = """
from dataclasses import dataclass
from hybridlm.model.feed_forward import DenseConfig, FeedForward, SwiGLU
from hybridlm.model.feed_forward.contract import register_feed_forward

@dataclass(kw_only=True)
class {name}Config(DenseConfig):
    kind: str = "{kind}"

@register_feed_forward("{kind}", {name}Config)
class {name}(SwiGLU):
    pass
"""


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch, tmp_path):
    """Each test starts without user code, in an empty folder, and leaves no kind behind."""
    from hybridlm.model.feed_forward import FEED_FORWARDS

    before = dict(MIXERS), dict(FEED_FORWARDS), set(sys.modules), list(sys.path)
    monkeypatch.setattr(user_code, "_imported", {})
    monkeypatch.setattr(user_code, "_loaded_entry_points", set())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYBRIDLM_IMPORT", raising=False)
    yield
    for registry, kinds in ((MIXERS, before[0]), (FEED_FORWARDS, before[1])):
        registry.clear()
        registry.update(kinds)
    for name in set(sys.modules) - before[2]:
        file = str(getattr(sys.modules[name], "__file__", None))
        if str(tmp_path) in file or file == str(EXAMPLE):  # whoever imports it again registers its kind again
            del sys.modules[name]
    sys.path[:] = before[3]


def kind_file(folder, name, kind=None):
    path = folder / f"{name}.py"
    path.write_text(KIND.format(name=name.title().replace("_", ""), kind=kind or name))
    return path


def check(capsys, kind, *words):
    code = main(["check", kind, *words, "--only", "parameter count", "--json"])
    captured = capsys.readouterr()
    return json.loads(captured.out)["what"] if code == 0 else captured.err


def test_a_file_a_module_and_the_variable_register_kinds(tmp_path, monkeypatch, capsys):
    kind_file(tmp_path, "first")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    kind_file(tmp_path / "package", "second")
    kind_file(tmp_path, "third")
    assert check(capsys, "first", "--import", "first.py", "--import", "package.second") == "feed-forward"
    assert check(capsys, "second") == "feed-forward"
    assert "no such mixer or feed-forward; got 'third'" in check(capsys, "third")
    monkeypatch.setenv("HYBRIDLM_IMPORT", "third.py:package.second")
    assert check(capsys, "third") == "feed-forward"
    assert imported_user_code() == [str(tmp_path / "first.py"), "package.second", str(tmp_path / "third.py")]
    assert import_arguments()[:4] == ["--import", str(tmp_path / "first.py"), "--import", "package.second"]


def test_a_file_finds_its_neighbours_and_is_imported_once(tmp_path, capsys):
    path = kind_file(tmp_path, "fourth")
    (tmp_path / "helper_of_fourth.py").write_text("runs = []\n")
    path.write_text("import helper_of_fourth\nhelper_of_fourth.runs.append(1)\n" + path.read_text())
    for name in (str(path), "fourth.py", "fourth"):  # as a module too: it is the same file
        assert check(capsys, "fourth", "--import", name) == "feed-forward"
    assert sys.modules["helper_of_fourth"].runs == [1]


def test_an_installed_package_registers_by_its_entry_point(tmp_path, monkeypatch, capsys):
    kind_file(tmp_path, "fifth")
    monkeypatch.syspath_prepend(str(tmp_path))
    points = [importlib.metadata.EntryPoint("fifth", "fifth", "hybridlm.kinds")]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "hybridlm.kinds" else [])
    assert check(capsys, "fifth") == "feed-forward"
    assert imported_user_code() == []  # other processes find it by themselves
    points.append(importlib.metadata.EntryPoint("gone", "no_such_module_anywhere", "hybridlm.kinds"))
    assert "entry point gone of an installed package: cannot import no_such_module_anywhere" in check(capsys, "fifth")


@pytest.mark.parametrize(("text", "words"), [
    ("x = 1\ny = undefined_name\n", "broken.py, line 2: NameError: name 'undefined_name' is not defined"),
    ("def f(:\n    pass\n", "broken.py, line 1: SyntaxError"),
    ("import not_installed_anywhere\n", "broken.py, line 1: ModuleNotFoundError: No module named"),
    ("raise SystemExit(3)\n", "broken.py, line 1: SystemExit: 3"),
    ("from hybridlm.model.mixers import AttentionConfig, register_mixer\n\n"
     "class Mine(AttentionConfig):\n    pass\n\n"
     "register_mixer('attention', Mine)(object)\n",
     "broken.py, line 6: KindError: mixer kind 'attention' is taken by hybridlm.model.mixers.attention"),
])
def test_a_broken_file_is_one_line_with_its_place(tmp_path, capsys, text, words):
    (tmp_path / "broken.py").write_text(text)
    assert main(["inspect", "model=hybrid_tiny", "--import", "broken.py"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: --import: cannot import broken.py: {tmp_path}/")
    assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("name", "words"), [
    ("missing.py", "--import: no such file; got 'missing.py'; expected FILE.py or a dotted module"),
    (".", "--import: is neither a file nor a module; got '.'; expected FILE.py or a dotted module"),
    ("only_a_folder", "--import: is a folder without code of its own; got 'only_a_folder'"),
    ("./", "--import: is no Python file"), ("no.such.module", "--import: no such module; got 'no.such.module'")])
def test_what_is_not_there_is_said_in_one_line(tmp_path, capsys, name, words):
    (tmp_path / "only_a_folder").mkdir()
    assert main(["train", "--import", name]) == 2
    assert words in capsys.readouterr().err


def test_an_imported_mixer_is_listed_and_suggested(capsys):
    assert main(["configs", "mixer", "--json", "--import", str(EXAMPLE)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["options"]}
    assert rows["my_mixer"] == {"name": "my_mixer", "built_in": False, "summary":
                                "A gated moving average over the tokens."}
    assert rows["kda"]["built_in"]
    assert main(["configs", "mixer", "my_mixer", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["choose"], shown["file"]) == ("model.schedule.linear=my_mixer", str(EXAMPLE))
    assert shown["text"] == "kind: my_mixer\nwidth: null\n"
    assert main(["inspect", "model=hybrid_tiny", "model.schedule.linear=my_mixr"]) == 2
    assert "did you mean 'my_mixer'?" in capsys.readouterr().err


def test_no_config_can_name_code(tmp_path, capsys):
    shutil.copy(EXAMPLE, tmp_path / "mine.py")
    for name, text in {"import": "import: mine.py\n", "target": "model: {_target_: mine.GatedAverage}\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
        assert main(["inspect", f"{name}.yaml"]) == 2
    assert main(["inspect", "model=hybrid_tiny", "user_code=[mine.py]"]) == 2
    assert "user_code: unknown key" in capsys.readouterr().err
    assert not any(name.startswith("mine_") for name in sys.modules)


def test_importing_nothing_is_quick_and_changes_nothing():
    import_user_code()
    assert imported_user_code() == []


def test_help_lists_what_the_users_file_registers(tmp_path, capsys):
    from hybridlm.evaluation.sparse import SPARSE_METHODS

    (tmp_path / "mine_alone.py").write_text("""
from hybridlm.evaluation.sparse import SPARSE_METHODS, register_sparse_method
register_sparse_method("newest_alone", type("NewestAlone", (SPARSE_METHODS["streaming"],), {}))
""")
    try:
        with pytest.raises(SystemExit):
            main(["eval", "--import", "mine_alone.py", "--help"])
    finally:
        SPARSE_METHODS.pop("newest_alone", None)
    assert "newest_alone" in capsys.readouterr().out
