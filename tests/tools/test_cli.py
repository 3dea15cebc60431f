"""The command line: its flags mirror the dataclasses behind them, and every way to end has its exit code."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import inflash
from inflash.errors import InflashError, RunError
from inflash.pipeline.options import EngineOptions
from inflash.pipeline.sampling_params import SamplingParams
from inflash.tools import arguments as flags
from inflash.tools import cli

COMMANDS = [*([name] for name in cli.COMMANDS), ["bench"], *(["bench", name] for name in cli.BENCHMARKS)]
GENERATE = ["generate", "model", "--prompt", "Once"]
RUN_BATCH = ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", "model"]


def parse(*words: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(words)


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inflash.tools.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", **options)


def option_strings(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from option_strings(inner)


@pytest.fixture(autouse=True)
def own_warning_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the other tests back the format that `main` replaces."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)


@pytest.fixture
def ends_with(monkeypatch: pytest.MonkeyPatch):
    """Puts a command in the place of `inflash info` that ends in a given way: it raises an exception, or returns a code."""

    def prepare(outcome: BaseException | int) -> None:
        def run(_: object) -> int:
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setitem(sys.modules, "inflash.tools.info", SimpleNamespace(run=run))

    return prepare


@pytest.mark.parametrize("words", [[], *COMMANDS], ids=" ".join)
def test_help_is_there_for_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*words, "--help"])
    assert end.value.code == 0
    assert " ".join(["usage: inflash", *words]) in capsys.readouterr().out


@pytest.mark.parametrize("command", [*cli.COMMANDS.values(), *cli.BENCHMARKS.values()], ids=lambda command: command.module)
def test_every_command_has_its_module(command: cli.Command) -> None:
    assert find_spec(f"inflash.tools.{command.module}") is not None


DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()


def test_the_documentation_lists_every_flag() -> None:
    written = set(re.findall(r"`(--?[a-z_-]+)`", DOCUMENTATION))
    assert written == set(option_strings(cli.build_parser()))


def test_the_documentation_lists_every_command() -> None:
    written = re.findall(r"^\| `inflash (bench [a-z]+|[a-z-]+)", DOCUMENTATION, re.MULTILINE)
    assert sorted(written) == sorted(" ".join(words) for words in COMMANDS if words != ["bench"])


def test_help_has_no_colors_when_told() -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    environment.pop("FORCE_COLOR", None)
    assert "\x1b" not in run("--help", env=environment).stdout


def test_version() -> None:
    assert run("--version").stdout == f"inflash {inflash.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["bench"],
        ["bench", "fly"],
        ["info"],
        ["info", "model", "--colour"],
        ["generate", "model"],
        ["generate", "model", "--prompt", "a", "--prompt-file", "b"],
        [*GENERATE, "--max-tok", "3"],  # no abbreviations: a later flag could change what they mean
        [*GENERATE, "--cache-neurons", "nan"],
        [*GENERATE, "--ffn", "dense"],
        [*GENERATE, "--stop-token-ids", "2,x"],
        ["run-batch", "-i", "in.jsonl", "--model", "model"],
        ["convert", "a", "b", "--dtype", "int8"],
        ["convert", "a", "b", "--predictor-rank", "8", "--no-predictor"],
    ],
    ids=lambda words: " ".join(words) or "nothing",
)
def test_bad_command_lines_end_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("words", [["info"], ["verify"], ["generate", "--prompt", "a"]], ids=" ".join)
def test_a_missing_model_is_bad_input(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "no-such-model"
    assert cli.main([words[0], str(missing), *words[1:]]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("inflash: error: ")
    assert captured.err.count("\n") == 1
    assert "no-such-model" in captured.err
    assert captured.out == ""


def test_a_missing_batch_file_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--model", str(tmp_path / "model")]
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("inflash: error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", str(tmp_path / "no-such-checkpoint"), str(tmp_path / "store")]) == 2
    assert "no-such-checkpoint" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (InflashError("the store is odd"), 2, "inflash: error: the store is odd\n"),
        (RunError("loader 1 died"), 1, "inflash: error: loader 1 died\n"),
        (OSError(5, "Input/output error", "/mnt/disk"), 1, "inflash: error: /mnt/disk: Input/output error\n"),
        (TimeoutError("nothing came"), 1, "inflash: error: nothing came\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, "inflash: error: Broken pipe\n"),  # not standard output's: not to be swallowed
        (KeyboardInterrupt(), 130, "\ninflash: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_exit_codes(ends_with, outcome, code: int, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    ends_with(outcome)
    assert cli.main(["info", "model"]) == code
    assert capfd.readouterr().err == message


def test_sigterm_ends_a_command_as_ctrl_c_does(tmp_path: Path) -> None:
    """With its scratch files removed, and an exit code of its own."""
    command = [sys.executable, "-m", "inflash.tools.cli", "bench", "io", str(tmp_path), "--file-mib", "16", "--seconds", "30"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("inflash-bench-*/store/zarr.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (143, "") and errors.endswith("\ninflash: ended by SIGTERM\n")
    assert "Traceback" not in errors and list(tmp_path.iterdir()) == []


def test_a_signal_that_somebody_else_hears_is_left_to_them(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    info = SimpleNamespace(run=lambda _: signal.raise_signal(signal.SIGTERM) or 0)
    monkeypatch.setitem(sys.modules, "inflash.tools.info", info)
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        assert cli.main(["info", "model"]) == 0 and heard == [signal.SIGTERM]
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert cli.main(["info", "model"]) == 143 and capfd.readouterr().err == "\ninflash: ended by SIGTERM\n"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_warning_is_one_line() -> None:
    code = """
import sys, types, warnings
from inflash.tools import cli

def run(arguments):
    warnings.warn("layer 3 has NaN weights", stacklevel=2)
    return 0

sys.modules["inflash.tools.info"] = types.SimpleNamespace(run=run)
sys.exit(cli.main(["info", "model"]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "inflash: warning: layer 3 has NaN weights\n")


def test_a_bug_is_not_hidden(ends_with) -> None:
    ends_with(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["info", "model"])


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_reader_that_leaves_is_no_error_message(size: int) -> None:
    """As in `inflash info MODEL | head -0`, with output that stays in the buffer until the end and with more than it holds."""
    code = """
import sys, types
from inflash.tools import cli

def run(arguments):
    print("x" * SIZE)
    return 0

sys.modules["inflash.tools.info"] = types.SimpleNamespace(run=run)
sys.exit(cli.main(["info", "model"]))
""".replace("SIZE", str(size))
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(write)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_engine_flags_are_the_engine_options() -> None:
    assert set(flags.ENGINE_FLAGS) == {field.name for field in fields(EngineOptions)}


def test_biases_are_written_by_token_ids() -> None:
    given = flags.sampling_fields(parse("generate", "model", "--prompt", "a", "--logit-bias", "2=-100, 50256=3.5"))
    assert SamplingParams(**given).biases == ((2, -100.0), (50256, 3.5))


@pytest.mark.parametrize(("text", "found"), [("100", "100"), ("100=1,", ""), ("a=1", "a=1"), ("5=x", "5=x"), ("5=1,5=2", "5=2")])
def test_biases_that_cannot_be_read_are_told_with_an_example(text: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("generate", "model", "--prompt", "a", "--logit-bias", text)
    assert f"as in 2=-100,50256=3.5, found '{found}'" in capsys.readouterr().err


def test_sampling_flags_are_the_sampling_params() -> None:
    assert {*flags.SAMPLING_FLAGS, "seed"} == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("words", [GENERATE, RUN_BATCH], ids=lambda words: words[0])
def test_without_flags_the_engine_has_its_own_defaults(words: list[str]) -> None:
    assert flags.engine_options(parse(*words)) == EngineOptions()


@pytest.mark.parametrize("words", [GENERATE, RUN_BATCH], ids=lambda words: words[0])
def test_every_engine_flag_reaches_its_option(words: list[str]) -> None:
    wanted = EngineOptions(
        ffn="hybrid",
        predictor="exact",
        cache_neurons=0.5,
        window=4,
        policy="window",
        prefetch="none",
        path="dense",
        overlap=False,
        max_num_seqs=3,
        max_model_len=99,
        compute_dtype="float32",
        loaders=5,
        queue_depth=6,
        merge_gap=512,
        memory=1 << 30,
        seed=7,
        verify=True,
    )
    given: list[str] = []
    for field in fields(EngineOptions):
        value = getattr(wanted, field.name)
        assert value != field.default, f"{field.name} would pass without being handed on"
        name = flags.flag(field.name)
        given += [name] if value is True else ["--no-" + name.removeprefix("--")] if value is False else [name, str(value)]
    assert flags.engine_options(parse(*words, *given)) == wanted


@pytest.mark.parametrize("spelling", ["--max-num-seqs", "--max-inflight", "--max_inflight"])
def test_run_batch_knows_the_other_names_of_max_num_seqs(spelling: str) -> None:
    assert flags.engine_options(parse(*RUN_BATCH, spelling, "13")).max_num_seqs == 13


@pytest.mark.parametrize(("text", "value"), [("0.25", 0.25), ("512", 512), ("1", 1), ("1.0", 1.0)])
def test_cache_neurons_is_a_share_or_a_count(text: str, value: float | int) -> None:
    found = flags.engine_options(parse(*GENERATE, "--cache-neurons", text)).cache_neurons
    assert (type(found), found) == (type(value), value)


def test_only_given_sampling_flags_are_handed_on() -> None:
    """Otherwise argparse's defaults would win over generation_config.json."""
    assert flags.sampling_fields(parse(*GENERATE)) == {}
    words = ["--temperature", "0", "--stop", "a", "--stop", "b c", "--stop-token-ids", "2,5", "--ignore-eos", "--n", "2"]
    given = {"temperature": 0.0, "stop": ["a", "b c"], "stop_token_ids": [2, 5], "ignore_eos": True, "n": 2}
    assert flags.sampling_fields(parse(*GENERATE, *words)) == given
    assert SamplingParams(**given).temperature == 0.0


def test_prompts_may_be_repeated() -> None:
    assert parse("generate", "model", "--prompt", "a", "--prompt", "b").prompt == ["a", "b"]


def test_resuming_is_the_default_of_run_batch() -> None:
    assert parse(*RUN_BATCH).resume is True
    assert parse(*RUN_BATCH, "--no-resume").resume is False
    assert parse(*RUN_BATCH).retry_failed is False
