"""What a run gives back, under vLLM's names."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprob:
    """How likely one token was at one place.

    Attributes:
      logprob: natural log of its probability under the model itself, before penalties and temperature.
      rank: 1 for the most likely token; None when it was not asked for.
      decoded_token: its text; None without a tokenizer. For a generated token, the characters that it completed.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One of the `n` continuations of a prompt.

    Attributes:
      index: which of the n, from 0.
      text: the continuation, without the stop string; empty without a tokenizer.
      token_ids: every generated token, the one that ended it included.
      cumulative_logprob: sum of the generated tokens' logprobs; None unless `logprobs` was asked for.
      logprobs: for each generated token, the most likely ones and itself by id; None unless asked for.
      finish_reason: "stop" or "length", or "error" when the model failed; None while it is not finished.
      stop_reason: the stop string or the id in `stop_token_ids` that ended it, or what failed; None for the end-of-text token and for
        "length".
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def failure(self) -> str | None:
        """What failed, for finish_reason "error"."""
        return str(self.stop_reason) if self.finish_reason == "error" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """When things happened to a request, in seconds of one clock; None for what did not happen.

    Attributes:
      arrival_time: it was handed over.
      first_scheduled_time: its prompt began to be processed.
      first_token_time: its first token was chosen.
      finished_time: its last continuation ended.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_in_queue(self) -> float | None:
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations.

    Attributes:
      request_id: the engine's name for the request.
      prompt: its text; None when it came as token ids.
      prompt_token_ids: what the model saw.
      outputs: the n continuations in order.
      finished: none of them goes on.
      metrics: when things happened to it.
      num_cached_tokens: of the prompt, those that had been computed for another one that begins alike; None where it was not begun.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    metrics: RequestMetrics | None = None
    num_cached_tokens: int | None = None
