"""Training steps a second beside a straightforward PyTorch loop; the share of the matmul peak.

The same model (784-200-200-2z, z = 50, its mirror), batch size, optimiser and data. PyTorch comes
with the extra `bench`, which `make bench` installs; without it only our side is timed.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import matmul_peak, record, seconds, show

from infsub import config, data, train_step
from infsub.vae import make_vae

STEPS, BATCH, WIDTHS = 200, 100, (784, 200, 200, 100, 50, 200, 200, 784)


def ours(images: data.Images, size: int) -> Any:
    """A function that takes STEPS steps, in one dispatch as training does."""
    settings = config.default()
    vae = make_vae(settings.model, (28, 28, 1), 2)
    task = train_step.make_task(vae, settings.train, size)
    keys, _, variables = train_step.initial(task, np.array([0]))
    held = {"states": train_step.init_states(task, variables)}

    def run() -> Any:
        held["states"], rows = train_step.train_chunk(task, keys, held["states"], images, 0, STEPS)
        return rows

    return run


def pytorch(x: np.ndarray) -> Any:
    """The loop that every PyTorch tutorial has: a loader of shuffled batches, autograd, Adam."""
    import torch  # pyright: ignore[reportMissingImports]
    from torch import nn  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(os.cpu_count() or 1)

    def mlp(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ELU()]
        return nn.Sequential(*layers[:-1])

    encoder, decoder = mlp(*WIDTHS[:4]), mlp(*WIDTHS[4:])
    parameters = [*encoder.parameters(), *decoder.parameters()]
    adam = torch.optim.Adam(parameters, 1e-3, eps=1e-4)
    loader = torch.utils.data.DataLoader(torch.from_numpy(x), BATCH, shuffle=True, drop_last=True)

    def run() -> float:
        step, loss = 0, torch.zeros(())
        while step < STEPS:
            for batch in loader:
                mean, log_variance = encoder(batch).chunk(2, 1)
                z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
                kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)
                nll = nn.functional.binary_cross_entropy_with_logits(
                    decoder(z), batch, reduction="none"
                ).sum(1)
                loss = (nll + kl).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
                step += 1
                if step == STEPS:
                    break
        return loss.item()

    return run


def main() -> None:
    """Prints milliseconds for STEPS steps of each, steps a second, and our share of the peak."""
    train = data.load("mnist5k").train
    loops = {"infsub": ours(train_step.unpacked(train.images), train.size)}
    try:
        x = np.array(data.batch(train.images, jnp.arange(train.size)))  # PyTorch may write
        loops["PyTorch loop"] = pytorch(x.reshape(train.size, -1))
    except ImportError:
        print("PyTorch is not installed: only infsub is timed")
    times = seconds(loops)
    show(f"training: {STEPS} steps of batch {BATCH} on {jax.default_backend()}", times, "infsub")
    for name, (median, _, _) in times.items():
        print(f"{name}: {STEPS / median:.0f} steps/s, {STEPS * BATCH / median:.0f} examples/s")
    weights = sum(a * b for part in (WIDTHS[:4], WIDTHS[4:]) for a, b in itertools.pairwise(part))
    # Forward, and backward in weights and in activations but those of the first layer's input.
    flop = 2 * BATCH * (3 * weights - WIDTHS[0] * WIDTHS[1])
    peak = matmul_peak()
    share = flop * STEPS / times["infsub"][0] / peak
    peer = next((name for name in times if name != "infsub"), "")
    step = {name: median / STEPS for name, (median, _, _) in times.items()}
    record("training step", step["infsub"], peer, step.get(peer), flop=flop, peak=peak)
    print(
        f"{flop / 1e6:.0f} MFLOP a step: {share:.0%} of the matmul peak, {peak / 1e9:.0f} GFLOP/s"
    )


if __name__ == "__main__":
    main()
