"""The arguments of `inflash run-batch`."""

import argparse
from pathlib import Path

from .arguments import add_engine_flags, add_json

_UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds(text: str) -> float:
    """`90`, `90s`, `15m` and `2h`."""
    number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1)
    if not (number.isascii() and number.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a time like 90s, 15m or 2h, found {text!r}")
    return float(int(number) * unit)


def add_run_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i",
        "--input-file",
        type=Path,
        required=True,
        metavar="IN",
        help="requests, one JSON object a line; - reads standard input",
    )
    parser.add_argument(
        "-o",
        "--output-file",
        type=Path,
        required=True,
        metavar="OUT",
        help="responses, one JSON object a line; - writes standard output, and such a run cannot be resumed",
    )
    parser.add_argument("--model", type=Path, required=True, metavar="MODEL", help="a store, as `inflash convert` writes it")
    parser.add_argument("--error-file", type=Path, metavar="ERR", help="where refused and failed requests go (default: into OUT)")
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep what OUT already has and run the rest; --no-resume starts anew (default: --resume)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="when resuming, run the requests again that had failed")
    parser.add_argument(
        "--pause-limit",
        type=seconds,
        default=3600.0,
        metavar="TIME",
        help="when the disk is full, wait for room so long, like 90s, 15m or 2h, before giving up (default: 1h)",
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="keep counts of the run in FILE, in Prometheus' text format, every five seconds",
    )
    add_json(parser)
    add_engine_flags(parser, aliases={"max_num_seqs": ("--max-inflight", "--max_inflight")})
