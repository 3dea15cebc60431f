"""The callable class by itself, as Ray calls it: columns in, columns out, no row to spoil the others. Nothing here needs ray."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import BUFFERED, make_store

from inflash import LLM, SamplingParams
from inflash.pipeline.ray import ERROR, TEXT, TextGenerator
from inflash.storage.store import Store

pytestmark = pytest.mark.filterwarnings(BUFFERED)

OPTIONS: dict[str, Any] = {"predictor": "exact", "max_num_seqs": 4, "queue_depth": 1}
PARAMS = {"max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = make_store(tmp_path_factory.mktemp("ray"), tokenizer=True, num_hidden_layers=1)
    (made.tokenizer_folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return made


@pytest.fixture
def generator(store: Store) -> Iterator[TextGenerator]:
    made = TextGenerator(store.path, sampling_params=PARAMS, id_column="id", **OPTIONS)
    yield made
    made.close()


def columns(**values: list[Any]) -> dict[str, np.ndarray]:
    """As Ray Data gives them: one array a column, objects where rows are no numbers."""
    found = {}
    for name, items in values.items():
        found[name] = np.empty(len(items), object)
        found[name][:] = items
    return found


def test_bad_rows_say_why_and_the_others_are_answered(generator: TextGenerator, store: Store) -> None:
    message = np.array([{"role": "user", "content": "sea"}], object)  # as Arrow's lists arrive
    batch = columns(
        id=list(range(8)),
        prompt=["sea", None, "", "x" * 99, None, "sea", "sea", "sea"],
        messages=[None, message, None, None, None, message, None, None],
        sampling_params=[
            {"temperature": 0.0, "max_tokens": np.int64(3), "seed": None},
            {"temperature": 0},
            *[None] * 4,
            {"n": 2},
            {"temperature": "hot"},
        ],
    )
    found = generator(batch)
    assert [*found] == [*batch, TEXT, ERROR]
    with LLM(store.path, **OPTIONS) as llm:
        (output,) = llm.generate("sea", SamplingParams(temperature=0, **PARAMS))
    assert found[TEXT] == [output.outputs[0].text, output.outputs[0].text, *[""] * 6]
    reasons = [
        "",
        "",
        "an empty string",
        "at most 63 tokens",
        "found neither",
        "found both",
        "n should be 1",
        "temperature should be",
    ]
    assert all(reason in error for reason, error in zip(reasons, found[ERROR], strict=True))
    assert found[ERROR][:2] == ["", ""] and all(found[ERROR][2:])


def test_a_row_s_text_depends_on_its_id_and_not_on_its_place(generator: TextGenerator) -> None:
    batch = columns(id=["a", "b", "c"], prompt=["sea"] * 3, sampling_params=[{"temperature": 20.0, "max_tokens": 8}] * 3)
    texts = generator(batch)[TEXT]
    assert len(set(texts)) == 3
    assert generator({name: column[::-1] for name, column in batch.items()})[TEXT] == texts[::-1]
    assert generator({name: column[1:2] for name, column in batch.items()})[TEXT] == texts[1:2]


def test_what_arrow_fills_in_for_other_rows_asks_for_nothing(generator: TextGenerator) -> None:
    biased = [{"logit_bias": {"99": 100.0, "100": None}, "n": None}, {"logit_bias": {"99": None, "100": 100.0}, "n": 1}]
    found = generator(columns(id=[1, 2], prompt=["sea"] * 2, sampling_params=biased))
    assert found[ERROR] == ["", ""]
    with LLM(generator._model, **OPTIONS) as llm:
        assert llm.tokenizer is not None
        assert found[TEXT] == [llm.tokenizer.decode([token] * 3) for token in (99, 100)]


def test_a_dead_loader_costs_a_new_start_and_no_row(generator: TextGenerator) -> None:
    batch = columns(id=[1, 2], prompt=["sea", "sky"])
    before = generator(batch)[TEXT]
    os.kill(generator._llm.engine.pool.process_ids[0], signal.SIGKILL)
    assert generator(batch) == {**batch, TEXT: before, ERROR: ["", ""]}


def test_no_rows_are_no_trouble(generator: TextGenerator) -> None:
    assert generator({"prompt": np.empty(0, object), "id": np.empty(0, object)})[TEXT] == []


def test_the_store_is_read_from_the_node_s_copy(store: Store, tmp_path: Path) -> None:
    generator = TextGenerator(store.path, copy_to=tmp_path / "flash", sampling_params=PARAMS, **OPTIONS)
    try:
        assert generator._llm.engine.store.path == tmp_path / "flash" / store.path.name
        assert generator(columns(prompt=["sea"]))[ERROR] == [""]
    finally:
        generator.close()
