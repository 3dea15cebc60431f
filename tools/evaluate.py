"""`inflash eval`: what predictors cost in quality, and what they save."""

import argparse
import json
import sys
from typing import Any

from ..errors import InflashError
from ..storage.store import Store, open_store
from .progress import progress_bar
from .table import table
from .train_predictor import check_tokens, context_for, tokenizer_of

_PROMPT_TOKENS = 32
_LONGEST_DECODED = 2048


def run(arguments: argparse.Namespace) -> int:
    _check_flags(arguments)
    if arguments.tasks:
        return _run_tasks(arguments)
    store = open_store(arguments.model)
    if arguments.decode and not 0 < arguments.decode < min(store.config.max_positions, _LONGEST_DECODED):
        raise InflashError(
            f"--decode: expected 1 to {min(store.config.max_positions, _LONGEST_DECODED) - 1} tokens, found {arguments.decode}"
        )
    if arguments.plot:
        from .plot_file import check_plot

        check_plot(arguments.plot)  # before an hour of work rather than after
    document = _judge(store, arguments)
    print(json.dumps(document) if arguments.json else as_text(document))
    if arguments.plot:
        from .evaluation_plot import save_plot

        save_plot(document, arguments.plot)
        if not arguments.json:
            print(f"\nplot: {arguments.plot}")
    return 0


def _check_flags(arguments: argparse.Namespace) -> None:
    """What belongs to text and what to tasks.

    Raises:
      InflashError: neither or both are asked for, or a flag of the one is given with the other.
    """
    if bool(arguments.tasks) == bool(arguments.text):
        found = "both" if arguments.tasks else "neither"
        raise InflashError(f"eval: expected either --text FILE or --tasks NAME, found {found}")
    kind, others = ("--tasks", ("plot", "decode")) if arguments.tasks else ("--text", ("include_path", "limit", "num_fewshot"))
    if ignored := [f"--{name.replace('_', '-')}" for name in others if getattr(arguments, name)]:
        raise InflashError(f"eval: {', '.join(ignored)} does not go with {kind}; leave it out")


def _judge(store: Store, arguments: argparse.Namespace) -> dict[str, Any]:
    from ..pipeline.evaluation import check_names, evaluate
    from ..pipeline.text_windows import read_windows

    check_tokens(arguments.tokens)
    names = check_names(store, arguments.predictor or list(store.predictors))
    windows = read_windows(
        arguments.text,
        tokenizer_of(store),
        bos_id=store.config.bos_token_id,
        context=context_for(store, arguments.context),
        most_tokens=arguments.tokens,
    )
    total = windows.num_tokens * (store.config.num_layers + 1) * (1 + len(names))
    with progress_bar(total=total, desc="evaluating", unit=" tokens") as bar:
        document = evaluate(store, windows, names, progress=bar.update)
    if arguments.decode:
        for name in names:
            document["predictors"][name] |= _decoded(store, name, windows.token_ids[0], arguments.decode)
    return document


def _decoded(store: Store, name: str, token_ids: Any, count: int) -> dict[str, float]:
    """Time and reads of a token while decoding one sequence with this predictor and otherwise default settings."""
    from ..pipeline.llm import LLM
    from ..pipeline.sampling_params import SamplingParams

    with LLM(store.path, predictor=name, max_num_seqs=1) as llm:
        prompt = token_ids[: min(_PROMPT_TOKENS, llm.max_model_len - count)].tolist()
        llm.generate([prompt], SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True))
        summary = llm.engine.times.summary()
    return {"ms_per_token": summary["total_ms"], "mib_per_token": summary["mib_per_token"]}


def as_text(document: dict[str, Any]) -> str:
    """The tables for people."""
    dense = document["dense"]["perplexity"]
    lines = [f"{document['model']} on {document['convention']}.", f"Dense perplexity {dense:.3f}."]
    if not document["predictors"]:
        return "\n".join([*lines, "The store has no predictors."])
    header = [
        "predictor",
        "perplexity",
        "to dense",
        "KL (nats)",
        "same top token",
        "recall",
        "precision",
        "active",
        "predicted",
        "MiB",
    ]
    timed = any("ms_per_token" in figures for figures in document["predictors"].values())
    rows = []
    for name, figures in document["predictors"].items():
        row: list[object] = [
            name,
            f"{figures['perplexity']:.3f}",
            f"{100 * (figures['perplexity'] / dense - 1):.2f}%",
            f"{figures['kl']:.5f}",
        ]
        row += [_percent(figures[key]) for key in ("top1_agreement", "recall", "precision", "active", "predicted")]
        row.append(f"{figures['bytes'] / 2**20:.2f}")
        rows.append(row + ([f"{figures['ms_per_token']:.2f}", f"{figures['mib_per_token']:.3f}"] if timed else []))
    lines += ["", table(header + (["ms/token", "MiB read/token"] if timed else []), rows)]
    header = ["layer", "rank", "active", "predicted", "recall", "precision", "false neg.", "false pos.", "overlap"]
    keys = ("active", "predicted", "recall", "precision", "false_negatives", "false_positives", "overlap")
    for name, figures in document["predictors"].items():
        rows = [[layer["layer"], layer["rank"] or "-", *(_percent(layer[key]) for key in keys)] for layer in figures["layers"]]
        lines += ["", f"{name}:", table(header, rows)]
    lines += [
        "",
        "false neg.: of the active neurons, those not named. false pos.: of the others, those named. "
        "overlap: of the named neurons, those that the token before had named, too.",
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _run_tasks(arguments: argparse.Namespace) -> int:
    from ..pipeline.llm import LLM
    from .harness import evaluate_tasks, results_table

    if arguments.predictor and len(arguments.predictor) > 1:
        raise InflashError(f"--tasks: expected one --predictor, found {len(arguments.predictor)}; run the command once for each")
    name = arguments.predictor[0] if arguments.predictor else "auto"
    options: dict[str, Any] = {"ffn": "hybrid"} if name == "dense" else {"predictor": name}
    with LLM(arguments.model, **options, max_model_len=arguments.context) as llm:
        results = evaluate_tasks(
            llm, arguments.tasks.split(","), arguments.include_path, limit=arguments.limit, num_fewshot=arguments.num_fewshot
        )
        used = "dense" if name == "dense" else llm.engine.plan.predictor
    if arguments.json:
        print(json.dumps({"model": str(arguments.model), "predictor": used, "tasks": results}))
    else:
        print(f"{arguments.model}, {'dense' if used == 'dense' else f'predictor {used}'}:\n", file=sys.stderr)
        print(results_table(results))
    return 0
