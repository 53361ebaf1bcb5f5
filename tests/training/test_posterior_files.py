"""A posterior.pt that is used again: what its settings are, what may change, and what does not fit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w
import torch

from scorematch.matching import fit_temperature
from scorematch.networks.denoiser import ScaledModule
from scorematch.posteriors import KernelDensity, NoiseConditionalClassifier, Posterior
from scorematch.posteriors.base import PointwisePosterior
from training import data
from training.data import DataSettings
from training.engine import checkpoint, posteriors
from training.settings import config, tables
from training.settings.errors import InputError
from training.settings.posterior import PosteriorSettings

QUICK: dict[str, Any] = {"steps": 5, "batch_size": 8, "width": 16, "depth": 1}


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load(DataSettings("digits", limit=100))


class FromFile(NamedTuple):
    path: Path
    posterior: Posterior


@pytest.fixture(scope="module")
def saved(digits: data.Data, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FromFile]:
    """A posterior in a file, as the programs write it."""

    def make(name: str, **options: Any) -> FromFile:
        settings = PosteriorSettings(name, **{**QUICK, **options}).resolved("digits")
        folder = tmp_path_factory.mktemp("saved")
        posterior = posteriors.build(settings, digits, seed=0, folder=folder)
        path = folder / "posterior.pt"
        checkpoint.save(path, epoch=0, settings=tables.plain(settings), network=posterior.state_dict())
        return FromFile(path, posterior)

    return make


def read(file: FromFile, given: PosteriorSettings, loaded: data.Data) -> Posterior:
    settings = posteriors.settings_from(file.path, given)
    state = posteriors.state_from(file.path, settings, loaded)
    return posteriors.build(settings, loaded, seed=0, state=state)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("joint_energies", {"folds": 2, "sigma": 0.05}),
        ("noise_conditional_classifier", {"sigma": 0.05}),
        ("score_network", {"classes": "embedding", "anchor": "classifier", "nodes": 2}),
    ],
)
def test_a_file_brings_its_settings(
    saved: Callable[..., FromFile], digits: data.Data, name: str, options: dict
) -> None:
    """Whatever is not said is as in the file: width, folds, σ, kind of network."""
    file = saved(name, **options)
    again = read(file, PosteriorSettings(name), digits)
    x, y = digits.x_test[:8], digits.y_test[:8]
    traces = [posterior.trace(x, y) for posterior in (file.posterior, again)]
    for trace in traces:
        trace.move((x + 0.1).clamp(0, 1))
    assert torch.equal(traces[0].log_p, traces[1].log_p)


def parts_of(digits: data.Data, folds: int) -> list[tuple[torch.Tensor, ...]]:
    """What each member learned from, and what was held out: points and labels."""
    x, y = digits.x_train, digits.y_train
    if folds == 1:
        return [(x, y, digits.x_validation, digits.y_validation)]
    fold_of = posteriors.folds_of(y, folds)
    return [(x[fold_of != fold], y[fold_of != fold], x[fold_of == fold], y[fold_of == fold]) for fold in range(folds)]


@pytest.mark.parametrize("folds", [1, 2])
@pytest.mark.parametrize("anchor", ["classifier", "kernel_density"])
def test_a_file_is_read_at_another_noise_level(
    saved: Callable[..., FromFile], digits: data.Data, anchor: str, folds: int
) -> None:
    """Its networks stay, and its anchors are those of the new level."""
    x, y = digits.x_test[:8], digits.y_test[:8]
    file = saved("score_network", anchor=anchor, sigma=0.3, folds=folds)
    moved = read(file, PosteriorSettings("score_network", sigma=0.6), digits)
    pairs = zip(posteriors.members_of(file.posterior), posteriors.members_of(moved), strict=True)
    for (old, new), (points, labels, *held_out) in zip(pairs, parts_of(digits, folds), strict=True):
        assert torch.equal(new.denoiser.all_scores(x, 0.6), old.denoiser.all_scores(x, 0.6))
        expected: PointwisePosterior
        if anchor == "classifier":
            plain = NoiseConditionalClassifier(old.anchor.network, num_classes=10, sigma=0.6)
            temperature = fit_temperature(plain.log_prob, *held_out, repeats=1)
            expected = NoiseConditionalClassifier(plain.network, num_classes=10, sigma=0.6, temperature=temperature)
        else:
            expected = KernelDensity(points, labels, num_classes=10, sigma=0.6)
        assert torch.equal(new.trace(x, y).log_p, expected.log_prob(x))


@pytest.mark.parametrize(("name", "folds"), [("noise_conditional_classifier", 1), ("joint_energies", 2)])
def test_classifiers_are_read_at_another_noise_level(
    saved: Callable[..., FromFile], digits: data.Data, name: str, folds: int
) -> None:
    """Each has the temperature of the new level, chosen on what it has not seen."""
    file = saved(name, folds=folds, sigma=0.2, steps=60, width=64)
    moved = read(file, PosteriorSettings(name, sigma=0.5), digits)
    pairs = zip(posteriors.members_of(file.posterior), posteriors.members_of(moved), strict=True)
    for (old, new), (_, _, *held_out) in zip(pairs, parts_of(digits, folds), strict=True):
        plain = NoiseConditionalClassifier(old.network, num_classes=10, sigma=0.5)
        temperature = fit_temperature(plain.log_prob, *held_out, repeats=1)
        expected = NoiseConditionalClassifier(plain.network, num_classes=10, sigma=0.5, temperature=temperature)
        assert float(new.temperature) != float(old.temperature)
        assert torch.equal(new(digits.x_test[:8]), expected(digits.x_test[:8]))


@pytest.mark.parametrize("folds", [1, 2])
def test_a_file_is_read_with_another_anchor(saved: Callable[..., FromFile], digits: data.Data, folds: int) -> None:
    file = saved("score_network", anchor="classifier", folds=folds)
    moved = read(file, PosteriorSettings("score_network", anchor="kernel_density"), digits)
    x, y = digits.x_test[:8], digits.y_test[:8]
    for old, new in zip(posteriors.members_of(file.posterior), posteriors.members_of(moved), strict=True):
        assert isinstance(new.anchor, KernelDensity)
        torch.testing.assert_close(new.trace(x, y).log_p, new.anchor.log_prob(x))
        assert torch.equal(new.scores(x), old.scores(x))


def test_an_anchor_that_was_not_trained_is_refused(saved: Callable[..., FromFile], digits: data.Data) -> None:
    file, x = saved("score_network", anchor="label"), digits.x_test[:8]
    with pytest.raises(InputError, match=r"posterior.pt: its network does not fit digits \(.* has no classifier for"):
        posteriors.read(file.path, digits, anchor="classifier")
    _, made = posteriors.read(file.path, digits, anchor="kernel_density")
    assert made.sigma == file.posterior.sigma
    expected = KernelDensity(digits.x_train, digits.y_train, num_classes=10, sigma=made.sigma)
    torch.testing.assert_close(made.clean_log_prob(x, digits.y_test[:8]), expected.log_prob(x))


@pytest.mark.parametrize(
    ("name", "of_file", "given", "message"),
    [
        ("score_network", {}, {"width": 32}, "posterior_settings.width: 32, but .* was fitted with 16"),
        ("score_network", {"anchor": "label"}, {"anchor": "classifier"}, "posterior_settings.anchor: 'classifier'"),
        ("joint_energies", {"folds": 2}, {"folds": 4}, "posterior_settings.folds: 4, but .* with 2"),
        ("score_network", {"folds": 2}, {"folds": 3}, "posterior_settings.folds: 3, but .* with 2"),
    ],
)
def test_what_a_file_was_fitted_with_stays(
    saved: Callable[..., FromFile], name: str, of_file: dict, given: dict, message: str
) -> None:
    file = saved(name, **of_file)
    with pytest.raises(InputError, match=message):
        posteriors.settings_from(file.path, PosteriorSettings(name, **given))


def test_a_file_that_does_not_fit_the_data_is_refused(saved: Callable[..., FromFile]) -> None:
    file, toy = saved("noise_conditional_classifier"), data.load(DataSettings("toy", limit=100))
    settings = posteriors.settings_from(file.path, PosteriorSettings("noise_conditional_classifier"))
    with pytest.raises(InputError, match="its network does not fit toy"):
        posteriors.state_from(file.path, settings, toy)


def test_a_file_counts_more_than_a_recipe(saved: Callable[..., FromFile], tmp_path: Path) -> None:
    """A recipe says how to fit a posterior, and nothing is fitted."""
    recipe, file = tmp_path / "r.toml", saved("noise_conditional_classifier", sigma=0.2)
    recipe.write_text('data = "digits"\n[posterior_settings]\nwidth = 32\nsigma = 0.4\n')
    options = f"--recipe {recipe} --objective score_direct --posterior noise_conditional_classifier".split()
    given = [*options, "--posterior-from", str(file.path)]
    expected = {"recipe": (32, 0.4), "file": (16, 0.2), "both": (16, 0.3)}
    lines = {"recipe": options, "file": given, "both": [*given, "--posterior-settings.sigma", "0.3"]}
    for name, line in lines.items():
        settings = config.parse(line).posterior_settings
        assert (settings.width, settings.sigma) == expected[name], name


@pytest.mark.parametrize(
    ("of_file", "options", "expected"),
    [
        ({"nodes": 8}, "--posterior-settings.nodes 1", {"nodes": 1}),
        ({"linear": True}, "--posterior-settings.no-linear", {"linear": False}),
        ({"centering": "network"}, "--posterior-settings.centering=posterior", {"centering": "posterior"}),
        ({"top_k": 3, "classes": "embedding", "anchor": "kernel_density"}, "--posterior-settings.top-k None", {}),
        ({"sigma": 0.7}, "--posterior-settings.sigma None", {"sigma": 0.7}),
        ({"nodes": 8}, "", {"nodes": 8}),
    ],
)
def test_a_default_that_is_given_counts(
    saved: Callable[..., FromFile], tmp_path: Path, of_file: dict, options: str, expected: dict
) -> None:
    """As an option, and in the config.toml of such a run; what is not given is that of the file."""
    file = saved("score_network", **of_file)
    line = ["--objective", "score_direct", "--posterior-from", str(file.path), *options.split()]
    settings = config.parse(line)
    for name, value in (expected or {"top_k": None}).items():
        assert getattr(settings.posterior_settings, name) == value
    if expected:  # None has no line in a file
        path = tmp_path / "config.toml"
        path.write_text(tomli_w.dumps(config.as_table(settings)))
        assert config.parse(["--recipe", str(path)]).posterior_settings == settings.posterior_settings


def test_a_default_that_contradicts_a_file_is_refused(saved: Callable[..., FromFile]) -> None:
    file = saved("score_network", dropout=0.1)
    line = f"--objective score_direct --posterior-from {file.path} --posterior-settings.dropout 0"
    with pytest.raises(InputError, match=r"posterior_settings.dropout: 0.0, but .* was fitted with 0.1"):
        config.parse(line.split())


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [("score_network", {"anchor": "classifier"}), ("joint_energies", {"folds": 2})]
)
def test_networks_keep_the_scale_that_they_were_trained_with(
    saved: Callable[..., FromFile], digits: data.Data, name: str, options: dict, old: bool
) -> None:
    """Files from before it was saved take that of the data at hand."""
    file, x = saved(name, **options), digits.x_test[:8]
    brighter = dataclasses.replace(digits, x_train=0.5 * digits.x_train)
    state = file.posterior.state_dict()
    if old:
        state = {name: value for name, value in state.items() if "_extra_state" not in name}
    settings = posteriors.settings_from(file.path, PosteriorSettings(name))
    again = posteriors.build(settings, brighter, seed=0, state=state)
    scales = [
        [module.sigma_data for module in posterior.modules() if isinstance(module, ScaledModule)]
        for posterior in (file.posterior, again)
    ]
    assert [scale / first for first, scale in zip(*scales, strict=True)] == pytest.approx([0.5 if old else 1.0] * 2)
    if not old:
        assert scales[0] == scales[1]
        y = digits.y_test[:8]
        assert torch.equal(again.trace(x, y).log_p, file.posterior.trace(x, y).log_p)
