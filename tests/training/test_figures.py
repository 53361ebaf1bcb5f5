"""The paper's figures: their files, what they are computed by, and what is refused."""

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import tomli_w
import torch
from conftest import Call, Ending
from matplotlib import pyplot as plt
from torch import Tensor, nn

from scorematch import ThreatModel, bounds, logit_divergence
from scorematch.divergences import KINDS
from scorematch.posteriors import KernelDensity
from training import figures, models
from training.data import toy
from training.figures import __main__ as program
from training.figures import certified, figure_4, overfitting, tables, toy_fits
from training.figures.claims import Result, rounded, save, table
from training.settings import config
from training.settings.config import RunSettings
from training.settings.errors import InputError


@pytest.fixture(scope="module")
def turning_model() -> nn.Module:
    """A curve with several turns in a ball."""
    torch.manual_seed(0)
    model = models.build("toy_mlp", (1,), 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model.double()


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_the_toy_are_those_of_the_library(turning_model: nn.Module, kind: str) -> None:
    """Two running maxima of the logit against every point of the ball, for each divergence."""
    grid = toy.Grid(points_per_eps=20)
    offsets = torch.arange(-20, 21, dtype=torch.float64) * toy.EPS / 20
    inside = slice(20, -20)  # away from the ends of the grid, where its balls are cut off
    x = grid.x[inside, None]
    expected = bounds.robust_errors(
        turning_model,
        toy.oracle().double(),
        x,
        torch.zeros(len(x), dtype=torch.int64),
        ThreatModel("linf", toy.EPS, lower=-math.inf, upper=math.inf),
        divergences=kind,
        candidates=(x + offsets)[..., None],
    )[kind]
    found = toy.errors(turning_model, kind, grid)
    for name in ("standard", "madry", "score", "constant", "invariance"):
        torch.testing.assert_close(getattr(found, name)[inside], getattr(expected, name), rtol=1e-6, atol=1e-6)


def test_drawn_points_are_the_ones_asked_for() -> None:
    points = toy_fits.draw(toy_fits.CLASS_COUNTS, 0)
    assert len(points.x) < 1200
    assert float(points.weights.sum()) == pytest.approx(1.0, abs=1e-5)
    mean = float((points.weights * points.x[:, 0]).sum())
    assert mean == pytest.approx(-4 / 6, abs=0.03)  # 5/6 · (−1) + 1/6 · 1
    few = toy_fits.draw(toy_fits.FEW_COUNTS, 1)
    assert float((few.weights * 6).round().sum()) == 6
    assert not torch.equal(few.x, toy_fits.draw(toy_fits.FEW_COUNTS, 2).x)


@pytest.mark.parametrize("objective", toy_fits.OBJECTIVES)
@pytest.mark.parametrize("kind", ["kl", "se"])
def test_the_exact_search_finds_what_brute_force_finds(
    turning_model: nn.Module, objective: toy_fits.Objective, kind: str
) -> None:
    fit = toy_fits.Fit(objective, kind, "grid", counts=toy_fits.FEW_COUNTS, beta=2.0)
    points = toy_fits.draw(fit.counts, 3)
    points = points._replace(x=points.x.double())
    exact = toy_fits._Exact(fit, points, turning_model.double(), torch.Generator())
    exact.nodes, exact.log_p, exact.own_p = exact.nodes.double(), exact.log_p.double(), exact.own_p.double()
    offsets = torch.arange(-50, 51, dtype=torch.float64) / 50
    found = exact().detach()

    def d(logits: Tensor, target: Tensor) -> Tensor:
        return logit_divergence(logits, target, kind=kind)

    for row, x in enumerate(points.x):
        ball = (x + offsets)[:, None]
        with torch.no_grad():
            q, q0 = turning_model(ball), turning_model(x[None])
        p, p0 = (toy.log_joint(at).log_softmax(1) for at in (ball, x[None]))
        expected = {
            "standard": d(q0, p0).amax(),
            "madry": d(q, p0.expand_as(q)).amax(),
            "score": d(q, p).amax(),
            "trades": d(q0, p0)[0] + 2.0 * d(q, q0.expand_as(q)).amax(),
        }[objective]
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_pgd_comes_close_to_the_exact_search_from_below() -> None:
    points = toy_fits.draw((500, 100), 0)
    torch.manual_seed(1)
    model = models.build("toy_mlp", (1,), 2)
    for objective in ("madry", "score", "trades"):
        fits = [toy_fits.Fit(objective, "kl", search) for search in toy_fits.SEARCHES]
        pgd, exact = (
            float((points.weights * kind(fit, points, model, torch.Generator().manual_seed(0))()).sum().detach())
            for kind, fit in zip((toy_fits._Pgd, toy_fits._Exact), fits, strict=True)
        )
        assert 0.8 * exact < pgd < exact * 1.001 + 1e-6, objective


def test_metrics_of_two_classes_train_the_same_model() -> None:
    """Why Fig. 1 leaves l2 and linf out: they are l1 times a constant, which Adam does not see."""
    trained = [toy_fits.train(toy_fits.Fit("madry", kind, "grid", steps=10)) for kind in ("l1", "l2", "linf")]
    curves = [torch.tensor(toy.curves(model)["p_theta"]) for model in trained]
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curves[0], curves[2], rtol=1e-3, atol=1e-4)


def test_a_fit_falls_and_repeats() -> None:
    fit = toy_fits.Fit("score", "kl", "grid", steps=40, batch=256)
    losses = []
    toy_fits.train(fit, lambda step, model: losses.append(toy.robust_errors(model, overfitting.GRID)["r_score"]))
    assert losses[-1] < 0.5 * losses[0]
    again = []
    toy_fits.train(fit, lambda step, model: again.append(toy.robust_errors(model, overfitting.GRID)["r_score"]))
    assert losses == again


def test_claims_about_overfitting_say_what_curves_say() -> None:
    def run(score: list[float], madry: list[float]) -> dict:
        steps = [0.0, 5.0, 10.0, 15.0]
        return {"choices": "these", "seed": 0, "curves": {"step": steps, "score": score, "madry": madry}}

    names = ("R_Madry", "R_SCORE", "C")
    turning = run([1.0, 0.2, 0.3, 0.4], [1.0, 0.52, 0.4, 0.3])
    near, rises = overfitting.claims_of([turning], "madry", 0.5, names)
    assert near.holds
    assert rises.holds
    assert near.found == "R_Madry / C is 1.04, at step 5"
    near, _ = overfitting.claims_of([turning], "madry", 0.3, names)
    assert not near.holds
    falling = run([1.0, 0.4, 0.3, 0.2], [1.0, 0.52, 0.4, 0.3])
    _, rises = overfitting.claims_of([turning, falling], "madry", 0.5, names)
    assert not rises.holds


def test_the_slope_is_that_of_finite_differences(turning_model: nn.Module) -> None:
    grid = toy.Grid(points_per_eps=200)
    p, q = toy.posterior(grid.x)[:, 1], toy.log_probabilities(turning_model, grid.x)[:, 1].exp()
    (slope,) = torch.gradient(p - q, spacing=toy.EPS / 200)
    assert overfitting.slope(turning_model, grid) == pytest.approx(float(grid.mean(slope.abs())), rel=1e-3)


@pytest.fixture(scope="module")
def digits_model() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = models.build("digits_cnn", (1, 8, 8), 10).double().eval()
    return model, torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5)


def test_gradients_of_a_classifier(digits_model: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits_model
    found = figure_4.model_gradients(model, x, y)
    point = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(point).log_softmax(1).gather(1, y[:, None]).sum(), point)
    torch.testing.assert_close(found["posterior"], expected)
    torch.testing.assert_close(found["joint"] + found["marginal"], found["posterior"])
    shifted = figure_4.model_gradients(lambda at: model(at) + 7.0, x, y)  # Z has no gradient
    torch.testing.assert_close(shifted["marginal"], found["marginal"])


def test_gradients_of_the_data() -> None:
    torch.manual_seed(0)
    points, labels = torch.randn(20, 1, 2, 2, dtype=torch.float64), torch.arange(20) % 3
    density = KernelDensity(points, labels, num_classes=3, sigma=0.7)
    x, y = torch.randn(4, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    at = x.clone().requires_grad_()
    exponents = -0.5 * (at.flatten(1)[:, None] - points.flatten(1)).square().sum(2) / 0.49
    (whole,) = torch.autograd.grad(exponents.logsumexp(1).sum(), at, retain_graph=True)
    own = exponents.masked_fill(labels[None] != y[:, None], -torch.inf)
    (joint,) = torch.autograd.grad(own.logsumexp(1).sum(), at)
    found = figure_4.data_gradients(density, x, y)
    torch.testing.assert_close(found["marginal"], -whole)
    torch.testing.assert_close(found["joint"], joint)
    torch.testing.assert_close(found["posterior"], joint - whole)


def test_the_strongest_pixels() -> None:
    gradient = torch.zeros(1, 2, 4, 5)
    gradient[0, 0, 1, 2], gradient[0, 1, 1, 2] = 3.0, -1.0  # in sum 2
    gradient[0, 1, 3, 4] = -5.0
    gradient[0, :, 0, 0] = torch.tensor([4.0, -4.0])  # in sum 0
    kept = figure_4.strongest(gradient)
    assert kept[0].nonzero().tolist() == [[1, 2], [3, 4]]
    assert kept[0, 1, 2] == 2.0
    assert kept[0, 3, 4] == -5.0


SQUARED_ERROR = ["--divergence", "se", "--validation-losses", "se", "--lr", "0.05"]


def stored(folder: Path, arguments: list[str], **summary: float) -> None:
    """A finished run as training.run leaves it."""
    settings = config.parse([*arguments, "--out", str(folder)])
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(tomli_w.dumps(config.as_table(settings)))
    (folder / "summary.json").write_text(json.dumps(summary))


def test_tables_take_the_runs_that_are_theirs(tmp_path: Path) -> None:
    table2 = ["--recipe", "table2", "--objective", "pgd_at", *SQUARED_ERROR]
    for seed, clean in enumerate((82.0, 83.0)):
        stored(tmp_path / f"a{seed}", [*table2, "--seed", str(seed)], clean_acc=clean, autoattack_acc=50.0)
    stored(tmp_path / "short", [*table2, "--epochs", "30"], clean_acc=70.0, autoattack_acc=40.0)
    stored(tmp_path / "ce", [*table2, "--validation-losses", "ce"], clean_acc=71.0, autoattack_acc=41.0)
    stored(tmp_path / "clip", [*table2, "--clip", "0.4"], clean_acc=84.0, autoattack_acc=49.0)
    stored(tmp_path / "few", [*table2, "--limit", "1000"], clean_acc=30.0, autoattack_acc=10.0)
    page = tables.page(tmp_path)
    assert "| PGD-AT SE | table2 | 82.13 ± 0.14 | 82.50 ± 0.71 | 49.41 ± 0.27 | 50.00 ± 0.00 | 2 |" in page
    assert "| PGD-AT SE, clip 0.4 | table2 | 82.80 ± 0.16 | 84.00 | 49.63 ± 0.17 | 49.00 | 1 |" in page
    assert "| TRADES KL | table2 | 81.47 ± 0.12 | not run | 49.14 ± 0.16 | not run | 0 |" in page
    assert "- PGD-AT SE, short: clean 70.00, robust 40.00, with epochs 30 instead of 110" in page
    told = "with validation_losses ['ce'] instead of ('se',)"
    assert f"- PGD-AT SE, ce: clean 71.00, robust 41.00, {told}" in page
    assert "few" not in page


def test_runs_with_other_images_or_without_attack_do_not_count_for_a_table(tmp_path: Path) -> None:
    table2 = ["--recipe", "table2", "--objective", "pgd_at", *SQUARED_ERROR]
    stored(tmp_path / "more", [*table2, "--generated", "x.npz"], clean_acc=90.0, autoattack_acc=60.0)
    stored(tmp_path / "a", table2, clean_acc=82.0, autoattack_acc=50.0)
    stored(tmp_path / "b", table2, clean_acc=83.0)
    page = tables.page(tmp_path)
    assert "| 82.50 ± 0.71 | 49.41 ± 0.27 | 50.00 | 2, of which 1 attacked |" in page
    assert "- PGD-AT SE, more: clean 90.00, robust 60.00, with generated images instead of none" in page


@pytest.mark.parametrize("text", ['{"clean', "[]", "{}", '{"clean_acc": null}'])
def test_a_damaged_summary_is_named(tmp_path: Path, text: str) -> None:
    stored(tmp_path / "a", ["--objective", "standard"], clean_acc=82.0)
    (tmp_path / "a" / "summary.json").write_text(text)
    with pytest.raises(InputError, match=r"runs: .*a/summary.json is damaged \("):
        tables.page(tmp_path)


def test_a_file_names_the_seeds_that_were_used() -> None:
    settings = program.FigureSettings()
    assert program.seeds_of(settings, "fig1") == (0, 1, 2, 3, 4)
    assert program.seeds_of(settings, "fig4") == program.seeds_of(settings, "certified") == (0, 1, 2)
    assert program.seeds_of(dataclasses.replace(settings, quick=True), "fig4") == (0,)
    assert program.seeds_of(dataclasses.replace(settings, run=Path("x")), "fig4") == ()
    folder = Path(figures.__file__).parents[2] / "docs" / "figures" / "paper"
    for name in program.FIGURES:
        assert json.loads((folder / f"{name}.json").read_text())["seeds"] == list(program.seeds_of(settings, name))


def test_every_row_of_the_tables_is_there() -> None:
    rows = tables.rows()
    assert [sum(row.table == table for row in rows) for table in (1, 2, 3, 4)] == [24, 6, 7, 10]
    assert len({(row.table, row.title) for row in rows}) == len(rows)
    for row in rows:
        recipe = config.read_recipe(row.recipe)
        names = set(RunSettings.__dataclass_fields__)
        assert set(row.settings) <= names
        assert "objective" in {**recipe, **row.settings}
        config.validate(dataclasses.replace(tables.settings_of(row), originals_only=row.table in (3, 4)))
        clean, _, robust, _ = row.paper
        assert 0 < robust < clean < 100


def test_numbers_of_a_file() -> None:
    value = {"a": [1.23456789, math.nan], 2: (True, None, 3)}
    assert rounded(value) == {"a": [1.2346, None], "2": [True, None, 3]}


def test_figures_on_the_toy(call: Call, tmp_path: Path) -> None:
    ending: Ending = call("figures", "fig1", "fig2", "fig3", "fig6", "--quick", "--out", "made")
    assert ending.status == 0, ending.err
    for name in ("fig1", "fig2", "fig3", "fig6"):
        assert (tmp_path / "made" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "made" / f"{name}.svg").exists()
        written = json.loads((tmp_path / "made" / f"{name}.json").read_text())
        assert written["quick"]
        assert written["seeds"] == [0]
        assert {claim["verdict"] for claim in written["claims"]} <= {"pass", "fail"}
        assert all(claim["found"] for claim in written["claims"])
        assert written["command"].startswith("python -m training.figures fig1 fig2")
    assert "FAIL" in ending.out  # eight steps reach nothing
    theorem = [c for c in written["claims"] if c["claim"].startswith("Corollary 1")]
    assert theorem[0]["verdict"] == "pass"


def test_the_page_says_what_the_files_say() -> None:
    docs = Path(figures.__file__).parents[2] / "docs"
    page = (docs / "figures.md").read_text()
    files = sorted((docs / "figures" / "paper").glob("*.json"))
    assert [path.stem for path in files] == ["certified", "fig1", "fig2", "fig3", "fig4", "fig6"]
    for path in files:
        written = json.loads(path.read_text())
        assert not written["quick"]
        assert table(written["claims"]) in page, path.name


def test_semantic_gradients_accuracy_under_noise_and_tables(call: Call, tmp_path: Path) -> None:
    ending = call("figures", "fig4", "certified", "tables", "--quick", "--out", "made")
    assert ending.status == 0, ending.err
    written = json.loads((tmp_path / "made" / "fig4.json").read_text())
    assert len(written["claims"]) == len(figure_4.KINDS)
    assert set(written["numbers"]["cosines"]) == {"standard seed 0", "robust seed 0"}
    assert "not run" in (tmp_path / "made" / "tables.md").read_text()
    under_noise = json.loads((tmp_path / "made" / "certified.json").read_text())
    assert len(under_noise["claims"]) == 4
    methods = under_noise["numbers"]["methods"]
    assert list(methods) == list(certified.METHODS)
    for (found,) in methods.values():
        assert found["accuracy"] == sorted(found["accuracy"], reverse=True), "a larger radius certifies no more"
        assert found["radius"][0] == 0


@pytest.mark.parametrize("name", ["fig1", "fig7"])
def test_a_quick_trial_writes_over_no_figure_but_a_trial(call: Call, tmp_path: Path, name: str) -> None:
    source = ["--model-from", "test_figures:untrained", "--data", "digits", "--eps", "0.1"] if name == "fig7" else []
    trial = ["figures", name, *source, "--quick", "--out", "made"]
    ending = call(*trial)
    assert ending.status == 0, ending
    assert ending.out.startswith("a quick trial, to see that it runs: its numbers and verdicts mean nothing\n")
    path = tmp_path / "made" / f"{name}.json"
    written = json.loads(path.read_text())
    assert written["quick"]
    assert call(*trial).status == 0, "of a trial before"
    whole = [json.dumps({**written, "quick": False}), json.dumps({k: v for k, v in written.items() if k != "quick"})]
    for text in whole:
        path.write_text(text)
        pictures = {found: found.read_bytes() for found in path.parent.iterdir()}
        ending = call(*trial)
        assert (ending.status, ending.out) == (2, ""), ending
        told = f"quick: made/{name}.json is of a whole figure, give a quick trial another folder with --out"
        assert told in ending.err
        assert {found: found.read_bytes() for found in path.parent.iterdir()} == pictures


def test_the_picture_of_a_quick_trial_says_so(tmp_path: Path) -> None:
    for quick in (True, False):
        figure, _ = plt.subplots()
        save("some", Result(figure, [], {}), tmp_path, {"quick": quick})
        assert [text.get_text() for text in figure.texts] == (["quick trial"] if quick else [])


def test_the_name_of_a_folder_is_no_formula_and_fits_over_its_gradients() -> None:
    gradients = {kind: torch.rand(2, 1, 8, 8) for kind in figure_4.KINDS}
    titles = {"$5_$10": gradients, "a-run-with-everything-that-one-might-say-about-it-in-its-name": gradients}
    figure = figure_4.draw(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), titles, (-2.0, 3.0))
    assert figure.axes[0].images[0].get_clim() == (-2.0, 3.0)
    figure.savefig(io.BytesIO())
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    headings = [axes.title for axes in figure.axes if len(axes.get_title().strip().splitlines()) == 2]
    assert headings[0].get_text().startswith("$5_$10\n")
    assert headings[1].get_text().startswith("a-run-with-everything")
    first, second = (title.get_window_extent(renderer) for title in headings)
    assert first.x1 < second.x0
    assert second.width < 3 * 1.05 * figure.dpi
    plt.close(figure)


def untrained(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    return models.build("digits_cnn", input_shape, num_classes)


def test_a_classifier_of_ones_own(call: Call, tmp_path: Path) -> None:
    source = ["--model-from", "test_figures:untrained", "--data", "digits"]
    ending = call("figures", "fig4", "fig7", *source, "--eps", "0.1", "--quick", "--out", "made")
    assert ending.status == 0, ending.err
    written = json.loads((tmp_path / "made" / "fig4.json").read_text())
    assert written["claims"] == []
    assert len(written["numbers"]["cosines"]) == 1
    assert json.loads((tmp_path / "made" / "fig7.json").read_text())["attack"] == "obfuscation"
    assert (tmp_path / "made" / "fig7.png").read_bytes().startswith(b"\x89PNG")
    assert ending.out.count("a quick trial, to see that it runs: its numbers and verdicts mean nothing\n") == 2


def test_every_option_is_for_something() -> None:
    options = {field.name for field in dataclasses.fields(program.FigureSettings)}
    assert set(program.USES) == options - {"names", "out"}
    assert {name for names in program.USES.values() for name in names} == {*program.FIGURES, *program.FILES}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig9"], "names: 'fig9' is unknown, allowed: fig1, fig2, fig3, fig4, fig6, certified, fig7, tables"),
        (["fig1", "--seeds", "1", "1"], "seeds: (1, 1) is out of range, allowed: one or more different seeds from 0"),
        (["fig1", "--run", "x"], "run: is for fig4 and fig7, got fig1"),
        (["fig4", "--run", "x", "--model-from", "y"], "run, model_from: both given, expected one of them"),
        (["fig4", "--run", "nowhere"], "run: nowhere holds no config.toml, expected the folder of a run"),
        (["fig4", "--data", "digits"], "data: digits is for --model-from, which is not given"),
        (["fig7"], "run, model_from: none given, fig7 needs a trained classifier by one of them"),
        (["fig1", "fig7"], "run, model_from: none given, fig7 needs a trained classifier by one of them"),
        (["--runs", "none"], "runs: none is not a folder, expected one with runs of training.run"),
        (["fig4", "--score-from", "none.pt"], "score_from: none.pt: no such file"),
        (["fig7", "--model-from", "x"], "eps: none given, fig7 needs it with --model-from"),
        (["fig1", "--images", "7"], "images: is for fig4, got fig1"),
        (["fig1", "--data", "digits"], "data: is for fig4 and fig7, got fig1"),
        (["fig1", "--data-root", "x"], "data_root: is for fig4 and fig7, got fig1"),
        (["fig4", "--data-root", "x"], "data_root: x is for --run and --model-from, none of which is given"),
        (["fig4", "--jobs", "2"], "jobs: is for fig1 and fig2 and fig3 and fig6 and certified, got fig4"),
        (["fig4", "--run", "x", "--seeds", "1"], "seeds: (1,) with --run or --model-from, allowed: without, as noth"),
        (["tables", "--seeds", "1"], "seeds: is for fig1 and fig2 and fig3 and fig6 and certified and fig4, got tabl"),
        (["tables", "--quick"], "quick: is for fig1 and fig2 and fig3 and fig6 and certified and fig4 and fig7, got"),
        (
            ["fig1", "--quick", "--seeds", "1", "2"],
            "seeds: (1, 2) with --quick, which takes one seed, 6 images and one",
        ),
        (["fig4", "--quick", "--images", "9"], "images: 9 with --quick, which takes one seed, 6 images and one job"),
        (["fig1", "--quick", "--jobs", "2"], "jobs: 2 with --quick, which takes one seed, 6 images and one job"),
        (["fig4", "--images", "2"], "images: 2 is out of range, allowed: at least 6, which are shown"),
        (["tables", "--runs", "."], "runs: . holds no finished run, expected config.toml and summary.json"),
        (["tables", "--runs", "none"], "runs: none is not a folder, expected one with runs of training.run"),
    ],
)
def test_bad_input(call: Call, arguments: list[str], message: str) -> None:
    ending = call("figures", *arguments)
    assert ending.status == 2
    assert not list(Path().glob("runs/figures/*")), "nothing is made before"
    assert message in ending.err
    assert ending.err.count("\n") == 1
