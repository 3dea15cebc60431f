"""Which tokens of prompts pass through the layers next: a bounded number, so that decoding goes on between two passes.

A prompt that begins as another one shares its blocks and reads what that one has written, so prompts pass in the order in which they were
admitted, and nobody follows a prompt that was cut before all of it has passed.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from .block_pool import BLOCK_SIZE
from .kv_cache import KVCache
from .requests import Continuation


@dataclass(frozen=True, slots=True)
class PromptPart:
    """What of a prompt passes at once.

    Attributes:
      row, continuation: whose it is.
      token_ids: [T] int32, the prompt up to the end of the part; it begins where the KV cache's `num_cached` says.
    """

    row: int
    continuation: Continuation
    token_ids: np.ndarray

    @property
    def is_last(self) -> bool:
        return len(self.token_ids) == len(self.continuation.request.prompt_token_ids)


class PromptPasses:
    """Admits continuations to slots, and divides their prompts into passes."""

    def __init__(self, cache: KVCache, most_tokens: int) -> None:
        """Makes passes of at most so many tokens, or of a block, over prompts in this cache."""
        self._cache, self._most_tokens = cache, max(most_tokens, BLOCK_SIZE)
        self._cut: PromptPart | None = None
        self._idle = 0  # slots that somebody waits for, summed over steps since the last pass

    def next_pass(self, slots: list[Continuation | None], waiting: deque[Continuation]) -> list[PromptPart]:
        """What goes on or begins now; nothing when no slot, or no memory, is free, or too few slots for a pass to be worth it.

        A prompt that has more tokens than a pass is cut; one that only does not fit into the rest of this pass begins with the next.

        Args:
          slots: who is admitted is put here,
          waiting: and taken from here, in order.
        """
        parts, left = list[PromptPart](), self._most_tokens
        if self._cut is None and not self._is_worth_it(slots, waiting):
            return parts
        if self._cut is not None:
            row = self._cut.row
            self._cache.num_cached[row] = len(self._cut.token_ids)
            left -= self._add(parts, row, self._cut.continuation, left)
        for row in (row for row, occupant in enumerate(slots) if occupant is None):
            if not waiting or self._cut is not None:
                break
            token_ids = _prompt(waiting[0])
            num_tokens = len(token_ids) - self._cache.pool.num_cached(token_ids)
            if left < (num_tokens if num_tokens <= self._most_tokens else BLOCK_SIZE):
                break
            if not self._cache.admit(row, token_ids, len(token_ids) + waiting[0].most_tokens):
                break
            slots[row] = continuation = waiting.popleft()
            left -= self._add(parts, row, continuation, left)
        self._idle = 0 if parts else self._idle
        return parts

    def _is_worth_it(self, slots: list[Continuation | None], waiting: deque[Continuation]) -> bool:
        """Whether idle slots have cost half a step by now, or nobody decodes. Every pass streams all layers, however few its tokens."""
        free = slots.count(None)
        self._idle += min(free, len(waiting))
        return free == len(slots) or 2 * self._idle >= len(slots)

    def _add(self, parts: list[PromptPart], row: int, continuation: Continuation, left: int) -> int:
        """Adds as much of a prompt as fits, whole blocks of it or all; how many tokens that are."""
        token_ids, start = _prompt(continuation), self._cache.num_cached[row]
        fits = len(token_ids) - start <= left
        part = PromptPart(row, continuation, token_ids if fits else token_ids[: start + left // BLOCK_SIZE * BLOCK_SIZE])
        parts.append(part)
        self._cut = None if fits else part
        return len(part.token_ids) - start


def _prompt(continuation: Continuation) -> np.ndarray:
    """[T] int32."""
    return np.asarray(continuation.request.prompt_token_ids, np.int32)
