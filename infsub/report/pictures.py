"""Pictures of posteriors of two latent dimensions: where each q fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from infsub.posteriors import FAMILIES
from infsub.report.figures import SMALL, STYLE, write_foot
from infsub.rows import family_label

WIDTH = 6.75  # inches, a paper's page
PAGE_ROWS = 8  # that it has room for
CONTOUR = "#0072B2"  # of the true posterior, over every q
MASSES = (0.95, 0.5)  # inside the lines


def _colors() -> ListedColormap:
    """Magma, which is perceptually uniform, from its bright end, and that faded into the paper."""
    colors = mpl.colormaps["magma_r"](np.linspace(0, 1, 256))
    paleness = np.linspace(1, 0, 32)[:, None]
    colors[:32] = paleness + (1 - paleness) * colors[:32]
    return ListedColormap(colors)


def picture_figure(models: Mapping[str, Mapping[str, np.ndarray]], seed: str) -> Figure:
    """A row a datapoint: x, p(z|x), q(z|x) and each family's q*, all on the row's window and scale.

    Lines hold 50 % and 95 % of the true posterior. Below each q stands KL(q‖p) = log p(x) − L[q].
    Several models share a page: of each, as many datapoints as fit, those where q loses most.

    Args:
      models: by name, what `posteriors.npz` holds: images [N, H, W, C] or, where x are none, indices [N],
        families [F], log_px [N], low [N, 2], width [N], truth [N, G, G], bounds [N, F], densities
        [N, F, G, G].
      seed: for the foot.
    """
    rows = [(name, n) for name, arrays in models.items() for n in _drawn(arrays, len(models))]
    num_columns = 2 + max(len(arrays["families"]) for arrays in models.values())
    side = WIDTH / num_columns
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, len(rows) * (side + 0.1) + 0.2 * len(models) + 0.1))
        figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        grid = np.asarray(figure.subplots(len(rows), num_columns, squeeze=False))
        named = None
        for axes, (name, n) in zip(grid, rows, strict=True):
            _draw_row(axes, models[name], n)
            if name != named:
                _name_columns(axes, models[name], f"{name} model" if len(models) > 1 else "")
            named = name
        foot = f"Lines: 50 % and 95 % of p(z|x). KL = log p(x) by quadrature − L. Seed {seed}."
        if len(models) > 1:
            foot += " Of each model's first datapoints those where q loses most."
        write_foot(figure, foot)
    return figure


def _drawn(arrays: Mapping[str, np.ndarray], num_models: int) -> np.ndarray:
    if num_models == 1:
        return np.arange(len(arrays["log_px"]))
    losses = arrays["log_px"] - arrays["bounds"][:, 0]
    return np.argsort(-losses)[: max(1, PAGE_ROWS // num_models)]


def _name_columns(axes: Sequence[Axes], arrays: Mapping[str, np.ndarray], model: str) -> None:
    own, *families = (family_label(str(family)) for family in arrays["families"])
    titles = ["x", "p(z|x)", f"q(z|x) {own}", *(f"q* {family}" for family in families)]
    for column, title in zip(axes, titles, strict=False):
        column.set_title(title, fontsize=7, pad=3)
    axes[0].set_ylabel(model)


def _draw_row(all_axes: Sequence[Axes], arrays: Mapping[str, np.ndarray], n: int) -> None:
    image_axes, truth_axes, *q_axes = all_axes
    _bare(image_axes)
    if "images" in arrays:  # else the x are no images
        image_axes.imshow(arrays["images"][n].squeeze(), cmap="gray_r", vmin=0, vmax=1)
    else:
        image_axes.text(0.5, 0.5, str(arrays["indices"][n]), ha="center", va="center", size=SMALL)
    truth, log_px = arrays["truth"][n], arrays["log_px"][n]
    low, width = arrays["low"][n], arrays["width"][n]
    densities = [_smoothed(density) for density in arrays["densities"][n]]
    top = max(truth.max(), *(density.max() for density in densities))
    bounded = {name for name, family in FAMILIES.items() if family.auxiliary}
    _draw_density(truth_axes, truth, truth, low, width, top)
    truth_axes.set_xlabel(f"log p(x) {log_px:.1f}".replace("-", "−"), fontsize=SMALL)
    _draw_scale(truth_axes, low, width)
    for axes in q_axes[len(densities) :]:
        axes.set_axis_off()
    for axes, density, family, bound in zip(
        q_axes, densities, arrays["families"], arrays["bounds"][n], strict=False
    ):
        _draw_density(axes, density, truth, low, width, top)
        sign = "≤ " if str(family) in bounded else ""
        kl = f"KL {sign}{log_px - bound:.2f} nats".replace("-", "−")
        axes.set_xlabel(kl, fontsize=SMALL)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(True)
    axes.spines[:].set(linewidth=0.4, color="0.6")
    axes.xaxis.labelpad = 2


def _draw_density(
    axes: Axes, density: np.ndarray, truth: np.ndarray, low: np.ndarray, width: float, top: float
) -> None:
    """A density [G, G] in colour, with the lines of the truth [G, G]."""
    _bare(axes)
    extent = (low[0], low[0] + width, low[1], low[1] + width)
    options: Any = {"origin": "lower", "extent": extent}
    axes.imshow(density.T, cmap=_colors(), vmin=0, vmax=top, interpolation="bilinear", **options)
    axes.contour(truth.T, levels=_levels(truth), colors=CONTOUR, linewidths=0.5, **options)


def _levels(truth: np.ndarray) -> list[float]:
    """The densities on the borders of the smallest regions that hold MASSES, ascending."""
    ordered = np.sort(truth.ravel())[::-1]
    held = np.cumsum(ordered) / np.sum(ordered)
    return sorted({float(ordered[np.searchsorted(held, mass)]) for mass in MASSES})


def _smoothed(density: np.ndarray) -> np.ndarray:
    """A histogram [G, G] averaged over neighbours, 1:2:1 along each axis: less of its noise."""
    for _ in range(2):
        padded = np.pad(density, ((1, 1), (0, 0)))
        density = ((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4).T
    return density


def _draw_scale(axes: Axes, low: np.ndarray, width: float) -> None:
    """A bar of a round length, the prior's standard deviation being 1."""
    decade = 10.0 ** np.floor(np.log10(width / 2))
    length = max(step * decade for step in (1, 2, 5) if step * decade <= width / 2)
    x, y = low + 0.06 * width
    axes.plot([x, x + length], [y, y], color="black", lw=0.8)
    axes.text(x + length / 2, y + 0.02 * width, f"{length:g}", size=5, ha="center", va="bottom")
