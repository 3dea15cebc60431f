"""The middle of a batch run: requests in, result lines out, until all are answered or somebody wants an end."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InflashError
from .batch_file import BatchFile
from .batch_requests import CHAT, SAMPLING_FIELDS
from .batch_results import failed_line, refused_line, success_line
from .grouping import alike_together, in_groups
from .outputs import RequestOutput
from .prompts import Prompt
from .requests import Request
from .result_writer import ResultWriter
from .run_size import RunSize
from .sampling_params import SamplingParams
from .step_times import StepTimes

if TYPE_CHECKING:
    from .llm import LLM

_TOO_LONG = "memory: prompt and answer may have {} tokens together, and there is room for {}; give more memory, or ask for fewer"
_LISTEN_S = 0.5  # how soon a paused run hears that it is to end


class BatchRun:
    """Answers the requests of a batch file that have no answer yet.

    Attributes:
      completed, refused, failed: answers so far, those of earlier runs included; of what was refused or failed before, nobody knows which.
      in_flight: requests that are being answered.
      draining: nothing new is begun.
    """

    def __init__(self, llm: "LLM", batch: BatchFile, done: np.ndarray, writer: ResultWriter, *, model: str) -> None:
        """Prepares a run.

        Args:
          llm: answers.
          batch: the requests.
          done: [len(batch)] bool, those that have an answer.
          writer: takes the result lines.
          model: the name to report.
        """
        self._llm, self._batch, self._done, self._writer, self._model = llm, batch, done, writer, model
        self._refusals: dict[int, str] = {}
        self._running: dict[str, int] = {}  # custom_id to the number of logprobs asked for
        self._longest = 0  # that memory has room for
        self.completed = self.refused = self.failed = 0
        self.draining = False

    @property
    def times(self) -> StepTimes:
        """What it has cost so far."""
        return self._llm.times

    @property
    def in_flight(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests that are not begun."""
        return len(self._batch) - self.completed - self.refused - self.failed - self.in_flight

    def measure(self, on_request: Callable[[], object]) -> RunSize:
        """Looks at every open request, so that room can be made for the longest that fits, and finds those that will be refused.

        Raises:
          ChatTemplateError: the model takes no messages.
          InflashError: memory has no room for any.
          RunError: the batch file was changed.
        """
        size = RunSize()
        for group in in_groups(map(int, np.flatnonzero(~self._done)), self._make):
            for _, request in group:
                if request is not None:
                    size.add(len(request.prompt_token_ids), request.sampling_params)
                on_request()
        if size.num_sequences:
            self._longest = self._llm.longest_fitting(size.longest)
        return size.up_to(self._longest, self._llm.max_model_len)

    def run(self, size: RunSize, on_tokens: Callable[[int], None], on_request: Callable[[], object]) -> None:
        """Answers what is open; ends early, with nothing in flight, when `draining` is set.

        Args:
          size: from `measure`.
          on_tokens, on_request: told of every step's tokens, and of every answer.
        """
        outputs = self._llm.stream(
            self._requests(on_request), on_tokens, size=size, ready=lambda: self._writer.ready and not self.draining
        )
        for output in outputs:
            self._answer(output)
            on_request()
        for _ in self._requests(on_request):  # where nothing could be run, what is left are refusals
            raise AssertionError("a request was left over")

    def _make(self, indices: Sequence[int]) -> list[Request | None]:
        """None for those that are refused; a chat that could be rendered when it was measured may be so at its turn."""
        open_ones = [index for index in indices if index not in self._refusals]
        made: dict[int, Request] = {}
        for index, each in zip(open_ones, self._llm.make_requests(map(self._asked, open_ones)), strict=True):
            if isinstance(each, InflashError):
                self._refusals[index] = str(each)
            else:
                made[index] = each
        return [made.get(index) for index in indices]

    def _asked(self, index: int) -> tuple[str, Prompt, SamplingParams, int]:
        entry = self._batch.request(index)
        return entry.custom_id, entry.prompt, entry.sampling_params, index

    def _requests(self, on_request: Callable[[], object]) -> Iterator[Request]:
        """What can be run, one by one, like prompts together; refuses the rest. Waits while no more results can be kept."""
        for index, request in alike_together(map(int, np.flatnonzero(~self._done)), self._make):
            while not self.draining and not self._writer.wait_ready(_LISTEN_S):
                pass
            if self.draining:
                return
            self._done[index] = True
            if request is None:
                self.refused += 1
                self._writer.write(self._refusal(index), succeeded=False)
                on_request()
                continue
            length = min(len(request.prompt_token_ids) + request.sampling_params.max_tokens, self._llm.max_model_len)
            if length > self._longest:
                self._fail(request.request_id, "out_of_memory", _TOO_LONG.format(length, self._longest))
                on_request()
                continue
            self._running[request.request_id] = request.sampling_params.logprobs or 0
            yield request

    def _refusal(self, index: int) -> dict[str, Any]:
        message = self._refusals.pop(index)
        field = message.partition(":")[0]
        if field not in SAMPLING_FIELDS:
            field = "messages" if self._batch.url == CHAT else "prompt"
        return refused_line(self._batch.request(index).custom_id, message, param=field)

    def _answer(self, output: RequestOutput) -> None:
        asked = self._running.pop(output.request_id)
        failure = next((completion.failure for completion in output.outputs if completion.failure), None)
        if failure is None:
            self.completed += 1
            line = success_line(output.request_id, output, self._model, int(time.time()), self._batch.url, top_logprobs=asked)
            self._writer.write(line, succeeded=True)
        else:
            self._fail(output.request_id, "model_error", failure)

    def _fail(self, custom_id: str, code: str, reason: str) -> None:
        self.failed += 1
        self._writer.write(failed_line(custom_id, code, reason), succeeded=False)
