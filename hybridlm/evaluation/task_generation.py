"""Generation settings of a task of lm-eval, obeyed as lm-eval's own model of transformers means them, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridlm.errors import ConfigError, require
from hybridlm.model.generation import Sampling

DEFAULT_NEW_TOKENS = 256
# Spellings of the most new tokens; the first that is given counts.
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p")
KNOWN = ("until", *TOKEN_LIMITS, "max_length", *SAMPLING, "num_beams")


@dataclass(frozen=True)
class TaskGeneration:
    """Settings of the texts that a task asks for.

    Args:
        stops: texts before which the answer ends, without empty ones.
        max_new_tokens: tokens at most.
        max_length: tokens at most, those of the context included; None has no such limit.
        sampling: how tokens are drawn.
        notes: what a person should know of settings that contradict each other.
    """

    stops: tuple[str, ...]
    max_new_tokens: int
    max_length: int | None
    sampling: Sampling
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> TaskGeneration:
        """Read the `generation_kwargs` of a request.

        Without `do_sample` a temperature above 0 samples, as in lm-eval; `do_sample: false` has the last word.

        Raises:
            ConfigError: a setting that is not known here, or out of range.

        Example:
            >>> TaskGeneration.read({"until": ["", "end"], "max_tokens": 8, "temperature": 0.5})
            TaskGeneration(stops=('end',), max_new_tokens=8, max_length=None, sampling=Sampling(temperature=0.5, \
top_k=None, top_p=1.0, min_p=0.0), notes=())
        """
        for key in settings:
            require(key in KNOWN, f"generation_kwargs.{key}", "is not known here", expected=", ".join(KNOWN))
        require(settings.get("num_beams") in (None, 1), "generation_kwargs.num_beams", "is not supported",
                got=settings.get("num_beams"), expected="1")
        limits = {key: settings[key] for key in TOKEN_LIMITS if settings.get(key) is not None}
        notes = []
        if len(set(limits.values())) > 1:
            notes.append(f"{' and '.join(f'{key}={value}' for key, value in limits.items())}: the first counts")
        tokens = int(next(iter(limits.values()), DEFAULT_NEW_TOKENS))
        require(tokens >= 0, f"generation_kwargs.{next(iter(limits), '')}", "must not be negative", got=tokens)
        sampling, note = _sampling(settings)
        length = settings.get("max_length")
        return cls(_stops(settings.get("until")), tokens, None if length is None else int(length), sampling,
                   (*notes, *note))

    def cut(self, text: str) -> str:
        """The text before its first stop."""
        for stop in self.stops:
            text = text.split(stop)[0]
        return text


def _stops(until: object) -> tuple[str, ...]:
    stops: Sequence[object]
    if until is None:
        stops = ()
    elif isinstance(until, str):
        stops = (until,)
    elif isinstance(until, list | tuple):
        stops = until
    else:
        raise ConfigError("generation_kwargs.until", "is no text", got=until, expected="a text or a list of texts")
    return tuple(str(stop) for stop in stops if stop)


def _sampling(settings: Mapping[str, Any]) -> tuple[Sampling, list[str]]:
    """The settings by which tokens are drawn, and notes."""
    temperature = float(settings.get("temperature") or 0.0)
    do_sample = settings.get("do_sample")
    if do_sample is None:
        do_sample = temperature > 0
    if not do_sample:
        return Sampling(temperature=0.0), ["do_sample is false: the temperature is ignored"] if temperature else []
    require(temperature > 0, "generation_kwargs.temperature", "must be positive where do_sample is true",
            got=settings.get("temperature"), expected="above 0, or do_sample: false")
    given = {key: settings[key] for key in ("top_k", "top_p", "min_p") if settings.get(key) is not None}
    if given.get("top_k") == 0:  # transformers' way to say all
        del given["top_k"]
    try:
        return Sampling(temperature, **given), []
    except ConfigError as error:
        raise error.within("generation_kwargs") from None
