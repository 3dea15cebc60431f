"""`inflash generate`: continue one or a few prompts."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import InflashError
from . import arguments as flags
from .table import cost_table


def run(arguments: argparse.Namespace) -> int:
    from ..pipeline.llm import LLM
    from ..pipeline.outputs import RequestOutput
    from ..pipeline.sampling_params import SamplingParams

    options = flags.engine_options(arguments)
    prompts = _prompts(arguments)
    given = flags.sampling_fields(arguments)
    SamplingParams(**given)  # says what is wrong before the model is loaded
    with LLM(arguments.model, **asdict(options)) as llm:
        params = SamplingParams.from_defaults(llm.generation_config, seed=arguments.seed, **given)
        outputs: list[RequestOutput] = llm.generate(prompts, params)
        summary = llm.run_summary()
        notes = llm.planning_notes
    if arguments.json:
        print(json.dumps({"outputs": [_document(output) for output in outputs], "run": summary}))
        return 0
    for output in outputs:
        for completion in output.outputs:
            print(f"{output.prompt}{completion.text}")
    for note in notes:
        print(f"inflash: warning: {note}", file=sys.stderr)
    print(cost_table(summary), file=sys.stderr)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.prompt_file == "-":
        return [sys.stdin.read()]
    try:
        return [Path(arguments.prompt_file).read_text(encoding="utf-8")]
    except OSError as error:
        raise InflashError(f"{arguments.prompt_file}: this prompt file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InflashError(f"{arguments.prompt_file}: expected UTF-8 text: {error}") from error


def _document(output: Any) -> dict[str, Any]:
    document = asdict(output)
    del document["metrics"], document["finished"]
    return document
