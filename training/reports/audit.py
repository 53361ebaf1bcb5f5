"""Whether a trained posterior is worth following: ``python -m training.score --audit``.

Searches the ways to read the trained networks by held-out likelihood: every noise level, and of a score network every
anchor and its classifier alone. Audits the best, and says in words what was found: audit.json, audit.html, and
chosen.toml with the settings and their evidence.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import numpy as np
import tomli_w
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Generator, Tensor
from tqdm import tqdm

from scorematch import ThreatModel, audit
from scorematch.posteriors import KernelDensity, NoiseConditionalClassifier, Posterior, ScoreNetwork
from scorematch.posteriors.base import PointwisePosterior
from training.data import Data, npy
from training.engine import checkpoint, posteriors, scores
from training.engine.posteriors import Part
from training.reports import pages, plots
from training.settings import config, tables, unused
from training.settings.errors import InputError
from training.settings.posterior import PosteriorSettings

POINTS = 500  # held-out points of the audit
ATTACKED = 200  # of them under an attack on each candidate
DENSITY_POINTS = 5000  # training points under a kernel density
GAP = 1.1  # held-out loss over that on training data; above it a network counts as memorising
CALIBRATED = 0.05  # largest expected calibration error that counts as small; so does one that chance explains
READINGS = {
    "classifier": "score network from classifier",
    "kernel_density": "score network from kernel density",
    "alone": "classifier alone",
    "noise_conditional_classifier": "classifier",
    "joint_energies": "joint energies",
}
ANCHORS = ("classifier", "kernel_density")  # the readings of a score network, by what it is anchored at
CLOSED = 0.1  # nats that a closed path may gain, as a share of what log p changes along it


class Candidate(NamedTuple):
    """Settings at which the trained networks can be read."""

    sigma: float
    reading: str  # a key of READINGS; "alone" is the classifier of a score network without the score network

    @property
    def title(self) -> str:
        return f"σ {self.sigma:g}, {READINGS[self.reading]}"

    @property
    def settings(self) -> dict[str, Any]:
        """Options of training.run that read networks so which are there."""
        if self.reading in ANCHORS:
            changes = {"sigma": self.sigma, "anchor": self.reading}
            return {"posterior": "score_network", "posterior_settings": changes}
        name = "noise_conditional_classifier" if self.reading == "alone" else self.reading
        return {"posterior": name, "posterior_settings": {"sigma": self.sigma}}


def options_of(candidate: Candidate, settings: PosteriorSettings, data: Data) -> dict[str, Any]:
    """Options of training.run that train such networks anew and read them so.

    Args:
        candidate: the reading.
        settings: those that the networks were trained with; what is not usual for the data is among the options.
        data: of the networks.
    """
    reading = candidate.settings
    name, changes = reading["posterior"], reading["posterior_settings"]
    fitted = dataclasses.replace(settings, name=name, **changes)
    usual = tables.plain(config.resolved_posterior(PosteriorSettings(name), data.name, data.format))
    trained = {
        key: value
        for key, value in tables.plain(fitted).items()
        if value != usual.get(key) and unused.posterior_reads(fitted, key)
    }
    return {"posterior": name, "posterior_settings": {**trained, **changes}}


def reach(threat_model: ThreatModel, features: int) -> float:
    """Noise as long as the longest attack: its L2 norm is eps for L2 and L1, a corner's eps √features for Linf."""
    return threat_model.eps if threat_model.norm == "linf" else threat_model.eps / math.sqrt(features)


def write(
    posterior: Posterior,
    settings: PosteriorSettings,
    data: Data,
    threat_model: ThreatModel,
    *,
    seed: int,
    out: Path,
    people: Tensor | None = None,
) -> tuple[Candidate, str]:
    """Search, audit and write the files; returns what was chosen, and findings and verdict, a line each.

    Args:
        posterior: a score network, a classifier, or the mean of several of them.
        settings: those that it was trained with.
        data: its validation part judges.
        threat_model: of the attack that the posterior is to guide.
        seed: of noise and attacks.
        out: folder of the files.
        people: [N, L] label distributions of the test points.
    """
    few = data.few(POINTS, len(data.x_validation))
    x, y = data.x_validation[few], data.y_validation[few]
    noise = reach(threat_model, x[0].numel())
    parts = list(posteriors.divided(settings, data, x.device))
    build = _builder(posterior, settings, data, parts, seed)
    levels = scores.levels(data.format.width)
    evidence = search(build, candidates(posterior, settings.name, levels), data, x, y, noise, threat_model, seed)
    best = max(evidence, key=lambda candidate: evidence[candidate]["moved"])
    chosen = build(best)
    found = {
        "threat_model": {"norm": threat_model.norm, "eps": threat_model.eps},
        "points": len(x),
        "noise": noise,
        "evidence": [{**candidate._asdict(), **values} for candidate, values in evidence.items()],
        "chosen": best._asdict(),
        **losses(chosen, best.sigma, data, parts, x, y, seed),
        **measured(chosen, data, x, y, threat_model, noise, seed),
    }
    if people is not None:
        few = data.few(POINTS, len(data.x_test))
        log_p = chosen.trace(data.x_test[few], data.y_test[few]).log_p
        found["people"] = audit.agreement(log_p.cpu(), people[few.cpu()])._asdict()
    findings = judged(found)
    found["findings"] = [finding._asdict() for finding in findings]
    found["verdict"] = verdict(findings)
    checkpoint.write_json(out / "audit.json", found)
    checkpoint.write_atomically(out / "chosen.toml", recipe(options_of(best, settings, data), evidence))
    checkpoint.write_atomically(out / "audit.html", page(found, findings, data.name, levels))
    return best, "\n".join([*(f"{finding.mark} {finding.text}" for finding in findings), found["verdict"]])


def recipe(options: dict[str, Any], evidence: dict[Candidate, dict[str, float]]) -> str:
    """chosen.toml: a recipe of training.run that trains what was chosen, with the evidence for it as comments."""
    ranked = sorted(evidence, key=lambda candidate: -evidence[candidate]["moved"])
    lines = [f"#   {evidence[candidate]['moved']:.4f}  {candidate.title}" for candidate in ranked]
    told = "# Chosen by the mean log p(y|x + noise) of held-out points, in nats:"
    return "\n".join([told, *lines, tomli_w.dumps(options)])


def candidates(posterior: Posterior, name: str, levels: tuple[float, ...]) -> list[Candidate]:
    """Every noise level, and of a score network with every anchor that is not given the label of the point."""
    readings = [name]
    own = posteriors.members_of(posterior)[0]
    if isinstance(own, ScoreNetwork):
        readings = ["kernel_density"]
        if isinstance(own.anchor, NoiseConditionalClassifier):
            readings = [*ANCHORS, "alone"]
    sigmas = sorted({*levels, own.sigma})
    return [Candidate(sigma, reading) for reading, sigma in itertools.product(readings, sigmas)]


def _builder(
    posterior: Posterior, settings: PosteriorSettings, data: Data, parts: Sequence[Part], seed: int
) -> Callable[[Candidate], Posterior]:
    device = data.x_train.device
    members = posteriors.members_of(posterior)

    def some(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        keep = posteriors.subset(y, DENSITY_POINTS, seed)
        return x[keep], y[keep]

    densities = [some(x, y) for x, y, _ in parts]

    def classifier(member: Posterior, part: Part, sigma: float) -> NoiseConditionalClassifier:
        fitted = member.anchor if isinstance(member, ScoreNetwork) else member
        assert isinstance(fitted, NoiseConditionalClassifier)
        return posteriors.classifier_at(
            fitted.network, sigma, data.num_classes, part[2], temperature=settings.temperature
        )

    def build(candidate: Candidate) -> Posterior:
        sigma, read = candidate.sigma, list[Posterior]()
        for member, part, points in zip(members, parts, densities, strict=True):
            if candidate.reading not in ANCHORS:
                read.append(classifier(member, part, sigma))
                continue
            anchor: PointwisePosterior = (
                classifier(member, part, sigma)
                if candidate.reading == "classifier"
                else KernelDensity(*points, num_classes=data.num_classes, sigma=sigma)
            )
            read.append(posteriors.score_network_at(member.denoiser, sigma, anchor, settings))
        return posteriors.mean_of(read).to(device)

    return build


def search(
    build: Callable[[Candidate], Posterior],
    tried: list[Candidate],
    data: Data,
    x: Tensor,
    y: Tensor,
    noise: float,
    threat_model: ThreatModel,
    seed: int,
) -> dict[Candidate, dict[str, float]]:
    """Mean held-out log p(y|x') in nats: at clean x, after noise as long as the attack, and at the worst x' found."""
    evidence, few = {}, data.few(ATTACKED, len(x))
    for candidate in tqdm(tried, desc="audit", unit="reading", leave=False):
        posterior = build(candidate)
        moved = audit.log_likelihood(posterior, x, y, noise=noise, repeats=2, seed=seed)
        clean = audit.log_likelihood(posterior, x, y, noise=0.0, repeats=1, seed=seed)
        generator = Generator(x.device).manual_seed(seed)
        attacked = audit.attacked_log_likelihood(posterior, x[few], y[few], threat_model, steps=10, generator=generator)
        values = {"clean": clean, "moved": moved, "attacked": attacked}
        evidence[candidate] = {name: value.mean().item() for name, value in values.items()}
    return evidence


def losses(
    posterior: Posterior, sigma: float, data: Data, parts: Sequence[Part], x: Tensor, y: Tensor, seed: int
) -> dict[str, Any]:
    """The loss of its networks by noise level, on points that they have learned from and on held-out ones."""
    members = posteriors.members_of(posterior)
    levels = tuple(sorted({*scores.levels(data.format.width), sigma}))
    few = [data.few(len(x), len(points)) for points, _, _ in parts]
    splits = {
        "train": [(points[index], labels[index]) for (points, labels, _), index in zip(parts, few, strict=True)],
        "held_out": [(x, y)] * len(members),
    }
    means = {
        name: posteriors.mean_losses(posterior, points, levels, seed=seed, repeats=2) for name, points in splits.items()
    }
    rows = [{"sigma": level, **{name: values[level] for name, values in means.items()}} for level in levels]
    kind = "denoising loss" if isinstance(members[0], ScoreNetwork) else "cross-entropy"
    return {"loss": kind, "members": len(members), "losses": rows}


def measured(
    posterior: Posterior,
    data: Data,
    x: Tensor,
    y: Tensor,
    threat_model: ThreatModel,
    noise: float,
    seed: int,
) -> dict[str, Any]:
    """The audits of the chosen posterior."""
    side = noise * math.sqrt(x[0].numel())
    gained = None  # along a line there is no closed path
    if x[0].numel() > 1:
        gained = audit.closed_loop(posterior, x, y, length=side, seed=seed).mean().item()
    trace = posterior.trace(x, y)
    before = trace.log_p
    direction = torch.empty_like(x).normal_(generator=Generator(x.device).manual_seed(seed)).flatten(1)
    step = side * direction / direction.norm(dim=1, keepdim=True)
    trace.move(x + step.reshape(x.shape))
    changed = (trace.log_p - before).abs().amax(1)
    generator = Generator(x.device).manual_seed(seed)
    clean, robust = audit.robust_accuracy(posterior, x, y, threat_model, steps=20, generator=generator)
    frequencies = torch.bincount(data.y_train, minlength=data.num_classes).double() / len(data.y_train)
    return {
        "calibration": audit.calibration(posterior, x, y, noise=noise, seed=seed)._asdict(),
        "closed_loop": gained,
        "change_along_side": changed.mean().item(),
        "posterior_clean_acc": 100 * clean,
        "posterior_robust_acc": 100 * robust,
        "guess": (frequencies * frequencies.clamp(min=1e-12).log()).sum().item(),
    }


class Finding(NamedTuple):
    """One thing that the audit found."""

    good: bool
    text: str

    @property
    def mark(self) -> str:
        return "good:" if self.good else "note:"


def judged(found: dict[str, Any]) -> list[Finding]:
    """What the numbers say: findings of one sentence each."""
    chosen = found["chosen"]
    row = next(row for row in found["losses"] if row["sigma"] == chosen["sigma"])
    ratio = row["held_out"] / row["train"]
    value = next(e for e in found["evidence"] if (e["sigma"], e["reading"]) == (chosen["sigma"], chosen["reading"]))
    calibration = found["calibration"]
    error, by_chance, explained = calibration["error"], 0.0, ""
    if "chance_high" in calibration:  # earlier versions did not measure it
        by_chance = calibration["chance_high"]
        explained = (
            f"; labels drawn from its own probabilities give {100 * calibration['chance']:.1f} on average, "
            f"and more than {100 * by_chance:.1f} in one of 20 draws"
        )
    networks = ("the network does not memorise", "the network memorises")
    if found["members"] > 1:
        networks = ("the networks do not memorise", "the networks memorise")
    edge = chosen["sigma"] in (found["losses"][0]["sigma"], found["losses"][-1]["sigma"])
    findings = [
        Finding(
            ratio <= GAP,
            f"at σ {chosen['sigma']:g} the {found['loss']} on held-out data is {abs(100 * (ratio - 1)):.0f} % "
            f"{'above' if ratio > 1 else 'below'} that on training data: "
            f"{networks[ratio > GAP]}",
        ),
        Finding(
            value["moved"] > found["guess"],
            f"held-out points moved by noise as long as the attack: their labels get {value['moved']:.3f} nats on "
            f"average; guessing by the frequency of the classes gets {found['guess']:.3f}",
        ),
        Finding(
            error <= max(CALIBRATED, by_chance),
            f"at these points its expected calibration error is {100 * error:.1f} percentage points{explained}",
        ),
        Finding(
            not edge,
            f"the best noise level, σ {chosen['sigma']:g}, lies "
            + ("at the end of those tried" if edge else "between others that are worse"),
        ),
        Finding(
            found["posterior_robust_acc"] > 0.5 * found["posterior_clean_acc"],
            f"as a classifier of its own it is right on {found['posterior_clean_acc']:.1f} % and, under an attack on "
            f"itself, on {found['posterior_robust_acc']:.1f} %: a model that follows it exactly would end there",
        ),
    ]
    if found["closed_loop"] is not None:
        share = found["closed_loop"] / max(found["change_along_side"], 1e-12)
        of_paths = Finding(
            share <= CLOSED,
            f"a closed path with sides as long as the attack gains {found['closed_loop']:.3f} nats, "
            f"{100 * share:.0f} % of what log p changes along one side: "
            + (
                "the scores are close to a gradient"
                if share <= CLOSED
                else "values depend on the path, more nodes help"
            ),
        )
        findings.insert(3, of_paths)
    if "people" in found:
        kl, rank = found["people"]["kl"], found["people"]["entropy_rank"]
        findings.append(
            Finding(
                rank > 0,
                f"the KL divergence between the labels that people gave to the test images and the posterior is "
                f"{kl:.3f} nats; the rank correlation of the entropies, of people and posterior, is {rank:.2f}",
            )
        )
    return findings


def verdict(findings: list[Finding]) -> str:
    bad = sum(not finding.good for finding in findings)
    if not bad:
        return "Nothing here speaks against following this posterior."
    return f"{bad} of {len(findings)} findings speak against following this posterior as it is."


def read_people(path: Path, data: Data) -> Tensor:
    """Label distributions of the test points [N, L] from a .npy file, such as cifar10h-probs.npy.

    Raises:
        InputError: it cannot be read, or does not fit the data.
    """
    try:
        values = npy.read(path)
    except InputError as error:
        raise InputError(f"human_labels: {error}") from None
    wanted = (len(data.x_test), data.num_classes)
    if values.shape != wanted or not np.issubdtype(values.dtype, np.floating):
        given = f"{values.dtype} {list(values.shape)}"
        raise InputError(f"human_labels: {path} holds {given}, allowed: probabilities {list(wanted)} of the test split")
    if (values < 0).any() or not np.allclose(values.sum(1), 1, atol=1e-3):
        raise InputError(f"human_labels: {path} has rows that are not distributions, allowed: sums of 1")
    return torch.from_numpy(values.copy())


def page(found: dict[str, Any], findings: list[Finding], data: str, levels: tuple[float, ...]) -> str:
    """audit.html, with everything inside it."""
    rows = [["settings", "log p(y|x), nats", "log p(y|x + noise), nats", "under an attack on itself, nats"]]
    rows += [
        [Candidate(e["sigma"], e["reading"]).title, *(f"{e[name]:.3f}" for name in ("clean", "moved", "attacked"))]
        for e in sorted(found["evidence"], key=lambda e: -e["moved"])
    ]
    norm, eps = found["threat_model"]["norm"], found["threat_model"]["eps"]
    chosen = html.escape(Candidate(**found["chosen"]).title)
    items = "".join(f"<li><b>{finding.mark}</b> {html.escape(finding.text)}.</li>" for finding in findings)
    body = [
        f"<h1>Is the posterior of {html.escape(data)} worth following?</h1>",
        f"<p class='lead'>{html.escape(found['verdict'])}</p>",
        f"<ul>{items}</ul>",
        f"<p class='note'>Read at {chosen}; {found['points']} held-out points; {norm}, eps {eps:g}; "
        f"noise {found['noise']:.4g}.</p>",
        plots.as_image(plot(found, levels), "held-out likelihood and losses by noise level"),
        "<h2>Evidence</h2>",
        "<p>Every way to read the trained networks; the first was chosen, by the column with noise. The last column is "
        f"the lowest value that an attack on these settings met, on {min(found['points'], ATTACKED)} points.</p>",
        pages.table(rows),
    ]
    return pages.page(f"audit of {data}", body)


def plot(found: dict[str, Any], levels: tuple[float, ...]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    styles = zip(READINGS, ("#d55e00", "#e69f00", "#cc79a7", "#cc79a7", "#009e73"), "^Dvvo", strict=True)
    for reading, colour, marker in styles:
        own = [(e["sigma"], e["moved"]) for e in found["evidence"] if e["reading"] == reading]
        if own:
            left.plot(*zip(*own, strict=True), color=colour, marker=marker, label=READINGS[reading])
    left.axhline(found["guess"], color="#b8b8b8", lw=1, label="guessing by class frequency")
    left.set(xscale="log", xlabel="σ", ylabel="held-out log p(y|x + noise), nats")
    left.legend(frameon=False)
    sigmas = [row["sigma"] for row in found["losses"]]
    for name, colour, dashes in (("train", "#0072b2", "--"), ("held_out", "#0072b2", "-")):
        values = [row[name] for row in found["losses"]]
        right.plot(sigmas, values, dashes, color=colour, label=name.replace("_", " "))
    right.set(xscale="log", xlabel="σ", ylabel=found["loss"])
    right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xticks(levels, [f"{sigma:g}" for sigma in levels])
        axis.minorticks_off()
    return figure
