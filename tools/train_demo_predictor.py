"""Trains the predictor that comes with the embedded model: `python -m inflash.tools.train_demo_predictor -o trained.safetensors`.

It is what the commands `convert`, `train-predictor` and `export-predictor` make. The text is half of the standard library's test modules:
none that the model was trained on, and none of the other half, on which the predictor is judged.
"""

import argparse
import tempfile
from pathlib import Path

from . import cli
from .demo import EMBEDDED, PREDICTOR
from .demo_corpus import held_out_half

TOKENS = 500_000
RANK = 40  # 5 % of the model's weights
RECALL = 0.993  # on text unlike that of the thresholds a few tenths of a percent are lost; 0.99 is to be left


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m inflash.tools.train_demo_predictor", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .safetensors file to write")
    arguments = parser.parse_args(argv)
    text = [str(file) for file in held_out_half("predictor")]
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "demo.inflash")
        for command in (
            ["convert", str(EMBEDDED), store],
            ["train-predictor", store, "--rank", str(RANK), "--recall", str(RECALL), "--tokens", str(TOKENS), "--text", *text],
            ["export-predictor", store, PREDICTOR, str(arguments.output)],
        ):
            if code := cli.main(command):
                raise SystemExit(code)


if __name__ == "__main__":
    main()
