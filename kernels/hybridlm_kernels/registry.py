"""Chooses the backend that runs an operation, and keeps the reasons: every choice and every rejection can be printed.

An operation lists its backends in order of preference. The first one made for the device at hand that accepts
the call runs it. `configure` or a call's own `backend=` names one instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ANY_DEVICE: tuple[str, ...] = ()
PREFERRED = "preferred"  # the best of the backends made for the device


class KernelUnavailable(RuntimeError):
    """No backend may run the call, or one was asked for that is not there: what, why, and what to do."""


@dataclass(frozen=True)
class Call:
    """The facts about a call by which a backend accepts or refuses it.

    `facts` are short values that name the kind of call (head dims, kind of decay, packed or not). No lengths:
    decisions are remembered by their facts, and a choice must not depend on how long a batch happens to be.
    """

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype
    needs_grad: bool
    facts: tuple[tuple[str, Any], ...] = ()
    device_index: int | None = None  # of several devices of the type; None where there is one, or the current one

    @classmethod
    def of(cls, *tensors: Tensor | None, **facts: Any) -> Call:
        """A call on these tensors, the first of which gives device and dtype; None entries are skipped."""
        present = [t for t in tensors if t is not None]
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in present)
        device = present[0].device
        return cls(device.type, present[0].dtype, needs_grad, tuple(facts.items()), device.index)

    def get(self, fact: str, default: Any = None) -> Any:
        """The value of a fact, or `default`."""
        return next((value for name, value in self.facts if name == fact), default)


def always(call: Call) -> tuple[bool, str]:
    """Accepts every call: the default of a backend's `supports`."""
    return True, ""


@dataclass(frozen=True)
class Backend:
    """One way to run an operation.

    `supports(call)` gives (True, "") or (False, reason). `run` takes the operation's checked arguments, by position.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[[Call], tuple[bool, str]] = always
    devices: tuple[str, ...] = ANY_DEVICE  # device types it is made for
    # Of a package that chooses among implementations by itself: what took the place of its own kernels in this process.
    replacements: Callable[[], Sequence[str]] = tuple


@dataclass(frozen=True)
class Operation:
    """A named operation with its backends, the preferred one first."""

    name: str
    backends: tuple[Backend, ...]


@dataclass(frozen=True)
class Choice:
    """One decision: the backend, the reason, and the reasons why the ones before it were passed over."""

    operation: str
    backend: str
    why: str
    rejected: tuple[str, ...] = ()


_operations: dict[str, Operation] = {}
_settings: dict[str, str] = {}  # operation -> backend asked for
_strict: bool | None = None  # None: strict on CUDA only
_decisions: dict[tuple[str, Call, str | None], tuple[Backend, Choice]] = {}
_watchers: list[Callable[[Choice], None]] = []
_revision = 0  # counts the changes after which choices may be others


def register(operation: Operation) -> Operation:
    """Makes an operation known by its name, and returns it."""
    _operations[operation.name] = operation
    _forget_decisions()
    return operation


def operations() -> list[Operation]:
    """All known operations, in the order in which they were registered."""
    return list(_operations.values())


def configure(settings: Mapping[str, Any]) -> None:
    """Names the backend of operations, `{"delta_rule": "torch"}`, and `strict`; all else stays as it is.

    A backend of None or "auto" gives the choice back to the registry, and so does a `strict` of None. With
    strict (by default on CUDA only) falling back from the best backend for a device to another is an error.

    Raises:
        KernelUnavailable: an unknown operation or backend (with the nearest known name), or a `strict` that
            is neither a bool nor None.

    >>> configure({"swiglu": "reference"})
    >>> configure({"swiglu": "fast"})
    Traceback (most recent call last):
    ...
    hybridlm_kernels.registry.KernelUnavailable: swiglu has no backend 'fast'; it has triton, torch, reference
    >>> configure({"swiglu": "auto"})
    """
    global _strict
    checked: dict[str, str | None] = {}
    for name, value in settings.items():
        if name == "strict":
            if value is not None and not isinstance(value, bool):
                raise KernelUnavailable(f"kernels.strict must be true, false or null; got {value!r}")
        elif name not in _operations:
            raise KernelUnavailable(f"unknown operation {name!r}{_nearest(name, [*_operations, 'strict'])}")
        else:
            checked[name] = None if value in (None, "auto") else _backend(_operations[name], value).name
    for name, backend in checked.items():
        _settings.pop(name, None)
        if backend is not None:
            _settings[name] = backend
    if "strict" in settings:
        _strict = settings["strict"]
    _forget_decisions()


def choose(op: Operation, call: Call, override: str | None = None) -> Backend:
    """The backend that runs `call`: the one named by `override` or `configure`, else the first that accepts it.

    Raises:
        KernelUnavailable: the named backend is unknown or refuses the call, none accepts it, or (strict) the
            best one for the device refuses it.
    """
    key = (op.name, call, override)
    if key not in _decisions:
        _decisions[key] = _decide(op, call, override)
    backend, choice = _decisions[key]
    for watcher in _watchers:
        watcher(choice)
    return backend


def replacements() -> list[str]:
    """Parts of packages that others computed in this process, each as "fla: part -> implementation"."""
    found = {f"{backend.name}: {part}": None for op in _operations.values() for backend in op.backends
             for part in backend.replacements()}
    return list(found)


def first_choice(name: str, device: str) -> str:
    """Name of the backend that runs an operation on a device unless it refuses the call.

    It is the one that `configure` names, or the first that is made for the device.

    >>> first_choice("attention", "cpu")
    'torch'
    """
    operation = _operations[name]
    made = (backend.name for backend in operation.backends if not backend.devices or device in backend.devices)
    return _settings.get(name) or next(made)


def revision() -> int:
    """A number that grows with every change after which operations may choose other backends."""
    return _revision


def is_configured(name: str) -> bool:
    """Whether `configure` names a backend for the operation."""
    return name in _settings


def explain() -> list[Choice]:
    """The distinct decisions made since the last `configure`, in order."""
    return list(dict.fromkeys(choice for _, choice in _decisions.values()))


@contextmanager
def watching(watcher: Callable[[Choice], None]) -> Iterator[None]:
    """Context in which `watcher` is called with the choice of every call of an operation, in the order of the calls."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def _forget_decisions() -> None:
    global _revision
    _decisions.clear()
    _revision += 1


def _decide(op: Operation, call: Call, override: str | None) -> tuple[Backend, Choice]:
    named = override or _settings.get(op.name)
    if named is not None:
        backend = _backend(op, named)
        ok, reason = _accepts(backend, call)
        if not ok:
            raise KernelUnavailable(
                f"{op.name}: backend {named!r} was asked for but cannot run this call: {reason}")
        return backend, Choice(op.name, named, f"asked for by {'the call' if override else 'configure'}")
    strict = call.device == "cuda" if _strict is None else _strict
    rejected: list[str] = []
    why = PREFERRED
    for backend in op.backends:
        ok, reason = _accepts(backend, call)
        if ok:
            return backend, Choice(op.name, backend.name, why, tuple(rejected))
        rejected.append(f"{backend.name}: {reason}")
        if not _made_for(backend, call):
            continue
        why = "first that accepts the call"
        if strict:
            raise KernelUnavailable(
                f"{op.name}: backend {backend.name!r}, the best for {call.device}, cannot run this call: "
                f"{reason}; mend that, or accept a slower one with kernels.strict=false or "
                f"kernels.{op.name}=torch")
    raise KernelUnavailable(f"{op.name}: no backend can run this call ({'; '.join(rejected)})")


def _made_for(backend: Backend, call: Call) -> bool:
    return not backend.devices or call.device in backend.devices


def _accepts(backend: Backend, call: Call) -> tuple[bool, str]:
    if not _made_for(backend, call):
        return False, f"made for {' and '.join(backend.devices)}, the tensors are on {call.device}"
    return backend.supports(call)


def _backend(op: Operation, name: object) -> Backend:
    for backend in op.backends:
        if backend.name == name:
            return backend
    names = [b.name for b in op.backends]
    raise KernelUnavailable(
        f"{op.name} has no backend {name!r}{_nearest(str(name), names)}; it has {', '.join(names)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
