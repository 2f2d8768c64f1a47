"""Registries of kinds: the `kind` key of a config section names a class of options and what these options build.

Mixers, feed-forwards, residual forms, optimizers and engines each have one registry. It stands beside the base class
of their configs, and every kind adds itself to it, those of a user's own file (`--import FILE`) too. Whoever reads a
config asks the base class for its registry and needs to know no kind by name:

    OPTIMIZERS = KindRegistry("optimizer", OptimizerConfig, default="adamw")
    OPTIMIZERS.register("lion", LionConfig, build_lion)       # optimizer: {kind: lion, lr: 1e-4}
"""

from __future__ import annotations

from typing import Any

from hybridlm.errors import UserError

_REGISTRIES: dict[type, KindRegistry] = {}  # base class of the configs -> its registry


class KindError(UserError):
    """A kind that cannot be registered: its name is taken, or its classes do not fulfil the contract."""


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class KindRegistry(dict[str, tuple[type, Any]]):
    """The kinds of one thing: kind -> (config class, what a config of this class builds).

    Args:
        noun: what the kinds are, in error messages ("mixer").
        base: the class that every kind's config derives from; a field of this type is read by kind.
        key: the key of a config section that names the kind.
        default: the kind of a section that names none; None where the kind must be named.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Shape:
        ...     kind: str
        >>> @dataclass
        ... class Circle(Shape):
        ...     radius: float = 1.0
        >>> shapes = KindRegistry("shape", Shape)
        >>> shapes.register("circle", Circle, print)
        >>> registry_of(Shape).config_class("circle").__name__
        'Circle'
    """

    def __init__(self, noun: str, base: type, *, key: str = "kind", default: str | None = None):
        super().__init__()
        self.noun, self.base, self.key, self.default = noun, base, key, default
        _REGISTRIES[base] = self

    def register(self, kind: str, config: type, implementation: Any) -> None:
        """Add a kind.

        Registering the same config class again, as a reload of its file does, replaces the earlier registration.

        Raises:
            KindError: the name is taken by another kind, `config` does not derive from the registry's base class, or
                one of the two classes lacks a method of the contract.
        """
        if not issubclass(config, self.base):
            raise KindError(f"{self.noun} kind '{kind}': {config.__name__} does not derive from {self.base.__name__}")
        taken = self.get(kind)
        if taken is not None and _qualified_name(taken[0]) != _qualified_name(config):
            raise KindError(f"{self.noun} kind '{kind}' is taken by {_qualified_name(taken[0])}; give "
                            f"{config.__name__} another name")
        for cls in (config, implementation):
            lacking = sorted(getattr(cls, "__abstractmethods__", ()))
            if lacking:
                raise KindError(f"{self.noun} kind '{kind}': {cls.__name__} lacks {' and '.join(lacking)}; see the "
                                f"docstrings in {cls.__mro__[1].__module__} for what is expected")
        self[kind] = (config, implementation)

    def default_config(self) -> Any:
        """The config of a section that is left out: the default kind with all its defaults.

        Raises:
            KeyError: the registry has no default, or its kind is not registered yet.
        """
        return self.config_class(self.default or "")()

    def config_class(self, kind: str) -> type:
        """The config class of a registered kind."""
        return self[kind][0]

    def implementation(self, kind: str) -> Any:
        """The module class or function that a config of a registered kind builds."""
        return self[kind][1]


def all_registries() -> list[KindRegistry]:
    """Every registry that has been made so far."""
    return list(_REGISTRIES.values())


def registry_of(base: Any) -> KindRegistry | None:
    """The registry whose kinds' configs derive from `base`; None for a class that is not chosen by kind."""
    return _REGISTRIES.get(base) if isinstance(base, type) else None


def registry_with(config: type) -> KindRegistry | None:
    """The registry to which the config class of a kind belongs; None for any other class."""
    return next((_REGISTRIES[base] for base in config.__mro__ if base in _REGISTRIES), None)
