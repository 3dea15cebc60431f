"""Many requests through a fixed number of slots: whoever finishes makes room for the next at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from ..errors import InflashError
from .engine import Engine
from .outputs import RequestOutput
from .prompt_passes import PromptPart, PromptPasses
from .requests import Continuation, Request, RequestProgress
from .run_size import RunSize
from .sampler import Sampler
from .text import TokenBytes
from .trace import SAMPLING, recorder


class Scheduler:
    """Runs requests on an engine. One at a time: the engine has one KV cache."""

    def __init__(
        self, engine: Engine, sampler: Sampler, *, end_ids: frozenset[int], token_bytes: TokenBytes | None, max_length: int
    ) -> None:
        self._engine, self._sampler = engine, sampler
        self._end_ids, self._token_bytes, self._max_length = end_ids, token_bytes, max_length
        self._trace = recorder()

    def run(
        self,
        requests: Iterable[Request],
        on_tokens: Callable[[int], None] = lambda count: None,
        *,
        size: RunSize | None = None,
        ready: Callable[[], bool] = lambda: True,
    ) -> Iterator[RequestOutput]:
        """Yields each request's output when all its continuations are finished.

        Args:
          requests: prompts that `check_prompt` has passed; taken one by one, as slots become free.
          on_tokens: told of the tokens of every step.
          size: what the engine is to be made ready for; None: found by taking all requests at once.
          ready: whether another request may be begun now. When nothing is running the next one is taken without asking, and `requests`
            may wait.

        Raises:
          InflashError: a request is longer than `size` said that any would be, and the KV cache has no room for it.
        """
        progress: dict[int, RequestProgress] = {}
        if size is None:
            requests = list(requests)
            size = RunSize.of(requests)
            progress = {request.number: self._begin(request) for request in requests}
        if not size.num_sequences:
            return
        self._prepare(size)
        source = iter(requests)
        waiting: deque[Continuation] = deque()
        slots: list[Continuation | None] = [None] * self._engine.num_seqs
        passes = PromptPasses(self._engine.kv_cache, self._engine.plan.prompt_tokens)
        while True:
            self._take(source, waiting, slots, progress, ready)
            if not waiting and not any(slots):
                return
            if parts := passes.next_pass(slots, waiting):
                self._process(parts, progress, on_tokens)
                yield from self._finished(slots, progress)
            if running := [(row, c) for row, c in enumerate(slots) if c is not None and c.token_ids]:
                self._extend(self._decode(running), running, on_tokens)
                yield from self._finished(slots, progress)

    def _prepare(self, size: RunSize) -> None:
        """Sizes the engine for these requests, in powers of two so that the next call finds it compiled."""
        most = self._engine.plan.num_seqs or self._engine.options.max_num_seqs
        num_seqs = min(most, 1 << (size.num_sequences - 1).bit_length())
        longest = min(size.longest, self._max_length)
        self._engine.prepare(num_seqs, longest, size.num_positions(num_seqs, longest))
        self._engine.kv_cache.clear()
        self._sampler.warm_up(num_seqs, list(size.kinds.values()))

    def _take(
        self,
        source: Iterator[Request],
        waiting: deque[Continuation],
        slots: list[Continuation | None],
        progress: dict[int, RequestProgress],
        ready: Callable[[], bool],
    ) -> None:
        """Takes as many requests as there are free slots for."""
        free = slots.count(None)
        while len(waiting) < free and (ready() or (not waiting and free == len(slots))):
            request = next(source, None)
            if request is None:
                return
            if request.number not in progress:
                progress[request.number] = self._begin(request)
            self._check_room(request, progress[request.number].continuations[0].most_tokens)
            waiting.extend(progress[request.number].continuations)

    def _check_room(self, request: Request, most_tokens: int) -> None:
        """What does not even fit alone would wait for ever."""
        needed, cache = len(request.prompt_token_ids) + most_tokens, self._engine.kv_cache
        if needed > (room := min(cache.capacity, cache.num_positions)):
            raise InflashError(
                f"request {request.request_id}: needs {needed} positions of the KV cache, found {room}; give `size` its length, too"
            )

    def _begin(self, request: Request) -> RequestProgress:
        return RequestProgress(request, max_length=self._max_length, end_ids=self._end_ids, token_bytes=self._token_bytes)

    def _process(
        self, parts: Sequence[PromptPart], progress: dict[int, RequestProgress], on_tokens: Callable[[int], None]
    ) -> None:
        """Runs a pass of prompts; those that are complete get their first token."""
        for part in parts:
            progress[part.continuation.request.number].mark("first_scheduled_time")
            if part.continuation.num_cached_tokens is None:
                part.continuation.num_cached_tokens = self._engine.kv_cache.num_cached[part.row]
                self._engine.times.cached_tokens += part.continuation.num_cached_tokens
        logits = self._engine.process_prompts([(part.row, part.token_ids) for part in parts])
        if complete := [(part.row, part.continuation) for part in parts if part.is_last]:
            self._extend(logits, complete, on_tokens)
        for _, continuation in complete:
            progress[continuation.request.number].mark("first_token_time")

    def _decode(self, running: Iterable[tuple[int, Continuation]]) -> jax.Array:
        token_ids = np.zeros(self._engine.num_seqs, np.int32)
        positions = np.zeros(self._engine.num_seqs, np.int32)
        active = np.zeros(self._engine.num_seqs, bool)
        for row, continuation in running:
            token_ids[row] = continuation.token_ids[-1]
            positions[row], active[row] = continuation.position, True
        return self._engine.decode(token_ids, positions, active)

    def _extend(self, logits: jax.Array, rows: Sequence[tuple[int, Continuation]], on_tokens: Callable[[int], None]) -> None:
        with self._trace.span(SAMPLING, value=len(rows)):
            tokens = self._sampler.choose(logits, rows)
        for row, continuation in rows:
            if row in tokens:
                continuation.push(tokens[row])
        on_tokens(len(rows))

    def _finished(self, slots: list[Continuation | None], progress: dict[int, RequestProgress]) -> Iterator[RequestOutput]:
        for row, continuation in enumerate(slots):
            if continuation is None or continuation.finish_reason is None:
                continue
            slots[row] = None
            self._engine.kv_cache.release(row)
            state = progress.get(continuation.request.number)
            if state is not None and state.finished:  # None: another continuation of it ended in this step, too
                state.mark("finished_time")
                del progress[continuation.request.number]
                yield state.output()
