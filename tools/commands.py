"""The table of sub-commands: what each is called, takes and says of itself."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from . import arguments as flags
from . import batch_arguments as batch_flags
from . import bench_arguments as bench_flags
from . import plan_arguments as plan_flags
from . import predictor_arguments as predictor_flags
from . import profile_arguments as profile_flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One sub-command.

    Attributes:
      module: the module of this folder that runs it.
      summary: its line in the list of commands.
      add_arguments: gives its parser the arguments.
      details: the end of its help text, printed as it is.
    """

    module: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    details: str = ""


def _add_nothing(_: argparse.ArgumentParser) -> None:
    """For commands without arguments."""


def _add_bench_kernels(parser: argparse.ArgumentParser) -> None:
    flags.add_bench_kernels(parser)
    parser.add_argument("--vocab", type=int, default=50272, metavar="V", help="rows of the output head (default: %(default)s)")


COMMANDS: dict[str, Command] = {
    "convert": Command(
        module="convert",
        summary="turn a checkpoint into a store, once",
        add_arguments=flags.add_convert,
        details="""\
The store is written under a temporary name and renamed when it is whole. Converting goes tensor by tensor, so it needs little
memory whatever the model's size, and as much free space as the checkpoint takes.

  inflash convert ./opt-6.7b ./opt-6.7b.inflash
""",
    ),
    "info": Command(
        module="info",
        summary="say what is in a store",
        add_arguments=flags.add_info,
        details="  inflash info ./opt-6.7b.inflash\n",
    ),
    "verify": Command(
        module="verify",
        summary="check every weight of a store against its checksum",
        add_arguments=flags.add_info,
        details="Ends with 1 when something is wrong, naming the layers and neurons.\n\n  inflash verify ./opt-6.7b.inflash\n",
    ),
    "generate": Command(
        module="generate",
        summary="continue one or a few prompts",
        add_arguments=flags.add_generate,
        details="""\
  inflash generate ./opt-6.7b.inflash --prompt "Once upon a time" --max-tokens 64 --temperature 0
  inflash generate ./opt-6.7b.inflash --prompt-file story.txt --ffn hybrid --json
""",
    ),
    "run-batch": Command(
        module="run_batch",
        summary="run a file of requests, many at a time",
        add_arguments=batch_flags.add_run_batch,
        details="""\
IN has one request a line, as in OpenAI's batch files, all of them completions or all of them chats:

  {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once upon", "max_tokens": 64}}
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}]}}

All of it is checked before the first token is made, and every bad line is named. Each response is written as soon as it is there, in any
order: join on custom_id. It is on the disk within a second. A run that was stopped, killed or failed goes on where it was when the same
command is given again. OUT.job.json tells its state. When the disk is full the run waits for room.

SIGTERM or Ctrl-C: what is being answered is finished, nothing new is begun, and the exit code is 3. A second one stops at once, with
130. Either way the rest can be run later.

  inflash run-batch -i requests.jsonl -o responses.jsonl --model ./opt-6.7b.inflash --cache-neurons 0.15
  zcat requests.jsonl.gz | inflash run-batch -i - -o - --model ./opt-6.7b.inflash | gzip > responses.jsonl.gz
""",
    ),
    "profile": Command(
        module="profiler",
        summary="run prompts or a batch, and show where the time goes, process by process",
        add_arguments=profile_flags.add_profile,
        details="""\
A real run, watched: every process notes what it does, and is looked at while it runs. DIR gets

  report.html    what limits the run, and charts; opens in any browser, without a network
  trace.json     every token, layer and read on a time line; opens in ui.perfetto.dev
  profile.json   the figures

They are written however the run ends, also when a process of it is killed. The exit code is the run's own.

  inflash profile ./opt-6.7b.inflash --prompt "Once upon a time" --max-tokens 64 -o profile
  inflash profile ./opt-6.7b.inflash -i requests.jsonl -o profile --cache-neurons 0.15
""",
    ),
    "top": Command(
        module="top",
        summary="watch a running engine in the terminal",
        add_arguments=profile_flags.add_top,
        details="""\
Shows tokens a second, where a token's time goes, cache hits, what is read, and CPU and memory of every process. Works on any
running engine of yours; it need not have been started in a special way.

  inflash top 4711
  inflash top 4711 --interval 5 --count 12 > watched.txt
""",
    ),
    "train-predictor": Command(
        module="train_predictor",
        summary="make a predictor of active neurons for a store, from text",
        add_arguments=predictor_flags.add_train_predictor,
        details="""\
Runs the model over the text, one layer at a time, and fits each layer's predictor to which neurons were active. An eighth of the text is
held out to set the thresholds. A run that was killed goes on where it was when the same command is given again.

  inflash train-predictor ./opt-6.7b.inflash --text wiki.txt
  inflash train-predictor ./opt-6.7b.inflash --text books/*.txt --tokens 200000 --recall 0.97 --look-ahead
  inflash train-predictor ./opt-6.7b.inflash --method weighted-svd
""",
    ),
    "eval": Command(
        module="evaluate",
        summary="judge predictors: quality beside the dense model, recall, neurons named",
        add_arguments=predictor_flags.add_eval,
        details="""\
Runs the model over the text, dense and with each predictor, and compares. Use text that the predictor was not trained on.

  inflash eval ./opt-6.7b.inflash --text held-out.txt --plot eval.png
  inflash eval ./opt-6.7b.inflash --text held-out.txt --predictor trained --predictor svd --decode 64
  inflash eval ./opt-6.7b.inflash --tasks my_task --include-path ./tasks --predictor trained
""",
    ),
    "import-predictor": Command(
        module="import_predictor",
        summary="add a predictor that was made elsewhere to a store",
        add_arguments=predictor_flags.add_import_predictor,
        details="""\
SRC is one of these; which one is seen from the tensors' names:

  PowerInfer   a folder of model_0.pt, model_1.pt, ... with fc1.weight and fc2.weight; sparse_threshold in config.json counts
  Deja Vu      a folder of files such as mlp_layer0.pt, one a layer, with 0.weight and 1.weight
  inflash      a .safetensors file of inflash export-predictor, from a store of the same model

PyTorch's files need the extra inflash[torch]. Only tensors are read from them: nothing in a pickle runs.

  inflash import-predictor ./opt-6.7b.inflash ./opt-6.7b-predictor --name power-infer
  inflash import-predictor ./opt-6.7b.inflash trained.safetensors
""",
    ),
    "export-predictor": Command(
        module="export_predictor",
        summary="write a store's predictor to one file, to share it",
        add_arguments=predictor_flags.add_export_predictor,
        details="""\
The file holds the predictor alone, with checksums, none of the model's weights. It fits every store of the same model, whatever its
dtype.

  inflash export-predictor ./opt-6.7b.inflash trained trained.safetensors
""",
    ),
    "synth": Command(
        module="synth",
        summary="make a model of any size with planted sparsity, to measure speed with",
        add_arguments=flags.add_synth,
        details="""\
Writes random weights in the shape of an OPT model, planted so that a small share of the feed-forward neurons is active, a low-rank
predictor can tell which, and many of them stay active from token to token. Everything at run time is real; only the text means
nothing. The store comes with its predictors ("planted", and "planted-ahead" for prefetching) and sample.txt to measure them on.

  inflash synth ./synth-6.7b --like opt-6.7b
  inflash eval ./synth-6.7b --text ./synth-6.7b/sample.txt --tokens 512
  inflash bench ablation ./synth-6.7b --memory-limit 7GiB
""",
    ),
    "probe": Command(
        module="probe",
        summary="measure this machine and a disk for the planner, in a minute or somewhat more",
        add_arguments=plan_flags.add_probe,
        details="""\
Measures random reads by size and depth, streaming, memory, and the kernels, and keeps the figures in the user's cache, one file for
each disk. `--memory` and `inflash plan` use them. A new version, other kernels or another processor need new ones; inflash says so.

  inflash build-kernels
  inflash probe ./opt-6.7b.inflash
  inflash probe /mnt/flash -o device.json
""",
    ),
    "plan": Command(
        module="plan",
        summary="say how a memory budget would be spent, and what to expect of it",
        add_arguments=plan_flags.add_plan,
        details="""\
Decides what stays in memory and what is streamed or read when it is needed, and predicts what a token takes. `inflash probe` measures the
machine for it, --calibrate the model: a short pass over text, kept for later.

  inflash plan ./opt-6.7b.inflash --memory 6GiB
  inflash plan ./opt-6.7b.inflash --memory 6GiB --batch 8 --calibrate
  inflash plan ./opt-6.7b.inflash --memory 6GiB --plot budgets.png
""",
    ),
    "build-kernels": Command(
        module="build_kernels",
        summary="compile the native kernels for this machine, once",
        add_arguments=_add_nothing,
        details="""\
inflash runs without them. They are C++ in the place of XLA's kernels: they read attention, output head, predictor (for up to eight
sequences) and feed-forward weights (bfloat16 or float32) nearer to the memory's own rate, and skip the second half of neurons that the
ReLU silences. `inflash bench kernels` shows what that brings on this machine.

Needs a C++17 compiler: the one that CXX names, or c++, g++ or clang++. The library goes into the user's cache ($XDG_CACHE_HOME or
~/.cache), is checked against XLA's kernels on random inputs, and is used from then on. A new version of inflash or jaxlib, or another
processor, needs another build. INFLASH_KERNELS=xla does without it, INFLASH_KERNELS=native insists on it.

  inflash build-kernels
""",
    ),
    "demo": Command(
        module="demo",
        summary="see it work on the small model that comes with inflash",
        add_arguments=flags.add_demo,
        details="Converts the model, runs a few prompts with at most half of its neurons in memory, and compares with all in memory.\n",
    ),
}

BENCHMARKS: dict[str, Command] = {
    "io": Command(
        module="bench_io",
        summary="bytes a second by read size and reads under way, and of the loaders, beside fio on the same disk",
        add_arguments=flags.add_bench_io,
        details="  inflash bench io ./opt-6.7b.inflash\n  inflash bench io /mnt/flash --bundle-bytes 32768\n",
    ),
    "kernels": Command(
        module="bench_kernels",
        summary="bytes a second of weights that the kernels read, beside the memory's own rate",
        add_arguments=_add_bench_kernels,
        details="""\
After `inflash build-kernels` every kernel that has a native form is measured in both, in the same rounds.

  inflash bench kernels --d-model 2048 --d-ff 8192
""",
    ),
    "tracing": Command(
        module="bench_tracing",
        summary="what `inflash profile` costs the run that it watches",
        add_arguments=profile_flags.add_bench_tracing,
        details="  inflash bench tracing ./opt-6.7b.inflash\n",
    ),
    "ablation": Command(
        module="bench_ablation",
        summary="the paper's table, step by step: what each part of the system brings under a memory limit",
        add_arguments=bench_flags.add_ablation,
        details="""\
Every row is a run of its own under a memory cgroup (as root; elsewhere the caches are sized for the limit and nothing enforces it):

  naive      everything streamed from flash for every token
  hybrid     attention and embeddings resident, all neurons streamed
  predictor  only predicted neurons are read, up and down rows apart
  window     the neurons used most stay in memory, or with --window those of the last tokens
  bundles    a neuron is one read
  overlap    neurons in memory are computed while the others are read
  lookahead  neurons are read before their layer, by the guess of a look-ahead predictor
  resident   dense, the whole model in memory and no limit, where that fits

The rows predictor and window need a copy of the neurons without bundles, which is made beside the model and removed.

  inflash synth ./synth-1.3b --like opt-1.3b
  inflash bench ablation ./synth-1.3b --memory-limit 1.9GiB --plot ablation.png
""",
    ),
    "plan": Command(
        module="bench_plan",
        summary="plans for several budgets, predicted and measured, each in a memory cgroup of that size",
        add_arguments=plan_flags.add_bench_plan,
        details="""\
Probe the machine and calibrate the model first. As root, each run is in a cgroup that may hold the budget and 64 MiB.

  inflash probe ./synth-1.3b
  inflash plan ./synth-1.3b --memory 2GiB --calibrate
  sudo --preserve-env=HOME "$(command -v inflash)" bench plan ./synth-1.3b --budgets 40,75 --batch 1
""",
    ),
    "batch": Command(
        module="bench_batch",
        summary="tokens a second of many requests together: predicted neurons by slot, all in order, or the cheaper of both",
        add_arguments=bench_flags.add_batch,
        details="""\
Every row is a run of its own that is planned for the limit, as root in a memory cgroup that may hold 64 MiB more: B requests, each a prompt
and as many tokens as --tokens says, drawn with seeds, from the first prompt to the last token. `dense` is the share of layers and steps
whose neurons were read in order.

  inflash synth ./synth-1.3b --like opt-1.3b
  inflash bench batch ./synth-1.3b --memory-limit 1.25GiB --batch 1,4,16 --plot batches.png
""",
    ),
    "llm": Command(
        module="bench_llm",
        summary="tokens a second of a model: prompts and text generation, in the form of llama.cpp's llama-bench",
        add_arguments=bench_flags.add_bench_llm,
        details="""\
Tokens are random, and nothing is sampled. Each test is one line: pp512 is a prompt of 512 tokens, tg128 is 128 generated ones from an
empty context, pp512+tg128 is one after the other. -p and -n may be repeated.

  inflash bench llm ./opt-6.7b.inflash
  inflash bench llm ./opt-6.7b.inflash -p 128,512 -n 0 -pg 512,128 --ffn hybrid
  inflash bench llm ./opt-6.7b.inflash -p 0 -n 32 -r 3 -b 8 --cache-neurons 0.5
""",
    ),
}
