"""What is read from /proc, on this process and on one that is gone."""

import subprocess
import sys
import threading
import time

import numpy as np

from inflash.tools.process_sampler import ProcessSampler, look_at, pss_bytes

BUSY = "import sys\nprint('on', flush=True)\nx = bytearray(64 << 20)\nwhile True: pass"


def test_a_busy_process_is_seen_to_work() -> None:
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        sampler, end = ProcessSampler(), time.monotonic() + 30
        sampler.sample({"busy": process.pid})
        seen = sampler.samples["busy"]
        while time.monotonic() < end:
            sampler.sample({"busy": process.pid})
            if seen[-1].user_s > seen[0].user_s and seen[-1].rss_bytes > 64 << 20 and len(seen) >= 3:
                break
            time.sleep(0.02)
        found = sampler.document(seen[0].at_ns)["busy"]
        columns = found["samples"]
        assert found["pid"] == process.pid and columns["at_s"][0] == 0.0 and np.all(np.diff(columns["at_s"]) > 0)
        assert columns["user_s"][-1] > columns["user_s"][0] and columns["minor_faults"][-1] > 0 and columns["threads"][-1] == 1
        assert {len(values) for values in columns.values()} == {len(seen)}
        # The first look takes everything; the costly ones are rare afterwards.
        assert columns["pss_bytes"][0] > 0 and columns["voluntary_switches"][0] is not None and columns["pss_bytes"][1] is None
    finally:
        process.kill()
        process.communicate()
    assert look_at(process.pid) is None and pss_bytes(process.pid) is None
    sampler.sample({"busy": process.pid})  # is no error
    assert len(sampler.samples["busy"]) == len(seen)


def test_all_threads_are_counted() -> None:
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        sampler = ProcessSampler()
        sampler.sample({"self": threading.get_native_id()})
        (sample,) = sampler.samples["self"]
        assert sample.threads >= 4 and sample.queue_wait_s is not None and sample.queue_wait_s >= 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
