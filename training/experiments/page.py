"""docs/direct-score.md and its figures from the stored results: ``python -m training.experiments.page``.

Reads the JSON files of EVIDENCE/gradients and mixtures, and those of sweep, digits, features, images and real-digits
if they are there. Every number and every verdict on the page is computed here; the words around them stand in this
file.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import spearmanr

from training.engine import checkpoint
from training.experiments import gradients, mixtures, problems, real_digits_page, sweep_page, together_page
from training.experiments.comparisons import (
    HEADER,
    TITLES,
    against_all,
    chosen_by_evidence,
    columns,
    dominated,
    estimators_of,
    failures,
    groups,
    judged,
    of_direct,
    of_rival,
    of_surrogate,
    present,
    rivals_of,
)
from training.experiments.estimators import CROSS_FITTED, ESTIMATORS
from training.experiments.mixtures import SURROGATES
from training.experiments.tables import FAMILIES, label, read, seeds, shown, verdict
from training.measures.seeds import Estimate, estimate
from training.settings import command_line
from training.settings.errors import run_program

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

# The entry without which a cell of an experiment has too little for the page.
LAST = {
    "gradients": f"{gradients.NAMES[-1]} at {gradients.SIGMAS[-1]}",
    "sweep": f"student direct:kl {mixtures.SWEPT.estimators[-1]}",
    "real-digits": "memory regular",
}
MANY = 5  # estimators of one problem, for a rank correlation among them
R_SCORE_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


@dataclass(frozen=True)
class PageSettings:
    """Where results are and the page goes."""

    evidence: Path = Path("docs/evidence")  # folder with a folder for each experiment
    docs: Path = Path("docs")  # direct-score.md and figures/direct-*.png are written here


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        PageSettings,
        arguments,
        program="python -m training.experiments.page",
        description="Write docs/direct-score.md from the stored results of the experiments.",
        default=PageSettings(),
    )

    def stored(name: str) -> list[dict[str, Any]]:
        return read(settings.evidence / name, LAST.get(name, "student direct:kl energy_ensemble"))

    of_gradients, of_mixtures = (stored(name) for name in ("gradients", "mixtures"))
    of_sweep, of_digits, of_features, of_images, of_real_digits = (
        stored(name) if (settings.evidence / name).exists() else []
        for name in ("sweep", "digits", "features", "images", "real-digits")
    )
    known = [*of_mixtures, *of_digits, *of_features, *of_images]
    checkpoint.make_folder(settings.docs / "figures", "docs")
    sections = [
        INTRODUCTION,
        section_gradients(of_gradients),
        section_mixtures(of_mixtures),
        *([sweep_page.section(of_sweep, settings.docs / "figures")] if of_sweep else []),
        *([section_digits(of_digits)] if of_digits else []),
        *([section_images(of_features, of_images)] if of_features or of_images else []),
        section_law(known, of_sweep, settings.docs / "figures" / "direct-law.png"),
        together_page.section(known),
        section_ablation(known),
        *([real_digits_page.section(of_real_digits, settings.docs / "figures")] if of_real_digits else []),
        section_cost(known, of_sweep, of_gradients, of_real_digits),
    ]
    page = settings.docs / "direct-score.md"
    checkpoint.write_atomically(page, "\n\n".join(sections) + "\n")
    others = f"{len(of_gradients)} audits of gradients and {len(of_real_digits)} folds of real digits"
    print(f"{page} from {len(known) + len(of_sweep)} problems with a known posterior, {others}")


INTRODUCTION = """# Direct SCORE against its surrogates, where the truth is known

<!-- Written by `make results` from docs/evidence; edit training/experiments/page.py instead. -->

Direct SCORE trains towards a posterior p̂(y|x'), an estimate of p_d. Whether it wins depends on two things: on the
objective, and on the estimate. On data whose p_d is known in closed form the two can be told apart. Everything below
uses such data, except the real digits at the end. Intervals are 95 % over seeds (Student's t); each seed has data and
an initialisation of its own, and on the mixtures a p_d of its own. Comparisons are paired over seeds. The hypotheses
were written into [training/experiments](../training/experiments) before the runs that they are about. Some were added
when others had been seen, and say so.

Words used below: **KL** is KL(p_d ‖ model) at clean points, in nats. **R_SCORE** is the mean of the largest such KL
found in the ball (Eq. 4), by a search that knows p_d. **Disagrees** is the share of points for which that search met a
point where the model's class is not the most likely one of p_d; a search for that alone would find more. **Robust by
label** is the usual robust accuracy, under PGD; p_d itself is not robust in that sense, because its own most likely
class changes within the ball. A **student** is a classifier that is trained here, with any of the objectives.

Some things to know about the verdicts. **Fails** means that these runs do not show it; they need not show the opposite.
“Not clearly behind” asks little where intervals are wide. Intervals are not corrected for their number, except in R5.
To be ahead of *every* surrogate needs no correction, as all comparisons have to agree; but of the many single
differences on this page about one in twenty will lie outside its interval. H3 is about all surrogates; the verdict
against those as published was added after its first results. All objectives have as many steps of training and of
attack, but direct SCORE takes [longer](#cost), and its posterior is trained before. The posteriors are told one thing
about p_d: the noise levels σ that they choose from are multiples of its noise. And the estimators were developed on
problems of this kind, where their errors could be seen, so held-out likelihood alone decides among them, but not which
of them there are. Seeds and folds were added when the
results of the first ones were known; the intervals do not account for that. The search for R_SCORE finds a lower bound,
and misses a larger share of it for models that are very near p_d ([how
much](results.md#what-the-search-for-r_score-misses))."""


def section_gradients(cells: Sequence[dict[str, Any]]) -> str:
    """Table of relative errors and the three hypotheses."""
    errors = {(name, sigma): _error(cells, name, sigma) for name in gradients.NAMES for sigma in gradients.SIGMAS}
    rows = [
        f"| {name} | " + " | ".join(_relative(errors[name, sigma]) for sigma in gradients.SIGMAS) + " |"
        for name in gradients.NAMES
    ]
    literal, centred = errors["two networks, literal", 0.05], errors["one network, centred", 0.05]
    one = errors["one network, literal", 0.05]
    single = [a / b for a, b in zip(literal.values, centred.values, strict=True)]
    ratio = estimate([float(np.log(value)) for value in single])
    tenth = ratio.low is not None and ratio.low >= np.log(10)
    others = [cell for cell in cells if cell["seed"] != gradients.CHOSEN_ON]
    first_nine = [name for name in gradients.NAMES if name != gradients.ADDED]
    best = min(([errors[name, sigma].mean for sigma in gradients.SIGMAS[1:]] for name in first_nine), key=max)
    added = [_error(others, gradients.ADDED, sigma) for sigma in gradients.SIGMAS[1:] if others]
    below = bool(added) and all(value.high is not None and value.high < 0.1 for value in added)
    ranks = {sigma: _ranks(cells, sigma) for sigma in gradients.SIGMAS}
    ranked = all(rank.low is not None and rank.low >= 0.9 for rank in ranks.values())
    count, dimension = cells[0]["count"], cells[0]["dimension"]
    return "\n".join(
        [
            "## The gradient of log p(y|x): what was noisy",
            "",
            "Relative mean squared error of ∇ log p_σ(y|x̃) at x̃ = x + σω, weighted with the exact posterior; 3 classes "
            f"of 3 Gaussians in {dimension} dimensions, {count:,} labels, {len(cells)} seeds. 0 is exact; 1 is as good "
            "as no gradient at all.",
            "",
            "| estimator | " + " | ".join(f"σ = {sigma:g}" for sigma in gradients.SIGMAS) + " |",
            "| --- |" + " --- |" * len(gradients.SIGMAS),
            *rows,
            "",
            "- G1, centring by the estimator's own posterior has at most a tenth of the error of the literal Eq. (34) "
            f"of two networks at σ = 0.05: ratio {literal.mean / centred.mean:.1f}{_ratio_interval(ratio)}: "
            f"{by_means(literal.mean >= 10 * centred.mean, tenth, len(cells))}. "
            f"Against Eq. (34) of one network the ratio is {one.mean / centred.mean:.1f}.",
            "- G2, some estimator is below 0.1 at every σ from 0.1 on: "
            f"{_listed(best)} for the best of the first nine: {verdict(max(best) < 0.1, len(cells))}. Sixteen joint "
            f"energies were added after that, with {gradients.HEAVIER:,.0f} in the place of 100 as the weight of their "
            f"gradients. Number and weight were chosen by these errors on seed {gradients.CHOSEN_ON}. On the other "
            f"seeds they have {', '.join(shown(value, 3) for value in added) or 'not been run'}: "
            f"{by_means(max((v.mean for v in added), default=1.0) < 0.1, below, len(others))}.",
            "- G3, the audit without an oracle ranks the estimators as the oracle does; Spearman's correlation, the "
            f"mean over seeds at σ = {', '.join(f'{s:g}' for s in gradients.SIGMAS)}: "
            f"{', '.join(shown(ranks[s], 2) for s in gradients.SIGMAS)}: at least 0.9 "
            f"{by_means(all(ranks[s].mean >= 0.9 for s in gradients.SIGMAS), ranked, len(cells))}.",
            "",
            f"`python -m training.experiments --name gradients --seeds {seeds(cells)} --out docs/evidence/gradients`",
        ]
    )


def by_means(holds: bool, clear: bool, count: int) -> str:
    """A verdict on means, which says so where the intervals would allow the opposite."""
    return verdict(holds, count) + (", by the means alone" if holds and not clear and count > 1 else "")


def _ratio_interval(logarithm: Estimate) -> str:
    if logarithm.low is None or logarithm.high is None:
        return ""
    return f" [{np.exp(logarithm.low):.1f}, {np.exp(logarithm.high):.1f}]"


def _error(cells: Sequence[dict[str, Any]], name: str, sigma: float) -> Estimate:
    """The relative error of an estimator."""
    return estimate([cell["entries"][f"{name} at {sigma}"]["gradient"]["relative"] for cell in cells])


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _relative(value: Estimate) -> str:
    return f"{value.mean:.3g}" if value.high is None else f"{value.mean:.3g} ± {value.high - value.mean:.2g}"


def _ranks(cells: Sequence[dict[str, Any]], sigma: float) -> Estimate:
    """Spearman's correlation of the two audits over the estimators, by seed."""
    values = []
    for cell in cells:
        entries = [cell["entries"][f"{name} at {sigma}"] for name in gradients.NAMES]
        found = spearmanr([e["gradient"]["relative"] for e in entries], [e["matching_error"] for e in entries])
        values.append(float(found.statistic))
    return estimate(values)


def _kl_in_ball(cell: dict[str, Any], name: str) -> float:
    """KL(p_d ‖ posterior) at random points of the ball, in nats."""
    value: float = cell["entries"][f"posterior {name}"]["kl_in_ball"]
    return value


def section_mixtures(cells: Sequence[dict[str, Any]]) -> str:
    """One table for each dimension and number of labels, and H1, H3 and H5."""
    parts = [
        "## Mixtures of Gaussians",
        "",
        "3 classes of 3 unit Gaussians, L2, eps 1; the student is a perceptron with two hidden layers of 128, trained "
        f"for {cells[0]['budget']['steps']} steps on hard labels, whatever the objective. A posterior is fitted to the "
        "same labels. Its networks stop by held-out loss, and its σ is chosen by the likelihood of held-out labels at "
        "x + noise, with noise as long as the attack. “Picked by the oracle” means that a surrogate has the weights of "
        "that one of 8 checkpoints with the lowest R_SCORE, which nobody can find without knowing p_d. Direct SCORE "
        "always keeps its last weights. “Chosen by evidence” is, for each seed, the one with the highest held-out "
        f"likelihood among {_candidates()}: they alone have held every training point out once, so that their "
        "likelihoods can be compared. Others are not chosen even where theirs is higher, as that of factor analysers, "
        "which have the form of p_d, may be. The evidence of an ensemble is the mean of what its members have. "
        "“(1 of 32)” after a verdict: 1 of 32 comparisons does not show it; each surrogate is compared twice, with its "
        "last and with its picked weights. TRADES with a target that a posterior moves lies between the surrogates and "
        "direct SCORE: it is in the tables, with its last weights, but does not count as a surrogate.",
    ]
    return "\n".join([*parts, *_tables(cells)])


def _candidates() -> str:
    """Those among which evidence chooses, in words."""
    names = [FAMILIES[name][0] for name in CROSS_FITTED]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def section_digits(cells: Sequence[dict[str, Any]]) -> str:
    """The same table for draws that look like digits."""
    parts = [
        "## Digits whose posterior is known",
        "",
        "Draws from mixtures of factor analysers (two components of rank 6 for each class) that were fitted to the 8×8 "
        "digits, with noise until the Bayes error is 10 %: the structure of real images, 64 dimensions, ten classes, "
        "and a p_d in closed form. L2, eps 0.25; in this ball the most likely class of p_d itself changes for a fifth "
        "of the points. Everything else is as above. The factor analysers among the posteriors have the same form as "
        "p_d.",
    ]
    return "\n".join([*parts, *_tables(cells)])


def section_images(of_features: Sequence[dict[str, Any]], of_images: Sequence[dict[str, Any]]) -> str:
    """The same tables at the dimension of CIFAR-10, by what p_d depends on and by principal components."""
    parts = [
        "## Images whose posterior is known, 3,072 dimensions",
        "",
        "Draws from one factor analyser of rank 4 for each class of CIFAR-10, with noise until the Bayes error is "
        "10 %; L2, eps 0.5, the usual radius. Networks are looked at every 100 steps instead of 50, and stop after 6 "
        "looks without gain instead of 10; 1,000 points test and 300 choose, instead of 4,000 and 1,000. Everything "
        "else is as above.",
    ]
    if of_features:
        parts += [
            "",
            "**By features.** The noise is the same in all classes. Then p_d(y|x) depends on "
            f"{of_features[0]['dimension']} linear features of the image alone, which the networks are given. So they "
            "can represent p_d, and the part of a perturbation that does not change the features has no effect. The "
            "student has two hidden layers of 256.",
            *_tables(of_features),
        ]
    if of_images:
        parts += [
            "",
            f"**By principal components.** Networks see the {problems.DIRECTIONS} leading principal components of the "
            "training images; p_d and the attacks see all of x. The noise differs a little between the classes. p_d "
            "sees this in the length of the part of x that the components leave out, so no network here can represent "
            "p_d. "
            f"The student has two hidden layers of 256, trained for {of_images[0]['budget']['steps']} steps. The "
            f"gradients of the joint energies have the weight {of_images[0]['grid']['energy_weight']:g}, elsewhere "
            f"{of_features[0]['grid']['energy_weight'] if of_features else 100:g}. {_left_out(of_images)}",
            f"The noise levels that evidence chooses among lie up to {100 * _spread_of_levels(of_images):.0f} % apart "
            "between the seeds; each file says which they were.",
            *_tables(of_images),
        ]
    return "\n".join(parts)


def _left_out(cells: Sequence[dict[str, Any]]) -> str:
    """Which of the posteriors that are planned have not been run."""
    planned = mixtures.PLANS["images"].estimators
    missing = [FAMILIES[name][0] for name in planned if name not in present(cells, planned, "student direct:kl {}")]
    return f"Planned, and not run so far: {'; '.join(missing)}." if missing else ""


def _spread_of_levels(cells: Sequence[dict[str, Any]]) -> float:
    """How much larger the lowest noise level is in one cell than in another, as a share."""
    lowest = [
        min(float(sigma) for entry in cell["entries"].values() for sigma in entry.get("evidence") or ())
        for cell in cells
    ]
    return max(lowest) / min(lowest) - 1


def _tables(cells: Sequence[dict[str, Any]]) -> list[str]:
    """For each problem the table, the hypotheses and the command."""
    parts = []
    for title, group in groups(cells).items():
        first = group[0]
        name = {"mixture": "mixtures"}.get(first["problem"], first["problem"])
        options = f"--name {name}"
        if name == "mixtures":
            options += f" --dimensions {first['dimension']}"
        if name in ("images", "features"):
            options += " --root DIR"
        command = f"python -m training.experiments {options} --counts {first['count']} --seeds {seeds(group)}"
        parts += ["", *_table(title, group), "", *_hypotheses(group), "", f"`{command} --out docs/evidence/{name}`"]
    return parts


def _table(title: str, group: Sequence[dict[str, Any]]) -> list[str]:
    bayes = estimate([cell["entries"]["problem"]["bayes_accuracy"] for cell in group])
    entropy = estimate([cell["entries"]["problem"]["entropy"] for cell in group])

    def row(label: str, measures: Sequence[dict[str, float]]) -> str:
        return f"| {label} | {columns(measures)} |"

    lines = [
        f"### {title}, {len(group)} seed{'s' if len(group) > 1 else ''}",
        "",
        f"Bayes accuracy {shown(bayes, 1)} %, entropy of p_d {shown(entropy, 3)} nats.",
        "",
        f"| objective | {HEADER} |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    surrogates = present(group, SURROGATES)
    lines += [
        row(label(name), [of_surrogate(cell, name, "last") for cell in group])
        for name in (*surrogates, *present(group, mixtures.MOVED))
    ]
    lines += [
        row(label(f"direct:kl {name}"), [of_direct(cell, name) for cell in group]) for name in estimators_of(group)
    ]
    if len(present(group, CROSS_FITTED, "student direct:kl {}")) > 1:
        lines.append(
            row("**direct, chosen by evidence**", [of_direct(cell, chosen_by_evidence(cell)) for cell in group])
        )
    lines.append(row(label("direct:kl oracle"), [of_direct(cell, "oracle") for cell in group]))
    return [
        *lines,
        "",
        "<details><summary>The surrogates with weights picked by the oracle</summary>",
        "",
        *lines[4:6],
        *(row(label(name), [of_surrogate(cell, name, "best") for cell in group]) for name in surrogates),
        "",
        "</details>",
    ]


def _hypotheses(group: Sequence[dict[str, Any]]) -> list[str]:
    def oracle(cell: dict[str, Any]) -> dict[str, float]:
        return of_direct(cell, "oracle")

    def learned(cell: dict[str, Any]) -> dict[str, float]:
        return of_direct(cell, chosen_by_evidence(cell))

    surrogates = present(group, SURROGATES)
    published = [name for name in surrogates if " " not in name]
    chosen = ", ".join(sorted({FAMILIES[chosen_by_evidence(cell)][0] for cell in group}))
    fitted = present(group, CROSS_FITTED, "student direct:kl {}")
    how = f"chosen by evidence alone ({chosen})" if len(fitted) > 1 else f"the {chosen}, the only one fitted here"
    verdicts = {
        "oracle": judged(failures(group, oracle, surrogates, ahead=tuple(TITLES)), len(group), counted=True),
        "learned": judged(failures(group, learned, surrogates), len(group), counted=True),
        "published": judged(failures(group, learned, published), len(group), counted=True),
    }
    lines = [
        "- H1, with p_d itself direct SCORE is ahead of every surrogate in all four measures, each picked as suits it "
        f"best, beyond the intervals: {verdicts['oracle']}; its differences from the best surrogate in each measure:",
        *against_all(group, oracle),
        dominated(group, oracle),
        f"- H3, with a learned posterior, {how}, it is ahead of every surrogate in KL "
        "and R_SCORE and not clearly behind in the accuracies: "
        f"{verdicts['learned']} against all, {verdicts['published']} against the surrogates as published, which use no "
        "posterior; "
        "the differences:",
        *against_all(group, learned),
        dominated(group, learned),
    ]
    if len(present(group, ("score", "score_last"), "posterior {}")) == 2:
        kl = {name: [_kl_in_ball(cell, name) for cell in group] for name in ("score", "score_last")}
        worse = estimate([b - a for a, b in zip(kl["score"], kl["score_last"], strict=True)])
        lines.append(
            "- H5, a score network that trains to its last step is a worse posterior than one that stops by held-out "
            "loss. The first trains on all points, those that choose its σ included. Difference of the KL of the "
            f"posteriors in the ball {shown(worse, 4)}: "
            f"{verdict(worse.low is not None and worse.low > 0, len(group))}."
        )
    return lines


def section_law(cells: Sequence[dict[str, Any]], swept: Sequence[dict[str, Any]], path: Path) -> str:
    """What a posterior must be: the student's KL and R_SCORE against the KL of its posterior."""
    # A mixture of the sweep may be one of the others, too; up to rounding the students are the same, and count once.
    points = list(
        {
            (cell["problem"].replace("sweep", "mixture"), cell["dimension"], cell["count"], cell["seed"], name): (
                _kl_in_ball(cell, name),
                of_direct(cell, name),
                name,
            )
            for cell in (*cells, *swept)
            for name in estimators_of([cell])
        }.values()
    )
    x = np.array([point[0] for point in points])
    figure = _scatter(points)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    lines, laws = [], {}
    for measure in ("kl", "r_score"):
        y = np.array([point[1][measure] for point in points])
        slope, offset = laws[measure] = np.polyfit(np.log(x), np.log(y), 1)
        rank = float(spearmanr(x, y).statistic)
        factor = float(np.exp(np.quantile(np.abs(np.log(y) - offset - slope * np.log(x)), 0.95)))
        title = "KL" if measure == "kl" else "R_SCORE"
        within = [_rank_within(cell, measure) for cell in cells if len(estimators_of([cell])) >= MANY]
        lines.append(
            f"- {title} of the student ≈ {np.exp(offset):.2f} · (KL of the posterior)^{slope:.2f}, which 95 % of the "
            f"runs meet within a factor of {factor:.1f}; Spearman's correlation {rank:.2f} over {len(x)} runs"
            + (f", and {min(within):.2f} to {max(within):.2f} among the posteriors of one problem." if within else ".")
        )
    needed = []
    slope, offset = laws["r_score"]
    for title, group in groups(cells).items():
        rivals = [
            np.mean([of_rival(rival, cell)["r_score"] for cell in group])
            for rival in rivals_of(present(group, SURROGATES))
        ]
        needed.append(
            f"- {title}: the best surrogate has R_SCORE {min(rivals):.3f}, which the line "
            f"reaches at a posterior of KL {float(np.exp((np.log(min(rivals)) - offset) / slope)):.3f}. With p_d "
            f"itself, which the line leaves out, direct SCORE has "
            f"{np.mean([of_direct(cell, 'oracle')['r_score'] for cell in group]):.3f}."
        )
    return "\n".join(
        [
            "## What a posterior must be",
            "",
            "H2: the student's KL follows that of its posterior. There is one point for each run; the KL of the "
            "posterior is taken at random points of the ball. A network and its training have a limit of their own, "
            "which the student of p_d itself shows: where a posterior is closer to p_d than that, its student is above "
            "the line.",
            "",
            "![KL and R_SCORE of the student against the KL of its posterior](figures/direct-law.png)",
            "",
            *lines,
            "",
            *needed,
        ]
    )


def _rank_within(cell: dict[str, Any], measure: str) -> float:
    """Spearman's correlation over the estimators of one problem: problems that differ in difficulty raise no rank."""
    names = estimators_of([cell])
    students = [of_direct(cell, name)[measure] for name in names]
    return float(spearmanr([_kl_in_ball(cell, name) for name in names], students).statistic)


def _scatter(points: Sequence[tuple[float, dict[str, float], str]]) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, measure, title in zip(axes, ("kl", "r_score"), ("KL", "R_SCORE"), strict=True):
        for name in ESTIMATORS:
            label, colour, marker = FAMILIES[name]
            own = [(x, student[measure]) for x, student, of in points if of == name]
            if not own:
                continue
            axis.scatter(*zip(*own, strict=True), s=18, color=colour, marker=marker, label=label, linewidths=0.8)
        axis.set(xscale="log", yscale="log", xlabel="KL of the posterior, nats", ylabel=f"{title} of the student, nats")
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[1].set_yticks(R_SCORE_TICKS, [f"{tick:g}" for tick in R_SCORE_TICKS])
    low, high = axes[0].get_xlim()
    axes[0].plot([low, high], [low, high], color="#b8b8b8", lw=1, zorder=0)
    axes[0].set_xlim(low, high)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def section_ablation(cells: Sequence[dict[str, Any]]) -> str:
    """H4: A, B, C, D with each posterior."""
    titles = {
        "A": "A, target at x",
        "B": "B, target at x', model gradient alone",
        "C": "C, B and the data gradient",
        "D": "D, C with noise of the same norm instead",
    }
    lines = [
        "## Which part of the objective does it",
        "",
        "The same posterior, four objectives. A: the target stays at x. B: the target follows x'. C, direct SCORE: the "
        "search for x' also follows the data gradient. D: noise takes the place of the data gradient. The table has "
        "R_SCORE, and paired differences. A is PGD-AT with the posterior at x in the place of labels: with p_d itself "
        "it shows what a surrogate gains from knowing p_d.",
    ]
    for title, group in groups(cells).items():
        lines += [
            "",
            f"### {title}",
            "",
            f"| posterior | {' | '.join(titles.values())} | A − B | B − C | D − C |",
            "| --- |" + " --- |" * 7,
        ]
        verdicts = {}
        names = list(mixtures.ABLATED)
        for objective in mixtures.ABLATION.values():
            names = present(group, names, f"student {objective} {{}}")
        for name in names:

            def of(cell: dict[str, Any], letter: str, name: str = name) -> float:
                value: float = cell["entries"][f"student {mixtures.ABLATION[letter]} {name}"]["last"]["r_score"]
                return value

            values = [shown(estimate([of(cell, letter) for cell in group]), 3) for letter in titles]
            differences = [
                estimate([of(cell, a) - of(cell, b) for cell in group]) for a, b in (("A", "B"), ("B", "C"), ("D", "C"))
            ]
            cells_of_row = [*values, *(shown(difference, 3) for difference in differences)]
            lines.append(f"| {FAMILIES[name][0]} | {' | '.join(cells_of_row)} |")
            verdicts[name] = all(difference.low is not None and difference.low > 0 for difference in differences)
        answers = [f"with {FAMILIES[name][0]} {verdict(holds, len(group))}" for name, holds in verdicts.items()]
        lines += ["", f"H4, all three differences are positive beyond their intervals: {'; '.join(answers)}."]
    return "\n".join(lines)


def section_cost(*experiments: Sequence[dict[str, Any]]) -> str:
    seconds = sum(entry["seconds"] for cells in experiments for cell in cells for entry in cell["entries"].values())
    total = (
        f"All of this took {seconds / 3600:.1f} hours of processes with one thread each, by the clock, on CPU cores "
        "that other programs used as well; on idle ones it takes less."
    )
    return f"## Cost\n\n{total}{_longer(experiments)}"


def _longer(experiments: Sequence[Sequence[dict[str, Any]]]) -> str:
    """How much longer than PGD-AT direct SCORE takes for as many steps, where both were timed."""
    direct, other = "student direct:kl energy_ensemble", "student pgd_at:kl"
    entries = [cell["entries"] for cells in experiments for cell in cells]
    # The real digits are attacked for longer than they are trained on.
    timed = [one for one in entries if other in one and "last" in one.get(direct, ())]
    ratios = [one[direct]["seconds"] / one[other]["seconds"] for one in timed]
    if not ratios:
        return ""
    return (
        f" A student of direct SCORE with four joint energies took {np.median(ratios):.0f} times as long as one of "
        f"PGD-AT (the median over {len(ratios)} runs), the training of the energies not included. Measuring is "
        "included, which for PGD-AT means eight checkpoints besides the last: for training alone it is more."
    )


if __name__ == "__main__":
    sys.exit(run_program(main))
