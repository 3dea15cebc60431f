"""Kills batch runs at random moments, resumes them until they are done, and compares with a run that nobody disturbed.

    python tests/integration/batch_kills.py --runs 50

One JSON document on standard output. Every run is a job of its own on the embedded model. The engine, or every third time a loader, gets
SIGKILL some random milliseconds after a random number of new results, which may be none; after a few kills the job may finish.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from inflash.storage.checkpoint import open_source
from inflash.storage.convert import convert
from inflash.tools.demo import EMBEDDED

MOST_STARTS = 20


def write_requests(file: Path, count: int) -> None:
    prompts = [
        json.loads(line)["body"]["prompt"] for line in (EMBEDDED / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            prompt = [f"# {number}\n{prompts[(number + place) % len(prompts)]}" for place in range(3 if number % 5 == 0 else 1)]
            body = {"prompt": prompt, "temperature": 0, "max_tokens": 4 + number % 13}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}
            stream.write(json.dumps(line) + "\n")


def command(requests: Path, output: Path, store: Path) -> list[str]:
    flags = ["--compute-dtype", "float32", "--predictor", "exact"]
    return [
        sys.executable,
        "-m",
        "inflash.tools.cli",
        "run-batch",
        "-i",
        str(requests),
        "-o",
        str(output),
        "--model",
        str(store),
        *flags,
    ]


def texts(output: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in output.read_bytes().splitlines():
        document = json.loads(line)
        assert document["custom_id"] not in found, f"{document['custom_id']} was answered twice"
        found[document["custom_id"]] = [choice["text"] for choice in document["response"]["body"]["choices"]]
    return found


def wait_for_results(process: subprocess.Popen[bytes], output: Path, count: int) -> None:
    """Until there are so many lines or the process has ended; and then some milliseconds."""
    while process.poll() is None and (output.read_bytes().count(b"\n") if output.exists() else 0) < count:
        time.sleep(0.002)
    with suppress(subprocess.TimeoutExpired):
        process.wait(random.uniform(0, 0.2))


def disturbed(words: list[str], output: Path, num_requests: int, kills: int, victims: list[str]) -> int:
    """Starts, kills and starts again until the job is done; returns the number of starts."""
    for start in range(1, MOST_STARTS + 1):
        finished = output.read_bytes().count(b"\n") if output.exists() else 0
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        if start <= kills:
            wait_for_results(process, output, random.randint(finished, max(finished, num_requests - 1)))
        else:
            process.wait(600)
        if process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            victim = int(children[0]) if children and len(victims) % 3 == 2 else process.pid
            victims.append("engine" if victim == process.pid else "loader")
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            return start
        assert process.returncode in (1, -signal.SIGKILL), errors.decode()
        assert b"Traceback" not in errors, errors.decode()
    raise AssertionError(f"not finished after {MOST_STARTS} starts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--kills", type=int, default=3, help="of each run")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        with open_source(EMBEDDED) as source:
            store = convert(source, folder / "store", dtype="float32").path
        requests = folder / "in.jsonl"
        write_requests(requests, arguments.requests)
        calm = command(requests, folder / "calm.jsonl", store)
        subprocess.run(calm, check=True, capture_output=True)  # compiles
        (folder / "calm.jsonl").unlink()
        began = time.monotonic()
        subprocess.run(calm, check=True, capture_output=True)
        longest_s = time.monotonic() - began
        expected = texts(folder / "calm.jsonl")
        assert len(expected) == arguments.requests
        starts: list[int] = []
        victims: list[str] = []
        for number in range(arguments.runs):
            output = folder / f"{number}.jsonl"
            starts.append(disturbed(command(requests, output, store), output, arguments.requests, arguments.kills, victims))
            assert texts(output) == expected, f"run {number}, seed {arguments.seed}: the texts differ"
            print(f"{number + 1} of {arguments.runs}: {starts[-1]} starts", file=sys.stderr)
        left = [entry for entry in os.listdir("/dev/shm") if entry.startswith(("psm_", "inflash"))]
    document: dict[str, Any] = {
        "runs": arguments.runs,
        "requests": arguments.requests,
        "seed": arguments.seed,
        "undisturbed_s": round(longest_s, 2),
        "kills": {who: victims.count(who) for who in ("engine", "loader")},
        "starts": {"fewest": min(starts), "mean": sum(starts) / len(starts), "most": max(starts)},
        "left_in_shared_memory": left,
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
