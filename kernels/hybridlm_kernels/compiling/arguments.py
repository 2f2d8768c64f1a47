"""Arguments of an operation as those of a custom operation of torch: tensors, numbers, flags and words.

The signature of the public function says all there is to know. Borders become one tensor on the host, of which a
compiled graph knows the size alone, so that no recompilation depends on where documents end. A dataclass (`Gate`,
`Pools`) becomes its fields, a sequence of tensors so many arguments.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Union

import torch
from torch import Tensor

from hybridlm_kernels.packing import CuSeqlens

LEFT_OUT = ("backend",)  # parameters that every operation has, with a place of their own


class Argument(ABC):
    """One parameter of a public function, spread over one or more arguments of its custom operation."""

    @abstractmethod
    def schema(self) -> list[str]:
        """The arguments of the custom operation, as torch's schema language has them."""

    def read(self, value: Any) -> Any:
        """The parameter in the form in which shapes of outputs are asked of it; torch.compile traces it."""
        return value

    @abstractmethod
    def spread(self, value: Any) -> list[Any]:
        """The values of these arguments. torch.compile traces it: it reads no number from a tensor."""

    @abstractmethod
    def gather(self, values: Iterator[Any], device: torch.device) -> Any:
        """The parameter, from the values of its arguments; `device` is that of the operation's tensors."""


class PlainArgument(Argument):
    """A tensor, number, flag or word, as it is."""

    NAMES: typing.ClassVar = {Tensor: "Tensor", bool: "bool", int: "SymInt", float: "float", str: "str"}
    NOTHING: typing.ClassVar = {"bool": False, "SymInt": 0, "float": 0.0, "str": ""}

    def __init__(self, name: str, kind: type, optional: bool):
        self.name, self.optional = name, optional
        self.kind = self.NAMES[kind]

    def schema(self) -> list[str]:
        return [f"{self.kind}{'?' * self.optional} {self.name}"]

    def spread(self, value: Any) -> list[Any]:
        return [value]

    def gather(self, values: Iterator[Any], device: torch.device) -> Any:
        return next(values)

    @property
    def nothing(self) -> Any:
        """The value where the dataclass it is a field of is missing."""
        return None if self.optional else self.NOTHING[self.kind]


class BordersArgument(Argument):
    """Borders of packed documents: their table on the host."""

    def __init__(self, name: str):
        self.name = name

    def schema(self) -> list[str]:
        return [f"Tensor? {self.name}"]

    def read(self, value: Any) -> Any:
        return None if value is None else CuSeqlens.of(value, "cpu")

    def spread(self, value: Any) -> list[Any]:
        return [None if value is None else value.table]

    def gather(self, values: Iterator[Any], device: torch.device) -> CuSeqlens | None:
        table = next(values)
        return None if table is None else CuSeqlens.of_table(table, device)


class TensorsArgument(Argument):
    """Several tensors, as arguments of their own, so that each may have a gradient; the rest of them are None."""

    MOST = 32

    def __init__(self, name: str):
        self.name = name

    def schema(self) -> list[str]:
        return [f"Tensor? {self.name}_{place}" for place in range(self.MOST)]

    def read(self, value: Any) -> Any:
        return tuple(value)

    def spread(self, value: Any) -> list[Any]:
        if len(value) > self.MOST:
            raise ValueError(f"{self.name}: a graph of torch.compile takes up to {self.MOST} tensors; got {len(value)}")
        return [*value, *[None] * (self.MOST - len(value))]

    def gather(self, values: Iterator[Any], device: torch.device) -> tuple[Tensor, ...]:
        found = [next(values) for _ in range(self.MOST)]
        return tuple(x for x in found if x is not None)


class RecordArgument(Argument):
    """A dataclass: whether it is there, and its fields."""

    def __init__(self, name: str, record: type, optional: bool):
        self.name, self.record, self.optional = name, record, optional
        hints = typing.get_type_hints(record)
        self.fields: list[PlainArgument] = []
        for field in dataclasses.fields(record):
            made = make_argument(f"{name}_{field.name}", hints[field.name])
            assert isinstance(made, PlainArgument), f"{record.__name__}.{field.name} is no tensor, number or word"
            made.optional = made.optional or (optional and made.kind == "Tensor")
            self.fields.append(made)
        self.names = [field.name for field in dataclasses.fields(record)]

    def schema(self) -> list[str]:
        return [f"bool has_{self.name}", *(text for field in self.fields for text in field.schema())]

    def spread(self, value: Any) -> list[Any]:
        if value is None:
            return [False, *[field.nothing for field in self.fields]]
        return [True, *[getattr(value, name) for name in self.names]]

    def gather(self, values: Iterator[Any], device: torch.device) -> Any:
        present, fields = next(values), [next(values) for _ in self.fields]
        return self.record(**dict(zip(self.names, fields, strict=True))) if present else None


def make_argument(name: str, annotation: Any) -> Argument:
    """The argument that a type annotation stands for.

    Raises:
        TypeError: a type that no custom operation can take.
    """
    union = typing.get_origin(annotation) in (Union, types.UnionType)
    members = list(typing.get_args(annotation)) if union else [annotation]
    optional = type(None) in members
    members = [member for member in members if member is not type(None)]
    if CuSeqlens in members:
        return BordersArgument(name)
    if len(members) == 1:
        kind = members[0]
        if typing.get_origin(kind) is Literal:
            kind = type(typing.get_args(kind)[0])
        if typing.get_origin(kind) is Sequence and typing.get_args(kind) == (Tensor,):
            return TensorsArgument(name)
        if kind in PlainArgument.NAMES:
            return PlainArgument(name, kind, optional)
        if dataclasses.is_dataclass(kind):
            return RecordArgument(name, typing.cast(type, kind), optional)
    raise TypeError(f"{name}: an operation takes tensors, sequences of them, numbers, flags, words, borders and "
                    f"dataclasses of these; got {annotation}")


class Arguments:
    """All parameters of a public function, and the way to a flat list of values and back."""

    def __init__(self, function: Callable[..., Any]):
        hints = typing.get_type_hints(function)
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in LEFT_OUT]
        self.names = [p.name for p in parameters]
        self.keyword_only = [p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters]
        self.defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
        self.arguments = [make_argument(p.name, hints[p.name]) for p in parameters]

    def schema(self) -> str:
        """The arguments as torch's schema language has them."""
        return ", ".join(text for argument in self.arguments for text in argument.schema())

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The value of every parameter, by name; torch.compile traces it."""
        values = dict(self.defaults)
        for name, value in zip(self.names, args, strict=False):
            values[name] = value
        values.update(kwargs)
        for name, argument in zip(self.names, self.arguments, strict=True):
            values[name] = argument.read(values[name])
        return values

    def spread(self, values: dict[str, Any]) -> list[Any]:
        """The flat list of what the custom operation takes; torch.compile traces it."""
        flat: list[Any] = []
        for name, argument in zip(self.names, self.arguments, strict=True):
            flat.extend(argument.spread(values[name]))
        return flat

    def gather(self, flat: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Arguments and keyword arguments of the public function, from the flat list."""
        device = next(x.device for x in flat if isinstance(x, Tensor))
        values = iter(flat)
        gathered = [argument.gather(values, device) for argument in self.arguments]
        by_name = list(zip(self.names, self.keyword_only, gathered, strict=True))
        return ([value for _, keyword, value in by_name if not keyword],
                {name: value for name, keyword, value in by_name if keyword})

    def places(self, names: tuple[str, ...]) -> list[int]:
        """Places in the flat list of the plain parameters `names`.

        Raises:
            ValueError: a name that is none of them.
        """
        found, place = {}, 0
        for name, argument in zip(self.names, self.arguments, strict=True):
            found[name] = place
            place += len(argument.schema())
        for name in names:
            if name not in found:
                raise ValueError(f"{name} is no parameter; these are {', '.join(self.names)}")
        return [found[name] for name in names]
