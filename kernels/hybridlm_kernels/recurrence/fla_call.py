"""Calls of flash-linear-attention's kernels, for the adapters of delta_rule and linear_attention."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hybridlm_kernels.optional_packages import find
from hybridlm_kernels.packing import CuSeqlens
from hybridlm_kernels.registry import Call

PACKAGE = ("flash-linear-attention", "0.6")
# The package hands parts of an operation to other packages that it finds (FlashQLA, FlashKDA, TileLang) and says so in
# its log, once per part and process: "[FLA Backend] kda.chunk_kda_fwd -> flash_kda".
_LOGGERS = ("fla.backends", "fla.ops.backends")
_REPLACED = re.compile(r"\[FLA Backend\] (\S+ -> [^\s:]+)$")
_replacements: dict[str, None] = {}


class _NoteReplacements(logging.Filter):
    """Notes what the package's log says of replaced parts, and lets through what the log would show anyway."""

    def __init__(self, level: int):
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        if match := _REPLACED.match(record.getMessage()):
            _replacements[match[1]] = None
        return record.levelno >= self.level


@functools.cache
def _watch_log() -> None:
    """Follow the package's log from its first call on."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addFilter(_NoteReplacements(logger.getEffectiveLevel()))
        logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))


def replacements() -> list[str]:
    """Parts of the package that other implementations computed in this process, "kda.chunk_fwd -> flash_kda"."""
    return list(_replacements)


def accepts(call: Call, entry: tuple[str, str]) -> tuple[bool, str]:
    """Whether the function `entry` (module, name) is installed and accepts the call, and if not, the reason."""
    if call.dtype == torch.float64:
        return False, "computes in float32 and below; the tensors are float64"
    if call.get("key_dim") > 256:
        return False, f"key head dims up to 256; got {call.get('key_dim')}"
    found, why = find(*entry, *PACKAGE)
    return found is not None, why


def call(entry: tuple[str, str], tokens: Mapping[str, Tensor | None], scale: float, state_NHvKV: Tensor | None,
         borders: CuSeqlens | None, final_state: bool, **options: Any) -> tuple[Tensor, Tensor]:
    """Run `entry` on tensors [B, T, ...] by name.

    Packed documents are passed as one row, the form that the package expects.

    Returns:
        The outputs in the shape and dtype of `tokens["v"]`, and the final states, none of them without `final_state`.
    """
    v_BTHvV = tokens["v"]
    assert v_BTHvV is not None
    present = {name: x for name, x in tokens.items() if x is not None}
    if borders is not None:
        present = {name: x.reshape(1, -1, *x.shape[2:]) for name, x in present.items()}
        options |= {"cu_seqlens": borders.tensor().long(), "cu_seqlens_cpu": torch.tensor(borders.host)}
    _watch_log()
    run, why = find(*entry, *PACKAGE)
    assert run is not None, why
    o, state = run(**present, scale=scale, initial_state=state_NHvKV, output_final_state=final_state, **options)
    if not final_state:
        state = o.new_empty(0, v_BTHvV.shape[2], present["k"].shape[-1], v_BTHvV.shape[-1], dtype=torch.float32)
    return o.reshape(v_BTHvV.shape).to(v_BTHvV.dtype), state


def equal_heads(tokens: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Queries and keys repeated for the value heads they serve, for functions without grouped heads."""
    v_BTHvV = tokens["v"]
    assert v_BTHvV is not None
    return {name: x.repeat_interleave(v_BTHvV.shape[2] // x.shape[2], 2) if x is not None and name in "qk" else x
            for name, x in tokens.items()}
