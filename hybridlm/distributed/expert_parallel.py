"""Experts split over ranks: every rank holds a share of each layer's experts, and tokens travel to them and back.

`size` consecutive ranks, a group, hold each expert once; ranks that are `size` apart hold the same experts, and add up
their gradients. Nothing is dropped and nothing is padded: ranks tell each other how many rows come, then send these.

N tokens of this rank, A experts a token, P = N A (token, expert) pairs, M rows that this rank receives, D model width,
E experts, R ranks of a group, L = E / R experts a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.feed_forward.moe import Compute, Experts


@dataclass(frozen=True)
class ExpertParallel:
    """The groups that this rank belongs to."""

    group: dist.ProcessGroup  # holds each expert once
    replicas: dist.ProcessGroup  # hold the same experts

    @classmethod
    def make(cls, size: int) -> ExpertParallel:
        """Groups of `size` consecutive ranks. All ranks call it together; `size` divides the world."""
        world = dist.get_world_size()
        group, _ = dist.new_subgroups_by_enumeration([[*range(g, g + size)] for g in range(0, world, size)])
        replicas, _ = dist.new_subgroups_by_enumeration([[*range(r, world, size)] for r in range(size)])
        return cls(group, replicas)

    def split(self, model: nn.Module) -> None:
        """Leave of every layer's experts those of this rank: before weights are allocated, before any optimizer."""
        for experts in expert_modules(model).values():
            each, rank = experts.num_experts // dist.get_world_size(self.group), dist.get_rank(self.group)
            experts.hold(range(rank * each, (rank + 1) * each), partial(self.dispatch, experts.num_experts))

    def dispatch(self, num_experts: int, compute: Compute, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """[N, D]: `compute` for every pair on the rank that holds its expert.

        A pair is sent as its token's row and its weight, which multiplies there. An uneven exchange needs the numbers
        of rows on the host: the one wait for the device.
        """
        ranks = dist.get_world_size(self.group)
        order_P = ids_NA.flatten().argsort(stable=True)
        slot_NA = torch.empty_like(order_P).index_copy_(
            0, order_P, torch.arange(len(order_P), device=order_P.device)).view_as(ids_NA)
        token_P = order_P.div(ids_NA.shape[1], rounding_mode="floor")
        sent_RL = torch.zeros(num_experts, dtype=torch.int32, device=ids_NA.device).index_add_(
            0, ids_NA.flatten(), torch.ones_like(order_P, dtype=torch.int32)).view(ranks, -1)
        received_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(received_RL, sent_RL, group=self.group)
        sent, received = torch.stack([sent_RL.sum(1), received_RL.sum(1)]).tolist()

        x_MD, weight_M1 = _Exchange.apply(self.group, sent, received, _Spread.apply(x_ND, token_P, slot_NA),
                                          weights_NA.flatten().index_select(0, order_P)[:, None])
        expert_L = torch.arange(sent_RL.shape[1], device=ids_NA.device)
        ids_M1 = expert_L.repeat(ranks).repeat_interleave(received_RL.flatten(), output_size=sum(received))[:, None]
        y_PD, = _Exchange.apply(self.group, received, sent, compute(x_MD, ids_M1, weight_M1))
        return _GatherSum.apply(y_PD, token_P, slot_NA)

    def average_gradients(self, model: nn.Module) -> None:
        """Gradients of the experts, summed over the tokens of all ranks and divided by the number of ranks: what
        DistributedDataParallel does to the others.

        Within a group they are sums already: a row's gradient travels back to its expert.
        """
        gradients = [p.grad for p in expert_parameters(model).values() if p.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, dist.get_world_size())
        if dist.get_world_size(self.replicas) > 1:
            for work in [dist.all_reduce(grad, group=self.replicas, async_op=True) for grad in gradients]:
                work.wait()

    def total_norm(self, parameters: Iterable[Tensor], model: nn.Module) -> Tensor:
        """Norm of the gradients of `parameters` on all ranks, each expert counted once."""
        split = {id(p) for p in expert_parameters(model).values()}
        gradients: dict[bool, list[Tensor]] = {False: [], True: []}
        for parameter in parameters:
            if parameter.grad is not None:
                gradients[id(parameter) in split].append(parameter.grad)
        device = next(p.device for p in model.parameters())
        own, everywhere = (torch.nn.utils.get_total_norm(gradients[part]).to(device).square() for part in (True, False))
        dist.all_reduce(own, group=self.group)
        return (own + everywhere).sqrt()

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as one process has it: [E, ...] from each rank's [L, ...], on all ranks of the group together.

        `name` is a parameter's, or that of its optimizer state, `{key}/{parameter}`.
        """
        if not _is_split(name, tensor):
            return tensor
        local = tensor.detach().contiguous()
        parts = local.new_empty(dist.get_world_size(self.group) * len(local), *local.shape[1:])
        dist.all_gather(list(parts.chunk(dist.get_world_size(self.group))), local, group=self.group)
        return parts

    def part(self, name: str, whole: Tensor) -> Tensor:
        """What this rank holds of a tensor as one process has it: the reverse of `whole`."""
        return whole.chunk(dist.get_world_size(self.group))[dist.get_rank(self.group)] if _is_split(name, whole) \
            else whole


def _is_split(name: str, tensor: Tensor) -> bool:
    return ".experts." in name and tensor.dim() > 0


def expert_modules(model: nn.Module) -> dict[str, Experts]:
    """The routed experts of every layer, by the module's name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are split over ranks, by name."""
    return {f"{prefix}.{name}": p for prefix, module in expert_modules(model).items()
            for name, p in module.named_parameters()}


class _Exchange(torch.autograd.Function):
    """Rows of each tensor to the ranks of a group, `sent` and `received` of them to and from each; gradients go back.

    The tensors travel in turn, in the same order on every rank.
    """

    @staticmethod
    def forward(ctx, group: dist.ProcessGroup, sent: list[int], received: list[int], *rows: Tensor):
        ctx.back = group, received, sent
        return tuple(_exchanged(tensor, group, sent, received) for tensor in rows)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *(_exchanged(grad, *ctx.back) if need else None
                                   for grad, need in zip(grads, needed, strict=True))


def _exchanged(rows: Tensor, group: dist.ProcessGroup, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(received), list(sent), group=group)
    return out


class _Spread(torch.autograd.Function):
    """A row for each pair, [P, D]; gradients of a token's rows are added in a fixed order."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, token_P: Tensor, slot_NA: Tensor):
        ctx.save_for_backward(slot_NA)
        return x_ND.index_select(0, token_P)

    @staticmethod
    def backward(ctx, dx_PD: Tensor):
        return F.embedding_bag(ctx.saved_tensors[0], dx_PD, mode="sum"), None, None


class _GatherSum(torch.autograd.Function):
    """The sum of each token's rows, [N, D], in the order of its experts: the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx, y_PD: Tensor, token_P: Tensor, slot_NA: Tensor):
        ctx.save_for_backward(token_P)
        return F.embedding_bag(slot_NA, y_PD, mode="sum")

    @staticmethod
    def backward(ctx, dy_ND: Tensor):
        return dy_ND.index_select(0, ctx.saved_tensors[0]), None, None
