"""The same work by Hugging Face accelerate's disk offload, to compare `inflash bench batch` with: layer by layer, dense.

    python examples/accelerate_offload.py CHECKPOINT --python HF_PYTHON --memory-limit 1.225GiB --batch 1

CHECKPOINT is a Hugging Face folder (`inflash synth DST --like opt-1.3b --hf`), HF_PYTHON an interpreter that has torch, transformers and
accelerate; this script itself needs only inflash. Each batch runs in a memory cgroup with the limit, which only root can make. One JSON
document a line.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_LEFT_TO_THE_PROGRAM = 700 << 20
"""Of the limit, what weights may not have: torch itself, a layer being read, activations and the KV cache. With less it was killed."""


def measure(checkpoint: str, weights_bytes: int, batch: int, prompt_tokens: int, tokens: int) -> dict[str, Any]:
    """Runs in the other interpreter."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.bfloat16,
        device_map="auto",
        max_memory={"cpu": weights_bytes},
        offload_folder=f"{checkpoint}/offload",
    )
    places = list(model.hf_device_map.values())
    prompts = torch.randint(10, model.config.vocab_size, (batch, prompt_tokens), generator=torch.Generator().manual_seed(0))
    times = []
    with torch.inference_mode():
        cache, newest = None, prompts
        for _ in range(tokens):
            began = time.perf_counter()
            found = model(input_ids=newest, past_key_values=cache, use_cache=True)
            cache, newest = found.past_key_values, found.logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter() - began)
    return {
        "batch": batch,
        "prompt_s": times[0],
        "step_s": sum(times[1:]) / max(len(times) - 1, 1),
        "tokens": tokens,
        "on_disk": places.count("disk"),
        "modules": len(places),
    }


def _forget(folder: Path) -> None:
    """Drops files from the page cache: what is cached already counts against no cgroup, as if the model fitted."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def run_limited(arguments: argparse.Namespace) -> None:
    from inflash.tools.memory_group import memory_group

    for batch in arguments.batch:
        values = [
            arguments.checkpoint,
            arguments.memory_limit - _LEFT_TO_THE_PROGRAM,
            batch,
            arguments.prompt_tokens,
            arguments.tokens,
        ]
        command = [arguments.python, __file__, "--measure", json.dumps(values)]
        _forget(Path(arguments.checkpoint))
        with memory_group(arguments.memory_limit) as group:
            ended = subprocess.run(group.wrap(command), stdout=subprocess.PIPE, text=True, check=False)
            peak = group.peak_bytes()
        found = (
            json.loads(ended.stdout.splitlines()[-1]) if ended.returncode == 0 else {"batch": batch, "failed": ended.returncode}
        )
        print(json.dumps({**found, "peak_bytes": peak, "memory_limit": arguments.memory_limit}), flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
        return 0
    from inflash.tools.arguments import byte_count
    from inflash.tools.memory_group import NoCgroup

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--python", required=True, type=Path)
    parser.add_argument("--memory-limit", required=True, type=byte_count)
    parser.add_argument("--batch", default=[1], type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4)
    try:
        run_limited(parser.parse_args())
    except NoCgroup as error:
        print(f"the comparison needs a memory cgroup, found none: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
