"""Selection of blocks: the contract of what scores them (selectors), and the top-k around it.

A selector gives each complete block of a document a score per query and list; lists are for all heads, for each
key/value head, or for each query head. The block of the query itself needs no score: it is read.

B rows, T tokens, S keys, D hidden size, H query heads, G key/value heads, R = H/G, K head dim, U lists per query,
N units per list, P blocks per row, C tokens per block, Q queries of a piece.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from hybridlm.errors import require
from hybridlm.kind_registry import KindRegistry
from hybridlm.model.decode_state import EntryCache
from hybridlm.model.layer_context import LayerContext
from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.sizing import size_of
from hybridlm.model.rope import RopeConfig
from hybridlm.model.sequence import SequenceInfo
from hybridlm.plain_data import to_dict
from hybridlm_kernels.ops.sparse_attention.torch_backend import select_best
from hybridlm_kernels.precision import wide

PIECE_ELEMENTS = 2**22  # scores of a piece of queries


@dataclass(frozen=True)
class BlockHeads:
    """Sizes of the attention that a selector serves.

    Args:
        num_heads: query heads H.
        num_kv_heads: key/value heads G.
        head_dim: dims per head K.
        block: tokens per block C.
        rope: rotary embedding of the attention.
        topk: blocks that a query reads.
        local: newest blocks that are always read.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block: int
    rope: RopeConfig
    topk: int = 1
    local: int = 1


@dataclass(kw_only=True)
class SelectorConfig(abc.ABC):
    """Base of every selector's config. A subclass gets its `kind` from `register_selector`."""

    kind: str
    learns: ClassVar[bool] = False  # has parameters, which a loss of its own trains
    weighs: ClassVar[bool] = False  # adds a bias to the scores of what it selects, and learns from the model's loss

    @property
    def kl_weight(self) -> float:
        """Weight of the loss that trains the selector; 0 for one that has none."""
        return getattr(self, "loss_weight", 0.0)

    def check(self, heads: BlockHeads) -> None:  # noqa: B027
        """Raise ConfigError where the options do not fit the attention."""

    @abc.abstractmethod
    def lists(self, heads: BlockHeads) -> int:
        """Lists per query U: 1, G or H."""

    def num_params(self, context: LayerContext, heads: BlockHeads) -> int:
        """Number of parameters."""
        return 0

    @abc.abstractmethod
    def flops_per_token(self, context: LayerContext, heads: BlockHeads, context_length: int) -> dict[str, float]:
        """Forward FLOPs per token: `projections` with weights, and `scores`.

        Those of a selector that weighs blocks have a backward, but for the part `choice`; others have none.
        """

    @abc.abstractmethod
    def state_numbers(self, heads: BlockHeads, context_length: int) -> int:
        """Numbers in the decode state after `context_length` tokens."""

    def feature_numbers(self, heads: BlockHeads) -> tuple[int, bool]:
        """Numbers per token that entries are made of, and whether these have a gradient; by default keys, without."""
        return heads.num_kv_heads * heads.head_dim, False

    def canonical(self) -> dict[str, Any]:
        """The options that the selection depends on, as plain data."""
        data = to_dict(self)
        data.pop("loss_weight", None)  # says only how the selector is trained
        return data


@dataclass(frozen=True)
class SelectorInputs:
    """Tensors that a selector may read, all of the same tokens.

    Args:
        x_BTD: input of the mixer.
        q_BTHK: rotated queries.
        k_BTGK: rotated keys.
        raw_q_BTHK: queries before the rotation.
        raw_k_BTGK: keys before the rotation.
        projected_q_BTHK: queries before their norm.
    """

    x_BTD: Tensor
    q_BTHK: Tensor
    k_BTGK: Tensor
    raw_q_BTHK: Tensor
    raw_k_BTGK: Tensor
    projected_q_BTHK: Tensor

    def detached(self) -> SelectorInputs:
        """The same tensors without gradients."""
        return SelectorInputs(*(getattr(self, field.name).detach() for field in fields(self)))


@dataclass(frozen=True)
class BlockIndex:
    """Everything by which queries score blocks.

    Args:
        queries_BT: a tensor [B, T, ...] of the selector's own.
        entries_BE: its entries [B, E, ...], one per window.
        windows: the windows that entries stand for.
        blocks: the blocks that are selected; the same object where each has one entry.
    """

    queries_BT: Tensor
    entries_BE: Tensor
    windows: EntryWindows
    blocks: EntryWindows


class ScoresBlocks(Protocol):
    """The part of a selector that `choose_blocks` asks: the number of lists per query, and their scores.

    `scores_per_entry`: scores of one query and entry that `scores` has in memory at once.
    """

    lists: int
    scores_per_entry: int

    def scores(self, index: BlockIndex, rows: slice) -> Tensor: ...


class Selector(nn.Module, abc.ABC):
    """Scores blocks. A selector has features per token, combines those of a window to an entry, and scores entries.

    `window` and `stride`: tokens of a window, and from one to the next; by default one window per block.
    `scores_per_entry`: scores of one query and entry that are in memory at once; by default one per list.
    """

    fp32_parameters: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: SelectorConfig, context: LayerContext, heads: BlockHeads):
        super().__init__()
        self.heads = heads
        self.window = self.stride = heads.block
        self.lists = self.scores_per_entry = config.lists(heads)

    def init_weights(self, std: float) -> None:
        """Draw the first weights; by default there are none."""

    @abc.abstractmethod
    def features(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        """Features of each token [B, T, ...] that entries are made of."""

    @abc.abstractmethod
    def combine(self, features_BEL: Tensor, place_BE: Tensor) -> Tensor:
        """Entries [B, E, ...] of windows [B, E, L, ...] whose first tokens have the positions `place_BE`."""

    @abc.abstractmethod
    def queries(self, inputs: SelectorInputs, seq: SequenceInfo) -> Tensor:
        """The tensor [B, T, ...] by which a query scores entries."""

    @abc.abstractmethod
    def scores(self, index: BlockIndex, rows: slice) -> Tensor:
        """Scores [B, Q, U, P] of all blocks for the queries `rows`, in fp32 at least; only visible ones count.

        A block whose score is -inf is not chosen, even where the budget has room.
        """

    def see_keys(self, index: BlockIndex, q_BTHK: Tensor, k_BSGK: Tensor, seq: SequenceInfo) -> BlockIndex:
        """The index with what follows from the keys that attention reads; asked where the selector weighs blocks.

        Args:
            index: from `forward`.
            q_BTHK: queries of attention.
            k_BSGK: its keys of all tokens that they may see.
            seq: positions and borders of the documents.
        """
        return index

    def bias(self, index: BlockIndex, chosen_BTUN: Tensor, q_BTHK: Tensor, k_BSGK: Tensor) -> Tensor:
        """Terms [B, T, H, N] that attention adds to the scores of each listed block, with gradients.

        Args:
            index: from `see_keys`.
            chosen_BTUN: the blocks that are selected.
            q_BTHK: queries of attention.
            k_BSGK: its keys of all tokens that they may see.
        """
        raise TypeError(f"{type(self).__name__} does not weigh blocks")

    def new_cache(self, max_length: int) -> EntryCache:
        """The decode state of the entries, empty."""
        return EntryCache(max_length, self.window, self.stride)

    def forward(self, inputs: SelectorInputs, seq: SequenceInfo, cache: EntryCache | None = None) -> BlockIndex:
        """Queries and entries of these tokens, with the entries of the cache before them."""
        features_BT = self.features(inputs, seq)
        queries_BT = self.queries(inputs, seq)
        if cache is not None:
            entries = cache.append(features_BT, self.combine)
            keys = cache.length
            windows = EntryWindows.of(seq, queries_BT, keys, self.window, self.stride)
            entries = windows.pad(entries)
        else:
            features_BS = seq.history(features_BT)
            keys = features_BS.shape[1]
            windows = EntryWindows.of(seq, queries_BT, keys, self.window, self.stride)
            entries = self.combine(windows.gather(features_BS), windows.place_BE)
        block = self.heads.block
        whole = windows if self.window == self.stride == block else EntryWindows.of(seq, queries_BT, keys, block, block)
        return BlockIndex(queries_BT, entries, windows, whole)


SELECTORS = KindRegistry("selector", SelectorConfig, default="mean")


def register_selector(kind: str, config: type[SelectorConfig]):
    """Class decorator that registers a selector: `kind` in a config's `selector` section builds it."""

    def add(cls: type[Selector]) -> type[Selector]:
        SELECTORS.register(kind, config, cls)
        return cls

    return add


@dataclass(frozen=True)
class BlockBudget:
    """The number of blocks that a query reads, and those that it always reads.

    Args:
        topk: blocks per list, those that are always read and the query's own included.
        first: first blocks of the document that are always read.
        local: newest blocks that are always read, the query's own included; with 0 its own block is read besides the
            `topk` as long as it is not complete, and competes afterwards.
        window: blocks that lie in a window of so many tokens do not compete; None: there is no window.
    """

    topk: int
    first: int
    local: int
    window: int | None = None

    @property
    def scored(self) -> int:
        """Blocks of a list that are chosen among complete ones."""
        return self.topk - (self.local > 0)


def check_budget(block: int, budget: BlockBudget) -> None:
    """Raise ConfigError unless blocks have tokens and the budget holds those that are always read."""
    for key, value in (("block", block), ("topk", budget.topk)):
        require(value > 0, key, "must be positive", got=value)
    for key, value in (("first", budget.first), ("local", budget.local)):
        require(value >= 0, key, "must not be negative", got=value)
    always = budget.first + budget.local
    require(always <= budget.topk, "topk", "must hold the blocks that are always read", got=budget.topk,
            expected=f"at least {always}")


def fill_block_sizes(options: Mapping[str, Any], max_position: int) -> dict[str, Any]:
    """`options` with the block and the budget that they leave open, from the longest context.

    Blocks are a 64th of it, of at most 64 tokens, and an eighth of it is read, at most 4096 tokens.

    >>> fill_block_sizes({"local": 2}, max_position=1024)
    {'local': 2, 'block': 16, 'topk': 8}
    """
    filled = dict(options)
    block = max(4, min(64, max_position // 64))
    filled.setdefault("block", block)
    always = size_of(filled, "first", 0, least=0) + size_of(filled, "local", 1, least=0)
    filled.setdefault("topk", max(always + 1, min(4096, max_position // 8) // size_of(filled, "block", block)))
    return filled


def query_pieces(index: BlockIndex, scores_per_entry: int) -> Iterator[slice]:
    """Yields pieces of queries whose scores stay within PIECE_ELEMENTS, or of 8 queries where more would not."""
    batch, queries = index.queries_BT.shape[:2]
    size = max(8, PIECE_ELEMENTS // max(1, batch * scores_per_entry * index.windows.number))
    for start in range(0, queries, size):
        yield slice(start, min(start + size, queries))


def competing_blocks(blocks: EntryWindows, budget: BlockBudget, rows: slice) -> Tensor:
    """Mask [B, Q, P] of the blocks that the scores decide about for the queries `rows`."""
    seen_BQP = blocks.visible(rows)
    number_BQP = torch.arange(blocks.number, device=seen_BQP.device) - blocks.first_BT[:, rows, None]
    position_BQ1 = blocks.position_BT[:, rows, None]
    if budget.local > 0:
        seen_BQP = seen_BQP & (number_BQP < position_BQ1 // blocks.length)
    if budget.window is not None:
        seen_BQP = seen_BQP & (number_BQP * blocks.length <= position_BQ1 - budget.window)
    return seen_BQP


@torch.no_grad()
def choose_blocks(selector: ScoresBlocks, index: BlockIndex, budget: BlockBudget) -> Tensor:
    """Choose the blocks of best score for each query; equal scores go to the earlier block.

    Args:
        selector: scores the blocks.
        index: its queries and entries.
        budget: how many blocks, and which always.

    Returns:
        Numbers of blocks in the query's document, int64 [B, T, U, N]: ascending, -1 for none, the query's own last.
    """
    blocks, found = index.blocks, []
    with torch.autocast(index.queries_BT.device.type, enabled=False):
        for rows in query_pieces(index, selector.scores_per_entry):
            seen_BQP = competing_blocks(blocks, budget, rows)
            first_BQ1 = blocks.first_BT[:, rows, None]
            position_BQ1 = blocks.position_BT[:, rows, None]
            own_BQ1 = position_BQ1 // blocks.length
            if budget.scored:
                score_BUQP = selector.scores(index, rows).transpose(1, 2)
                number_BQP = torch.arange(blocks.number, device=seen_BQP.device) - first_BQ1
                forced_BQP = (number_BQP < budget.first) | (number_BQP > own_BQ1 - budget.local)
                score_BUQP = score_BUQP.masked_fill((forced_BQP & seen_BQP)[:, None], torch.inf)
                lists, size = score_BUQP.shape[1:3]
                seen_BUQP = seen_BQP[:, None] & (score_BUQP > -torch.inf)
                best = select_best(score_BUQP.flatten(0, 1), seen_BUQP.flatten(0, 1), budget.scored, False)
                best_BUQN = best.view(-1, lists, size, budget.scored)
                chosen = torch.where(best_BUQN < 0, -1, best_BUQN - first_BQ1[:, None]).transpose(1, 2)
            else:
                chosen = own_BQ1.new_zeros(*own_BQ1.shape[:2], selector.lists, 0)
            if not budget.local:
                complete = blocks.count_BT[:, rows, None] * blocks.length > position_BQ1
                own_BQ1 = own_BQ1.masked_fill(complete, -1)
            own = own_BQ1[:, :, None].expand(-1, -1, selector.lists, 1)
            found.append(torch.cat([chosen, own], -1))
    return torch.cat(found, 1)


def group_queries(q_BTHK: Tensor, groups: int) -> Tensor:
    """Queries by key/value head in fp32 at least, [B, T, G, R, K]."""
    return wide(q_BTHK).unflatten(2, (groups, -1))
