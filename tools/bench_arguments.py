"""Flags of the larger benchmarks."""

import argparse
from pathlib import Path

from ..pipeline.options import PATHS, EngineOptions
from .arguments import add_engine_flags, add_model, byte_count, count_from_one
from .plan_arguments import numbers


def row_names(text: str) -> tuple[str, ...]:
    from .bench_ablation import ROWS

    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(ROWS)}, found {unknown[0]!r}")
    return names


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


def add_batch(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--memory-limit", type=byte_count, required=True, metavar="BYTES", help="memory of every row, such as 1.25GiB"
    )
    parser.add_argument(
        "--batch", type=numbers, default="1,4,16,64", metavar="B,...", help="requests decoded together (%(default)s)"
    )
    parser.add_argument(
        "--requests",
        type=count_from_one,
        metavar="N",
        help="requests of every row; a batch takes the next where one is finished (default: as many as are decoded together)",
    )
    parser.add_argument(
        "--paths",
        type=path_names,
        default="sparse,dense,auto",
        metavar="NAMES",
        help="which ways of --path are compared, with commas between (%(default)s)",
    )
    parser.add_argument("--prompt-tokens", type=count_from_one, default=64, metavar="N", help="of each request (%(default)s)")
    parser.add_argument("--tokens", type=count_from_one, default=64, metavar="N", help="that each request makes (%(default)s)")
    parser.add_argument(
        "--kv-on-top",
        action="store_true",
        help="the KV cache of all requests but one comes on top of the limit, so that every row has the same memory for weights",
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="where prompts are from (default: the store's sample.txt, or random tokens)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw tokens a second over batches; needs inflash[plot]")


def path_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if unknown := [name for name in names if name not in PATHS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PATHS)}, found {unknown[0]!r}")
    return names


def token_counts(text: str) -> list[int]:
    """`128,512` is [128, 512]; counts may be 0."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(
            f"expected numbers of tokens from 0 up, separated by commas like 128,512; found {text!r}"
        )
    return [int(part) for part in parts]


def prompt_and_generated(text: str) -> tuple[int, int]:
    """`512,128` is a prompt of 512 tokens and 128 generated ones."""
    counts = text.split(",")
    if len(counts) != 2 or not all(part.isascii() and part.isdigit() and int(part) for part in counts):
        raise argparse.ArgumentTypeError(
            f"expected two numbers of tokens from 1 up, of the prompt and generated, like 512,128; found {text!r}"
        )
    return int(counts[0]), int(counts[1])


def repetitions(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a number of repetitions from 1 up, found {text!r}")
    return int(text)


def add_bench_llm(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "-p",
        "--n-prompt",
        type=token_counts,
        action="extend",
        metavar="N,...",
        help="measure prompts of so many tokens; 0: none (default: 512)",
    )
    parser.add_argument(
        "-n",
        "--n-gen",
        type=token_counts,
        action="extend",
        metavar="N,...",
        help="measure generating so many tokens; 0: none (default: 128)",
    )
    parser.add_argument(
        "-pg",
        type=prompt_and_generated,
        action="append",
        default=[],
        metavar="PP,TG",
        help="also measure a prompt of PP tokens and then TG generated ones; may be repeated",
    )
    parser.add_argument(
        "-r",
        "--repetitions",
        type=repetitions,
        default=5,
        metavar="N",
        help="measurements of each test, after one that does not count (default: %(default)s)",
    )
    add_engine_flags(parser, aliases={"max_num_seqs": ("-b",)})
    parser.set_defaults(max_num_seqs=1)  # as llama-bench measures
