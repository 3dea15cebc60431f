"""`inflash bench llm`: what it feeds to the engine, what it prints, and what it refuses."""

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from tiny_models import BUFFERED, make_store

from inflash.pipeline import engine as engine_module
from inflash.pipeline import host_memory
from inflash.pipeline.engine import Engine
from inflash.pipeline.plan import plan_from_options
from inflash.storage.store import Store
from inflash.tools import arguments as flags
from inflash.tools import cli

pytestmark = pytest.mark.filterwarnings(BUFFERED)

POSITIONS = 96
QUICK = ("--loaders", "1", "--queue-depth", "1", "--predictor", "exact", "-r", "2")
RESULT_KEYS = {"test", "prompt_tokens", "generated_tokens", "tokens_per_s", "standard_deviation", "repetitions", "samples"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("model"), num_hidden_layers=1, max_position_embeddings=POSITIONS)


class RecordingEngine:
    """Stands for the engine: takes a known time for every token, and notes what it is asked for."""

    SECONDS: ClassVar = {"prompt": 1e-3, "step": 1e-2}
    made: ClassVar[list["RecordingEngine"]] = []

    def __init__(self, store: Store, options: Any) -> None:
        self.store, self.config, self.options, self.plan = store, store.config, options, plan_from_options(store, options)
        self.prepared: list[tuple[int, int]] = []
        self.prompts: list[list[tuple[int, np.ndarray]]] = []
        self.steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.now = 0.0
        self.made.append(self)

    def prepare(self, num_seqs: int, max_length: int) -> None:
        self.now += 100  # compiling does not count
        self.prepared.append((num_seqs, max_length))

    def process_prompts(self, prompts: list[tuple[int, np.ndarray]]) -> None:
        self.now += self.SECONDS["prompt"] * sum(len(token_ids) for _, token_ids in prompts)
        self.prompts.append(prompts)

    def decode(self, token_ids: np.ndarray, positions: np.ndarray, active: np.ndarray) -> None:
        self.now += self.SECONDS["step"]
        self.steps.append((token_ids, positions, active))

    def memory_bytes(self) -> dict[str, int]:
        return {"neurons": 5 << 20, "program": 7, "KV cache": 3 << 20, "slab": 6 << 20}

    def __enter__(self) -> "RecordingEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch):
    """Runs a command line on a recording engine: the engine."""
    monkeypatch.setattr(engine_module, "Engine", RecordingEngine)
    monkeypatch.setattr(RecordingEngine, "made", [])
    monkeypatch.setattr(time, "perf_counter", lambda: RecordingEngine.made[-1].now if RecordingEngine.made else 0.0)

    def measure(store: Store, *words: str) -> RecordingEngine:
        assert cli.main(["bench", "llm", str(store.path), *words]) == 0
        return RecordingEngine.made[-1]

    return measure


def printed(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], dict[str, Any]]:
    """The table's lines and the document, which is the last line."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith("|")], json.loads(lines[-1])


def test_a_real_run_prints_the_table_and_the_document(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    assert cli.main(["bench", "llm", str(store.path), *QUICK, "-p", "16", "-n", "4", "-pg", "8,3", "-b", "2"]) == 0
    elapsed = time.perf_counter() - began
    lines, document = printed(capsys)
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "model",
        "size",
        "params",
        "ffn",
        "memory",
        "test",
        "t/s",
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:1] + row[3:4] + row[5:6] for row in rows] == [["store", "sparse", test] for test in ("pp16", "tg4", "pp8+tg3")]
    assert document["model"] == str(store.path)
    assert (document["ffn"], document["predictor"], document["max_num_seqs"]) == ("sparse", "exact", 2)
    assert document["cached_share"] == 0.25
    assert document["memory_bytes"] > host_memory.engine_bytes()
    for row, result in zip(rows, document["results"], strict=True):
        assert result.keys() == RESULT_KEYS
        tokens = 2 * (result["prompt_tokens"] + result["generated_tokens"])
        assert result["repetitions"] == len(result["samples"]) == 2
        assert all(tokens / elapsed < sample < 1e7 for sample in result["samples"])
        assert result["tokens_per_s"] == pytest.approx(statistics.mean(result["samples"]))
        assert result["standard_deviation"] == pytest.approx(statistics.stdev(result["samples"]))
        assert row[6] == f"{result['tokens_per_s']:.2f} ± {result['standard_deviation']:.2f}"


def test_size_and_parameters_are_those_of_the_checkpoint(store: Store, recorded, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(store.path.parent / "checkpoint" / "model.safetensors")
    recorded(store, "-p", "8", "-n", "0")
    lines, document = printed(capsys)
    assert document["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert document["size_bytes"] == sum(tensor.nbytes for tensor in tensors.values())  # float32
    assert f"{document['parameters'] / 1e6:.2f} M" in lines[2] and f"{document['size_bytes'] / 2**20:.2f} MiB" in lines[2]


def test_memory_counts_everything_once(store: Store, recorded, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(store, "-p", "8", "-n", "0", "--loaders", "3")
    lines, document = printed(capsys)
    assert document["memory_bytes"] == (8 << 20) + host_memory.engine_bytes() + 3 * host_memory.LOADER_BYTES
    assert f"{document['memory_bytes'] / 2**20:.2f} MiB" in lines[2]


def test_speed_is_tokens_of_all_sequences_over_the_engine_s_time(
    store: Store, recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(store, "-p", "20", "-n", "5", "-pg", "20,5", "-b", "3", "-r", "4")
    _, document = printed(capsys)
    prompt, steps = 3 * 20 * 1e-3, 5 * 1e-2
    expected = {"pp20": 60 / prompt, "tg5": 15 / steps, "pp20+tg5": 75 / (prompt + steps)}
    assert {result["test"]: result["tokens_per_s"] for result in document["results"]} == pytest.approx(expected)
    assert all(result["standard_deviation"] == pytest.approx(0, abs=1e-6) for result in document["results"])


def test_the_warm_up_and_the_repetitions_have_tokens_of_their_own(store: Store, recorded) -> None:
    engine = recorded(store, "-p", "24", "-n", "0", "-r", "3")
    prompts = [token_ids for ((_, token_ids),) in engine.prompts]
    assert len({tuple(token_ids) for token_ids in prompts}) == 1 + 3
    assert all(len(token_ids) == 24 and token_ids.dtype == np.int32 for token_ids in prompts)
    everything = np.concatenate(prompts)
    assert everything.min() >= 0 and everything.max() < store.config.vocab_size
    again = recorded(store, "-p", "24", "-n", "0", "-r", "3")
    np.testing.assert_array_equal(np.concatenate([ids for ((_, ids),) in again.prompts]), everything)
    other = recorded(store, "-p", "24", "-n", "0", "-r", "3", "--seed", "-7")
    assert not np.array_equal(np.concatenate([ids for ((_, ids),) in other.prompts]), everything)


def test_generation_goes_on_from_the_prompt_s_end(store: Store, recorded) -> None:
    engine = recorded(store, "-p", "0", "-n", "3", "-pg", "7,2", "-r", "1", "-b", "2")
    assert engine.prepared == [(2, 3), (2, 9)]
    assert [positions.tolist() for _, positions, _ in engine.steps] == [[at, at] for at in (0, 1, 2, 0, 1, 2, 7, 8, 7, 8)]
    assert all(active.all() and len(token_ids) == 2 for token_ids, _, active in engine.steps)
    assert [[row for row, _ in prompts] for prompts in engine.prompts] == [[0, 1], [0, 1]]


def test_prompts_go_together_as_far_as_a_pass_has_room(store: Store, recorded) -> None:
    """A pass takes 1024 tokens."""
    engine = recorded(store, "-p", "90", "-n", "0", "-r", "1", "-b", "50")
    assert [len(prompts) for prompts in engine.prompts] == [11, 11, 11, 11, 6] * 2
    assert [row for prompts in engine.prompts[:5] for row, _ in prompts] == list(range(50))


def test_short_tests_run_first_and_are_printed_as_asked(store: Store, recorded, capsys: pytest.CaptureFixture[str]) -> None:
    engine = recorded(store, "-p", "64,8", "-p", "32", "-n", "16,4", "-r", "1")
    assert [length for _, length in engine.prepared] == [4, 8, 16, 32, 64]
    _, document = printed(capsys)
    assert [result["test"] for result in document["results"]] == ["pp64", "pp8", "pp32", "tg16", "tg4"]


def test_one_repetition_deviates_from_nothing(store: Store, recorded, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(store, "-p", "8", "-n", "0", "-r", "1")
    assert printed(capsys)[1]["results"][0]["standard_deviation"] == 0


def test_without_flags_it_measures_what_llama_bench_measures() -> None:
    arguments = cli.build_parser().parse_args(["bench", "llm", "model"])
    from inflash.tools.bench_llm import _tests

    assert [test.name for test in _tests(arguments)] == ["pp512", "tg128"]
    assert arguments.repetitions == 5
    assert flags.engine_options(arguments).max_num_seqs == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "0", "-n", "0"], "expected something to measure, found -p 0 and -n 0"),
        (["-p", "8,97", "-n", "0"], r"-p 97: expected at most 96 tokens, as .*store has 96 positions, found 97"),
        (["-p", "8"], r"-n 128: expected at most 96 tokens, as .*store has 96 positions, found 128"),
        (["-p", "0", "-n", "8", "-pg", "90,7"], r"-pg 90,7: expected at most 96 tokens, .* found 90 \+ 7"),
        (
            ["-p", "50", "-n", "8", "--max-model-len", "40"],
            r"-p 50: expected at most 40 tokens, as --max-model-len is 40, found 50",
        ),
        (["-p", "8", "-n", "8", "--max-model-len", "97"], r"--max-model-len 97: .*store has 96 positions"),
        (["-p", "8", "-n", "8", "-b", "0"], "max_num_seqs should be a positive integer, found 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.setattr(Engine, "__init__", lambda *_: pytest.fail("the model was loaded"))
    assert cli.main(["bench", "llm", str(store.path), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("inflash: error: ") and captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "many"], "expected numbers of tokens from 0 up, separated by commas like 128,512; found 'many'"),
        (["-p", "8,"], "found '8,'"),
        (["-n", "-8"], "found '-8'"),
        (["-n", "1.5"], "found '1.5'"),
        (["-pg", "8"], "expected two numbers of tokens from 1 up"),
        (["-pg", "0,8"], "found '0,8'"),
        (["-r", "0"], "expected a number of repetitions from 1 up, found '0'"),
        (["-r", "x"], "found 'x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_values_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "llm", "model", *words])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_too_much_memory_for_the_longest_test_is_refused_before_the_others_run(
    store: Store, recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "llm", str(store.path), "-p", "4", "-n", "0", "-pg", "64,30", "-b", str(1 << 30)]) == 2
    assert "KV cache of 1073741824 x 128 tokens" in capsys.readouterr().err
    assert RecordingEngine.made[-1].prepared == []


def test_a_missing_model_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "llm", str(tmp_path / "no-such-model")]) == 2
    assert "no-such-model" in capsys.readouterr().err
