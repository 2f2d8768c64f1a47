"""Our decode state behind the interface of a transformers cache.

A recurrent state has no place to leave out padding, so rows that start at different tokens cannot share one decode
state. The cache therefore holds one state per group of rows that have had padding at the same places; a batch without
padding is one group.

Letters: B rows, T tokens of one forward, V vocabulary, D model width.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hybridlm.interop.hf_documents import read_mask
from hybridlm.model.model import HybridLM
from hybridlm.model.output import ModelState

# What this version of transformers calls the cache in outputs and arguments; 5.24 renamed it.
CACHE_NAME = "cache" if "cache" in {f.name for f in dataclasses.fields(CausalLMOutputWithPast)} else "past_key_values"
NO_LIMIT = 2**40  # tokens; decode states grow with what they hold


@dataclasses.dataclass
class RowGroup:
    """Rows whose padding has stood at the same places, and their decode state."""

    rows: list[int]
    state: ModelState


class HybridCache(DynamicCache):
    """The decode states of a batch. It is empty when it is made, and `forward` fills it."""

    is_compileable = False  # type: ignore[assignment]
    is_croppable = False  # type: ignore[assignment]  # a recurrent state cannot be rolled back
    is_linear = [False]  # type: ignore[assignment]  # noqa: RUF012  (generate then passes only the new tokens)
    is_sliding = [False]  # type: ignore[assignment]  # noqa: RUF012
    is_dummy = [False]  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    @classmethod
    def adopt(cls, cache: Any) -> HybridCache:
        """The caller's cache as one of ours: an empty DynamicCache becomes it in place, so the caller's object holds
        the state afterwards.

        Raises:
            ValueError: a cache of another kind, or one that another model has filled.
        """
        if isinstance(cache, cls):
            return cache
        if type(cache) is DynamicCache and cache.get_seq_length() == 0:
            cache.__class__ = cls
            cache.reset()  # type: ignore[attr-defined]
            return cache  # type: ignore[return-value]
        raise ValueError(f"the cache must be one that this model returned, or an empty DynamicCache; got "
                         f"{type(cache).__name__} with {cache.get_seq_length()} tokens. Other kinds cannot hold the "
                         "state of linear layers")

    def reset(self) -> None:
        """Empty the cache."""
        self.groups: list[RowGroup] = []
        self.length = 0  # tokens per row, padding included
        self.is_text_BS: Tensor | None = None  # False where a token was padding; None: there was none

    @property
    def rows(self) -> int:
        """Number of rows, 0 while it is empty."""
        return sum(len(group.rows) for group in self.groups)

    @property
    def batch_size(self) -> int:
        return self.rows

    @property
    def is_initialized(self) -> bool:
        return bool(self.groups)

    def __len__(self) -> int:
        return len(self.groups[0].state.layers) if self.groups else 0

    def __iter__(self) -> Iterator[Any]:
        raise TypeError("the cache of a hybridlm model has no keys and values per layer")

    def __repr__(self) -> str:
        return f"HybridCache({self.rows} rows of {self.length} tokens)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row that it has seen, padding included."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.length > 0

    def activate_past_recording(self) -> None:
        raise ValueError("the state of a hybridlm model cannot be rolled back, which assisted generation needs")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("the cache of a hybridlm model cannot be cropped: a recurrent state cannot be rolled back. "
                         "Copy it with copy.deepcopy before the tokens that may have to go")

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("the cache of a hybridlm model is updated by its forward, not layer by layer")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what row `beam_idx[i]` was, as beam search does."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Let row i be what row `indices[i]` was; rows may come several times or not at all."""
        sources = indices.tolist()
        groups = []
        for group in self.groups:
            place = {row: index for index, row in enumerate(group.rows)}
            rows = [row for row, source in enumerate(sources) if source in place]
            if rows:
                _select(group.state, [place[sources[row]] for row in rows])
                groups.append(RowGroup(rows, group.state))
        self.groups = groups
        if self.is_text_BS is not None:
            self.is_text_BS = self.is_text_BS[indices.cpu()]

    def forward(self, model: HybridLM, input_ids: Tensor | None, inputs_embeds: Tensor | None,
                attention_mask: Tensor | None, position_ids: Tensor | None, *, logits_to_keep: int | None,
                return_hidden_states: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Run the model on new tokens after those that the cache holds; no graph for a backward is kept.

        Args:
            model: the model.
            input_ids: new tokens [B, T], or None beside `inputs_embeds`.
            inputs_embeds: their embeddings [B, T, D], or None.
            attention_mask: [B, tokens held + T]; tokens with 0 are passed over.
            position_ids: [B, T]; they must count the tokens that are no padding.
            logits_to_keep: number of last positions that get logits; None: all.
            return_hidden_states: whether hidden states are returned.

        Returns:
            Logits and hidden states; those of padding are zeros.

        Raises:
            ValueError: rows, mask or positions that do not fit what the cache holds.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        batch, length = tokens.shape[:2]
        if not self.groups:
            self.groups = [RowGroup(list(range(batch)), model.new_state(batch, NO_LIMIT))]
        if batch != self.rows:
            raise ValueError(f"the cache holds {self.rows} rows; got {batch}")
        text = self._read_mask(attention_mask, batch, length)
        if position_ids is not None:
            self._check_positions(position_ids, text, batch, length)
        self._split_groups(text, length)
        options: dict[str, Any] = {"return_hidden_states": return_hidden_states}
        with torch.no_grad():
            if text is None and len(self.groups) == 1:
                output = model(input_ids, inputs_embeds=inputs_embeds, state=self.groups[0].state,
                               logits_to_keep=logits_to_keep, **options)
                logits, hidden = output.logits, output.hidden_states
            else:
                logits, hidden = self._run_groups(model, input_ids, inputs_embeds, text, options)
                logits = logits if logits_to_keep is None else logits[:, -logits_to_keep:]
        self._record(text, batch, length)
        return logits, hidden

    def _read_mask(self, attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
        """The new tokens that are text, bool [B, T]; None: all."""
        if attention_mask is None:
            return None
        mask = read_mask(attention_mask, batch, self.length + length)
        if int(mask.max()) > 1:
            raise ValueError("packed documents (an attention_mask with sample numbers) cannot be decoded: give each "
                             "its own row, or leave the cache out")
        seen, new = mask[:, : self.length] != 0, mask[:, self.length :] != 0
        before = torch.ones_like(seen) if self.is_text_BS is None else self.is_text_BS
        if not torch.equal(seen, before):
            raise ValueError("attention_mask must say of the tokens in the cache what it said when they came; a "
                             "recurrent state cannot forget tokens")
        return None if bool(new.all()) else new

    def _check_positions(self, position_ids: Tensor, text: Tensor | None, batch: int, length: int) -> None:
        held = torch.tensor([0] * batch)
        for group in self.groups:
            held[group.rows] = group.state.length
        text_BT = torch.ones(batch, length, dtype=torch.bool) if text is None else text
        expected = held[:, None] + text_BT.long().cumsum(1) - 1
        positions = position_ids.detach().cpu()
        if positions.dim() != 2 or positions.shape[1] != length or positions.shape[0] not in (1, batch):
            raise ValueError(f"position_ids must be [batch, time] = {[batch, length]}; got {list(positions.shape)}")
        wrong = (positions.expand(batch, length) != expected) & text_BT
        if bool(wrong.any()):
            row, token = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(f"position_ids must go on from the {int(held[row])} tokens of text that the cache holds "
                             f"in row {row}; got {int(positions.expand(batch, length)[row, token])} for new token "
                             f"{token}. Packed documents cannot be decoded: give each its own row")

    def _split_groups(self, text: Tensor | None, length: int) -> None:
        """Divide groups whose rows differ in where the new tokens are padding."""
        if text is None:
            return
        groups = []
        for group in self.groups:
            patterns: dict[tuple[bool, ...], list[int]] = {}
            for row in group.rows:
                patterns.setdefault(tuple(text[row].tolist()), []).append(row)
            place = {row: index for index, row in enumerate(group.rows)}
            for number, rows in enumerate(patterns.values(), start=1):
                state = group.state if number == len(patterns) else copy.deepcopy(group.state)
                if len(patterns) > 1:
                    _select(state, [place[row] for row in rows])
                groups.append(RowGroup(rows, state))
        self.groups = groups

    def _run_groups(self, model: HybridLM, input_ids: Tensor | None, inputs_embeds: Tensor | None,
                    text: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        batch, length = tokens.shape[:2]
        logits: Tensor | None = None
        hidden: tuple[Tensor, ...] | None = None
        for group in self.groups:
            columns = list(range(length)) if text is None else text[group.rows[0]].nonzero().flatten().tolist()
            if not columns:
                continue
            rows_R1 = torch.tensor(group.rows, device=tokens.device)[:, None]
            columns_T = torch.tensor(columns, device=tokens.device)
            output = model(None if input_ids is None else input_ids[rows_R1, columns_T],
                           inputs_embeds=None if inputs_embeds is None else inputs_embeds[rows_R1, columns_T],
                           state=group.state, **options)
            if logits is None:
                logits = output.logits.new_zeros(batch, length, output.logits.shape[-1])
                hidden = output.hidden_states and tuple(
                    x.new_zeros(batch, length, x.shape[-1]) for x in output.hidden_states)
            logits[rows_R1, columns_T] = output.logits
            for whole, part in zip(hidden or (), output.hidden_states or (), strict=True):
                whole[rows_R1, columns_T] = part
        if logits is None:
            raise ValueError("attention_mask calls every token padding")
        return logits, hidden

    def _record(self, text: Tensor | None, batch: int, length: int) -> None:
        self.length += length
        if text is None and self.is_text_BS is None:
            return
        before = torch.ones(batch, self.length - length, dtype=torch.bool) if self.is_text_BS is None \
            else self.is_text_BS
        now = torch.ones(batch, length, dtype=torch.bool) if text is None else text
        self.is_text_BS = torch.cat([before, now], 1)


def _select(state: ModelState, rows: list[int]) -> None:
    """Keep `rows` of a decode state, in place."""
    state.reorder(torch.tensor(rows))
    state.batch = len(rows)
