"""What a run needs the engine to be ready for, whatever the number of its requests."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from .block_pool import BLOCK_SIZE, num_blocks_for
from .requests import Request
from .sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True)
class RunSize:
    """Grows by one request after the other.

    Attributes:
      num_sequences: continuations of all requests.
      lengths: how many continuations may become how long, prompt and output.
      longest: tokens of the longest, prompt and output.
      kinds: one of each kind of parameters that needs kernels of its own.
    """

    num_sequences: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    kinds: dict[tuple[object, ...], SamplingParams] = field(default_factory=dict)

    @classmethod
    def of(cls, requests: Iterable[Request]) -> "RunSize":
        size = cls()
        for request in requests:
            size.add(len(request.prompt_token_ids), request.sampling_params)
        return size

    def add(self, num_prompt_tokens: int, params: SamplingParams) -> None:
        self.num_sequences += params.n
        length = num_prompt_tokens + params.max_tokens
        self.longest = max(self.longest, length)
        self.lengths[length] += params.n
        kind = (params.greedy, params.filtered, params.penalized, params.logprobs, params.min_tokens > 0)
        self.kinds.setdefault((*kind, len(params.stop_token_ids or ()), len(params.biases)), params)

    def up_to(self, longest: int, max_length: int) -> "RunSize":
        """Without the continuations that become longer than `longest`; none becomes longer than `max_length`."""
        lengths = Counter({length: count for length, count in self.lengths.items() if min(length, max_length) <= longest})
        return replace(self, num_sequences=lengths.total(), longest=max(lengths, default=0), lengths=lengths)

    def num_positions(self, num_seqs: int, max_length: int) -> int:
        """Of a KV cache in which the longest `num_seqs` continuations, none beyond `max_length`, fit beside each other."""
        total = 0
        for length, count in sorted(self.lengths.items(), reverse=True):
            taken = min(count, num_seqs)
            total += taken * num_blocks_for(min(length, max_length)) * BLOCK_SIZE
            num_seqs -= taken
        return total
