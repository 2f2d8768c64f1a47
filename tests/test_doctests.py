"""The examples in docstrings run, and every entry point has one."""

import doctest
import importlib
import pkgutil

import pytest

import hybridlm
import hybridlm_kernels
from hybridlm_kernels import registry

MODULES = [module.name for package in (hybridlm, hybridlm_kernels)
           for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
           if not module.name.endswith("__main__")]


def examples(name):
    """The docstrings of a module that have examples; modules that need a package which is not there have none."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("hybridlm", "hybridlm_kernels")):
            raise
        return []
    return [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Examples may write runs/ into the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["hybridlm", *MODULES])
def test_the_examples_of_a_module(name, own_folder):
    for test in examples(name):
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        found = []
        runner.run(test, out=found.append)
        assert runner.summarize(verbose=False).failed == 0, f"{test.name}:\n{''.join(found)}"


@pytest.mark.parametrize("name", ["load_config", "build_model", "load_checkpoint", "train"])
def test_an_entry_point_has_an_example(name):
    assert ">>>" in getattr(hybridlm, name).__doc__


@pytest.mark.parametrize("name", sorted(operation.name for operation in registry.operations()))
def test_a_public_operation_has_an_example(name):
    assert ">>>" in getattr(hybridlm_kernels, name).__doc__
