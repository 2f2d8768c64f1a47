"""Fixtures and marks for all tests."""

from pathlib import Path

import pytest

from hybridlm import user_code
from hybridlm.kind_registry import all_registries

FOLDER = Path(__file__).parent
SLOW = [FOLDER / name for name in (
    "distributed", "interop/test_streaming.py", "interop/test_trained_export.py", "kernels/test_alone.py",
    "kernels/test_compiling.py", "kernels/test_triton.py", "model/test_compile.py", "report/test_watch.py",
    "sweep/test_cluster.py", "sweep/test_real_slurm.py", "sweep/test_run.py", "test_packaging.py",
    "training/test_compiled_run.py", "training/test_crash.py")]


def pytest_collection_modifyitems(items):
    """Mark files whose tests start processes or compile kernels; `bash scripts/test.sh fast` leaves them out."""
    for item in items:
        if any(item.path == place or place in item.path.parents for place in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def no_user_code_of_other_tests(monkeypatch):
    """Commands pass imported user code on to the processes they start: only that of the test itself."""
    monkeypatch.setattr(user_code, "_imported", {})


@pytest.fixture
def project_kinds(monkeypatch):
    """Registries hold the project's own kinds, whatever kinds other tests of this process have registered."""
    for registry in all_registries():
        for kind, (config, _) in list(registry.items()):
            if not config.__module__.startswith("hybridlm."):
                monkeypatch.delitem(registry, kind)
