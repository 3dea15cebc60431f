"""Many requests through a fixed number of slots: whoever finishes makes room for the next at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from .engine import Engine
from .outputs import RequestOutput
from .requests import Continuation, Request, RequestProgress
from .sampler import Sampler
from .text import TokenBytes
from .trace import SAMPLING, recorder


def sequences_of(requests: Sequence[Request]) -> int:
    """Continuations that the requests ask for."""
    return sum(request.sampling_params.n for request in requests)


def longest_of(requests: Sequence[Request]) -> int:
    """Tokens of the longest of them, prompt and output."""
    return max(len(request.prompt_token_ids) + request.sampling_params.max_tokens for request in requests)


class Scheduler:
    """Runs requests on an engine. One at a time: the engine has one KV cache."""

    def __init__(
        self, engine: Engine, sampler: Sampler, *, end_ids: frozenset[int], token_bytes: TokenBytes | None, max_length: int
    ) -> None:
        self._engine, self._sampler = engine, sampler
        self._end_ids, self._token_bytes, self._max_length = end_ids, token_bytes, max_length
        self._trace = recorder()

    def run(self, requests: Sequence[Request], on_tokens: Callable[[int], None] = lambda count: None) -> Iterator[RequestOutput]:
        """Yields each request's output when all its continuations are finished.

        Args:
          requests: prompts that `check_prompt` has passed.
          on_tokens: told of the tokens of every step.
        """
        if not requests:
            return
        self._prepare(requests)
        progress = {request.number: self._begin(request) for request in requests}
        waiting = deque(c for request in requests for c in progress[request.number].continuations)
        slots: list[Continuation | None] = [None] * self._engine.num_seqs
        while waiting or any(slots):
            running = [(row, c) for row, c in enumerate(slots) if c is not None]
            admitted = self._admit(slots, waiting, self._engine.plan.prompt_tokens)
            if admitted:
                logits = self._engine.process_prompts(
                    [(row, np.asarray(c.request.prompt_token_ids, np.int32)) for row, c in admitted]
                )
                for _, c in admitted:
                    progress[c.request.number].mark("first_scheduled_time")
                self._extend(logits, admitted, on_tokens)
                for _, c in admitted:
                    progress[c.request.number].mark("first_token_time")
            else:
                self._extend(self._decode(running), running, on_tokens)
            yield from self._finished(slots, progress)

    def _prepare(self, requests: Sequence[Request]) -> None:
        """Sizes the engine for these requests, in powers of two so that the next call finds it compiled."""
        sequences = sequences_of(requests)
        most = self._engine.plan.num_seqs or self._engine.options.max_num_seqs
        num_seqs = min(most, 1 << (sequences - 1).bit_length())
        self._engine.prepare(num_seqs, min(longest_of(requests), self._max_length))
        self._sampler.warm_up(num_seqs, [request.sampling_params for request in requests])

    def _begin(self, request: Request) -> RequestProgress:
        return RequestProgress(request, max_length=self._max_length, end_ids=self._end_ids, token_bytes=self._token_bytes)

    @staticmethod
    def _admit(
        slots: list[Continuation | None], waiting: deque[Continuation], most_tokens: int
    ) -> list[tuple[int, Continuation]]:
        """Puts waiting continuations into free slots, in order, as many as pass through the layers together."""
        admitted: list[tuple[int, Continuation]] = []
        num_tokens = 0
        for row in (row for row, occupant in enumerate(slots) if occupant is None):
            if not waiting:
                break
            num_tokens += len(waiting[0].request.prompt_token_ids)
            if admitted and num_tokens > most_tokens:
                break
            continuation = waiting.popleft()
            slots[row] = continuation
            admitted.append((row, continuation))
        return admitted

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

    @staticmethod
    def _finished(slots: list[Continuation | None], progress: dict[int, RequestProgress]) -> Iterator[RequestOutput]:
        for row, continuation in enumerate(slots):
            if continuation is None or continuation.finish_reason is None:
                continue
            slots[row] = None
            state = progress.get(continuation.request.number)
            if state is not None and state.finished:  # None: another continuation of it ended in this step, too
                state.mark("finished_time")
                del progress[continuation.request.number]
                yield state.output()
