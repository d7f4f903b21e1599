"""Any q: ours, a function, or another library's distribution."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from models import linear_gaussian

import infsub
from infsub import bounds, densities
from infsub.samplers import as_sampler
from infsub.types import Gaussian, Target, as_partial

MODEL = linear_gaussian(3, 5)
N = 60
XS = jax.device_get(jax.vmap(MODEL.simulate)(jax.random.split(jax.random.key(0), N))[1])
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # others' own, of JAX's insides


def wide(x):
    best = MODEL.best_gaussian(x)
    return best.mean, 1.3 * best.scale


def ours(x):
    return infsub.Gaussian(*wide(x))


def function(x):
    return as_sampler(ours(x))


def of_distrax(x):
    import distrax

    return distrax.MultivariateNormalDiag(*wide(x))


def of_tfp(x):
    from tensorflow_probability.substrates import jax as tfp

    return tfp.distributions.MultivariateNormalDiag(*wide(x))


def of_numpyro(x):
    import numpyro.distributions as dist

    return dist.Normal(*wide(x)).to_event(1)


@pytest.mark.parametrize("make", [function, of_distrax, of_tfp, of_numpyro])
def test_every_kind_of_q_has_the_same_bound(make):
    def difference(key, x):
        keys = jax.random.split(key)
        target = MODEL.target(x)
        mine = infsub.elbo(keys[0], target, ours(x), 200)
        other = infsub.elbo(keys[1], target, make(x), 200)
        return other.log_px - mine.log_px

    found = infsub.map_datapoints(difference, jax.random.key(1), XS)
    assert abs(found.mean()) < 4 * found.std() / np.sqrt(N)
    assert found.std() > 0  # of other draws


@jax.jit
@jax.vmap
def exact_elbos(x):
    return MODEL.log_px(x) - MODEL.kl(x, ours(x))


@pytest.mark.parametrize("make", [of_distrax, of_numpyro])
def test_another_librarys_q_is_measured(make):
    def encode(params, x):
        return make(x)

    model = infsub.Model(3, encode, lambda params, x, z: MODEL.log_likelihood(x, z))
    settings = infsub.Settings(
        elbo_samples=2000, iwae_samples=50, ais=infsub.AIS(4, 5, 2), ais_start="posterior"
    )
    found = infsub.measure(
        jax.random.key(2),
        model,
        None,
        XS[:4],
        families=(),
        settings=settings,
        own="gaussian",
        progress=False,
    )
    want = exact_elbos(XS[:4])
    assert np.all(np.abs(found.columns["elbo"] - want) < 4 * found.columns["elbo_se"])


def test_moments_of_a_sampler():
    q = ours(XS[0])
    own = infsub.Posterior(lambda key: q, lambda key, params: as_sampler(params)(key))
    for given in (q, as_sampler(q), of_numpyro(XS[0]), infsub.posteriors.sampler(own, q)):
        found = infsub.posteriors.moment_matched(jax.random.key(3), given, num_samples=20_000)
        np.testing.assert_allclose(found.mean, q.mean, atol=0.02)
        np.testing.assert_allclose(found.scale, q.scale, rtol=0.03)


class Opaque:
    """A distribution that is no pytree, and draws as a Gaussian of ours does."""

    def __init__(self, q):
        self.q = q

    def sample(self, key):
        return densities.sample_gaussian(key, self.q)[0]

    def log_prob(self, z):
        return densities.gaussian(z, self.q)


@jax.tree_util.register_pytree_node_class
class OfFlowJAX(Opaque):
    """The key comes first there, and is not called seed; functions are leaves."""

    def sample_and_log_prob(self, key, sample_shape=(), condition=None):
        raise AssertionError

    def tree_flatten(self):
        return (self.q, jax.nn.elu), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(children[0])


@pytest.mark.parametrize("make", [Opaque, OfFlowJAX])
def test_an_object_is_what_it_is_now(make):
    """A pytree's arrays are arguments, and its program stays; any other object may have been changed."""
    target, made, sizes = MODEL.target(XS[0]), make(None), []
    for q in (Gaussian(*wide(XS[0])), ours(XS[0]), ours(XS[0])):
        want = infsub.elbo(jax.random.key(2), target, q, 20)
        made.q, before = q, bounds._elbo._cache_size()
        found = infsub.elbo(jax.random.key(2), target, made, 20)
        sizes.append(bounds._elbo._cache_size() - before)
        np.testing.assert_allclose(found.log_weights, want.log_weights, rtol=1e-5)
    assert sizes == ([1, 0, 0] if make is OfFlowJAX else [1, 1, 1])


class Plain:
    """An object that is no pytree, as a class of one's own is."""

    def __init__(self, q):
        self.q = q

    def __call__(self, key):
        return densities.sample_gaussian(key, self.q)

    def log_likelihood(self, z):
        return densities.gaussian(z, self.q)


def plain_sampler(q, made=None):
    made = made or Plain(q)
    made.q = q
    return made, ("q", made)


def plain_method(q, made=None):
    made = made or Plain(q)
    made.q = q
    return made, ("log_likelihood", made.log_likelihood)


def nnx_method(q, made=None):
    from flax import nnx

    class Module(nnx.Module):
        def __init__(self, q):
            self.mean, self.scale = nnx.Param(q.mean), nnx.Param(q.scale)

        def log_likelihood(self, z):
            return densities.gaussian(z, Gaussian(self.mean[...], self.scale[...]))

    made = made or Module(q)
    made.mean[...], made.scale[...] = q
    return made, ("log_likelihood", made.log_likelihood)


def partial_of_a_module(q, made=None):
    import equinox as eqx

    class Module(eqx.Module):
        q: Gaussian

        def __call__(self, z):
            return densities.gaussian(z, self.q)

    made = made or Module
    return made, ("log_likelihood", jax.tree_util.Partial(made(q)))


@pytest.mark.parametrize(
    ("make", "compiled"),
    [
        (plain_sampler, [1, 0, 1]),
        (plain_method, [1, 0, 1]),
        (nnx_method, [1, 0, 0]),  # its arrays travel
        (partial_of_a_module, [1, 0, 0]),
    ],
)
def test_an_object_that_is_called_or_its_method_is_what_it_is_now(make, compiled):
    """Its program stays while nothing of it has changed; another one of its attributes is seen."""
    first, second = ours(XS[0]), Gaussian(*map(jax.numpy.asarray, ours(XS[1])))
    made, sizes = None, []
    for q in (first, first, second):
        made, (role, given) = make(q, made)
        before = bounds._elbo._cache_size()
        key = jax.random.key(3)
        if role == "q":
            found = infsub.elbo(key, MODEL.target(XS[0]), given, 20)
        else:
            found = infsub.elbo(key, Target(None, given, 3), ours(XS[0]), 20)
        sizes.append(bounds._elbo._cache_size() - before)
        if role == "q":
            want = infsub.elbo(key, MODEL.target(XS[0]), q, 20)
        else:
            likelihood = jax.tree_util.Partial(densities.gaussian, q=q)
            want = infsub.elbo(key, Target(None, likelihood, 3), ours(XS[0]), 20)
        np.testing.assert_allclose(found.log_weights, want.log_weights, rtol=1e-5)
    assert sizes == compiled


def test_attributes_are_told_apart_by_name_and_value():
    class Scaled:
        def __init__(self, **attributes):
            vars(self).update(attributes)

        def log_likelihood(self, z):
            return -sum(jax.numpy.sum(a * z**2) for a in (self.a, self.b) if a is not None)

    one, two = jax.numpy.ones(3), jax.numpy.full(3, 2.0)
    made = Scaled(a=one, b=None, options={"x": 1.5})
    seen = [as_partial(made.log_likelihood)]
    for attributes in ({"a": None, "b": one}, {"a": two}, {"options": {"y": 1.5}}):
        vars(made).update(attributes)
        seen.append(as_partial(made.log_likelihood))
    assert len({each.func for each in seen}) == 4
    made.options = {"y": float("1.5")}  # an equal value is the same
    assert as_partial(made.log_likelihood).func == seen[-1].func


def test_an_equal_object_is_the_same_program():
    @dataclasses.dataclass(frozen=True)
    class Likelihood:
        scale: float

        def __call__(self, z):
            return -jax.numpy.sum(self.scale * z**2)

    sizes = []
    for _ in range(2):
        before = bounds._elbo._cache_size()
        infsub.elbo(jax.random.key(0), Target(None, Likelihood(0.1), 3), ours(XS[0]), 20)
        sizes.append(bounds._elbo._cache_size() - before)
    assert sizes == [1, 0]


def test_a_number_in_a_partial_is_a_leaf():
    @jax.jit
    def log_likelihood(weight, scale, z):
        return -jax.numpy.sum(scale * weight * z**2)

    sizes = []
    for scale in (0.1, 0.2):
        function = jax.tree_util.Partial(log_likelihood, np.ones(3, np.float32), scale)
        before = bounds._elbo._cache_size()
        infsub.elbo(jax.random.key(0), Target(None, function, 3), ours(XS[0]), 20)
        sizes.append(bounds._elbo._cache_size() - before)
    assert sizes == [1, 0]


def test_functions_keep_their_structure_whatever_their_leaves_are():
    """As jax has it of every pytree: eval_shape, vmap's in_axes and tree.map put other leaves there."""
    weight = jax.numpy.ones(3)
    for function in (jax.jit(lambda w, *_: w.sum()), Plain(weight).log_likelihood, Plain(weight)):
        likelihood = functools.partial(function, weight)
        model = infsub.Model(3, lambda *_: ours(XS[0]), likelihood)
        zeros = jax.tree.map(lambda _: 0, model)
        assert jax.tree.structure(zeros) == jax.tree.structure(model)
        assert jax.tree.leaves(zeros) == [0]


def test_what_is_no_q_is_told_in_a_sentence():
    import numpyro.distributions as dist

    key, target, (mean, scale) = jax.random.key(0), MODEL.target(XS[0]), wide(XS[0])
    planar = infsub.posteriors.planar(3)
    with pytest.raises(TypeError, match=r"got tuple: write infsub.Gaussian\(mean, scale\)"):
        infsub.iwae(key, target, (mean, scale), 10)
    with pytest.raises(TypeError, match=r"got tuple: write infsub.Gaussian\(mean, scale\)"):
        infsub.ais(key, target, (mean, scale))  # pyright: ignore
    with pytest.raises(TypeError, match=r"write posteriors.sampler\(posterior, params\)"):
        infsub.elbo(key, target, planar)
    with pytest.raises(TypeError, match=r"write posteriors.sampler\(posterior, params\)"):
        infsub.posteriors.moment_matched(key, planar)
    with pytest.raises(TypeError, match=r"log_q as a scalar.*\(3,\).*to_event\(1\)"):
        infsub.elbo(key, target, dist.Normal(mean, scale), 10)
    with pytest.raises(TypeError, match=r"must return \(z \[D\], log_q \[\]\) for a key; got"):
        infsub.elbo(key, target, lambda key: jax.random.normal(key, (3,)), 10)
    for name in ("log_prior", "log_likelihood"):
        densities = {"log_prior": None, "log_likelihood": target.log_likelihood}
        densities[name] = dist.Normal(0.0, 1.0)
        with pytest.raises(TypeError, match=rf"{name} must be .*write Normal\(…\).log_prob"):
            Target(**densities, latent_dim=3)
    with pytest.raises(TypeError, match=r"write posteriors.sampler"):
        infsub.ais(key, target, planar)
