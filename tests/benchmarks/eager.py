"""AIS, IWAE and L[q*] beside the same in eager PyTorch, as one writes them there: all rows at once, autograd.

The published decoder, the same numbers of rows, temperatures, leapfrog steps and samples. PyTorch comes with
the extra `bench`, which `make bench` installs; without it nothing is timed. The two AIS differ by more than
their noise at so few temperatures, for ours draws each transition's step from [0.3, 1] of that given.
L[q*] is of the Gaussian family, and there of one digit and by the rule of the authors and of the
reproduction: Adam of 100 samples a step, until ten windows of a hundred bring nothing.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import annealing
import jax
import jax.numpy as jnp
import numpy as np
from annealing import CHAINS, IMAGES, LEAPFROG, STEP, WIDTHS, oracle_log_likelihood
from models import oracle_encoder
from timing import compiled, matmul_peak, record, seconds, show

import infsub
from infsub.types import Gaussian, Target

TEMPERATURES, SAMPLES = 20, 5000


def pytorch(params: Any, xs: Any, q: Gaussian) -> dict[str, Callable[[], Any]]:
    """() -> log p̂ [N] of AIS from the prior, and of IWAE from q, of [N, D]."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn import functional  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(os.cpu_count() or 1)
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in params.items()}
    layers = [(tensors[f"decoder_w{i}"], tensors[f"decoder_b{i}"]) for i in range(len(WIDTHS) - 1)]
    digits, means, scales = (torch.from_numpy(np.array(array)) for array in (xs, *q))

    def log_likelihood(x: Any, z: Any) -> Any:
        for weight, bias in layers[:-1]:
            z = functional.elu(z @ weight + bias)
        logits = z @ layers[-1][0] + layers[-1][1]
        x = x.expand_as(logits)
        return -functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)

    def log_density(x: Any, z: Any, beta: float) -> Any:
        return -0.5 * (z**2).sum(-1) + beta * log_likelihood(x, z)

    def gradient(x: Any, z: Any, beta: float) -> Any:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(log_density(x, z, beta).sum(), z)[0]

    def ais() -> Any:
        x = digits.repeat_interleave(CHAINS, 0)
        z, log_weights = torch.randn(len(x), WIDTHS[0]), torch.zeros(len(x))
        for t in range(TEMPERATURES):
            beta = (t + 1) / TEMPERATURES
            with torch.no_grad():
                log_weights += log_likelihood(x, z) / TEMPERATURES
                start = log_density(x, z, beta)
            momentum = torch.randn_like(z)
            new, v = z, momentum + 0.5 * STEP * gradient(x, z, beta)
            for step in range(LEAPFROG):
                new = new + STEP * v
                kick = STEP if step < LEAPFROG - 1 else 0.5 * STEP
                v = v + kick * gradient(x, new, beta)
            with torch.no_grad():
                kinetic = 0.5 * ((v**2).sum(-1) - (momentum**2).sum(-1))
                log_ratio = log_density(x, new, beta) - start - kinetic
                accepted = torch.rand(len(x)).log() < log_ratio
                z = torch.where(accepted[:, None], new, z)
        return torch.logsumexp(log_weights.view(-1, CHAINS), 1) - math.log(CHAINS)

    @torch.no_grad()
    def iwae() -> Any:
        found = []
        for x, mean, scale in zip(digits, means, scales, strict=True):
            noise = torch.randn(SAMPLES, WIDTHS[0])
            z = mean + scale * noise
            log_q = -0.5 * (noise**2).sum(-1) - scale.log().sum()
            log_weights = log_likelihood(x, z) - 0.5 * (z**2).sum(-1) - log_q
            found.append(torch.logsumexp(log_weights, 0) - math.log(SAMPLES))
        return torch.stack(found)

    def local() -> Any:
        x, mean, log_scale = digits[0], means[0].clone(), scales[0].log()
        fitted = [mean.requires_grad_(), log_scale.requires_grad_()]
        adam = torch.optim.Adam(fitted, 1e-3, eps=1e-4)

        def elbo(num_samples: int) -> Any:
            noise = torch.randn(num_samples, WIDTHS[0])
            z = mean + log_scale.exp() * noise
            log_p = log_likelihood(x, z) - 0.5 * (z**2).sum(-1)
            return (log_p + 0.5 * (noise**2).sum(-1)).mean() + log_scale.sum()

        best, stalled = -math.inf, 0
        while stalled < 10:
            total = 0.0
            for _ in range(100):
                adam.zero_grad()
                bound = elbo(100)
                (-bound).backward()
                adam.step()
                total += bound.item() / 100
            best, stalled = max(best, total), 0 if total > best else stalled + 1
        with torch.no_grad():
            return elbo(5000)

    return {"AIS": ais, "IWAE": iwae, "L[q*] FFG": local}


@jax.jit
def iwae(key: Any, xs: Any, params: Any, q: Gaussian) -> Any:
    """One image after the other, from q, of [N, D]."""

    def one(arguments: tuple[Any, Any, Gaussian]) -> Any:
        key, x, q = arguments
        target = Target(None, partial(oracle_log_likelihood, params, x), WIDTHS[0])
        return infsub.iwae(key, target, q, SAMPLES).log_px

    return jax.lax.map(one, (jax.random.split(key, len(xs)), xs, q))


@jax.jit
def local(keys: Any, xs: Any, params: Any, q: Gaussian) -> Any:
    """L[q*] of each digit from Laplace's Gaussian, its fit included."""

    def one(key: Any, x: Any, q: Gaussian) -> Any:
        target = Target(None, partial(oracle_log_likelihood, params, x), WIDTHS[0])
        start = infsub.laplace(target, q.mean)
        return infsub.optimize_local(key, target, "gaussian", start=start).elbo.log_px

    return jax.vmap(one)(keys, xs, q)


def compare_local(theirs: Callable[[], Any], xs: Any, params: Any, q: Gaussian) -> None:
    """CPU seconds a digit: once, for theirs take a minute or two."""
    arguments = jax.random.split(jax.random.key(0), len(xs)), xs, params, q
    spent = compiled(local, *arguments)
    jax.block_until_ready(local(*arguments))
    clock = time.process_time()
    ours = jax.block_until_ready(local(*arguments))
    seconds_ours = (time.process_time() - clock) / len(xs)
    clock = time.process_time()
    bound = theirs().item()
    seconds_theirs = time.process_time() - clock
    print(
        f"\nL[q*] FFG, CPU seconds a digit: infsub {seconds_ours:.3f}, PyTorch {seconds_theirs:.1f}"
    )
    print(f"of the first digit {ours[0]:.2f} and {bound:.2f} nats")
    note = "CPU seconds a digit, the authors' rule"
    record("L[q*] FFG", seconds_ours, "eager PyTorch", seconds_theirs, note=note, **spent)


def main() -> None:
    """Prints milliseconds of both sides, and how far their answers lie apart."""
    annealing.TEMPERATURES = TEMPERATURES  # before anything is traced
    params, xs = annealing.model()
    shape = (len(xs), WIDTHS[0])
    q = Gaussian(jnp.zeros(shape), jnp.full(shape, 0.5))
    if "encoder_w0" in params:  # the published one's, not random weights'
        q = jax.vmap(partial(oracle_encoder, params))(xs)
    try:
        theirs = pytorch(params, xs, q)
    except ImportError:
        print("PyTorch is not installed: nothing to time beside")
        return
    key, macs = jax.random.key(0), sum(a * b for a, b in itertools.pairwise(WIDTHS))
    programs = {
        "AIS": (annealing.ours, (key, xs, params, oracle_log_likelihood)),
        "IWAE": (iwae, (key, xs, params, q)),
    }
    flops = {
        "AIS": 2 * 2 * macs * IMAGES * CHAINS * TEMPERATURES * LEAPFROG,
        "IWAE": 2 * macs * IMAGES * SAMPLES,
    }
    peak = matmul_peak()
    for name, (function, arguments) in programs.items():
        spent = compiled(function, *arguments)
        ours = partial(function, *arguments)
        times = seconds({"infsub": ours, "eager PyTorch": theirs[name]})
        show(f"{name}: {IMAGES} images", times, "infsub")
        found = [np.mean(np.asarray(run())) for run in (ours, theirs[name])]
        print(f"log p̂ {found[0]:.1f} and {found[1]:.1f} nats")
        record(
            name,
            times["infsub"][0],
            "eager PyTorch",
            times["eager PyTorch"][0],
            flop=flops[name],
            peak=peak,
            **spent,
        )
    compare_local(theirs["L[q*] FFG"], xs, params, q)


if __name__ == "__main__":
    main()
