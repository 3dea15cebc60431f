"""What a request may ask of its continuation, under vLLM's names and with vLLM's defaults."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from ..errors import InflashError

MAX_N = 128
MAX_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_BIASES, MOST_BIAS = 1024, 100
GENERATION_CONFIG = {  # Hugging Face's name: ours
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Attributes:
      n: continuations of the prompt, 1 to 128.
      temperature: 0 for the most likely token always; else the softmax's temperature, up to 1000.
      top_p: smallest share of the probability, in [0, 1], that the tokens to draw from must hold; 0 leaves the most likely one.
      top_k: number of most likely tokens to draw from; 0 or -1 for all.
      min_p: least probability, as a share in [0, 1] of the most likely token's, of a token to draw.
      seed: same seed, same text; None for one of the engine's.
      stop: strings that end the text, which is cut before them. A list is kept as a tuple.
      stop_token_ids: tokens that end the text. A list is kept as a tuple.
      ignore_eos: go on after the end-of-text token.
      max_tokens: most tokens to generate.
      min_tokens: nothing stops the text before so many tokens.
      logprobs: number of most likely tokens, up to 20, to report at each place beside the chosen one; None for no report.
      repetition_penalty: divides the likelihood of tokens of prompt and output, 0.001 to 1000; 1 is neutral.
      presence_penalty: subtracted from the logit of tokens of the output, -2 to 2.
      frequency_penalty: subtracted for every occurrence in the output, -2 to 2.
      logit_bias: {token id: added to its logit, -100 to 100}, before penalties; for up to 1024 tokens. Kept as a tuple of pairs.

    Raises:
      InflashError: for a value of the wrong type or out of its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None

    def __post_init__(self) -> None:
        self._integer("n", 1, MAX_N)
        self._number("temperature", 0, 1000)
        self._number("top_p", 0, 1)
        self._integer("top_k", -1, MAX_TOKENS)
        self._number("min_p", 0, 1)
        self._integer("max_tokens", 1, MAX_TOKENS)
        self._integer("min_tokens", 0, MAX_TOKENS)
        self._number("repetition_penalty", 0.001, 1000)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1)
        if self.logprobs is not None:
            self._integer("logprobs", 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", "true or false", self.ignore_eos)
        if self.min_tokens > self.max_tokens:
            raise _wrong("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        self._set("stop", _stop(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        self._set("logit_bias", _logit_bias(self.logit_bias))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, always as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias`, always as a tuple."""
        return tuple(self.logit_bias or ())  # pyright: ignore[reportReturnType] - pairs since it was checked

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether top_k, top_p or min_p keeps some tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalized(self) -> bool:
        """Whether some penalty changes the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def plain(self) -> bool:
        """Whether the most likely token is all that is asked for."""
        return self.greedy and not self.penalized and self.logprobs is None and not self.min_tokens and not self.logit_bias

    @classmethod
    def from_defaults(cls, generation_config: Mapping[str, Any], **given: Any) -> "SamplingParams":
        """What was given, and the model's own defaults for the rest.

        Args:
          generation_config: content of the model's `generation_config.json`; nulls and what has no counterpart here do not count.
          given: fields of this class by name, the request's put over the command line's; None means not given.

        Raises:
          InflashError: for an unknown field, or a value out of its range; says so when it is the model's.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise InflashError(f"sampling parameters: unknown {', '.join(unknown)}; known are {', '.join(names)}")
        given = {name: value for name, value in given.items() if value is not None}
        defaults = {ours: generation_config.get(theirs) for theirs, ours in GENERATION_CONFIG.items()}
        defaults = {name: value for name, value in defaults.items() if value is not None}
        if defaults:
            try:
                cls(**defaults)
            except InflashError as error:
                raise InflashError(f"generation_config.json: {error}; correct the model's file") from error
        return cls(**{**defaults, **given})

    def _integer(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not _is_number(value, Integral) or not least <= value <= most:
            raise _wrong(name, f"an integer from {least} to {most}", value)
        self._set(name, int(value))

    def _number(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if not _is_number(value, Real) or not least <= value <= most:
            raise _wrong(name, f"a number from {least} to {most}", value)
        self._set(name, float(value))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the frozen dataclass is still being made


def _wrong(name: str, expected: str, found: Any) -> InflashError:
    shown = repr(found) if not isinstance(found, int) or abs(found) < 10**30 else "an integer of more than 30 digits"
    return InflashError(f"{name} should be {expected}, found {shown if len(shown) <= 80 else shown[:77] + '...'}")


def _stop(stop: Any) -> str | tuple[str, ...] | None:
    strings = (stop,) if isinstance(stop, str) else stop
    if strings is None:
        return None
    if not isinstance(strings, (list, tuple)) or not all(isinstance(string, str) and string for string in strings):
        raise _wrong("stop", "a string or a list of strings, none of them empty", stop)
    return stop if isinstance(stop, str) else tuple(strings)


def _stop_token_ids(token_ids: Any) -> tuple[int, ...] | None:
    if token_ids is None:
        return None
    if not isinstance(token_ids, (list, tuple)) or not all(_is_token_id(token) for token in token_ids):
        raise _wrong("stop_token_ids", "a list of token ids (integers of at least 0)", token_ids)
    return tuple(int(token) for token in token_ids)


def _logit_bias(given: Any) -> tuple[tuple[int, float], ...] | None:
    """Token ids may be strings of digits, as JSON has no other names."""
    if given is None:
        return None
    pairs = list(given.items() if isinstance(given, Mapping) else given) if isinstance(given, (Mapping, list, tuple)) else None
    if pairs is None or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise _wrong("logit_bias", "biases by token ids", given)
    if len(pairs) > MAX_BIASES:
        raise _wrong("logit_bias", f"for at most {MAX_BIASES} tokens", len(pairs))
    biases: dict[int, float] = {}
    for token, bias in pairs:
        named = isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= len(str(MAX_TOKENS))
        token_id = int(token) if named else token
        if not _is_token_id(token_id) or token_id in biases:
            raise _wrong("logit_bias", f"biases by token ids (integers from 0 to {MAX_TOKENS}, each once)", token)
        if not _is_number(bias, Real) or not -MOST_BIAS <= bias <= MOST_BIAS:
            raise _wrong(f"logit_bias of token {token_id}", f"a number from {-MOST_BIAS} to {MOST_BIAS}", bias)
        biases[int(token_id)] = float(bias)
    return tuple(biases.items())


def _is_token_id(token: Any) -> bool:
    return _is_number(token, Integral) and 0 <= token <= MAX_TOKENS


def _is_number(value: Any, kind: type) -> bool:
    if type(value) in (int, float):  # nearly always; the abstract classes take ten times as long
        return kind is Real or type(value) is int
    return isinstance(value, kind) and not isinstance(value, bool)
