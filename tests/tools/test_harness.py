"""lm-evaluation-harness over a tiny model: its tasks' numbers against the same numbers from `LLM.logits` and `LLM.generate`."""

import importlib
import json
import math
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import BUFFERED, END, make_store

from inflash.errors import InflashError
from inflash.pipeline.llm import LLM
from inflash.pipeline.sampling_params import SamplingParams

pytestmark = pytest.mark.filterwarnings(BUFFERED)

LENGTH = 48
QUESTIONS = [("The sea was", [" calm", " rough", " a horse"], 1), ("Two and two are", [" four", " x"], 0), ("A", ["b", "cd"], 1)]
SENTENCES = [("The sea was", " calm"), ("Two and two", " are four")]
TEXTS = ["A short one.", "A longer one, which takes more than one window: " + "so many words " * 8]
COMMON = "dataset_path: json\ntest_split: test\nmetadata:\n  version: 1\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Hugging Face's libraries would leave things; set before they are imported."""
    folder = tmp_path_factory.mktemp("home") / "huggingface"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        patch.delenv("HF_DATASETS_CACHE", raising=False)
        yield folder


@pytest.fixture(scope="module")
def harness(home: Path) -> Any:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra inflash[lm-eval]")
    return importlib.import_module("inflash.tools.harness")


@pytest.fixture(scope="module")
def llm(harness: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    store = make_store(tmp_path_factory.mktemp("harness"), tokenizer=True, num_hidden_layers=1)
    with LLM(store.path, predictor="exact", max_model_len=LENGTH, max_num_seqs=2, loaders=1, queue_depth=1) as opened:
        yield opened


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], settings: str) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    where = f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{where}{COMMON}{settings}", encoding="utf-8")


def write_choices(folder: Path) -> None:
    documents = [{"question": question, "choices": choices, "gold": gold} for question, choices, gold in QUESTIONS]
    settings = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    write_task(folder, "inflash_choices", documents, settings)


def write_sentences(folder: Path) -> None:
    """With a metric whose standard error is bootstrapped, which lm_eval would do in forked processes."""
    settings = """\
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    write_task(folder, "inflash_sentences", [{"context": context, "answer": answer} for context, answer in SENTENCES], settings)


def write_texts(folder: Path) -> None:
    settings = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""
    write_task(folder, "inflash_texts", [{"text": text} for text in TEXTS], settings)


def write_continuations(folder: Path, answers: list[str], until: list[str]) -> None:
    documents = [{"prompt": prompt, "answer": answer} for (prompt, _, _), answer in zip(QUESTIONS, answers, strict=True)]
    settings = f"""\
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: answer
generation_kwargs:
  until: {json.dumps(until)}
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
    write_task(folder, "inflash_continuations", documents, settings)


def log_probabilities(llm: LLM, token_ids: list[int]) -> list[float]:
    """Of every token but the first, after those before it."""
    logits = llm.logits(token_ids[:-1]).astype(np.float64)
    chosen = logits[np.arange(len(token_ids) - 1), token_ids[1:]]
    return list(chosen - np.logaddexp.reduce(logits, axis=1))


def ids(llm: LLM, text: str) -> list[int]:
    assert llm.tokenizer is not None
    return llm.tokenizer.encode(text).ids


def expected(llm: LLM, context: str, answer: str) -> float:
    answer_ids = ids(llm, answer)
    return sum(log_probabilities(llm, ids(llm, context) + answer_ids)[-len(answer_ids) :])


def expected_rolling(llm: LLM, text: str) -> float:
    """The first window begins with the beginning of text; a later one is as long as fits and counts its new tokens only."""
    tokens = ids(llm, text)
    total = sum(log_probabilities(llm, [END, *tokens[:LENGTH]]))
    for done in range(LENGTH, len(tokens), LENGTH):
        end = min(done + LENGTH, len(tokens))
        total += sum(log_probabilities(llm, tokens[end - LENGTH - 1 : end])[-(end - done) :])
    return total


def request(*arguments: Any) -> Any:
    return types.SimpleNamespace(args=arguments)


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "inflash.tools.harness", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lm_eval", "datasets")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InflashError, match=r"pip install 'inflash\[lm-eval\]'"):
        importlib.import_module("inflash.tools.harness")


@pytest.mark.usefixtures("offline")
def test_tasks_of_local_files_agree_with_the_logits(
    harness: Any, llm: LLM, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_choices(tmp_path)
    write_sentences(tmp_path)
    write_texts(tmp_path)
    tasks = ["inflash_choices", "inflash_sentences", "inflash_texts"]
    found = harness.evaluate_tasks(llm, tasks, tmp_path)

    best = [int(np.argmax([expected(llm, question, choice) for choice in choices])) for question, choices, _ in QUESTIONS]
    accuracy = np.mean([chosen == gold for chosen, (_, _, gold) in zip(best, QUESTIONS, strict=True)])
    assert found["inflash_choices"]["acc,none"] == pytest.approx(accuracy)
    scores = [expected(llm, context, answer) for context, answer in SENTENCES]
    assert found["inflash_sentences"]["perplexity,none"] == pytest.approx(math.exp(-np.mean(scores)))
    assert found["inflash_sentences"]["perplexity_stderr,none"] > 0
    bits = -sum(expected_rolling(llm, text) for text in TEXTS) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert found["inflash_texts"]["bits_per_byte,none"] == pytest.approx(bits)

    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found) == set(tasks)
    assert not home.exists() or not [path for path in home.rglob("*") if path.is_file()], "left in Hugging Face's folder"
    printed = capsys.readouterr()
    assert printed.out == "", "lm_eval wrote to standard output"
    assert "Tokenizing" not in printed.err, "bars of lm_eval are for terminals"


@pytest.mark.usefixtures("offline")
def test_limit_runs_the_first_documents(harness: Any, llm: LLM, tmp_path: Path) -> None:
    write_sentences(tmp_path)
    found = harness.evaluate_tasks(llm, ["inflash_sentences"], tmp_path, limit=1)
    assert found["inflash_sentences"]["perplexity,none"] == pytest.approx(math.exp(-expected(llm, *SENTENCES[0])))
    assert "perplexity_stderr,none" not in found["inflash_sentences"]  # one document has none


@pytest.mark.usefixtures("offline")
def test_continuations_are_scored_as_generate_makes_them(harness: Any, llm: LLM, tmp_path: Path) -> None:
    outputs = llm.generate([prompt for prompt, _, _ in QUESTIONS], SamplingParams(temperature=0, max_tokens=12))
    texts = [output.outputs[0].text for output in outputs]
    until = [next((character for text in texts for character in text if character.isprintable()), "a")]
    cut = [text.split(until[0])[0] for text in texts]
    write_continuations(tmp_path, [cut[0], cut[1], cut[2] + "!"], until)
    found = harness.evaluate_tasks(llm, ["inflash_continuations"], tmp_path)
    assert found["inflash_continuations"]["exact_match,none"] == pytest.approx(2 / 3)


def test_generation_stops_where_the_task_says(harness: Any, llm: LLM) -> None:
    (output,) = llm.generate("The sea was", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    text = output.outputs[0].text
    stop = text[2:4]
    asked = {"until": ["", stop], "max_gen_toks": 20, "do_sample": False, "num_beams": 1, "ignore_eos": True}
    other = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with pytest.warns(UserWarning, match="ignored num_beams"):
        found = harness.InflashLM(llm).generate_until([request("The sea was", asked), request("The sea was", other)])
    assert found == [text.split(stop)[0], text]


def test_sampling_is_as_the_task_says(harness: Any) -> None:
    greedy = harness.sampling_params({"until": "\n", "temperature": 0, "top_p": 0.9})
    assert (greedy.temperature, greedy.top_p, greedy.max_tokens, greedy.stop) == (0, 1, 256, ("\n",))
    sampled = harness.sampling_params({"until": None, "do_sample": True, "top_p": 0.9, "max_new_tokens": 7})
    assert (sampled.temperature, sampled.top_p, sampled.max_tokens, sampled.stop_strings) == (1, 0.9, 7, ())
    with pytest.raises(InflashError, match="top_p"):
        harness.sampling_params({"temperature": 0.5, "top_p": 2.0})


def test_scores_in_order_with_greedy_told(harness: Any, llm: LLM) -> None:
    """Longest first inside, and equal inputs run once; what comes back is in the order of the requests."""
    prompt = ids(llm, "The sea was")
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params)
    greedy = output.outputs[0].token_ids
    others = [[*greedy[:-1], (greedy[-1] + 1) % 258], greedy[:1], [(greedy[0] + 1) % 258], []]
    found = harness.InflashLM(llm)._loglikelihood_tokens([(None, prompt, answer) for answer in [greedy, *others]])
    assert [is_greedy for _, is_greedy in found] == [True, False, True, False, True]
    for (total, _), answer in zip(found, [greedy, *others], strict=True):
        wanted = sum(log_probabilities(llm, prompt + answer)[len(prompt) - 1 :]) if answer else 0
        assert total == pytest.approx(wanted)


def test_equal_inputs_run_once(harness: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One-token answers to one question are all read off the same logits."""
    lengths: list[int] = []

    def logits(token_ids: tuple[int, ...]) -> np.ndarray:
        lengths.append(len(token_ids))
        return original(token_ids)

    original = llm.logits
    questions = ["The sea", "two", "The sky"]
    monkeypatch.setattr(llm, "logits", logits)
    found = harness.InflashLM(llm).loglikelihood([request(question, answer) for answer in "abc" for question in questions])
    assert lengths == [7, 7, 3]
    monkeypatch.undo()
    wanted = [expected(llm, question, answer) for answer in "abc" for question in questions]
    assert [total for total, _ in found] == pytest.approx(wanted)


def test_scores_are_float64(harness: Any) -> None:
    """Two likely tokens among many: in float32 the rare one's share of the sum would vanish."""
    logits = np.array([[0, 0, -20]], np.float32)
    total, greedy = harness.score(logits, [2])
    assert total == pytest.approx(-20 - math.log(2 + math.exp(-20)), rel=1e-14)
    assert not greedy


def test_a_context_that_is_too_long_loses_its_beginning(harness: Any, llm: LLM) -> None:
    model = harness.InflashLM(llm)
    context, answer = "x" * 30 + "and then, in the very end of it, the sea was", " calm"
    with pytest.warns(UserWarning, match="1 of 2 requests"):
        (total, _), _ = model.loglikelihood([request(context, answer), request("a", "b")])
    kept = (ids(llm, context) + ids(llm, answer))[-LENGTH - 1 :]
    assert total == pytest.approx(sum(log_probabilities(llm, kept)[-len(ids(llm, answer)) :]))

    with pytest.warns(UserWarning, match="1 of 1 requests"):
        found = model.generate_until([request(context, {"max_gen_toks": 10})])
    params = SamplingParams(temperature=0, max_tokens=10)
    (output,) = llm.generate({"prompt_token_ids": ids(llm, context)[-(LENGTH - 10) :]}, params)
    assert found == [output.outputs[0].text]


def test_an_answer_that_is_too_long_is_refused(harness: Any, llm: LLM) -> None:
    model = harness.InflashLM(llm)
    assert model.loglikelihood([request("", "y" * LENGTH)])[0][0] == pytest.approx(
        sum(log_probabilities(llm, [END, *ids(llm, "y" * LENGTH)]))
    )
    with pytest.raises(InflashError, match="max_model_len"):
        model.loglikelihood([request("", "y" * (LENGTH + 1))])
    with pytest.raises(InflashError, match="max_gen_toks"):
        model.generate_until([request("y", {"max_gen_toks": LENGTH})])


@pytest.mark.parametrize("text", [*TEXTS, "z" * LENGTH, "z" * (LENGTH + 1), ""])
def test_rolling_windows(harness: Any, llm: LLM, text: str) -> None:
    found = harness.InflashLM(llm).loglikelihood_rolling([request("before"), request(text)])
    assert found[0] == pytest.approx(expected_rolling(llm, "before"))
    assert found[1] == pytest.approx(expected_rolling(llm, text) if text else 0)


def test_a_text_with_its_own_beginning_gets_no_other(harness: Any, llm: LLM) -> None:
    model = harness.InflashLM(llm)
    assert model.tok_encode("</s>a") == [END, *ids(llm, "a")]
    assert model.eot_token_id == model.prefix_token_id == END
    assert model.max_length == LENGTH
    assert model.tokenizer_name == harness.InflashLM(llm).tokenizer_name


@pytest.mark.usefixtures("offline")
def test_bad_tasks_are_told_in_a_sentence(harness: Any, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_texts(tmp_path)
    (tmp_path / "inflash_texts.jsonl").unlink()
    with pytest.raises(InflashError, match=r"cannot load inflash_texts: FileNotFoundError"):
        harness.evaluate_tasks(llm, ["inflash_texts"], tmp_path)
    with pytest.raises(InflashError, match="expected a folder"):
        harness.evaluate_tasks(llm, ["inflash_texts"], tmp_path / "nothing")
    for options in ({"limit": 0}, {"num_fewshot": -1}):
        with pytest.raises(InflashError, match="integer of at least"):
            harness.evaluate_tasks(llm, ["inflash_texts"], tmp_path, **options)
    with pytest.raises(InflashError, match="found none"):
        harness.evaluate_tasks(llm, [], tmp_path)

    def without_defaults(*arguments: Any, include_defaults: bool = True, **options: Any) -> None:
        index(*arguments, include_defaults=False, **options)  # lm_eval's own take ten seconds to look through

    index = harness.TaskManager.__init__
    monkeypatch.setattr(harness.TaskManager, "__init__", without_defaults)
    with pytest.raises(InflashError, match=r"'inflash_tests'.* `lm-eval ls tasks` .*include path"):
        harness.evaluate_tasks(llm, ["inflash_texts", "inflash_tests"], tmp_path)


@pytest.mark.usefixtures("offline")
def test_what_was_changed_for_a_run_is_put_back(harness: Any, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_choices(tmp_path)
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    harness.evaluate_tasks(llm, ["inflash_choices"], tmp_path, limit=1)  # libraries set variables when they are first imported
    before = dict(harness.os.environ), harness.datasets.load_dataset, harness.lm_eval.api.task.tqdm
    harness.evaluate_tasks(llm, ["inflash_choices"], tmp_path, limit=1)
    assert (dict(harness.os.environ), harness.datasets.load_dataset, harness.lm_eval.api.task.tqdm) == before


def test_the_table_has_a_line_for_each_metric(harness: Any) -> None:
    results = {
        "arc": {"acc,none": 0.5, "acc_stderr,none": 0.0625, "acc,strict": 0.25},
        "wiki": {"word_perplexity,none": None, "perplexity,none": 2.5e9},
    }
    lines = harness.results_table(results).splitlines()
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]] == [
        ["arc", "acc", "0.5000", "0.0625"],
        ["arc", "acc,strict", "0.2500", "-"],
        ["wiki", "word_perplexity", "-", "-"],
        ["wiki", "perplexity", "2.5000e+09", "-"],
    ]
