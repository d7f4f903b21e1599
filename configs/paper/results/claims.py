"""The paper's qualitative claims, each judged from the rows: confirmed, not confirmed, or unclear.

A claim is a statement, and findings: differences that are positive where it holds. A finding beyond 2
standard errors says yes or no, of a difference on the same datapoints the paired error. A claim is
confirmed where all its findings say yes, not confirmed where none does and some say no, else unclear; of
what happens "often", more than half decide. Of several seeds of training all must say the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from infsub import gaps
from infsub.report.runs import LoadedRun, difference
from infsub.rows import AMORTIZATION, APPROXIMATION, LOCAL, LOG_PX, family_label

Scales = Mapping[str, Mapping[str, Any]]  # {scale: {cell: make.Cell}}, in SCALES' order
Cells = Mapping[str, Scales]  # {experiment: Scales}
Runs = Callable[[str, str], "LoadedRun | None"]  # (experiment, cell) -> its run of one seed


class Finding(NamedTuple):
    """A difference in nats that is positive where the claim holds.

    Attributes:
      of: what it is a difference of, in words.
      mean: NaN where there is none to take.
      error: its standard error over datapoints.
      doubt: why it says nothing however large it is, in words.
    """

    of: str
    mean: float = math.nan
    error: float = math.nan
    doubt: str = ""

    @property
    def says(self) -> int:
        """1 yes, −1 no, 0 nothing: within 2 standard errors, or in doubt."""
        beyond = not self.doubt and abs(self.mean) > gaps.MEAN_ERRORS * self.error
        return int(beyond) * (1 if self.mean > 0 else -1)

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return self.of
        said = ", ".join(filter(None, (self.of, self.doubt)))
        return f"{gaps.with_error(self.mean, self.error)} ({said})".replace("-", "−", 1)


class Claim(NamedTuple):
    """A statement of the paper's.

    Attributes:
      measure: what the findings are, in words, before their numbers.
      findings: Runs -> those that can be made, [] where nothing is measured.
      number: of findings, where all is measured.
      experiment: that measures it.
      share: of the findings that must say yes; more than that.
    """

    statement: str
    measure: str
    findings: Callable[[Runs], list[Finding]]
    number: int
    experiment: str
    share: float = 1.0


def own(run: LoadedRun, quantity: Any) -> str:
    """The name of a gap of the encoder's own family."""
    return quantity.of(run.families[0])


def amortization_dominates(runs: Runs) -> list[Finding]:
    found = []
    for data in ("binarized_mnist", "fashion_mnist", "cifar10"):
        for q in ("gaussian", "auxiliary"):
            if run := runs("main_table", f"{data}_{q}"):
                of = f"{data} trained with {family_label(q)}"
                names = own(run, AMORTIZATION), own(run, APPROXIMATION)
                found.append(Finding(of, *difference(run, names[0], run, names[1])))
    return found


def accommodates(own: str, other: str) -> Callable[[Runs], list[Finding]]:
    """Findings: what a family misses on the generator of another − on that which was trained with it."""

    def findings(runs: Runs) -> list[Finding]:
        found = []
        for data in ("binarized_mnist", "fashion_mnist", "cifar10"):
            theirs, its = (runs("main_table", f"{data}_{q}") for q in (other, own))
            if theirs and its:
                name = APPROXIMATION.of(own)
                found.append(
                    Finding(data, *difference(theirs, name, its, name), doubt=_not_found(its, own))
                )
        return found

    return findings


def _not_found(run: LoadedRun, family: str) -> str:
    """The doubt about a flow's gap where its q* is no better than the Gaussian that its search starts at."""
    name, start = (LOCAL.of(each) for each in (family, "full_gaussian"))
    if family == "gaussian" or start not in run.lines:
        return ""
    gain, error = difference(run, name, run, start)
    found = gain > gaps.MEAN_ERRORS * error
    return "" if found else f"{family_label(family)} found no better than full"


def flows_amortise(runs: Runs) -> list[Finding]:
    found, plain = [], runs("flow_parameters", "linear_gaussian")
    for q in ("auxiliary", "rnvp", "planar", "sylvester"):
        if plain and (run := runs("flow_parameters", f"linear_{q}")):
            names = own(plain, AMORTIZATION), own(run, AMORTIZATION)
            found.append(Finding(family_label(q), *difference(plain, names[0], run, names[1])))
    return found


def between(
    experiment: str, pairs: Sequence[tuple[str, str, str]], quantity: Any
) -> Callable[[Runs], list[Finding]]:
    """Findings: a gap of the first cell − that of the second, for (words, first, second)."""

    def findings(runs: Runs) -> list[Finding]:
        found = []
        for of, first, second in pairs:
            a, b = runs(experiment, first), runs(experiment, second)
            if a and b:
                name = own(a, quantity)
                found.append(Finding(of, *difference(a, name, b, name)))
        return found

    return findings


def overfits_first(runs: Runs) -> list[Finding]:
    """What whichever is best first, inference or the generator, has lost when the other one is best.

    On validation points: what the amortization gap rises by where that comes first, as the claim has it,
    else what log p̂ falls by, negated.
    """
    shares = ("1_8", "1_4", "1_2", "1")
    found = [runs("over_training", f"after_{share}_validation") for share in shares]
    after = [run for run in found if run]
    if len(after) < len(shares):
        return []
    name, log_px = own(after[-1], AMORTIZATION), LOG_PX.name
    best = min(reversed(range(len(after))), key=lambda n: after[n].lines[name].mean.mean)
    best_model = max(reversed(range(len(after))), key=lambda n: after[n].lines[log_px].mean.mean)
    inference, model = after[best], after[best_model]
    if best == best_model:
        return [Finding(f"both are best at checkpoint {best + 1} of {len(after)}")]
    if best < best_model:
        of = "what the amortization gap rises by from its best checkpoint to that of log p̂"
        return [Finding(of, *difference(model, name, inference, name))]
    of = "what log p̂ falls by from its best checkpoint to that of the amortization gap, negated"
    return [Finding(of, *difference(inference, log_px, model, log_px))]


ANNEALING = (
    ("FFG", "gaussian_none", "gaussian_entropy"),
    ("AF", "auxiliary_none", "auxiliary_entropy"),
)
ANNEALING_AT_TEST = tuple((of, f"{a}_test", f"{b}_test") for of, a, b in ANNEALING)
CLAIMS = (
    Claim(
        "Amortization often costs more than the family",
        "amortization − approximation gap of the q trained with",
        amortization_dominates,
        6,
        "main_table",
        share=0.5,
    ),
    Claim(
        "Generators accommodate the q that they were trained with, where that is FFG",
        "what the best FFG misses of log p̂ is larger on the generator trained with AF than on the one "
        "trained with FFG",
        accommodates("gaussian", "auxiliary"),
        3,
        "main_table",
    ),
    Claim(
        "Generators accommodate the q that they were trained with, where that is AF",
        "what the best AF that is found misses of log p̂ is larger on the generator trained with FFG than on "
        "the one trained with AF (no verdict where the search finds nothing better than *full*, at which it "
        "starts: the gap is *full*'s then, and AF's at most as large)",
        accommodates("auxiliary", "gaussian"),
        3,
        "main_table",
    ),
    Claim(
        "A flow's parameters help to amortise",
        "on one decoder, the amortization gap of a linear FFG encoder − that of a linear encoder with a flow "
        "(AF and RNVP see its outputs through hidden layers of their own)",
        flows_amortise,
        4,
        "flow_parameters",
    ),
    Claim(
        "A larger encoder shrinks the amortization gap",
        "amortization gap of the smaller − of the larger encoder",
        between(
            "larger_encoder",
            (
                ("[200, 200] and [500, 500], FFG", "encoder_200_200", "encoder_500_500"),
                ("[200, 200] and [500, 500], AF", "auxiliary_200_200", "auxiliary_500_500"),
                ("cifar10, convolutions and a first layer of twice as many", "conv", "conv_wide"),
            ),
            AMORTIZATION,
        ),
        3,
        "larger_encoder",
    ),
    Claim(
        "Training without entropy annealing leaves larger amortization gaps",
        "without − with annealing",
        between("no_annealing", ANNEALING, AMORTIZATION),
        2,
        "no_annealing",
    ),
    Claim(
        "Without entropy annealing inference generalises worse: larger amortization gaps at test points",
        "without − with annealing",
        between("no_annealing", ANNEALING_AT_TEST, AMORTIZATION),
        2,
        "no_annealing",
    ),
    Claim(
        "Training without entropy annealing leaves larger approximation gaps",
        "without − with annealing",
        between("no_annealing", ANNEALING, APPROXIMATION),
        2,
        "no_annealing",
    ),
    Claim(
        "A deeper decoder has posteriors that are easier to approximate",
        "approximation gap of FFG of the shallower − of the deeper decoder",
        between(
            "decoder_size",
            (
                ("0 and 2 layers of 200", "decoder_linear", "decoder_2x200"),
                ("2 and 4 layers of 200", "decoder_2x200", "decoder_4x200"),
            ),
            APPROXIMATION,
        ),
        2,
        "decoder_size",
    ),
    Claim(
        "Inference generalises worse than it fits: the amortization gap is larger on test points",
        "on test − on training points, other datapoints, so that the errors add",
        between(
            "test_set",
            (
                ("FFG", "gaussian_test", "gaussian_train"),
                ("AF", "auxiliary_test", "auxiliary_train"),
            ),
            AMORTIZATION,
        ),
        2,
        "test_set",
    ),
    Claim(
        "Inference overfits before the generator does",
        "on validation points, from the checkpoint where one is best to that where the other is, chosen by "
        "these points too, which favours a verdict",
        overfits_first,
        1,
        "over_training",
    ),
)


def verdict(claim: Claim, findings: Sequence[Finding]) -> str:
    """Of one seed's findings."""
    says = [finding.says for finding in findings]
    yes, no = says.count(1), says.count(-1)
    if yes == len(says) or yes > claim.share * len(says):
        return "confirmed"
    return "not confirmed" if no and (not yes or no > claim.share * len(says)) else "unclear"


def judge(claim: Claim, cells: Cells) -> list[tuple[str, str]]:
    """The verdicts on a claim, each with its figures in a sentence.

    Only runs of one scale are compared: of the largest at which there is anything to compare and,
    where that is not all the claim is about, of the smaller ones too.
    """
    found = []
    for scale, shown in cells.get(claim.experiment, {}).items():
        seeds = sorted({seed for cell in shown.values() for seed in cell.runs})
        findings = {seed: claim.findings(_runs(cells, scale, seed)) for seed in seeds}
        findings = {seed: made for seed, made in findings.items() if made}
        if findings:
            points = sorted({len(cell.run.indices) for cell in shown.values()})
            said, figures = _judge(claim, findings, scale)
            found.append((said, f"{figures}; {' and '.join(map(str, points))} points."))
        if any(len(made) == claim.number for made in findings.values()):
            break
    return found or [("not measured yet", f"it needs {claim.experiment}.")]


def _judge(claim: Claim, findings: Mapping[int, Sequence[Finding]], scale: str) -> tuple[str, str]:
    """The verdict on {seed: findings} of one scale, and their figures."""
    verdicts = {verdict(claim, made) for made in findings.values()}
    said = f"{verdicts.pop() if len(verdicts) == 1 else 'unclear'} at scale `{scale}`"
    counts = {seed: len(made) for seed, made in findings.items()}
    most = max(counts.values())
    if min(counts.values()) < claim.number:
        are = "is" if most == 1 else "are"
        fewer = [f"{n} of seed {seed}" for seed, n in counts.items() if n < most]
        said += f", where {most} of {claim.number} comparisons {are} measured"
        said += f" ({', '.join(fewer)})" if fewer else ""
    figures = "; ".join(
        f"seed {seed}: {', '.join(map(str, made))}" for seed, made in findings.items()
    )
    return said, f"{claim.measure}, in nats: {figures}"


def _runs(cells: Cells, scale: str, seed: int) -> Runs:
    def run(experiment: str, name: str) -> LoadedRun | None:
        cell = cells.get(experiment, {}).get(scale, {}).get(name)
        return cell.runs.get(seed) if cell is not None else None

    return run


def text(cells: Cells) -> str:
    """The claims as a Markdown list."""
    lines = []
    for claim in CLAIMS:
        (said, sentence), *smaller = judge(claim, cells)
        lines.append(f"- **{claim.statement}: {said}.** {sentence[0].upper()}{sentence[1:]}")
        lines += [f"  - {said.capitalize()}: {sentence}" for said, sentence in smaller]
    return "\n".join(lines)
