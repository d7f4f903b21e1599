"""The gaps as inline SVG, in the colours of the page that it stands in; no text is scaled."""

from __future__ import annotations

from html import escape

import numpy as np

from infsub import gaps
from infsub.rows import ELBO, LOCAL, LOG_PX, label


def gap_figure(found: gaps.Decomposition) -> str:
    """The bar from L[q] over L[q*] to log p̂, and every datapoint's gaps; "" where no L[q*] or log p̂ is.

    A page's style colours the classes amortization, approximation and, where it is not split, inference.
    """
    if not found.has_gaps:
        return ""
    parts = found.parts
    over = (
        "over L[q*], the best of its family, to log p̂"
        if found.is_split
        else "to log p̂; no q* of the encoder's own family was found to split it"
    )
    mean = {name: line.mean.mean for name, line in found.lines.items()}
    texts = {k: gaps.with_error(p.mean.mean, p.mean.standard_error) for k, p in parts.items()}
    key = "".join(
        f'<li class="{kind}">{kind} gap <b>{value}</b> {error}</li>'
        for kind, text in texts.items()
        for value, _, error in [text.replace("-", "−").partition(" ")]
    )
    count = len(found.indices)
    return f"""<figure>
<ul class="key">{key}</ul>
{bar({kind: line.mean.mean for kind, line in parts.items()})}
{_ends(mean, found.own if found.is_split else "")}
{_stairs(parts)}
<figcaption>Above, the means in nats: from L[q], what the encoder gives, {over}. Below, each of the
{count} datapoints, the largest inference gap first.</figcaption>
</figure>"""


def bar(parts: dict[str, float], total: float | None = None) -> str:
    """Non-negative lengths one after the other, by class; the whole width is `total`, or their sum."""
    total = total or sum(max(value, 0) for value in parts.values()) or 1.0
    rects, left = [], 0.0
    for kind, value in parts.items():
        width = 100 * max(value, 0) / total
        rects.append(f'<rect class="{kind}" x="{left:.2f}%" width="{width:.2f}%" height="100%"/>')
        left += width
    return f'<svg class="bar" aria-hidden="true">{"".join(rects)}</svg>'


def _ends(mean: dict[str, float], family: str) -> str:
    """What lies at the ends of the bar, and where its colour changes: marks, and their names."""
    marks = [(0.0, 0.0, "start", ELBO.name, ""), (100.0, 100.0, "end", LOG_PX.name, "")]
    if family:
        local = LOCAL.of(family)
        share = (mean[local] - mean[ELBO.name]) / (mean[LOG_PX.name] - mean[ELBO.name] or 1)
        at = 100 * min(max(share, 0), 1)
        text_at = min(max(at, 33), 67)  # clear of its neighbours on a phone
        marks.insert(1, (at, text_at, "middle", local, ' class="aside"'))
    drawn = [
        f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="6"/><text x="{text_x:.2f}%" y="22" '
        f'text-anchor="{anchor}"{style}>{escape(label(name))} <tspan>{_minus(mean[name])}</tspan></text>'
        for x, text_x, anchor, name, style in marks
    ]
    return f'<svg class="ends">{"".join(drawn)}</svg>'


def _stairs(parts: dict[str, gaps.Line]) -> str:
    """Every datapoint's gaps stacked, in the order of their sum, over an axis that begins at 0."""
    tops = dict(
        zip(parts, np.cumsum([line.values for line in parts.values()], axis=0), strict=True)
    )
    *_, inference = tops.values()
    order = np.argsort(-inference, kind="stable")
    low = min(0.0, *(values.min() for values in tops.values()))
    high = max(low + 1e-6, *(values.max() for values in tops.values()))

    def area(values: np.ndarray) -> str:
        heights = np.rint(1000 * (high - values[order]) / (high - low)).astype(int)
        zero = round(1000 * high / (high - low))
        return f"M0 {zero}{''.join(f'V{height}h1' for height in heights)}V{zero}z"

    # The first part lies over the sum.
    paths = "".join(f'<path class="{kind}" d="{area(tops[kind])}"/>' for kind in reversed(tops))
    width = len(order)
    zero = round(1000 * high / (high - low))
    extent = f"from {_minus(inference.max())} to {_minus(inference.min())} nats"
    return f"""<div class="stairs"><span>{high:.1f} nats</span>
<svg id="stairs" viewBox="0 0 {width} 1000" preserveAspectRatio="none" role="img"
 aria-label="Inference gaps of {width} datapoints, {extent}">
{paths}
<path class="zero" d="M0 {zero}H{width}"/></svg><span>{_minus(low, 1)}</span></div>"""


def _minus(value: float, digits: int = 2) -> str:
    return f"{value:z.{digits}f}".replace("-", "−")
