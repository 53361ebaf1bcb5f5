"""The parts of AutoAttack's engine: schedule, accounts, voice, shares."""

import math
import warnings
from pathlib import Path

import pytest
import torch
from library_autoattack import alone, attack, data
from torch import Tensor

from scorematch import ThreatModel
from scorematch.attacks import APGD, FAB, AutoAttackWarning, Square, inspection
from scorematch.attacks.accounting import Cost, Ledger
from scorematch.attacks.classifier import Classifier
from scorematch.attacks.console import Console, Logger
from scorematch.attacks.schedule import passes_left, stages_of
from scorematch.attacks.sharing import Share, path_of_this_process

LINF = ThreatModel("linf", 0.1)


def test_the_order_of_the_parts() -> None:
    attacks = [APGD(LINF, loss="dlr-targeted"), FAB(LINF, n_restarts=2), Square(LINF)]
    keyed = stages_of(attacks, 4, "keyed")
    assert [(stage.attack.name, list(stage.parts)) for stage in keyed] == [
        *[("apgd-t", [part]) for part in range(3)],
        *[("fab-t", [part]) for part in range(6)],
        ("square", [0]),
    ]
    reference = stages_of(attacks, 4, "reference")
    assert [len(stage.parts) for stage in reference] == [3, 6, 1]


def test_passes_that_are_left() -> None:
    stages = stages_of([APGD(LINF, n_iter=9), Square(LINF, n_queries=99)], 10, "keyed")
    assert passes_left(stages, torch.tensor([-1, 0, 1, 2])) == 120 + 120 + 100 + 0
    assert passes_left(stages, torch.zeros(0, dtype=torch.int64)) == 0


def test_accounts() -> None:
    model, x, y = data()
    classifier, costs = Classifier(model), {}
    ledger = Ledger(costs, since=-math.inf)
    classifier.gradient(x, lambda z, y: z[:, 0] * math.nan, y)
    ledger.book("one", [classifier])
    classifier.logits(x)
    ledger.book("two", [classifier])
    assert (costs["one"].forwards, costs["one"].backwards, costs["one"].broken_gradients) == (40, 40, 40)
    assert (costs["two"].forwards, costs["two"].backwards, costs["two"].broken_gradients) == (40, 0, 0)
    assert costs["two"].seconds >= 0
    total = Cost(1, 2, 3, 4.0, 5)
    total.add(Cost(10, 20, 30, 3.0, 50))
    assert total == Cost(11, 22, 33, 4.0, 55)


def test_only_one_process_speaks_and_all_warn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for speaks in (False, True):
        console = Console(True, Logger(tmp_path / f"{speaks}.txt"), speaks)
        console.say("line")
        with pytest.warns(AutoAttackWarning, match="doubt"):
            console.warn("doubt")
        console.warn(None)
        assert console.warnings == ["doubt"]
        assert capsys.readouterr().out == ("line\nwarning: doubt\n" if speaks else "")
        assert (tmp_path / f"{speaks}.txt").exists() == speaks


@pytest.mark.parametrize(("verbose", "terminal"), [(True, True), (True, False), (False, True), (False, False)])
def test_progress_is_shown_where_somebody_looks(
    verbose: bool, terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    console = Console(verbose, Logger(tmp_path / "log.txt"), speaks=True)
    console.start_progress(10)
    console.advance(10)
    console.end_progress()
    assert ("pass" in capsys.readouterr().err) == (verbose and terminal)


def test_fab_leaves_samples_that_it_has_settled() -> None:
    """After a few steps all samples are misclassified, and it asks the model no more."""
    model, x, y = data()
    adversary = attack(model, version="custom", attacks_to_run=["fab"], eps=1.0)
    adversary.run_standard_evaluation(x, y)
    assert adversary.report["robust_accuracy"] == 0
    assert adversary.report["attacks"]["fab"]["forwards"] < 10 * len(x)  # 21 each if they stayed


def test_warnings_name_the_line_that_called_the_package() -> None:
    model, x, y = data(3)
    model.train()
    with pytest.warns(AutoAttackWarning) as caught:
        attack(model, version="fast").run_standard_evaluation(x, y)
    assert len(caught) >= 2
    assert {warning.filename for warning in caught} == {__file__}


def test_noise_in_small_logits_is_noticed() -> None:
    """Each sample's logits are judged by their own size, whatever those of the others are."""
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    fixed = torch.tensor([[3e4, 2e4, 1e4], [3e-3, 0.0, 1e-3]])
    passes = iter(range(10))

    def model(_: Tensor) -> Tensor:
        logits = fixed.clone()
        logits[1, 1] = 1e-4 * next(passes)
        return logits

    assert "differ from pass to pass" in (inspection.randomised(model, x, y) or "")
    assert inspection.randomised(lambda _: fixed, x, y) is None


def test_shares() -> None:
    shares = [Share(rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([share.samples(8) for share in shares]).sort().values, torch.arange(8))
    assert path_of_this_process(Path("a/state.pt")) == Path("a/state.pt")
    assert Share.of_this_process() == Share()


def test_every_attack_is_checked_before_the_first_runs() -> None:
    model, x, y = data()
    calls = 0

    def counted(images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model(images.view(-1, 1, 8, 8))

    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"square takes images \[N, C, H, W\]"),
    ):
        attack(counted).run_standard_evaluation_individual(x.flatten(1), y)
    assert calls == 0
    alone(counted, "apgd-ce").run_standard_evaluation_individual(x.flatten(1), y)
