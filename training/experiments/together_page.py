"""The section of the page about several networks in the place of one: posteriors, and surrogates together."""

from collections.abc import Sequence
from typing import Any

from training.experiments import mixtures
from training.experiments.comparisons import HEADER, chosen_by_evidence, columns, groups, of_direct, present, rivals_of
from training.experiments.tables import FAMILIES, label, signed, verdict
from training.measures.seeds import estimate

HEAD = (f"| data | model | {HEADER} |", "| --- | --- | --- | --- | --- | --- | --- |")


def section(cells: Sequence[dict[str, Any]]) -> str:
    """How close a student is to its posterior, H7 and H8."""
    return "\n".join(
        [
            "## One network, or several together",
            "",
            "A posterior is a classifier, too, though one of several networks. KL of the student minus that of the "
            f"posterior itself, chosen by evidence, at clean points: {'; '.join(beside_posterior(cells))}.",
            *beside_ensemble(cells),
            *beside_surrogates(cells),
        ]
    )


def beside_posterior(cells: Sequence[dict[str, Any]]) -> list[str]:
    """For each problem how much further from p_d the student is than the posterior that it was trained towards."""
    lines = []
    for title, group in groups(cells).items():
        names = [chosen_by_evidence(cell) for cell in group]
        pairs = zip(group, names, strict=True)
        found = estimate(
            [of_direct(cell, name)["kl"] - cell["entries"][f"posterior {name}"]["kl"] for cell, name in pairs]
        )
        lines.append(f"{title} {signed(found, 4)}")
    return lines


def beside_ensemble(cells: Sequence[dict[str, Any]]) -> list[str]:
    """H7: the ensemble of joint energies as a classifier, beside the student that was trained towards it."""
    (name,) = mixtures.Plan().judged
    known = {title: group for title, group in groups(cells).items() if present(group, (name,), "model {}")}
    if not known:
        return []
    rows, found, told = [], [], []
    for title, group in known.items():
        itself = [cell["entries"][f"model {name}"]["last"] for cell in group]
        student = [of_direct(cell, name) for cell in group]
        rows += [f"| {title} | itself | {columns(itself)} |", f"| {title} | student | {columns(student)} |"]
        found.append(estimate([a["r_score"] - b["r_score"] for a, b in zip(student, itself, strict=True)]))
        told.append(f"{title} {signed(found[-1], 3)}")
    closer = all(value.high is not None and value.high < 0 for value in found)
    return [
        "",
        f"The {FAMILIES[name][0]} itself, attacked like any model, and its student of direct SCORE:",
        "",
        *HEAD,
        *rows,
        "",
        f"- H7, the student has the lower R_SCORE, although it is one network: {'; '.join(told)}: "
        f"{verdict(closer, min(map(len, known.values())))}. This hypothesis was added after the others had been seen.",
    ]


def beside_surrogates(cells: Sequence[dict[str, Any]]) -> list[str]:
    """H8: several networks of a surrogate together, beside the one of direct SCORE."""
    forms = mixtures.Plan().together
    every = list(forms)
    known = {title: group for title, group in groups(cells).items() if present(group, forms, "together {}") == every}
    if not known:
        return []
    rows, told, failed, of_all = [], [], 0, 0
    for title, group in known.items():
        direct = [of_direct(cell, chosen_by_evidence(cell)) for cell in group]
        rivals = {
            (form, weights): [cell["entries"][f"together {form}"][weights] for cell in group]
            for form, weights in rivals_of(every)
        }
        differences = {
            rival: estimate([a["r_score"] - b["r_score"] for a, b in zip(direct, measured, strict=True)])
            for rival, measured in rivals.items()
        }
        rows += [
            f"| {title} | {mixtures.MEMBERS} × {label(form)} | {columns(rivals[form, 'last'])} |" for form in forms
        ]
        rows.append(f"| {title} | **direct, chosen by evidence** | {columns(direct)} |")
        form, weights = max(differences, key=lambda rival: differences[rival].mean)  # the closest to direct SCORE
        picked = ", picked by the oracle" if weights == "best" else ""
        told.append(f"{title} {signed(differences[form, weights], 3)} ({label(form)}{picked})")
        failed += sum(value.high is None or value.high >= 0 for value in differences.values())
        of_all += len(differences)
    doubt = f" against {failed} of {of_all}" if failed else ""
    return [
        "",
        f"Direct SCORE needs several networks for its posterior. What do as many networks of a surrogate reach, if the "
        f"mean of their probabilities is the classifier? {mixtures.MEMBERS} of each that differ in initialisation and "
        "batches, each trained on all points, with their last weights:",
        "",
        *HEAD,
        *rows,
        "",
        "- H8, direct SCORE, chosen by evidence, has a lower R_SCORE than the networks of any surrogate together; its "
        f"difference from the best of them, last weights or picked: {'; '.join(told)}: "
        f"{verdict(not failed, min(map(len, known.values())))}{doubt}. This hypothesis was added after the others had "
        "been seen.",
    ]
