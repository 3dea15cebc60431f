"""A profile's figures, made up: a run of three layers that waits for the disk, with one read of 4 KiB at a time."""

from typing import Any

CURVE = [
    {"size": size, "depth": depth, "bytes_per_s": rate}
    for size, depth, rate in ((4096, 1, 40e6), (4096, 128, 400e6), (65536, 1, 300e6), (65536, 128, 1.6e9))
]


def profile(**changes: Any) -> dict[str, Any]:
    """The usual figures with some replaced."""
    usual: dict[str, Any] = {
        "token": {"steps": 40, "io_wait_ms": 90.0, "memory_ms": 4.0, "compute_ms": 20.0, "total_ms": 114.0},
        "prompts": {"s": 1.0, "tokens": 9},
        "start_s": 4.2,
        "run": {"tokens": 40, "tokens_per_s": 8.8, "dense_share": 0.0},
        "layers": [{"hits": 100.0, "misses": 300.0, "prefetched": 0.0, "hit_rate": 0.25}] * 3,
        "reads": {
            "depth": 1, "mean_under_way": 1.0, "busy_share": 0.7, "asked_share": 0.84, "bytes_per_s": 41e6, "mean_bytes": 4096.0,
            "bytes_per_step": 4 << 20, "per_step": 1000.0, "wait_reading_ms": 70.0, "wait_asked_ms": 88.0,
        },
        "device": {"read_curve": CURVE},
        "machine": {"processors": 2},
        "model": {"d_ff": 1024, "num_layers": 3, "bundle_bytes": 4096, "d_model": 1024, "dtype": "bfloat16"},
        "predictor": "planted",
        "cache": {"share": 0.05},
        "working_set": [
            {"layer": layer, "tokens": tokens, "share": share, "missed": missed}
            for layer in (0, 2)
            for tokens, share, missed in ((1, 0.4, 0.7), (2, 0.5, 0.4), (4, 0.6, 0.3), (8, 0.8, 0.1), (16, 0.9, None))
        ],
        "options": {"ffn": "sparse", "loaders": 1, "merge_gap": 0, "memory": None, "prefetch": "auto"},
        "prefetch": None,
        "look_ahead": [],
        "traffic": {"dram_bytes_per_step": 2**30},
        "kernels": "native",
        "sequences": 1.0,
        "engine_queue_wait_share": 0.0,
        "decoding": {"s": 4.56, "loader_cpu_ms": 20.0, "loader_queue_wait_ms": 0.0, "engine_queue_wait_ms": 1.0},
    }  # fmt: skip
    return usual | changes
