"""`inflash synth`: a model of any size with planted sparsity, to measure speed with."""

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InflashError
from .progress import bytes_bar

if TYPE_CHECKING:
    from ..storage.convert import GivenPredictor
    from ..storage.model_config import ModelConfig
    from ..storage.synthetic import SyntheticSource

PREDICTOR, AHEAD = "planted", "planted-ahead"
SAMPLE_FILE = "sample.txt"
_SAMPLE_WORDS = 20_000
_RECALL, _AHEAD_RECALL = 0.99, 0.95


def run(arguments: argparse.Namespace) -> int:
    from ..storage.layout import neuron_bytes, resident_bytes
    from ..storage.synthetic import Planting, SyntheticSource
    from .synthetic_tokenizer import sample_text, write_tokenizer

    name, config = _config(arguments.like)
    planting = Planting(active=arguments.active, rank=arguments.rank, persistence=arguments.persistence, seed=arguments.seed)
    with tempfile.TemporaryDirectory(prefix="inflash-synth-") as folder:
        source = SyntheticSource(config, name, planting, Path(folder))
        write_tokenizer(Path(folder), config, source.dtype)
        total = resident_bytes(config, source.dtype) + neuron_bytes(config, source.dtype)
        with source, bytes_bar(total, "planting") as bar:
            _write(source, arguments, bar.update)
    sample = arguments.destination / SAMPLE_FILE
    sample.write_text(sample_text(config.vocab_size, _SAMPLE_WORDS, arguments.seed), encoding="utf-8")
    what = "Hugging Face checkpoint" if arguments.hf else "store"
    print(f"{arguments.destination}: a {what} in the shape of {name}, {total / 2**20:.1f} MiB; its text means nothing")
    advice = (
        f"inflash convert {arguments.destination} DST"
        if arguments.hf
        else f"inflash eval {arguments.destination} --text {sample}"
    )
    print(f"next: {advice}")
    return 0


def _write(source: "SyntheticSource", arguments: argparse.Namespace, progress) -> None:
    from ..storage.convert import convert
    from ..storage.huggingface_writer import write_huggingface

    if arguments.hf:
        write_huggingface(source, arguments.destination, progress=progress)
    else:
        convert(source, arguments.destination, predictor_rank=0, predictors=planted_predictors(source), progress=progress)


def planted_predictors(source: "SyntheticSource") -> "list[GivenPredictor]":
    """The predictors that a synthetic store comes with: of each layer's own neurons, and of those of the layer to come."""
    from ..storage.convert import GivenPredictor
    from ..storage.predictor_layout import LOW_RANK, PredictorInfo

    ranks = (source.planting.rank,) * source.config.num_layers

    def planted(name: str, ahead: int, recall: float) -> GivenPredictor:
        info = PredictorInfo(kind=LOW_RANK, method="planted", ranks=ranks, dtype=source.dtype, ahead=ahead, recall=recall)
        return GivenPredictor(
            name=name, info=info, tensors=lambda layer: source.predictor_tensors(layer, recall=recall, ahead=bool(ahead))
        )

    return [planted(PREDICTOR, 0, _RECALL), planted(AHEAD, 1, _AHEAD_RECALL)]


def _config(like: str) -> tuple[str, "ModelConfig"]:
    """A model's name, or a config.json of one's own."""
    from ..storage.families.opt import SIZES, model_config, named_config
    from ..storage.json_files import read_json_object

    if like in SIZES:
        return like, named_config(like)
    if not Path(like).is_file():
        raise InflashError(f"--like: expected one of {', '.join(SIZES)}, or an OPT model's config.json; found {like!r}")
    return str(like), model_config(read_json_object(Path(like)))
