"""Counts what XLA compiles, by the event that JAX itself records."""

import jax.monitoring

_seen: list[float] = []


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _seen.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(_listen)  # once: a listener cannot be taken back


def num_compilations() -> int:
    """Since this module was imported."""
    return len(_seen)
