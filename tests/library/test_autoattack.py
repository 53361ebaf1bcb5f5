"""AutoAttack: the drop-in surface, verdicts independent of batches and interruptions, models left as found."""

import inspect
import json
import math
import random
import warnings
from contextlib import nullcontext
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from library_autoattack import COUNT, EPS, attack, data, verdict
from library_models import small_cnn
from torch import Tensor, nn
from torch.multiprocessing import start_processes

from scorematch import PGD, AutoAttack
from scorematch.attacks import APGD, AutoAttackWarning, EvaluationState, inspection
from scorematch.attacks.accounting import Cost
from scorematch.attacks.classifier import Classifier
from scorematch.attacks.losses import dlr_loss
from scorematch.attacks.report import stage_line
from scorematch.intervals import wilson
from scorematch.threat_model import ORDERS


def test_signature_is_that_of_the_official_class() -> None:
    parameters = inspect.signature(AutoAttack).parameters
    positional = [p.name for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == [
        *("model", "norm", "eps", "seed", "verbose", "attacks_to_run", "version", "is_tf_model", "device", "log_path")
    ]
    assert (parameters["norm"].default, parameters["eps"].default) == ("Linf", 0.3)
    run = inspect.signature(AutoAttack.run_standard_evaluation).parameters
    assert list(run)[1:] == ["x_orig", "y_orig", "bs", "return_labels", "state_path"]
    individual = inspect.signature(AutoAttack.run_standard_evaluation_individual).parameters
    assert list(individual)[1:] == list(run)[1:]
    curve, clean = (inspect.signature(f).parameters for f in (AutoAttack.accuracy_curve, AutoAttack.clean_accuracy))
    assert [call["bs"].default for call in (run, individual, curve, clean)] == [250] * 4


@pytest.mark.parametrize("norm", list(EPS))
def test_report_and_points_agree(norm: str) -> None:
    model, x, y = data()
    adversary = attack(model, norm)
    x_adv, labels = adversary.run_standard_evaluation(x, y, bs=16, return_labels=True)
    stands = verdict(model, x_adv, y)
    report = adversary.report
    assert report["clean_accuracy"] == (COUNT - 2) / COUNT
    assert report["robust_accuracy"] == stands.double().mean().item()
    assert 0 < stands.sum() < COUNT - 2, "the test needs survivors and fallen"
    assert torch.equal(labels, model(x_adv).argmax(1))
    assert torch.equal(x_adv[stands], x[stands])
    assert torch.equal(x_adv[:2], x[:2]), "points that are wrong from the start are not attacked"
    distance = (x_adv - x).flatten(1)
    assert distance.norm(dim=1, p=ORDERS[norm.lower()]).max() <= EPS[norm] + 1e-9
    accuracies = [report["clean_accuracy"], *(a["accuracy"] for a in report["attacks"].values())]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] == report["robust_accuracy"]
    assert list(report["attacks"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert report["robust_interval"] == list(wilson(int(stands.sum()), COUNT))
    assert report["attacks"]["square"]["backwards"] == 0
    assert report["attacks"]["apgd-ce"]["backwards"] > 0
    json.dumps(report)


@pytest.mark.parametrize("norm", list(EPS))
def test_batch_size_and_company_do_not_matter(norm: str) -> None:
    model, x, y = data()
    whole = attack(model, norm).run_standard_evaluation(x, y, bs=COUNT)
    small = attack(model, norm).run_standard_evaluation(x, y, bs=7)
    torch.testing.assert_close(small, whole, rtol=0, atol=1e-9)


def test_each_seed_is_another_run() -> None:
    model, x, y = data()
    one, two = (attack(model, seed=seed).run_standard_evaluation(x, y) for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("rng", ["keyed", "reference"])
def test_individual_evaluation_attacks_every_correct_sample(rng: str) -> None:
    model, x, y = data()
    adversary = attack(model, rng=rng)
    together = adversary.run_standard_evaluation(x, y)
    results = adversary.run_standard_evaluation_individual(x, y, return_labels=True)
    assert list(results) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    fallen = {name: ~verdict(model, x_adv, y) for name, (x_adv, _) in results.items()}
    if rng == "keyed":  # a sample falls in the ensemble if and only if some attack alone fools it
        union = torch.stack(list(fallen.values())).any(0)
        assert torch.equal(union, ~verdict(model, together, y))
    assert torch.equal(fallen["apgd-ce"] | ~fallen["apgd-ce"], torch.ones(COUNT, dtype=torch.bool))
    assert adversary.report["square"]["robust_accuracy"] == 1 - fallen["square"].double().mean().item()


class Killed(BaseException):
    pass


class Killer(nn.Module):
    """A model that dies at a given call."""

    def __init__(self, model: nn.Module, at: int) -> None:
        super().__init__()
        self.model, self.at, self.calls = model, at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise Killed
        return self.model(x)


@pytest.mark.parametrize(("norm", "rng"), [("Linf", "keyed"), ("L2", "keyed"), ("L1", "keyed"), ("Linf", "reference")])
def test_killed_20_times_gives_the_same_verdicts(norm: str, rng: str, tmp_path: Path) -> None:
    model, x, y = data()
    undisturbed = Killer(model, 0)
    expected = attack(undisturbed, norm, rng=rng).run_standard_evaluation(x, y, bs=16)
    state_path, draw = tmp_path / "state.pt", random.Random(0)
    kills, resumed_square = 0, 0
    while True:
        killer = Killer(model, draw.randint(20, undisturbed.calls // 4) if kills < 20 else 0)
        adversary = attack(killer, norm, rng=rng, save_every=0)
        if state_path.exists():
            resumed_square += torch.load(state_path, weights_only=True)["search"] is not None
        try:
            actual = adversary.run_standard_evaluation(x, y, bs=16, state_path=state_path)
            if kills >= 20:
                break
            state_path.unlink()  # it came through: once more from the start
        except Killed:
            kills += 1
    assert torch.equal(actual, expected)
    assert rng == "reference" or resumed_square > 0, "no kill hit Square"
    assert adversary.report["robust_accuracy"] == verdict(model, expected, y).double().mean().item()


def test_a_finished_state_gives_the_whole_result_again(tmp_path: Path) -> None:
    model, x, y = data()
    adversary = attack(model)
    expected = adversary.run_standard_evaluation(x, y, state_path=tmp_path / "state.pt")
    report = adversary.report
    again = attack(model, seed=None)
    assert torch.equal(again.run_standard_evaluation(x, y, state_path=str(tmp_path / "state.pt")), expected)
    assert again.report["robust_accuracy"] == report["robust_accuracy"]
    assert again.report["seed"] == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "state.pt"]


def test_states_of_other_evaluations_are_refused(tmp_path: Path) -> None:
    model, x, y = data()
    path = tmp_path / "state.pt"
    attack(model, version="custom", attacks_to_run=["apgd-ce"]).run_standard_evaluation(x, y, state_path=path)
    saved = path.read_bytes()
    other = small_cnn(seed=1).double().eval()
    cases = [
        (attack(other, version="custom", attacks_to_run=["apgd-ce"]), x, y, "another model"),
        (attack(model, version="custom", attacks_to_run=["apgd-ce"]), x.flip(3), y, "another data set"),
        (attack(model, version="custom", attacks_to_run=["apgd-ce"], eps=0.05), x, y, "another eps: 0.03, now 0.05"),
        (attack(model, version="custom", attacks_to_run=["square"]), x, y, "another list of attacks"),
        (attack(model, version="custom", attacks_to_run=["apgd-ce"], seed=4), x, y, "another seed: 0, now 4"),
    ]
    for adversary, images, labels, message in cases:
        with pytest.raises(ValueError, match=message):
            adversary.run_standard_evaluation(images, labels, state_path=path)
    assert path.read_bytes() == saved
    for content in (b"", b"not a state", saved[: len(saved) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a readable state of an evaluation"):
            attack(model).run_standard_evaluation(x, y, state_path=path)
        assert path.read_bytes() == content
    torch.save({"weights": x}, path)
    with pytest.raises(ValueError, match=r"is not a state of an evaluation by scorematch.AutoAttack"):
        attack(model).run_standard_evaluation(x, y, state_path=path)


def test_model_is_left_as_found() -> None:
    model, x, y = data(batch_norm=True)
    model.train()
    model[0].eval()
    model[0].weight.requires_grad_(False)
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(AutoAttackWarning, match="training mode"):
        attack(model).run_standard_evaluation(x, y)
    assert model.training
    assert not model[0].training
    assert not model[0].weight.requires_grad
    assert model[-1].weight.requires_grad
    assert torch.equal(model[-1].weight.grad, torch.ones_like(model[-1].weight))
    assert model[-1].bias.grad is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_changed_buffers_are_restored() -> None:
    model, x, y = data()

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.model(x)

    counting = Counting()
    with pytest.warns(AutoAttackWarning, match="changes its buffers while it predicts \\(calls\\)"):
        attack(counting, version="custom", attacks_to_run=["apgd-ce"]).run_standard_evaluation(x, y)
    assert counting.calls == 0
    adversary = attack(counting, version="custom", attacks_to_run=["apgd-ce"])
    calls = (
        lambda: adversary.apgd.perturb(x),
        lambda: adversary.clean_accuracy(x, y),
        lambda: adversary.apgd(counting, x, y),
        lambda: PGD(adversary.threat_model, steps=2)(counting, x, y),
    )
    for call in calls:
        call()
        assert counting.calls == 0


def test_labels_that_are_no_classes_have_no_accuracy() -> None:
    model, x, y = data()
    with pytest.raises(ValueError, match=r"y_orig must lie in 0 … 9, as the model has 10 classes, got 0 … 100"):
        attack(model).clean_accuracy(x, torch.where(y == y.max(), 100, 0 * y))


class Positions(nn.Module):
    """Keeps a buffer as long as the batch: a new tensor each time, or the same one of another size."""

    def __init__(self, model: nn.Module, *, in_place: bool) -> None:
        super().__init__()
        self.model, self.in_place = model, in_place
        self.register_buffer("positions", torch.zeros(2, 1, 1, 1), persistent=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if len(self.positions) != len(x):
            fitting = torch.zeros(len(x), 1, 1, 1)
            if self.in_place:
                self.positions.data = fitting
            else:
                self.positions = fitting
        return self.model(x + self.positions)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_buffer_may_change_its_shape(in_place: bool, tmp_path: Path) -> None:
    model, x, y = data()
    positions = Positions(model, in_place=in_place)
    before = positions.positions
    adversary = attack(positions, version="custom", attacks_to_run=["apgd-ce"])
    with pytest.warns(AutoAttackWarning, match=r"changes its buffers while it predicts \(positions\)"):
        adversary.run_standard_evaluation(x, y, state_path=tmp_path / "state.pt")
    assert positions.positions is before
    assert torch.equal(before, torch.zeros(2, 1, 1, 1))
    assert EvaluationState.from_disk(tmp_path / "state.pt").robust.tolist() == adversary.report["robust"]


def test_a_buffer_of_nan_is_unchanged(recwarn: pytest.WarningsRecorder) -> None:
    model, x, y = data()
    model.register_buffer("unknown", torch.tensor([math.nan, 1.0]))
    attack(model, version="custom", attacks_to_run=["apgd-ce"]).run_standard_evaluation(x, y)
    assert not recwarn


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(classes: int) -> None:
    model, x, y = data(classes)
    adversary = attack(model)
    with pytest.warns(AutoAttackWarning, match=f"try {classes - 1} classes instead of 9") as caught:
        x_adv = adversary.run_standard_evaluation(x, y)
    texts = " ".join(str(w.message) for w in caught)
    assert ("with 2 classes DLR is undefined" in texts) == (classes == 2)
    assert ("targeted DLR is undefined" in texts) == (classes == 3)
    assert verdict(model, x_adv, y).double().mean() == adversary.report["robust_accuracy"] < 1


def test_versions() -> None:
    model, x, y = data()
    assert AutoAttack(model).attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    plus = attack(model, version="plus")
    assert plus.attacks_to_run == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert (plus.apgd.n_restarts, plus.fab.n_restarts, plus.apgd_targeted.n_restarts) == (5, 5, 1)
    assert AutoAttack(model, version="rand").apgd.eot_iter == 20
    standard, fast, best = attack(model), attack(model, version="fast"), attack(model, version="plus")
    results = [a.run_standard_evaluation(x, y) for a in (fast, standard, best)]
    accuracies = [float(verdict(model, r, y).double().mean()) for r in results]
    assert accuracies == sorted(accuracies, reverse=True)
    assert list(fast.report["attacks"]) == ["apgd-ce", "apgd-t"]
    custom = attack(model, version="custom")
    custom.attacks_to_run = ["apgd-dlr", "fab"]
    custom.apgd.n_restarts = 2
    custom.run_standard_evaluation(x, y)
    assert list(custom.report["attacks"]) == ["apgd-dlr", "fab"]


def test_randomised_model_with_rand() -> None:
    model, x, y = data()

    def noisy(images: Tensor) -> Tensor:
        return model(images + 0.001 * torch.randn_like(images))

    with pytest.warns(AutoAttackWarning, match='randomised: its outputs differ from pass to pass; use version="rand"'):
        attack(noisy, version="fast").run_standard_evaluation(x, y)
    rand = attack(noisy, version="rand")
    rand.apgd.eot_iter = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", AutoAttackWarning)
        rand.run_standard_evaluation(x, y)
    assert rand.report["robust_accuracy"] < rand.report["clean_accuracy"]


def test_points_that_are_wrong_already_raise_no_doubt() -> None:
    """Where the true class has the third largest logit the DLR loss is constant."""
    model, x, _ = data()
    model, x = model.float(), x.float()
    third = model(x).topk(3).indices[:, 2]
    classifier = Classifier(model)
    assert not classifier.gradient(x, dlr_loss, third)[2].any()
    assert inspection.zero_gradients(classifier, x, third) is None


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda model: lambda x: model(x).softmax(1), "seems to return probabilities"),
        (lambda model: lambda x: model((x * 8).round() / 8), "points with zero gradient"),
    ],
)
def test_doubtful_models_are_warned_of(wrap, message: str) -> None:
    model, x, _ = data()
    doubtful = wrap(model)
    with pytest.warns(AutoAttackWarning, match=message):
        attack(doubtful, version="custom", attacks_to_run=["apgd-ce"]).run_standard_evaluation(x, doubtful(x).argmax(1))


def test_dynamic_defence_is_warned_of() -> None:
    model, x, y = data()

    def purify(images: Tensor) -> Tensor:
        with torch.enable_grad():
            point = images.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(model(point).logsumexp(1).sum(), point)
        return model(images + 0.01 * gradient)

    with pytest.warns(AutoAttackWarning, match="takes gradients while it predicts"):
        attack(purify, version="custom", attacks_to_run=["apgd-ce"]).run_standard_evaluation(x, y)


def test_square_that_finds_what_gradients_did_not_is_warned_of() -> None:
    """Rounded inputs: gradients are zero everywhere, random search still works."""
    model, x, _ = data()

    def rounded(images: Tensor) -> Tensor:
        return model((images * 50).round() / 50)

    labels = rounded(x).argmax(1)
    for options in ({}, {"version": "custom", "attacks_to_run": ["apgd-ce", "square"]}):
        with pytest.warns(AutoAttackWarning, match="Square lowered the robust accuracy by"):
            attack(rounded, eps=0.1, **options).run_standard_evaluation(x, labels)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        alone = attack(rounded, eps=0.1, version="custom", attacks_to_run=["square"])
        alone.run_standard_evaluation(x, labels)
    assert not any("Square" in str(warning.message) for warning in told)
    assert inspection.masking(0.5, 0.499) is None
    assert (inspection.masking(0.5, 0.375) or "").startswith("Square lowered the robust accuracy by 12.50 points")


@pytest.mark.parametrize("norm", list(EPS))
def test_batch_norm_is_folded_in_the_search_alone(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = data(batch_norm=True)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    y[2:] = model(x[2:]).argmax(1)
    calls = []  # (whether within a search, whether the batch norm is passed by)
    searching = False
    apgd_part = APGD.run_part

    def run_part(*arguments):
        nonlocal searching
        searching = True
        result = apgd_part(*arguments)
        searching = False
        return result

    monkeypatch.setattr(APGD, "run_part", run_part)
    hook = model[1].register_forward_hook(lambda module, inputs, output: calls.append((searching, output is inputs[0])))
    fast = attack(model, norm, version="fast")
    fast.run_standard_evaluation(x, y)
    begun = calls.index((True, True))  # the model is looked at before
    assert set(calls[begun:]) == {(True, True), (False, False)}
    for options in ({"rng": "reference", "version": "fast"}, {"version": "rand"}):
        calls.clear()
        attack(model, norm, **options).run_standard_evaluation(x, y)
        assert set(calls) == {(True, False), (False, False)}, options
    hook.remove()
    folded = attack(model, norm)
    expected = folded.run_standard_evaluation(x, y)
    monkeypatch.setattr("scorematch.attacks.evaluation.folded_copy", lambda model, x: nullcontext())
    unfolded = attack(model, norm)
    torch.testing.assert_close(unfolded.run_standard_evaluation(x, y), expected, rtol=0, atol=1e-6)
    assert 0 < folded.report["robust_accuracy"] < folded.report["clean_accuracy"]


def test_only_confirmed_successes_of_a_search_in_low_precision_count() -> None:
    model, x, y = data()
    model, x = model.float(), x.float()

    def deceptive(images: Tensor) -> Tensor:
        """In bfloat16 everything looks misclassified."""
        logits = model(images)
        return -logits if torch.is_autocast_enabled("cpu") else logits

    adversary = attack(deceptive, search_dtype=torch.bfloat16, version="custom", attacks_to_run=["apgd-ce"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AutoAttackWarning)
        x_adv = adversary.run_standard_evaluation(x, y)
    report = adversary.report["attacks"]["apgd-ce"]
    assert report["unverified"] > 0
    assert adversary.report["robust_accuracy"] == verdict(model, x_adv, y).double().mean().item()
    honest = attack(model, search_dtype=torch.bfloat16)
    x_adv = honest.run_standard_evaluation(x, y)
    assert honest.report["robust_accuracy"] == verdict(model, x_adv, y).double().mean().item()
    exact = attack(model)
    exact.run_standard_evaluation(x, y)
    assert abs(exact.report["robust_accuracy"] - honest.report["robust_accuracy"]) <= 0.05


@pytest.mark.parametrize(
    ("mine", "told"), [(range(COUNT), ""), (range(COUNT // 2), f" (rank 0's {COUNT // 2} samples)")]
)
def test_a_line_says_of_which_samples_it_is(mine: range, told: str) -> None:
    _, x, y = data()
    state = EvaluationState.new({}, x, y)
    state.costs["apgd-ce"] = Cost(seconds=2.0)
    line = stage_line(state, 0, "apgd-ce", torch.tensor(mine))
    assert line.startswith("robust accuracy after apgd-ce: 100.00 %")
    assert line.partition(", 2.0 s")[2] == told


def test_callables_and_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, x, y = data()
    adversary = attack(model.forward, verbose=True, log_path=tmp_path / "log.txt")
    adversary.run_standard_evaluation(x, y)
    printed, logged = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    assert printed == logged
    assert "clean accuracy: 95.00 %" in logged
    for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
        assert f"robust accuracy after {name}: " in logged
    assert adversary.clean_accuracy(x, y, bs=16) == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "L3"}, "norm must be Linf, L2 or L1, got 'L3'"),
        ({"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        ({"version": "strongest"}, "version must be one of standard, plus, rand, fast, custom, got 'strongest'"),
        ({"attacks_to_run": ["square"]}, "attacks_to_run is for version=\"custom\", got version='standard'"),
        ({"is_tf_model": True}, "is_tf_model: TensorFlow models are not supported"),
        ({"seed": -1}, "seed must be a number from 0"),
        ({"seed": 2**63}, "seed must be a number from 0"),
        ({"rng": "official"}, "rng must be one of keyed, reference, got 'official'"),
        ({"search_dtype": torch.float64}, "search_dtype must be None, torch.bfloat16 or torch.float16"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoAttack(small_cnn(), **options)


def test_bad_data(tmp_path: Path) -> None:
    model, x, y = data()
    run = attack(model).run_standard_evaluation
    cases = [
        (x * 1.5, y, r"x_orig must lie in the box \[0.0, 1.0\]"),
        (x, y + 9, r"y_orig must lie in 0 … 9, as the model has 10 classes, got \d+ … \d+"),
        (x, y - 1 - y.min(), "y_orig must lie in 0 … 9"),
        (x, y.double(), "y_orig must be class indices of an integer dtype, got torch.float64"),
        (x.half(), y, r"x_orig must be float32 or float64 in \[0, 1\], got torch.float16$"),
        ((255 * x).byte(), y, r"got torch.uint8; divide pixels in 0…255 by 255: x_orig.float\(\) / 255$"),
        (x[:5], y, r"x_orig must be \[N, …\] and y_orig \[N\]"),
        (x[0, 0, 0, 0], y, r"x_orig must be \[N, …\], got the single number"),
        (x[:0], y[:0], "x_orig is empty, nothing can be evaluated"),
        (x.flatten(1), y, r"square takes images \[N, C, H, W\], got x_orig of shape \[40, 64\]"),
        (x.where(x > 0.1, math.nan), y, "x_orig must lie in the box"),
    ]
    for images, labels, message in cases:
        with pytest.raises(ValueError, match=message):
            run(images, labels, state_path=tmp_path / "state.pt")
    with pytest.raises(ValueError, match="bs must be a whole number, at least 1, got 0"):
        run(x, y, bs=0)
    with pytest.raises(ValueError, match="attacks_to_run is empty; choose among apgd-ce"):
        attack(model, version="custom").run_standard_evaluation(x, y)
    with pytest.raises(ValueError, match="attacks_to_run: 'pgd' is none of apgd-ce"):
        attack(model, version="custom", attacks_to_run=["pgd"]).run_standard_evaluation(x, y)
    assert not (tmp_path / "state.pt").exists()


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda z: z * math.nan, "the model returned NaN for 40 of 40 points"),
        (lambda z: z[:, 0], r"the model must return logits \[N, L\] with L >= 2, got \[40\]"),
        (lambda z: z[:-1], r"the model must return logits \[N, L\] with L >= 2, got \[39, 10\]"),
        (lambda z: (z, z), r"must return a tensor of logits \[N, L\], got tuple"),
    ],
)
def test_bad_models(wrap, message: str) -> None:
    model, x, y = data()
    with pytest.raises(ValueError, match=message):
        attack(lambda images: wrap(model(images))).run_standard_evaluation(x, y)


def test_a_model_that_turns_to_nan_on_the_way_keeps_what_was_found(tmp_path: Path) -> None:
    model, x, y = data()
    calls = 0

    def failing(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(images) * (math.nan if calls > 150 else 1.0)

    path = tmp_path / "state.pt"
    with pytest.raises(ValueError, match="returned NaN"):
        attack(failing).run_standard_evaluation(x, y, state_path=path)
    state = torch.load(path, weights_only=True)
    assert 0 < int(state["robust"].sum()) < COUNT - 2


def _evaluate_share(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    model, x, y = data()
    adversary = attack(model, share_samples=True)
    x_adv, labels = adversary.run_standard_evaluation(
        x, y, bs=8, return_labels=True, state_path=Path(folder) / "state.pt"
    )
    torch.save((x_adv, labels, adversary.report["robust_accuracy"]), f"{folder}/result{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_result_of_one(processes: ForkServerContext, tmp_path: Path) -> None:
    model, x, y = data()
    adversary = attack(model)
    expected, labels = adversary.run_standard_evaluation(x, y, return_labels=True)
    start_processes(_evaluate_share, (2, str(tmp_path)), nprocs=2, start_method="forkserver")
    for rank in range(2):
        x_adv, predicted, robust_accuracy = torch.load(tmp_path / f"result{rank}.pt")
        torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-9)
        assert torch.equal(predicted, labels)
        assert robust_accuracy == adversary.report["robust_accuracy"]
        assert (tmp_path / f"state.pt.rank{rank}of2").exists()


def test_compiled_search_finds_the_same() -> None:
    model, x, y = data()
    model, x = model.float(), x.float()
    plain, compiled = attack(model, version="fast"), attack(model, version="fast", compile=True)
    plain.run_standard_evaluation(x, y)
    compiled.run_standard_evaluation(x, y)
    assert abs(plain.report["robust_accuracy"] - compiled.report["robust_accuracy"]) <= 0.03


def test_wilson() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="hits must lie between 0 and count"):
        wilson(3, 2)
