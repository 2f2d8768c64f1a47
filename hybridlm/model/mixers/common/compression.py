"""Compressed entries: one key and one value for each window of tokens, which attention reads in their place.

    mean     entry = mean over the window
    weighted entry = sum_r softmax_r(w)_r x_r             w learned per place in the window and key head
    linear   entry = W [x_1 + p_1, ..., x_L + p_L]         p, a table of places, for keys alone (Yuan et al. 2025: phi)

Only complete windows have an entry. Keys are compressed before their rotation.
Sources: Yuan et al. 2025, NSA, section 3.3.1, and its public implementations.
B rows, E windows, L tokens of a window, G key/value heads, K head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hybridlm.model.mixers.common.entries import EntryWindows
from hybridlm.model.mixers.common.window_projection import project_windows
from hybridlm.model.parameter_roles import VECTOR, ParameterRole, find_roles
from hybridlm_kernels.precision import wide

Compression = Literal["mean", "weighted", "linear"]


def count_compression_params(kind: Compression, length: int, groups: int, head_dim: int) -> int:
    """Number of parameters of the compression of keys and values.

    >>> count_compression_params("linear", length=4, groups=2, head_dim=8)
    1088
    """
    if kind == "mean":
        return 0
    if kind == "weighted":
        return 2 * length * groups
    return 2 * groups * length * head_dim * head_dim + length * groups * head_dim


def count_compression_flops(kind: Compression, length: int, stride: int, groups: int, head_dim: int) -> float:
    """Forward FLOPs per token of the compression of keys and values; sums over windows are left out."""
    return 4.0 * groups * length * head_dim * head_dim / stride if kind == "linear" else 0.0


class Compressor(nn.Module):
    """Compresses keys and values. Parameters by kind: weight [2, L, G], or k_weight and v_weight [G, L K, K] and
    places [L, G, K].
    """

    def __init__(self, kind: Compression, length: int, groups: int, head_dim: int):
        super().__init__()
        self.kind = kind
        if kind == "weighted":
            self.weight = nn.Parameter(torch.zeros(2, length, groups))
        if kind == "linear":
            self.k_weight = nn.Parameter(torch.zeros(groups, length * head_dim, head_dim))
            self.v_weight = nn.Parameter(torch.zeros(groups, length * head_dim, head_dim))
            self.places = nn.Parameter(torch.zeros(length, groups, head_dim))

    def parameter_roles(self) -> dict[str, ParameterRole]:
        stack = ParameterRole("expert_stack")
        return find_roles(self, {"weight": VECTOR, "k_weight": stack, "v_weight": stack, "places": VECTOR})

    def init_weights(self, std: float) -> None:
        """Start `weighted` as the mean, `linear` from normal(0, std) with places of zero."""
        if self.kind == "weighted":
            nn.init.zeros_(self.weight)
        if self.kind == "linear":
            nn.init.normal_(self.k_weight, std=std)
            nn.init.normal_(self.v_weight, std=std)
            nn.init.zeros_(self.places)

    def forward(self, kv: Tensor | tuple[Tensor, Tensor], windows: EntryWindows | None = None
                ) -> Tensor | tuple[Tensor, Tensor]:
        """Entries of windows, or of whole rows: both by one call, since hooks may fetch the parameters for it.

        Args:
            kv: keys and values of windows [B, E, L, 2, G, K]; with `windows` those of rows, each [B, S, G, K].
            windows: the windows of rows.

        Returns:
            Entries [B, E, 2, G, K]; with `windows` their keys and values, each [B, E, G, K], where those of windows
            that are not there are any.
        """
        if windows is None:
            assert isinstance(kv, Tensor)
            return self._combine(kv)
        k_BSGK, v_BSGK = kv
        if self.kind != "linear" or not windows.regular or k_BSGK.device.type != "cpu" or torch.compiler.is_compiling():
            k_BEGK, v_BEGK = self._combine(windows.gather(torch.stack([k_BSGK, v_BSGK], 2))).unbind(2)
            return k_BEGK, v_BEGK
        dtype = torch.promote_types(k_BSGK.dtype, torch.float32)
        with torch.autocast(k_BSGK.device.type, enabled=False):
            k_BEGK = project_windows(k_BSGK, self.k_weight.to(dtype), self.places.to(dtype), windows.stride)
            v_BEGK = project_windows(v_BSGK, self.v_weight.to(dtype), None, windows.stride)
        return windows.pad(k_BEGK.to(k_BSGK.dtype)), windows.pad(v_BEGK.to(v_BSGK.dtype))

    def _combine(self, kv_BEL2GK: Tensor) -> Tensor:
        """Combine keys and values [B, E, L, 2, G, K] of windows into entries [B, E, 2, G, K]."""
        x = wide(kv_BEL2GK)
        if self.kind == "mean":
            return x.mean(2).to(kv_BEL2GK.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.kind == "weighted":
                weight_2LG = self.weight.to(x.dtype).softmax(1)
                return torch.einsum("beljgk,jlg->bejgk", x, weight_2LG).to(kv_BEL2GK.dtype)
            k_BELGK, v_BELGK = x.unbind(3)
            k_BEGX = (k_BELGK + self.places.to(x.dtype)).transpose(2, 3).flatten(3)
            v_BEGX = v_BELGK.transpose(2, 3).flatten(3)
            entries = [torch.einsum("begx,gxk->begk", part, weight.to(x.dtype))
                       for part, weight in ((k_BEGX, self.k_weight), (v_BEGX, self.v_weight))]
        return torch.stack(entries, 2).to(kv_BEL2GK.dtype)
