"""Steps a second of local optimisation, FFG and AF, beside a plain Python loop over the images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
from models import load_oracle, oracle_encoder, oracle_target
from timing import seconds

import infsub
from infsub import posteriors
from infsub.types import Params

STEPS = 200
IMAGES = {"gaussian": 20, "auxiliary": 4}
SAMPLES = (20, 100)


def ours(name: str, keys: Any, xs: Any, model: Params, num_samples: int) -> Any:
    """STEPS steps of optimize_local as they are taken on a block of images."""
    posterior = posteriors.make(name, 50)

    @jax.jit
    @jax.vmap
    def point(key: Any, x: Any) -> Any:
        target, start = oracle_target(model, x), oracle_encoder(model, x)
        params = posteriors.with_gaussian(posterior.init(key), start)
        rule = {"num_samples": num_samples, "max_steps": STEPS, "patience": STEPS}
        return infsub.optimize_local(
            key, target, posterior, params, num_final_samples=20, **rule
        ).elbo.log_px

    return lambda: point(keys, xs)


def plain_loop(name: str, keys: Any, xs: Any, model: Params, num_samples: int) -> Any:
    """One image after the other, one jitted Adam step after the other, as is usually written."""
    posterior, adam = posteriors.make(name, 50), optax.adam(5e-3)
    init = jax.jit(posterior.init)

    @jax.jit
    def step(key: Any, params: Params, moments: Any, x: Any) -> Any:
        def loss(params: Params) -> Any:
            q = posteriors.sampler(posterior, params)
            return -infsub.elbo(key, oracle_target(model, x), q, num_samples).log_px

        value, gradient = jax.value_and_grad(loss)(params)
        update, moments = adam.update(gradient, moments)
        return optax.apply_updates(params, update), moments, value

    def run() -> list[Any]:
        losses = []
        for key, x in zip(keys, xs, strict=True):
            params = posteriors.with_gaussian(init(key), oracle_encoder(model, x))
            moments = adam.init(params)
            for number in range(STEPS):
                params, moments, loss = step(jax.random.fold_in(key, number), params, moments, x)
                losses.append(float(loss))  # they print it, or judge convergence by it
        return losses

    return run


def main() -> None:
    """Prints a row a family and number of samples: median steps of one image a second."""
    shared = Path(__file__).resolve().parents[3] / "shared"
    if not (shared / "oracles").is_dir():
        print("needs ../shared, the folder of real data and oracles")
        return
    model, digits = load_oracle(shared)
    print(f"{'':28}  images  optimize_local  plain loop   ratio   (median steps/s)")
    for name, num_images in IMAGES.items():
        xs = digits[:: len(digits) // num_images]
        keys = jax.random.split(jax.random.key(0), len(xs))
        for num_samples in SAMPLES:
            arguments = (name, keys, jnp.asarray(xs), model, num_samples)
            functions = {"ours": ours(*arguments), "plain": plain_loop(*arguments)}
            times = {who: median for who, (median, _, _) in seconds(functions, 3).items()}
            rates = {who: num_images * STEPS / time for who, time in times.items()}
            print(
                f"{name + f', {num_samples} samples':28}  {num_images:6}  {rates['ours']:14.0f}"
                f"  {rates['plain']:10.0f}  {rates['ours'] / rates['plain']:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
