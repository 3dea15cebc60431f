"""The arguments of every command, apart from the commands themselves so that `--help` imports next to nothing.

`ENGINE_FLAGS` maps onto the fields of `EngineOptions` and `SAMPLING_FLAGS` onto those of `SamplingParams`, one to one; a test holds
them together. What a value may be is checked there, once, for Python and the command line alike.
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..pipeline.options import COMPUTE_DTYPES, FFN_MODES, PATHS, POLICIES, EngineOptions

CONVERT_DTYPES = ("auto", "bfloat16", "float16", "float32")


def share_or_count(text: str) -> float | int:
    """`0.25` and `1.0` are shares (float), `512` and `1` are counts (int)."""
    try:
        return int(text)
    except ValueError:
        share = float(text)
    if not math.isfinite(share):
        raise ValueError(text)
    return share


def logit_bias(text: str) -> dict[str, float]:
    """`2=-100,50=3.5` is {"2": -100.0, "50": 3.5}, as JSON would have it."""
    found: dict[str, float] = {}
    for part in text.split(","):
        token, equals, bias = part.partition("=")
        try:
            if not equals or not token.strip().isdecimal() or token.strip() in found:
                raise ValueError(part)
            found[token.strip()] = float(bias)
        except ValueError:
            expected = "token ids, each once, and numbers, as in 2=-100,50256=3.5"
            raise argparse.ArgumentTypeError(f"expected {expected}, found {part!r}") from None
    return found


def token_ids(text: str) -> list[int]:
    """`2,50256` is [2, 50256]."""
    return [int(part) for part in text.split(",")]


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def byte_count(text: str) -> int:
    """7GiB, 7000MB, 7e9: a number of bytes."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(|[kmg]i?)b?\s*", text.lower())
    try:
        if match and (count := int(float(match[1]) * _UNITS[match[2]])) > 0:
            return count
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected bytes such as 7GiB, 7000MB or 7000000000, found {text!r}")


def count_from_one(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number from 1 up, found {text!r}")


def memory_size(text: str) -> int | str:
    """A number of bytes, or `auto`."""
    return text if text == "auto" else byte_count(text)


ENGINE_FLAGS: dict[str, dict[str, Any]] = {
    "ffn": {
        "choices": FFN_MODES,
        "help": "where feed-forward neurons are while decoding: sparse keeps the predicted ones in a cache, hybrid streams all of them "
        "for every token, naive streams the attention too, resident keeps everything in memory (default: %(default)s)",
    },
    "predictor": {
        "metavar": "NAME",
        "help": "who names the active neurons with --ffn sparse: auto (the store's best), exact (the truth, with the up projection "
        "in memory), none (all neurons), or a predictor that `inflash info` lists (default: %(default)s)",
    },
    "cache_neurons": {
        "type": share_or_count,
        "metavar": "SHARE|COUNT",
        "help": "neurons of each layer kept in memory with --ffn sparse: 0.25 is a quarter of them, 512 is 512 of them, 1.0 is all, "
        "1 is one (default: %(default)s)",
    },
    "policy": {
        "choices": POLICIES,
        "help": "who stays in the cache: lfu (used most, recent uses counting more), lru (used last), window (used by the last "
        "--window tokens) or none, for comparisons (default: %(default)s)",
    },
    "window": {
        "type": int,
        "metavar": "TOKENS",
        "help": "tokens whose neurons stay, with --policy window; the paper uses 4",
    },
    "prefetch": {
        "metavar": "NAME",
        "help": "look-ahead predictor by whose guess neurons are read while the layer before is computed: auto (the store's best), none, "
        "or one that `inflash info` lists (default: %(default)s)",
    },
    "path": {
        "choices": PATHS,
        "help": "how a cached layer's neurons come when several sequences decode together: sparse (the predicted ones by slot), dense (all "
        "of them, read in order), or whichever costs less, as measured (default: %(default)s)",
    },
    "overlap": {
        "action": argparse.BooleanOptionalAction,
        "help": "compute the neurons in memory while the others are being read; off for comparisons (default: on)",
    },
    "max_num_seqs": {
        "type": int,
        "metavar": "N",
        "help": "sequences decoded together: more share one reading of the neurons, and need more memory (default: %(default)s)",
    },
    "max_model_len": {
        "type": int,
        "metavar": "TOKENS",
        "help": "longest sequence, prompt and output together; sizes the KV cache (default: the model's limit, 2048 at most)",
    },
    "compute_dtype": {
        "choices": COMPUTE_DTYPES,
        "help": "dtype of the operands of products, sums being float32; auto is bfloat16 for 16-bit stores (default: %(default)s)",
    },
    "loaders": {
        "type": int,
        "metavar": "N",
        "help": "processes that read neurons (default: %(default)s)",
    },
    "queue_depth": {
        "type": int,
        "metavar": "N",
        "help": "reads that each loader keeps under way (default: %(default)s)",
    },
    "merge_gap": {
        "type": int,
        "metavar": "BYTES",
        "help": "neurons at most so far apart on flash are read together, with what lies between (default: %(default)s)",
    },
    "memory": {
        "type": memory_size,
        "metavar": "BYTES|auto",
        "help": "memory for everything, such as 6GiB; inflash plan says how it is spent, and flags that are given are kept. auto: what "
        "is free, less a reserve (default: what the other flags come to)",
    },
    "seed": {
        "type": int,
        "metavar": "N",
        "help": "the same seed gives the same text, also when sampling (default: %(default)s)",
    },
    "verify": {
        "action": "store_true",
        "help": "check neurons that are read, and weights that are loaded, against their checksums; slower",
    },
}

SAMPLING_FLAGS: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": int, "metavar": "N", "help": "most tokens to generate (16)"},
    "min_tokens": {"type": int, "metavar": "N", "help": "no end before this many tokens (0)"},
    "temperature": {
        "type": float,
        "metavar": "T",
        "help": "0 takes the likeliest token, 1 samples from the model's distribution (1.0)",
    },
    "top_p": {"type": float, "metavar": "P", "help": "sample from the likeliest tokens that make up this probability (1.0)"},
    "top_k": {"type": int, "metavar": "K", "help": "sample from the K likeliest tokens; 0 or -1: from all (0)"},
    "min_p": {"type": float, "metavar": "P", "help": "drop tokens less likely than this share of the likeliest one (0.0)"},
    "n": {"type": int, "metavar": "N", "help": "completions of each prompt (1)"},
    "stop": {"action": "append", "metavar": "TEXT", "help": "end before this text; may be repeated"},
    "stop_token_ids": {"type": token_ids, "metavar": "ID,ID", "help": "end at one of these tokens"},
    "ignore_eos": {"action": "store_true", "help": "go on after the end-of-sequence token"},
    "logprobs": {"type": int, "metavar": "N", "help": "log probabilities of the N likeliest tokens at each position"},
    "repetition_penalty": {
        "type": float,
        "metavar": "X",
        "help": "above 1, tokens that are already there become less likely (1.0)",
    },
    "presence_penalty": {
        "type": float,
        "metavar": "X",
        "help": "taken from the logit of a token that was generated before (0.0)",
    },
    "frequency_penalty": {"type": float, "metavar": "X", "help": "the same, once for each time it was generated (0.0)"},
    "logit_bias": {
        "type": logit_bias,
        "metavar": "ID=X,ID=X",
        "help": "added to the logits of up to 1024 tokens, -100 (never) to 100 (nearly always), as in 2=-100,50256=3.5",
    },
}


def flag(field: str) -> str:
    """`--cache-neurons` for `cache_neurons`."""
    return "--" + field.replace("_", "-")


def add_engine_flags(parser: argparse.ArgumentParser, aliases: Mapping[str, tuple[str, ...]] | None = None) -> None:
    """Adds one flag for each field of `EngineOptions`, with the field's own default.

    Args:
      parser: gets the flags, in a group of their own.
      aliases: further spellings of a field's flag.
    """
    group = parser.add_argument_group("engine", "how the model runs; the keyword arguments of inflash.LLM")
    defaults = {field.name: field.default for field in fields(EngineOptions)}
    for name, how in ENGINE_FLAGS.items():
        group.add_argument(flag(name), *(aliases or {}).get(name, ()), dest=name, default=defaults[name], **how)


def engine_options(arguments: argparse.Namespace) -> EngineOptions:
    """The options that the flags of `add_engine_flags` ask for.

    Raises:
      InflashError: a value is out of its range, or two contradict each other.
    """
    return EngineOptions(**{name: getattr(arguments, name) for name in ENGINE_FLAGS})


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag for each field of `SamplingParams` but `seed`, which the engine's flags have."""
    group = parser.add_argument_group(
        "sampling", "what is not given comes from the model's generation_config.json, else it is the value in brackets"
    )
    for name, how in SAMPLING_FLAGS.items():
        group.add_argument(flag(name), dest=name, default=None, **how)


def sampling_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `SamplingParams` that were given as flags, and only those."""
    return {name: value for name in SAMPLING_FLAGS if (value := getattr(arguments, name)) is not None}


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="a store, as `inflash convert` writes it")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document and nothing else; docs/cli.md lists its keys"
    )


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a Hugging Face checkpoint's folder, or an Orbax checkpoint of the canonical tree",
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="the store to make; it must not be there yet")
    parser.add_argument(
        "--dtype",
        choices=CONVERT_DTYPES,
        default="auto",
        help="dtype of the weights on flash; auto keeps the checkpoint's (auto)",
    )
    predictor = parser.add_mutually_exclusive_group()
    predictor.add_argument(
        "--predictor-rank",
        type=int,
        metavar="R",
        help="rank of the training-free predictor (default: chosen from the model's width)",
    )
    predictor.add_argument(
        "--no-predictor", action="store_true", help="make none; --ffn sparse then needs --predictor exact or none"
    )


def add_synth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", type=Path, metavar="DST", help="the store to make; it must not be there yet")
    parser.add_argument(
        "--like",
        required=True,
        metavar="SHAPE",
        help="opt-125m, opt-1.3b, opt-2.7b, opt-6.7b, opt-13b, opt-30b, opt-66b, or a config.json",
    )
    parser.add_argument(
        "--active",
        type=float,
        default=0.033,
        metavar="SHARE",
        help="of a layer's neurons that a token activates (0.033, as in OPT-6.7B)",
    )
    parser.add_argument("--rank", type=int, default=128, metavar="R", help="at which a predictor can tell them (128)")
    parser.add_argument(
        "--persistence",
        type=float,
        metavar="SHARE",
        help="of a token's active neurons that were active at the token before (0.25: a window of four reads about what the paper's did)",
    )
    parser.add_argument(
        "--hf", action="store_true", help="write a Hugging Face checkpoint rather than a store; it has no predictor"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same model (0)")


def add_info(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_json(parser)


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", metavar="TEXT", help="a text to continue; may be repeated")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a file whose whole text is the prompt; - reads standard input")
    add_json(parser)
    add_sampling_flags(parser)
    add_engine_flags(parser)


def add_bench_io(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        type=Path,
        metavar="MODEL|DIR",
        help="a store, whose bundles are read, or a folder on the disk to measure, where a scratch file is made and removed",
    )
    parser.add_argument(
        "--seconds", type=float, default=3.0, metavar="S", help="length of each measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--bundle-bytes", type=int, default=16384, metavar="N", help="size of a read in a folder (default: %(default)s)"
    )
    parser.add_argument("--file-mib", type=int, default=1024, metavar="N", help="size of the scratch file (default: %(default)s)")
    parser.add_argument(
        "--loaders", type=int, default=EngineOptions().loaders, metavar="N", help="loader processes (default: %(default)s)"
    )
    parser.add_argument(
        "--queue-depth",
        type=int,
        default=EngineOptions().queue_depth,
        metavar="N",
        help="reads that each loader keeps under way (default: %(default)s)",
    )


def add_bench_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--d-model", type=int, default=4096, metavar="D", help="width of the residual stream (default: %(default)s)"
    )
    parser.add_argument(
        "--d-ff", type=int, default=16384, metavar="F", help="neurons of a feed-forward block (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="length of each measurement (default: %(default)s)"
    )


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for the store and the results (default: %(default)s)",
    )
