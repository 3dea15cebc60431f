"""Around every pass of prompts and every step: what it costs is counted and shown, and nothing may follow one that ended early."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InflashError
from .host_memory import trim
from .live import LivePage
from .loader_pool import LoaderPool
from .step_times import StepTimes
from .trace import PROMPT, STEP, recorder

_TRIMMED_BYTES = 1 << 20  # of a pass's hidden states; what smaller ones leave the next pass fills


class StepTimer:
    """Counts on an engine's totals."""

    def __init__(self, times: StepTimes, pool: LoaderPool, live: LivePage, d_model: int) -> None:
        """Begins; `times` is counted on, `live` shows it after each pass and step."""
        self._row_bytes = 4 * d_model
        self._times, self._pool, self._live = times, pool, live
        self._trace, self._broken = recorder(), False

    @contextmanager
    def prompt(self, num_tokens: int) -> Iterator[None]:
        """Around a pass of so many tokens of prompts.

        Raises:
          InflashError: an earlier pass or step ended early.
        """
        began, requested = time.perf_counter_ns(), self._pool.bytes_requested
        with self._whole(), self._trace.span(PROMPT, value=num_tokens):
            yield
        if num_tokens * self._row_bytes >= _TRIMMED_BYTES:
            trim()  # the activations of many tokens leave holes that steps do not fill
        elapsed = time.perf_counter_ns() - began
        self._times.prompt_ns += elapsed
        self._times.total_ns += elapsed
        self._times.prompt_tokens += num_tokens
        self._times.prompt_bytes += self._pool.bytes_requested - requested
        self._live.update(self._times)

    @contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Around a decoding step of so many sequences.

        Raises:
          InflashError: an earlier pass or step ended early.
        """
        began, requested, wait_ns = time.perf_counter_ns(), self._pool.bytes_requested, self._pool.wait_ns
        self._trace.step = self._times.steps
        with self._whole(), self._trace.span(STEP, value=num_tokens):
            yield
        elapsed = time.perf_counter_ns() - began
        self._times.decode_ns += elapsed
        self._times.total_ns += elapsed
        self._times.io_wait_ns += self._pool.wait_ns - wait_ns
        self._times.decode_bytes += self._pool.bytes_requested - requested
        self._times.steps += 1
        self._times.tokens += num_tokens
        self._live.update(self._times)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A step that ends early leaves slots that were promised neurons and never got them: nothing may follow it."""
        if self._broken:
            raise InflashError("an earlier step of this model failed or was interrupted; make a new LLM")
        self._broken = True
        yield
        self._broken = False
