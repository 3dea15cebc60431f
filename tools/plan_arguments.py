"""Flags of `inflash probe` and `inflash plan`."""

import argparse
from pathlib import Path

from .arguments import add_engine_flags, add_json, add_model, count_from_one


def add_probe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("."), metavar="DIR", help="a folder or store on the disk to measure (.)"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write here (default: into the user's cache)")
    add_json(parser)


def add_plan(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--batch", type=count_from_one, default=1, metavar="B", help="sequences decoded together (%(default)s)")
    parser.add_argument("--length", type=count_from_one, metavar="TOKENS", help="of the longest sequence (512, or the model's)")
    parser.add_argument("--device", type=Path, metavar="FILE", help="figures of inflash probe -o (default: those that are kept)")
    parser.add_argument("--calibrate", action="store_true", help="first see what the model names, over some text; kept for later")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="for --calibrate (default: the store's sample.txt, or random tokens)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw ms a token over budgets; needs inflash[plot]")
    add_json(parser)
    add_engine_flags(parser)


def numbers(text: str) -> tuple[int, ...]:
    """`25,40` is (25, 40)."""
    return tuple(count_from_one(part) for part in text.split(","))


def add_bench_plan(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--budgets", type=numbers, default="25,40,55,75,100", metavar="N,...", help="percent of the model (%(default)s)"
    )
    parser.add_argument(
        "--above-least", action="store_true", help="budgets come on top of the least that would do, for small models"
    )
    parser.add_argument("--batch", type=numbers, default="1,8", metavar="B,...", help="sequences decoded together (%(default)s)")
    parser.add_argument(
        "--length", type=numbers, default="256,64", metavar="N,...", help="longest sequence of each batch (%(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=count_from_one, default=16, metavar="N", help="of each sequence (%(default)s)")
    parser.add_argument("--tokens", type=count_from_one, default=10_000, metavar="N", help="most measured steps (%(default)s)")
    parser.add_argument("--warm-up", type=count_from_one, default=160, metavar="N", help="most tokens before them (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="of measured steps at most, after a warm-up of six times as long at most",
    )
    parser.add_argument(
        "--context", type=count_from_one, default=256, metavar="N", help="tokens of text for each sequence (%(default)s)"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what is decoded (default: the store's sample.txt, or random tokens)"
    )
    parser.add_argument("--device", type=Path, metavar="FILE", help="figures of inflash probe -o (default: those that are kept)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw predicted and measured steps; needs inflash[plot]")
    parser.add_argument("--grid", action="store_true", help="also measure other plans for each budget, each in turn with it")
    add_engine_flags(parser)
