"""The section of docs/direct-score.md about real digits."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
from scipy.stats import t as student

from training.experiments import real_digits
from training.experiments.problems import REAL_FOLDS
from training.experiments.real_digits import DIRECT, EPS, RADII, SURROGATES
from training.experiments.tables import FAMILIES, commands, label, shown, signed, verdict
from training.measures.seeds import Estimate, estimate
from training.reports.plots import FAINT, plt

FIGURE = "direct-real-digits.png"
COLUMNS = {
    "clean": "clean, %",
    "autoattack": f"AutoAttack {EPS:g}, %",
    "pgd": f"PGD {EPS:g}, %",
    **{f"pgd_{eps:g}": f"PGD {eps:g}, %" for eps in RADII},
    "nll": "−log p, nats",
    "nll_attacked": "the same under PGD",
}
# Of attacks that need no gradient of the model, and of calibration; results of the first seed lack them.
MORE = {
    "square": f"Square {EPS:g}, {real_digits.QUERIES:,} queries, %",
    "transfer": f"points found on another network, {EPS:g}, %",
    "ece": "calibration error, points",
    "ece_attacked": "the same under PGD",
}
FRONT = {"clean": "clean accuracy", "autoattack": "AutoAttack accuracy"}
# Standard deviation of the difference of two accuracies, in points, that counting whole images alone would give: a few
# runs may have the same difference by chance.
ROUNDING = 100 / 359 / 6**0.5
TESTED = 1 / (REAL_FOLDS - 1)  # test images for each other image
C = "direct:kl energy_ensemble"
REGULAR = "direct:kl score_regular"
TOGETHER, LARGE = (0.15, 0.2), 0.3  # radii of the training that R5 and R6 are about


def section(cells: Sequence[dict[str, Any]], figures: Path) -> str:
    """A table and R1 to R4 for each radius of the training, R5 over the two smaller ones, R6, and the front."""
    by_radius: dict[float, list[dict[str, Any]]] = defaultdict(list)
    for cell in cells:
        by_radius[cell["eps"]].append(cell)
    draw(by_radius, figures / FIGURE)
    lines = [
        "## Real digits, where only labels are known",
        "",
        f"The 1,797 of the 8×8 digits: each of five folds tests on a fifth of them; {_folds(cells)} run. Linf; "
        f"`digits_cnn`, {cells[0]['budget']['steps']} steps of {cells[0]['budget']['batch_size']}, training attack of "
        f"{cells[0]['budget']['attack_steps']} steps. Every training keeps the weights with the highest robust "
        "accuracy on 240 validation images. “Drawn” means that half of every batch was drawn from a score network, "
        "which was trained on three quarters of the same images; the others chose its weights. AutoAttack is the "
        "standard version, on every test image. Mean ± half the 95 % interval over folds. The seeds of a fold share "
        "all their images, so their mean counts once. Folds share most of their training images, so the variance is "
        "corrected as in Nadeau and Bengio (Inference for the generalization error, 2003).",
    ]
    for radius, group in sorted(by_radius.items()):
        lines += ["", f"### Trained at eps {radius:g}, {runs(len(group))} of each", "", *table(group)]
        lines += ["", *hypotheses(group)]
        lines += masking([cell for cell in group if "square" in cell["entries"][f"student {C}"]])
    return "\n".join(
        [
            *lines,
            *over_radii(by_radius),
            "",
            f"![Clean accuracy against AutoAttack accuracy](figures/{FIGURE})",
            "",
            "Standard training and the ablations are not in the picture.",
            "",
            *memory(cells),
            "",
            commands(cells, "real-digits", {"radii": "eps", "folds": "fold", "seeds": "seed"}),
        ]
    )


def runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"


def _folds(cells: Sequence[dict[str, Any]]) -> str:
    count = len({cell["fold"] for cell in cells})
    return "all of them are" if count == 5 else f"{count} of them {'is' if count == 1 else 'are'}"


def per_fold(group: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> list[float]:
    """Of a value its mean over the seeds of each fold: runs on the same images are no further sample of images."""
    values: dict[int, list[float]] = defaultdict(list)
    for cell in group:
        values[cell["fold"]].append(value(cell))
    return [float(np.mean(values[fold])) for fold in sorted(values)]


def folds_of(group: Sequence[Mapping[str, Any]]) -> int:
    """How many independent runs there are at most, for a verdict."""
    return len({cell["fold"] for cell in group})


def over_folds(values: Sequence[float], *, comparisons: int = 1, least: float = 0.0) -> Estimate:
    """A mean over folds with its 95 % interval, for trainings that share their data.

    Nadeau and Bengio (2003): the variance of the mean is (1/n + test/training images) s² in the place of s²/n, which
    holds for independent trainings alone.

    Args:
        values: one for each fold, see :func:`per_fold`.
        comparisons: of so many intervals all hold at once (Bonferroni).
        least: the smallest s that is believed.
    """
    plain, n = estimate(values), len(values)
    if plain.high is None:
        return plain
    s = max(stdev(values), least)
    half = float(student.ppf(1 - 0.025 / comparisons, n - 1)) * s * (1 / n + TESTED) ** 0.5
    return Estimate(plain.mean, plain.mean - half, plain.mean + half, plain.values)


def of(cell: Mapping[str, Any], form: str, measure: str) -> float:
    value: float = cell["entries"][f"student {form}"][measure]
    return value


def table(group: Sequence[dict[str, Any]], columns: Mapping[str, str] = COLUMNS) -> list[str]:
    """One row an objective."""
    lines = [f"| objective | {' | '.join(columns.values())} |", "| --- |" + " --- |" * len(columns)]
    for form in (*SURROGATES, *DIRECT, *real_digits.ABLATED):
        values = [over_folds(per_fold(group, partial(of, form=form, measure=measure))) for measure in columns]
        shows = [
            shown(value, 2 if measure.startswith("nll") else 1) for measure, value in zip(columns, values, strict=True)
        ]
        lines.append(f"| {label(form)} | {' | '.join(shows)} |")
    return lines


def difference(group: Sequence[dict[str, Any]], first: str, second: str, measure: str) -> Estimate:
    return over_folds(per_fold(group, lambda cell: of(cell, first, measure) - of(cell, second, measure)))


def front_scores(group: Sequence[dict[str, Any]], form: str) -> dict[str, list[float]]:
    """The two measures of the front, a number a fold."""
    return {measure: per_fold(group, partial(of, form=form, measure=measure)) for measure in FRONT}


def leads(
    scores: Mapping[str, Mapping[str, Sequence[float]]], rivals: Sequence[str], *, comparisons: int = 1
) -> list[tuple[str, bool]]:
    """Who is on the front beside the rivals, by what lead, and whether that is beyond the interval.

    The lead is over the rival that comes closest to dominating it, in the measure where it is largest. Beyond the
    interval it is if it is so over every rival, in one of the two measures each. Folds are paired.

    Args:
        scores: of each name its measures, a number a fold.
        rivals: those among the names that may dominate the others.
        comparisons: of so many intervals all hold at once (Bonferroni).
    """

    def lead(name: str, rival: str, measure: str) -> Estimate:
        pairs = zip(scores[name][measure], scores[rival][measure], strict=True)
        return over_folds([ours - theirs for ours, theirs in pairs], comparisons=comparisons, least=ROUNDING)

    def ahead(name: str, rival: str) -> bool:
        lows = [lead(name, rival, measure).low for measure in FRONT]
        return any(low is not None and low > 0 for low in lows)

    means = {name: {measure: float(np.mean(numbers)) for measure, numbers in by.items()} for name, by in scores.items()}
    found = []
    for name in scores:
        if name in rivals:
            continue
        over = {rival: {measure: means[name][measure] - means[rival][measure] for measure in FRONT} for rival in rivals}
        if any(max(by.values()) <= 0 and min(by.values()) < 0 for by in over.values()):
            continue
        rival = min(rivals, key=lambda other: max(over[other].values()))
        measure = max(FRONT, key=over[rival].__getitem__)
        largest = lead(name, rival, measure)
        clear = all(ahead(name, other) for other in rivals)
        doubt = "" if clear or largest.low is None else ", within the interval"
        found.append((f"{name}, by {signed(largest)} points of {FRONT[measure]}{doubt}", clear))
    return found


def best_beside_best(group: Sequence[dict[str, Any]], measure: str) -> Estimate:
    """The best direct setting of each run minus the best surrogate, as validation images choose them."""

    def best(cell: Mapping[str, Any], forms: Sequence[str]) -> float:
        return of(cell, max(forms, key=lambda form: of(cell, form, "validation")), measure)

    return over_folds(per_fold(group, lambda cell: best(cell, DIRECT) - best(cell, SURROGATES)))


def hypotheses(group: Sequence[dict[str, Any]]) -> list[str]:
    """R1 to R4, R6 where it is about this radius, and the best of each family as validation images choose it."""
    scores = {label(form): front_scores(group, form) for form in (*SURROGATES, *DIRECT)}
    found = leads(scores, rivals=[label(form) for form in SURROGATES])
    told = "; ".join(text for text, _ in found) or "each is dominated by a surrogate"
    by_means_alone = ", by the means alone" if found and not any(clear for _, clear in found) else ""
    best = {measure: best_beside_best(group, measure) for measure in ("clean", "autoattack", "nll_attacked")}
    with_drawn = [(form.replace(":drawn", ""), form) for form in (*SURROGATES, *DIRECT) if ":drawn" in form]
    drawn = [
        (plain, difference(group, form, plain, "autoattack"), difference(group, form, plain, "clean"))
        for plain, form in with_drawn
        if plain in (*SURROGATES, *DIRECT)
    ]
    a, b, d = real_digits.ABLATED
    ablation = {
        "B − A": difference(group, b, a, "autoattack"),
        "C − B": difference(group, C, b, "autoattack"),
        "C − D": difference(group, C, d, "autoattack"),
    }

    largest = max(value.mean for value in memory_ratios(group, "memory regular").values())
    regular = difference(group, REGULAR, "direct:kl score", "autoattack")

    def positive(values: Sequence[Estimate]) -> str:
        return verdict(all(value.low is not None and value.low > 0 for value in values), folds_of(group))

    return [
        f"- R1, by the means of clean and AutoAttack accuracy some direct setting is not dominated by a surrogate: "
        f"{verdict(bool(found), folds_of(group))}{by_means_alone}: {told}.",
        "- The best direct setting of each run beside the best surrogate, both chosen by robust accuracy on validation "
        f"images: clean {signed(best['clean'])}, AutoAttack {signed(best['autoattack'])} points, −log p under PGD "
        f"{signed(best['nll_attacked'], 2)} nats.",
        "- R2, drawn samples raise the accuracy under AutoAttack: "
        f"{'; '.join(f'{label(plain)} {signed(value)}' for plain, value, _ in drawn)}: "
        f"{positive([value for _, value, _ in drawn])} for all of them together. On clean images: "
        f"{'; '.join(f'{label(plain)} {signed(clean)}' for plain, _, clean in drawn)}. In trainings of 3,600 steps "
        "with 20,000 samples [PGD-AT KL and TRADES KL gain](results.md#digits-with-generated-data), on one split of "
        "the images.",
        "- R3, the ablation with the ensemble of joint energies, accuracy under AutoAttack: "
        f"{'; '.join(f'{name} {signed(value)}' for name, value in ablation.items())}: "
        f"{positive(list(ablation.values()))}.",
        "- R4, with augmented images and dropout the held-out denoising loss of the score network is within 10 % of "
        f"that on training images at every σ: the largest mean ratio is {largest:.2f}: "
        f"{verdict(largest <= 1.1, folds_of(group))}; and direct SCORE with it is more robust than with the plain "
        f"one: AutoAttack {signed(regular)}, clean "
        f"{signed(difference(group, REGULAR, 'direct:kl score', 'clean'))}: {positive([regular])}. This hypothesis was "
        "added after the others had been seen, and its settings were chosen on held-out images of fold 0, which other "
        "folds test on.",
        *larger_ball(group, best["clean"]),
    ]


def larger_ball(group: Sequence[dict[str, Any]], clean: Estimate) -> list[str]:
    """R6, by the difference in clean accuracy between the best direct setting and the best surrogate."""
    if group[0]["eps"] != LARGE:
        return []
    return [
        "- R6, within so large a ball the best direct setting of each run keeps more clean accuracy than the best "
        f"surrogate, beyond the interval: {signed(clean)}: "
        f"{verdict(clean.low is not None and clean.low > 0, folds_of(group))}. This hypothesis was written down after "
        "the results at 0.15 and 0.2 and before those at 0.3."
    ]


def over_radii(by_radius: Mapping[float, Sequence[dict[str, Any]]]) -> list[str]:
    """R5, on the folds and seeds that were run at both radii that it is about."""
    if not set(TOGETHER) <= set(by_radius):
        return []
    known = {radius: {(cell["fold"], cell["seed"]): cell for cell in by_radius[radius]} for radius in TOGETHER}
    shared = sorted(set.intersection(*(set(cells) for cells in known.values())))
    if not shared:
        return []

    def trained(form: str, radius: float) -> str:
        return f"{label(form)}, eps {radius:g}"

    scores = {
        trained(form, radius): front_scores([cells[run] for run in shared], form)
        for radius, cells in known.items()
        for form in (*SURROGATES, *DIRECT)
    }
    rivals = [trained(form, radius) for radius in known for form in SURROGATES]
    settings = len(scores) - len(rivals)
    found = leads(scores, rivals, comparisons=settings * len(FRONT))
    told = "; ".join(text for text, _ in found) or "each is dominated by a surrogate"
    return [
        "",
        f"### Trained at eps {' and '.join(f'{radius:g}' for radius in TOGETHER)}, together",
        "",
        f"Of each objective and radius the {runs(len(shared))} that have the same fold and seed at both radii:",
        "",
        "- R5, on the front of all objectives and radii some direct setting is not dominated by a surrogate, beyond "
        f"the interval: {verdict(any(clear for _, clear in found), len({fold for fold, _ in shared}))}: {told}. Its "
        f"intervals hold for all {settings} direct settings and both measures at once. This hypothesis was written "
        "down after the results at 0.15 and before those at 0.2.",
    ]


def masking(group: Sequence[dict[str, Any]]) -> list[str]:
    """Attacks without gradients beside PGD: where one of them does better, gradients are masked. And calibration."""
    if not group:
        return []
    forms = (*SURROGATES, *DIRECT, *real_digits.ABLATED)
    leads = {
        (form, name): max(of(cell, form, "pgd") - of(cell, form, name) for cell in group)
        for form in forms
        for name in ("square", "transfer")
    }
    (form, name), most = max(leads.items(), key=lambda entry: entry[1])
    by = {"square": "Square", "transfer": "points found on another network"}[name]
    told = (
        "In no run was one of the two stronger than PGD"
        if most <= 0
        else f"The most by which one of the two was stronger than PGD in a run: {most:.1f} points ({label(form)}, {by})"
    )
    return [
        "",
        "Are gradients masked? Two attacks that need none of the model's: Square alone, and the points that PGD found "
        "on a network trained with PGD-AT KL from an initialisation of its own. The calibration error is the expected "
        f"one of 15 bins. {runs(len(group))} of each. {told}.",
        "",
        "<details><summary>Attacks without gradients, and calibration</summary>",
        "",
        *table(group, {"pgd": COLUMNS["pgd"], **MORE}),
        "",
        "</details>",
    ]


def memory_ratios(cells: Sequence[dict[str, Any]], entry: str) -> dict[str, Estimate]:
    """The denoising loss on held-out images over that on training images, by σ."""

    def ratio(cell: Mapping[str, Any], sigma: str) -> float:
        value: float = cell["entries"][entry]["held_out_over_training"][sigma]
        return value

    sigmas = cells[0]["entries"][entry]["held_out_over_training"]
    return {sigma: over_folds(per_fold(cells, partial(ratio, sigma=sigma))) for sigma in sigmas}


def memory(cells: Sequence[dict[str, Any]]) -> list[str]:
    """How much of their denoising loss the score networks owe to the images that they were trained on."""
    # The score networks of a fold and seed are the same at every radius; how they are read is told of the smallest.
    cells = sorted(cells, key=lambda cell: -cell["eps"])
    cells = list({(cell["fold"], cell["seed"]): cell for cell in cells}.values())
    plain, regular = (memory_ratios(cells, entry) for entry in ("memory", "memory regular"))
    used = {
        name: sorted({f"{cell['entries'][f'posterior {name}']['settings']['sigma']:g}" for cell in cells})
        for name in ("score", "score_regular", "energy_ensemble")
    }

    def highest(cell: Mapping[str, Any], name: str) -> float:
        return float(max(cell["entries"][f"posterior {name}"]["evidence"].values()))

    evidence = {name: over_folds(per_fold(cells, partial(highest, name=name))) for name in ("score", "score_regular")}
    return [
        "The denoising loss of the score networks on held-out images, relative to that on their training images, by σ, "
        "and the highest held-out log p(y|x + noise), in nats:",
        "",
        f"| score network | {' | '.join(plain)} | held-out log p |",
        "| --- |" + " --- |" * (len(plain) + 1),
        f"| dropout 0.1 | {' | '.join(shown(v, 2) for v in plain.values())} | {shown(evidence['score'], 3)} |",
        f"| dropout 0.3, augmented images | {' | '.join(shown(v, 2) for v in regular.values())} | "
        f"{shown(evidence['score_regular'], 3)} |",
        "",
        f"Evidence chose σ = {', '.join(used['score'])} for the first, {', '.join(used['score_regular'])} for the "
        f"second and {', '.join(used['energy_ensemble'])} for the joint energies.",
    ]


def draw(by_radius: Mapping[float, Sequence[dict[str, Any]]], path: Path) -> None:
    """Clean accuracy against accuracy under AutoAttack: one point an objective, one panel a radius of the training."""
    count = len(by_radius)
    size = (6.4, 4.8) if count == 1 else (4.9 * count, 4.9)
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", sharex=True, sharey=True, squeeze=False)
    kinds = {
        "PGD-AT": ("#0072b2", "o"),
        "TRADES": ("#009e73", "s"),
        **{
            f"direct, {FAMILIES[name][0]}": (FAMILIES[name][1], marker)
            for name, marker in zip(real_digits.POSTERIORS, "v^D<", strict=True)
        },
    }
    places: list[tuple[float, float]] = []
    for axis, (radius, cells) in zip(axes[0], sorted(by_radius.items()), strict=True):
        for form in (*SURROGATES, *DIRECT):
            matching = [kind for kind in kinds if label(form).startswith(kind)]
            if not matching:
                continue
            kind = max(matching, key=len)
            colour, marker = kinds[kind]
            x, y = (over_folds(values) for values in front_scores(cells, form).values())
            spread = [0.0 if v.high is None else v.high - v.mean for v in (x, y)]
            face = colour if "drawn" in form else "none"
            places.append((x.mean, y.mean))
            axis.errorbar(x.mean, y.mean, spread[1], spread[0], color=FAINT, lw=0.8, zorder=1)
            axis.scatter(x.mean, y.mean, s=40, marker=marker, edgecolor=colour, facecolor=face, zorder=2)
            _, divergence, *words = form.partition(" ")[0].split(":")
            notes = [f"β {word}" if word.isdigit() else word for word in words if word != "drawn"]
            notes += [divergence.upper()] if divergence != "kl" else []
            place, side = ((5, 3), "left") if kind == "TRADES" and divergence == "kl" else ((-5, 3), "right")
            axis.annotate(
                " ".join(notes), (x.mean, y.mean), xytext=place, textcoords="offset points", fontsize=7, ha=side
            )
        axis.set(xlabel="clean accuracy, %")
        if count > 1:
            axis.set_title(f"trained at eps {radius:g}, {runs(len(cells))}", fontsize=10)
    first = axes[0][0]
    for along, ends in zip("xy", zip(*places, strict=True), strict=True):  # few runs have bars longer than that
        room = 0.15 * (max(ends) - min(ends))
        first.set(**{f"{along}lim": (min(ends) - room, max(ends) + room)})
    first.set(ylabel=f"accuracy under AutoAttack, Linf {EPS:g}, %")
    for kind, (colour, marker) in kinds.items():
        first.scatter([], [], s=40, marker=marker, edgecolor=colour, facecolor="white", label=kind)
    first.scatter([], [], s=40, marker="o", color="#222222", label="filled: half of every batch drawn")
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
