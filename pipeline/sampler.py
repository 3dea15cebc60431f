"""Chooses the next token of every sequence of a batch, with the cheapest kernel that serves them all.

Axes: B sequences, V vocabulary.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ..kernels import sampling
from ..kernels.compilation import jit
from .outputs import Logprob
from .requests import Continuation
from .sampling_params import SamplingParams
from .text import TokenBytes
from .weights import zeros

_greedy = jit(sampling.greedy)
_checked_greedy = jit(lambda logits: jnp.where(_finite(logits), sampling.greedy(logits), _NOT_FINITE))
_sample = jit(sampling.sample)
_sample_filtered = jit(sampling.sample_filtered)
_penalize = jit(sampling.penalize)
_suppress = jit(sampling.suppress)
_bias = jit(sampling.bias)
_top_logprobs = jit(sampling.top_logprobs, static_argnames="k")
_token_logprobs = jit(sampling.token_logprobs)
_finite_rows = jit(lambda logits: _finite(logits))

_IDS = 8  # ids forbidden or biased at once are padded to a multiple of this
_NOT_FINITE = -1  # in the place of a token


def _finite(logits: jax.Array) -> jax.Array:
    """[B, V] to [B] bool."""
    return jnp.all(jnp.isfinite(logits), axis=1)


class Sampler:
    """Sampling for a fixed number of rows. A row's tokens depend on its own seed and place only."""

    def __init__(self, vocab_size: int, seed: int, token_bytes: TokenBytes | None) -> None:
        self._vocab_size, self._seed, self._token_bytes = vocab_size, seed, token_bytes
        self._most_logprobs = self._forbidden_width = self._bias_width = 0

    def warm_up(self, num_rows: int, params: Sequence[SamplingParams]) -> None:
        """Compiles the kernels that requests like these will need."""
        logits = zeros((num_rows, self._vocab_size))
        _checked_greedy(logits)
        _greedy(logits)
        _finite_rows(logits)
        if any(not p.greedy for p in params):
            temperature, seeds, index = (
                np.ones(num_rows, np.float32),
                np.zeros((num_rows, 2), np.uint32),
                np.zeros(num_rows, np.int32),
            )
            _sample(logits, temperature, seeds, index)
            if any(p.filtered for p in params):
                _sample_filtered(logits, temperature, index, temperature, temperature, seeds, index)
        if any(p.logprobs is not None for p in params):
            _token_logprobs(logits, np.zeros(num_rows, np.int32))
        if most := max((p.logprobs or 0 for p in params), default=0):
            self._most_logprobs = most
            _top_logprobs(logits, k=most)
        if any(p.penalized for p in params):
            counts, column = np.zeros(logits.shape, np.int32), np.ones(num_rows, np.float32)
            _penalize(logits, counts, counts, column, column, column)
        if any(p.min_tokens for p in params):
            longest = max(len(p.stop_token_ids or ()) for p in params) + _IDS  # with room for the model's own end tokens
            self._forbidden_width = _padded(longest)
            _suppress(logits, np.zeros((num_rows, self._forbidden_width), np.int32))
        if longest := max((len(p.biases) for p in params), default=0):
            self._bias_width = _padded(longest)
            shape = (num_rows, self._bias_width)
            _bias(logits, np.zeros(shape, np.int32), np.zeros(shape, np.float32))

    def choose(self, logits: jax.Array, rows: Sequence[tuple[int, Continuation]]) -> dict[int, int]:
        """The next token of each (row, continuation); notes logprobs in those that want them."""
        if all(c.plain for _, c in rows):  # the ordinary case: one call, and one look at each row
            found = np.asarray(_checked_greedy(logits)).tolist()
            _fail_rows([c for row, c in rows if found[row] == _NOT_FINITE])
            return {row: found[row] for row, _ in rows if found[row] != _NOT_FINITE}
        original = logits
        finite = np.asarray(_finite_rows(logits))
        _fail_rows([c for row, c in rows if not finite[row]])
        rows = [(row, c) for row, c in rows if c.finish_reason is None]
        if not rows:
            return {}
        num_rows = logits.shape[0]
        if any(c.params.logit_bias for _, c in rows):
            logits = self._biased(logits, rows)
        if any(c.params.penalized for _, c in rows):
            logits = self._penalized(logits, rows)
        if any(c.forbidden_ids() for _, c in rows):
            logits = self._suppressed(logits, rows)
        if all(c.params.greedy for _, c in rows):
            chosen = np.asarray(_greedy(logits))
        else:
            temperature = self._column(num_rows, rows, "temperature", 0.0, np.float32)
            seeds, index = np.zeros((num_rows, 2), np.uint32), np.zeros(num_rows, np.int32)
            for row, continuation in rows:
                seeds[row], index[row] = self._seed_words(continuation), len(continuation.token_ids)
            if any(c.params.filtered for _, c in rows):
                top_k = np.maximum(self._column(num_rows, rows, "top_k", 0, np.int32), 0)
                top_p = self._column(num_rows, rows, "top_p", 1.0, np.float32)
                min_p = self._column(num_rows, rows, "min_p", 0.0, np.float32)
                chosen = np.asarray(_sample_filtered(logits, temperature, top_k, top_p, min_p, seeds, index))
            else:
                chosen = np.asarray(_sample(logits, temperature, seeds, index))
        tokens = {row: int(chosen[row]) for row, _ in rows}
        if any(c.params.logprobs is not None for _, c in rows):
            self._note_logprobs(original, rows, tokens)
        return tokens

    def _seed_words(self, continuation: Continuation) -> np.ndarray:
        seed = continuation.params.seed
        if seed is not None:
            return sampling.seed_words(seed, continuation.index)
        return sampling.seed_words(self._seed, continuation.request.number, continuation.index)

    @staticmethod
    def _column(num_rows: int, rows: Sequence[tuple[int, Continuation]], name: str, neutral: float, dtype: type) -> np.ndarray:
        column = np.full(num_rows, neutral, dtype)
        for row, continuation in rows:
            column[row] = getattr(continuation.params, name)
        return column

    def _penalized(self, logits: jax.Array, rows: Sequence[tuple[int, Continuation]]) -> jax.Array:
        num_rows = logits.shape[0]
        prompt_counts = np.zeros((num_rows, self._vocab_size), np.int32)
        output_counts = np.zeros((num_rows, self._vocab_size), np.int32)
        for row, continuation in rows:
            if continuation.params.penalized:
                np.add.at(prompt_counts[row], np.asarray(continuation.request.prompt_token_ids), 1)
                np.add.at(output_counts[row], np.asarray(continuation.token_ids, int), 1)
        return _penalize(
            logits,
            prompt_counts,
            output_counts,
            self._column(num_rows, rows, "repetition_penalty", 1.0, np.float32),
            self._column(num_rows, rows, "presence_penalty", 0.0, np.float32),
            self._column(num_rows, rows, "frequency_penalty", 0.0, np.float32),
        )

    def _suppressed(self, logits: jax.Array, rows: Sequence[tuple[int, Continuation]]) -> jax.Array:
        forbidden = {row: continuation.forbidden_ids() for row, continuation in rows}
        width = max(self._forbidden_width, _padded(max(map(len, forbidden.values()))))
        token_ids = np.full((logits.shape[0], width), self._vocab_size, np.int32)  # the padding forbids nothing
        for row, ids in forbidden.items():
            token_ids[row, : len(ids)] = ids
        return _suppress(logits, token_ids)

    def _biased(self, logits: jax.Array, rows: Sequence[tuple[int, Continuation]]) -> jax.Array:
        width = max(self._bias_width, _padded(max(len(c.params.biases) for _, c in rows)))
        token_ids = np.full((logits.shape[0], width), self._vocab_size, np.int32)  # the padding biases nothing
        values = np.zeros(token_ids.shape, np.float32)
        for row, continuation in rows:
            if biases := continuation.params.biases:
                token_ids[row, : len(biases)], values[row, : len(biases)] = zip(*biases, strict=True)
        return _bias(logits, token_ids, values)

    def _note_logprobs(self, logits: jax.Array, rows: Sequence[tuple[int, Continuation]], tokens: dict[int, int]) -> None:
        chosen = np.zeros(logits.shape[0], np.int32)
        for row, token in tokens.items():
            chosen[row] = token
        own, rank = (np.asarray(values) for values in _token_logprobs(logits, chosen))
        # Always the most that any request of the run wants: another number would compile another kernel.
        most = max(self._most_logprobs, *(c.params.logprobs or 0 for _, c in rows))
        top = tuple(np.asarray(values) for values in _top_logprobs(logits, k=most)) if most else None
        for row, continuation in rows:
            if continuation.params.logprobs is None:
                continue
            place = {}
            if top is not None:
                for order in range(continuation.params.logprobs):
                    token = int(top[1][row, order])
                    place[token] = Logprob(logprob=float(top[0][row, order]), rank=order + 1, decoded_token=self._text(token))
            token = tokens[row]
            place[token] = Logprob(logprob=float(own[row]), rank=int(rank[row]), decoded_token=self._text(token))
            continuation.logprobs.append(place)

    def _text(self, token: int) -> str | None:
        return None if self._token_bytes is None else self._token_bytes.text(token)


def _padded(count: int) -> int:
    return -(-count // _IDS) * _IDS


def _fail_rows(continuations: Sequence[Continuation]) -> None:
    for continuation in continuations:
        continuation.fail("the model's scores are NaN or infinite; `inflash verify` tells whether the store is damaged")
