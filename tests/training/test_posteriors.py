"""Posteriors of the programs: settings, training, saved states, and the program ``training.score``."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from scorematch.posteriors import Ensemble, KernelDensity, NoiseConditionalClassifier, Posterior, ScoreNetwork
from training import data, score
from training.data import DataSettings, toy
from training.engine import checkpoint, posteriors
from training.engine.hardware import Speed
from training.measures import toy_scores
from training.reports import audit, score_network
from training.settings.errors import InputError
from training.settings.posterior import TUNED, PosteriorSettings

QUICK = {"steps": 5, "batch_size": 8, "width": 16, "depth": 1}


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load(DataSettings("digits", limit=100))


def build(settings: PosteriorSettings, loaded: data.Data, **options: object) -> Posterior:
    with tempfile.TemporaryDirectory() as folder:
        return posteriors.build(settings, loaded, seed=0, folder=Path(folder), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("score_network", ScoreNetwork),
        ("kernel_density", KernelDensity),
        ("noise_conditional_classifier", NoiseConditionalClassifier),
    ],
)
@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_every_posterior_is_rebuilt_from_its_state(name: str, kind: type, network: str, digits: data.Data) -> None:
    settings = PosteriorSettings(name, network=network, **QUICK)  # type: ignore[arg-type]
    posterior = build(settings, digits)
    assert isinstance(posterior, kind)
    again = build(settings, digits)
    x, y = digits.x_test[:8], digits.y_test[:8]
    rebuilt = build(settings, digits, state=posterior.state_dict())
    traces = [p.trace(x, y) for p in (posterior, again, rebuilt)]
    for trace in traces:
        trace.move((x + 0.1).clamp(0, 1))
        assert torch.equal(trace.log_p, traces[0].log_p)


@pytest.mark.parametrize(
    "settings",
    [
        PosteriorSettings("noise_conditional_classifier", folds=3, energy_weight=10.0, **QUICK),  # type: ignore[arg-type]
        PosteriorSettings("score_network", anchor="classifier", folds=2, **QUICK),  # type: ignore[arg-type]
    ],
    ids=["energies", "scores"],
)
def test_cross_fitting(settings: PosteriorSettings, digits: data.Data, tmp_path: Path) -> None:
    """A posterior without each fold, which picks its weights; their mean; rebuilt from its state; faster ones too."""
    posterior = posteriors.build(settings, digits, seed=0, folder=tmp_path)
    assert isinstance(posterior, Ensemble)
    assert len(posterior.members) == settings.folds
    name = "score-network" if settings.name == "score_network" else "classifier"
    kept = [checkpoint.load(tmp_path / f"fold-{k}" / name / "best.pt")["network"] for k in range(settings.folds)]
    weights = [next(iter(state.values())) for state in kept]
    assert not torch.equal(weights[0], weights[1])
    x, y = digits.x_test[:8], digits.y_test[:8]
    rebuilt = posteriors.build(settings, digits, seed=0, state=posterior.state_dict())
    fast = posteriors.at_speed(posterior, Speed())
    traces = [p.trace(x, y) for p in (posterior, rebuilt, fast)]
    for trace in traces:
        trace.move((x + 0.1).clamp(0, 1))
        assert torch.equal(trace.log_p, traces[0].log_p)
    assert not posteriors.anchored_at_labels(posterior)


def test_a_joint_energy_is_another_training(digits: data.Data) -> None:
    plain, energy = (
        build(PosteriorSettings("noise_conditional_classifier", energy_weight=w, **QUICK), digits)  # type: ignore[arg-type]
        for w in (0.0, 10.0)
    )
    x, y = digits.x_test[:8], digits.y_test[:8]
    assert not torch.equal(plain.trace(x, y).log_p, energy.trace(x, y).log_p)


def test_joint_energies_stand_for_cross_fitted_ones(digits: data.Data) -> None:
    """The name alone gives what the settings of a classifier give, with everything open or one setting of one's own."""
    whole = {"energy_weight": 100.0, "folds": 4, "sigma": 0.2}
    for own in ({}, {"folds": 2}, {"energy_weight": 1.0, "folds": 1}):
        named = build(PosteriorSettings("joint_energies", **own, **QUICK), digits)  # type: ignore[arg-type]
        told = PosteriorSettings("noise_conditional_classifier", **{**whole, **own}, **QUICK)  # type: ignore[arg-type]
        x, y = digits.x_test[:8], digits.y_test[:8]
        assert torch.equal(named.trace(x, y).log_p, build(told, digits).trace(x, y).log_p)


def test_more_classes_than_there_are_are_refused_before_a_training(digits: data.Data, tmp_path: Path) -> None:
    settings = PosteriorSettings("score_network", classes="embedding", top_k=11, **QUICK)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="top_k: 11, allowed: 1 to 10"):
        posteriors.build(settings, digits, seed=0, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_class_is_in_every_fold() -> None:
    y = torch.arange(23) % 4  # whose order and number go badly with folds that are every fourth sample
    fold_of = posteriors.folds_of(y, 4)
    for label in range(4):
        sizes = fold_of[y == label].bincount(minlength=4)
        assert sizes.max() - sizes.min() <= 1
    assert (fold_of.bincount() - 23 / 4).abs().max() < 1
    assert torch.equal(posteriors.folds_of(y, 4), fold_of)


@pytest.mark.parametrize(("count", "folds"), [(10, 11), (5, 2)])
def test_folds_that_leave_nothing_are_refused(count: int, folds: int) -> None:
    y = torch.arange(count) % 4 if count == 5 else torch.zeros(count, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"folds: {folds} for {count} samples"):
        posteriors.folds_of(y, folds)


@pytest.mark.parametrize("weight", ["energy_weight", "likelihood_weight"])
def test_a_loss_of_gradients_is_not_compiled(
    weight: str, digits: data.Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    monkeypatch.setattr(posteriors, "_called", lambda backbone, speed: asked.append(speed.compile) or backbone)
    for value in (0.0, 1.0):
        settings = PosteriorSettings("noise_conditional_classifier", **{weight: value}, **QUICK)  # type: ignore[arg-type]
        posteriors.build(settings, digits, seed=0, folder=tmp_path / str(value), speed=Speed(compile=True))
    classifiers = [asked[0], asked[1]]  # the third is the score network whose likelihood is matched
    assert classifiers == [True, False]


def test_what_is_anchored_at_labels(digits: data.Data) -> None:
    for folds in (1, 2):
        settings = PosteriorSettings("score_network", anchor="label", folds=folds, **QUICK)  # type: ignore[arg-type]
        assert posteriors.anchored_at_labels(build(settings, digits))


@pytest.mark.parametrize("anchor", ["label", "classifier", "kernel_density"])
def test_anchors(anchor: str, digits: data.Data) -> None:
    posterior = build(PosteriorSettings("score_network", anchor=anchor, **QUICK), digits)  # type: ignore[arg-type]
    x, y = digits.x_test[:8], digits.y_test[:8]
    log_p = posterior.trace(x, y).log_p
    if anchor == "label":
        assert torch.equal(log_p.argmax(1), y)
    else:
        assert isinstance(posterior, ScoreNetwork)
        assert posterior.anchor is not None
        torch.testing.assert_close(log_p, posterior.anchor.log_prob(x))
        assert posterior.anchor.sigma == posterior.sigma  # anchor and scores belong to one p_σ


def test_unet_backbone_is_a_score_network_of_images(digits: data.Data) -> None:
    settings = PosteriorSettings(name="score_network", network="unet", steps=1, batch_size=2, width=8)
    posterior = build(settings, digits)
    assert posterior.trace(digits.x_test[:2], digits.y_test[:2]).log_p.shape == (2, 10)


def test_unet_backbone_is_a_classifier_too(digits: data.Data) -> None:
    settings = PosteriorSettings("noise_conditional_classifier", network="unet", steps=1, batch_size=2, width=8)
    log_p = build(settings, digits)(digits.x_test[:2])  # type: ignore[operator]
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2))


CIFAR_CASES = [
    PosteriorSettings("kernel_density"),
    PosteriorSettings("noise_conditional_classifier", steps=2, batch_size=4, width=8),
    PosteriorSettings("noise_conditional_classifier", steps=1, batch_size=4, width=8, likelihood_weight=1.0),
    PosteriorSettings("score_network", steps=2, batch_size=4, width=8),
    PosteriorSettings("score_network", steps=2, batch_size=4, width=16, depth=1, anchor="label", network="conv"),
    PosteriorSettings("score_network", steps=2, batch_size=4, width=8, depth=1, anchor="kernel_density", network="mlp"),
]


@pytest.mark.parametrize("settings", CIFAR_CASES, ids=lambda s: f"{s.name}-{s.anchor}-{s.network}")
def test_every_posterior_works_on_cifar(settings: PosteriorSettings, cifar10_root: Path) -> None:
    loaded = data.load(DataSettings("cifar10", limit=100, validation_size=16, root=cifar10_root))
    posterior = build(settings, loaded)
    x, y = loaded.x_validation[:8], loaded.y_validation[:8]
    trace = posterior.trace(x, y)
    before = trace.log_p
    trace.move((x + 8 / 255 * torch.randn_like(x).sign()).clamp(0, 1))
    assert trace.log_p.shape == (8, 10)
    torch.testing.assert_close(trace.log_p.exp().sum(1), torch.ones(8))
    assert not torch.equal(trace.log_p, before)
    gradient = trace.pull_back(torch.randn(8, 10), torch.zeros_like(x))
    assert gradient.shape == x.shape
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).abs().sum(1) > 0).any()


def test_likelihood_matching_trains_a_score_network_beside_the_classifier(digits: data.Data) -> None:
    plain = PosteriorSettings("noise_conditional_classifier", **QUICK)  # type: ignore[arg-type]
    matched = PosteriorSettings("noise_conditional_classifier", likelihood_weight=1.0, **QUICK)  # type: ignore[arg-type]
    x = digits.x_test[:8]
    assert not torch.equal(build(plain, digits)(x), build(matched, digits)(x))  # type: ignore[operator]


def test_the_temperature_is_fitted_on_held_out_points_and_saved(digits: data.Data) -> None:
    # steps that suffice to be surer than right
    settings = PosteriorSettings("noise_conditional_classifier", sigma=0.05, **{**QUICK, "steps": 150})  # type: ignore[arg-type]
    fitted, plain = build(settings, digits), build(dataclasses.replace(settings, temperature=False), digits)
    assert isinstance(fitted, NoiseConditionalClassifier)
    assert isinstance(plain, NoiseConditionalClassifier)
    assert float(plain.temperature) == 1.0
    assert float(fitted.temperature) != 1.0
    x, y = digits.x_validation, digits.y_validation
    torch.testing.assert_close(fitted(x), (plain(x) / fitted.temperature).log_softmax(1))
    losses = [torch.nn.functional.cross_entropy(posterior(x), y) for posterior in (fitted, plain)]
    assert losses[0] < losses[1]
    again = posteriors.build(settings, digits, seed=0, state=fitted.state_dict())
    assert torch.equal(again(x), fitted(x))  # type: ignore[operator]


def test_max_points_bounds_the_kernel_density(digits: data.Data) -> None:
    posterior = build(PosteriorSettings("kernel_density", max_points=60), digits)
    assert isinstance(posterior, KernelDensity)
    assert len(posterior.points) == 60


def test_a_subset_keeps_a_rare_class(digits: data.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a plain draw has all classes, it stays as it was."""
    y = (torch.arange(1000) == 700).long()
    drawn = {seed: torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:50] for seed in range(60)}
    for seed, plain in drawn.items():
        index = posteriors.subset(y, 50, seed)
        assert len(index.unique()) == 50
        kept = 50 if 700 in plain else 49
        assert index[:kept].tolist() == plain[:kept].tolist()
        assert 700 in index
    assert sum(700 in plain for plain in drawn.values()) in range(1, 20), "both cases occur"
    x = torch.rand(1000, 1, 8, 8)
    rare = dataclasses.replace(digits, x_train=x, y_train=y, x_validation=x, y_validation=y, num_classes=2)
    settings = PosteriorSettings("kernel_density", max_points=20)
    posterior = build(settings, rare)
    assert isinstance(posterior, KernelDensity)
    assert posterior.class_sizes.tolist() == [19, 1]

    monkeypatch.setattr(audit, "DENSITY_POINTS", 20)
    parts = list(posteriors.divided(settings, rare, "cpu"))
    network = build(PosteriorSettings("score_network", anchor="kernel_density", **QUICK), rare)  # type: ignore[arg-type]
    again = audit._builder(network, settings, rare, parts, seed=0)(audit.Candidate(0.3, "kernel_density"))
    assert isinstance(again, ScoreNetwork)
    assert isinstance(again.anchor, KernelDensity)
    assert again.anchor.class_sizes.tolist() == [19, 1]


def test_a_kernel_density_is_rebuilt_whatever_the_seed_drew(digits: data.Data) -> None:
    settings = PosteriorSettings("kernel_density", max_points=60)
    posterior = posteriors.build(settings, digits, seed=0, folder=Path())
    again = posteriors.build(settings, digits, seed=1, state=posterior.state_dict())
    x = digits.x_validation
    assert torch.equal(again(x), posterior(x))  # type: ignore[operator]
    old = {"points": posterior.state_dict()["points"]}
    with pytest.raises(ValueError, match="the saved posterior does not fit: Error"):
        posteriors.build(settings, digits, seed=0, state=old)


def test_given_values_override_tuned_ones() -> None:
    resolved = PosteriorSettings("kernel_density", sigma=0.123).resolved("digits")
    assert resolved.sigma == 0.123
    assert resolved.network == TUNED["digits"]["any"]["network"]
    assert PosteriorSettings("kernel_density").resolved("digits").sigma is not None


def test_oracle_is_for_the_toy(digits: data.Data) -> None:
    with pytest.raises(ValueError, match="'oracle' on digits, whose"):
        build(PosteriorSettings("oracle"), digits)
    x = torch.tensor([[0.0], [1.0]])
    oracle = build(PosteriorSettings("oracle"), data.load(DataSettings("toy", limit=100)))
    torch.testing.assert_close(oracle(x).exp(), toy.posterior(x))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "gan"}, "posterior: unknown name 'gan', allowed: score_network"),
        ({"sigma": -1.0}, "sigma: -1.0 is out of range"),
        ({"nodes": 0}, "nodes: 0 is out of range, allowed: at least 1"),
        ({"smoothing": 1.0}, "smoothing: 1.0 is out of range"),
        ({"likelihood_weight": -1.0}, "likelihood_weight: -1.0 is out of range"),
        ({"energy_weight": -1.0}, "energy_weight: -1.0 is out of range"),
        ({"energy_weight": 2.0, "likelihood_weight": 1.0}, "likelihood_weight: 1.0 with energy_weight 2.0"),
        ({"name": "joint_energies", "likelihood_weight": 1.0}, "likelihood_weight: 1.0 with joint_energies"),
        ({"name": "joint_energies", "energy_weight": 0.0}, "energy_weight: 0.0 with joint_energies, allowed: above 0"),
        ({"name": "joint_energies", "centering": "network"}, "folds: 4 with centering 'network'"),
        ({"folds": 0}, "folds: 0 is out of range"),
        ({"name": "kernel_density", "folds": 2}, "folds: 2 with kernel_density, allowed: with score_network"),
        ({"centering": "network", "folds": 2}, "folds: 2 with centering 'network'"),
        ({"teacher": Path("t.pt"), "folds": 2}, "teacher: t.pt with 2 folds, all of which it has seen"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PosteriorSettings(**settings)


def test_networks_for_images_refuse_vectors() -> None:
    loaded = data.load(DataSettings("toy", limit=100))
    with pytest.raises(ValueError, match=r"'conv' takes images \[C, H, W\]"):
        build(PosteriorSettings("score_network", network="conv", **QUICK), loaded)  # type: ignore[arg-type]


def test_audit_of_a_posterior(digits: data.Data) -> None:
    from scorematch import ThreatModel

    posterior = build(PosteriorSettings("kernel_density"), digits)
    x, y = digits.x_test[:50], digits.y_test[:50]
    numbers = posteriors.audit(posterior, x, y, ThreatModel("linf", 0.15), steps=5, seed=0)
    assert 50.0 < numbers["posterior_clean_acc"] <= 100.0
    assert numbers["posterior_robust_acc"] < numbers["posterior_clean_acc"]


def test_score_program_on_digits(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "score"
    options = ["--samples", "20", "--levels", "3", "--steps-per-level", "2", "--out", str(out)]
    quick = [f"--posterior-settings.{k.replace('_', '-')}={v}" for k, v in QUICK.items()]
    score.main([*options, *quick])
    result = json.loads((out / "score.json").read_text())
    assert 0.0 <= result["samples"]["recognised"] <= 100.0
    assert {"posterior.pt", "samples.png", "samples.npz", "score.json"} <= {p.name for p in out.iterdir()}
    with np.load(out / "samples.npz", allow_pickle=False) as samples:
        assert samples["image"].shape == (20, 8, 8, 1)
        assert samples["image"].dtype == np.uint8
        assert samples["label"].tolist() == [*range(10)] * 2
    assert "recognised by a held-out classifier" in capsys.readouterr().out
    with pytest.raises(Exception, match="holds a posterior already"):
        score.main([*options, *quick])


def test_score_program_on_cifar(cifar10_root, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    options = "--data cifar10 --limit 100 --samples 12 --levels 2 --steps-per-level 1 --judge-epochs 1"
    quick = [f"--posterior-settings.{k.replace('_', '-')}={v}" for k, v in {**QUICK, "network": "conv"}.items()]
    out = tmp_path / "score"
    score.main([*options.split(), "--data-root", str(cifar10_root), "--out", str(out), *quick])
    with np.load(out / "samples.npz", allow_pickle=False) as samples:
        assert samples["image"].shape == (12, 32, 32, 3)
    saved = checkpoint.load(out / "posterior.pt")
    assert (saved["settings"]["data"], saved["settings"]["limit"]) == ("cifar10", 100)
    assert saved["settings"]["anchor"] == "classifier"  # the resolved value, whatever later versions resolve to
    assert "recognised by a held-out classifier" in capsys.readouterr().out


def test_score_program_wants_a_sample_of_each_class(synthetic, tmp_path) -> None:  # type: ignore[no-untyped-def]
    options = ["--data", "cifar100", "--data-root", str(synthetic("cifar100")), "--samples", "99"]
    with pytest.raises(InputError, match="samples: 99, allowed: at least 100"):
        score.main([*options, "--out", str(tmp_path / "s")])
    assert not (tmp_path / "s").exists()


def test_score_program_on_the_toy(tmp_path) -> None:  # type: ignore[no-untyped-def]
    quick = [f"--posterior-settings.{k.replace('_', '-')}={v}" for k, v in QUICK.items()]
    score.main(["--data", "toy", "--out", str(tmp_path / "s"), *quick])
    result = json.loads((tmp_path / "s" / "score.json").read_text())
    assert [row["sigma"] for row in result["oracle"]] == [0.1, 0.15, 0.2]


def test_exact_scores_imply_the_exact_posterior() -> None:
    """`own_posterior` and `relative_errors` on a denoiser whose scores are right: the error is that of σ alone."""

    class Exact:
        center = torch.zeros(())

        def class_scores(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
            return toy.oracle().smoothed(sigma).log_prob_and_scores(x)[1]

    x = torch.linspace(-4, 4, 801)[:, None]
    p, _ = toy_scores.own_posterior(Exact(), x, 0.2)  # type: ignore[arg-type]
    expected = toy.oracle().smoothed(0.2).log_prob(x).exp()
    torch.testing.assert_close(p, expected, rtol=0, atol=2e-3)
    errors = toy_scores.relative_errors(Exact())  # type: ignore[arg-type]
    assert [row["relative_error_uniform"] < 0.005 for row in errors] == [True, True, True]
    assert errors[2]["relative_error_uniform"] > errors[0]["relative_error_uniform"] > 1e-7


def test_the_toy_is_pictured_on_the_device_of_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = build(PosteriorSettings("score_network", **QUICK), data.load(DataSettings("toy", limit=100)))  # type: ignore[arg-type]
    exact = toy.oracle()
    monkeypatch.setattr(toy, "oracle", lambda: exact)
    with torch.device("meta"):  # what does not say where it belongs lands here
        figure = score_network.scores_of_toy(posterior)  # type: ignore[arg-type]
    lines = figure.axes[0].lines
    assert len(lines) == 4
    assert all(np.isfinite(np.asarray(line.get_ydata(), float)).all() for line in lines)
