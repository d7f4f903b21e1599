"""Local optimisation: a posterior's parameters fitted to one datapoint, the decoder frozen.

L[q*] of the approximation gap. Everything here is for one datapoint; under vmap each one stops by
its own convergence and changes no more, and a block ends when all of its datapoints have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from infsub import bounds, densities, posteriors
from infsub.keys import named
from infsub.types import (
    Array,
    Estimate,
    Gaussian,
    Key,
    Params,
    Posterior,
    Sample,
    Sampler,
    Target,
    as_partial,
    increasing_steps,
    positive_int,
)

_CHUNK_SIZE = 500  # of the final samples
_ADAM = optax.scale_by_adam()
# Length of the longest natural direction, √(2 KL): far from the posterior a gradient says where it
# lies, not how far.
_RADIUS = 5.0
# A flow misses about half the variance of its log weights. One that misses more than this may have
# begun where no small steps lead out of: along one arm of a bent posterior, which the best Gaussian took
# for the whole. Of MNIST's and Fashion-MNIST's posteriors one in a hundred does.
_FAR = 1.0  # nats
_WIDENED = 2.0  # such a Gaussian's widths, to reach around the bends


class Rule(NamedTuple):
    """How to optimise, and when to stop.

    Attributes:
      learning_rate: of Adam (0.9, 0.999), or of natural steps, where 1 is Newton's.
      num_samples: Monte Carlo samples a step, which share the datapoint's parameters.
      window: steps between two looks at the progress.
      patience: windows in a row without improvement after which it has converged.
      max_steps: steps after which it stops unconverged, rounded up to whole windows; the fit of a
        start has as many of its own.
      decay: factor on the learning rate after each window without improvement.
      sticking_the_landing: whether to drop the gradient's score term, whose mean is 0 and whose
        noise is not (Roeder et al. 2017).
      paired: whether to judge a window by the mean of its parameters, on the samples that judged
        the best so far; only a gain beyond its standard error is an improvement. Otherwise it is
        judged by the mean of its steps' ELBO estimates, which must be higher, and leaves its last
        parameters.
      num_judged: samples that judge where paired.
      antithetic: whether the samples that fit and judge are pairs of noise and its opposite.
      natural: whether to step along the posterior's natural gradient in place of Adam.
      bold_rate: learning rate of a second attempt, from the best of the first; 0: none.
      wide_rate: learning rate of a last attempt, of a flow that `start` placed and that is still far
        from p(z|x): anew, from independent noise wider than the Gaussian was; 0: none.
    """

    learning_rate: float
    num_samples: int
    window: int
    patience: int
    max_steps: int
    decay: float
    sticking_the_landing: bool
    paired: bool
    num_judged: int = 1000
    antithetic: bool = False
    natural: bool = False
    bold_rate: float = 0.0
    wide_rate: float = 0.0


RULES = {
    "fast": Rule(5e-3, 20, 100, 3, 20_000, 0.5, sticking_the_landing=True, paired=True),
    # A flow goes on gaining, by less and less, for thousands of steps: forty times the work.
    "thorough": Rule(
        1e-3,
        40,
        100,
        60,
        20_000,
        0.95,
        sticking_the_landing=True,
        paired=True,
        antithetic=True,
        wide_rate=5e-3,
    ),
    # Cremer et al. 2018, and their code.
    "authors": Rule(1e-3, 100, 100, 10, 100_000, 1.0, sticking_the_landing=False, paired=False),
}
# "fast" and "thorough" for a posterior that knows its natural gradient: 150 steps where Adam takes 650.
_NATURAL = RULES["fast"]._replace(
    learning_rate=0.1, window=50, patience=1, num_judged=400, antithetic=True, natural=True
)
# The same from a start that lies near, as Laplace's does, of D scales: their gradient is less noisy than
# that of D²/2, so that 115 larger steps do, 0.002 nats lower.
_NATURAL_NEAR = _NATURAL._replace(learning_rate=0.2, window=40)
# "fast" for a flow that starts as a Gaussian of full covariance, or nearly. Of a posterior that is nearly
# one there is little to gain, and larger steps would first leave it again; a third window would gain
# 0.006 nats there. Of a bent one larger steps find some tenths of a nat that small ones would not find in
# thousands. They come second: where they lead nowhere they cost their time alone.
_PLACED = RULES["fast"]._replace(
    learning_rate=5e-4,
    patience=2,
    num_judged=500,
    antithetic=True,
    bold_rate=1e-2,
    wide_rate=RULES["thorough"].wide_rate,
)


class _Attempt(NamedTuple):
    rate: Any  # of learning, at first
    # Up to ten windows of nothing, within a nat of the best, come before a gain.
    decay: Any = 0.85
    patience: Any = 10
    loss: Any = jnp.inf  # nats below the best at which a window ends it
    wide: Any = False  # whether it starts wide, and only where the best so far is far from p


def _numbers(rule: Rule, wide: bool) -> tuple[_Attempt, Array]:
    """What a program takes of a rule as arguments: its attempts, and how many steps they may take in all.

    One attempt after the other, each field [number of attempts]; all but the wide one from the best so far.
    """
    attempts = [_Attempt(rule.learning_rate, rule.decay, rule.patience)]
    if rule.bold_rate:
        # In fifty dimensions its first window ends thousands of nats below, and none comes back.
        attempts.append(_Attempt(rule.bold_rate, loss=10.0))
    if wide:
        attempts.append(_Attempt(rule.wide_rate, wide=True))

    types = _Attempt(float, float, int, float, bool)
    stacked = jax.tree.map(lambda kind, *values: jnp.asarray(values, kind), types, *attempts)
    return stacked, jnp.asarray(rule.max_steps)


def _program(rule: Rule) -> Rule:
    """What of a rule a program is compiled for: all but the `_numbers`."""
    return rule._replace(
        learning_rate=0.0, patience=0, max_steps=0, decay=0.0, bold_rate=0.0, wide_rate=0.0
    )


class LocalResult(NamedTuple):
    """What local optimisation found for one datapoint.

    Attributes:
      params: of the best window, or the start where none was better or finite.
      elbo: L[q*] in nats, from fresh samples: they neither fitted nor chose the parameters.
      num_steps: [], steps taken.
      converged: [], False where max_steps came first or no ELBO was finite, or no gradient.
      iwae: the importance-weighted bound of q*, from the samples of `elbo`.
    """

    params: Params
    elbo: Estimate
    num_steps: Array
    converged: Array
    iwae: Estimate


def optimize_local(
    key: Key,
    target: Target,
    posterior: Posterior | str,
    params: Params | None = None,
    rule: str | Rule = "fast",
    *,
    start: Gaussian | Sampler | Any = None,
    fitted: bool = False,
    num_final_samples: int = 5000,
    **changes: Any,
) -> LocalResult:
    """max_λ E_{q_λ}[log p(x, z) − log q_λ(z)] for one datapoint (Cremer et al. 2018, arXiv 1801.03558).

    Args:
      key: of this datapoint.
      target: p(z) p(x|z) for one x.
      posterior: the family Q, or its name in `posteriors.FAMILIES`; all of its params, "encoded" and
        "shared", are fitted.
      params: where to start, such as `posteriors.with_gaussian(posterior.init(key), encoder(x))`;
        None starts at `posterior.init`, a standard normal.
      rule: "fast" (natural steps for a posterior that knows its natural gradient, else Adam, in small
        steps and then larger ones where `start` placed it at a Gaussian of full covariance, and anew
        where it is then still far from p(z|x)), "thorough" (the same natural steps; a flow takes
        thousands of others until none of 60 windows gains), "authors" (Adam 1e-3, 100 samples, stop
        after 10 windows of 100 steps without improvement), or a Rule.
      start: a q to start from in place of params, such as the encoder's or `laplace`'s; of one that
        is no Gaussian, the Gaussian of its moments.
        It is first fitted itself, with full covariance for a posterior that can be such a Gaussian,
        and the posterior is placed there: `posteriors.start`.
      fitted: whether start is such a fit already, as several families may share one.
      num_final_samples: K of the returned bounds.
      **changes: fields of the rule to replace, e.g. max_steps=5000.

    Returns:
      LocalResult: the best parameters, their ELBO and IWAE in nats, and whether it converged.

    Raises:
      ValueError: an unknown rule, a size below 1, both params and start, a posterior without the
        sticking-the-landing or natural gradient under a rule that wants it, or params that are not
        this posterior's.
      TypeError: an unknown field of the rule, a density that returns no scalar, a start that is no q,
        or a posterior that is neither a Posterior nor a name.

    Example:
      >>> target = infsub.Target(None, lambda z: norm.logpdf(1.0, z).sum(), latent_dim=1)  # x = 1
      >>> family = infsub.posteriors.gaussian(latent_dim=1)
      >>> found = infsub.optimize_local(jax.random.key(0), target, family)
      >>> print(f"{found.elbo.log_px:.2f}", bool(found.converged))  # the posterior is Gaussian
      -1.52 True
    """
    posterior = _as_posterior(posterior, target)
    if start is not None and params is not None:
        raise ValueError("params and start are two places to start from: give one")
    key, key_init = jax.random.split(key)
    if start is not None and not isinstance(start, Gaussian):
        key_init, key_moments = jax.random.split(key_init)
        start = posteriors.moment_matched(key_moments, start)
    if start is not None:
        start = bounds.as_wide_as(target, densities.check_gaussian(start))
    if rule in ("fast", "thorough") and posterior.natural is not None:
        rule = _NATURAL if start is None or posterior.place is not None else _NATURAL_NEAR
    elif rule == "fast" and posterior.place is not None and start is not None:
        placed = not fitted or jnp.ndim(start.scale) == 2
        rule = _PLACED if placed else rule
    rule = _checked_rule(rule, changes)
    num_steps, wide = jnp.zeros((), int), None
    if isinstance(start, Gaussian):  # which it is now, if it is given
        key_init, key_fit = jax.random.split(key_init)
        if posterior.natural is None and not fitted:
            dense = posterior.place is not None
            natural = (_NATURAL if dense else _NATURAL_NEAR)._replace(max_steps=rule.max_steps)
            start, num_steps = _best_gaussian(key_fit, target, start, natural, dense)
        params = posteriors.start(key_init, posterior, start)
        if rule.wide_rate and posterior.place is not None and jnp.ndim(start.scale) == 2:
            widths = _WIDENED * jnp.linalg.norm(jnp.tril(start.scale), axis=1)
            anew = posterior.init(named(key_init, "wide"))
            wide = posteriors.with_gaussian(anew, Gaussian(start.mean, widths))
    posterior, params = _checked_start(key_init, target, posterior, params, rule)
    num_final_samples = positive_int("num_final_samples", num_final_samples)
    numbers, program = _numbers(rule, wide is not None), _program(rule)
    found = _optimize(key, target, posterior, params, wide, numbers, program, num_final_samples)
    return found._replace(num_steps=num_steps + found.num_steps)


def _as_posterior(posterior: Posterior | str, target: Target) -> Posterior:
    """A family by its name, or as it is.

    Raises:
      ValueError: an unknown name.
      TypeError: it is neither.
    """
    if isinstance(posterior, str):
        return posteriors.make(posterior, target.latent_dim, target=target)
    if not isinstance(posterior, Posterior):
        raise TypeError(
            "posterior must be a Posterior(init, sample), such as posteriors.planar(latent_dim), or a "
            f"name, {' | '.join(posteriors.FAMILIES)}; got {type(posterior).__name__}"
        )
    return posterior


def _best_gaussian(
    key: Key, target: Target, start: Gaussian, rule: Rule, dense: bool
) -> tuple[Gaussian, Array]:
    """The best Gaussian from `start`, of full covariance where dense, and the steps it took."""
    family = posteriors.full_gaussian if dense else posteriors.gaussian
    key_init, *keys = jax.random.split(key, 3)
    posterior = family(target.latent_dim)
    params = posteriors.start(key_init, posterior, start)
    posterior, params = _checked_start(key_init, target, posterior, params, rule)
    numbers = _numbers(rule, wide=False)
    params, num_steps, _ = _search(keys, target, posterior, params, None, numbers, _program(rule))
    return posteriors.gaussian_of(params, full=dense), num_steps


def local_curve(
    key: Key,
    target: Target,
    posterior: Posterior | str,
    params: Params,
    steps: Sequence[int],
    rule: str | Rule = "fast",
    *,
    num_final_samples: int = 1000,
    shared_rate: Any = 1.0,
) -> Estimate:
    """L[q] after each of `steps` steps from `params`: how soon optimisation buys back a gap.

    One run of Adam by the rule's learning rate, samples and gradient, that neither decays nor
    stops. All its bounds are of the same samples, which fitted nothing: differences along the
    curve are paired.

    Args:
      key: of this datapoint.
      target: p(z) p(x|z) for one x.
      posterior: the family Q; all of its params, "encoded" and "shared", are fitted.
      params: where to start; the bound after 0 steps is theirs.
      steps: 0 ≤ n_1 < n_2 < …
      rule: "fast", "thorough" or "authors", which are Adam's here for every family, or a Rule; of either
        learning_rate, num_samples, sticking_the_landing, antithetic and natural apply.
      num_final_samples: K of each bound.
      shared_rate: factor on the learning rate for params["shared"], the trained weights of a flow,
        which steps that fit a datapoint's own parameters would spoil; 0 holds them. May be traced.

    Returns:
      Estimate of the ELBO in nats, each field with a leading [len(steps)].

    Raises:
      ValueError: steps that are not increasing integers of at least 0, or as in `optimize_local`.
      TypeError: a density that returns no scalar.

    Example:
      >>> target = infsub.Target(None, lambda z: norm.logpdf(1.0, z).sum(), latent_dim=1)  # x = 1
      >>> family = infsub.posteriors.gaussian(latent_dim=1)
      >>> key = jax.random.key(0)
      >>> curve = infsub.local_curve(key, target, family, family.init(key), (0, 10, 300))
      >>> print(bool(jnp.all(jnp.diff(curve.log_px) > 0)))
      True
    """
    posterior = _as_posterior(posterior, target)
    steps, rule = increasing_steps("steps", steps), _checked_rule(rule, {})
    posterior, params = _checked_start(key, target, posterior, params, rule)
    # Arrays: how many steps there are compiles nothing anew.
    spans = jnp.asarray((0, *steps[:-1])), jnp.asarray(steps)
    num_final_samples = positive_int("num_final_samples", num_final_samples)
    rates: Any = rule.learning_rate
    if isinstance(params, dict):
        rates = {name: rates * (shared_rate if name == "shared" else 1.0) for name in params}
    return _curve(key, target, posterior, params, spans, rates, _program(rule), num_final_samples)


def _checked_start(
    key: Key, target: Target, posterior: Posterior, params: Params | None, rule: Rule
) -> tuple[Posterior, Params]:
    """The posterior as a pytree and where it starts, both fit for the rule."""
    natural = posterior.natural and as_partial(posterior.natural)
    posterior = Posterior(as_partial(posterior.init), as_partial(posterior.sample), natural)
    if params is None:
        params = posterior.init(key)
    expected = jax.tree.map(jnp.shape, jax.eval_shape(posterior.init, key))
    found = jax.tree.map(jnp.shape, params)
    if found != expected:
        raise ValueError(f"params must have the posterior's shapes, {expected}; got {found}")
    params = bounds.as_wide_as(target, params)
    if rule.natural and posterior.natural is None:
        raise ValueError(
            "natural steps need posterior.natural(params, gradient), which this posterior has not: "
            "it takes a rule of natural=False"
        )
    for field, (name, sample) in _NEEDED.items():
        if not getattr(rule, field):
            continue
        try:
            jax.eval_shape(sample, posterior.sample, key, params)  # cached by jax
        except TypeError as error:
            if f"unexpected keyword argument '{name}'" not in str(error):
                raise
            raise ValueError(
                f"{field} needs a posterior.sample(key, params, {name}=…), which this posterior "
                f"has not: it takes a rule of {field}=False"
            ) from error
    return posterior, params


def _sample_sticking(sample: Sample, key: Key, params: Params) -> tuple[Array, Array]:
    return sample(key, params, sticking=True)


def _sample_turned(sample: Sample, key: Key, params: Params) -> tuple[Array, Array]:
    return sample(key, params, sign=-1)


# The argument of `sample` that a field of the rule needs, and a look whether it is there.
_NEEDED = {
    "sticking_the_landing": ("sticking", _sample_sticking),
    "antithetic": ("sign", _sample_turned),
}


def _checked_rule(rule: str | Rule, changes: dict[str, Any]) -> Rule:
    if isinstance(rule, str):
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, or a Rule; got {rule!r}")
        rule = RULES[rule]
    if unknown := changes.keys() - set(Rule._fields):
        fields = ", ".join(Rule._fields)
        raise TypeError(f"a rule has the fields {fields}; got {', '.join(sorted(unknown))}")
    rule = rule._replace(**changes)
    for name in ("num_samples", "window", "patience", "max_steps", "num_judged"):
        positive_int(name, getattr(rule, name))
    if rule.antithetic and (rule.num_samples % 2 or rule.num_judged % 2):
        raise ValueError(
            f"antithetic samples come in pairs: num_samples and num_judged; got {rule}"
        )
    # The values are not known inside the caller's jit.
    with contextlib.suppress(jax.errors.TracerBoolConversionError):
        more_rates = rule.bold_rate >= 0 and rule.wide_rate >= 0
        if not (rule.learning_rate > 0 and 0 < rule.decay <= 1 and more_rates):
            raise ValueError(
                "learning_rate must be positive, decay in (0, 1], wide_rate and bold_rate at least 0; "
                f"got {rule}"
            )
    return rule


def _log_weights(
    key: Key, target: Target, sample: Any, params: Params, num_samples: int, rule: Rule
) -> Array:
    """log p(x, z) − log q(z) of independent draws [K], or means over antithetic pairs [K / 2]."""

    def log_weight(key: Key, **sign: Array) -> Array:
        return bounds.log_weight(key, target, lambda key: sample(key, params, **sign))

    if not rule.antithetic:
        return jax.vmap(log_weight)(jax.random.split(key, num_samples))

    def pair(key: Key) -> Array:
        return jnp.mean(jax.vmap(lambda sign: log_weight(key, sign=sign))(jnp.asarray([1, -1])))

    return jax.vmap(pair)(jax.random.split(key, num_samples // 2))


def _step(
    key: Key,
    target: Target,
    posterior: Posterior,
    rule: Rule,
    rates: Any,
    fitted: Any,
    number: Array,
) -> tuple[Any, Array]:
    """Step `number` on (params, moments), and its ELBO; not finite, it changes nothing.

    `rates` is one learning rate, or one for each subtree of the params.
    """
    params, moments = fitted
    sticking = {"sticking": True} if rule.sticking_the_landing else {}

    def elbo(params: Params) -> Array:
        key_step = jax.random.fold_in(key, number)
        sample = partial(posterior.sample, **sticking)
        return jnp.mean(_log_weights(key_step, target, sample, params, rule.num_samples, rule))

    value, gradient = jax.value_and_grad(elbo)(params)
    direction, new_moments = _direction(posterior, rule, gradient, moments, params)
    add = optax.tree.add_scale
    new_params = jax.tree.map(lambda r, p, d: add(p, r, d), rates, params, direction)
    # A rate of more digits does not widen them.
    new_params = jax.tree.map(lambda new, old: new.astype(old.dtype), new_params, params)
    finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(gradient))
    fitted = _where(finite, (new_params, new_moments), (params, moments))
    return fitted, jnp.where(finite, value, jnp.nan)


def _direction(
    posterior: Posterior, rule: Rule, gradient: Params, moments: Any, params: Params
) -> tuple[Params, Any]:
    """Where to go, for a learning rate of 1, and Adam's new moments."""
    if not rule.natural or posterior.natural is None:
        return _ADAM.update(gradient, moments)
    direction = posterior.natural(params, gradient)
    length = jnp.sqrt(jnp.maximum(optax.tree.vdot(gradient, direction), 0))
    return optax.tree.scale(jnp.minimum(1, _RADIUS / length), direction), moments


@partial(jax.jit, static_argnames=("rule", "num_final_samples"))
def _curve(
    key: Key,
    target: Target,
    posterior: Posterior,
    params: Params,
    spans: tuple[Array, Array],
    rates: Any,
    rule: Rule,
    num_final_samples: int,
) -> Estimate:
    key_steps, key_final = jax.random.split(key)
    step = partial(_step, key_steps, target, posterior, rule, rates)

    def run_span(fitted: Any, span: tuple[Array, Array]) -> tuple[Any, Estimate]:
        fitted = jax.lax.fori_loop(*span, lambda number, fitted: step(fitted, number)[0], fitted)
        q = posteriors.sampler(posterior, fitted[0])
        return fitted, bounds.elbo(jax.random.clone(key_final), target, q, num_final_samples)

    return jax.lax.scan(run_span, (params, _ADAM.init(params)), spans)[1]


class _State(NamedTuple):
    params: Params
    moments: optax.OptState
    best: Params
    best_values: Array  # what the best was judged by: ELBO samples [K], or one mean []
    rate: Array  # learning rate
    num_steps: Array
    num_stalled: Array  # windows since the best
    moved: Array  # whether any step had a finite gradient


@partial(jax.jit, static_argnames=("rule", "num_final_samples"))
def _optimize(
    key: Key,
    target: Target,
    posterior: Posterior,
    params: Params,
    wide: Params | None,
    numbers: tuple[_Attempt, Array],
    rule: Rule,
    num_final_samples: int,
) -> LocalResult:
    *keys, key_final = jax.random.split(key, 3)
    best, num_steps, converged = _search(keys, target, posterior, params, wide, numbers, rule)

    def log_weight(key: Key) -> Array:
        return bounds.log_weight(key, target, posteriors.sampler(posterior, best))

    final_keys = jax.random.split(key_final, num_final_samples)
    chunk = min(_CHUNK_SIZE, num_final_samples)
    log_weights = jax.lax.map(log_weight, final_keys, batch_size=chunk)
    iwae = bounds.log_mean_exp(log_weights)
    error = jnp.std(log_weights, ddof=1) / jnp.sqrt(num_final_samples)
    nan = jnp.full_like(error, jnp.nan)
    elbo = iwae._replace(log_px=jnp.mean(log_weights), standard_error=error, ess=nan)
    return LocalResult(best, elbo, num_steps, converged, iwae)


@partial(jax.jit, static_argnames="rule")
def _search(
    keys: Sequence[Key],
    target: Target,
    posterior: Posterior,
    params: Params,
    wide: Params | None,
    numbers: tuple[_Attempt, Array],
    rule: Rule,
) -> tuple[Params, Array, Array]:
    """The best params, the steps taken and whether they converged.

    Keys: of steps and of judging. Starts from `params`, and where that ends far from p from `wide`.
    """
    key_steps, key_judge = keys
    attempts, max_steps = numbers

    def step(rate: Any, carry: Any, number: Array) -> tuple[Any, Array]:
        *fitted, total = carry
        (params, moments), value = _step(key_steps, target, posterior, rule, rate, fitted, number)
        total = jax.tree.map(jnp.add, total, params)
        return (params, moments, total), value

    def judge(params: Params) -> Array:
        # A clone tells jax_debug_key_reuse that the same noise each time is meant.
        key, sample = jax.random.clone(key_judge), posterior.sample
        return _log_weights(key, target, sample, params, rule.num_judged, rule)

    def run_window(attempt: _Attempt, state: _State) -> _State:
        carry = (state.params, state.moments, jax.tree.map(jnp.zeros_like, state.params))
        numbers = state.num_steps + jnp.arange(rule.window)
        (params, moments, total), values = jax.lax.scan(partial(step, state.rate), carry, numbers)
        moved = state.moved | jnp.any(jnp.isfinite(values))
        if rule.paired:
            candidate = jax.tree.map(lambda t: t / rule.window, total)
            values = judge(candidate)
        else:
            candidate, values = params, jnp.nanmean(values)
        better, progress = _compare(values, state.best_values)
        best = _where(better, (candidate, values), (state.best, state.best_values))
        lost = jnp.mean(values) < jnp.mean(state.best_values) - attempt.loss
        stalled = jnp.where(lost, attempt.patience, state.num_stalled + 1)
        return _State(
            params,
            moments,
            *best,
            rate=jnp.where(progress, state.rate, attempt.decay * state.rate),
            num_steps=state.num_steps + rule.window,
            num_stalled=jnp.where(progress, 0, stalled),
            moved=moved,
        )

    def is_far(params: Params) -> Array:
        singly = rule._replace(antithetic=False)  # the mean of a pair hides what is odd
        key, sample = named(key_judge, "far"), posterior.sample
        log_weights = _log_weights(key, target, sample, params, rule.num_judged, singly)
        return ~(jnp.var(log_weights) / 2 < _FAR)

    def run(state: _State, attempt: _Attempt) -> tuple[_State, Array]:
        def unfinished(state: _State) -> Any:
            return (state.num_stalled < attempt.patience) & (state.num_steps < max_steps)

        held = state.best, state.best_values
        begin, needed = held, True
        if wide is not None:  # judged against its own best until it ends
            unknown = jnp.full_like(state.best_values, -jnp.inf)
            begin = _where(attempt.wide, (wide, unknown), held)
            needed = jax.lax.cond(attempt.wide, is_far, lambda _: jnp.asarray(True), state.best)
        best, values = begin
        moments, num_stalled = _ADAM.init(best), jnp.where(needed, 0, attempt.patience)
        start = state._replace(
            params=best,
            moments=moments,
            best=best,
            best_values=values,
            rate=attempt.rate,
            num_stalled=num_stalled,
        )
        end = jax.lax.while_loop(unfinished, partial(run_window, attempt), start)
        better, _ = _compare(end.best_values, state.best_values)
        best, values = _where(better, (end.best, end.best_values), held)
        end = end._replace(best=best, best_values=values)
        return end, end.num_stalled >= attempt.patience

    best_values = judge(params)
    if not rule.paired:
        best_values = jnp.full((), -jnp.inf, best_values.dtype)
    dtype = best_values.dtype  # so that a rate makes no parameter wider
    attempts = jax.tree.map(lambda a: a.astype(dtype) if a.dtype.kind == "f" else a, attempts)
    none, still = jnp.zeros((), int), jnp.zeros((), bool)
    rate, moments = attempts.rate[0], _ADAM.init(params)
    start = _State(params, moments, params, best_values, rate, none, none, still)
    end, converged = jax.lax.scan(run, start, attempts)
    best = end.best
    if not rule.paired:  # an unpaired rule has not looked at the start
        best = _where(_compare(judge(best), judge(params))[1], best, params)
    # A value without a gradient, as of NaN behind a where, stands still and is no optimum.
    converged = jnp.all(converged) & _has_mean(end.best_values) & end.moved
    return best, end.num_steps, converged


def _compare(values: Array, best_values: Array) -> tuple[Array, Array]:
    """Whether the mean is higher, and whether by more than its standard error.

    Anything finite is better than nothing.
    """
    gains = values - best_values
    gain, error = jnp.mean(gains), jnp.std(gains) / jnp.sqrt(gains.size)
    known, finite = _has_mean(best_values), _has_mean(values)
    return jnp.where(known, gain > 0, finite), jnp.where(known, gain > error, finite)


def _has_mean(values: Array) -> Array:
    return jnp.isfinite(jnp.mean(values))


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
