"""`inflash profile`: a real run, watched; then a trace, its figures, and a report for the browser.

This process makes the memory that the others record into, so what they have written outlives them. It starts the run as a child, samples
every process meanwhile, and writes the outputs when the child has ended, however it ended.
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import InflashError
from ..pipeline.interpreter import module_command, module_environment
from ..pipeline.live import LiveCounters, LiveReader
from ..pipeline.step_times import StepTimes
from ..pipeline.trace_area import TraceArea
from ..storage.store import Store, open_store
from . import arguments as flags
from .energy import PowerMeter
from .process_sampler import ProcessSampler
from .profile_arguments import engine_words, sampling_words

SAMPLE_EVERY_S = 0.2
_MOST_LOADERS = 16  # that have room in the trace, where no more were asked for
_KILLED = 1


def run(arguments: argparse.Namespace) -> int:
    from .profile_document import write_outputs

    options, store = flags.engine_options(arguments), open_store(arguments.model)
    words = run_words(arguments)
    device = _read_device(arguments.device)
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InflashError(f"{arguments.output}: this folder cannot be made: {error.strerror}") from error
    print(f"profiling: inflash {shlex.join(words)}", file=sys.stderr)
    watch = Watch(store, options.loaders)
    try:
        code = watch.run(words, arguments.output / "jax-trace" if arguments.jax_trace else None)
        if not len(watch.area.read(0).records):
            return exit_code(code)  # it never came to a model, and has said why
        sentences = write_outputs(arguments.output, store, watch, words, device)
    finally:
        watch.area.close()
    print(f"\n{arguments.output / 'report.html'}: what this run was limited by", file=sys.stderr)
    for sentence in sentences:
        print(textwrap.indent(sentence, "  "), file=sys.stderr)
    return exit_code(code)


def run_words(arguments: argparse.Namespace) -> list[str]:
    """The ordinary command line that does the work.

    Raises:
      InflashError: sampling flags were given for a batch, whose requests bring their own.
    """
    given = sampling_words(arguments)
    if arguments.input_file is None:
        prompts = [f"--prompt={text}" for text in arguments.prompt]
        return ["generate", str(arguments.model), *prompts, *given, *engine_words(arguments)]
    if given:
        raise InflashError(f"{given[0].split('=')[0]}: with -i each request of the batch says how it is sampled; give it there")
    files = ["-i", str(arguments.input_file), "-o", str(arguments.output / "responses.jsonl"), "--model", str(arguments.model)]
    return ["run-batch", *files, "--no-resume", *engine_words(arguments)]


def exit_code(code: int) -> int:
    """The run's own, or 1 where a signal ended it."""
    return _KILLED if code < 0 else code


def _read_device(file: Path | None) -> dict[str, Any] | None:
    if file is None:
        return None
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        curve = [{name: point[name] for name in ("size", "depth", "bytes_per_s")} for point in document["read_curve"]]
    except OSError as error:
        raise InflashError(f"{file}: this file cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InflashError(
            f'{file}: expected an object with "read_curve", a list of size, depth and bytes_per_s: {error!r}'
        ) from error
    return {"source": str(file), "read_curve": curve}


class Watch:
    """A child process and what is seen of it.

    Attributes:
      area: its spans.
      sampler: its processes.
      meter: energy.
      origin_ns: when it was started.
      code: how it ended, as `subprocess` tells.
      about, counters: what its engine said of itself, last; None: it never came so far.
      own_cpu_s: CPU time that watching took.
    """

    def __init__(self, store: Store, loaders: int) -> None:
        config = store.config
        self.area = TraceArea.make(num_writers=1 + max(_MOST_LOADERS, loaders), num_layers=config.num_layers, d_ff=config.d_ff)
        self.sampler, self.meter, self.origin_ns, self.code, self.own_cpu_s = ProcessSampler(), PowerMeter(), 0, 0, 0.0
        self.about: dict[str, Any] | None = None
        self.counters: LiveCounters | None = None
        self._reader: LiveReader | None = None

    def run(self, words: list[str], jax_trace: Path | None = None, **options: Any) -> int:
        """Runs a command line to its end and returns how it ended.

        Args:
          words: of the command line.
          jax_trace: folder of a trace of XLA's.
          options: for `subprocess.Popen`.
        """
        began = os.times()
        process = self.start(words, jax_trace, **options)
        with _handing_on_signals(process):
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SAMPLE_EVERY_S)
                self.look()
        self._reader = None
        self.code, ended = process.returncode, os.times()
        self.own_cpu_s = ended.user - began.user + ended.system - began.system
        return self.code

    def start(self, words: list[str], jax_trace: Path | None = None, **options: Any) -> subprocess.Popen:
        """Starts a command line whose processes record into `area`; see `run`."""
        how = {"descriptor": self.area.descriptor, "jax_trace": str(jax_trace) if jax_trace else None, "words": words}
        self.origin_ns = time.perf_counter_ns()
        return subprocess.Popen(
            module_command("tools.profiled_run", json.dumps(how)),
            pass_fds=(self.area.descriptor,),
            process_group=0,  # a terminal's Ctrl-C comes once, from here
            env=module_environment(),
            **options,
        )

    def look(self) -> None:
        """Takes a sample of every process, and what the engine shows."""
        pids = self.area.process_ids()
        self.sampler.sample({"engine" if number == 0 else f"loader {number - 1}": pid for number, pid in pids.items()})
        self.meter.update()
        self.step_times()

    def step_times(self) -> StepTimes | None:
        """The engine's totals of now; None: it is not there yet."""
        if self._reader is None and 0 in (pids := self.area.process_ids()):
            with contextlib.suppress(InflashError):  # it has no engine yet
                self._reader = LiveReader(pids[0])
                self.about = self._reader.about
        if self._reader is not None:
            self.counters = self._reader.read()
            if self._reader.ended:
                # All that the engine held is kept for as long as somebody looks, and there may be another one soon.
                self._reader = None
        return self.counters.times if self.counters else None


@contextlib.contextmanager
def _handing_on_signals(process: subprocess.Popen) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the child, in its own way; what was recorded is written afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda received, _: process.send_signal(received))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
