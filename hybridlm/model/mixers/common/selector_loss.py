"""The loss that distils attention into a selector of blocks, and the share of attention that the selection reads.

    target_tj = pooled over the tokens of block j and the heads of a list of softmax_s(q_t . k_s), made to sum to 1
    loss = mean over queries and lists of KL(target_t || softmax_j(s_tj))

j runs over the blocks that compete: all complete ones that the query sees where attention is dense, else the selected.
The targets have no gradient, nor do the inputs of the selector: the loss reaches its parameters alone.

Sources: SeerAttention (Gao et al. 2024, section 3.2) and QSA (arXiv 2608.30320): maximum over a block; MSA (arXiv
2606.13392, section 2.3): mean over the heads of a group.
B rows, Q queries, S keys, H query heads, G key/value heads, R = H/G, K head dim, U lists, P blocks, L tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hybridlm.model.mixers.common.block_selection import BlockBudget, BlockIndex, ScoresBlocks, competing_blocks
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.module import Aux
from hybridlm.model.sequence import SequenceInfo
from hybridlm_kernels.recompute import recomputed

PIECE_ELEMENTS = 2**20  # scores of attention in a piece of queries
Pooling = Literal["max", "sum"]


class SelectorLoss(NamedTuple):
    """Sums over queries and lists, and the number of these; queries that are padding do not count.

    Args:
        total: sum of the KL over queries and lists with a block that competes.
        pairs: number of such pairs.
        read_BT: sum over heads of the share of dense attention that the selection reads, of every query.
    """

    total: Tensor
    pairs: Tensor
    read_BT: Tensor


class AttentionTargets(Protocol):
    """The attention that a selector learns from."""

    @property
    def q_BTHK(self) -> Tensor:
        """Its queries."""
        ...

    @property
    def keys(self) -> int:
        """Keys or entries whose scores one query and head has in memory at once."""
        ...

    def shares(self, index: BlockIndex, listed_BQUP: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Attention on each block [B, Q, U, P], and the sum over heads of the share that is read [B, Q].

        Args:
            index: of the selector.
            listed_BQUP: the blocks that are selected.
            rows: the queries.
        """
        ...


def selector_trains(mixer: nn.Module, selector: nn.Module, loss_weight: float) -> bool:
    """Whether a forward of a mixer now computes the loss of its selector for its gradient."""
    return (mixer.training and torch.is_grad_enabled() and loss_weight > 0
            and any(p.requires_grad for p in selector.parameters()))


@torch.no_grad()
def _shares(targets: AttentionTargets, index: BlockIndex, listed_BQUP: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    return targets.shares(index, listed_BQUP, rows)


def selector_loss(selector: ScoresBlocks, index: BlockIndex, targets: AttentionTargets, budget: BlockBudget,
                  chosen_BTUN: Tensor | None, seq: SequenceInfo, *, only_chosen: bool,
                  compares: bool = True) -> SelectorLoss:
    """Compute the loss of a selector, piece by piece of queries.

    Args:
        selector: scores the blocks.
        index: its queries and entries, with gradients to its parameters.
        targets: the attention that it learns from.
        budget: which blocks compete.
        chosen_BTUN: numbers of the blocks that are selected; None: all.
        seq: says which queries are padding.
        only_chosen: the loss is over the selected blocks, else over all that compete.
        compares: whether the KL is computed; else `total` is 0.
    """
    batch, queries, heads = targets.q_BTHK.shape[:3]
    size = max(8, PIECE_ELEMENTS // (batch * heads * targets.keys))
    total, count, read = [], [], []
    with torch.autocast(targets.q_BTHK.device.type, enabled=False):
        for start in range(0, queries, size):
            rows = slice(start, min(start + size, queries))
            compete_BQUP, listed_BQUP = _blocks(selector.lists, index, budget, chosen_BTUN, rows)
            target_BQUP, read_BQ = _shares(targets, index, listed_BQUP, rows)
            over_BQUP = compete_BQUP & listed_BQUP if only_chosen else compete_BQUP
            if seq.text_BT is not None:
                over_BQUP = over_BQUP & seq.text_BT[:, rows, None, None]
            total.append(_divergence(selector, index, rows, over_BQUP, target_BQUP) if compares
                         else target_BQUP.new_zeros(()))
            count.append(over_BQUP.any(-1).sum())
            read.append(read_BQ)
    return SelectorLoss(torch.stack(total).sum(), torch.stack(count).sum(), torch.cat(read, 1))


def observe_selector(name: str, selector: ScoresBlocks, index: BlockIndex, targets: AttentionTargets,
                     budget: BlockBudget, chosen_BTUN: Tensor | None, seq: SequenceInfo, *, only_chosen: bool,
                     learns: bool = True, compares: bool = True) -> Aux:
    """Compute what a layer reports of its selector: the mean loss, and the share of dense attention that is read.

    Args:
        name: of the selector in the results, `NAME_kl` and `NAME_recall`.
        selector: scores the blocks.
        index: its queries and entries, with gradients to its parameters.
        targets: the attention that it learns from.
        budget: which blocks compete.
        chosen_BTUN: numbers of the blocks that are selected; None: all.
        seq: positions and borders of the documents.
        only_chosen: the loss is over the selected blocks, else over all that compete.
        learns: whether the loss trains the selector; else it is only reported.
        compares: whether there is such a loss; else the share alone is reported.
    """
    found = selector_loss(selector, index, targets, budget, chosen_BTUN, seq, only_chosen=only_chosen,
                          compares=compares)
    read = seq.mean_over_text(found.read_BT.flatten() / targets.q_BTHK.shape[2])
    if not compares:
        return {f"layer/{name}_recall": read}
    loss = seq.weighted_mean(found.total / found.pairs.clamp(min=1), found.pairs)  # fewer see a block in early shards
    aux = {f"layer/{name}_kl": loss.detach(), f"layer/{name}_recall": read}
    return aux | {f"loss/{name}_kl": loss} if learns else aux


def _blocks(lists: int, index: BlockIndex, budget: BlockBudget, chosen_BTUN: Tensor | None,
            rows: slice) -> tuple[Tensor, Tensor]:
    """Masks [B, Q, U, P] of the blocks that compete, and of those that are selected."""
    blocks = index.blocks
    compete = competing_blocks(blocks, budget, rows)[:, :, None].expand(-1, -1, lists, -1)
    if chosen_BTUN is None:
        return compete, blocks.visible(rows)[:, :, None].expand_as(compete)
    place = chosen_BTUN[:, rows] + blocks.first_BT[:, rows, None, None]
    inside = (chosen_BTUN[:, rows] >= 0) & (chosen_BTUN[:, rows] < blocks.count_BT[:, rows, None, None])
    mask = torch.zeros(*compete.shape[:3], blocks.number + 1, dtype=torch.bool, device=compete.device)
    mask.scatter_(-1, place.masked_fill(~inside, blocks.number), True)
    return compete, mask[..., :-1]


@dataclass(frozen=True)
class KeyTargets:
    """Attention to all keys, pooled over the tokens of each block and over the heads of a list.

    Args:
        q_BTHK: queries of attention, in fp32 at least.
        k_BSGK: all keys that they may see, likewise.
        pooling: of attention over the tokens of a block.
        sinks_H: logits that take part in the softmax.
    """

    q_BTHK: Tensor
    k_BSGK: Tensor
    pooling: Pooling
    sinks_H: Tensor | None = None

    @property
    def keys(self) -> int:
        return self.k_BSGK.shape[1]

    def shares(self, index: BlockIndex, listed_BQUP: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Attention on each block [B, Q, U, P], and the sum over heads of the share that is read [B, Q]."""
        lists = listed_BQUP.shape[2]
        pooled_BQHP, mass_BQHP = self.by_block(index.blocks, rows)
        copies = mass_BQHP.shape[2] // lists
        complete_BQ1P = index.blocks.visible(rows)[:, :, None]
        unread_BQHP = mass_BQHP.masked_fill(listed_BQUP.repeat_interleave(copies, 2) | ~complete_BQ1P, 0.0)
        read_BQ = (1 - unread_BQHP.sum(-1)).sum(-1)
        return pooled_BQHP.unflatten(2, (lists, copies)).mean(3), read_BQ

    def by_block(self, blocks: EntryWindows, rows: slice) -> tuple[Tensor, Tensor]:
        """Attention of each head pooled over the tokens of each block, and its sum over them: two [B, Q, H, P]."""
        q_BQHK, k_BSGK = self.q_BTHK[:, rows], self.k_BSGK
        s_S = torch.arange(self.keys, device=k_BSGK.device)
        t_Q1 = s_S[self.keys - self.q_BTHK.shape[1] :][rows, None]
        seen_BQS = (s_S <= t_Q1) & (s_S >= blocks.begin_BT[:, rows, None])
        score_BQHS = _scores(q_BQHK, k_BSGK).masked_fill(~seen_BQS[:, :, None], -torch.inf)
        if self.sinks_H is not None:
            sinks_BQH1 = self.sinks_H[:, None].expand(*score_BQHS.shape[:3], 1)
            score_BQHS = torch.cat([score_BQHS, sinks_BQH1], -1)
        p_BQHS = torch.softmax(score_BQHS, -1)[..., : self.keys]
        p_BPLQH = blocks.gather(p_BQHS.permute(0, 3, 1, 2))
        mass_BQHP = p_BPLQH.sum(2).permute(0, 2, 3, 1)
        return p_BPLQH.amax(2).permute(0, 2, 3, 1) if self.pooling == "max" else mass_BQHP, mass_BQHP


@dataclass(frozen=True)
class EntryTargets:
    """Attention to entries beside other keys, in one softmax, summed over heads.

    Args:
        q_BTHK: queries of attention, in fp32 at least.
        k_BEGK: keys of the entries, likewise.
        near_lse_BTH: logarithm of the sum of exponentials of everything else in the softmax.
        only_chosen: the softmax is over the selected entries, else over all that a query sees.
    """

    q_BTHK: Tensor
    k_BEGK: Tensor
    near_lse_BTH: Tensor
    only_chosen: bool

    @property
    def keys(self) -> int:
        return self.k_BEGK.shape[1]

    def shares(self, index: BlockIndex, listed_BQUP: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Attention on each entry [B, Q, U, E], and the sum over heads of the share that is read [B, Q]."""
        q_BQHK, k_BEGK = self.q_BTHK[:, rows], self.k_BEGK
        lists, heads = listed_BQUP.shape[2], q_BQHK.shape[2]
        score_BQHE = _scores(q_BQHK, k_BEGK).masked_fill(~index.windows.visible(rows)[:, :, None], -torch.inf)
        near_BQH1 = self.near_lse_BTH[:, rows, :, None]
        listed_BQHE = listed_BQUP.repeat_interleave(heads // lists, 2)
        p_BQHE = torch.cat([near_BQH1, score_BQHE], -1).softmax(-1)[..., 1:]
        read_BQ = (1 - p_BQHE.masked_fill(listed_BQHE, 0.0).sum(-1)).sum(-1)
        if self.only_chosen:
            chosen_BQHE = score_BQHE.masked_fill(~listed_BQHE, -torch.inf)
            p_BQHE = torch.cat([near_BQH1, chosen_BQHE], -1).softmax(-1)[..., 1:]
        return p_BQHE.unflatten(2, (lists, -1)).sum(3), read_BQ


def _scores(q_BQHK: Tensor, k_BSGK: Tensor) -> Tensor:
    """Scores of attention to keys or entries, [B, Q, H, S]."""
    q_BQGRK = q_BQHK.unflatten(2, (k_BSGK.shape[2], -1)) * q_BQHK.shape[-1] ** -0.5
    return torch.einsum("bqgrk,bsgk->bqgrs", q_BQGRK, k_BSGK).flatten(2, 3)


def _divergence(selector: ScoresBlocks, index: BlockIndex, rows: slice, over_BQUP: Tensor,
                target_BQUP: Tensor) -> Tensor:
    """Sum of the KL; the scores are computed again in the backward, and not kept."""
    target = target_BQUP.masked_fill(~over_BQUP, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    none = ~over_BQUP.any(-1, keepdim=True)

    def divergence(queries_BT: Tensor, entries_BE: Tensor) -> Tensor:
        again = BlockIndex(queries_BT, entries_BE, index.windows, index.blocks)
        score = selector.scores(again, rows).masked_fill(~over_BQUP & ~none, -torch.inf)
        log_p = torch.log_softmax(score, -1).masked_fill(~over_BQUP, 0.0)
        return (torch.xlogy(target, target) - target * log_p).sum()

    if torch.compiler.is_dynamo_compiling():  # the graph decides itself what it keeps
        return divergence(index.queries_BT, index.entries_BE)
    return recomputed(divergence, index.queries_BT, index.entries_BE)
