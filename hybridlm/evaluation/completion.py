"""Texts that a checkpoint writes behind prompts: reading prompts, stopping at texts or tokens, streaming."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridlm import checkpoint as ckpt
from hybridlm.data.chat import Message, TextConventions
from hybridlm.data.tokenizer import StreamDecoder
from hybridlm.errors import CheckpointError, ConfigError, require
from hybridlm.model.generation import Sampling, complete, generate


@dataclass
class Completion:
    """A prompt and the text behind it.

    Args:
        prompt: the prompt, as it was read.
        text: what the model wrote, without the stop that ended it.
        tokens: ids that the model wrote, the one that ended the text included.
        ended_by: the stop that ended the text, `end` for the token that ends texts, `length` for the limit of tokens.
    """

    prompt: str
    text: str = ""
    tokens: int = 0
    ended_by: str = "length"


class StopWatch:
    """Turns ids into text up to the first stop, and holds back text that may be the beginning of one.

    Example:
        >>> from hybridlm.data.tokenizer import load_tokenizer
        >>> watch = StopWatch(load_tokenizer("bytes").stream(), ["end"])
        >>> [watch.push(byte) for byte in b"an end."], watch.found
        (['a', 'n', ' ', '', '', '', ''], 'end')
    """

    def __init__(self, decoder: StreamDecoder, stops: Sequence[str]):
        self._decoder = decoder
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, token: int) -> str:
        """The text that is certain now."""
        return self._release(self._decoder.push(token))

    def finish(self) -> str:
        """The text that was held back, where no stop was found."""
        rest = self._release(self._decoder.finish())
        return rest if self.found is not None else rest + self._held

    def _release(self, text: str) -> str:
        if self.found is not None:
            return ""
        self._held += text
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, self.found = min(places)
            return self._held[:place]
        keep = max((size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
                   default=0)
        released, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return released


class Writer:
    """A checkpoint that writes behind prompts.

    Args:
        path: a checkpoint or run folder.
        device: where the model runs.
        max_new_tokens: tokens per prompt, at most.
        sampling: how tokens are drawn.
        seed: of the sampling; None draws a fresh one for every call.
        stops: texts before which an answer ends. One that spells a special token is that token.

    Raises:
        CheckpointError: no checkpoint, or one without a tokenizer.
    """

    def __init__(self, path: str | Path, *, device: str = "cpu", max_new_tokens: int = 200,
                 sampling: Sampling | None = None, seed: int | None = None, stops: Sequence[str] = ()):
        require(max_new_tokens > 0, "max_new_tokens", "must be positive", got=max_new_tokens)
        require(all(stops), "--stop", "is empty", got="", expected="a text")
        self.folder = ckpt.resolve(path)
        self.model = ckpt.load_checkpoint(self.folder, device)
        if self.model.tokenizer is None:
            raise CheckpointError(f"checkpoint {path} holds no tokenizer, so it cannot read a prompt")
        self.tokenizer = ckpt.load_tokenizer(self.folder)
        self.conventions = TextConventions.of_folder(self.folder)
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling() if sampling is None else sampling
        self.seed = seed
        special = {stop: ids[0] for stop in stops if len(ids := self.tokenizer.encode_markup(stop)) == 1
                   and not self.tokenizer.decode(ids)}
        self.ends = {self.tokenizer.eos_id: "end"} | {token: stop for stop, token in special.items()}
        self.stops = [stop for stop in stops if stop not in special]
        self.seconds = 0.0  # of the last call

    def encode(self, prompt: bytes, *, special_tokens: bool = False) -> list[int]:
        """Ids of a prompt.

        Args:
            prompt: the prompt, UTF-8 unless the tokenizer knows bytes.
            special_tokens: read it as transformers does: what spells a special token is that token, and the token that
                begins texts is put in front.

        Raises:
            ConfigError: a prompt that is not UTF-8 or has no token.
        """
        try:
            if special_tokens:
                ids = self.tokenizer.encode_markup(prompt.decode(), template=True)
            else:
                ids = self.tokenizer.encode(prompt).tolist()
        except UnicodeDecodeError:
            raise ConfigError("--prompt", "is not UTF-8", got=prompt[:40]) from None
        require(bool(ids), "--prompt", "holds no token", expected="at least one character")
        return ids

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation by the checkpoint's chat template."""
        return self.tokenizer.encode_markup(self.conventions.chat(messages))

    def stream(self, ids: Sequence[int], result: Completion) -> Iterator[str]:
        """Yield the text behind a prompt as soon as it is certain, and note the rest in `result`."""
        watch = StopWatch(self.tokenizer.stream(), self.stops)
        start = time.perf_counter()
        options = self.sampling
        tokens = generate(self.model, list(ids), self.max_new_tokens, temperature=options.temperature,
                          top_k=options.top_k, top_p=options.top_p, min_p=options.min_p, seed=self.seed,
                          eos=list(self.ends), vocab_size=self.tokenizer.vocab_size)
        for token_B in tokens:
            token = int(token_B[0])
            result.tokens += 1
            self.seconds = time.perf_counter() - start
            text = watch.push(token)
            result.text += text
            yield text
            if watch.found is not None or token in self.ends:
                result.ended_by = watch.found or self.ends[token]
                break
        tokens.close()
        text = watch.finish()
        result.text += text
        yield text

    def write(self, prompts: Sequence[Sequence[int]], names: Sequence[str], batch_size: int = 16) -> list[Completion]:
        """Write behind several prompts, some at a time.

        Args:
            prompts: ids of each prompt.
            names: their texts, for the results.
            batch_size: prompts at a time.
        """
        results = [Completion(name) for name in names]
        watches = [StopWatch(self.tokenizer.stream(), self.stops) for _ in prompts]

        def ends(index: int, token: int) -> bool:
            results[index].tokens += 1
            results[index].text += watches[index].push(token)
            found = watches[index].found or self.ends.get(token)
            results[index].ended_by = found or "length"
            return found is not None

        start = time.perf_counter()
        complete(self.model, prompts, self.max_new_tokens, batch_size=batch_size, ends=ends,
                 eos=self.tokenizer.eos_id, seed=self.seed, sampling=self.sampling,
                 vocab_size=self.tokenizer.vocab_size)
        self.seconds = time.perf_counter() - start
        for result, watch in zip(results, watches, strict=True):
            result.text += watch.finish()
        return results
