"""What runs on the device in training: steps, whole epochs, validation, pictures.

Nothing random is stored: the permutation of an epoch is fold_in(key, epoch), the noise of a step
fold_in(key, step). How many steps a dispatch takes changes no number. S models train in one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from infsub import bounds, data, posteriors, processes
from infsub.keys import Stream, named, stream
from infsub.types import Array, Key, UserError
from infsub.vae import VAE, Terms, Variables

MAX_EPOCHS = 64  # of one dispatch
BURDA_ENDS = np.cumsum(3 ** np.arange(8))  # 1, 4, 13, …, 3280 epochs
ACTIVE = 0.01  # a unit is active when the variance of its mean over the data exceeds this
METRICS = ("objective", "elbo", "log_likelihood", "kl", "log_q", "grad_norm")


class StepConfig(NamedTuple):
    """The fields of config.train that a step depends on: static under jit."""

    num_epochs: int
    batch_size: int
    num_samples: int
    objective: str
    schedule: str
    learning_rate: float
    adam_epsilon: float
    gradient_clip: float
    annealing: str
    annealing_epochs: int
    freeze: str
    on: str


class TrainState(NamedTuple):
    """What a step changes.

    Attributes:
      variables: the VAE's.
      optimizer: optax state of the trained parameters; frozen ones have none.
      sums: {metric: []} over this epoch's finite steps, and "count" of them.
      skipped: [], int32, steps of the whole run that were not finite and changed nothing.
    """

    variables: Variables
    optimizer: Any
    sums: dict[str, Array]
    skipped: Array


class Task(NamedTuple):
    """What stays the same through a run: static under jit. Made by `make_task`.

    Attributes:
      vae: the model.
      train: what a step does.
      num_train: N.
      mesh: of the devices that share each batch, equally many of each process; None: one device.
    """

    vae: VAE
    train: StepConfig
    num_train: int
    mesh: Mesh | None

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; each epoch leaves out other datapoints."""
        return self.num_train // self.train.batch_size


def make_task(vae: VAE, train: Any, num_train: int) -> Task:
    """The task of `config.train` on N datapoints, on all devices; equal ones compile once.

    Each device gets as many datapoints of a batch, so where their number does not divide the batch, as
    many of them take part as do. Shares of unlike size would need weights, to save less time than a
    batch size does that they divide.

    Raises:
      UserError: processes that train together do not divide the batch.
    """
    fields = {name: train[name] for name in StepConfig._fields}
    num_processes = processes.count()
    share, rest = divmod(train.batch_size, num_processes)
    if rest:
        raise UserError(
            f"{num_processes} processes that train together cannot share config.train.batch_size="
            f"{train.batch_size} equally: give a multiple of {num_processes}."
        )
    num_local = math.gcd(jax.local_device_count(), share)
    mesh = None
    if num_processes * num_local > 1:
        all_devices = jax.devices() if num_processes > 1 else jax.local_devices()
        of_process = itertools.groupby(all_devices, lambda device: device.process_index)
        devices = [device for _, own in of_process for device in itertools.islice(own, num_local)]
        axis_types = (AxisType.Auto,)
        mesh = jax.make_mesh((len(devices),), ("batch",), axis_types=axis_types, devices=devices)
    return Task(vae, StepConfig(**fields), num_train, mesh)


def replicated(task: Task, tree: Any) -> Any:
    """The arrays on all devices of the task, as `train_chunk` leaves its states."""
    if task.mesh is None:
        return tree
    whole = NamedSharding(task.mesh, P())
    if processes.count() == 1:
        return jax.device_put(tree, whole)

    def of_all(leaf: Any) -> Any:  # device_put would first compare what each process has
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(of_all(jax.random.key_data(leaf)))
        return jax.make_array_from_process_local_data(whole, np.asarray(leaf), leaf.shape)

    return jax.tree.map(of_all, tree)


def addressable(tree: Any) -> Any:
    """Replicated arrays of several processes as those of this one; others are what they are."""

    def of_one(leaf: Any) -> Any:
        return leaf if leaf.is_fully_addressable else leaf.addressable_data(0)

    return jax.tree.map(of_one, tree)


def unpacked(images: data.Images) -> data.Images:
    """The same images, a byte a pixel and not a bit.

    Inside a step the unpacking would be fused into the likelihood and keep it from vector
    instructions: a quarter of the step's time on a CPU.
    """
    if images.coding != "bits":
        return images
    bits = jnp.unpackbits(images.values, axis=1, count=math.prod(images.image_shape))
    return data.Images(bits.reshape(-1, *images.image_shape), "levels", images.image_shape)


def learning_rate(train: StepConfig, steps_per_epoch: int, step: Array) -> Array:
    """The learning rate of a step, step [] -> [].

    constant: η; cosine: η (1 + cos π t)/2, t the share of the run that is done (Loshchilov & Hutter
    2017); burda: η·10^(−i/7) for 3^i epochs, i = 0 … 7 (Burda et al. 2016, sec. 5.1).
    """
    match train.schedule:
        case "cosine":
            t = step / (train.num_epochs * steps_per_epoch)
            return train.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(t, 1)))
        case "burda":
            i = jnp.searchsorted(jnp.asarray(BURDA_ENDS), step // steps_per_epoch, side="right")
            return train.learning_rate * 10 ** (-jnp.minimum(i, 7) / 7)
        case _:
            return jnp.full((), train.learning_rate)


def annealing_weight(train: StepConfig, steps_per_epoch: int, step: Array) -> Array:
    """w of a step, rising linearly from 0 to 1 over `annealing_epochs`, step [] -> []."""
    if train.annealing == "none":
        return jnp.ones(())
    return jnp.minimum(step / (train.annealing_epochs * steps_per_epoch), 1.0)


def objective(train: StepConfig, terms: Terms, weight: Array) -> Array:
    """What one datapoint's parameters climb, in nats, from K samples -> [].

    entropy annealing: log p(x|z) + log p(z) − w·log q; kl annealing: log p(x|z) + w (log p(z) −
    log q); their mean over samples (elbo), or the log of the mean of their exponentials (iwae,
    Burda et al. 2016, eq. 8).
    """
    prior_weight = weight if train.annealing == "kl" else 1.0
    values = terms.log_likelihood + prior_weight * terms.log_prior - weight * terms.log_q
    if train.objective == "iwae":
        return bounds.log_mean_exp(values).log_px
    return jnp.mean(values)


def optimizer(train: StepConfig) -> optax.GradientTransformation:
    """Adam(0.9, 0.999, adam_epsilon), after clipping by the global norm; no learning rate."""
    adam = optax.scale_by_adam(0.9, 0.999, train.adam_epsilon)
    if train.gradient_clip:
        return optax.chain(optax.clip_by_global_norm(train.gradient_clip), adam)
    return adam


def trained_parts(freeze: str) -> tuple[str, ...]:
    """The parts of the variables that learn; the posterior's shared weights go with the encoder."""
    parts = {"none": ("encoder", "decoder", "posterior"), "decoder": ("encoder", "posterior")}
    return parts.get(freeze, ("decoder",))


def split_params(variables: Variables, freeze: str) -> Variables:
    """The parameters that learn, without running statistics."""
    return {
        part: variables[part] if part == "posterior" else variables[part]["params"]
        for part in trained_parts(freeze)
    }


def merge_params(variables: Variables, params: Variables) -> Variables:
    """`variables` with these parameters in their places."""
    merged = {
        part: value if part == "posterior" else variables[part] | {"params": value}
        for part, value in params.items()
    }
    return variables | merged


@functools.partial(jax.jit, static_argnums=0)
def initial(task: Task, seeds: Array) -> tuple[Key, tuple[Key, Key], Variables]:
    """Of the models of these seeds [S]: keys, those of validation and of pictures, fresh variables."""

    def of_one_model(seed: Array) -> tuple[Key, tuple[Key, Key], Variables]:
        key = jax.random.key(seed)
        looking = stream(key, Stream.VALIDATION), stream(key, Stream.PICTURES)
        return key, looking, task.vae.init(stream(key, Stream.INIT))

    return jax.vmap(of_one_model)(seeds)


@functools.partial(jax.jit, static_argnums=0)
def init_states(task: Task, variables: Variables) -> TrainState:
    """The states of S models before the first step, from their variables, which they copy."""

    def of_one_model(variables: Variables) -> TrainState:
        state = optimizer(task.train).init(split_params(variables, task.train.freeze))
        sums = {name: jnp.zeros(()) for name in (*METRICS, "count")}
        # A copy, for the first step reuses the state's buffers.
        copy = jax.tree.map(jnp.copy, variables)
        return TrainState(copy, state, sums, jnp.zeros((), jnp.int32))

    return jax.vmap(of_one_model)(variables)


def train_step(
    task: Task, key: Key, state: TrainState, images: data.Images, permutation: Array, step: Array
) -> TrainState:
    """One step of Adam on one batch; a step that is not finite is counted and changes nothing.

    On the model, the batch is x ~ p(x) of the frozen decoder, fresh in every step.

    Args:
      task: static.
      key: of the run.
      state: before the step.
      images: of the training split.
      permutation: [N] of this epoch.
      step: [], of the whole run.
    """
    train, per_epoch = task.train, task.steps_per_epoch
    epoch, position = step // per_epoch, step % per_epoch
    batch_size = train.batch_size
    key_batch = stream(key, Stream.BATCH)

    def shared(datapoints: Array) -> Array:  # the rest follows: each device takes its datapoints
        if task.mesh is None:
            return datapoints
        return jax.lax.with_sharding_constraint(datapoints, NamedSharding(task.mesh, P("batch")))

    if train.on == "model":
        draws = shared(jax.random.split(jax.random.fold_in(key_batch, step), batch_size))
        x = jax.vmap(lambda key: task.vae.simulate(key, state.variables)[1])(draws)
    else:
        indices = jax.lax.dynamic_slice(permutation, (position * batch_size,), (batch_size,))
        x = data.batch(images, shared(indices), jax.random.fold_in(key_batch, epoch))
    key_step = jax.random.fold_in(stream(key, Stream.NOISE), step)
    keys = jax.random.split(key_step, batch_size)
    weight = annealing_weight(train, per_epoch, step)
    training = tuple(p for p in trained_parts(train.freeze) if p != "posterior")

    def loss(params: Variables) -> tuple[Array, Any]:
        variables = merge_params(state.variables, params)
        terms, statistics = jax.vmap(
            lambda key, x: task.vae.terms(key, variables, x, train.num_samples, training),
            axis_name="batch",
            out_axes=(0, None),
        )(keys, x)
        value = jnp.mean(jax.vmap(objective, in_axes=(None, 0, None))(train, terms, weight))
        return -value, (jax.tree.map(jnp.mean, terms), statistics)

    params = split_params(state.variables, train.freeze)
    (value, (terms, statistics)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    norm = optax.tree.norm(gradient)
    updates, new_optimizer = optimizer(train).update(gradient, state.optimizer)
    rate = learning_rate(train, per_epoch, step)
    new_params = jax.tree.map(lambda p, u: p - (rate * u).astype(p.dtype), params, updates)
    variables = merge_params(state.variables, new_params)
    variables |= {part: variables[part] | statistics[part] for part in training}

    kl = terms.log_q - terms.log_prior
    elbo = terms.log_likelihood - kl
    values = (-value, elbo, terms.log_likelihood, kl, terms.log_q, norm)
    sums = dict(zip(METRICS, values, strict=True)) | {"count": jnp.ones(())}
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    new = (variables, new_optimizer, jax.tree.map(jnp.add, state.sums, sums))
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, tuple(state[:3]))
    return TrainState(*new, skipped=state.skipped + ~finite)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def train_chunk(
    task: Task, keys: Key, states: TrainState, images: data.Images, start: Array, stop: Array
) -> tuple[TrainState, dict[str, Array]]:
    """Steps start … stop − 1 of S models in one dispatch.

    Returns:
      The states; and for each epoch from that of `start` on its `sums` so far, and the learning rate
      and annealing weight of its last step, {metric: [S, MAX_EPOCHS]}.
    """
    per_epoch = task.steps_per_epoch

    def of_one_model(key: Key, state: TrainState):
        def run_epoch(epoch: Array, carry):
            state, rows = carry
            shuffle = jax.random.fold_in(stream(key, Stream.SHUFFLE), epoch)
            permutation = jax.random.permutation(shuffle, task.num_train)
            first = epoch * per_epoch
            begin, end = jnp.maximum(start, first), jnp.minimum(stop, first + per_epoch)
            state = jax.lax.fori_loop(
                begin,
                end,
                lambda step, state: train_step(task, key, state, images, permutation, step),
                state,
            )
            row = epoch - start // per_epoch
            values = state.sums | {
                "learning_rate": learning_rate(task.train, per_epoch, end - 1),
                "annealing_weight": annealing_weight(task.train, per_epoch, end - 1),
            }
            rows = {name: rows[name].at[row].set(values[name]) for name in rows}
            ended = end == first + per_epoch
            sums = jax.tree.map(lambda s: jnp.where(ended, 0.0, s), state.sums)
            return state._replace(sums=sums), rows

        names = (*state.sums, "learning_rate", "annealing_weight")
        rows = {name: jnp.zeros(MAX_EPOCHS) for name in names}
        first, last = start // per_epoch, (stop - 1) // per_epoch + 1
        return jax.lax.fori_loop(first, last, run_epoch, (state, rows))

    if jax.default_backend() == "cpu":
        # One after the other: under vmap XLA transposes every weight's gradient, a third of a step.
        states, rows = jax.lax.map(lambda model: of_one_model(*model), (keys, states))
    else:
        states, rows = jax.vmap(of_one_model)(keys, states)
    if task.mesh is not None:
        whole = NamedSharding(task.mesh, P())
        states, rows = jax.lax.with_sharding_constraint((states, rows), whole)
    return states, rows


def _of_models(function: Callable[[Key, Variables], Any], keys: Key, variables: Variables) -> Any:
    """`function` of S models at once, from their keys [S] and their stacked variables."""
    if len(keys) == 1:  # nothing of the noise has an axis then, and it is rounded as without one
        return jax.vmap(function, in_axes=(None, 0))(keys[0], variables)
    return jax.vmap(function)(keys, variables)


@functools.partial(jax.jit, static_argnums=(0, 1))
def validate(
    vae: VAE, num_samples: int, variables: Variables, images: data.Images, keys: Key
) -> dict[str, Array]:
    """Bounds over a whole split, S models at once, with the same noise every time it is called.

    Args:
      vae: the model; static.
      num_samples: K, a datapoint.
      variables: of S models, stacked.
      images: of the split, N of them.
      keys: of the models, [S]; datapoint i uses fold_in(key, i), its pixels, if they are drawn,
        named(key, "pixels").

    Returns:
      {"elbo", "iwae" (of K samples), "log_likelihood", "kl": means over the split, [S]; "elbo_se",
      "iwae_se": over datapoints, NaN of one; "active_units": of the base Gaussian's means, var > 0.01
      (Burda et al. 2016, sec. 5.2)}. NaN when a datapoint's is not finite.
    """
    size = images.values.shape[0]

    def of_one_model(key: Key, variables: Variables) -> dict[str, Array]:
        def of_one_datapoint(i: Array) -> tuple[dict[str, Array], Array]:
            x = data.batch(images, i[None], named(key, "pixels"))[0]
            terms, _ = vae.terms(jax.random.fold_in(key, i), variables, x, num_samples)
            log_weights = terms.log_likelihood + terms.log_prior - terms.log_q
            values = {
                "elbo": jnp.mean(log_weights),
                "iwae": bounds.log_mean_exp(log_weights).log_px,
                "log_likelihood": jnp.mean(terms.log_likelihood),
                "kl": jnp.mean(terms.log_q - terms.log_prior),
            }
            return values, posteriors.gaussian_of(vae.encode(variables, x)).mean

        values, means = jax.lax.map(of_one_datapoint, jnp.arange(size), batch_size=100)
        errors = {f"{n}_se": jnp.std(values[n], ddof=1) / math.sqrt(size) for n in ("elbo", "iwae")}
        active = jnp.sum(jnp.var(means, axis=0) > ACTIVE)
        return jax.tree.map(jnp.mean, values) | errors | {"active_units": active}

    return _of_models(of_one_model, keys, variables)


@functools.partial(jax.jit, static_argnums=0)
def pictures(vae: VAE, variables: Variables, images: data.Images, keys: Key) -> tuple[Array, Array]:
    """For S models: ten images over their reconstructions [S, 2, 10, H, W, C]; draws [S, 10, 10, …].

    Means of p(x|z) in [0, 1], at z ~ q(z|x) and at z ~ p(z).
    """

    def of_one_model(key: Key, variables: Variables) -> tuple[Array, Array]:
        x = data.batch(images, jnp.arange(10), named(key, "pixels"))

        def reconstruct(key: Key, x: Array) -> Array:
            z, _ = vae.sampler(variables, x)(key)
            return vae.mean_x(variables, z)

        again = jax.vmap(reconstruct)(jax.random.split(named(key, "posterior"), 10), x)
        z = jax.random.normal(named(key, "prior"), (10, 10, vae.latent_dim))
        draws = jax.vmap(jax.vmap(lambda z: vae.mean_x(variables, z)))(z)
        return jnp.stack([x / jnp.maximum(jnp.max(x), 1), again]), draws

    return _of_models(of_one_model, keys, variables)
