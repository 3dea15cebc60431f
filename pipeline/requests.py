"""A request on its way: what was asked, and each of its continuations while it grows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import InflashError
from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from .sampling_params import SamplingParams
from .text import TextStream, TokenBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be continued.

    Attributes:
      request_id: the caller's name for it.
      prompt: its text, if it came as text.
      prompt_token_ids: what the model will see.
      sampling_params: how to continue.
      number: place among the requests of a call; seeds those that bring no seed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams
    number: int


def check_prompt(token_ids: Sequence[int], vocab_size: int, max_length: int) -> None:
    """Refuses what the model cannot take.

    Raises:
      InflashError: the prompt is empty, has ids beyond the vocabulary, or leaves no room for one token.
    """
    if len(token_ids) == 0:
        raise InflashError("prompt: expected at least one token, found none")
    if bad := [token for token in token_ids if not 0 <= token < vocab_size]:
        raise InflashError(f"prompt: token ids should be from 0 to {vocab_size - 1}, found {bad[0]}")
    if len(token_ids) >= max_length:
        raise InflashError(
            f"prompt: at most {max_length - 1} tokens fit (the limit is {max_length}, one is for the answer), "
            f"found {len(token_ids)}; shorten it or raise max_model_len if the model has more positions"
        )


@dataclass(slots=True)
class Continuation:
    """One of a request's `n` continuations.

    Attributes:
      request: what it belongs to.
      index: which of the n.
      most_tokens: it ends with this many, by `max_tokens` or for want of positions.
      plain: its tokens are the most likely ones, and no more is asked for, see `SamplingParams`.
      num_cached_tokens: of the prompt, that were not computed for it; None before it is begun.
      token_ids: what was generated so far.
    """

    request: Request
    index: int
    most_tokens: int
    plain: bool
    end_ids: frozenset[int]
    stream: TextStream
    num_cached_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def params(self) -> SamplingParams:
        return self.request.sampling_params

    @property
    def position(self) -> int:
        """Of the newest token."""
        return len(self.request.prompt_token_ids) + len(self.token_ids) - 1

    def forbidden_ids(self) -> list[int]:
        """Tokens that must not come now, because they would end the text before `min_tokens`."""
        if len(self.token_ids) >= self.params.min_tokens:
            return []
        return sorted(self.end_ids | set(self.params.stop_token_ids or ()))

    def push(self, token_id: int) -> None:
        """Adds a token, and finds out whether it is the last."""
        self.token_ids.append(token_id)
        params = self.request.sampling_params
        may_stop = len(self.token_ids) >= params.min_tokens
        if params.stop_token_ids and token_id in params.stop_token_ids and may_stop:
            self.finish_reason, self.stop_reason = "stop", token_id
        elif token_id in self.end_ids and may_stop:
            self.finish_reason = "stop"
        elif (matched := self._add_text(token_id, may_stop=may_stop)) is not None:
            self.finish_reason, self.stop_reason = "stop", matched
        elif len(self.token_ids) >= self.most_tokens:
            self.finish_reason = "length"

    def _add_text(self, token_id: int, *, may_stop: bool) -> str | None:
        """The stop string that is complete now. A token that is only a part of a character has no text, the last part has all of it."""
        matched = self.stream.push(token_id, may_stop=may_stop)
        if self.logprobs and (place := self.logprobs[-1])[token_id].decoded_token is not None:
            place[token_id] = replace(place[token_id], decoded_token=self.stream.piece)
        return matched

    def fail(self, reason: str) -> None:
        """Ends it without another token, for a fault that is not the request's."""
        self.finish_reason, self.stop_reason = "error", reason

    def output(self) -> CompletionOutput:
        wanted = self.params.logprobs is not None
        chosen = [place[token].logprob for place, token in zip(self.logprobs, self.token_ids, strict=True)] if wanted else []
        return CompletionOutput(
            index=self.index,
            text=self.stream.text,
            token_ids=list(self.token_ids),
            cumulative_logprob=sum(chosen) if wanted else None,
            logprobs=list(self.logprobs) if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class RequestProgress:
    """A request and its continuations, until all of them are finished."""

    def __init__(self, request: Request, *, max_length: int, end_ids: frozenset[int], token_bytes: TokenBytes | None) -> None:
        params = request.sampling_params
        room = max_length - len(request.prompt_token_ids)
        self.request = request
        self._times: dict[str, float] = {"arrival_time": time.monotonic()}
        self.continuations = [
            Continuation(
                request=request,
                index=index,
                most_tokens=min(params.max_tokens, room),
                plain=params.plain,
                end_ids=frozenset() if params.ignore_eos else end_ids,
                stream=TextStream(token_bytes, params.stop_strings),
            )
            for index in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        return all(continuation.finish_reason is not None for continuation in self.continuations)

    def mark(self, event: str) -> None:
        """Notes the time of an event ("first_scheduled_time", "first_token_time", "finished_time") when it is the first."""
        if event not in self._times:
            self._times[event] = time.monotonic()

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=list(self.request.prompt_token_ids),
            outputs=[continuation.output() for continuation in self.continuations],
            finished=self.finished,
            metrics=RequestMetrics(**self._times),
            num_cached_tokens=self.continuations[0].num_cached_tokens,  # what the others share is the request's own
        )
