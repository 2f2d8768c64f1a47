"""Tasks of lm-eval (the Language Model Evaluation Harness) on a checkpoint.

Requests are sorted by length and packed one behind the other, without padding: each is a document of its own, so its
score is what it would be alone. N tokens of a pack, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hybridlm import checkpoint as ckpt
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError, DataError, did_you_mean, require
from hybridlm.evaluation.perplexity import CHUNK_TOKENS, normed_states
from hybridlm.model.generation import generate
from hybridlm.model.model import HybridLM
from hybridlm.sources.hub import NotFound, look_up
from hybridlm_kernels.packing import CuSeqlens

PACK_TOKENS = 8192  # per forward; a longer request has a forward of its own
DEFAULT_NEW_TOKENS = 256
SAMPLING = ("until", "max_gen_toks", "max_tokens", "max_new_tokens", "do_sample", "temperature", "top_p")

Scored = tuple[Any, list[int], list[int]]  # a request, the tokens before, the tokens whose probability is asked


class HarnessLM(TemplateLM):
    """Adapter of a model to the interface of lm-eval.

    A text without anything before it stands behind the end-of-text token.

    Requests longer than the model's `max_position` lose their first tokens, as elsewhere in lm-eval.
    """

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, pack: int = PACK_TOKENS, rows: int = 16):
        super().__init__()
        self.model, self.text, self.pack, self.rows = model.eval(), tokenizer, pack, rows
        self.max_length = model.config.max_position

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.text.encode(string).tolist()

    def _loglikelihood_tokens(self, requests: list[Scored], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding would produce it."""
        kept = [((*context, *continuation)[-(self.max_length + 1):], min(len(continuation), self.max_length))
                for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(kept)
        asked = (index for index, (_, count) in enumerate(kept) if count)
        order = sorted(asked, key=lambda index: -len(kept[index][0]))
        for pack in self._packs(order, [len(ids) - 1 for ids, _ in kept]):
            for index, answer in zip(pack, self._score([kept[index] for index in pack]), strict=True):
                answers[index] = answer
        for (request, *_), answer in zip(requests, answers, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return answers

    def _packs(self, order: list[int], sizes: list[int]) -> Iterator[list[int]]:
        pack: list[int] = []
        for index in order:
            if pack and sum(sizes[other] for other in pack) + sizes[index] > self.pack:
                yield pack
                pack = []
            pack.append(index)
        if pack:
            yield pack

    @torch.no_grad()
    def _score(self, documents: list[tuple[tuple[int, ...], int]]) -> list[tuple[float, bool]]:
        """Score packed documents, each (ids, number of last ids that are asked)."""
        device = self.model.device
        borders = [0]
        for ids, _ in documents:
            borders.append(borders[-1] + len(ids) - 1)
        ids_N = torch.tensor([token for ids, _ in documents for token in ids[:-1]], device=device)
        asked_N = torch.tensor([place for end, (_, count) in zip(borders[1:], documents, strict=True)
                                for place in range(end - count, end)], device=device)
        targets_N = torch.tensor([token for ids, count in documents for token in ids[-count:]], device=device)
        x_ND = normed_states(self.model, ids_N[None], CuSeqlens(borders, device))[0][asked_N]
        found, greedy = [], []
        for first in range(0, len(x_ND), CHUNK_TOKENS):
            logits_NV = self.model.logits(x_ND[None, first:first + CHUNK_TOKENS])[0].float()
            chunk_N = targets_N[first:first + CHUNK_TOKENS]
            found.append(logits_NV.log_softmax(-1).gather(1, chunk_N[:, None])[:, 0].double())
            greedy.append(logits_NV.argmax(-1) == chunk_N)
        counts = [count for _, count in documents]
        return [(float(log_p.sum()), bool(right.all())) for log_p, right
                in zip(torch.cat(found).split(counts), torch.cat(greedy).split(counts), strict=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts; one above `max_position` is cut into windows."""
        windows: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self.eot_token_id,
                                                    self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_p
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate text behind each context up to one of its `until` strings, contexts of one length together."""
        groups: dict[tuple[int, str], list[tuple[int, list[int], dict[str, Any]]]] = {}
        for index, request in enumerate(requests):
            text, settings = request.args
            room = _new_tokens(settings)
            ids = (self.tok_encode(text) or [self.eot_token_id])[-max(1, self.max_length - room):]
            groups.setdefault((len(ids), repr(settings)), []).append((index, ids, settings))
        texts = [""] * len(requests)
        for members in groups.values():
            for first in range(0, len(members), self.rows):
                rows = members[first:first + self.rows]
                written = self._generate([ids for _, ids, _ in rows], rows[0][2])
                for (index, *_), text in zip(rows, written, strict=True):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generate(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampled = settings.get("do_sample", False)
        written: list[list[int]] = [[] for _ in prompts]
        texts = [""] * len(prompts)
        open_rows = set(range(len(prompts)))
        for token_B in generate(self.model, torch.tensor(prompts), _new_tokens(settings), eos=self.text.eos_id, seed=0,
                                temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
                                top_p=float(settings.get("top_p", 1.0)), vocab_size=self.text.vocab_size):
            for row, token in enumerate(token_B.tolist()):
                if row not in open_rows:
                    continue
                written[row].append(token)
                texts[row] = self.text.decode(written[row])
                if token == self.text.eos_id or any(stop in texts[row] for stop in stops):
                    open_rows.discard(row)
            if not open_rows:
                break
        return [_cut(text, stops) for text in texts]


def _new_tokens(settings: dict[str, Any]) -> int:
    for key in settings:
        require(key in SAMPLING, f"generation_kwargs.{key}", "is not known here", expected=", ".join(SAMPLING))
    return int(next((settings[key] for key in SAMPLING[1:4] if settings.get(key)), DEFAULT_NEW_TOKENS))


def _cut(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    return text


def evaluate_tasks(path: str | Path, tasks: Sequence[str], *, task_folder: str | None = None,
                   fewshot: int | None = None, limit: int | None = None, batch_size: int = 16,
                   device: str = "cpu") -> dict[str, Any]:
    """Evaluate a checkpoint on tasks of lm-eval; the report is plain data.

    Args:
        path: a checkpoint or run folder.
        tasks: names of tasks, groups or tags, or YAML files.
        task_folder: a folder with definitions of your own. A definition may name Python code, which lm-eval runs.
        fewshot: examples before each question; default that of the task.
        limit: examples per task; default all.
        batch_size: texts generated at a time.
        device: where the model runs.

    Raises:
        CheckpointError: no checkpoint, or one without a tokenizer.
        ConfigError: an unknown task. DataError: its data cannot be had.
    """
    for key, value, least in (("num_fewshot", fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        require(value is None or value >= least, key, "is too small", got=value, expected=f"at least {least}")
    folder = ckpt.resolve(path)
    model, tokenizer = ckpt.load_checkpoint(folder, device), ckpt.load_tokenizer(folder)
    with _quiet():
        manager = _manager(tasks, task_folder)
        loaded = _load(manager, tasks)
        found = simple_evaluate(model=HarnessLM(model, tokenizer, rows=batch_size), tasks=loaded,
                                task_manager=manager, num_fewshot=fewshot, limit=limit, log_samples=False,
                                bootstrap_iters=1000)
    assert found is not None
    return {"checkpoint": str(folder), "model": model.config.name, "params": model.num_params(),
            "device": str(model.device), "tasks": {name: _row(found, name) for name in found["results"]}}


def _manager(tasks: Sequence[str], task_folder: str | None) -> TaskManager:
    """Find the tasks; lm-eval's own thousands of definitions are read only where they are needed."""
    if task_folder is not None and not Path(task_folder).is_dir():
        raise ConfigError("--task-folder", "is not a folder", got=task_folder)
    own = TaskManager(include_path=task_folder, include_defaults=False)
    if all(name in own.all_tasks or Path(name).is_file() for name in tasks):
        return own
    manager = TaskManager(include_path=task_folder)
    for name in tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            hint = did_you_mean(name, manager.all_tasks)
            raise ConfigError("--tasks", "no task, group or tag of this name", got=name,
                              expected="" if hint else "a name of lm-eval's, one in --task-folder, or a YAML file",
                              hint=hint)
    return manager


def _load(manager: TaskManager, tasks: Sequence[str]) -> list[Any]:
    """Load tasks with their data."""
    loaded: list[Any] = []
    for name in tasks:
        try:
            loaded += look_up(lambda name=name: manager.load([name])["tasks"].values())  # type: ignore[misc]
        except NotFound as error:
            raise DataError(f"task {name} cannot be loaded ({error})") from None
    return loaded


def _row(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Collect the metrics of a task; lm-eval names them `metric,filter` and `metric_stderr,filter`."""
    values = found["results"][name]
    metrics = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and isinstance(value, int | float) and not metric.endswith("_stderr"):
            error = values.get(f"{metric}_stderr,{chosen}")
            metrics[metric if chosen == "none" else f"{metric} ({chosen})"] = {
                "value": value, "stderr": error if isinstance(error, int | float) else None}
    return {"metrics": metrics, "fewshot": found.get("n-shot", {}).get(name),
            "examples": found.get("n-samples", {}).get(name, {}).get("effective")}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the many messages of lm-eval and datasets."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "lm_eval.evaluator")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
