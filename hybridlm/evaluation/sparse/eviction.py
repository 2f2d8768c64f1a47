"""Keys that are kept while others are thrown away for good, per key/value head.

Sources: Zhang et al. 2023, H2O, section 4; Li et al. 2024, SnapKV, section 4. Heads that share keys decide together, by
the sum of their attention: their cache is one.
T tokens of a document, Q queries of a piece, H query heads, G key/value heads, R = H/G, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridlm.evaluation.sparse.contract import (
    BudgetMethod,
    KeyReader,
    PromptMethod,
    register_sparse_method,
    visible_keys,
)
from hybridlm.evaluation.sparse.search import best_keys


@dataclass(frozen=True, kw_only=True)
class HeavyHitters(BudgetMethod):
    """H2O: the newest keys, and those that got most attention so far.

    Args:
        budget: keys that are kept; a query reads them and its own.
        recent: newest ones among them; 0 takes half of the budget.
    """

    recent: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "recent")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return _HeavyReader(self, k_TGK.shape[1], len(k_TGK))


class _HeavyReader(KeyReader):
    """Follows the cache token by token; pieces of queries come in their order."""

    def __init__(self, method: HeavyHitters, groups: int, tokens: int):
        self.budget = method.budget
        self.recent = min(method.recent or max(1, method.budget // 2), method.budget)
        self.kept_GT = torch.zeros(groups, tokens, dtype=torch.bool)
        self.mass_GT = torch.zeros(groups, tokens, dtype=torch.float64)

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        groups, tokens = self.kept_GT.shape
        device = scores_HQT.device
        self.kept_GT, self.mass_GT = self.kept_GT.to(device), self.mass_GT.to(device)
        scores_GRQT = scores_HQT.unflatten(0, (groups, -1))
        found = []
        for place, t in enumerate(range(*rows.indices(tokens))):
            self.kept_GT[:, t] = True
            self.kept_GT &= scores_GRQT[:, 0, place] > -torch.inf  # a window has left older keys behind
            found.append(self.kept_GT.clone())
            score_GRT = scores_GRQT[:, :, place].masked_fill(~self.kept_GT[:, None], -torch.inf)
            self.mass_GT += score_GRT.softmax(-1).sum(1)
            full_G = self.kept_GT.sum(1) > self.budget  # the cache holds one more than it may
            old_GT = self.mass_GT.masked_fill(~self.kept_GT, torch.inf)
            old_GT[:, max(0, t - self.recent + 1) :] = torch.inf
            group_G = torch.arange(groups, device=device)
            self.kept_GT[group_G, old_GT.argmin(1)] &= ~full_G
        kept_GQT = torch.stack(found, 1)
        return kept_GQT.repeat_interleave(scores_HQT.shape[0] // groups, 0)


@dataclass(frozen=True, kw_only=True)
class SnapKV(PromptMethod, BudgetMethod):
    """SnapKV: of a prompt, the keys to which its last queries attend; everything behind the prompt is kept.

    Args:
        budget: keys of the prompt that are kept, its last `window` included.
        window: last queries of the prompt, which vote; their keys are kept.
        kernel: votes are averaged over so many neighbours.
    """

    window: int = 32
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "window", "kernel")

    def reader(self, q_THK: Tensor, k_TGK: Tensor, scale: float, window: int | None = None) -> KeyReader:
        return _SnapReader(self, q_THK, k_TGK, scale, window)


class _SnapReader(KeyReader):
    def __init__(self, method: SnapKV, q_THK: Tensor, k_TGK: Tensor, scale: float, seen: int | None):
        tokens, groups = k_TGK.shape[:2]
        self.prompt = prompt = method.prompt_tokens(tokens)
        window = min(method.window, prompt)
        kept_GP = torch.ones(groups, prompt, dtype=torch.bool, device=k_TGK.device)
        if prompt > method.budget:
            q_GRWK = q_THK[prompt - window : prompt].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
            score_GRWP = torch.einsum("grwk,sgk->grws", q_GRWK, k_TGK[:prompt]) * scale
            seen_WP = visible_keys(slice(prompt - window, None), prompt, seen, k_TGK.device)
            vote_GP = score_GRWP.masked_fill(~seen_WP, -torch.inf).softmax(-1).sum((1, 2))
            left = (method.kernel - 1) // 2
            padded = F.pad(vote_GP, (left, method.kernel - 1 - left))
            smooth_GP = F.avg_pool1d(padded[:, None], method.kernel, 1)[:, 0]
            smooth_GP[:, prompt - window :] = torch.inf
            if seen is not None:  # no query behind the prompt sees these keys
                smooth_GP[:, : max(0, prompt - seen + 1)] = -torch.inf
            kept_GP = best_keys(smooth_GP, max(method.budget, window))
        self.kept_HT = F.pad(kept_GP, (0, tokens - prompt), value=True).repeat_interleave(q_THK.shape[1] // groups, 0)

    def reads(self, rows: slice, scores_HQT: Tensor) -> Tensor | None:
        if rows.start < self.prompt:
            return None
        return self.kept_HT[:, None].expand_as(scores_HQT)


register_sparse_method("h2o", HeavyHitters)
register_sparse_method("snapkv", SnapKV)
