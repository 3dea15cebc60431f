"""What a run needs the engine to be ready for, whatever the number of its requests."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from .requests import Request
from .sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True)
class RunSize:
    """Grows by one request after the other.

    Attributes:
      num_sequences: continuations of all requests.
      longest: tokens of the longest, prompt and output.
      kinds: one of each kind of parameters that needs kernels of its own.
    """

    num_sequences: int = 0
    longest: int = 0
    kinds: dict[tuple[object, ...], SamplingParams] = field(default_factory=dict)

    @classmethod
    def of(cls, requests: Iterable[Request]) -> "RunSize":
        size = cls()
        for request in requests:
            size.add(len(request.prompt_token_ids), request.sampling_params)
        return size

    def add(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        self.num_sequences += params.n
        self.longest = max(self.longest, num_prompt_tokens + params.max_tokens)
        kind = (params.greedy, params.filtered, params.penalized, params.logprobs, params.min_tokens > 0)
        self.kinds.setdefault((*kind, len(params.stop_token_ids or ())), params)
