"""Flags of the larger benchmarks."""

import argparse
from pathlib import Path

from ..pipeline.options import EngineOptions
from .arguments import add_model, byte_count


def row_names(text: str) -> tuple[str, ...]:
    from .bench_ablation import ROWS

    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(ROWS)}, found {unknown[0]!r}")
    return names


def count_from_one(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number from 1 up, found {text!r}")


def add_ablation(parser: argparse.ArgumentParser) -> None:
    defaults = EngineOptions()
    add_model(parser)
    parser.add_argument(
        "--memory-limit", type=byte_count, required=True, metavar="BYTES", help="memory of every row but resident, such as 7GiB"
    )
    parser.add_argument(
        "--rows",
        type=row_names,
        default="naive,hybrid,predictor,window,bundles,overlap,lookahead,resident",
        metavar="NAMES",
        help="which rows, with commas between (all)",
    )
    parser.add_argument("--tokens", type=count_from_one, default=32, metavar="N", help="measured tokens of each row (32)")
    parser.add_argument(
        "--warm-up", type=count_from_one, default=32, metavar="N", help="tokens before them that fill the cache (32)"
    )
    parser.add_argument("--prompt-tokens", type=count_from_one, default=128, metavar="N", help="tokens of the prompt (128)")
    parser.add_argument("--predictor", default=defaults.predictor, metavar="NAME", help="as for generate (auto)")
    parser.add_argument("--prefetch", default=defaults.prefetch, metavar="NAME", help="as for generate (auto)")
    parser.add_argument("--policy", choices=("lfu", "lru"), default=defaults.policy, help="who stays in the caches (%(default)s)")
    parser.add_argument(
        "--window",
        type=count_from_one,
        metavar="TOKENS",
        help="keep the neurons of so many tokens, as the paper does with 4, rather than go by --policy",
    )
    parser.add_argument(
        "--loaders", type=count_from_one, default=defaults.loaders, metavar="N", help="as for generate (%(default)s)"
    )
    parser.add_argument(
        "--queue-depth", type=count_from_one, default=defaults.queue_depth, metavar="N", help="as for generate (%(default)s)"
    )
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where the copy without bundles lies meanwhile (default: beside the model)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the rows into an image; needs inflash[plot]")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens (0)")
