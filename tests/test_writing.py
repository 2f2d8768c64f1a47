"""Docstrings, comments and documentation pages follow the rules of writing that a program can check."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
CODE = [name for name in TRACKED if name.endswith(".py") and not name.startswith("tests/")]
PAGES = [name for name in TRACKED if name.endswith((".md", ".yaml"))]
FIRST_WORDS = ("Of", "As", "What", "Where", "Who", "How", "Which")
# "bytes a token": a thing that is counted, then "a" where "per" is meant.
COUNTED = ("bytes?|bits?|nats?|FLOPs?|parameters?|weights?|elements?|entries|numbers?|keys?|tokens?|heads?|experts?|"
           "layers?|programs?|launch(?:es)?|products?|gates?|decays?|logits?|rows?|process(?:es)?|ranks?|seconds|"
           "milliseconds|samples?|sequences?|documents?|files?|moments?|mixers?|one|two|three|few|many|much|once|twice|\\d+")
UNITS = "token|head|layer|step|channel|row|rank|document|chunk|program|thread|point|parameter|expert|sequence|pass"
PER = re.compile(rf"\b(?:{COUNTED}) an? (?:{UNITS})\b(?!\w)")


def docstrings(name):
    """(line, text) of every docstring of a file."""
    for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def uses_a_for_per(text):
    """The places where `a` stands for `per`, as they are written."""
    return [match[0] for match in PER.finditer(text)]


@pytest.mark.parametrize("text", ["bytes a token", "programs a chunk", "FLOPs a step", "experts a layer"])
def test_a_counted_thing_before_a_unit_is_found(text):
    assert uses_a_for_per(f"It costs {text} here.") == [text]


@pytest.mark.parametrize("text", ["what a token sees", "bytes per token", "it makes a layer of it", "see a head"])
def test_an_article_is_no_fault(text):
    assert uses_a_for_per(text) == []


def test_no_docstring_starts_with_a_fragment():
    wrong = [f"{name}:{line}: {text.splitlines()[0]}" for name in CODE for line, text in docstrings(name)
             if text.split(maxsplit=1)[0] in FIRST_WORDS]
    assert not wrong, "\n".join(["docstrings that start like a fragment:", *wrong])


def test_per_is_called_per():
    wrong = [f"{name}:{number}: {found}" for name in [*CODE, *PAGES]
             for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
             for found in uses_a_for_per(line)]
    assert not wrong, "\n".join(["write `per` (bytes per token):", *wrong])


def test_every_module_and_public_class_has_a_docstring():
    wrong = []
    for name in CODE:
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        if tree.body and ast.get_docstring(tree) is None:
            wrong.append(f"{name}: the module")
        wrong += [f"{name}:{node.lineno}: {node.name}" for node in tree.body
                  if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not wrong, "\n".join(["without a docstring:", *wrong])


def test_unreleased_changes_have_each_heading_once():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    section = re.split(r"^## \[", text, flags=re.MULTILINE)[1]
    assert section.startswith("Unreleased]")
    headings = re.findall(r"^### (.*)", section, re.MULTILINE)
    order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    assert headings == [name for name in order if name in headings]
