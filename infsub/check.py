"""Does a model say what it seems to say? `check` looks for the mistakes that make no error."""

from __future__ import annotations

import html
from typing import Any, NamedTuple

import jax
import numpy as np

from infsub import mistakes, mistakes_on_data
from infsub.datapoints import map_datapoints
from infsub.mistakes import Calibration, Finding, Statistic
from infsub.pairs import Pair, encode_twice, on_data, pair, simulation_lacks
from infsub.types import Key, Model, Params, positive_int

_LEVELS = ("error", "warning", "note")
_NO_Q = ("scale_sign", "changing")  # findings after which q on xs means nothing
_INVISIBLE = (
    "No check can see a constant without z that log_likelihood lacks, such as a Gaussian's "
    "-X/2 log 2π: it moves all bounds on log p(x) alike, and no gap."
)
_UNCHECKED = (
    "Not checked, in a model {model}: whether log_likelihood contains the prior, lacks a term of z or "
    "is another density than the data's, and the encoder's calibration."
)


class Check(NamedTuple):
    """What `check` found; `str()` is the report.

    Attributes:
      findings: errors first, then warnings, then notes.
      statistics: name -> Statistic(value, standard_error, expected).
      calibration: of the encoder; None where nothing could be simulated.
    """

    findings: tuple[Finding, ...]
    statistics: dict[str, Statistic]
    calibration: Calibration | None

    @property
    def ok(self) -> bool:
        """No error and no warning."""
        return all(finding.level == "note" for finding in self.findings)

    def __str__(self) -> str:
        lines = ["Nothing wrong was found." if self.ok else "Something is wrong."]
        lines += [f"{f.level} ({f.name}): {f.sentence}" for f in self.findings]
        rows = dict(self.statistics)
        if self.calibration is not None:
            rows["z_i within q's central 50 %"] = self.calibration.coverage_50
            rows["z_i within q's central 90 %"] = self.calibration.coverage_90
        for name, statistic in rows.items():
            right = "" if np.isnan(statistic.expected) else f"({statistic.expected:g} is right)"
            value, error = f"{statistic.value:.4g}", f"{statistic.standard_error:.2g}"
            lines.append(f"  {name:<48}{value:>10} ± {error:<8} {right}".rstrip())
        if self.calibration is not None:
            p, p_coordinates = self.calibration.p_value, self.calibration.coordinate_p_value
            name = "p that ranks are uniform: of log p(x|z), of z_i"
            lines.append(f"  {name:<48}{p:>10.2g}   {p_coordinates:.2g}")
        return "\n".join([*lines, _INVISIBLE])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def check(
    key: Key,
    model: Model,
    params: Params,
    xs: Any = None,
    *,
    num_points: int = 200,
    training_elbo: float | None = None,
) -> Check:
    """Looks for the silent mistakes in a model of one's own, and measures its encoder's calibration.

    | finding          | what it means |
    |------------------|---------------|
    | nan_input        | xs has NaN or infinite values |
    | non_finite       | the model's own values or gradients are NaN or infinite |
    | changing         | encode gives another q for the same x: it is in training mode |
    | constant_encoder | encode gives the same q for every x |
    | scale_sign       | q's scale is not positive: a log-variance or a log-scale |
    | scale_power      | q's scale fits once it is read as a variance, a log-variance or a log-scale |
    | pixels           | xs is on another scale than simulated x's: 0…255 not divided |
    | grey             | xs has fractions where simulated x's are whole |
    | fixed_x          | sample_x does not draw: it gives a mean |
    | mean, loss       | log_likelihood is averaged over x; its sign is turned |
    | factor           | log_likelihood is c times a log density: a squared error without 1/(2σ²) … |
    | prior_twice      | log_likelihood contains log p(z) |
    | term_of_z        | it lacks a term that depends on z, such as −log σ(z), or has one too many |
    | ignores_z        | it does not depend on z |
    | outputs          | log_likelihood_of_outputs(outputs(z)) is not log_likelihood(z) |
    | prior            | log_prior is not the log density of what sample_prior draws |
    | encoder          | q(z|x) tells z worse than the prior does: not this decoder's encoder |
    | width            | q(z|x) is far too narrow or too wide |
    | fit              | without sample_x: q and p(x, z) contradict each other on xs |
    | training_elbo    | the ELBO seen in training is not the one measured here |
    | calibration      | a note: q(z|x) is not calibrated; no mistake, but part of what gaps measure |
    | unchecked        | a note: what could not be looked at |

    `infsub.mistakes` and `infsub.mistakes_on_data` say by which statistics. Invisible to all of them
    is a constant without z; and a term of z of less than 3 % of log_likelihood's score² is let pass.

    Args:
      key: of the whole check.
      model: Model. With sample_x (and sample_prior where it has a log_prior) simulated pairs (z, x)
        are looked at, without it xs alone, which shows less.
      params: of the model's functions.
      xs: a pytree of arrays [N, …], the data to be measured. A model with covariates needs it:
        simulated x's take theirs from it.
      num_points: how many pairs are simulated, and at most how many datapoints of xs are looked at.
      training_elbo: the mean ELBO in nats that training reported for data like xs.

    Returns:
      Check. `check.ok`: no error and no warning; `print(check)`: the report.

    Raises:
      ValueError: num_points < 20; neither xs nor a way to simulate; training_elbo without xs; a z
        of another shape than [latent_dim].
      TypeError: a density returns no scalar.

    Example:
      >>> model = infsub.Model(
      ...     latent_dim=1,
      ...     encode=lambda params, x: infsub.Gaussian(0.4 * x, jnp.ones(1)),
      ...     log_likelihood=lambda params, x, z: norm.logpdf(x, z).sum(),
      ...     sample_x=lambda key, params, z, x: z + jax.random.normal(key, (1,)),
      ... )
      >>> infsub.check(jax.random.key(0), model, None).ok
      True
      >>> loss = model._replace(log_likelihood=lambda params, x, z: -norm.logpdf(x, z).sum())
      >>> infsub.check(jax.random.key(0), loss, None).findings[0].name
      'loss'
    """
    if positive_int("num_points", num_points) < 20:
        raise ValueError(f"num_points must be at least 20, or no error is known; got {num_points}")
    if training_elbo is not None and xs is None:
        raise ValueError("training_elbo needs xs, data that it is the mean of")
    lacks = simulation_lacks(model)
    if xs is None and lacks:
        raise ValueError(f"check needs xs for a model {lacks}")

    key_rows, key_pairs, key_encode, key_data, key_ranks = jax.random.split(key, 5)
    findings: list[Finding] = []
    statistics: dict[str, Statistic] = {}

    def see(seen: mistakes.Seen) -> None:
        findings.extend(seen[0])
        statistics.update(seen[1])

    data, rows = None, np.arange(num_points)
    if xs is not None:
        rows, bad = mistakes_on_data.finite_rows(xs)
        findings += bad
        if not rows.size:
            return _report(findings, statistics, None)
        rows = np.asarray(jax.random.permutation(key_rows, rows))[:num_points]
        data = jax.tree.map(lambda leaf: np.asarray(leaf)[rows], xs)

    pairs = None
    if not lacks:
        indices = np.arange(num_points)
        covariates = jax.tree.map(lambda leaf: leaf[indices % rows.size], data)
        inputs = (indices, covariates)
        pairs = map_datapoints(pair, key_pairs, inputs, model, params, warn=False)
        pairs, bad = mistakes.usable(pairs)
        findings += bad
        lacks = "whose simulated pairs cannot be used"

    if data is not None and pairs is not None:
        bad = mistakes_on_data.data_values(data, pairs)
        findings += bad
        if any(finding.name == "pixels" for finding in bad):
            data, rows = None, np.arange(num_points)  # q(z|x) of such x's means nothing

    inputs = pairs.x if data is None and pairs is not None else data
    if inputs is not None:
        outputs, scale = map_datapoints(encode_twice, key_encode, inputs, model, params, warn=False)
        findings += mistakes_on_data.encoder_outputs(outputs, scale, rows)

    size, calibration = _size(data, pairs), None
    if pairs is None:
        findings.append(Finding("note", "unchecked", _UNCHECKED.format(model=lacks)))
    else:
        see(mistakes.likelihood(pairs, size))
        findings += mistakes.outputs(pairs.log_likelihood, pairs.by_outputs)
        if model.log_prior is not None or model.sample_prior is not None:
            see(mistakes.prior(pairs))
        found, numbers = mistakes.encoder(pairs)
        constant = any(finding.name == "constant_encoder" for finding in findings)
        see(([] if constant else found, numbers))
        calibration, notes = mistakes.calibration(key_ranks, pairs)
        findings += notes
    if data is not None and not any(f.name in _NO_Q for f in findings):
        on = map_datapoints(on_data, key_data, data, model, params, warn=False)
        on, bad = mistakes_on_data.unfinished(on, rows)
        findings += bad
        if pairs is None and on.elbo.size > 1:
            see(mistakes_on_data.fit(on, data, size))
            findings += mistakes.outputs(on.log_likelihood, on.by_outputs)
        if on.elbo.size > 1:
            see(mistakes_on_data.elbo(on, training_elbo, size))
    return _report(findings, statistics, calibration)


def _size(data: Any, pairs: Pair | None) -> int:
    """X, the number of values of one x; where it is known which are covariates, without them."""
    if pairs is not None:
        x, varies = jax.tree.leaves(pairs.x), jax.tree.leaves(pairs.varies)
        return sum(leaf[0].size for leaf, v in zip(x, varies, strict=True) if np.any(v))
    return sum(leaf[0].size for leaf in jax.tree.leaves(data))


def _report(
    findings: list[Finding], statistics: dict[str, Statistic], calibration: Calibration | None
) -> Check:
    ordered = sorted(findings, key=lambda finding: _LEVELS.index(finding.level))
    return Check(tuple(ordered), statistics, calibration)
