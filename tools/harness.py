"""The model as lm-evaluation-harness sees it, so that its tasks can be run: the extra `inflash[lm-eval]`.

Only `inflash eval` imports this module, and only when it has tasks to run: lm_eval takes seconds to import. Without lm_eval the import
raises `InflashError`.

Axes: T tokens, V vocabulary.
"""

import hashlib
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import InflashError
from ..pipeline.llm import LLM
from ..pipeline.sampling_params import SamplingParams
from .progress import progress_bar
from .table import table

try:
    import datasets  # pyright: ignore[reportMissingImports]
    import lm_eval.api.model  # pyright: ignore[reportMissingImports]
    import lm_eval.api.task  # pyright: ignore[reportMissingImports]
    import lm_eval.evaluator  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise InflashError(
        f"running evaluation tasks needs lm-evaluation-harness, which cannot be imported ({error}); "
        "run pip install 'inflash[lm-eval]'"
    ) from error

DEFAULT_MAX_GEN_TOKS = 256  # of lm_eval's own models, for tasks that do not say
BOOTSTRAP_ITERS = 1000  # in this process; the standard error of such a standard error is 2 %
LOCAL_FORMATS = frozenset({"arrow", "csv", "json", "pandas", "parquet", "text", "xml"})  # of `datasets`, for files of one's own

_ALWAYS = ("repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "stop_token_ids", "ignore_eos")
_WHEN_SAMPLING = ("top_p", "top_k", "min_p", "seed")
_READ = {"until", "max_gen_toks", "do_sample", "temperature", *_ALWAYS, *_WHEN_SAMPLING}


class InflashLM(TemplateLM):
    """An opened `LLM` under lm_eval's interface. It does not close the `LLM`.

    Log-likelihoods come from `LLM.logits`, in which every token of a "sparse" engine uses only the neurons that the predictor names,
    prompt tokens included: the harness measures what decoding computes, not what a dense prompt pass would.

    Raises:
      InflashError: the store has no tokenizer.
    """

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        if llm.tokenizer is None:
            raise InflashError("tasks are texts, and this store has no tokenizer; convert again with its tokenizer files")
        self.llm = llm
        self._tokenizer = llm.tokenizer  # not `tokenizer`, which lm_eval takes for one of transformers'

    @property
    def eot_token_id(self) -> int:
        return self.llm.config.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text without a context is conditioned on."""
        return self.llm.config.bos_token_id

    @property
    def max_length(self) -> int:
        return self.llm.max_model_len

    @property
    def tokenizer_name(self) -> str:
        """Changes with the tokenizer's content: lm_eval names cached requests after it."""
        return "inflash-" + hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's token ids.

        Args:
          string: any text.
          add_special_tokens: None: as the tokenizer does for a prompt, but no second beginning of text where there is one.
        """
        if add_special_tokens is None:
            begin = self._tokenizer.id_to_token(self.prefix_token_id)
            add_special_tokens = not (begin and string.startswith(begin))
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, in windows of `max_length` that overlap by one token or, the last, by more."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        ends = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        scores = [score for score, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        return [math.fsum(scores[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues all contexts in one run, so that sequences share neuron reads; texts without the stop string.

        Known keys of a task's `generation_kwargs` are `until`, `max_gen_toks` and its aliases, `do_sample`, `temperature`, and
        `SamplingParams`' penalties, `min_tokens`, `stop_token_ids`, `ignore_eos`, and, when sampling, `top_p`, `top_k`, `min_p` and
        `seed`. Others are ignored with a warning. The model's own generation defaults do not count: a task says what it wants.

        Raises:
          InflashError: a value is out of its range, or `max_gen_toks` leaves no room for a context.
        """
        prompts, params, cut, ignored = [], [], 0, set()
        for context, gen_kwargs in (request.args for request in requests):
            params.append(sampling_params(gen_kwargs))
            ignored |= set(normalize_gen_kwargs(gen_kwargs)) - _READ
            token_ids = self.tok_encode(context) or [self.prefix_token_id]
            room = self.max_length - params[-1].max_tokens
            if room < 1:
                raise InflashError(
                    f"max_gen_toks: the task asks for {params[-1].max_tokens} tokens after each context, but sequences have at most "
                    f"{self.max_length}; raise max_model_len, or lower max_gen_toks in the task's generation_kwargs"
                )
            cut += len(token_ids) > room
            prompts.append({"prompt_token_ids": token_ids[-room:]})
        if ignored:
            warnings.warn(f"generation_kwargs: ignored {', '.join(sorted(ignored))}, unknown here", stacklevel=2)
        _tell_of_cuts(cut, len(prompts), self.max_length)
        outputs = self.llm.generate(prompts, params) if prompts else []
        return [output.outputs[0].text for output in outputs]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Scores continuations.

        Args:
          requests: (anything, context ids, continuation ids); contexts are cut from the left where both do not fit.
          disable_tqdm: show no progress.

        Returns:
          For each the sum of its tokens' natural log probabilities, in float64, and whether each is the most likely one.

        Raises:
          InflashError: a continuation alone is longer than `max_length`.
        """
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        if (longest := max((len(continuation) for _, continuation in pairs), default=0)) > self.max_length:
            raise InflashError(
                f"max_model_len: an answer to be scored has {longest} tokens, but sequences have at most {self.max_length}; raise it"
            )
        # The last token is scored and never read, so one more than `max_length` fits.
        inputs = [tuple((context + continuation)[-self.max_length - 1 : -1]) for context, continuation in pairs]
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for context, continuation in pairs)
        _tell_of_cuts(cut, len(pairs), self.max_length)
        scores = [(0.0, True)] * len(pairs)
        # Longest first, so that the KV cache is allocated once; equal inputs, as of one-token answers to a question, are run once.
        order = sorted(
            (i for i, (_, continuation) in enumerate(pairs) if continuation), key=lambda i: (-len(inputs[i]), inputs[i])
        )
        with progress_bar(total=len(order), unit="request", delay=1.0, disable=disable_tqdm) as bar:
            for token_ids, places in groupby(order, key=lambda i: inputs[i]):
                logits = self.llm.logits(token_ids)
                for i in places:
                    continuation = pairs[i][1]
                    scores[i] = score(logits[-len(continuation) :], continuation)
                    bar.update()
        return scores


class _Tasks(TaskManager):
    """lm_eval's tasks, loaded with errors in our form, and with what `datasets` makes of local files in a folder of its own."""

    def __init__(self, cache: Path, **options: Any) -> None:
        super().__init__(**options)
        self._cache = cache

    def load(self, task_list: Any) -> Any:
        def load_dataset(path: str, *arguments: Any, **options: Any) -> Any:
            if path in LOCAL_FORMATS and "://" not in f"{options.get('data_files')} {options.get('data_dir')}":
                options.setdefault("cache_dir", str(self._cache))
            return original(path, *arguments, **options)

        original = datasets.load_dataset
        try:
            with _replaced(datasets, "load_dataset", load_dataset):
                return super().load(task_list)
        except InflashError:
            raise
        except Exception as error:  # from YAML, Jinja, `datasets`, the network, or a task's own Python
            reason = " ".join(str(error).split()) or "no reason given"
            raise InflashError(f"tasks: lm_eval cannot load {', '.join(task_list)}: {type(error).__name__}: {reason}") from error


def evaluate_tasks(
    llm: LLM, tasks: list[str], include_path: Path | None = None, *, limit: int | None = None, num_fewshot: int | None = None
) -> dict[str, dict[str, float | None]]:
    """Runs tasks of lm_eval's or one's own.

    What `datasets` makes of local files (`dataset_path: json`) is deleted afterwards, and they need no network. Data of the Hub are
    kept where Hugging Face's variables say (`HF_HOME`), and `HF_HUB_OFFLINE=1` keeps it from asking.

    Args:
      llm: opened, with a tokenizer; stays open.
      tasks: names, patterns such as `arc_*`, or paths of YAML files. When `include_path` has all of them by name, lm_eval's own
        thousands are not looked through, which takes some ten seconds.
      include_path: folder with tasks of one's own, which go before lm_eval's. `data_files` in them are relative to the current folder.
      limit: run this many documents of each task; None: all.
      num_fewshot: examples before each question; None: as the task says.

    Returns:
      {task or group: {metric: value}} under lm_eval's names, such as `acc,none` and `acc_stderr,none`; None for a value that is not
      finite. A standard error that lm_eval cannot tell is left out. It can be written as JSON.

    Raises:
      InflashError: for a task that is unknown or cannot be loaded, a bad limit, or a store without a tokenizer.
    """
    for name, value, least in (("limit", limit, 1), ("num_fewshot", num_fewshot, 0)):
        if value is not None and value < least:
            raise InflashError(f"{name} should be an integer of at least {least}, found {value}")
    model = InflashLM(llm)
    with _quiet(), tempfile.TemporaryDirectory(prefix="inflash-tasks-") as cache:
        manager, names = _find(tasks, include_path, Path(cache))
        found: Any = lm_eval.evaluator.simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
        )
    return {task: _metrics(entries) for task, entries in found["results"].items()}


def results_table(results: Mapping[str, Mapping[str, float | None]]) -> str:
    """What `evaluate_tasks` returned, a line for each metric; lm_eval's filter is named where it is not `none`."""
    rows = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if metric.endswith("_stderr") and f"{metric.removesuffix('_stderr')},{chosen}" in metrics:
                continue
            stderr = metrics.get(f"{metric}_stderr,{chosen}")
            rows.append([task, metric if chosen == "none" else key, _shown(value), _shown(stderr)])
    return table(["task", "metric", "value", "stderr"], rows)


def score(logits: np.ndarray, token_ids: Sequence[int]) -> tuple[float, bool]:
    """How likely tokens are.

    Args:
      logits: [T, V] float32, each token's scores before it was known.
      token_ids: T ids.

    Returns:
      The sum of their natural log probabilities, computed in float64, and whether each is the most likely one.
    """
    total, greedy = 0.0, True
    for row, token in zip(logits, token_ids, strict=True):  # by rows: [T, V] in float64 can be a gigabyte
        shifted = row.astype(np.float64) - float(row.max())
        total += float(shifted[token] - np.log(np.exp(shifted).sum()))
        greedy &= int(row.argmax()) == token
    return total, greedy


def sampling_params(gen_kwargs: Mapping[str, Any]) -> SamplingParams:
    """A task's `generation_kwargs` as ours; see `InflashLM.generate_until`.

    Raises:
      InflashError: a value is out of its range.
    """
    given: Any = normalize_gen_kwargs(dict(gen_kwargs), DEFAULT_MAX_GEN_TOKS)
    sampled = given["do_sample"]
    taken = (*_ALWAYS, *_WHEN_SAMPLING) if sampled else _ALWAYS
    fields = {name: given[name] for name in taken if given.get(name) is not None}
    return SamplingParams(
        max_tokens=given["max_gen_toks"],
        stop=list(dict.fromkeys(text for text in given["until"] if text)),  # lm_eval has empty ones for "no stop string"
        temperature=given.get("temperature", 1.0) if sampled else 0.0,
        **fields,
    )


def _find(tasks: Sequence[str], include_path: Path | None, cache: Path) -> tuple[_Tasks, list[Any]]:
    """The index that has the tasks, and their names."""
    if not tasks:
        raise InflashError("tasks: expected at least one name, found none")
    if include_path is not None:
        if not include_path.is_dir():
            raise InflashError(f"{include_path}: expected a folder with tasks in YAML files")
        manager = _Tasks(cache, include_path=include_path, include_defaults=False)
        if set(tasks) <= set(manager.all_subtasks):  # a group or tag may go on among lm_eval's own
            return manager, list(tasks)
    manager = _Tasks(cache, include_path=include_path)
    names: dict[str, None] = {}
    for task in tasks:
        matches = [task] if task in manager.task_index or _is_yaml(task) else manager.match_tasks([task])
        if not matches:
            where = f" and {include_path}" if include_path else ""
            raise InflashError(
                f"tasks: none of lm_eval's{where} is called {task!r}; expected names that `lm-eval ls tasks` lists, patterns such as "
                "'arc_*', or paths of YAML files, and for tasks of your own the folder of their YAML files as include path"
            )
        names |= dict.fromkeys(matches)
    return manager, list(names)


def _is_yaml(task: str) -> bool:
    return task.endswith(".yaml") and Path(task).is_file()


@contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval without its chatter and without forked processes, which threads of JAX do not survive."""
    logger, bars = logging.getLogger("lm_eval"), datasets.are_progress_bars_disabled()
    level, forks = logger.level, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(max(level, logging.WARNING))
    datasets.disable_progress_bars()
    os.environ["DISABLE_MULTIPROC"] = "1"  # bootstrapping asks for it, and nowhere else
    try:
        with (
            redirect_stdout(sys.stderr),  # lm_eval prints there too, which would end up in `--json`'s document
            _replaced(lm_eval.api.model, "tqdm", _bar_on_terminals),
            _replaced(lm_eval.api.task, "tqdm", _bar_on_terminals),
            # It runs git, whose complaint about a folder that is no repository would be shown.
            _replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None),
        ):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
        if forks is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forks


def _bar_on_terminals(*arguments: Any, disable: bool | None = None, **options: Any) -> tqdm:
    return tqdm(*arguments, disable=disable or None, **options)  # None: where standard error is no terminal


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Another value for a module's name; nothing when another version of the module has no such name."""
    if not hasattr(module, name):
        yield
        return
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _metrics(entries: Mapping[str, Any]) -> dict[str, float | None]:
    """Of what lm_eval tells of a task the metrics, whose names have a comma and the filter's name."""
    numbers = {key: value for key, value in entries.items() if "," in key and isinstance(value, (int, float, np.number))}
    return {key: float(value) if math.isfinite(value) else None for key, value in numbers.items()}


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def _tell_of_cuts(cut: int, count: int, length: int) -> None:
    if cut:
        warnings.warn(f"{cut} of {count} requests are longer than {length} tokens; contexts are cut from the left", stacklevel=3)
