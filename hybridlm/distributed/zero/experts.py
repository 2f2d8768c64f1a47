"""Marks sharded experts for DeepSpeed's ZeRO: which parameters they are, and which ranks hold the same ones.

DeepSpeed shards, sums and clips the weights of experts rightly, but takes for experts only what its own layers made:
it looks at the class of a module, at attributes of parameters and at keys of optimizer groups. These are private names
of one version, to which DeepSpeed is therefore pinned; a test holds each of them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hybridlm.distributed.expert_parallel import ExpertParallel, expert_parameters

EXPERT_MARKER = "deepspeed_expert_marker"  # name of an empty submodule by which DeepSpeed knows a model with experts


def group_name(size: int) -> str:
    """Return DeepSpeed's name for groups of `size` ranks that hold each expert once."""
    return f"ep_size_{size}"


def make_groups(size: int) -> ExpertParallel:
    """Make the groups of `ExpertParallel.make`; DeepSpeed keeps them under their name."""
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(size)
    name = group_name(size)
    return ExpertParallel(groups._get_expert_parallel_group(name), groups._get_expert_data_parallel_group(name))


def mark(model: nn.Module, optimizer: Any, size: int, *, weights_sharded: bool) -> None:
    """Mark a model and its optimizer before DeepSpeed's engine is made.

    Args:
        model: with sharded experts.
        optimizer: each of its groups holds either experts alone or none.
        size: ranks that together hold each expert once.
        weights_sharded: ZeRO-3, which must know experts that are frozen too; ZeRO-1 and -2 refuse a model that is
            marked but has no group of experts.
    """
    mark_parameters(model, size)
    experts = {id(parameter) for parameter in expert_parameters(model).values()}
    trained = [group for group in optimizer.param_groups if id(group["params"][0]) in experts]
    for group in trained:
        group |= {"moe": True, "name": group_name(size)}
    if trained or weights_sharded:
        model.add_module(EXPERT_MARKER, _expert_marker())


def mark_parameters(module: nn.Module, size: int) -> None:
    """Mark the experts in `module` with the ranks that hold the same ones, before ZeRO-3 shards them."""
    from deepspeed.utils import groups

    for parameter in expert_parameters(module).values():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = group_name(size)  # type: ignore[attr-defined]
        parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
        parameter.ds_zero_partition_group_name = group_name(size)  # type: ignore[attr-defined]
        parameter.ds_zero_partition_process_group = (  # type: ignore[attr-defined]
            groups._get_expert_data_parallel_group(group_name(size)))


def unmark(model: nn.Module) -> None:
    """Remove the marker from a model whose DeepSpeed engine has ended."""
    if hasattr(model, EXPERT_MARKER):
        delattr(model, EXPERT_MARKER)


def _expert_marker() -> nn.Module:
    """Return an empty module of the class by which DeepSpeed finds that there are experts."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    class ExpertMarker(AutoEPMoELayer):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 0

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """The groups are there already."""

    return ExpertMarker()
