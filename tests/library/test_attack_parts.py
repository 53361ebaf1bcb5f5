"""APGD, FAB and Square alone: exact on linear models, inside the ball, the same numbers in any batch."""

import cProfile
import functools
import math
import sys
import threading
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from library_autoattack import data
from library_models import small_cnn
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from scorematch import AutoAttack, ThreatModel, _extension
from scorematch.attacks import APGD, FAB, Square, classifier, inspection
from scorematch.attacks.apgd import _State
from scorematch.attacks.classifier import Classifier, cache_chunk, channels_last_works, folded_copy
from scorematch.attacks.fab import distance
from scorematch.attacks.losses import dlr_loss, margin_loss, ranked_targets, targeted_dlr_loss
from scorematch.attacks.parts import Batch, Search
from scorematch.attacks.randomness import KeyedNoise, ReferenceNoise
from scorematch.attacks.square import l1_pattern, l2_pattern
from scorematch.attacks.watching import watch
from scorematch.ops import _checks
from scorematch.threat_model import DUAL_ORDERS, ORDERS

NORMS = ["linf", "l2", "l1"]
EPS = {"linf": 0.03, "l2": 0.2, "l1": 1.0}
GRADIENT_ATTACKS = {
    "apgd-ce": lambda model: APGD(model, loss="ce", use_largereps=model.norm == "l1"),
    "apgd-dlr": lambda model: APGD(model, loss="dlr", use_largereps=model.norm == "l1"),
    "apgd-t": lambda model: APGD(model, loss="dlr-targeted", use_largereps=model.norm == "l1"),
    "fab": lambda model: FAB(model, targeted=False),
    "fab-t": FAB,
}
ATTACKS = {**GRADIENT_ATTACKS, "square": lambda model: Square(model, n_queries=100)}


class Linear(nn.Module):
    """Logits W x + b."""

    def __init__(self, classes: int, features: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(classes, features, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.to(x.dtype).T


def distances(model: Linear, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Of each sample to the nearest boundary of a linear model, the box aside, [N]."""
    logits = model(x)
    gaps = logits.gather(1, y[:, None]) - logits  # [N, L]
    normals = model.weight[y][:, None] - model.weight  # [N, L, D]
    dual = normals.norm(dim=2, p=DUAL_ORDERS[norm])
    return (gaps / dual).scatter(1, y[:, None], math.inf).amin(1)


def length(offset: Tensor, norm: str) -> Tensor:
    flat = offset.flatten(1)
    return flat.norm(dim=1, p=ORDERS[norm])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", GRADIENT_ATTACKS)
def test_linear_model_is_attacked_exactly(norm: str, attack: str) -> None:
    # Cross-entropy and DLR follow one class at a time, not always the nearest: exact with two.
    model = Linear(2 if attack in ("apgd-ce", "apgd-dlr") else 6, 48)
    x = 0.35 + 0.3 * torch.rand(150, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)
    truth = distances(model, x, y, norm)
    eps = float(truth.median())
    threat_model = ThreatModel(norm, eps)
    assert eps < 0.3, "the box must not matter"
    x_adv = GRADIENT_ATTACKS[attack](threat_model)(model, x, y)
    fallen = model(x_adv).argmax(1) != y
    assert not fallen[truth > eps * 1.0001].any()
    reach = 0.99 if attack.startswith("fab") else 0.999  # FAB steps beyond the boundary by 5 % of its last step
    assert fallen[truth < eps * reach].all(), f"{int((~fallen & (truth < eps * reach)).sum())} missed"
    assert (length(x_adv - x, norm) <= eps * (1 + 1e-9)).all()
    assert torch.equal(x_adv[~fallen], x[~fallen])


def batch(seed: int = 0, count: int = 60) -> tuple[nn.Module, Tensor, Tensor]:
    model = small_cnn(seed=seed).eval()
    x = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_points_stay_in_the_ball_and_fool(norm: str, attack: str) -> None:
    model, x, y = batch()
    x_adv = ATTACKS[attack](ThreatModel(norm, EPS[norm]))(model, x, y, seed=3)
    fallen = model(x_adv).argmax(1) != y
    assert 0 < fallen.sum() < len(x), "the test needs survivors and fallen"
    assert (length(x_adv - x, norm) <= EPS[norm] + 1e-5).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-t", "square"])
def test_a_sample_draws_the_same_numbers_in_any_batch(norm: str, attack: str) -> None:
    model, x, y = batch()
    model, x = model.double(), x.double()  # so that rounding in other batch shapes does not matter
    threat_model = ThreatModel(norm, EPS[norm])
    run = ATTACKS[attack](threat_model)
    samples = torch.arange(len(x))
    whole, fallen = run.run_part(Classifier(model), Batch(x, y, samples, 0, KeyedNoise(5, run.name, 0)))
    some = torch.tensor([41, 3, 17, 59, 20])
    part, fallen_part = run.run_part(
        Classifier(model), Batch(x[some], y[some], samples[some], 0, KeyedNoise(5, run.name, 0))
    )
    assert torch.equal(fallen[some], fallen_part)
    torch.testing.assert_close(whole[some], part, rtol=0, atol=1e-9)
    other, _ = run.run_part(Classifier(model), Batch(x, y, samples, 0, KeyedNoise(6, run.name, 0)))
    assert not torch.allclose(other, whole)


@pytest.mark.parametrize("iterations", [4, 10])  # without a look in between, and with some
@pytest.mark.parametrize("norm", NORMS)
def test_fab_counts_a_point_at_exactly_eps(norm: str, iterations: int) -> None:
    model, x, y = data()
    x, y = x[2:], y[2:]

    def found(eps: float) -> tuple[Tensor, Tensor]:
        batch = Batch(x, y, torch.arange(len(x)), 0, KeyedNoise(0, "fab", 0))
        points, fooled = FAB(ThreatModel(norm, eps), n_iter=iterations, targeted=False).run_part(
            Classifier(model), batch
        )
        return distance(points, x, norm), fooled

    distances, fooled = found({"linf": 1.0, "l2": 8.0, "l1": 64.0}[norm])
    nearest = float(distances[fooled].median())
    assert torch.equal(found(nearest)[1], fooled & (distances <= nearest))


def test_every_attack_and_part_draws_numbers_of_its_own() -> None:
    like = torch.zeros(2, 1, 2, 2)
    keys = [(0, "fab", 0), (1, "fab", 0), (0, "fab-t", 0), (0, "fab", 1), (0, "fab", 2), (0, "own", 0)]
    drawn = [KeyedNoise(*key).start(torch.arange(2), like, "linf") for key in keys]
    assert len({tuple(values.flatten().tolist()) for values in drawn}) == len(keys)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_draws_of_a_search_are_independent(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two of them have the same number, so none repeats another one's randomness."""
    original, numbers = KeyedNoise._uniform, []

    def noted(self: KeyedNoise, samples: Tensor, count: int, draw: int) -> Tensor:
        numbers.append(draw)
        return original(self, samples, count, draw)

    monkeypatch.setattr(KeyedNoise, "_uniform", noted)
    noise, samples = KeyedNoise(0, "square", 0), torch.arange(2)
    if norm == "linf":
        noise.stripes(samples, 3, 8)
    else:
        noise.start(samples, torch.zeros(2, 3, 8, 8), norm)
    for number in range(5):
        if norm == "linf":
            noise.window(samples, 3, (5, 5), number)
        else:
            noise.tile(samples, 3, number)
            noise.windows(samples, 3, (5, 5), number)
    assert len(numbers) == (6 if norm == "linf" else 11)
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize(("norm", "p_init"), [*((norm, 0.8) for norm in NORMS), ("linf", 0.01)])
def test_square_resumes_where_it_paused(norm: str, p_init: float) -> None:
    """With the same queries: what was asked is not asked again. With windows of one pixel there is much of it."""
    model, x, y = batch()
    run = Square(ThreatModel(norm, EPS[norm] / 2), n_queries=300, p_init=p_init)
    samples, noise = torch.arange(len(x)), KeyedNoise(0, "square", 0)
    pauses = []
    whole, fallen = run.run_part(Classifier(model), Batch(x, y, samples, 0, noise, pause=pauses.append))
    assert [search.queries for search in pauses] == [64, 128, 192, 256]
    saved = []
    first = Classifier(model)

    def keep(search: Search) -> None:
        saved.append((search.clone(), first.forwards))

    run.run_part(first, Batch(x, y, samples, 0, noise, pause=keep))
    search, asked_before = saved[1]
    second = Classifier(model)
    again, fallen_again = run.run_part(second, Batch(x, y, samples, 0, noise, search=search))
    assert torch.equal(again, whole)
    assert torch.equal(fallen_again, fallen)
    assert second.forwards == first.forwards - asked_before


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_checkpoints_of_apgd_come_ever_sooner(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 22 % of the steps, then 3 % sooner each time, but at least 6 % apart (section 3.2 of the paper)."""
    steps, found = 0, []

    def step(*given: Any) -> None:
        nonlocal steps
        steps += 1
        take(*given)

    def adapt(state: _State, enough_rises: float) -> None:
        found.append((steps, enough_rises))
        original(state, enough_rises)

    take, original = _State.take, _State.adapt
    monkeypatch.setattr(_State, "take", step)
    monkeypatch.setattr(_State, "adapt", adapt)
    model, x, y = batch()
    expected = {
        100: [22, 41, 57, 70, 80, 87, 93, 99],
        50: [11, 21, 30, 38, 45],
        7: [1, 2, 3, 4, 5, 6, 7],
    }
    for n_iter, checkpoints in expected.items():
        steps = 0
        found.clear()
        run = APGD(ThreatModel(norm, 1e-6), n_iter=n_iter)
        run.run_part(Classifier(model), Batch(x[:3], y[:3], torch.arange(3), 0, KeyedNoise(0, "apgd-ce", 0)))
        assert [place for place, _ in found] == checkpoints
        distances = [after - before for before, after in pairwise([0, *checkpoints])]
        assert [enough for _, enough in found] == [0.75 * distance for distance in distances]


@pytest.mark.parametrize("loss", ["dlr", "dlr-targeted"])
def test_of_the_points_that_fool_apgd_keeps_the_clearest(loss: str) -> None:
    """Of a randomised model, whose verdicts differ: the one with the largest margin over the label, not the target."""
    model, x, y = batch()
    seen = []

    def watched(points: Tensor) -> Tensor:
        seen.append(points.detach().clone())
        return model(points)

    run = APGD(ThreatModel("linf", 0.1), n_iter=8, loss=loss)
    noise = KeyedNoise(0, "apgd-t", 0)
    found, fooled = run.run_part(Classifier(watched, verdict_passes=2), Batch(x, y, torch.arange(len(x)), 0, noise))
    points = torch.stack([point for point in seen if not torch.equal(point, x)])  # at x targets are ranked
    with torch.no_grad():
        logits = torch.stack([model(point) for point in points])
    margin = torch.stack([margin_loss(at, y) for at in logits]).masked_fill(logits.argmax(2) == y, -math.inf)
    assert torch.equal(fooled, margin.amax(0) > -math.inf)
    assert fooled.sum() > 10
    torch.testing.assert_close(margin_loss(model(found), y)[fooled], margin.amax(0)[fooled], rtol=0, atol=1e-5)


def test_a_watched_function_is_told_once_before_it_does_anything() -> None:
    told = []

    def function() -> None:
        told.append(len(told))

    def work() -> None:
        function()
        len(told)

    watch((function,), lambda frame: told.append(frame.f_code.co_name), work)
    function()
    assert told == ["function", 1, 2]
    with pytest.raises(ZeroDivisionError):
        watch((function,), told.append, lambda: 1 / 0)
    assert sys.getprofile() is None


class Dynamic(nn.Module):
    """Looks at a gradient before it predicts."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            torch.autograd.grad(point.square().sum(), point)
        return x.flatten(1)[:, :5]


@pytest.mark.parametrize(
    "profiler",
    [cProfile.Profile, functools.partial(profile, activities=[ProfilerActivity.CPU], with_stack=True)],
    ids=["cProfile", "torch"],
)
def test_an_evaluation_may_be_profiled(profiler: Any) -> None:
    """There is one place for a profiler in a thread, and checks of the model would like it, too."""
    model, x, y = batch()
    evaluation = AutoAttack(model, "Linf", 0.05, 0, False, version="custom", attacks_to_run=["apgd-ce"], workers=2)
    expected = evaluation.run_standard_evaluation(x, y)
    with profiler():
        active = sys.getprofile()
        found = evaluation.run_standard_evaluation(x, y)
        assert sys.getprofile() is active
        assert "dynamic" in (inspection.dynamic(Dynamic(), x) or "")
        assert inspection.dynamic(model, x) is None
    assert torch.equal(found, expected)


def test_square_never_accepts_a_worse_point() -> None:
    model, x, y = batch()
    run = Square(ThreatModel("linf", 0.05), n_queries=400)
    margins = []
    samples, noise = torch.arange(len(x)), KeyedNoise(0, "square", 0)
    pause = lambda search: margins.append(search.margin.clone())  # noqa: E731
    run.run_part(Classifier(model), Batch(x, y, samples, 0, noise, pause=pause))
    assert len(margins) == 6
    for before, after in pairwise(margins):
        assert (after <= before).all()
    assert (margins[-1] < margins[0]).any()


AsksAll = type("AsksAll", (Square,), {"_ask_what_is_new": Square._ask})


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("p_init", [0.01, 0.2])
def test_square_asks_no_query_whose_answer_is_known(p_init: float, reference: bool) -> None:
    """A proposal that changes nothing, or that was refused since the point last moved: most of them, of small windows.

    In float64, as the two ask for batches of different sizes: in float32 rounding may decide about a proposal. Here it
    may still move a pixel by its last digit.
    """
    model, x, y = batch()
    model, x, y = model.double(), x[:20].double(), y[:20]
    found = []
    for kind in (Square, AsksAll):
        run, classifier = kind(ThreatModel("linf", 0.02), n_queries=1500, p_init=p_init), Classifier(model)
        noise = ReferenceNoise(0) if reference else KeyedNoise(0, "square", 0)
        points, fallen = run.run_part(classifier, Batch(x, y, torch.arange(len(x)), 0, noise))
        found.append((points, fallen, classifier.forwards))
    (points, fallen, asked), (expected, expected_fallen, every) = found
    torch.testing.assert_close(points, expected, rtol=0, atol=1e-15)
    assert torch.equal(fallen, expected_fallen)
    assert asked < 0.35 * every
    assert (~fallen).any()


def test_square_asks_each_proposal_once_between_two_moves() -> None:
    model, x, y = batch()
    model = model.double()
    place = 0
    x, y = x[place : place + 1].double(), y[place : place + 1]
    history: list[tuple[bytes, float]] = []

    def watched(points: Tensor) -> Tensor:
        logits = model(points)
        history.append((points.numpy().tobytes(), float(-margin_loss(logits, y))))
        return logits

    def run(kind: type[Square]) -> list[tuple[bytes, float]]:
        history.clear()
        kind(ThreatModel("linf", 0.01), n_queries=600, p_init=0.01).run_part(
            Classifier(watched), Batch(x, y, torch.tensor([place]), 0, KeyedNoise(0, "square", 0))
        )
        return history.copy()

    (here, margin), *proposals = run(AsksAll)
    expected, known, moves = [(here, margin)], {here}, 0
    for point, value in proposals:
        if point not in known:
            expected.append((point, value))
            known.add(point)
            if value < margin:
                margin, known, moves = value, {point}, moves + 1
    assert len(proposals) == 600
    assert moves > 5
    assert len(expected) < 300
    assert run(Square) == expected


def test_square_asks_a_random_model_again() -> None:
    """Another answer may come: where a verdict takes several passes, only what changes nothing is left out."""
    model, x, y = batch()
    counts = []
    for kind in (Square, AsksAll):
        classifier = Classifier(model, verdict_passes=2)
        run = kind(ThreatModel("linf", 0.02), n_queries=200, p_init=0.01)
        run.run_part(classifier, Batch(x, y, torch.arange(len(x)), 0, KeyedNoise(0, "square", 0)))
        counts.append(classifier.forwards)
    assert 0.4 < counts[0] / counts[1] < 0.7


def test_square_asks_nothing_when_all_samples_have_fallen() -> None:
    model, x, y = batch()
    asked = []

    def recorded(points: Tensor) -> Tensor:
        asked.append(len(points))
        return model(points)

    run = Square(ThreatModel("linf", 0.5), n_queries=2000)
    _, fallen = run.run_part(Classifier(recorded), Batch(x, y, torch.arange(len(x)), 0, KeyedNoise(0, "square", 0)))
    assert fallen.all()
    assert 1 < len(asked) < 2000
    assert min(asked) > 0


@pytest.mark.parametrize(("height", "width"), [(10, 10), (5, 15), (8, 8), (4, 3)])
def test_the_tiles_of_square_begin_where_five_fit(height: int, width: int) -> None:
    """In l2 tiles of a fifth of the height, from the border that centres five of them in the height."""
    x = torch.full((3, 2, height, width), 0.5)
    first = Square(ThreatModel("l2", 1.0))._first(x, torch.arange(3), KeyedNoise(0, "square", 0))
    side = max(height // 5, 1)
    border = max((height - 5 * side) // 2, 0)
    rows, columns = (torch.arange(size) - border for size in (height, width))
    tiled = ((rows >= 0) & (rows < height // side * side))[:, None] & (
        (columns >= 0) & (columns < width // side * side)
    )
    assert torch.equal((first != x).all(dim=1).all(dim=0), tiled)


class Sent(TorchFunctionMode):
    """Records what goes from the CPU to the device: a GPU that is sent something is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        from_cpu = not isinstance(args[0], Tensor) or args[0].is_cpu if func in (torch.tensor, Tensor.to) else False
        if from_cpu and out.is_meta:
            self.found.append(f"{func.__name__} {list(out.shape)}")
        return out


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_queries_of_square_send_nothing_to_the_device(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which meta plays; the first query of a size of windows may send what is kept there."""
    monkeypatch.setattr(_checks, "_refuse_device", lambda name, t: None)
    monkeypatch.setattr(_extension, "missing_kernel_message", lambda device: None)
    attack, noise = Square(ThreatModel(norm, 1.0)), KeyedNoise(0, "square", 0)
    x, samples = torch.rand(2, 3, 8, 8, device="meta"), torch.arange(2, device="meta")

    def query(number: int) -> None:
        window = attack._window(noise, samples, (3, 8, 8), 7, number)
        attack._propose(x, x, window, 7)

    query(0)
    with Sent() as sent:
        query(1)
    assert sent.found == []


def test_windows_shrink_by_the_schedule() -> None:
    """p = .8, .4, .2, .1, .05, .025, .0125, .00625: sides of the published schedule for 32×32 images."""
    linf, l2, l1 = (Square(ThreatModel(norm, 1.0)) for norm in NORMS)
    published = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
    for halvings, after in enumerate(published):
        sides = [linf.window_side(query, 1000, 1000) for query in (after, after + 1)]
        assert sides == [round(math.sqrt(0.8 / 2**times) * 1000) for times in (halvings, halvings + 1)]
    queries = [0, 10, 11, 51, 201, 501, 1001, 2001, 4001]
    sides = [round(math.sqrt(p * 1024)) for p in (0.8, 0.8, 0.4, 0.2, 0.1, 0.05, 0.025, 0.0125, 0.00625)]
    assert [linf.window_side(q, 32, 32) for q in queries] == sides
    for other in (l2, l1):
        assert all(side % 2 == 1 and side >= 3 for side in (other.window_side(q, 32, 32) for q in queries))
    stretched = Square(ThreatModel("linf", 1.0), n_queries=5000, rescale_schedule=True)
    assert stretched.window_side(26, 32, 32) == linf.window_side(52, 32, 32)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_the_l2_pattern_has_a_peak_above_a_trough(side: int) -> None:
    for pattern, order in ((l2_pattern(side), 2), (l1_pattern(side), 1)):
        assert pattern.norm(p=order) == pytest.approx(1.0)
        assert (pattern[: side // 2] > 0).all()
        assert (pattern[side // 2 :] < 0).all()


def test_dlr_loss_is_the_papers_ratio() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, 2.0], [1.0, 4.0, 2.0, 0.0]], dtype=torch.float64)
    labels, targets = torch.tensor([0, 2]), torch.tensor([3, 0])
    expected = [-(3 - 2) / (3 - 1), -(2 - 4) / (4 - 1)]
    assert dlr_loss(logits, labels).tolist() == pytest.approx(expected)
    expected = [-(3 - 2) / (3 - (1 + 0.5) / 2), -(2 - 1) / (4 - (1 + 0.0) / 2)]
    assert targeted_dlr_loss(logits, labels, targets).tolist() == pytest.approx(expected)
    assert ranked_targets(logits, 2).tolist() == [3, 2]


@pytest.mark.parametrize("classes", [2, 3])
def test_dlr_with_few_classes(classes: int) -> None:
    logits = torch.tensor([[2.0, 1.5, 0.5]], dtype=torch.float64)[:, :classes].requires_grad_()
    label, target = torch.tensor([0]), torch.tensor([1])
    scale = 1.0 if classes == 2 else 1.5
    assert targeted_dlr_loss(logits, label, target).item() == pytest.approx(-0.5 / scale)
    assert dlr_loss(logits, label).item() == pytest.approx(-0.5 / scale)
    (gradient,) = torch.autograd.grad(targeted_dlr_loss(logits, label, target).sum(), logits)
    assert gradient[0, 0] < 0 < gradient[0, 1]


def test_reference_noise_draws_in_the_order_of_the_official_package() -> None:
    """Its batch: seed; stripes; then for every query row, column and signs, by torch's global generator."""
    noise, samples = ReferenceNoise(7), torch.arange(4)
    torch.manual_seed(7)
    stripes = torch.sign(2 * torch.rand(4, 3, 1, 8) - 1)
    assert torch.equal(noise.stripes(samples, 3, 8), stripes)
    for query in range(5):
        corner, signs = noise.window(samples, 3, (5, 6), query)
        row, column = int(5 * torch.rand(1)), int(6 * torch.rand(1))
        assert corner.tolist() == [[row, column]] * 4
        assert torch.equal(signs, torch.sign(2 * torch.rand(3, 1, 1) - 1).view(1, 3).expand(4, 3))
    noise = ReferenceNoise(8)
    torch.manual_seed(8)
    tile_transpose, tile_signs = noise.tile(samples, 2, 0)
    assert tile_transpose.tolist() == [float(torch.rand(1)) > 0.5] * 4
    assert torch.equal(tile_signs, torch.sign(2 * torch.rand(4, 2, 1, 1) - 1).view(4, 2))
    corners, transpose, signs = noise.windows(samples, 2, (5, 6), 0)
    assert corners[0].tolist() == [int(limit * torch.rand(1)) for limit in (5, 6, 5, 6)]
    assert transpose.tolist() == [float(torch.rand(1)) > 0.5] * 4
    assert torch.equal(signs, torch.sign(2 * torch.rand(4, 2, 1, 1) - 1).view(4, 2))
    like = torch.zeros(4, 1, 2, 2)
    torch.manual_seed(9)
    assert torch.equal(ReferenceNoise(9).start(samples, like, "linf"), 2 * torch.rand(4, 1, 2, 2) - 1)


def test_keyed_starts_are_uniform_and_normal() -> None:
    noise, samples = KeyedNoise(0, "apgd-ce", 0), torch.arange(200)
    like = torch.zeros(200, 1, 16, 16)
    uniform = noise.start(samples, like, "linf")
    assert uniform.abs().max() <= 1
    assert uniform.var().item() == pytest.approx(1 / 3, rel=0.02)
    normal = noise.start(samples, like, "l2").flatten()
    assert normal.mean().abs() < 0.01
    assert normal.var().item() == pytest.approx(1.0, rel=0.02)
    assert normal.pow(4).mean().item() == pytest.approx(3.0, rel=0.05)
    corner, signs = noise.window(samples, 3, (4, 0), 1)
    assert set(corner[:, 0].tolist()) == {0, 1, 2, 3, 4}
    assert set(corner[:, 1].tolist()) == {0}
    assert set(signs.unique().tolist()) == {-1.0, 1.0}


def test_gradients_of_a_randomised_model_are_averaged() -> None:
    calls = []

    def model(x: Tensor) -> Tensor:
        calls.append(len(calls) + 1.0)
        return torch.stack([calls[-1] * x.sum(1), 0 * x.sum(1)], 1)

    classifier = Classifier(model)
    logits, value, gradient = classifier.gradient(torch.ones(2, 3), lambda z: z[:, 0], passes=4)
    assert gradient.unique().tolist() == [2.5]
    assert value.tolist() == [12.0, 12.0], "the loss is that of the last pass"
    assert (classifier.forwards, classifier.backwards) == (8, 8)
    assert not logits.requires_grad


def test_passes_in_chunks_are_the_same() -> None:
    model, x, y = batch()
    sizes = []
    hook = model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    chunked = Classifier(model, chunk=25)
    torch.testing.assert_close(chunked.logits(x), model(x), rtol=0, atol=1e-5)
    assert sizes == [30, 30, 60]
    assert chunked.logits(x[:49]).shape == (49, 10)
    assert sizes == [30, 30, 60, 49], "less than two chunks go together"
    chunked.forwards -= 49
    assert chunked.forwards == 60
    hook.remove()
    for one, whole in zip(
        chunked.gradient(x, margin_loss, y), Classifier(model).gradient(x, margin_loss, y), strict=True
    ):
        torch.testing.assert_close(one, whole, rtol=0, atol=1e-5)
    assert (chunked.forwards, chunked.backwards) == (120, 60)


def test_the_size_of_chunks() -> None:
    model, x, _ = batch()
    # the widest layer is 8 channels of 8×8 in float32, 2 KiB a sample
    assert cache_chunk(model, x, 1, cache=200 << 10) == 64
    assert cache_chunk(model, x, 1, cache=1) == 32
    assert cache_chunk(model, x, 1) == cache_chunk(model, x, 1, cache=1 << 20) > 32  # a megabyte
    assert cache_chunk(model.forward, x, 1) is None
    assert cache_chunk(model, x, 4, cache=200 << 10) == 256
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last(channels: int) -> None:
    torch.manual_seed(0)
    formats = []
    model = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x, y = torch.rand(9, channels, 8, 8), torch.zeros(9, dtype=torch.int64)
    assert channels_last_works(model, x)
    model[0].register_forward_hook(lambda module, inputs, output: formats.append(output.stride(1)))
    arranged = Classifier(model, chunk=4, channels_last=True)
    results = arranged.gradient(x, margin_loss, y)
    assert formats == [1] * 2, "channels are innermost within the model"
    for given, expected in zip(results, Classifier(model).gradient(x, margin_loss, y), strict=True):
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-6)
    assert results[2].is_contiguous()
    assert arranged.logits(x).shape == (9, 4)


def test_models_that_cannot_take_channels_last() -> None:
    class Flattens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1)

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.as_strided((len(x), 5), (x.stride(0), 1))

    class Asserts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.is_contiguous()
            return x.flatten(1)

    x = torch.rand(3, 3, 4, 4)
    assert not channels_last_works(Flattens(), x)
    assert not channels_last_works(Asserts(), x)
    assert not channels_last_works(Reads(), x)
    assert not channels_last_works(lambda x: x.flatten(1), x)
    assert not channels_last_works(nn.Flatten(), torch.rand(3, 5))


def test_copies_are_compared_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the logits of deep networks differ by more than is allowed for rounding, and nothing would be folded."""
    asked: list[torch.device] = []
    monkeypatch.setattr(classifier, "full_precision", lambda device: asked.append(device) or nullcontext())
    x = torch.rand(2, 1, 8, 8)
    with folded_copy(small_cnn(batch_norm=True).eval(), x) as folded:
        assert folded is not None
    assert asked == [x.device]


def test_a_folded_copy() -> None:
    x = torch.rand(3, 1, 8, 8)
    model = small_cnn(batch_norm=True).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    weight, passed = model[0].weight, []
    with folded_copy(model, x) as folded:
        assert folded is not None
        torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-5)
        assert not torch.equal(folded[0].weight, weight)
        assert model[0].weight is weight
        assert folded[-1].weight is model[-1].weight, "what is not folded takes no memory"
        for network in (model, folded):
            network[1].register_forward_hook(lambda module, inputs, output: passed.append(output is inputs[0]))
            network(x)
    assert passed == [False, True]
    with folded_copy(small_cnn().eval(), x) as folded:
        assert folded is None
    with folded_copy(model.forward, x) as folded:
        assert folded is None


def test_a_model_that_cannot_be_copied_is_not_folded() -> None:
    model = small_cnn(batch_norm=True).eval()
    model.lock = threading.Lock()
    with folded_copy(model, torch.rand(3, 1, 8, 8)) as folded:
        assert folded is None


def test_a_model_that_folding_would_change_is_not_folded() -> None:
    class Path(nn.Module):
        """Doubles what its convolution returns in every call but the one that is traced."""

        def __init__(self) -> None:
            super().__init__()
            self.model = small_cnn(batch_norm=True)

        def forward(self, x: Tensor) -> Tensor:
            between = self.model[0](x)
            return self.model[2:](self.model[1](between if isinstance(x, fx.Proxy) else 2 * between))

    path = Path().eval()
    path.model[1].running_mean.fill_(0.5)
    with folded_copy(path, torch.rand(3, 1, 8, 8)) as folded:
        assert folded is None


def test_a_copy_that_fails_is_not_searched_with() -> None:
    class Original(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.myself = small_cnn(batch_norm=True), id(self)

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(x, fx.Proxy) or id(self) == self.myself
            return self.model(x)

    with folded_copy(Original().eval(), torch.rand(3, 1, 8, 8)) as folded:
        assert folded is None


def test_class_gradients() -> None:
    model = Linear(4, 6)
    x = torch.rand(3, 6, dtype=torch.float64)
    classifier = Classifier(model)
    logits, gradient_of = classifier.class_gradients(x)
    for classes in ([0, 0, 0], [3, 1, 2]):
        torch.testing.assert_close(gradient_of(torch.tensor(classes)), model.weight[classes])
    assert (classifier.forwards, classifier.backwards) == (3, 6)
    torch.testing.assert_close(margin_loss(logits, logits.argmax(1)), logits.topk(2).values.diff(dim=1).squeeze(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: APGD(m, loss="cw"), "loss must be one of ce, dlr, dlr-targeted, or a function, got 'cw'"),
        (lambda m: APGD(m, n_iter=0), "n_iter must be at least 1, got 0"),
        (lambda m: APGD(m, rho=1.5), r"rho must lie in \[0, 1\], got 1.5"),
        (lambda m: FAB(m, n_restarts=0), "n_restarts must be at least 1, got 0"),
        (lambda m: FAB(m.replace(lower=-math.inf)), "FAB needs a finite box"),
        (lambda m: Square(m, n_queries=0), "n_queries must be at least 1, got 0"),
        (lambda m: Square(m, p_init=0.0), r"p_init must lie in \(0, 1\], got 0.0"),
    ],
)
def test_bad_settings(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(ThreatModel("linf", 0.1))


def test_square_wants_images() -> None:
    model = Linear(3, 5)
    x = torch.full((2, 5), 0.4)
    with pytest.raises(ValueError, match=r"Square Attack takes images \[N, C, H, W\], got x of shape \[2, 5\]"):
        Square(ThreatModel("linf", 0.1))(model, x, model(x).argmax(1))
