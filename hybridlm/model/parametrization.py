"""Parametrization: what changes in initial values, learning rates and outputs when a model gets wider or deeper.

Hyperparameters that were tuned on a small model, the base, are kept; factors carry them to a larger one.

  standard   no factor: nothing is carried
  mup        width (Yang et al., arXiv 2203.03466; spectral form, arXiv 2310.17813)
  completep  width as mup, and depth (Dey et al., arXiv 2505.01618, table 1, alpha = 1)

For a matrix whose inputs are r times as many as in the base (fan-in), with AdamW:

  initial std   r^-1/2                          hidden matrices, routers, expert stacks
  learning rate r^-1, weight decay r            the same
  logits        base width / width              also where head and embedding are tied
  completep     branches times base depth / depth, eps of hidden matrices times r^-1 and that factor; depth counts
                runs of layers, of which a layer that is repeated has several

Embedding, output head, norms, biases, convolutions and all that has one number per channel or head keep their values.
Each optimizer states its own factor of the learning rate (`OptimizerConfig.lr_factor`).

Which dims grow is not declared anywhere: the base model is made from the config, without memory, and the shapes of both
are compared. So the low-rank maps of gates and MLA, whose rank stays, get the factors of their shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hybridlm.errors import ConfigError, require
from hybridlm.model.parameter_roles import ParameterRole
from hybridlm.model.schedule import ScheduleConfig, expand_runs

Kind = Literal["standard", "mup", "completep"]
SCALED_ROLES = ("matrix", "head_matrix", "expert_stack", "router", "stream_mixing")


@dataclass(kw_only=True)
class ParametrizationConfig:
    """The rule by which a model's hyperparameters follow from those of a smaller base model.

    kind: `standard`, `mup` (width) or `completep` (width and depth).
    base_hidden_size: hidden size of the model whose hyperparameters are used; heads and feed-forward of the base are in
        proportion, dims per head are the same.
    base_num_layers: its number of layers, for `completep`; layers that run several times do so in the base too.
    """

    kind: Kind = "standard"
    base_hidden_size: int | None = None
    base_num_layers: int | None = None

    def __post_init__(self) -> None:
        for key in ("base_hidden_size", "base_num_layers"):
            value = getattr(self, key)
            require(value is None or value > 0, key, "must be positive", got=value)
        require(self.kind == "standard" or self.base_hidden_size is not None, "base_hidden_size",
                f"is missing: {self.kind} carries the hyperparameters of a base model",
                expected="the hidden size of the model that they were tuned on")
        require(self.kind != "completep" or self.base_num_layers is not None, "base_num_layers",
                "is missing: completep carries them over depth, too",
                expected="the number of layers of the model that they were tuned on")

    def width_ratio(self, hidden_size: int) -> float:
        """Hidden size relative to the base model; 1 under the standard parametrization.

        >>> ParametrizationConfig(kind="mup", base_hidden_size=32).width_ratio(128)
        4.0
        """
        if self.kind == "standard" or self.base_hidden_size is None:
            return 1.0
        return hidden_size / self.base_hidden_size

    def depth_ratio(self, schedule: ScheduleConfig, num_layers: int) -> float | None:
        """Number of runs of layers relative to the base model; None where the kind does not carry depth.

        Args:
            schedule: of the model, and of the base.
            num_layers: layers of the model.

        Raises:
            ConfigError: the base lacks layers that the schedule repeats.

        >>> rule = ParametrizationConfig(kind="completep", base_hidden_size=32, base_num_layers=4)
        >>> rule.depth_ratio(ScheduleConfig(pattern=["kda"]), 8)
        2.0
        """
        if self.kind != "completep" or self.base_num_layers is None:
            return None
        runs = len(expand_runs(schedule, num_layers))
        try:
            return runs / len(expand_runs(schedule, self.base_num_layers))
        except ConfigError:
            raise ConfigError("parametrization.base_num_layers", "is a base without all layers that the schedule runs "
                              "again", got=self.base_num_layers,
                              expected="a base with the layers of schedule.repeat and schedule.reuse") from None


@dataclass(frozen=True)
class ParameterScale:
    """Growth of one matrix, or of every matrix of a stack, from the base model to this one.

    Args:
        shape: (rows, columns) in this model: outputs and inputs.
        base_shape: those in the base model.
        depth: number of runs of layers relative to the base model; None where the parametrization does not carry depth.
    """

    shape: tuple[int, int]
    base_shape: tuple[int, int]
    depth: float | None = None

    @property
    def fan_in(self) -> float:
        """Inputs relative to the base model."""
        return self.shape[1] / self.base_shape[1]

    @property
    def fan_out(self) -> float:
        """Outputs relative to the base model."""
        return self.shape[0] / self.base_shape[0]

    @property
    def longer_side(self) -> float:
        """The larger of rows and columns relative to the base model."""
        return max(self.shape) / max(self.base_shape)

    @property
    def init_std(self) -> float:
        """Factor of the initial standard deviation.

        >>> ParameterScale((64, 128), (32, 32)).init_std
        0.5
        """
        return self.fan_in**-0.5

    @property
    def adam_eps(self) -> float:
        """Factor of AdamW's eps: gradients shrink with width and depth; 1 where depth is not carried.

        >>> ParameterScale((64, 64), (32, 32), depth=1.0).adam_eps, ParameterScale((64, 64), (32, 32)).adam_eps
        (0.5, 1.0)
        """
        return 1.0 if self.depth is None else 1.0 / (self.fan_in * self.depth)


def compare_shapes(model: nn.Module, base: nn.Module, roles: Mapping[str, ParameterRole],
                   depth: float | None = None) -> dict[str, ParameterScale]:
    """Compare the matrices of a model with those of its base model.

    Args:
        model: the model; nothing of it but shapes is read.
        base: the base model, with as many layers.
        roles: role of each parameter of the model.
        depth: number of runs of layers relative to the base; None where depth is not carried.

    Returns:
        The growth of each parameter that is scaled, by name. A linear map to one number is a matrix here, whatever an
        optimizer takes it for.
    """
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    base_shapes = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    scales = {}
    for name, parameter in model.named_parameters():
        single_output = roles[name].kind == "vector" and name in linear
        if roles[name].kind in SCALED_ROLES or single_output:
            shape, base_shape = tuple(parameter.shape[-2:]), base_shapes[name][-2:]
            scales[name] = ParameterScale((shape[0], shape[1]), (base_shape[0], base_shape[1]), depth)
    return scales
