"""Matches by a suffix automaton of the keys, in time linear in the tokens: the published algorithm, in plain Python.

A state of the automaton is a set of strings that end at the same places of the keys: the longest has `length` symbols,
`link` is the state of the longest shorter ones that end at more places, `last` is the latest of these places. The
queries walk over the automaton of the keys before them: `follow` keeps the longest suffix of the queries that is a
string of the keys.

Source: Blumer et al. 1985, The smallest automaton recognizing the subwords of a text; Peng, RWKV-LM, RWKV-v8.
Legend: B rows, T tokens, C channels, N streams.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridlm_kernels.document_rows import each_document_row
from hybridlm_kernels.ops.suffix_match import torch_backend
from hybridlm_kernels.ops.suffix_match.matched_signs import MatchedSigns
from hybridlm_kernels.ops.suffix_match.reference import supports as supports
from hybridlm_kernels.packing import CuSeqlens


class SuffixAutomaton:
    """The automaton of all substrings of the keys added so far, with the place where each was last seen.

    >>> automaton = SuffixAutomaton()
    >>> for place, key in enumerate([1, 0, 0, 1]):
    ...     automaton.add(key, place)
    >>> automaton.follow(1), automaton.follow(0)  # 1 was last at place 3, 1 0 ended at place 1
    (3, 1)
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.last = [-1]
        self.whole = 0  # state of all keys
        self.state = self.matched = 0  # where the queries are, and how many of their last symbols that is

    def follow(self, query: int) -> int:
        """Take one more query; return the latest place where the longest match ends, -1 where none does."""
        state, matched = self.state, self.matched
        while state != -1 and query not in self.next[state]:
            state = self.link[state]
            matched = self.length[state] if state != -1 else 0
        self.state, self.matched = (self.next[state][query], matched + 1) if state != -1 else (0, 0)
        return self.last[self.state] if self.matched else -1

    def add(self, key: int, place: int) -> None:
        """Take one more key, which stands at `place`."""
        new = self._new_state({}, self.length[self.whole] + 1, 0, -1)
        state, self.whole = self.whole, new
        while state != -1 and key not in self.next[state]:
            self.next[state][key] = new
            state = self.link[state]
        if state != -1:
            target = self.next[state][key]
            self.link[new] = target if self.length[target] == self.length[state] + 1 else self._split(state, key)
        while new > 0 and self.last[new] != place:
            self.last[new] = place
            new = self.link[new]

    def _split(self, state: int, key: int) -> int:
        """Give the strings of `state` followed by `key` a state of their own, apart from longer ones."""
        target = self.next[state][key]
        part = self._new_state(dict(self.next[target]), self.length[state] + 1, self.link[target], self.last[target])
        self.link[target] = part
        if self.state == target and self.matched <= self.length[part]:
            self.state = part
        while state != -1 and self.next[state].get(key) == target:
            self.next[state][key] = part
            state = self.link[state]
        return part

    def _new_state(self, following: dict[int, int], length: int, link: int, last: int) -> int:
        self.next.append(following)
        self.length.append(length)
        self.link.append(link)
        self.last.append(last)
        return len(self.next) - 1


def match(q_NT: Tensor, k_NT: Tensor) -> Tensor:
    """The index behind the match, [N, T]."""
    found = []
    for queries, keys in zip(q_NT.tolist(), k_NT.tolist(), strict=True):
        automaton = SuffixAutomaton()
        row = []
        for place, (query, key) in enumerate(zip(queries, keys, strict=True)):
            row.append(automaton.follow(query) + 1)
            automaton.add(key, place)
        found.append(row)
    return torch.tensor(found, dtype=torch.int32, device=q_NT.device)


def suffix_match(q_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, scale_C: Tensor, bits: int, unmatched: str,
                 runs: None, final_runs: bool, cu_seqlens: CuSeqlens | None) -> tuple[Tensor, None]:
    """The automaton backend; arguments as in the public function, already checked. The backward is that of `torch`."""

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return MatchedSigns.apply(q, k, v, scale_C, bits, unmatched, match, torch_backend.flips)

    tensors = (q_BTC, k_BTC, v_BTC)
    return rows(*tensors) if cu_seqlens is None else each_document_row(rows, tensors, cu_seqlens), None
