"""The arguments of `profile`, `top` and `bench tracing`, and how a profiled command line is written out again."""

import argparse
from pathlib import Path
from typing import Any

from . import arguments as flags


def add_profile(parser: argparse.ArgumentParser) -> None:
    flags.add_model(parser)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("-i", "--input-file", type=Path, metavar="IN", help="a batch file, run as `inflash run-batch` runs it")
    work.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a text to continue, as `inflash generate` does; may be repeated"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the report; made when it is not there"
    )
    parser.add_argument(
        "--device",
        type=Path,
        metavar="FILE",
        help="the disk's rates by size and depth of reads, as `inflash probe` writes them (default: measured after the run, two seconds)",
    )
    parser.add_argument(
        "--jax-trace", action="store_true", help="also record what XLA does, into DIR/jax-trace; this slows the run down"
    )
    flags.add_sampling_flags(parser)
    flags.add_engine_flags(parser)


def add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pid", type=int, metavar="PID", help="of a running `inflash generate`, `run-batch` or any program with an inflash.LLM"
    )
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between two looks (default: %(default)s)"
    )
    parser.add_argument("--count", type=int, metavar="N", help="end after so many looks (default: when the run ends, or Ctrl-C)")


def add_bench_tracing(parser: argparse.ArgumentParser) -> None:
    flags.add_model(parser)
    parser.add_argument("--tokens", type=int, default=448, metavar="N", help="tokens to decode (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=4, metavar="N", help="decoding steps with and without in turn (default: %(default)s)"
    )
    flags.add_engine_flags(parser)
    parser.set_defaults(max_num_seqs=1)


def engine_words(arguments: argparse.Namespace) -> list[str]:
    """The engine's flags of a parsed command line that are not at their defaults."""
    defaults = argparse.ArgumentParser()
    flags.add_engine_flags(defaults)
    return _words(arguments, flags.ENGINE_FLAGS, vars(defaults.parse_args([])))


def sampling_words(arguments: argparse.Namespace) -> list[str]:
    """The sampling flags that were given."""
    return _words(arguments, flags.SAMPLING_FLAGS, dict.fromkeys(flags.SAMPLING_FLAGS))


def _words(arguments: argparse.Namespace, table: dict[str, dict[str, Any]], defaults: dict[str, Any]) -> list[str]:
    words = []
    for name, how in table.items():
        value, flag = getattr(arguments, name), flags.flag(name)
        if value == defaults[name]:
            continue
        if how.get("action") == "append":
            words += [f"{flag}={text}" for text in value]
        elif isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        elif isinstance(value, list):
            words.append(f"{flag}={','.join(map(str, value))}")
        else:
            words.append(f"{flag}={value}")
    return words
