"""The public face: a model from a store, prompts in, texts out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from ..errors import InflashError, RunError
from ..storage.store import open_store
from .chat_template import ChatTemplateError
from .engine import Engine
from .fixed_shapes import capacity_for
from .memory_parts import check_kv_cache
from .model_files import generation_config
from .options import EngineOptions
from .outputs import RequestOutput
from .planned_engine import PlannedEngine
from .planner import PlannedRun
from .prompts import Prompt, PromptEncoder, portions
from .requests import Request, check_prompt
from .run_size import RunSize
from .sampler import Sampler
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .step_times import StepTimes
from .text import TokenBytes

LONGEST_BY_DEFAULT = 2048


class LLM:
    """A converted model, ready to generate. Use it as a context manager, or call `close`.

    Args:
      model: the store that `inflash convert` wrote.
      ffn, predictor, cache_neurons, window, policy, prefetch, path, overlap, max_num_seqs, max_model_len, compute_dtype, loaders,
        queue_depth, merge_gap, memory, seed, verify:
        see `EngineOptions`, which has the same names and defaults (a test compares them).

    Raises:
      InflashError: for a bad store or option, or when memory is too small; nothing runs then.

    Example:
      with LLM("opt-6.7b.inflash", cache_neurons=0.2) as llm:
          print(llm.generate("The sea was", SamplingParams(max_tokens=32))[0].outputs[0].text)
    """

    def __init__(
        self,
        model: str | Path,
        *,
        ffn: str = "sparse",
        predictor: str = "auto",
        cache_neurons: float | int = 0.25,
        window: int | None = None,
        policy: str = "lfu",
        prefetch: str = "auto",
        path: str = "auto",
        overlap: bool = True,
        max_num_seqs: int = 8,
        max_model_len: int | None = None,
        compute_dtype: str = "auto",
        loaders: int = 1,
        queue_depth: int = 128,
        merge_gap: int = 8 << 10,
        memory: int | str | None = None,
        seed: int = 0,
        verify: bool = False,
    ) -> None:
        self.options = EngineOptions(
            ffn=ffn,
            predictor=predictor,
            cache_neurons=cache_neurons,
            window=window,
            policy=policy,
            prefetch=prefetch,
            path=path,
            overlap=overlap,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            compute_dtype=compute_dtype,
            loaders=loaders,
            queue_depth=queue_depth,
            merge_gap=merge_gap,
            memory=memory,
            seed=seed,
            verify=verify,
        )
        store = open_store(Path(model))
        self.config = store.config
        self.max_model_len = self._longest(self.options.max_model_len)
        self.generation_config = generation_config(store)
        self._prompts = PromptEncoder(store)
        self.tokenizer = self._prompts.tokenizer
        self._token_bytes = TokenBytes(self.tokenizer) if self.tokenizer else None
        self._planned = None if memory is None else PlannedEngine(store, self.options)
        self._engine = Engine(store, self.options) if memory is None else None

    @property
    def engine(self) -> Engine:
        """What runs the model. With a memory budget it is planned for the first requests, or here for one sequence of the longest."""
        if self._planned is None:
            assert self._engine is not None
            return self._engine
        return self._planned.engine or self._planned.open_for(1, self.max_model_len)

    @property
    def planned(self) -> PlannedRun | None:
        """How the memory budget is spent, and what was expected of it; None without one, and before the first requests."""
        return self._planned.planned if self._planned else None

    @property
    def planning_notes(self) -> list[str]:
        """Sentences on what a plan had to assume."""
        return self._planned.notes if self._planned else []

    @property
    def times(self) -> StepTimes:
        """What the run has cost so far."""
        return self._planned.times if self._planned else self.engine.times

    def run_summary(self) -> dict[str, Any]:
        """What the run has cost, as `StepTimes.summary` has it, and `predicted`: what the plan expected, under the same names."""
        return {**self.times.summary(), "predicted": self._planned.predicted() if self._planned else None}

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continues prompts; the outputs are in the order of the prompts.

        Args:
          prompts: one prompt, or a list of them.
          sampling_params: for all prompts, or one for each; None: the model's own defaults.

        Raises:
          InflashError: a prompt is empty, too long, or has ids beyond the vocabulary.
        """
        listed = _as_list(prompts)
        params = self._params(sampling_params, len(listed))
        requests: list[Request] = []
        for made in self.make_requests((str(number), prompt, params[number], number) for number, prompt in enumerate(listed)):
            if isinstance(made, InflashError):
                raise made
            requests.append(made)
        outputs = {output.request_id: output for output in self.stream(requests)}
        for output in outputs.values():
            for completion in output.outputs:
                if completion.failure:
                    raise RunError(f"prompt {output.request_id}: {completion.failure}")
        return [outputs[request.request_id] for request in requests]

    def make_request(self, request_id: str, prompt: Prompt, params: SamplingParams, number: int) -> Request:
        """Tokenises a prompt and checks it.

        Raises:
          InflashError: see `generate`.
        """
        return self._request(request_id, *self._prompts.encode(prompt), params, number)

    def make_requests(self, asked: Iterable[tuple[str, Prompt, SamplingParams, int]]) -> Iterator[Request | InflashError]:
        """As `make_request` for many, which is faster; in place of one that is refused, why.

        Takes a portion of `asked` at a time (`prompts.portions`), so what is refused for its length is not held for long.

        Raises:
          ChatTemplateError, RunError: what every other chat would meet, too.
        """
        for portion in portions(asked, lambda each: each[1]):
            if len(portion) == 1 or self.tokenizer is None:
                yield from (self._unless_refused(*each) for each in portion)
            else:
                token_ids = self._prompts.encode_texts([prompt for _, prompt, _, _ in portion if isinstance(prompt, str)])
                yield from (self._unless_refused(*each, ids) for each, ids in zip(portion, token_ids, strict=True))

    def _unless_refused(
        self, request_id: str, prompt: Prompt, params: SamplingParams, number: int, token_ids: list[int] | None = None
    ) -> Request | InflashError:
        """`token_ids`: the prompt's, where they are known."""
        try:
            if token_ids is None or not isinstance(prompt, str):
                return self.make_request(request_id, prompt, params, number)
            return self._request(request_id, prompt, token_ids, params, number)
        except (ChatTemplateError, RunError):
            raise
        except InflashError as error:
            return error.with_traceback(None)  # which would hold what was too long

    def _request(self, request_id: str, text: str | None, token_ids: list[int], params: SamplingParams, number: int) -> Request:
        check_prompt(token_ids, self.config.vocab_size, self.max_model_len)
        if bad := [token for token in params.stop_token_ids or () if token >= self.config.vocab_size]:
            raise InflashError(f"stop_token_ids: should be from 0 to {self.config.vocab_size - 1}, found {bad[0]}")
        if bad := [token for token, _ in params.biases if token >= self.config.vocab_size]:
            raise InflashError(f"logit_bias: token ids should be from 0 to {self.config.vocab_size - 1}, found {bad[0]}")
        if params.stop_strings and self.tokenizer is None:
            raise InflashError("stop: strings need a tokenizer, which this model has not; give stop_token_ids")
        return Request(request_id=request_id, prompt=text, prompt_token_ids=token_ids, sampling_params=params, number=number)

    def stream(
        self,
        requests: Iterable[Request],
        on_tokens: Callable[[int], None] = lambda count: None,
        *,
        size: RunSize | None = None,
        ready: Callable[[], bool] = lambda: True,
    ) -> Iterator[RequestOutput]:
        """Yields each request's output as soon as it is finished; the arguments are those of `Scheduler.run`."""
        sampler = Sampler(self.config.vocab_size, self.options.seed, self._token_bytes)
        if size is None:
            requests = list(requests)
        engine = self._engine_for(size or RunSize.of(requests))
        scheduler = Scheduler(
            engine, sampler, end_ids=self._end_ids(), token_bytes=self._token_bytes, max_length=self.max_model_len
        )
        return scheduler.run(requests, on_tokens, size=size, ready=ready)

    def _engine_for(self, size: RunSize) -> Engine:
        if self._planned is None:
            return self.engine
        if not size.num_sequences:
            return self._planned.open_for(1, 1)
        num_seqs = min(self.options.max_num_seqs, 1 << (size.num_sequences - 1).bit_length())
        return self._planned.open_for(num_seqs, min(size.longest, self.max_model_len))

    def longest_fitting(self, length: int) -> int:
        """The longest sequence, prompt and output, that memory has room for: `length` or `max_model_len`, or a smaller power of two.

        Raises:
          InflashError: none fits.
        """
        length = min(length, self.max_model_len)
        while True:
            try:
                if self._planned is not None:
                    self._planned.check_room(length)
                elif (capacity := capacity_for(length)) > self.engine.kv_cache.num_positions:
                    check_kv_cache(self.engine.store, capacity)
                return length
            except InflashError:
                if length == 1:
                    raise
                length = 1 << ((length - 1).bit_length() - 1)

    def logits(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The scores of the next token after each of the given ones, for evaluation: [T] ids to [T, V] float32.

        In `sparse` every token uses only the neurons that the predictor names, as in decoding.
        """
        ids = np.asarray(token_ids)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise InflashError(f"logits: expected a list of token ids, found shape {ids.shape} of {ids.dtype}")
        if len(ids) > self.max_model_len:
            raise InflashError(f"logits: at most {self.max_model_len} tokens fit, found {len(ids)}; give them in pieces")
        check_prompt(ids.tolist(), self.config.vocab_size, self.max_model_len + 1)
        if self._planned is not None:
            self._planned.open_for(1, max(len(ids), 1))
        return self.engine.all_logits(ids.astype(np.int32))

    def close(self) -> None:
        """Stops the loaders and the process that renders chat templates. Idempotent."""
        self._prompts.close()
        if self._planned is not None:
            self._planned.close()
        elif self._engine is not None:
            self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _longest(self, requested: int | None) -> int:
        limit = self.config.max_positions
        if requested is not None and requested > limit:
            raise InflashError(f"max_model_len: the model has {limit} positions, found {requested}")
        return requested or min(limit, LONGEST_BY_DEFAULT)

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [SamplingParams.from_defaults(self.generation_config)] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise InflashError(f"sampling_params: expected one, or {count} like the prompts, found {len(given)}")
        return list(given)

    def _end_ids(self) -> frozenset[int]:
        found = self.generation_config.get("eos_token_id")
        found = self.config.eos_token_id if found is None else found
        return frozenset(found) if isinstance(found, list) else frozenset({found})


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if prompts is None or isinstance(prompts, (str, Mapping)):
        return [prompts]
    if len(prompts) and all(isinstance(item, int) for item in prompts):
        return [list(prompts)]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportReturnType]
