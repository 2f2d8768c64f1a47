"""Tasks of lm-eval (the Language Model Evaluation Harness) on a checkpoint.

Requests are sorted by length and packed one behind the other, without padding: each is a document of its own, so its
score is what it would be alone. N tokens of a pack, D model width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hybridlm import checkpoint as ckpt
from hybridlm.data.chat import TextConventions
from hybridlm.data.tokenizer import Tokenizer
from hybridlm.errors import ConfigError, DataError, did_you_mean, require
from hybridlm.evaluation.perplexity import CHUNK_TOKENS, normed_states
from hybridlm.evaluation.task_generation import TaskGeneration
from hybridlm.model.generation import complete
from hybridlm.model.model import HybridLM
from hybridlm.sources.hub import NotFound, look_up
from hybridlm_kernels.packing import CuSeqlens

log = logging.getLogger("hybridlm")

PACK_TOKENS = 8192  # per forward; a longer request has a forward of its own

Scored = tuple[Any, list[int], list[int]]  # a request, the tokens before, the tokens whose probability is asked


class HarnessLM(TemplateLM):
    """Adapter of a model to the interface of lm-eval.

    Scores are those of lm-eval's own `hf` model for the same weights. Texts are read as transformers reads them: what
    spells a special token is that token, and the tokenizer's template (a token that begins each text) is applied. A
    text without anything before it stands behind the token that begins texts, or else the one that ends them.

    Requests longer than the model's `max_position` lose their first tokens, as elsewhere in lm-eval; `notes` says it.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        conventions: what its folder says about texts.
        pack: tokens per forward.
        rows: texts generated at a time.
    """

    def __init__(self, model: HybridLM, tokenizer: Tokenizer, conventions: TextConventions | None = None,
                 pack: int = PACK_TOKENS, rows: int = 16):
        super().__init__()
        self.model, self.text, self.pack, self.rows = model.eval(), tokenizer, pack, rows
        self.max_length = model.config.max_position
        self.conventions = TextConventions() if conventions is None else conventions
        self.notes: list[str] = []

    @property
    def eot_token_id(self) -> int:
        return self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the one that begins texts, else the one that ends them."""
        start = self.conventions.tokens.get("bos_token")
        found = None if start is None else self.text.backend.token_to_id(start)
        return self.text.eos_id if found is None else found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a text that begins with the first token gets no second one
            prefix = self.text.backend.id_to_token(self.prefix_token_id)
            add_special_tokens = prefix is None or not string.startswith(prefix)
        return self.text.encode_markup(string, template=add_special_tokens)

    def _loglikelihood_tokens(self, requests: list[Scored], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding would produce it."""
        kept = [((*context, *continuation)[-(self.max_length + 1):], min(len(continuation), self.max_length))
                for _, context, continuation in requests]
        too_long = sum(len(continuation) > self.max_length for _, _, continuation in requests)
        self._say_cut(too_long, len(requests), "continuations", self.max_length)
        self._say_cut(sum(len(context) + len(continuation) > self.max_length + 1
                          for _, context, continuation in requests) - too_long, len(requests), "requests",
                      self.max_length)
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
            for window in get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                    self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate text behind each context up to one of its `until` strings, several contexts at a time."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        texts = [""] * len(requests)
        for members in groups.values():
            written = self._generate([requests[index].args[0] for index in members], requests[members[0]].args[1])
            for index, text in zip(members, written, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generate(self, contexts: list[str], settings: Mapping[str, Any]) -> list[str]:
        """Generate behind contexts that share their settings."""
        wanted = TaskGeneration.read(settings)
        for note in wanted.notes:
            self._say(f"generation_kwargs: {note}")
        if wanted.max_new_tokens == 0:
            return [""] * len(contexts)
        room = self.max_length - wanted.max_new_tokens
        require(room > 0, "generation_kwargs.max_gen_toks", "leaves no room for the context", got=wanted.max_new_tokens,
                expected=f"fewer than the model's max_position of {self.max_length}")
        ids = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        self._say_cut(sum(len(row) > room for row in ids), len(ids), "contexts", room)
        prompts = [row[-room:] for row in ids]
        limits = [wanted.max_new_tokens if wanted.max_length is None else wanted.max_length - len(row)
                  for row in prompts]
        require(min(limits) > 0, "generation_kwargs.max_length", "is no longer than a context", got=wanted.max_length,
                expected="the tokens of context and answer together; max_gen_toks counts those of the answer alone")
        stops = (*wanted.stops, self.text.eos)
        written: list[list[int]] = [[] for _ in prompts]

        def ends(index: int, token: int) -> bool:
            written[index].append(token)
            text = self.text.decode_markup(written[index])  # a stop may be a special token
            return len(written[index]) >= limits[index] or any(stop in text for stop in stops)

        complete(self.model, prompts, max(limits), batch_size=self.rows, ends=ends, eos=self.text.eos_id, seed=0,
                 sampling=wanted.sampling, vocab_size=self.text.vocab_size)
        return [wanted.cut(self.text.decode(row).split(self.text.eos)[0]) for row in written]

    def _say_cut(self, cut: int, of: int, what: str, limit: int) -> None:
        if cut:
            self._say(f"{cut} of {of} {what} are longer than {limit} tokens and lost their first ones "
                      f"(max_position is {self.max_length})")

    def _say(self, note: str) -> None:
        """Log a note once, and keep it for the report."""
        if note not in self.notes:
            self.notes.append(note)
            log.warning("%s", note)


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
        harness = HarnessLM(model, tokenizer, TextConventions.of_folder(folder), rows=batch_size)
        found = simple_evaluate(model=harness, tasks=loaded, task_manager=manager, num_fewshot=fewshot, limit=limit,
                                log_samples=False, bootstrap_iters=1000)
    assert found is not None
    return {"checkpoint": str(folder), "model": model.config.name, "params": model.num_params(),
            "device": str(model.device), "notes": harness.notes,
            "tasks": {name: _row(found, name) for name in found["results"]}}


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
    """Silence the many messages of lm-eval and datasets, and those of git, which lm-eval asks for a commit."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "lm_eval.evaluator")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    ask_git = evaluator.get_git_commit_hash
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask_git
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
