"""From any model and its data to a table: `measure`, `compare`, and what they return.

This is the command line's evaluation and report for a model in one's own program: the same row of a
datapoint (measure.py), the same gaps (gaps.py), the same tables (report/), and the same files, so
that `infsub.load` reads a run's folder and `python -m infsub.report` a saved Measurement's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from infsub import (
    compilations,
    files,
    gaps,
    imported,
    posteriors,
    provenance,
    records,
    rows,
    subjects,
    thumbnails,
)
from infsub import config as configs
from infsub.datapoints import map_datapoints, number_of
from infsub.keys import Stream, stream
from infsub.measure import Settings
from infsub.programs import Program, call
from infsub.report import bars, page, runs, tables
from infsub.report.runs import LoadedRun
from infsub.types import Key, Model, Params, UserError, positive_int
from infsub.verdicts import Verdicts

Format = Literal["markdown", "latex", "csv"]


@dataclass(frozen=True, eq=False, repr=False)
class Measurement:
    """What was measured of a model at N datapoints; `print` shows the table, a notebook draws it.

    Attributes:
      rows: one a datapoint, {column: number}; see infsub.rows.
      certificate_rows: the same of the datapoints that the model simulated.
      config: how it was measured, as a run's config has it: model.latent_dim, evaluate.….
      data: what the datapoints are of; only measurements of the same data are compared.
      name: in tables of several.
      missing: what of an evaluation is not done yet; "" of a whole one.
      xs: the datapoints, a pytree [N, …], or what there is to show of them; None where nothing is.
    """

    rows: Sequence[Mapping[str, Any]]
    certificate_rows: Sequence[Mapping[str, Any]] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""
    name: str = "model"
    missing: str = ""
    xs: Any = None

    @cached_property
    def run(self) -> LoadedRun:
        """The gaps, their certificate, flags and notes, as tables and figures take them.

        Raises:
          ValueError: no datapoint is finite in all bounds.
        """
        return runs.decomposed(self.name, self.rows, self.certificate_rows, self._document)

    @property
    def _document(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("name", "config", "data", "missing")}

    @property
    def gaps(self) -> gaps.Decomposition:
        """Lines with both errors, notes and flags, over the datapoints that are finite."""
        return self.run.found

    @property
    def certificate(self) -> gaps.Certificate | None:
        """What bidirectional AIS says of AIS; None where no point was certified."""
        return self.run.certificate if self.certificate_rows else None

    @property
    def verdicts(self) -> Verdicts:
        """What is to blame, and what to try, of the model and of each datapoint."""
        return self.run.verdicts

    @property
    def notes(self) -> list[str]:
        """Sentences about the numbers."""
        return self.run.notes

    @property
    def flags(self) -> list[gaps.Flag]:
        """Datapoints to look at, by index."""
        return self.run.flags

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """{column: [N]} of all rows."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return {name: np.array([row.get(name) for row in self.rows]) for name in names}

    def table(self, format: Format = "markdown") -> str:
        """The table as Markdown, LaTeX (booktabs) or CSV. Raises ValueError for another format."""
        return tables.table([self.run], format)

    def datapoints(self) -> str:
        """Every datapoint's verdict, gaps and bounds as CSV."""
        return files.csv_text(tables.datapoint_rows(self.run))

    def figure(self) -> Any:
        """The bar from L[q] over L[q*] to log p̂, and every datapoint's gaps; a matplotlib Figure.

        Raises:
          ValueError: no family was optimised locally, so there is no gap to draw.
          ImportError: matplotlib is not installed.
        """
        return bars([self.run])

    def page(self, path: str | Path) -> Path:
        """Writes one file for a browser: the table, the figure, and every datapoint to sort and filter.

        See infsub.report.page. The file's path.

        Raises:
          OSError: nothing can be written there.
        """
        page.write(path, self.run, self._shown())
        return Path(path)

    def _shown(self) -> Any:
        """What there is to show of the datapoints, in the order of the run's rows."""
        chosen = np.argsort(self.columns[rows.INDEX])
        return jax.tree.map(lambda leaf: np.asarray(leaf)[chosen], self.xs)

    def save(self, folder: str | Path) -> Path:
        """Writes the measurement as a run's folder; `infsub.load` reads it. The folder's path.

        Raises:
          UserError: there are other rows already, or it is a run that the command has made.
        """
        folder = Path(folder)
        if any((folder / name).exists() for name in ("checkpoints", "evaluation.json")):
            raise UserError(f"{folder} is a run of the command: give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "rows.jsonl"
        if path.exists() and files.read_rows(path) != [files.finite(row) for row in self.rows]:
            raise UserError(f"{path} is another measurement's: give another folder.")
        document = self._document | {"versions": provenance.versions()}
        files.write_json(folder / "config.json", document)
        if self.xs is not None:
            shown = {"indices": np.sort(self.columns[rows.INDEX])}
            files.write_npz(folder / records.IMAGES, shown | thumbnails.arrays(self._shown()))
        if self.certificate_rows:
            files.rewrite_rows(folder / "bdmc.jsonl", self.certificate_rows)
        files.rewrite_rows(path, self.rows)
        return folder

    def __str__(self) -> str:
        try:
            return "\n".join(tables.summary([self.run]))
        except ValueError as error:
            return f"{self.name}: {error}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        try:
            return "\n".join([*tables.markdown([self.run]), "", *tables.footer([self.run])])
        except ValueError:
            return str(self)


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Measurements side by side; on the same datapoints, their paired differences too.

    Attributes:
      measurements: by name.
    """

    measurements: Mapping[str, Measurement]

    @cached_property
    def runs(self) -> list[LoadedRun]:
        """One a measurement, by its name here."""
        return [m.run._replace(name=name) for name, m in self.measurements.items()]

    @property
    def differences(self) -> dict[str, dict[str, gaps.Line]]:
        """{name: {line: its difference to the first measurement}}, paired; of the same datapoints."""
        return tables.differences(self.runs)

    def table(self, format: Format = "markdown") -> str:
        """A column for each as Markdown or LaTeX, a row for each and line as CSV."""
        return tables.table(self.runs, format)

    def figure(self) -> Any:
        """A bar for each from L[q] over L[q*] to log p̂; a matplotlib Figure. Raises as one's own."""
        return bars(self.runs)

    def __str__(self) -> str:
        try:
            return "\n".join([*tables.summary(self.runs), *tables.difference_tables(self.runs)])
        except ValueError:  # each says what is wrong with it
            return "\n\n".join(f"{name}:\n{m}" for name, m in self.measurements.items())

    def __repr__(self) -> str:
        return str(self)

    def _repr_markdown_(self) -> str:
        try:
            below = [*tables.difference_tables(self.runs), "", *tables.footer(self.runs)]
            return "\n".join([*tables.markdown(self.runs), *below])
        except ValueError:
            return str(self)


def measure(
    key: Key,
    model: Model,
    params: Params,
    xs: Any,
    *,
    families: Sequence[str] | None = None,
    num_certified: int = 0,
    block_size: int | None = None,
    progress: bool = True,
    settings: Settings | None = None,
    own: str | None = None,
    indices: Any = None,
    labels: Any = None,
    images: Any = None,
    name: str = "model",
) -> Measurement:
    """Where a model's inference loses its nats, datapoint by datapoint, with its errors.

    inference gap = (log p̂(x) − L[q*]) + (L[q*] − L[q]) = approximation + amortization gap
    (Cremer, Li & Duvenaud 2018, arXiv 1801.03558, section 3); see infsub.gaps.

    From here on the process keeps what jax compiles in the user's cache: infsub.compilations.keep. So
    functions defined anew are traced again, which takes a few seconds, but not compiled again.

    Args:
      key: of the whole measurement; a datapoint's is folded from it and its index.
      model: a Model, functions of ONE datapoint; z is flat [D].
      params: of the model's functions.
      xs: a pytree of arrays [N, …], covariates included.
      families: of local inference, names in `posteriors.FAMILIES`, or one of them; "own" is the
        encoder's. (): none, and no split of the gap. None: those of the settings, own and FFG.
      num_certified: datapoints that the model simulates to certify AIS on from both sides; it needs
        sample_x, and sample_prior where there is a log_prior.
      block_size: datapoints at a time, at most; None: as the device likes.
      progress: draw a bar on stderr.
      settings: numbers of samples, temperatures and so on.
      own: name of the encoder's family where encode gives a sampler; a Gaussian says it itself.
      indices: [N], what the datapoints are called in tables, and what keys them; None is 0 … N−1.
      labels: [N], classes, for the page.
      images: [N, H, W] or [N, H, W, C], to be shown for the datapoints; None: xs where it is image-like.
      name: in a table of several.

    Returns:
      Measurement.

    Raises:
      ValueError: sizes that do not agree, an unknown family, or num_certified of a model that cannot
        simulate; as the estimators.
      TypeError: a density that returns no scalar; encode returns no q.

    Example:
      >>> model = infsub.Model(
      ...     latent_dim=1,
      ...     encode=lambda params, x: infsub.Gaussian(0.4 * x, jnp.ones(1)),
      ...     log_likelihood=lambda params, x, z: norm.logpdf(x, z).sum(),
      ...     sample_x=lambda key, params, z, x: z + jax.random.normal(key, (1,)),
      ... )
      >>> xs = jnp.linspace(-2, 2, 8)[:, None]
      >>> measured = infsub.measure(jax.random.key(0), model, None, xs, progress=False)
      >>> print(f"{measured.gaps.lines['amortization_gap_gaussian'].mean.mean:.1f} nats")
      0.2 nats
    """
    compilations.keep()
    settings = settings or Settings()
    families = settings.families if families is None else families
    families = (families,) if isinstance(families, str) else families
    subject = subjects.of_model(model)
    if num_certified and positive_int("num_certified", num_certified) and subject.simulate is None:
        raise ValueError(
            "num_certified needs a model that simulates: give it sample_x, and sample_prior where it "
            "has a log_prior"
        )
    num_points = number_of(xs)
    indices = np.arange(num_points) if indices is None else np.asarray(indices)
    if np.unique(indices).size < num_points:
        raise ValueError(f"indices must be N={num_points} different integers; got {indices}")
    if labels is not None:
        labels = rows.checked_labels(labels, num_points).tolist()
    if images is not None and number_of(images) != num_points:
        raise ValueError(f"images must be N={num_points}; got {number_of(images)}")
    if own:
        posteriors.family(own)
    own = own or subjects.family_of(model, params, jax.tree.map(lambda leaf: leaf[0], xs))
    settings = settings._replace(families=posteriors.chosen_families(families, own))
    num_chains = settings.ais.num_chains
    block_size, chunk_size = subjects.sizes(num_points, num_chains, block_size or 0)
    if num_certified:  # its mistakes are told before all rows are measured, and not after them
        first = jax.tree.map(lambda leaf: leaf[0], xs)
        program = Program(subjects.certificate, (params, subject), {"settings": settings})
        jax.eval_shape(
            lambda key, x, arrays: call(program.code, arrays, key, x), key, first, program.arrays
        )

    def mapped(
        function: Any, label: str, number: Stream, xs: Any, indices: Any, **sizes: int
    ) -> list[Any]:
        columns = map_datapoints(
            function,
            stream(key, number),
            xs,
            params,
            subject,
            static={"settings": settings, **sizes},
            block_size=block_size,
            indices=indices,
            progress=label if progress else None,
            warn=False,  # the table and its flags say it
        )
        return rows.to_json({rows.INDEX: indices} | columns)

    measured = mapped(subjects.row, "measuring", Stream.ROWS, xs, indices, chunk_size=chunk_size)
    for row, label in zip(measured, labels or [None] * num_points, strict=True):
        row |= {} if label is None else {rows.LABEL: label}
    certified = []
    if num_certified:
        chosen = np.arange(num_certified)
        covariates = jax.tree.map(lambda leaf: np.asarray(leaf)[chosen % num_points], xs)
        certified = mapped(
            subjects.certificate, "certifying", Stream.CERTIFICATE, covariates, chosen
        )
    config = {
        "model": {"latent_dim": model.latent_dim, "posterior": {"name": own}},
        "evaluate": configs.of_settings(settings) | {"bdmc": {"num_points": num_certified}},
    }
    shown = xs if images is None else images
    return Measurement(measured, certified, config, imported.digest(xs), name, xs=shown)


def compare(measurements: Mapping[str, Measurement]) -> Comparison:
    """Measurements side by side: `compare({"FFG": infsub.measure(…), "planar": infsub.measure(…)})`.

    Raises:
      TypeError: it is no dict of Measurements.
      ValueError: it is empty.

    Example:
      >>> wide = infsub.Measurement([{"index": 0, "elbo": -1.9, "elbo_se": 0.1}])
      >>> fitted = infsub.Measurement([{"index": 0, "elbo": -1.5, "elbo_se": 0.1}])
      >>> print(infsub.compare({"wide": wide, "fitted": fitted}).table())
      | nats | wide | fitted |
      |---|---:|---:|
      | L[q] | -1.90(10) | -1.50(10) |
      | datapoints | 1 | 1 |
    """
    if not isinstance(measurements, Mapping) or not all(
        isinstance(m, Measurement) for m in measurements.values()
    ):
        raise TypeError("compare takes {name: Measurement, …}, what infsub.measure returns")
    if not measurements:
        raise ValueError("compare needs at least one Measurement; got none")
    return Comparison(dict(measurements))


def load(folder: str | Path) -> Measurement:
    """A Measurement that was saved, or the evaluation in a run's folder.

    Raises:
      UserError: there is none, or a file is torn.

    Example:
      >>> import tempfile
      >>> measured = infsub.Measurement([{"index": 0, "elbo": -1.5, "elbo_se": 0.1}])
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     print(infsub.load(measured.save(folder)).rows)
      [{'index': 0, 'elbo': -1.5, 'elbo_se': 0.1}]
    """
    folder = Path(folder)
    measured, certified, document = runs.read_folder(folder)
    told = {name: document[name] for name in ("config", "data", "missing")}
    name = document.get("name", folder.resolve().name)
    shown = runs.read_shown(folder, np.array([row[rows.INDEX] for row in measured]))
    return Measurement(measured, certified, **told, name=name, xs=shown)
