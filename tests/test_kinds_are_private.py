"""No concrete kind is named outside its own file: the rest of the code asks its contract."""

import ast
import inspect
from pathlib import Path

import pytest

import hybridlm
import hybridlm.config.schema
import hybridlm.interop.family_registry
import hybridlm.model.residual
from hybridlm.kind_registry import KindRegistry, all_registries

PACKAGE = Path(hybridlm.__file__).parent
FAMILIES = PACKAGE / "interop" / "families"  # a family maps the options of given kinds, so it names them


def own_files(registry: KindRegistry) -> set[Path]:
    """Files of the kinds of one registry: of each kind its file, or all files of the folder that it has to itself."""
    contract = Path(inspect.getfile(registry.base))
    files: set[Path] = set()
    for config, implementation in registry.values():
        for cls in (config, implementation):
            file = Path(inspect.getfile(cls))
            if PACKAGE in file.parents and file != contract:  # tests register kinds too
                has_own_folder = contract.parent in file.parent.parents
                files |= set(file.parent.glob("*.py")) if has_own_folder else {file}
    return files


def private_classes() -> dict[str, set[Path]]:
    """Every class in the files of kinds, with the files that may name it: those of kinds of the same registry.

    A kind may build on another one (DDP on a single process), and a kind of several files has several classes.
    """
    found: dict[str, set[Path]] = {}
    for registry in all_registries():
        if registry.noun == "shape":  # made by the example in the docstring of KindRegistry
            continue
        files = own_files(registry)
        for file in files:
            classes = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)]
            for name in classes:
                found[name] = files
    return found


def named_in(file: Path) -> dict[str, int]:
    """Names that the code of a file uses or imports, with a line of each; docstrings and comments do not count."""
    names: dict[str, int] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            names.setdefault(node.id, node.lineno)
        elif isinstance(node, ast.Attribute):
            names.setdefault(node.attr, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names.setdefault(alias.name, node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.setdefault(node.value, node.lineno)  # getattr, or a type named in quotes
    return names


PRIVATE = private_classes()


def may_name_kinds(file: Path) -> bool:
    """Registry lists (the __init__ of a package) and interop families."""
    return file.name == "__init__.py" or FAMILIES in file.parents


def test_the_registries_of_every_room_are_known():
    nouns = {registry.noun for registry in all_registries()}
    assert {"mixer", "feed-forward", "residual", "optimizer", "engine"} <= nouns
    assert {"AttentionConfig", "MLA", "DeltaRule", "LinearAttentionConfig", "MixtureOfExperts", "Router",
            "SwiGLU"} <= set(private_classes())


@pytest.mark.parametrize("file", [pytest.param(file, id=str(file.relative_to(PACKAGE)))
                                  for file in sorted(PACKAGE.rglob("*.py")) if not may_name_kinds(file)])
def test_no_kind_is_named_outside_its_own_file(file):
    private = PRIVATE
    wrong = {name: line for name, line in named_in(file).items() if name in private and file not in private[name]}
    assert not wrong, f"{file} names kinds of other files (name: line): {wrong}; ask their contract instead"
