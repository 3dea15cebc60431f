"""`inflash bench tracing`: what watching costs, on one run that is watched and left alone in turn.

Two runs of the same command differ by several percent on a shared machine. So one engine decodes texts one by one, and every few steps its
processes are told to record or not to, and samples of /proc are taken or not. Neighbouring stretches are compared: what changes
slowly cancels, and the mean over many pairs, without the outer quarters, leaves little of what changes fast. On a machine that is too
restless even for that, the sum says as much: what a span takes, times the engine's spans of a step.
"""

import argparse
import contextlib
import json
import subprocess
import time
from typing import Any

import numpy as np

from ..errors import InflashError, RunError
from ..pipeline.trace import LOOK_UP, STEP, Recorder
from ..pipeline.trace_area import TraceArea
from ..storage.store import open_store
from . import arguments as flags
from .profile_arguments import engine_words
from .profile_figures import sums_within
from .profiler import SAMPLE_EVERY_S, Watch
from .progress import progress_bar

_WARM_UP = 16  # steps before the first stretch
_PROMPT_ROOM = 16  # positions of a text that are not decoded
_POLL_S = 0.005
_TIMED_SPANS = 20_000


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.llm import LONGEST_BY_DEFAULT

    options = flags.engine_options(arguments)
    for name in ("steps", "tokens"):
        if getattr(arguments, name) < 1:
            raise InflashError(f"--{name}: expected a number from 1 up, found {getattr(arguments, name)}")
    store = open_store(arguments.model)
    longest = min(options.max_model_len or LONGEST_BY_DEFAULT, store.config.max_positions)
    each = min(arguments.tokens, max(1, longest - _PROMPT_ROOM))
    prompts = ["--prompt=The sea was"] * -(-arguments.tokens // each)
    words = [
        "generate", str(store.path), *prompts, f"--max-tokens={each + 1}", "--ignore-eos", "--temperature=0", "--json",
        *engine_words(arguments),
    ]  # fmt: skip
    watch = Watch(store, options.loaders)
    process = watch.start(words, stdout=subprocess.DEVNULL)
    try:
        stretches = _alternate(watch, process, arguments.steps, arguments.tokens)
        if process.wait():
            raise RunError(f"the run ended with {process.returncode}")
        spans = _spans_per_step(watch.area.read(0).records)
    finally:
        process.kill()
        process.wait()
        watch.area.close()
    _report(stretches, spans)
    return 0


def _alternate(watch: Watch, process: subprocess.Popen, steps: int, tokens: int) -> list[tuple[bool, float]]:
    """Whether each stretch was watched, and its ms a step."""
    stretches: list[tuple[bool, float]] = []
    watched, due, paused = True, 0.0, 0.0
    begin = (_WARM_UP, None)
    with progress_bar(total=tokens, desc="decoding", unit=" tokens") as bar:
        while process.poll() is None:
            if watched and time.monotonic() >= due:
                watch.look()
                due = time.monotonic() + SAMPLE_EVERY_S
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            now = watch.step_times()
            if now is None:
                continue
            bar.update(now.steps - bar.n)
            if begin[1] is None and now.steps >= begin[0]:
                begin = (now.steps, now.decode_ns)
            elif begin[1] is not None and now.steps >= begin[0] + steps:
                stretches.append((watched, (now.decode_ns - begin[1]) / 1e6 / (now.steps - begin[0])))
                watched = not watched
                watch.area.pause(not watched)
                # Looks are as far apart in the time that is watched as in a run that always is.
                paused, due = time.monotonic(), due + (time.monotonic() - paused if watched else 0.0)
                begin = (now.steps + 1, None)  # the step that runs now is half and half
    return stretches


def overhead(stretches: list[tuple[bool, float]]) -> tuple[float, float, int]:
    """What watching adds as a share, its standard error, and the number of pairs that it was taken from.

    Each watched stretch is compared with the mean of the two beside it; of the ratios the inner half counts.
    """
    ratios = np.sort(
        [
            2 * here / (before + after)
            for (_, before), (watched, here), (_, after) in zip(stretches, stretches[1:], stretches[2:], strict=False)
            if watched
        ]
    )
    if len(ratios) < 4:
        raise InflashError(
            f"--tokens: too few for a comparison, found {len(stretches)} stretches; decode more, or fewer --steps at a time"
        )
    cut = len(ratios) // 4
    inner = ratios[cut : len(ratios) - cut]
    # The inner half's spread stands for the whole: winsorised, as for any trimmed mean.
    spread = np.clip(ratios, inner[0], inner[-1]).std(ddof=1) / (0.5 * np.sqrt(len(ratios)))
    return float(inner.mean() - 1), float(spread), len(ratios)


def _spans_per_step(records: np.ndarray) -> float:
    """The engine's, those of whole steps that were recorded from beginning to end."""
    steps = records[(records["kind"] == STEP) & (records["end_ns"] > 0)]
    return float(np.median(sums_within(steps, records, np.ones(len(records))))) if len(steps) else 0.0


def span_ns() -> float:
    """What one span takes here, by itself."""
    area = TraceArea.make(num_writers=1, num_layers=1, d_ff=8, num_records=4096)
    recorder = Recorder(area, 0)
    try:
        rounds = []
        for _ in range(5):
            began = time.perf_counter_ns()
            for _ in range(_TIMED_SPANS // 5):
                with recorder.span(LOOK_UP, 3):
                    recorder.tell(1, 2)
            rounds.append((time.perf_counter_ns() - began) / (_TIMED_SPANS // 5))
        return float(np.median(rounds))
    finally:
        area.close()


def _report(stretches: list[tuple[bool, float]], spans: float) -> None:
    share, error, pairs = overhead(stretches)
    plain, watched = (float(np.median([ms for was, ms in stretches if was == wanted])) for wanted in (False, True))
    print(f"Median of a step: {plain:.2f} ms by itself, {watched:.2f} ms watched.")
    print(f"Watching costs {100 * share:+.2f} % of a step, give or take {100 * error:.2f} (trimmed mean of {pairs} comparisons).")
    each_ns = span_ns()
    by_sum = spans * each_ns / 1e6 / plain
    print(f"By the sum: {spans:.0f} spans of the engine a step, {each_ns / 1000:.2f} us each, are {100 * by_sum:.2f} % of it.")
    document: dict[str, Any] = {
        "overhead": share, "standard_error": error, "pairs": pairs, "plain_ms": plain, "watched_ms": watched,
        "spans_per_step": spans, "span_ns": each_ns, "overhead_by_sum": by_sum,
    }  # fmt: skip
    print(json.dumps(document))
