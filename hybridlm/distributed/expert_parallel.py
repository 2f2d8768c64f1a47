"""Expert parallel: every rank holds some experts of each layer, and tokens travel to them and back.

`size` consecutive ranks form a group that holds each expert once; ranks that are `size` apart hold the same experts and
add up their gradients. No token is dropped and nothing is padded: ranks tell each other how many rows come, then send
them. A token's row goes once to each rank that holds one of its experts or more (a visit); the results of those experts
are added up there.

N tokens of this rank, A experts per token, E experts, R ranks of a group, L = E / R experts per rank, D model width.
P = N A (token, expert) pairs and Q visits leave this rank, W pairs and M visits come to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlm.model.feed_forward.contract import Compute, ExpertStack
from hybridlm.tensor_storage import StoredTensor


@dataclass(frozen=True)
class ExpertParallel:
    """The groups of ranks that this rank belongs to."""

    group: dist.ProcessGroup  # together its ranks hold each expert once
    expert_data_parallel: dist.ProcessGroup  # its ranks hold the same experts

    @classmethod
    def make(cls, size: int) -> ExpertParallel:
        """Make groups of `size` consecutive ranks, and return this rank's. All ranks call it together; `size` divides
        their number."""
        world = dist.get_world_size()
        group, _ = dist.new_subgroups_by_enumeration([[*range(g, g + size)] for g in range(0, world, size)])
        expert_data_parallel, _ = dist.new_subgroups_by_enumeration([[*range(r, world, size)] for r in range(size)])
        return cls(group, expert_data_parallel)

    def shard_experts(self, model: nn.Module) -> None:
        """Drop the experts of other ranks from every layer, before weights are allocated and optimizers are made."""
        for experts in expert_modules(model).values():
            each, rank = experts.num_experts // dist.get_world_size(self.group), dist.get_rank(self.group)
            experts.keep_only(range(rank * each, (rank + 1) * each), partial(self.dispatch, experts.num_experts))

    def dispatch(self, num_experts: int, compute: Compute, x_ND: Tensor, ids_NA: Tensor, weights_NA: Tensor) -> Tensor:
        """Call `compute` for every (token, expert) pair on the rank that holds the expert.

        An uneven exchange needs the numbers of rows on the host: the only wait for the device.

        Args:
            num_experts: E, of all ranks.
            compute: the experts of this rank, the method of its `ExpertStack`.
            x_ND: tokens of this rank.
            ids_NA: experts of each token.
            weights_NA: their weights.

        Returns:
            [N, D]: the weighted sum of each token's experts.
        """
        ranks, tokens = dist.get_world_size(self.group), len(x_ND)
        held = num_experts // ranks
        ids_NA, by_expert_NA = ids_NA.sort(dim=1)
        rank_NA = ids_NA.div(held, rounding_mode="floor")
        opens_NA = torch.ones_like(rank_NA, dtype=torch.bool)  # the first pair of a visit
        opens_NA[:, 1:] = rank_NA[:, 1:] != rank_NA[:, :-1]
        order_P = rank_NA.flatten().argsort(stable=True)  # by rank, token, expert
        opens_P = opens_NA.flatten().index_select(0, order_P)

        counts_R2 = torch.zeros(ranks, 2, dtype=torch.int32, device=x_ND.device).index_add_(
            0, rank_NA.flatten(), torch.stack([opens_NA, torch.ones_like(opens_NA)], -1).view(-1, 2).int())
        coming_R2 = torch.empty_like(counts_R2)
        dist.all_to_all_single(coming_R2, counts_R2, group=self.group)
        (visits, pairs), (visits_in, pairs_in) = torch.stack([counts_R2, coming_R2]).mT.tolist()

        leaving = RowCopies.of_visits(order_P.div(ids_NA.shape[1], rounding_mode="floor"), opens_P, sum(visits), tokens)
        x_MD, = _Exchange.apply(self.group, visits, visits_in, _Spread.apply(x_ND, leaving))
        weight_P1 = weights_NA.gather(1, by_expert_NA).flatten().index_select(0, order_P)[:, None]
        weight_W1, = _Exchange.apply(self.group, pairs, pairs_in, weight_P1)
        # One number says which expert a pair goes to, and whether it is the first of a visit.
        code_P = ids_NA.flatten().index_select(0, order_P).remainder(held).add(opens_P * held).int()
        code_W = _exchanged(code_P, self.group, pairs, pairs_in)
        visit_W = (code_W >= held).cumsum(0) - 1

        arrived = RowCopies(visit_W, torch.arange(len(visit_W), device=x_ND.device), _starts(visit_W, sum(visits_in)))
        y_WD = compute(_Spread.apply(x_MD, arrived), code_W.remainder(held)[:, None].long(), weight_W1)
        y_QD, = _Exchange.apply(self.group, visits_in, visits, _Sum.apply(y_WD, arrived))
        return _Sum.apply(y_QD, leaving)

    def average_gradients(self, model: nn.Module) -> None:
        """Sum the gradients of the experts over the tokens of all ranks and divide them by the number of ranks, as
        DistributedDataParallel does with the other parameters.

        Within a group gradients are sums already: a row's gradient travels back to its expert.
        """
        gradients = [p.grad for p in expert_parameters(model).values() if p.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, dist.get_world_size())
        if dist.get_world_size(self.expert_data_parallel) > 1:
            for work in [dist.all_reduce(grad, group=self.expert_data_parallel, async_op=True) for grad in gradients]:
                work.wait()

    def total_norm(self, parameters: Iterable[Tensor], model: nn.Module) -> Tensor:
        """Return the norm of the gradients of `parameters` on all ranks, each expert counted once: []."""
        sharded = {id(p) for p in expert_parameters(model).values()}
        gradients: dict[bool, list[Tensor]] = {False: [], True: []}
        for parameter in parameters:
            if parameter.grad is not None:
                gradients[id(parameter) in sharded].append(parameter.grad)
        device = next(p.device for p in model.parameters())
        square_norm = {is_sharded: torch.nn.utils.get_total_norm(grads).to(device).square()
                       for is_sharded, grads in gradients.items()}
        dist.all_reduce(square_norm[True], group=self.group)
        return (square_norm[True] + square_norm[False]).sqrt()

    def gather_experts(self, name: str, tensor: Tensor) -> Tensor:
        """Return [E, ...] from each rank's [L, ...], on all ranks of the group, which call it together; a tensor that
        does not belong to experts as it is.

        `name` is that of a parameter, or of its optimizer state, `{key}/{parameter}`.
        """
        if not _is_sharded(name, tensor):
            return tensor
        local = tensor.detach().contiguous()
        ranks = dist.get_world_size(self.group)
        complete = local.new_empty(ranks * len(local), *local.shape[1:])
        dist.all_gather(list(complete.chunk(ranks)), local, group=self.group)
        return complete

    def local_shard(self, name: str, complete: StoredTensor) -> StoredTensor:
        """Return this rank's [L, ...] of a stored [E, ...], the reverse of `gather_experts`."""
        if not _is_sharded(name, complete):
            return complete
        return complete.chunk(dist.get_world_size(self.group))[dist.get_rank(self.group)]


def _is_sharded(name: str, tensor: Tensor | StoredTensor) -> bool:
    return ".experts." in name and tensor.dim() > 0


def expert_modules(model: nn.Module) -> dict[str, ExpertStack]:
    """Return the routed experts of every layer, by the module's name.

    `model` may also be a part of a model, even the experts themselves: ZeRO-3 shards one module after the other.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the routed experts, which are sharded over ranks, by name."""
    return {f"{prefix}.{name}": p for prefix, module in expert_modules(model).items()
            for name, p in module.named_parameters()}


class _Exchange(torch.autograd.Function):
    """Sends rows of each tensor to the ranks of a group, `sent` and `received` of them to and from each; gradients go
    back.

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


@dataclass(frozen=True)
class RowCopies:
    """C copies of S rows: copy c is of row `row_C[c]`. The copies of row s are `by_row_C[starts_S[s]]` and those that
    follow, up to the next row's first."""

    row_C: Tensor
    by_row_C: Tensor
    starts_S: Tensor

    @classmethod
    def of_visits(cls, token_P: Tensor, opens_P: Tensor, visits: int, tokens: int) -> RowCopies:
        """Make a copy of a token's row for each of its visits."""
        visit_P = opens_P.cumsum(0) - 1
        token_Q = token_P.new_empty(visits).scatter_(0, visit_P, token_P)
        return cls(token_Q, token_Q.argsort(stable=True), _starts(token_Q, tokens))


def _starts(row_C: Tensor, rows: int) -> Tensor:
    """Count, for each of `rows` rows, the copies of earlier rows."""
    count_S = row_C.new_zeros(rows).index_add_(0, row_C, torch.ones_like(row_C))
    return count_S.cumsum(0) - count_S


class _Spread(torch.autograd.Function):
    """Copies rows, [S, D] -> [C, D]; the copies' gradients are added in a fixed order."""

    @staticmethod
    def forward(ctx, x_SD: Tensor, copies: RowCopies):
        ctx.copies = copies
        return x_SD.index_select(0, copies.row_C)

    @staticmethod
    def backward(ctx, dx_CD: Tensor):
        return _summed(dx_CD, ctx.copies), None


class _Sum(torch.autograd.Function):
    """Sums the copies of each row, [C, D] -> [S, D]: the transpose of `_Spread`."""

    @staticmethod
    def forward(ctx, y_CD: Tensor, copies: RowCopies):
        ctx.copies = copies
        return _summed(y_CD, copies)

    @staticmethod
    def backward(ctx, dy_SD: Tensor):
        return dy_SD.index_select(0, ctx.copies.row_C), None


def _summed(rows_CD: Tensor, copies: RowCopies) -> Tensor:
    return F.embedding_bag(copies.by_row_C, rows_CD, copies.starts_S, mode="sum")
