"""The middle of a batch run: requests in, result lines out, until all are answered or somebody wants an end."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True, kw_only=True)
class _Answer:
    """What a line that was begun has so far, by the places of its prompts."""

    num_prompts: int
    top_logprobs: int
    outputs: dict[int, RequestOutput] = field(default_factory=dict)


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
        self._begun: dict[str, _Answer] = {}  # by custom_id
        self._partly_begun = False  # the line that was begun last has more prompts
        self._longest = 0  # that memory has room for
        self.completed = self.refused = self.failed = 0
        self.draining = False

    @property
    def times(self) -> StepTimes:
        """What it has cost so far."""
        return self._llm.times

    @property
    def in_flight(self) -> int:
        return len(self._begun)

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
        for group in in_groups(map(int, np.flatnonzero(~self._done)), self._make, self._batch.num_bytes):
            for _, requests in group:
                for request in requests or ():
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
            self._requests(on_request),
            on_tokens,
            size=size,
            ready=lambda: self._partly_begun or (self._writer.ready and not self.draining),
        )
        for output in outputs:
            if self._answered(output):
                on_request()
        for _ in self._requests(on_request):  # where nothing could be run, what is left are refusals
            raise AssertionError("a request was left over")

    def _make(self, indices: Sequence[int]) -> list[list[Request] | None]:
        """Requests by lines, each named PLACE:CUSTOM_ID by its place among the line's prompts; None for lines that are refused.

        A chat that could be rendered when it was measured may be refused at its turn.
        """
        open_ones = [index for index in indices if index not in self._refusals]
        made: dict[int, list[Request]] = {index: [] for index in open_ones}
        places: list[tuple[int, str]] = []

        def asked() -> Iterator[tuple[str, Prompt, SamplingParams, int]]:
            for index in open_ones:
                entry = self._batch.request(index)
                for place, prompt in enumerate(entry.prompts):
                    places.append((index, f"prompt[{place}]" if len(entry.prompts) > 1 else "prompt"))
                    yield f"{place}:{entry.custom_id}", prompt, entry.sampling_params, index + place * len(self._batch)

        for each, (index, where) in zip(self._llm.make_requests(asked()), places, strict=True):  # places grow with what is asked
            if index in self._refusals:
                continue
            if isinstance(each, InflashError):
                self._refusals[index] = re.sub("^prompt:", f"{where}:", str(each))
                made[index].clear()
            else:
                made[index].append(each)
        return [None if index in self._refusals else made[index] for index in indices]

    def _requests(self, on_request: Callable[[], object]) -> Iterator[Request]:
        """What can be run, one by one, like prompts together; refuses the rest. Waits while no more results can be kept."""
        for index, requests in alike_together(map(int, np.flatnonzero(~self._done)), self._make, self._batch.num_bytes):
            while not self.draining and not self._writer.wait_ready(_LISTEN_S):
                pass
            if self.draining:
                return
            self._done[index] = True
            if requests is None:
                self.refused += 1
                self._writer.write(self._refusal(index), succeeded=False)
                on_request()
                continue
            custom_id, params = requests[0].request_id.partition(":")[2], requests[0].sampling_params
            length = max(len(request.prompt_token_ids) for request in requests) + params.max_tokens
            if (length := min(length, self._llm.max_model_len)) > self._longest:
                self._fail(custom_id, "out_of_memory", _TOO_LONG.format(length, self._longest))
                on_request()
                continue
            self._begun[custom_id] = _Answer(num_prompts=len(requests), top_logprobs=params.logprobs or 0)
            for place, request in enumerate(requests, 1):
                self._partly_begun = place < len(requests)
                yield request

    def _refusal(self, index: int) -> dict[str, Any]:
        message = self._refusals.pop(index)
        field = message.partition(":")[0]
        if field not in SAMPLING_FIELDS:
            field = "messages" if self._batch.url == CHAT else "prompt"
        return refused_line(self._batch.request(index).custom_id, message, param=field)

    def _answered(self, output: RequestOutput) -> bool:
        """Keeps what became of a prompt; writes the line's result, and says so, with its last one."""
        place, _, custom_id = output.request_id.partition(":")
        answer = self._begun[custom_id]
        answer.outputs[int(place)] = output
        if len(answer.outputs) < answer.num_prompts:
            return False
        del self._begun[custom_id]
        outputs = [answer.outputs[place] for place in range(answer.num_prompts)]
        completions = (completion for output in outputs for completion in output.outputs)
        failure = next((completion.failure for completion in completions if completion.failure), None)
        if failure is not None:
            self._fail(custom_id, "model_error", failure)
            return True
        self.completed += 1
        line = success_line(custom_id, outputs, self._model, int(time.time()), self._batch.url, answer.top_logprobs)
        self._writer.write(line, succeeded=True)
        return True

    def _fail(self, custom_id: str, code: str, reason: str) -> None:
        self.failed += 1
        self._writer.write(failed_line(custom_id, code, reason), succeeded=False)
