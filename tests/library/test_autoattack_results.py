"""What AutoAttack tells of an evaluation: verdicts of samples, tables, an evaluation that ran out of time."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from library_autoattack import COUNT, alone, attack, data, verdict
from torch.utils.data import DataLoader, TensorDataset

from scorematch.attacks import EvaluationState, evaluation
from scorematch.attacks.accounting import Cost
from scorematch.attacks.report import doubts_of, report_of, result_line


def test_verdicts_of_samples() -> None:
    model, x, y = data()
    adversary = attack(model)
    x_adv = adversary.run_standard_evaluation(x, y)
    report = adversary.report
    assert report["robust"] == verdict(model, x_adv, y).tolist()
    assert len(set(report["fallen_by"])) > 2, "several attacks, and None"
    for sample, name in enumerate(report["fallen_by"]):
        fell = not report["robust"][sample] and sample >= 2  # the first two are wrong from the start
        assert (name is not None) == fell
    standing = COUNT - 2
    for name, found in report["attacks"].items():
        standing -= report["fallen_by"].count(name)
        assert found["accuracy"] == standing / COUNT, name


def test_tables() -> None:
    model, x, y = data()
    adversary = attack(model)
    with pytest.raises(ValueError, match="run_standard_evaluation has made no report yet"):
        adversary.table()
    adversary.run_standard_evaluation(x, y)
    report = adversary.report
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in adversary.table().splitlines()]
    assert {len(line) for line in lines} == {6}
    assert [line[0] for line in lines] == ["after", "---", "clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert lines[2][1] == "95.00"
    for line, found in zip(lines[3:], report["attacks"].values(), strict=True):
        low, high = (100 * end for end in found["interval"])
        assert line[1:3] == [f"{100 * found['accuracy']:.2f}", f"{low:.1f} to {high:.1f}"]
        assert line[3:5] == [f"{found['forwards']:,}", f"{found['backwards']:,}"]
        assert float(line[5]) == pytest.approx(found["seconds"], abs=0.051)
    latex = adversary.table("latex").splitlines()
    assert (latex[0], latex[-1]) == (r"\begin{tabular}{lrrrrr}", r"\end{tabular}")
    rows = [line.removesuffix(r" \\").split(" & ") for line in latex if line.endswith(r"\\")]
    assert rows[1:] == lines[2:]
    assert all("%" not in cell.replace(r"\%", "") for cell in rows[0])
    with pytest.raises(ValueError, match="form must be markdown or latex, got 'html'"):
        adversary.table("html")


def test_batches_of_a_loader() -> None:
    model, x, y = data()
    adversary = alone(model, "apgd-ce")
    expected = adversary.run_standard_evaluation(x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    assert torch.equal(adversary.run_standard_evaluation(loader), expected)
    points, labels = adversary.run_standard_evaluation(iter(loader), return_labels=True)
    assert torch.equal(points, expected)
    assert torch.equal(labels, model(points).argmax(1))
    assert torch.equal(adversary.run_standard_evaluation_individual(loader)["apgd-ce"], expected)
    assert adversary.clean_accuracy(loader) == adversary.clean_accuracy(x, y)


def test_a_loader_that_shuffles_is_told() -> None:
    model, x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    adversary = alone(model, "apgd-ce")
    calls = [adversary.run_standard_evaluation, adversary.run_standard_evaluation_individual]
    for call in [*calls, partial(adversary.accuracy_curve, radii=[0.1])]:
        with pytest.warns(UserWarning, match="x_orig gives its samples in random order") as told:
            call(loader)
        assert __file__ in [warning.filename for warning in told]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adversary.clean_accuracy(loader)


def test_what_is_no_data() -> None:
    model, x, y = data()
    run = alone(model, "apgd-ce").run_standard_evaluation
    cases = [
        ((x, None), TypeError, "y_orig is missing"),
        (([(x, y)], y), TypeError, "x_orig must be a torch.Tensor where y_orig is given, got list"),
        (([], None), ValueError, "x_orig gives no batches"),
        (([x], None), TypeError, r"give batches \(x, y\) of tensors, got a Tensor"),
        (([(x, y), (x[:, :, :4], y)], None), ValueError, r"different shapes: \(1, 4, 8\), \(1, 8, 8\)"),
        ((3, None), TypeError, "y_orig is missing"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            run(*arguments)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_budget_stops_an_evaluation_and_the_next_one_goes_on(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = data()
    whole = attack(model)
    expected = whole.run_standard_evaluation(x, y)
    assert whole.report["complete"]
    assert {found["pending"] for found in whole.report["attacks"].values()} == {0}
    asked = 0

    def clock(started: float) -> float:
        nonlocal asked
        asked += 1
        return 0.0 if asked < 55 * workers else 10.0

    monkeypatch.setattr(evaluation, "seconds_since", clock)
    adversary = attack(model, budget=10, workers=workers)
    x_adv = adversary.run_standard_evaluation(x, y, state_path=tmp_path / "state.pt")
    report = adversary.report
    assert not report["complete"]
    assert report["robust"] == verdict(model, x_adv, y).tolist()
    assert whole.report["robust_accuracy"] < report["robust_accuracy"] < report["clean_accuracy"]
    pending = [found["pending"] for found in report["attacks"].values()]
    assert list(report["attacks"].values())[1]["forwards"] > 0, "what the batch cost that was given up"
    assert pending[0] == 0, "the first attack was through"
    assert pending[1:] == [sum(report["robust"])] * 3
    adversary.budget = None
    torch.testing.assert_close(
        adversary.run_standard_evaluation(x, y, state_path=tmp_path / "state.pt"), expected, rtol=0, atol=1e-9
    )
    assert adversary.report["complete"]


def test_a_budget_classifies_all_samples(capsys: pytest.CaptureFixture[str]) -> None:
    model, x, y = data()
    adversary = attack(model, budget=1e-9, verbose=True)
    assert torch.equal(adversary.run_standard_evaluation(x, y, bs=5), x)
    report = adversary.report
    assert report["robust_accuracy"] == report["clean_accuracy"] == (COUNT - 2) / COUNT
    assert [found["pending"] for found in report["attacks"].values()] == [COUNT - 2] * 4
    printed = capsys.readouterr().out
    assert "stopped: the budget of 1e-09 s is spent" in printed
    assert "robust accuracy, at most: 95.00 %" in printed


@pytest.mark.parametrize("budget", [0, -1.0, float("nan")])
def test_bad_budgets(budget: float) -> None:
    model, _, _ = data()
    with pytest.raises(ValueError, match="budget must be a positive number of seconds, or None"):
        attack(model, budget=budget)


def test_a_budget_in_which_nothing_ends_says_so(tmp_path: Path) -> None:
    model, x, y = data()
    options = {"budget": 1e-9, "workers": 1}
    warned = []
    for _ in range(2):
        adversary = attack(model, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adversary.run_standard_evaluation(x, y, state_path=tmp_path / "state.pt")
        warned.append([text for text in adversary.report["warnings"] if "no batch came to its end" in text])
    assert [len(texts) for texts in warned] == [0, 1], "the first call has classified the clean samples"
    assert "give a larger budget or a smaller bs" in warned[1][0]


def test_the_seconds_of_a_report_are_those_of_all_attacks() -> None:
    state = EvaluationState.new({}, torch.rand(2, 1), torch.arange(2))
    state.costs = {"clean": Cost(seconds=0.5), "apgd-ce": Cost(seconds=2.0), "square": Cost(seconds=1.5)}
    assert report_of(state, [])["seconds"] == 4.0


@pytest.mark.parametrize(("names", "doubtful"), [(("fab", "apgd", "square"), False), (("square", "fab"), True)])
def test_what_square_adds_is_judged_from_the_attack_before_it(names: tuple[str, ...], doubtful: bool) -> None:
    accuracies = {"fab": 0.5, "apgd": 0.3, "square": 0.3}
    report = {"clean_accuracy": 0.9, "attacks": {name: {"accuracy": accuracies[name]} for name in names}}
    state = EvaluationState.new({}, torch.rand(2, 1), torch.arange(2))
    assert any("Square lowered" in (doubt or "") for doubt in doubts_of(report, state)) == doubtful


def test_the_result_tells_the_largest_perturbation() -> None:
    x = torch.zeros(3, 2)
    state = EvaluationState.new({}, x, torch.arange(3))
    state.adversarial = torch.tensor([[0.0, 0.0], [-0.25, 0.1], [0.1, 0.0]])
    assert "; largest Linf perturbation 0.25000; " in result_line(report_of(state, []), state, x, "linf", "Linf")
