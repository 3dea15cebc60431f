"""Trains the embedded model: `python -m inflash.tools.train_demo -o DIR`.

A small OPT with ReLU on the standard library's source. Language models of this size are not sparse by themselves; one term in the
loss makes this one so. For activations a >= 0 of a token, (sum a)^2 / sum a^2 is the number of neurons that carry the token (it
is 1 when one neuron does, F when all do alike) and, unlike an L1 norm, cannot be lowered by shrinking the activations and growing
the next matrix. A layer's weight for it
is steered so that its share of active neurons follows a falling target.

Everything random is a function of (seed, step), and the state is an Orbax checkpoint: a killed run goes on where it was.
"""

import argparse
import json
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from ..kernels.compilation import jit
from .demo_corpus import EOS, texts, train_tokenizer
from .demo_export import ModelFacts, export
from .demo_network import DemoConfig, Parameters, forward, initial_parameters

ACTIVE_TARGET = 0.06  # share of neurons active at the end
VALIDATION_BATCHES = 32
CHECKPOINT_STEPS = 200
# One penalty a layer. It starts at next to nothing, so that only layers above their target are pushed.
PENALTY_START, PENALTY_LIMITS = 1e-4, (1e-5, 2.0)


def encode(tokenizer: Tokenizer, held_out: bool, cache: Path) -> np.ndarray:
    """All the texts as one stream of token ids, uint16, each text ended by `</s>`; kept in `cache`."""
    if not cache.exists():
        end = tokenizer.token_to_id(EOS)
        ids = [[*encoding.ids[1:], end] for encoding in tokenizer.encode_batch(list(texts(held_out)))]
        np.save(cache, np.concatenate([np.asarray(i, np.uint16) for i in ids]))
    return np.load(cache)


def sample_rows(stream: np.ndarray, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """[batch, length + 1] int32 token ids: `</s>`, as before every prompt, then a random stretch of the stream."""
    starts = rng.integers(0, len(stream) - length, batch)
    rows = np.full((batch, length + 1), 2, np.int32)
    rows[:, 1:] = stream[starts[:, None] + np.arange(length)]
    return rows


def losses(parameters: Parameters, rows: jax.Array, config: DemoConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean cross entropy (nats a token); per layer [num_layers]: effective share of neurons (differentiable), active share."""
    logits, activations = forward(parameters, rows[:, :-1], config)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
    effective = [jnp.mean(a.sum(-1) ** 2 / ((a**2).sum(-1) + 1e-6)) / config.d_ff for a in activations]
    active = jnp.stack([jnp.mean(a > 0) for a in activations])
    return cross_entropy, jnp.stack(effective), active


@lru_cache(maxsize=1)
def make_update(config: DemoConfig, steps: int):
    """The optimiser of a training of so many steps, and one step of it: (state, rows) to (state, loss, active shares)."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.5e-3, steps // 20, steps, 1e-4)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.05))

    def objective(parameters: Parameters, rows: jax.Array, penalty: jax.Array):
        cross_entropy, effective, active = losses(parameters, rows, config)
        return cross_entropy + jnp.sum(penalty * effective), (cross_entropy, active)

    @jit
    def update(state: dict, rows: jax.Array) -> tuple[dict, jax.Array, jax.Array]:
        gradient, (cross_entropy, active) = jax.grad(objective, has_aux=True)(state["parameters"], rows, state["penalty"])
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["parameters"])
        progress = jnp.minimum(state["step"] / (0.5 * steps), 1.0)
        target = 0.5 * (ACTIVE_TARGET / 0.5) ** progress  # falls geometrically during the first half
        error = jnp.clip(jnp.log(jnp.maximum(active, 1e-3) / target), -1.0, 1.0)  # [num_layers]
        penalty = jnp.clip(state["penalty"] * jnp.exp(0.04 * error), *PENALTY_LIMITS)
        return (
            {
                "parameters": optax.apply_updates(state["parameters"], updates),
                "optimizer": optimizer_state,
                "penalty": penalty,
                "step": state["step"] + 1,
            },
            cross_entropy,
            active,
        )

    return optimizer, update


def train(output: Path, config: DemoConfig, steps: int, batch: int, seed: int) -> Parameters:
    """Runs (or resumes) the training; returns the final parameters, float32."""
    tokenizer_file = output / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(config.vocab_size).save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    stream = encode(tokenizer, False, output / "train_tokens.npy")
    held_out = encode(tokenizer, True, output / "validation_tokens.npy")
    print(f"{len(stream):,} tokens to train on, {len(held_out):,} held out", flush=True)

    optimizer, update = make_update(config, steps)
    parameters = initial_parameters(jax.random.key(seed), config)
    state = {
        "parameters": parameters,
        "optimizer": optimizer.init(parameters),
        "penalty": jnp.full(config.num_layers, PENALTY_START, jnp.float32),
        "step": jnp.int32(0),
    }
    with ocp.CheckpointManager(output.absolute() / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        latest = manager.latest_step()
        if latest is not None:
            restored = manager.restore(latest, args=ocp.args.StandardRestore(state))
            # Bound to no device, as at the beginning, or `update` would compile again.
            state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored)
            print(f"resumed at step {latest}", flush=True)
        start, began = int(state["step"]), time.perf_counter()
        for step in range(start, steps):
            rng = np.random.default_rng([seed, step])
            state, loss, active = update(state, sample_rows(stream, rng, batch, config.max_positions))
            if step % 25 == 0 or step == steps - 1:
                loss = float(loss)  # waits for the step, so that the time below is real
                seconds = (time.perf_counter() - began) / (step - start + 1)
                print(
                    f"step {step:5d}/{steps}  loss {loss:.3f}  active {np.round(np.asarray(active), 3)}  "
                    f"penalty {np.round(np.asarray(state['penalty']), 4)}  {seconds:.2f} s/step",
                    flush=True,
                )
            if (step + 1) % CHECKPOINT_STEPS == 0 or step == steps - 1:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
    return state["parameters"]


def measure(parameters: Parameters, held_out: np.ndarray, config: DemoConfig) -> dict[str, Any]:
    """Loss and sparsity on held-out text, of the weights as they are saved: rounded to bfloat16."""
    rounded = {name: value.astype(jnp.bfloat16).astype(jnp.float32) for name, value in parameters.items()}
    evaluate = jit(lambda rows: losses(rounded, rows, config))
    rng = np.random.default_rng(12345)
    results = [evaluate(sample_rows(held_out, rng, 4, config.max_positions)) for _ in range(VALIDATION_BATCHES)]
    active = np.mean([np.asarray(active) for _, _, active in results], axis=0)
    return {
        "validation_loss": float(np.mean([float(loss) for loss, _, _ in results])),
        "validation_tokens": VALIDATION_BATCHES * 4 * config.max_positions,
        "zeros": [round(1 - float(share), 4) for share in active],
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m inflash.tools.train_demo", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for checkpoints and the finished model")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=4, help="rows of 512 tokens a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = DemoConfig()
    parameters = train(arguments.output, config, arguments.steps, arguments.batch, arguments.seed)
    held_out = np.load(arguments.output / "validation_tokens.npy")
    results = measure(parameters, held_out, config)
    num_tokens = arguments.steps * arguments.batch * config.max_positions
    facts = ModelFacts(
        steps=arguments.steps,
        trained_tokens=num_tokens,
        stream_tokens=len(np.load(arguments.output / "train_tokens.npy", mmap_mode="r")),
        seed=arguments.seed,
        **results,
    )
    export(arguments.output / "model", parameters, config, arguments.output / "tokenizer.json", facts)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
