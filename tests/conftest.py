"""Fixtures for all tests."""

import pytest

from hybridlm.kind_registry import all_registries


@pytest.fixture
def project_kinds(monkeypatch):
    """Registries hold the project's own kinds, whatever kinds other tests of this process have registered."""
    for registry in all_registries():
        for kind, (config, _) in list(registry.items()):
            if not config.__module__.startswith("hybridlm."):
                monkeypatch.delitem(registry, kind)
