"""Initial weights as a function of (seed, name): a parameter gets the same values in any model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from hybridlm.errors import UserError
from hybridlm.model.feed_forward.contract import FeedForward
from hybridlm.model.mixers.contract import SequenceMixer
from hybridlm.model.norm import RMSNorm
from hybridlm.model.parametrization import ParameterScale
from hybridlm.model.residual import Residual, ResidualBranch
from hybridlm.model.run_adapters import PerRunLinear


class InitialisationError(UserError):
    """Raised when a module leaves one of its parameters or buffers uninitialised."""


def init_weights(model: nn.Module, std: float, seed: int, device: torch.device | str | None = None,
                 after_each: Callable[[nn.Module], None] | None = None) -> None:
    """Initialise every parameter and buffer of `model`, also after `to_empty`.

    Each mixer, feed-forward, residual, embedding, norm and plain projection draws from its own stream of random
    numbers, seeded by (seed, its name): layer 5's feed-forward starts with the same values whatever mixers the schedule
    puts around it, so two schedules of a sweep differ in what is compared and in nothing else. The caller's random
    state is left as it was. The values belong to the kind of device: a CPU and a GPU draw different ones.

    Args:
        std: standard deviation of plain projections and of the embedding.
        device: for a model on "meta", the device on which these modules are allocated, one after the other.
        after_each: called with each of these modules as soon as it has its values; it may leave less of the module in
            memory before the next one is allocated.

    Raises:
        InitialisationError: a parameter or buffer that nothing initialises, non-persistent buffers included.
    """
    modules = list(_initialised_modules(model, ""))
    _check_coverage(model, modules)
    scales = parameter_scales(model)
    found = {p.device for p in model.parameters()} if device is None else {torch.device(device)}
    with torch.random.fork_rng(devices=sorted(d.index or 0 for d in found if d.type == "cuda")), torch.no_grad():
        for name, module in modules:
            if device is not None:
                module.to_empty(device=device)
            _initialise(name, module, std, seed_of(seed, name), scales)
            if after_each is not None:
                after_each(module)


def init_missing_weights(model: nn.Module, std: float, seed: int, is_known: Callable[[Tensor], bool]) -> None:
    """Initialise what a file lacked; the values are those that `init_weights` gives.

    Args:
        model: the model, on real devices. Modules on "meta" are passed over.
        std: as for `init_weights`.
        seed: as for `init_weights`.
        is_known: whether a parameter or buffer has its value already; it then keeps it.
    """
    scales = parameter_scales(model)
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for name, module in _initialised_modules(model, ""):
            tensors = [tensor for _, tensor in _tensors(module)]
            if isinstance(module, FeedForward):
                sums = module.step_sums()  # in no file, and drawing all experts for them would take minutes
                for total in sums:
                    if not total.is_meta and not is_known(total):
                        total.zero_()
                tensors = [tensor for tensor in tensors if all(tensor is not total for total in sums)]
            if all(is_known(tensor) for tensor in tensors) or any(tensor.is_meta for tensor in tensors):
                continue
            known = [(tensor, tensor.clone()) for tensor in tensors if is_known(tensor)]
            _initialise(name, module, std, seed_of(seed, name), scales)
            for tensor, value in known:
                tensor.copy_(value)


def _initialised_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are initialised each by itself, by name."""
    alone = RMSNorm | SequenceMixer | FeedForward | Residual | ResidualBranch | nn.Linear | nn.Embedding
    if isinstance(module, alone):
        if next(_tensors(module), None) is not None:
            yield name, module
        return
    for child_name, child in module.named_children():
        yield from _initialised_modules(child, f"{name}.{child_name}" if name else child_name)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def _check_coverage(model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
    covered = {id(tensor) for _, module in modules for _, tensor in _tensors(module)}
    for name, tensor in _tensors(model):
        if id(tensor) not in covered:
            owner = model.get_submodule(name.rpartition(".")[0])
            raise InitialisationError(
                f"nothing initialises '{name}' of {type(owner).__name__}: give it to a mixer, a feed-forward or a "
                "residual, whose init_weights sets it")


def parameter_scales(model: nn.Module) -> dict[str, ParameterScale]:
    """Growth of a model's matrices from its base model, by parameter name; none where nothing is carried from one."""
    answer = getattr(model, "parameter_scales", None)
    return answer() if callable(answer) else {}


def _initialise(name: str, module: nn.Module, std: float, seed: int, scales: Mapping[str, ParameterScale]) -> None:
    """Give the module its values, and make sure that each of its tensors was written.

    A write in place raises a tensor's version, so those whose version stayed are suspects. Writes through `.data` raise
    none: the suspects get a value that no initialisation would choose and the module is initialised once more, from the
    same seed.
    """
    before = {key: (id(tensor), _writes(tensor)) for key, tensor in _tensors(module)}
    _draw_scaled(name, module, std, seed, scales)
    suspects = {key: tensor for key, tensor in _tensors(module) if before.get(key) == (id(tensor), _writes(tensor))}
    if not suspects:
        return
    for tensor in suspects.values():
        tensor.fill_(_unlikely_value(tensor))
    _draw_scaled(name, module, std, seed, scales)
    now = dict(_tensors(module))
    for key, tensor in suspects.items():
        unwritten = tensor.isnan() if tensor.is_floating_point() else tensor == _unlikely_value(tensor)
        if now[key] is tensor and bool(unwritten.all()):
            raise InitialisationError(f"{type(module).__name__}.init_weights leaves '{name}.{key}' without a value: "
                                      "set every parameter and buffer there, non-persistent buffers included")


def _writes(tensor: Tensor) -> int:
    """Number of writes in place so far; tensors made under `torch.inference_mode` do not count them."""
    return -1 if tensor.is_inference() else tensor._version


def _unlikely_value(tensor: Tensor) -> float | int:
    if tensor.is_floating_point():
        return float("nan")
    return 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max


def _draw_scaled(name: str, module: nn.Module, std: float, seed: int, scales: Mapping[str, ParameterScale]) -> None:
    """Draw the values of a module, and multiply those that follow `std` by the factor of the parametrization.

    A kind may give a matrix initial values of its own; they stay. Those that follow `std` are the ones that double
    exactly when `std` does.
    """
    found = {key: scales.get(f"{name}.{key}") for key, _ in module.named_parameters()}
    factors = {key: scale.init_std for key, scale in found.items() if scale is not None and scale.init_std != 1.0}
    doubled: dict[str, Tensor] = {}
    if factors:
        _draw(module, 2 * std, seed)
        doubled = {key: value.clone() for key, value in module.named_parameters() if key in factors}
    _draw(module, std, seed)
    for key, value in module.named_parameters():
        if key in factors and torch.equal(value, doubled[key].mul_(0.5)):
            value.mul_(factors[key])


def _draw(module: nn.Module, std: float, seed: int) -> None:
    """Draw the values of a module; what each of its runs has for itself follows the rules of the first run's."""
    per_run = [part for part in module.modules() if isinstance(part, PerRunLinear)]
    drawn: list[list[dict[str, Tensor]]] = []  # kept until the end: `init_weights` draws all linear maps that it finds
    for run in range(1, 1 + max((part.later_runs for part in per_run), default=0)):
        _draw_first_run(module, std, seed + run)
        drawn.append([part.drawn_weights() for part in per_run])
    _draw_first_run(module, std, seed)
    for place, part in enumerate(per_run):
        part.init_runs(std, [of_run[place] for of_run in drawn])


def _draw_first_run(module: nn.Module, std: float, seed: int) -> None:
    torch.manual_seed(seed)
    if isinstance(module, RMSNorm):
        module.reset_parameters()
    elif isinstance(module, SequenceMixer | FeedForward | Residual | ResidualBranch):
        module.init_weights(std)
    else:
        module.weight.normal_(std=std)  # type: ignore[operator]


def seed_of(seed: int, name: str) -> int:
    """Compute the 63-bit seed of the random stream of the module called `name`.

    Mixers and feed-forwards were once wrapped, and called `layers.3.mixer.f`. The streams keep these names: with others
    the first weights of all models would change, and with them every run that is to be repeated.
    """
    name = re.sub(r"^(layers\.\d+|mtp\.\d+\.block)\.(mixer|feed_forward)$", r"\1.\2.f", name)
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
