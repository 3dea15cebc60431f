"""For Ray Data: a class for `Dataset.map_batches`, so that a job runs on as many machines as Ray has.

Ray places the work, moves the rows and starts what died again; each actor runs one model. Nothing here imports ray. See
examples/ray_batch.py.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InflashError, RunError
from .llm import LLM
from .outputs import RequestOutput
from .prompts import Prompt
from .requests import Request
from .sampling_params import SamplingParams
from .store_copy import local_copy

TEXT, ERROR = "generated_text", "__inference_error__"
_SEED_BYTES = 7  # within the range that a seed may have, whatever its sign


class TextGenerator:
    """Adds the columns `generated_text` and `__inference_error__` to rows with `prompt` or `messages`, and perhaps `sampling_params`.

    A row that cannot be run has an empty text and says why; the others have an empty error. When the engine fails, its model is made anew
    and the batch is tried once more. What a row's text is does not depend on the rows beside it (with `compute_dtype="float32"`), nor on
    how often it is tried: without a seed of its own it has one made of its id or its prompt.

    Example:
      dataset.map_batches(TextGenerator, fn_constructor_kwargs={"model": "opt-6.7b.inflash"}, batch_size=64, concurrency=2)
    """

    def __init__(
        self,
        model: str | Path,
        *,
        sampling_params: Mapping[str, Any] | None = None,
        id_column: str | None = None,
        copy_to: str | Path | None = None,
        **engine_options: Any,
    ) -> None:
        """Loads the model.

        Args:
          model: the store; the same path on every node, or on a disk that all share.
          sampling_params: `SamplingParams` fields for rows that do not give them.
          id_column: what tells rows apart, for their seeds.
          copy_to: a folder on each node, where the store is copied to once and then read from.
          engine_options: the other keyword arguments of `LLM`.

        Raises:
          InflashError: see `LLM` and `local_copy`.
        """
        self._given = dict(sampling_params or {})
        self._id_column = id_column
        self._model = model if copy_to is None else local_copy(model, copy_to)
        self._engine_options = engine_options
        self._llm = self._open()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Answers a batch of columns; returns them and two more."""
        num_rows = len(next(iter(batch.values()))) if batch else 0
        texts, errors, requests = [""] * num_rows, [""] * num_rows, []
        for number in range(num_rows):
            row = {name: _plain(column[number]) for name, column in batch.items()}
            try:
                requests.append(self._llm.make_request(str(number), _prompt(row), self._params(row), number))
            except InflashError as error:
                errors[number] = str(error)
        for output in self._answer(requests):
            (completion,) = output.outputs
            number = int(output.request_id)
            texts[number], errors[number] = ("", completion.failure) if completion.failure else (completion.text, "")
        return {**batch, TEXT: texts, ERROR: errors}

    def close(self) -> None:
        """Stops the model's processes. An actor need not: they end with it."""
        self._llm.close()

    def _open(self) -> LLM:
        return LLM(self._model, **self._engine_options)

    def _answer(self, requests: list[Request]) -> list[RequestOutput]:
        try:
            return list(self._llm.stream(requests))
        except (RunError, OSError):
            self._llm.close()
            self._llm = self._open()
            return list(self._llm.stream(requests))

    def _params(self, row: Mapping[str, Any]) -> SamplingParams:
        given = row.get("sampling_params") or {}
        if not isinstance(given, Mapping):
            raise InflashError(f"sampling_params should be an object, found {type(given).__name__}")
        params = SamplingParams.from_defaults(self._llm.generation_config, **{**self._given, **_filled(given)})
        if params.n != 1:
            raise InflashError(f"sampling_params: n should be 1, for one text a row, found {params.n}")
        if params.seed is None and not params.greedy:
            own = row[self._id_column] if self._id_column is not None else _prompt(row)
            digest = hashlib.blake2b(repr((self._llm.options.seed, own)).encode(), digest_size=_SEED_BYTES).digest()
            params = replace(params, seed=int.from_bytes(digest, "little"))
        return params


def _prompt(row: Mapping[str, Any]) -> Prompt:
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise InflashError("expected either prompt or messages in a row, found " + ("neither" if prompt is None else "both"))
    return {"messages": messages} if prompt is None else prompt


def _filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without the empty places that Arrow makes for what other rows have."""
    found = {name: _filled(value) if isinstance(value, Mapping) else value for name, value in given.items()}
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    """What NumPy and Arrow made of a value, as JSON would have it."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
