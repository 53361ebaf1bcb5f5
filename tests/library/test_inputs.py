"""The classic mistakes get an error that says what to do."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from scorematch import PGD, AutoAttack, FreeAttack, Normalised, ThreatModel, inputs, objectives
from scorematch.inputs import check_inputs
from scorematch.objectives import Outcome
from scorematch.posteriors import KernelDensity
from scorematch.smoothing import SmoothedClassifier

BALL = ThreatModel("linf", 0.1)
X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 3
DENSITY = KernelDensity(X, Y, num_classes=3, sigma=0.3)
OBJECTIVES = {
    "pgd_at": partial(objectives.pgd_at, threat_model=BALL, steps=1),
    "trades": partial(objectives.trades, threat_model=BALL, steps=1),
    "score_direct": partial(objectives.score_direct, threat_model=BALL, posterior=DENSITY, steps=1),
    "free": lambda *batch: FreeAttack(BALL).step(*batch),
}


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("x", "told"),
    [
        (255 * X, r"box \[0.0, 1.0\] of the threat model, got values in \[.*\]; divide pixels in 0…255 by 255"),
        (255 * X.masked_fill(X < 0.2, 0.0), r"got values in \[0.0, .*\]; divide pixels in 0…255 by 255"),
        ((X - 0.5) / 0.25, "if images are normalised, do that in the model"),
        (X + 2000, r"got values in \[2000.[0-9]*, 200[01].[0-9]*\]$"),
        (X.masked_fill(X > 0.9, math.nan), r"got values in \[nan, nan"),
    ],
    ids=["pixels", "black", "normalised", "far", "nan"],
)
def test_images_outside_the_box(name: str, x: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        OBJECTIVES[name](model(), x, Y)


@pytest.mark.parametrize(
    ("lower", "upper", "rounded", "outside"),
    [(0.0, math.inf, -5e-5, -0.01), (-math.inf, 1.0, 1.00005, 1.01)],
    ids=["lower", "upper"],
)
def test_a_box_with_one_bound(lower: float, upper: float, rounded: float, outside: float) -> None:
    half = ThreatModel("linf", 0.1, lower=lower, upper=upper)
    check_inputs(model(), X.index_fill(0, torch.tensor([2]), rounded), Y, half)
    with pytest.raises(ValueError, match="x must lie in the box"):
        check_inputs(model(), X.index_fill(0, torch.tensor([2]), outside), Y, half)


@pytest.mark.parametrize("name", [*OBJECTIVES, "standard", "gaussian"])
@pytest.mark.parametrize(
    ("x", "y", "error", "told"),
    [
        ((255 * X).byte(), Y, TypeError, r"got torch.uint8; divide pixels in 0…255 by 255: x.float\(\) / 255"),
        (X, Y.float(), TypeError, r"got torch.float32 \[N\]; y.long\(\) makes labels"),
        (X, Y.int(), TypeError, "got torch.int32"),
        (X, Y[:, None], TypeError, r"got torch.int64 \[6, 1\]; y\[:, 0\] makes labels"),
        (X, nn.functional.one_hot(Y), TypeError, r"y.argmax\(1\) makes labels of a one-hot code"),
        (X, Y[:5], ValueError, r"got x \[6, 1, 4, 4\] and y \[5\]"),
        (X.numpy(), Y, TypeError, "must be tensors, got ndarray"),
    ],
    ids=["bytes", "floats", "int32", "column", "one-hot", "short", "array"],
)
def test_odd_batches(name: str, x: Tensor, y: Tensor, error: type[Exception], told: str) -> None:
    others = {"standard": objectives.standard, "gaussian": partial(objectives.gaussian, sigma=0.1, gamma=0.5)}
    objective = {**OBJECTIVES, **others}[name]
    with pytest.raises(error, match=told):
        objective(model(), x, y)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_rounding_and_probabilities_are_fine(name: str) -> None:
    x = (X / X.amax()) * 1.00001 - 0.00001
    outcome: Outcome = OBJECTIVES[name](model(), x, nn.functional.one_hot(Y, 3).float())
    assert torch.isfinite(outcome.loss).all()
    assert len(OBJECTIVES[name](model(), X[:0], Y[:0]).loss) == 0


def test_values_of_a_gpu_are_looked_at_once_for_each_model() -> None:
    network, gpu = model(), torch.device("cuda")
    assert inputs._looks(network, gpu)
    check_inputs(network, X, Y, BALL)
    assert not inputs._looks(network, gpu)
    assert inputs._looks(model(), gpu)
    assert inputs._looks(network, torch.device("cpu"))
    x, y = X.to("meta"), Y.to("meta")
    check_inputs(model(), x, y, BALL)
    with pytest.raises(TypeError, match="uint8"):
        check_inputs(network, (255 * x).byte(), y, BALL)
    with pytest.raises(ValueError, match=r"got values in \[0"):
        check_inputs(network, 255 * X, Y, BALL)


def test_a_radius_in_pixel_values_stops_attacks_too() -> None:
    with pytest.raises(ValueError, match="for 8-bit pixels write 8/255"):
        AutoAttack(model(), "Linf", 8, verbose=False).run_standard_evaluation(X, Y)
    with pytest.raises(ValueError, match="for 8-bit pixels write 128/255"):
        AutoAttack(model(), "L2", 128, verbose=False).run_standard_evaluation(X, Y)
    with pytest.raises(ValueError, match="for 8-bit pixels write 128/255"):
        PGD(ThreatModel("l2", 128))(model(), X, Y)


@pytest.mark.parametrize("name", ["pgd_at", "trades", "score_direct", "free"])
def test_a_radius_that_suits_larger_images_stops_training(name: str) -> None:
    """The diagonal of one image of 16 pixels is 4, that of all six together 9.8."""
    wide = ThreatModel("l2", 5.0)
    told = "eps must not be larger than the diagonal of the box, 4 for 16 features, got 5; for 8-bit pixels write 5/255"
    objective = FreeAttack(wide).step if name == "free" else partial(OBJECTIVES[name], threat_model=wide)
    with pytest.raises(ValueError, match=told):
        objective(model(), X, Y)


def test_labels_that_are_no_tensor_are_named() -> None:
    with pytest.raises(TypeError, match="y must be a tensor, got ndarray"):
        PGD(BALL, steps=1)(model(), X, Y.numpy())


def test_attacks_made_for_a_model_are_told_what_they_take() -> None:
    for given in (model(), 0.1):
        with pytest.raises(TypeError, match="threat_model must be a ThreatModel, or have all of scorematch"):
            PGD(given)
    with pytest.raises(TypeError, match=r"steps must be a whole number, got 2\.5"):
        PGD(BALL, steps=2.5)


def smoothed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return SmoothedClassifier(model, num_classes=3, sigma=0.1).predict(x, n=5)


CALLERS = {
    **OBJECTIVES,
    "standard": objectives.standard,
    "gaussian": partial(objectives.gaussian, sigma=0.1),
    "PGD": PGD(BALL, steps=1),
    "AutoAttack": lambda model, x, y: AutoAttack(model.eval(), "Linf", 0.1, verbose=False).run_standard_evaluation(
        x, y
    ),
    "smoothing": smoothed,
}


@pytest.mark.parametrize("name", CALLERS)
@pytest.mark.parametrize(
    ("x", "told"),
    [
        (X.double(), r"float64 inputs \[\d+, 1, 4, 4\] on cpu \(mat1 and mat2 must have the same dtype.*"),
        (X[..., :3], r"float32 inputs \[\d+, 1, 4, 3\] on cpu \(mat1 and mat2 shapes cannot be multiplied.*"),
    ],
    ids=["float64", "shape"],
)
def test_inputs_that_the_model_is_not_made_for_are_named(name: str, x: Tensor, told: str) -> None:
    if name == "score_direct":  # whose posterior must take them
        density = KernelDensity(x, Y, num_classes=3, sigma=0.3)
        call = partial(objectives.score_direct, threat_model=BALL, posterior=density, steps=1)
    else:
        call = CALLERS[name]
    with pytest.raises(
        RuntimeError, match=rf"^the model failed on {told}\); its parameters are float32 on cpu$"
    ) as found:
        call(model(), x, Y)
    assert str(found.value.__cause__).startswith("mat1 and mat2")


def test_a_scripted_model_tells_the_reason_last() -> None:
    told = r"^the model failed on float64 inputs .* \(RuntimeError: .*; its parameters are float32 on cpu$"
    with pytest.raises(RuntimeError, match=told):
        PGD(BALL, steps=1)(torch.jit.trace(model().eval(), X), X.double(), Y)


def test_inputs_on_another_device_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"float32 inputs .* on cpu \(.*\); its parameters are float32 on meta$"):
        objectives.standard(model().to("meta"), X, Y)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "^CUDA out of memory$"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "^DefaultCPUAllocator"),
        (NotImplementedError("another day"), "^another day$"),
        (KeyError("missing"), "missing"),
    ],
)
def test_errors_that_say_enough_stay_as_they_are(error: Exception, told: str) -> None:
    def fails(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error), match=told) as found:
        PGD(BALL, steps=1)(fails, X, Y)
    assert found.value is error


def test_checks_of_the_package_within_a_model_stay_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"^x must be \[N, 3, …\], as mean and std have 3 channels"):
        PGD(BALL, steps=1)(Normalised(model(), [0.5] * 3, [0.2] * 3), X, Y)


def test_what_a_function_raises_is_told_beside_its_inputs() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("first line\nsecond line")

    with pytest.raises(ValueError, match=r"^the model failed on float32 inputs \[6, 1, 4, 4\] on cpu \(first line\)$"):
        PGD(BALL, steps=1)(fails, X, Y)


@pytest.mark.parametrize("name", [*OBJECTIVES, "standard", "gaussian"])
def test_labels_that_are_no_classes_are_those_of_the_caller(name: str) -> None:
    with pytest.raises(ValueError, match=r"^y must lie in \[0, 3\), got values in \[1, 3\]"):
        {**CALLERS, **OBJECTIVES}[name](model(), X, Y + 1)


@pytest.mark.parametrize("name", ["pgd_at", "trades", "free", "standard", "gaussian"])
@pytest.mark.parametrize(
    ("y", "error", "told"),
    [
        (torch.full((6, 3), 0.5), ValueError, r"probabilities .*, got values from 0\.5 on and sums in \[1\.5, 1\.5\]"),
        (
            torch.tensor([[1.5, -0.5, 0.0]] * 6),
            ValueError,
            r"probabilities .*, got values from -0\.5 on and sums in \[1, 1\]",
        ),
        (torch.full((6, 3), 1 / 3).double(), TypeError, r"torch\.float32 as the logits, got torch\.float64"),
        (torch.full((6, 4), 0.25), ValueError, r"labels \[N\] or probabilities \[6, 3\], got \[6, 4\]"),
    ],
    ids=["sums", "negative", "float64", "classes"],
)
def test_soft_labels_that_are_no_distributions(name: str, y: Tensor, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=f"^y must be {told}"):
        CALLERS[name](model(), X, y)
