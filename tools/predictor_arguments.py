"""The arguments of the commands that make and judge predictors; see `arguments`."""

import argparse
from pathlib import Path

from ..pipeline.options import PREDICTOR_METHODS
from .arguments import add_json, add_model


def rank_or_auto(text: str) -> int | None:
    """`auto` is None."""
    if text != "auto" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected auto or a number, found {text!r}")
    return None if text == "auto" else int(text)


def add_train_predictor(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="UTF-8 text of the kind that the model is to write (default: text that the model generates itself)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="tokens of text to use, taken from all files in proportion to their sizes (default: 100000; 8192 of generated text)",
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="tokens of a window (default: the model's positions, 2048 at most; 256 for generated text)",
    )
    parser.add_argument(
        "--method",
        choices=PREDICTOR_METHODS,
        default=PREDICTOR_METHODS[0],
        help="trained: the paper's, by gradient descent; weighted-svd: the up projection's best low-rank copy on this text, without "
        "training; sign-bits: the signs of its weights, one bit each (default: %(default)s)",
    )
    parser.add_argument(
        "--rank",
        type=rank_or_auto,
        metavar="auto|N",
        help="rank of every layer; auto gives each layer the smallest that reaches the recall without naming too many, "
        "and more while that spares a tenth of the neurons named (default: auto)",
    )
    parser.add_argument(
        "--recall",
        type=float,
        default=0.99,
        metavar="SHARE",
        help="share of the active neurons to be named (default: %(default)s)",
    )
    parser.add_argument(
        "--most-predicted",
        type=float,
        default=3.0,
        metavar="TIMES",
        help="with --rank auto: a rank will do when no more than this many times the active neurons are named (default: %(default)s)",
    )
    parser.add_argument(
        "--most-share",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="with --rank auto: weights of the predictor at most, as a share of the model's (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, default=2, metavar="N", help="most passes over the text's pairs (default: %(default)s)"
    )
    parser.add_argument("--name", metavar="NAME", help="of the predictor in the store (default: the method)")
    parser.add_argument(
        "--look-ahead", action="store_true", help="also make NAME-ahead, which guesses a layer's neurons one layer earlier"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order of the pairs (default: %(default)s)")
    parser.add_argument("--replace", action="store_true", help="replace a predictor of the same name when the new one is ready")
    parser.add_argument("--restart", action="store_true", help="begin anew where an unfinished run would be continued")
    add_json(parser)


def add_eval(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 text that the predictors were not trained on")
    parser.add_argument(
        "--predictor", action="append", metavar="NAME", help="a predictor of the store; may be repeated (default: all of them)"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=32768,
        metavar="N",
        help="tokens of text to use, taken from all files in proportion to their sizes (default: %(default)s)",
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="tokens of a window (default: the model's positions, 2048 at most)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the figures into FILE, e.g. eval.png (needs inflash[plot])"
    )
    parser.add_argument("--decode", type=int, default=0, metavar="N", help="also time N tokens decoded with each predictor")
    tasks = parser.add_argument_group("lm-evaluation-harness, in place of --text (needs inflash[lm-eval])")
    tasks.add_argument("--tasks", metavar="NAME,NAME", help="tasks to run with one --predictor (default: auto; dense: none)")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="a folder of your own tasks' YAML files")
    tasks.add_argument("--limit", type=int, metavar="N", help="documents of each task (default: all)")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each document (default: the task's)")
    add_json(parser)


def add_import_predictor(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a folder of PowerInfer's or Deja Vu's PyTorch files, one a layer, or a .safetensors file of `inflash export-predictor`",
    )
    parser.add_argument("--name", metavar="NAME", help="what to call it (default: imported for a folder, else the file's name)")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="in every layer, name the neurons whose score, before any sigmoid, exceeds this; lower names more "
        "(default: the predictor's own)",
    )
    parser.add_argument(
        "--look-ahead", action="store_true", help="a folder's predictor was trained on the FFN input of the layer before"
    )
    parser.add_argument("--replace", action="store_true", help="take the place of a predictor of the same name")
    add_json(parser)


def add_export_predictor(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("name", metavar="NAME", help="one of the store's predictors, as `inflash info` lists them")
    parser.add_argument("destination", type=Path, metavar="DST", help="the .safetensors file to write; it must not be there yet")
