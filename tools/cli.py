"""The command `inflash`: sub-commands from the table in `commands`, each imported only when it is run.

A command is a module of this folder with `run(arguments) -> int`, the exit code: 0 done, 1 something failed while running, 3 stopped as
asked. Bad input raises `InflashError` and ends with 2, like a flag that argparse refuses.
"""

import argparse
import contextlib
import os
import select
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib import import_module

from .. import __version__
from ..errors import InflashError, RunError
from .commands import BENCHMARKS, COMMANDS, Command

FAILED, BAD_INPUT, INTERRUPTED, TERMINATED = 1, 2, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as from `timeout`, systemd and batch systems: what is open is closed and finished rows are shown, as after Ctrl-C."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; a parsed command's module is in `module`."""
    parser = argparse.ArgumentParser(
        prog="inflash",
        description="Runs language models that do not fit in memory: attention in DRAM, feed-forward neurons on flash.",
        epilog="`inflash COMMAND --help` says more. Exit codes: 0 done, 1 something failed while running, 2 bad input, 3 stopped as asked.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_commands(commands, COMMANDS)
    bench = commands.add_parser(
        "bench",
        help="measure this machine: io, kernels, ablation, batch, plan, llm or tracing",
        description="Measures this machine, or a model on it. The last line of the output is one JSON document, see docs/cli.md.",
        allow_abbrev=False,
    )
    _add_commands(bench.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True), BENCHMARKS)
    return parser


def _add_commands(parsers: "argparse._SubParsersAction[argparse.ArgumentParser]", table: dict[str, Command]) -> None:
    for name, command in table.items():
        parser = parsers.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            epilog=command.details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_arguments(parser)
        parser.set_defaults(module=command.module)


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns its exit code.

    Args:
      argv: the arguments after the program's name; None: the process's own.
    """
    arguments = build_parser().parse_args(argv)
    os.environ["JAX_PLATFORMS"] = (
        "cpu"  # all is computed there; a GPU that JAX finds would only take memory that no plan knows of
    )
    warnings.formatwarning = _warning_line
    try:
        with _hearing_sigterm():
            code = import_module(f".{arguments.module}", __package__).run(arguments)
        sys.stdout.flush()  # here, where a reader that left is dealt with, rather than at exit
        return code
    except InflashError as error:
        return _complain(str(error), FAILED if isinstance(error, RunError) else BAD_INPUT)
    except Terminated:
        print("\ninflash: ended by SIGTERM", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("\ninflash: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            return FAILED
        where = f"{error.filename}: " if error.filename else ""
        return _complain(f"{where}{error.strerror or error}", FAILED)


@contextlib.contextmanager
def _hearing_sigterm() -> Iterator[None]:
    """Raises `Terminated` for a SIGTERM, where nobody else decides what it does."""

    def end(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _complain(message: str, code: int) -> int:
    print(f"inflash: error: {message}", file=sys.stderr)
    return code


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as one line, without the source file and line that mean nothing to who runs a command."""
    return f"inflash: warning: {message}\n"


def _reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


if __name__ == "__main__":
    sys.exit(main())
