"""The training of score networks and noise-conditional classifiers: the library's bits, resumed, shared out."""

import dataclasses
import json
import re
import shlex
import signal
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import Hit, Start, status
from pairs import pair

from scorematch import ThreatModel
from scorematch.audit import attacked_log_likelihood, log_likelihood
from scorematch.augmentation import NonLeaking
from scorematch.matching import Fitting, fit_classifier, fit_denoiser, losses_by_level
from scorematch.networks import EmbeddedDenoiser
from scorematch.posteriors import NoiseConditionalClassifier, ScoreNetwork
from training import data, score
from training.data import DataSettings
from training.engine import checkpoint, claims, posteriors, scores
from training.engine.hardware import Speed
from training.reports import audit
from training.settings import config, tables
from training.settings.config import tomllib
from training.settings.errors import InputError, StopError
from training.settings.posterior import PosteriorSettings

QUICK = {"steps": 7, "batch_size": 8, "width": 16, "depth": 1}
# A network with all that draws random numbers: dropout, augmentation, noise.
OPTIONS = (
    "--data digits --limit 60 --samples 0 --threads 1 --posterior-settings.network conv --posterior-settings.width 16 "
    "--posterior-settings.depth 2 --posterior-settings.steps 26 --posterior-settings.batch-size 6 "
    "--posterior-settings.dropout 0.2 --posterior-settings.augment 0.5 --posterior-settings.anchor classifier"
)

RUN = (
    "--objective score_direct --epochs 1 --limit 60 --batch-size 30 --steps 1 --validation-steps 1 --eval-steps 1 "
    "--eval-restarts 1 --curve-points 0 --autoattack none --threads 1 --posterior-settings.steps 20 "
    "--posterior-settings.width 16"
)


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load(DataSettings("digits", limit=100))


def build(loaded: data.Data, speed: Speed | None = None, **settings: Any) -> Any:
    named = PosteriorSettings(**{"name": "score_network", "anchor": "label", **QUICK, **settings})
    with tempfile.TemporaryDirectory() as folder:
        return posteriors.build(named, loaded, seed=3, folder=Path(folder), speed=speed)


def untrained(loaded: data.Data, **settings: Any) -> posteriors._Builder:
    named = PosteriorSettings(**{"name": "score_network", "anchor": "label", **QUICK, **settings}).resolved("digits")
    held_out = loaded.x_validation, loaded.y_validation
    return posteriors._Builder(named, loaded, loaded.x_train, loaded.y_train, held_out, seed=3)


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("augment", [0.0, 0.5])
@pytest.mark.parametrize("classes", ["heads", "embedding"])
def test_the_same_bits_as_the_library(classes: str, augment: float, digits: data.Data, monkeypatch: Any) -> None:
    monkeypatch.setattr(scores, "INTERVAL", 3)
    settings = {"network": "conv", "classes": classes, "augment": augment}
    posterior = build(digits, **settings)
    builder = untrained(digits, **settings)
    denoiser = fit_denoiser(
        builder.denoiser(),
        digits.x_train,
        digits.y_train,
        builder.fit,
        generator=torch.Generator().manual_seed(3),
        augment=NonLeaking(0.5, mirrored=False) if augment else None,
    )
    assert isinstance(posterior, ScoreNetwork)
    assert isinstance(denoiser, EmbeddedDenoiser) == (classes == "embedding")
    assert same(denoiser, posterior.denoiser)
    assert not same(untrained(digits, **settings).denoiser(), denoiser)


def test_the_same_classifier_as_the_library(digits: data.Data) -> None:
    posterior = build(digits, name="noise_conditional_classifier")
    builder = untrained(digits, name="noise_conditional_classifier")
    network = builder.noise_conditional_classifier().network.requires_grad_(True)
    fit_classifier(
        network, digits.x_train, digits.y_train, builder.fit, generator=torch.Generator().manual_seed(1_000_006)
    )
    assert isinstance(posterior, NoiseConditionalClassifier)
    assert same(network, posterior.network)


def test_held_out_losses_are_logged(digits: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "INTERVAL", 3)
    settings = PosteriorSettings("score_network", anchor="classifier", **QUICK)  # type: ignore[arg-type]
    posterior = posteriors.build(settings, digits, seed=0, folder=tmp_path)
    for name in ("score-network", "classifier"):
        entries = checkpoint.read_metrics(tmp_path / name / "metrics.jsonl")
        assert [entry["epoch"] for entry in entries] == [1, 2, 3]
        assert all(f"val_loss_{sigma:g}" in entry for sigma in scores.SIGMAS for entry in entries)
    assert isinstance(posterior, ScoreNetwork)
    few = data.spread(scores.HELD_OUT, len(digits.x_validation))
    points = digits.x_validation[few], digits.y_validation[few]
    final = losses_by_level(posterior.denoiser, *points, scores.SIGMAS)
    logged = checkpoint.read_metrics(tmp_path / "score-network" / "metrics.jsonl")[-1]
    assert {sigma: logged[f"val_loss_{sigma:g}"] for sigma in scores.SIGMAS} == pytest.approx(final)


def test_weights_are_picked_by_held_out_loss(
    digits: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "INTERVAL", 3)
    kept = []

    def listed(network: torch.nn.Module, *_: Any, **__: Any) -> dict[float, float]:
        kept.append([value.clone() for value in network.parameters()])
        return {**dict.fromkeys(scores.SIGMAS, 0.0), 0.31: [3.0, 1.0, 2.0][len(kept) - 1]}

    monkeypatch.setattr(scores, "losses_by_level", listed)
    for weights, wanted in (("best", 1), ("last", 2)):
        kept.clear()
        settings = PosteriorSettings(
            "score_network",
            anchor="label",
            sigma=0.31,
            weights=weights,  # type: ignore[arg-type]
            **QUICK,  # type: ignore[arg-type]
        )
        posterior = posteriors.build(settings, digits, seed=0, folder=tmp_path / weights)
        assert isinstance(posterior, ScoreNetwork)
        ended = list(posterior.denoiser.parameters())
        equal = [all(torch.equal(a, b) for a, b in zip(ended, values, strict=True)) for values in kept]
        assert equal == [index == wanted for index in range(3)]
    # finished trainings that are called again take the same weights
    again = posteriors.build(
        PosteriorSettings("score_network", anchor="label", sigma=0.31, **QUICK),  # type: ignore[arg-type]
        digits,
        seed=0,
        folder=tmp_path / "best",
    )
    assert isinstance(again, ScoreNetwork)
    chosen = checkpoint.load(tmp_path / "best" / "score-network" / "best.pt", "cpu")["network"]
    assert all(torch.equal(value, chosen[name]) for name, value in again.denoiser.state_dict().items())


def test_a_gradient_that_is_not_finite_spoils_no_file(
    digits: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "INTERVAL", 3)
    update = Fitting.update

    def spoilt(self: Fitting) -> None:
        if self.steps == 5:
            next(self.network.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
        update(self)

    monkeypatch.setattr(Fitting, "update", spoilt)
    settings = PosteriorSettings("score_network", anchor="label", **QUICK)  # type: ignore[arg-type]
    with pytest.raises(StopError, match="the weights are not finite in epoch 2"):
        posteriors.build(settings, digits, seed=0, folder=tmp_path)
    saved = checkpoint.load(tmp_path / "score-network" / "checkpoint.pt")
    assert saved["epoch"] == 1
    assert all(value.isfinite().all() for value in saved["training"]["fitting"]["network"].values())


HITS = [
    Hit("score step", 1),
    Hit("score step", 4),
    Hit("score step", 13, signal.SIGTERM),
    Hit("score step", 3),
    Hit("score step", 5, signal.SIGTERM),
    Hit("replace", 2),
    Hit("score step", 2, signal.SIGTERM),
    Hit("score validation", 1),
    Hit("score step", 9, signal.SIGTERM),
    Hit("score step", 14),
    Hit("score step", 20, signal.SIGTERM),
    Hit("log", 1),
]


def test_killed_trainings_end_with_the_same_bits(tmp_path: Path, start: Start, log: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert status(start([*OPTIONS.split(), "--out", str(whole)], None, "score")) == 0, log.read_text()
    within, of_classifier = 0, 0
    for hit in HITS:
        begun = (out / "config.toml").exists()
        ended = status(start(["--resume", str(out)] if begun else [*OPTIONS.split(), "--out", str(out)], hit, "score"))
        assert ended == (-signal.SIGKILL if hit.number == signal.SIGKILL else 1), (hit, log.read_text())
        saved = out / "score-network" / "checkpoint.pt"
        within += saved.exists() and 0 < checkpoint.load(saved)["training"]["step"] < 26
        of_classifier += (out / "classifier" / "checkpoint.pt").exists()
    assert within >= 3
    assert of_classifier >= 1
    assert log.read_text().splitlines()[-1].startswith("stopped") or HITS[-1].number == signal.SIGKILL
    assert status(start(["--resume", str(out)], None, "score")) == 0, log.read_text()
    expected, actual = (checkpoint.load(folder / "posterior.pt") for folder in (whole, out))
    assert expected["settings"] == actual["settings"]
    for name, value in expected["network"].items():
        assert torch.equal(actual["network"][name], value), name
    results = [json.loads((folder / "score.json").read_text()) for folder in (whole, out)]
    assert results[0]["denoising_error"] == results[1]["denoising_error"]


def test_a_signal_says_how_to_go_on(tmp_path: Path, start: Start, log: Path) -> None:
    out = tmp_path / "score"
    hit = Hit("score step", 5, signal.SIGTERM)
    assert status(start([*OPTIONS.split(), "--out", str(out)], hit, "score")) == 1
    assert (
        log.read_text().splitlines()[-1] == f"stopped: SIGTERM; continue with: python -m training.score --resume {out}"
    )
    assert checkpoint.load(out / "score-network" / "checkpoint.pt")["training"]["step"] == 5


def test_runs_resume_inside_the_training_of_their_posterior(tmp_path: Path, start: Start, log: Path) -> None:
    options = RUN.split()
    whole, out = tmp_path / "whole", tmp_path / "parts"
    assert status(start([*options, "--out", str(whole)])) == 0, log.read_text()
    assert status(start([*options, "--out", str(out)], Hit("score step", 9, signal.SIGTERM))) == 1, log.read_text()
    assert f"--resume {out}" in log.read_text().splitlines()[-1]
    assert checkpoint.load(out / "score-network" / "checkpoint.pt")["training"]["step"] == 9
    assert status(start(["--resume", str(out)])) == 0, log.read_text()
    for name in ("posterior.pt", "checkpoint.pt"):
        expected, actual = (checkpoint.load(folder / name)["network"] for folder in (whole, out))
        assert all(torch.equal(value, actual[key]) for key, value in expected.items()), name


def test_two_processes_equal_one(processes: ForkServerContext, log: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*OPTIONS.split(), "--posterior-settings.dropout", "0", "--posterior-settings.batch-size", "7"]
    score.main([*options, "--out", str(one)])
    assert pair(processes, log, [[*options, "--out", str(two)]], "score").statuses() == [0, 0], log.read_text()
    assert log.read_text().count("trained in") == 1, "one process speaks"
    expected, actual = (checkpoint.load(folder / "posterior.pt")["network"] for folder in (one, two))
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
        )
    logs = [checkpoint.read_metrics(folder / "score-network" / "metrics.jsonl")[-1] for folder in (one, two)]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], abs=1e-5)


def test_a_teacher_and_the_student_that_imitates_it(digits: data.Data, tmp_path: Path) -> None:
    common = {"network": "conv", "anchor": "label", **QUICK}
    teacher = PosteriorSettings("score_network", classes="embedding", **common)  # type: ignore[arg-type]
    taught = posteriors.build(teacher, digits, seed=0, folder=tmp_path / "t")
    path = tmp_path / "posterior.pt"
    resolved = teacher.resolved("digits")
    checkpoint.save(path, epoch=0, settings=tables.plain(resolved), network=taught.state_dict())
    settings = {**common, "steps": 120, "width": 32, "lr": 1e-2, "sigma_min": 0.3, "sigma_max": 0.6}
    student = PosteriorSettings("score_network", teacher=path, **settings)  # type: ignore[arg-type]
    learned = posteriors.build(student, digits, seed=0, folder=tmp_path / "s")
    assert isinstance(learned, ScoreNetwork)
    assert isinstance(taught, ScoreNetwork)
    assert not isinstance(learned.denoiser, EmbeddedDenoiser)
    x = digits.x_test[:50]
    wanted = taught.denoiser.all_scores(x, 0.4)
    untaught = untrained(digits, **settings).denoiser().all_scores(x, 0.4)
    error, before = ((found - wanted).square().mean() for found in (learned.denoiser.all_scores(x, 0.4), untaught))
    assert error < 0.5 * before


def test_a_teacher_of_other_data_is_refused(digits: data.Data, tmp_path: Path) -> None:
    path = tmp_path / "posterior.pt"
    checkpoint.save(path, epoch=0, settings={"name": "kernel_density"}, network={})
    with pytest.raises(InputError, match="is not a teacher for this data"):
        build(digits, teacher=path)
    about = {"data": "digits", "limit": 100}
    settings = PosteriorSettings("score_network", network="conv", anchor="label", **QUICK).resolved("digits")  # type: ignore[arg-type]
    network = posteriors.build(settings, digits, seed=0, folder=tmp_path / "t").state_dict()
    student = dataclasses.replace(settings, teacher=path)

    def refused(reason: str, others: dict[str, Any], record: dict[str, Any] | None) -> None:
        values = {**tables.plain(settings), **about, **others}
        checkpoint.save(path, epoch=0, settings=values, network=network, data=record)
        with pytest.raises(InputError, match=rf"posterior_settings.teacher: .* is not a teacher .*{reason}"):
            posteriors.build(student, digits, seed=0, folder=tmp_path / "s", about=about)

    refused("is of data 'mine', expected 'digits'", {"data": "mine"}, None)
    refused("is of limit 200, expected 100", {"limit": 200}, None)
    refused("is of validation_size 9, expected None", {"validation_size": 9}, None)
    refused("other labels, or in another order", {}, {**digits.record(), "labels": "others"})


def test_bfloat16_passes_train_as_well(digits: data.Data) -> None:
    settings = {"network": "conv", "width": 32, "steps": 60, "lr": 5e-3}
    exact, fast = (build(digits, speed, **settings) for speed in (None, Speed("bfloat16")))
    assert not same(exact.denoiser, fast.denoiser)
    assert all(value.dtype == torch.float32 for value in fast.parameters())
    points = digits.x_validation, digits.y_validation
    losses = [losses_by_level(p.denoiser, *points, scores.SIGMAS) for p in (exact, fast)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_posterior_called_faster_shares_its_weights(digits: data.Data) -> None:
    posterior = build(digits, network="conv", anchor="classifier", steps=20)
    fast = posteriors.at_speed(posterior, Speed("bfloat16"))
    assert same(posterior, fast)
    assert {name for name, _ in posterior.named_parameters()} == set(posterior.state_dict()) & {
        name for name, _ in posterior.named_parameters()
    }
    x, y = digits.x_test[:20], digits.y_test[:20]
    traces = [p.trace(x, y) for p in (posterior, fast)]
    for trace in traces:
        trace.move((x + 0.1).clamp(0, 1))
    assert not torch.equal(traces[0].log_p, traces[1].log_p)
    torch.testing.assert_close(traces[0].log_p, traces[1].log_p, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "5"], "samples: 5 is out of range, allowed: 0"),
        (["--recipe", "nothing"], "recipe: 'nothing' is unknown, allowed: cifar10-edm"),
        (["--resume", "nowhere"], "resume: nowhere holds no config.toml"),
        (["--posterior-settings.augment", "2"], "augment: 2.0 is out of range, allowed: 0 to 1"),
        (["--posterior-settings.dropout", "1"], "dropout: 1.0 is out of range"),
        (["--posterior-settings.top-k", "3"], "top_k: 3 with classes 'heads', allowed: with embedding"),
        (["--data", "toy", "--posterior-settings.mirror", "True"], "mirror: True for inputs [1], allowed: on images"),
        (["--posterior-settings.network", "conv", "--posterior-settings.patch", "3"], "patch: 3 for images of 8x8"),
        (["--precision", "tf32", "--device", "cpu"], "precision: 'tf32' on cpu, allowed: auto, float32 or bfloat16"),
        (["--feature-network", "nothing.pt"], "feature_network: nothing.pt: no such file"),
        (["--posterior-settings.folds", "2"], "posterior_settings.folds: 2, allowed: 1"),
        (["--posterior", "joint_energies", "--samples", "50"], "samples: 50 with joint_energies, allowed: 0, or with"),
        (
            ["--posterior", "joint_energies", "--posterior-settings.likelihood-weight", "1"],
            "posterior_settings: likelihood_weight: 1.0 with joint_energies",
        ),
    ],
)
def test_bad_options(options: list[str], message: str, call: Any) -> None:
    ending = call("score", *options, "--out", "here")
    assert ending.status == 2
    assert message in ending.err


def test_a_resumed_training_keeps_its_settings(call: Any) -> None:
    assert call("score", *OPTIONS.split(), "--out", "here").status == 0
    ending = call("score", "--resume", "here", "--seed", "4")
    assert ending.status == 2
    assert "seed: 4 contradicts here" in ending.err
    assert "is finished already" in call("score", "--resume", "here", "--device", "cpu").out
    assert "holds a posterior already" in call("score", *OPTIONS.split(), "--out", "here").err


@pytest.mark.parametrize("kept", ["posterior.pt", "score-network", "score.json"])
def test_what_another_program_has_left_is_not_gone_on_from(kept: str, call: Any, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / kept).touch()
    ending = call("score", *OPTIONS.split(), "--out", "here")
    assert (ending.status, ending.out) == (2, "")
    assert f"out: here holds {kept} without a config.toml, allowed: another folder" in ending.err
    assert [path.name for path in (tmp_path / "here").iterdir()] == [kept]


def test_a_training_goes_on_with_its_own_settings_seed_and_data_alone(digits: data.Data, tmp_path: Path) -> None:
    named = PosteriorSettings("score_network", anchor="label", **QUICK).resolved("digits")  # type: ignore[arg-type]
    about = {**tables.plain(named), "limit": 100}

    def built(loaded: data.Data = digits, seed: int = 3, **changes: Any) -> None:
        posteriors.build(named, loaded, seed=seed, folder=tmp_path, about={**about, **changes})

    built()
    path = tmp_path / "score-network" / "checkpoint.pt"
    for given, told in (
        ({"seed": 4}, "seed 3, now 4"),
        ({"limit": 60}, "limit 100, now 60"),
        ({"smoothing": 0.2}, "smoothing 0.1, now 0.2"),
        ({"loaded": data.load(DataSettings("digits", limit=60))}, "100 samples to train, now 60"),
    ):
        with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + re.escape(told)):
            built(**given)
    saved = checkpoint.load(path)
    for name in ("seed", "data"):  # as saved before there were these
        del saved[name]
    del saved["settings"]["dropout"]
    torch.save(saved, path)
    built(seed=4)


def test_every_recipe_is_understood(call: Any, synthetic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "AUDITED", 8)  # a U-Net is slow on a CPU
    for path in score.RECIPES.glob("*.toml"):
        settings = score.parse(["--recipe", path.stem])
        resolved = settings.posterior_settings.resolved(settings.data)
        assert resolved.schedule == "constant"
        assert resolved.noise_mean == pytest.approx(PosteriorSettings.noise_mean, abs=1e-3)
    root = synthetic("cifar10")
    small = (
        "--limit 20 --samples 10 --levels 2 --judge-epochs 1 --threads 1 --posterior-settings.steps 2 "
        "--posterior-settings.batch-size 4 --posterior-settings.width 8"
    )
    ending = call("score", "--recipe", "cifar10-edm", "--data-root", root, *small.split(), "--out", "here")
    assert ending.status == 0, ending.err
    assert "10 samples (heun) are recognised" in ending.out


@pytest.mark.pictures
def test_an_audit_says_what_it_found(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "POINTS", 40)
    options = [*OPTIONS.split(), "--audit", "--out", "here"]
    ending = call("score", *options)
    assert ending.status == 0, ending
    found = json.loads(Path("here/audit.json").read_text())
    assert found["threat_model"] == {"norm": "linf", "eps": 0.15}
    evidence = {(row["sigma"], row["reading"]): row["moved"] for row in found["evidence"]}
    assert {reading for _, reading in evidence} == {"classifier", "kernel_density", "alone"}
    sigma, reading = max(evidence, key=evidence.__getitem__)
    assert not [path for path in Path("here").iterdir() if not claims.taken(path)], "all that it writes is known"
    chosen = tomllib.loads(Path("here/chosen.toml").read_text())
    name = "noise_conditional_classifier" if reading == "alone" else "score_network"
    assert (chosen["posterior"], chosen["posterior_settings"]["sigma"]) == (name, sigma)
    assert chosen["posterior_settings"].get("anchor", "alone") == reading
    PosteriorSettings(chosen["posterior"], **chosen["posterior_settings"])
    assert found["verdict"] in ending.out
    assert all(finding["text"] in ending.out for finding in found["findings"])
    page = Path("here/audit.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert found["verdict"] in page

    Path("here/audit.json").unlink()
    people = np.full((500, 10), 0.1)
    np.save("people.npy", people)
    again = call("score", "--resume", "here", "--audit", "--eps", "0.2", "--norm", "l2", "--human-labels", "people.npy")
    assert again.status == 0, again
    repeated = json.loads(Path("here/audit.json").read_text())
    assert repeated["threat_model"] == {"norm": "l2", "eps": 0.2}
    assert repeated["noise"] == pytest.approx(0.2 / 8)
    assert repeated["people"]["kl"] > 0
    assert "labels that people gave" in again.out
    ending = call("score", "--resume", "here", "--eps", "0.2")
    assert (ending.status, "eps: is for --audit" in ending.err) == (2, True)
    for wrong, told in ((people[:3], "float64 [3, 10], allowed: probabilities [500, 10]"), (2 * people, "not distrib")):
        np.save("people.npy", wrong)
        ending = call("score", "--resume", "here", "--audit", "--human-labels", "people.npy")
        assert (ending.status, told in ending.err) == (2, True), ending.err


@pytest.mark.parametrize(("name", "folds"), [("joint_energies", 3), ("noise_conditional_classifier", 1)])
def test_a_posterior_without_a_score_network_is_fitted_and_audited(
    name: str, folds: int, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "POINTS", 40)
    small = (
        f"--data digits --limit 60 --threads 1 --audit --posterior {name} --posterior-settings.folds {folds} "
        "--posterior-settings.steps 40 --posterior-settings.width 16 --posterior-settings.batch-size 30"
    )
    ending = call("score", *small.split(), "--out", "here")
    assert ending.status == 0, ending.err
    assert ("fold 3 of 3" in ending.err) == (folds == 3)
    assert not Path("here/samples.npz").exists()

    # What the file holds, read by other code than the audit's.
    loaded = data.load(DataSettings("digits", limit=60))
    path = Path("here/posterior.pt")
    settings = posteriors.settings_from(path, PosteriorSettings(name))
    state = posteriors.state_from(path, settings, loaded)
    posterior = posteriors.build(settings, loaded, seed=0, state=state)
    found = json.loads(Path("here/audit.json").read_text())
    evidence = {row["sigma"]: row for row in found["evidence"]}
    assert {row["reading"] for row in evidence.values()} == {name}
    x, y = loaded.x_validation[:40], loaded.y_validation[:40]
    moved = log_likelihood(posterior, x, y, noise=found["noise"], repeats=2, seed=0).mean().item()
    assert settings.sigma is not None
    assert evidence[settings.sigma]["moved"] == pytest.approx(moved, rel=1e-4)

    ball = ThreatModel("linf", 0.15)
    attacked = attacked_log_likelihood(posterior, x, y, ball, steps=10, generator=torch.Generator().manual_seed(0))
    assert evidence[settings.sigma]["attacked"] == pytest.approx(attacked.mean().item(), rel=1e-4)
    assert all(row["attacked"] < row["clean"] for row in evidence.values())

    # Each network on what it has learned from, and on points that none has seen.
    networks = [m.network for m in getattr(posterior, "members", [posterior])]
    fold_of = posteriors.folds_of(loaded.y_train, folds) if folds > 1 else torch.ones_like(loaded.y_train)
    learned = [
        (loaded.x_train[fold_of != k][: score.AUDITED], loaded.y_train[fold_of != k][: score.AUDITED])
        for k in range(folds)
    ]
    for row in json.loads(Path("here/score.json").read_text())["cross_entropy"]:
        sigma = row["sigma"]
        pairs = zip(networks, learned, strict=True)
        trained = [losses_by_level(network, *points, (sigma,), seed=0)[sigma] for network, points in pairs]
        points = loaded.x_validation[: score.AUDITED], loaded.y_validation[: score.AUDITED]
        unseen = [losses_by_level(network, *points, (sigma,), seed=0)[sigma] for network in networks]
        assert row["train"] == pytest.approx(sum(trained) / folds, rel=1e-4)
        assert row["validation"] == pytest.approx(sum(unseen) / folds, rel=1e-4)
    assert (found["members"], found["loss"]) == (folds, "cross-entropy")
    assert ("the networks " in ending.out) == (folds > 1)

    # What it says is to be called can be called, and chosen.toml is a recipe.
    best = max(evidence, key=lambda sigma: evidence[sigma]["moved"])
    (line,) = [line for line in ending.out.splitlines() if line.startswith("to train with them: ")]
    words = shlex.split(line)
    assert words[4:7] == ["python", "-m", "training.run"]
    recipe = ["--data", "digits", "--objective", "score_direct", "--recipe", "here/chosen.toml"]
    for options in (words[7:], recipe):
        dry = call("run", *options, "--dry-run")
        assert dry.status == 0, dry.err
        resolved = tomllib.loads(dry.out[dry.out.index("\ndata = ") :])
        assert (resolved["posterior"], resolved["posterior_settings"]["sigma"]) == (name, best)
    assert f"log p(y|x + noise) of held-out points, in nats:\n#   {evidence[best]['moved']:.4f}" in (
        Path("here/chosen.toml").read_text()
    )
    page = Path("here/audit.html").read_text()
    assert f"Read at σ {best:g}, " in page
    assert f"{evidence[best]['attacked']:.3f}" in page
    again = call("score", "--posterior-from", "here/posterior.pt", "--audit", "--out", "there")
    assert again.status == 0, again.err
    assert json.loads(Path("there/audit.json").read_text()) == found
    assert call("score", "--resume", "here").status == 0
    assert "'score_network' contradicts here" in call("score", "--resume", "here", "--posterior", "score_network").err


def test_the_posterior_of_a_run_is_audited(call: Any, synthetic: Any) -> None:
    """The file says of which data it is, the folder of the run where they are."""
    of_data = ["--data", "cifar10", "--data-root", synthetic("cifar10"), "--validation-size", "17"]
    chosen = {"folds": 2, "anchor": "classifier", "network": "conv", "depth": 1, "patch": 8, "steps": 2}
    of_posterior = [word for name, value in chosen.items() for word in (f"--posterior-settings.{name}", str(value))]
    made = call("run", *RUN.split(), *of_data, *of_posterior, "--model", "wrn-10-1", "--out", "run")
    assert made.status == 0, made.err
    file = ["--posterior-from", "run/posterior.pt"]
    ending = call("score", *file, "--audit", "--eps", "0.1", "--threads", "1")
    assert ending.status == 0, ending.err
    found = json.loads(Path("run/audit.json").read_text())
    assert (found["points"], found["members"], found["threat_model"]["eps"]) == (17, 2, 0.1)
    (line,) = [line for line in ending.out.splitlines() if line.startswith("to train with them: ")]
    words = shlex.split(line)[7:]
    assert words[words.index("--limit") :][:6] == ["--limit", "60", "--validation-size", "17", "--eps", "0.1"]
    dry = call("run", *words, "--dry-run")
    assert dry.status == 0, dry.err
    assert {row["reading"] for row in found["evidence"]} == {"classifier", "kernel_density", "alone"}
    own = ["--limit", "60", "--samples", "0", "--out", "own"]
    again = call("score", *of_data, *of_posterior[2:], *own)
    assert again.status == 0, again.err
    assert call("score", "--posterior-from", "own/posterior.pt", "--audit").status == 0
    assert json.loads(Path("own/audit.json").read_text())["points"] == 17
    for options, message in (
        ([*file], "posterior_from: is for --audit, which is not given"),
        ([*file, "--audit", "--data", "toy"], "data: 'toy' contradicts run/posterior.pt"),
        ([*file, "--audit", "--limit", "50"], "limit: 50 contradicts run/posterior.pt"),
        ([*file, "--audit", "--posterior-settings.width", "8"], "posterior_settings.width: 8 contradicts run/poster"),
        ([*file, "--audit", "--samples", "50"], "samples: 50 with posterior_from"),
        ([*file, "--audit", "--recipe", "cifar10-edm"], "posterior_from: run/posterior.pt with --recipe"),
        (["--posterior-from", "run/best.pt", "--audit"], "run/best.pt"),
        (["--posterior-from", "nowhere.pt", "--audit"], "nowhere.pt"),
    ):
        refused = call("score", *options)
        assert (refused.status, message in refused.err) == (2, True), refused.err


@pytest.mark.parametrize("reading", ["alone", "classifier"])
def test_what_the_audit_chose_is_trained_with_the_settings_of_its_networks(
    reading: str, call: Any, digits: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"network": "unet", "width": 24, "steps": 30, "multipliers": (1, 3), "energy_weight": 7.0, "mirror": True}
    of_scores = {"augment": 0.3, "centering": "network", "anchor": "classifier"}
    fitted = PosteriorSettings(**given, temperature=False, dropout=0.1, **of_scores).resolved("digits")  # type: ignore[arg-type]
    best = audit.Candidate(0.35, reading)
    Path("chosen.toml").write_text(audit.recipe(audit.options_of(best, fitted, digits), {best: {"moved": -0.1}}))
    command = score.command_of(score.ScoreSettings(posterior_settings=fitted), fitted, digits, best, Path("p.pt"))
    assert ("--posterior-from p.pt" in command) == (reading == "classifier")
    recipe = ["--data", "digits", "--objective", "score_direct", "--recipe", "chosen.toml"]
    for words in (recipe, shlex.split(command)[3:]):
        if "--posterior-from" in words:
            assert words[-2:] == ["--posterior-settings.sigma", "0.35"], "the file has the rest"
            continue
        trained = config.parse(words).posterior_settings
        expected = {**given, "temperature": False, "dropout": 0.1, "sigma": 0.35}
        expected |= of_scores if reading == "classifier" else {"augment": 0.0}
        assert {name: getattr(trained, name) for name in expected} == expected
        assert trained.name == ("score_network" if reading == "classifier" else "noise_conditional_classifier")


@pytest.mark.parametrize(
    "options",
    [{"nodes": 4}, {"linear": True}, {"centering": "network"}, {"top_k": 3, "classes": "embedding"}],
    ids=lambda options: next(iter(options)),
)
def test_an_audit_reads_networks_as_their_settings_say(options: dict, digits: data.Data, tmp_path: Path) -> None:
    """Noise level and anchor are what it searches, and at those of the settings it has the posterior itself."""
    settings = PosteriorSettings(
        "score_network", anchor="kernel_density", steps=20, batch_size=16, width=16, depth=1, **options
    ).resolved("digits")
    posterior = posteriors.build(settings, digits, seed=0, folder=tmp_path)
    assert settings.sigma is not None
    parts = list(posteriors.divided(settings, digits, "cpu"))
    build = audit._builder(posterior, settings, digits, parts, seed=0)
    x, y = digits.x_test[:6], digits.y_test[:6]
    values = []
    for one in (posterior, build(audit.Candidate(settings.sigma, "kernel_density"))):
        trace = one.trace(x, y)
        for shift in (0.1, 0.2):
            trace.move(x + shift)
        weights = torch.linspace(-1, 1, 60).reshape(6, 10)
        values.append((trace.log_p, trace.pull_back(weights, torch.zeros_like(x))))
    torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-4)


def test_an_audit_on_the_toy(call: Any) -> None:
    """Its inputs have one feature, so no path is closed."""
    small = "--data toy --limit 50 --threads 1 --posterior-settings.steps 20 --posterior-settings.width 16 --out here"
    ending = call("score", *small.split(), "--audit")
    assert ending.status == 0, ending.err
    found = json.loads(Path("here/audit.json").read_text())
    assert found["closed_loop"] is None
    assert len(found["findings"]) == 5
    assert "closed path" not in ending.out


def test_a_posterior_without_networks_is_not_audited(call: Any) -> None:
    assert call("run", *RUN.split(), "--posterior", "kernel_density", "--out", "run").status == 0
    ending = call("score", "--posterior-from", "run/posterior.pt", "--audit")
    assert "run/posterior.pt holds a kernel_density, expected one of score_network, joint_energies" in ending.err


GOOD: dict[str, Any] = {
    "chosen": {"sigma": 0.2, "reading": "classifier"},
    "evidence": [{"sigma": 0.2, "reading": "classifier", "moved": -0.3, "clean": -0.2}],
    "loss": "denoising loss",
    "members": 1,
    "losses": [{"sigma": s, "train": 1.0, "held_out": 1.05} for s in (0.1, 0.2, 0.4)],
    "calibration": {"error": 0.02, "confidence": 0.9, "accuracy": 0.9},
    "closed_loop": 0.01,
    "change_along_side": 1.0,
    "posterior_clean_acc": 90.0,
    "posterior_robust_acc": 60.0,
    "guess": -2.3,
}


def test_findings_follow_the_numbers() -> None:
    """Each number that gets bad turns its finding, and no other."""
    assert all(finding.good for finding in audit.judged(GOOD))
    assert "Nothing here speaks against" in audit.verdict(audit.judged(GOOD))
    bad: list[dict[str, Any]] = [
        {"losses": [{"sigma": s, "train": 1.0, "held_out": 1.2} for s in (0.1, 0.2, 0.4)]},
        {"guess": -0.1},
        {"calibration": {"error": 0.2, "confidence": 0.9, "accuracy": 0.7, "chance": 0.05, "chance_high": 0.07}},
        {"closed_loop": 0.5},
        {"losses": [{"sigma": s, "train": 1.0, "held_out": 1.0} for s in (0.2, 0.4)]},
        {"posterior_robust_acc": 20.0},
    ]
    for index, change in enumerate(bad):
        findings = audit.judged({**GOOD, **change})
        assert [finding.good for finding in findings] == [position != index for position in range(6)]
        assert audit.verdict(findings).startswith("1 of 6 findings")


def test_a_calibration_error_that_chance_explains_does_not_speak_against_a_posterior() -> None:
    """It does if it is above both the threshold and what labels drawn from the posterior give."""
    for error, expected, high, good in (
        (0.06, 0.05, 0.07, True),
        (0.08, 0.05, 0.07, False),
        (0.04, 0.01, 0.02, True),
        (0.06, 0.01, 0.02, False),
    ):
        calibration = {"error": error, "confidence": 0.9, "accuracy": 0.9, "chance": expected, "chance_high": high}
        (finding,) = [f for f in audit.judged({**GOOD, "calibration": calibration}) if "calibration" in f.text]
        assert finding.good == good
        drawn = f"labels drawn from its own probabilities give {100 * expected:.1f} on average, and more than"
        assert f"{drawn} {100 * high:.1f} in one of 20 draws" in finding.text
    (before,) = [f for f in audit.judged(GOOD) if "calibration" in f.text]
    assert before.text.endswith("is 2.0 percentage points"), "an audit of an earlier version"
