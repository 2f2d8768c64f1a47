"""Configs of engines by kind, for tests that run several engines with the same options."""

from dataclasses import fields

from hybridlm.distributed.engine_config import ENGINES


def engine_config(kind="single", **options):
    """The config of an engine, with those of `options` that this kind has."""
    config_class = ENGINES.config_class(kind)
    return config_class(**{name: value for name, value in options.items()
                           if name in {field.name for field in fields(config_class)}})
