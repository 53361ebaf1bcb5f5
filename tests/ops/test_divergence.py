"""divergence and logit_divergence against scorematch.reference."""

# ruff: noqa: E501 (tables of messages)

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from scorematch import reference
from scorematch.ops import DIVERGENCES, divergence, logit_divergence

from .conftest import assert_close, runs_cuda_code

KINDS = list(DIVERGENCES)
CLASSES = [2, 3, 10, 17, 31, 32, 33, 100, 1000]
FORMS = ["labels", "probabilities", "logits"]
FUNCTIONS = {
    "labels": (divergence, reference.divergence),
    "probabilities": (divergence, reference.divergence),
    "logits": (logit_divergence, reference.logit_divergence),
}


def make(
    form: str, rows: int, classes: int, device: str, dtype: torch.dtype, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits and a target of the form; both require grad where they can."""
    logits = (spread * torch.randn(rows, classes, dtype=torch.float64)).to(device, dtype).requires_grad_()
    if form == "labels":
        return logits, torch.randint(classes, (rows,), device=device)
    target = spread * torch.randn(rows, classes, dtype=torch.float64)
    if form == "probabilities":
        target = target.softmax(1)
    return logits, target.to(device, dtype).requires_grad_()


def in_float64(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_() if t.is_floating_point() else t


def differentiable(*tensors: Tensor) -> list[Tensor]:
    return [t for t in tensors if t.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", CLASSES)
def test_value_and_gradients_are_the_reference(kind, form, classes, device_dtype):
    device, dtype = device_dtype
    rows = 27  # no multiple of a SIMD width; more than three blocks of eight warps
    logits, target = make(form, rows, classes, device, dtype)
    ours, theirs = FUNCTIONS[form]
    upstream = torch.linspace(-1, 2, rows, device=device, dtype=torch.float64)

    loss = ours(logits, target, kind=kind)
    assert loss.shape == (rows,)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gradients = torch.autograd.grad(loss, differentiable(logits, target), upstream.to(loss.dtype))

    logits64, target64 = in_float64(logits), in_float64(target)
    expected = theirs(logits64, target64, kind=kind)
    differentiated = expected
    if form == "probabilities" and kind == "kl":
        # In half precision P may sum to less than 1 and D be below 0, where relu would stop the reference's gradient.
        differentiated = reference._divergence(target64, target64.log(), logits64.log_softmax(1), kind)
    expected_gradients = torch.autograd.grad(differentiated, differentiable(logits64, target64), upstream)
    if form == "probabilities":
        # The same rounding makes some of P 0: ours gives no gradient there, as with a one-hot P.
        expected_gradients = expected_gradients[0], expected_gradients[1].masked_fill(target64 == 0, 0)
    if classes == 2 and kind == "linf" and form == "probabilities":
        # Both classes are equally far, up to rounding: either may carry the target's gradient.
        gradients, expected_gradients = gradients[:1], expected_gradients[:1]

    assert_close(loss, expected, dtype)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [4, 37])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_gradcheck(kind, form, classes, clip, device):
    logits, target = make(form, 5, classes, device, torch.float64, spread=1.0)
    function = FUNCTIONS[form][0]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if form == "probabilities":  # what gradcheck adds to one entry leaves the simplex by less than the tolerance
            assert (target.sum(1) - 1).abs().max() < 1e-3
        return function(logits, target, kind=kind, clip=clip)

    assert torch.autograd.gradcheck(loss, (logits, target), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_that_are_wanted(form, device):
    logits, target = make(form, 6, 5, device, torch.float64)
    function = FUNCTIONS[form][0]
    assert not function(logits.detach(), target.detach()).requires_grad
    with torch.no_grad():
        assert not function(logits, target).requires_grad
    both = torch.autograd.grad(function(logits, target).sum(), differentiable(logits, target))
    one = torch.autograd.grad(function(logits, target.detach()).sum(), logits)
    torch.testing.assert_close(one[0], both[0], rtol=0, atol=0)
    if target.requires_grad:
        other = torch.autograd.grad(function(logits.detach(), target).sum(), target)
        torch.testing.assert_close(other[0], both[1], rtol=0, atol=0)


@pytest.mark.parametrize("form", ["probabilities", "logits"])
@pytest.mark.parametrize("classes", [10, 50])
def test_transposed_and_strided_inputs(form, classes, device):
    logits, target = make(form, 6, classes, device, torch.float32)
    function = FUNCTIONS[form][0]
    expected = torch.autograd.grad(function(logits, target).sum(), (logits, target))
    turned = logits.detach().t().contiguous().t().requires_grad_()
    strided = torch.stack([target.detach()] * 2, dim=2)[:, :, 0].requires_grad_()
    assert not turned.is_contiguous()
    assert not strided.is_contiguous()
    actual = torch.autograd.grad(function(turned, strided).sum(), (turned, strided))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    # An upstream gradient without memory of its own, as .sum() makes, is covered above; here a strided one.
    upstream = torch.arange(12.0, device=device)[::2]
    scaled = torch.autograd.grad(function(logits, target), logits, upstream)[0]
    torch.testing.assert_close(scaled, upstream[:, None] * expected[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_empty_batch(kind, form, device):
    logits, target = make(form, 0, 10, device, torch.float32)
    loss = FUNCTIONS[form][0](logits, target, kind=kind)
    assert loss.shape == (0,)
    assert all(g.shape == (0, 10) for g in torch.autograd.grad(loss.sum(), differentiable(logits, target)))


@pytest.mark.parametrize("classes", [3, 40])
def test_kl_with_labels_is_cross_entropy(classes, device):
    logits, labels = make("labels", 64, classes, device, torch.float32, spread=20.0)
    loss = divergence(logits, labels, kind="kl")
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), logits)[0], torch.autograd.grad(expected.sum(), logits)[0], rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(kind, form, classes, dtype, device):
    """Logits of ±1e4: every probability but one underflows."""
    logits, target = make(form, 8, classes, device, dtype)
    logits = (torch.randint(-1, 2, logits.shape, device=device) * 1e4 + torch.rand_like(logits)).requires_grad_()
    if form == "logits":
        target = (torch.randint(-1, 2, logits.shape, device=device) * 1e4 + torch.rand_like(logits)).requires_grad_()
    ours, theirs = FUNCTIONS[form]
    loss = ours(logits, target, kind=kind)
    logits64, target64 = in_float64(logits), in_float64(target)
    expected = theirs(logits64, target64, kind=kind)
    assert_close(loss, expected)
    gradients = torch.autograd.grad(loss.sum(), differentiable(logits, target))
    assert all(g.isfinite().all() for g in gradients)
    if kind != "js_distance":  # its reference has 0/0 where D = 0
        assert_close(gradients[0], torch.autograd.grad(expected.sum(), logits64)[0])


@pytest.mark.parametrize("classes", [4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_probabilities_have_all_their_digits(classes, dtype, device):
    """The gradient of the cross-entropy is q at the classes that are not the label."""
    smallest, rounding = {torch.float32: (-85.0, 1e-6), torch.float64: (-700.0, 1e-13)}[dtype]
    logits = (smallest * torch.rand(30, classes, dtype=dtype)).to(device)
    logits[:, 0], logits[:, 1] = 0, smallest
    logits.requires_grad_()
    loss = divergence(logits, torch.zeros(30, dtype=torch.int64, device=device), kind="kl")
    q = torch.autograd.grad(loss.sum(), logits)[0][:, 1:]
    expected = logits.detach().double().softmax(1)[:, 1:]
    torch.testing.assert_close(q.double(), expected, rtol=rounding, atol=0)


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize(("dtype", "tiny"), [(torch.float32, 1e-40), (torch.float64, 1e-310)])
def test_logarithms_of_the_smallest_probabilities(classes, dtype, tiny, device):
    """They are denormal numbers; dKL/dp = log p - log q + 1 tells their logarithms."""
    target = torch.zeros(2, classes, dtype=dtype, device=device)
    target[:, 0], target[:, 1], target[1, 2] = 1, tiny, 3 * tiny
    target.requires_grad_()
    gradient = torch.autograd.grad(divergence(torch.zeros_like(target), target, kind="kl").sum(), target)[0]
    p = target.detach().double()
    expected = torch.where(p > 0, p.log() + math.log(classes) + 1, 0)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("classes", "first", "second"), [(8, 2, 5), (64, 5, 9), (64, 6, 9), (64, 7, 40)])
def test_of_equally_far_classes_the_first_carries_the_gradient(classes, first, second, device):
    """linf; q is 1 / classes, so that all numbers are exact."""
    q = 1 / classes
    target = torch.full((2, classes), q, device=device)
    target[0, first], target[0, second] = 1.5 * q, 0.5 * q
    target[1, first], target[1, second] = 0.5 * q, 1.5 * q
    target.requires_grad_()
    logits = torch.zeros_like(target).requires_grad_()
    loss = divergence(logits, target, kind="linf")
    by_logits, by_target = torch.autograd.grad(loss.sum(), (logits, target))
    direction = torch.tensor([[-1.0], [1.0]], device=device)  # of q - p
    carries = direction * F.one_hot(torch.tensor(first, device=device), classes)
    assert (loss == 0.5 * q).all()
    assert torch.equal(by_target, -carries)
    assert torch.equal(by_logits, q * carries - q * q * direction)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [4, 50])
def test_one_hot_probabilities_are_labels(kind, classes, device):
    logits, labels = make("labels", 9, classes, device, torch.float32)
    one_hot = F.one_hot(labels, classes).float().requires_grad_()
    loss, same = divergence(logits, labels, kind=kind), divergence(logits, one_hot, kind=kind)
    torch.testing.assert_close(same, loss)
    by_logits, by_target = torch.autograd.grad(same.sum(), (logits, one_hot))
    torch.testing.assert_close(by_logits, torch.autograd.grad(loss.sum(), logits)[0])
    assert (by_target[one_hot == 0] == 0).all()
    assert by_target.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_coinciding_distributions(kind, classes, device):
    logits, _ = make("labels", 50, classes, device, torch.float32, spread=8.0)
    same = logits.detach().clone().requires_grad_()
    loss = logit_divergence(logits, same, kind=kind)
    assert (loss == 0).all()
    for gradient in torch.autograd.grad(loss.sum(), (logits, same)):
        assert (gradient == 0).all()
    shifted = (logits.detach() + 3).requires_grad_()
    loss = logit_divergence(logits, shifted, kind=kind)
    assert (loss >= 0).all()
    assert (loss < 1e-4).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), (logits, shifted)))


@pytest.mark.parametrize("kind", ["kl", "js", "js_distance"])
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_no_cancellation_near_coincidence(kind, classes, distance, device):
    """The divergence is of second order in the distance: in float32, the plain formula loses its sign from 1e-3 on."""
    logits = torch.randn(64, classes, device=device)
    target = logits + distance * torch.randn(64, classes, device=device)
    loss = logit_divergence(logits, target, kind=kind)
    # The logarithms themselves are rounded at about 1e-7, so this is good to about 1e-6 / distance.
    expected = reference.logit_divergence(logits.double(), target.double(), kind=kind)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6 / distance + 1e-4, atol=0)
    assert (loss > 0).all()


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("distance", [1e-6, 2e-7])
def test_js_distance_is_a_number_however_near_the_distributions_are(classes, distance, device):
    """Rounding must not make the sum negative, whose root it is."""
    logits = torch.randn(1000, classes, device=device)
    target = logits + distance * torch.randn(1000, classes, device=device)
    loss = logit_divergence(logits, target, kind="js_distance")
    assert (loss >= 0).all()
    assert (loss < 1e-5).all()


@pytest.mark.parametrize("gap", [0.05, 0.08, 0.09])
def test_js_has_all_its_digits_where_a_series_stands_for_logarithms(gap, device):
    """float64; |p - q| / (p + q) is below 0.1 in both classes."""
    p, q = torch.tensor([[0.5 + gap, 0.5 - gap]], dtype=torch.float64), torch.full((1, 2), 0.5, dtype=torch.float64)
    m = (p + q) / 2
    expected = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(1)
    loss = divergence(q.log().to(device), p.to(device), kind="js")
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 6e-7), (torch.float64, 1e-14)])
@pytest.mark.parametrize("classes", [3, 40])
def test_js_has_all_its_digits_however_far_apart_the_distributions_are(classes, dtype, rounding, device):
    """dJS/dp = ½ log(p/m) tells the logarithm of 1 + t for t = |p - q| / (p + q) in [0, 1)."""
    t = torch.linspace(-0.99, 0.99, 400, dtype=torch.float64)
    p = (1 + t) / (1 - t) / classes
    p = p[p < 1, None]
    target = torch.cat([p, ((1 - p) / (classes - 1)).expand(-1, classes - 1)], 1).to(device, dtype).requires_grad_()
    loss = divergence(torch.zeros_like(target), target, kind="js")
    gradient = torch.autograd.grad(loss.sum(), target)[0]
    exact = target.detach().double()
    expected = 0.5 * (2 * exact / (exact + 1 / classes)).log()
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kl"])
@pytest.mark.parametrize("form", ["probabilities", "logits"])
@pytest.mark.parametrize("classes", [6, 40])
def test_classes_that_only_the_model_excludes(kind, form, classes, device):
    """A logit of -inf is the limit of small ones; only KL is infinite there."""
    logits, target = make(form, 7, classes, device, torch.float64)
    results = []
    for excluded in (-math.inf, -1e4):
        z = logits.detach().masked_fill(torch.arange(classes, device=device) % 3 == 1, excluded).requires_grad_()
        loss = FUNCTIONS[form][0](z, target, kind=kind)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), (z, target))))
    assert all(t.isfinite().all() for t in results[0])
    torch.testing.assert_close(results[0], results[1])


def test_kl_where_only_the_model_excludes_a_class(device):
    """It is infinite, and its gradient is the limit Q - P."""
    logits = torch.tensor([[0.0, -math.inf]], device=device, requires_grad=True)
    loss = logit_divergence(logits, torch.zeros(1, 2, device=device), kind="kl")
    assert loss.item() == math.inf
    assert torch.autograd.grad(loss.sum(), logits)[0].tolist() == [[0.5, -0.5]]


def test_kl_gradient_is_kept_where_rounding_makes_it_negative(device):
    """relu must not stop the gradient of a divergence that is only numerically at its minimum."""
    logits = torch.randn(256, 10, device=device).requires_grad_()
    target = (logits.detach() + 1e-4 * torch.randn(256, 10, device=device)).softmax(1)
    gradient = torch.autograd.grad(divergence(logits, target, kind="kl").sum(), logits)[0]
    expected = logits.detach().double().softmax(1) - target.double()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=3e-7)
    assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_clipping(form, kind, device):
    logits, target = make(form, 40, 6, device, torch.float64, spread=1.5)
    function = FUNCTIONS[form][0]
    plain = function(logits, target, kind=kind)
    clip = plain.median().item()
    clipped = function(logits, target, kind=kind, clip=clip)
    torch.testing.assert_close(clipped, (plain - clip).clamp_min(0), rtol=0, atol=0)
    below = plain <= clip
    assert below.any()
    assert (~below).any()
    for gradient, unclipped in zip(
        torch.autograd.grad(clipped.sum(), differentiable(logits, target)),
        torch.autograd.grad(plain.sum(), differentiable(logits, target)),
        strict=True,
    ):
        assert (gradient[below] == 0).all()
        torch.testing.assert_close(gradient[~below], unclipped[~below], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("classes", [5, 70])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_nan_logits_give_nan(kind, form, classes, clip, bad, device):
    logits, target = make(form, 6, classes, device, torch.float32)
    with torch.no_grad():
        logits[2, 3] = float(bad)  # softmax of an infinite logit is NaN, too
    loss = FUNCTIONS[form][0](logits, target, kind=kind, clip=clip)
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    assert gradient[2].isnan().all()
    assert not gradient[[0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["probabilities", "logits"])
def test_nan_targets_give_nan(kind, form, device):
    logits, target = make(form, 3, 5, device, torch.float32)
    with torch.no_grad():
        target[1, 4] = math.nan
    loss = FUNCTIONS[form][0](logits, target, kind=kind)
    assert loss.isnan().tolist() == [False, True, False]
    assert torch.autograd.grad(loss.sum(), logits)[0][1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", [6, 40])
def test_excluded_classes(kind, classes, device):
    """-inf in both is as if the class did not exist."""
    logits, target = make("logits", 7, classes, device, torch.float64)
    some = torch.arange(classes, device=device) % 3 != 1
    masked = [t.detach().masked_fill(~some, -math.inf).requires_grad_() for t in (logits, target)]
    fewer = [t.detach()[:, some].requires_grad_() for t in (logits, target)]
    loss, expected = logit_divergence(*masked, kind=kind), logit_divergence(*fewer, kind=kind)
    torch.testing.assert_close(loss, expected)
    for gradient, smaller in zip(
        torch.autograd.grad(loss.sum(), masked), torch.autograd.grad(expected.sum(), fewer), strict=True
    ):
        assert (gradient[:, ~some] == 0).all()
        torch.testing.assert_close(gradient[:, some], smaller)


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_classes_of_the_posterior(kind, device):
    """log p = -inf in direct SCORE: weight 0 there, no NaN anywhere."""
    logits, log_p = make("logits", 7, 10, device, torch.float32)
    log_p = log_p.detach().log_softmax(1)
    log_p[:, 4] = -math.inf
    log_p.requires_grad_()
    loss = logit_divergence(logits, log_p, kind=kind)
    by_logits, weights = torch.autograd.grad(loss.sum(), (logits, log_p))
    assert loss.isfinite().all()
    assert by_logits.isfinite().all()
    assert weights.isfinite().all()
    assert (weights[:, 4] == 0).all()


@pytest.mark.parametrize("classes", [10, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_to_log_p_is_the_weight_of_the_scores(kind, classes, device):
    """w = c - p Σ c with c = ∂D/∂ log p (Eq. 33); for kl, w = p (r - <p, r>)."""
    logits, other = make("logits", 12, classes, device, torch.float64)
    log_p = other.detach().log_softmax(1).requires_grad_()
    weights = torch.autograd.grad(logit_divergence(logits, log_p, kind=kind).sum(), log_p)[0]

    free_log_p = log_p.detach().clone().requires_grad_()
    value = reference._divergence(free_log_p.exp(), free_log_p, logits.detach().log_softmax(1), kind)
    c = torch.autograd.grad(value.sum(), free_log_p)[0]
    p = log_p.detach().exp()
    torch.testing.assert_close(weights, c - p * c.sum(1, keepdim=True), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(weights.sum(1), torch.zeros_like(weights[:, 0]), rtol=0, atol=1e-12)
    if kind == "kl":
        r = log_p.detach() - logits.detach().log_softmax(1)
        torch.testing.assert_close(weights, p * (r - (p * r).sum(1, keepdim=True)), rtol=1e-8, atol=1e-11)


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from(KINDS), st.integers(2, 50), st.floats(-1e3, 1e3), st.floats(0.1, 30))
def test_shift_symmetry_and_sign(seed, kind, classes, shift, spread):
    """Adding a constant to logits changes nothing; D >= 0; the distances and js are symmetric; gradients sum to 0."""
    generator = torch.Generator().manual_seed(seed)
    logits, target = spread * torch.randn(2, 5, classes, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    target.requires_grad_()
    loss = logit_divergence(logits, target, kind=kind)
    assert (loss >= 0).all()
    shifted = logit_divergence(logits + shift, target - shift, kind=kind)
    torch.testing.assert_close(shifted, loss, rtol=1e-8, atol=1e-10)
    if kind != "kl":
        torch.testing.assert_close(logit_divergence(target, logits, kind=kind), loss, rtol=1e-8, atol=1e-12)
    for gradient in torch.autograd.grad(loss.sum(), (logits, target)):
        assert gradient.sum(1).abs().max() <= 1e-9 * (1 + gradient.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_second_differentiation_is_refused(form, device):
    logits, target = make(form, 4, 5, device, torch.float32)
    loss = FUNCTIONS[form][0](logits, target).sum()
    gradients = torch.autograd.grad(loss, differentiable(logits, target), create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(gradient.square().sum(), logits, retain_graph=True)


@pytest.mark.parametrize("kind", [0, 4, 6])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(kind, form, device):
    logits, target = (t.detach() for t in make(form, 6, 7, device, torch.float32))
    op = torch.ops.scorematch.logit_divergence if form == "logits" else torch.ops.scorematch.divergence
    for wanted in ((True, form != "labels"), (False, False)):
        opcheck(op.default, (logits, target, kind, 0.1, *wanted))
        opcheck(op.default, (logits.t().contiguous().t(), target, kind, 0.0, *wanted))


def bad_inputs() -> list[tuple[dict[str, object], type[Exception], str]]:
    z, p = torch.randn(4, 10), torch.full((4, 10), 0.1)
    return [
        ({"target": torch.full((3, 10), 0.1)}, ValueError, r"logits has shape \[4, 10\] but target has shape \[3, 10\]"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, r"target has shape \[5\] but logits has shape \[4, 10\]: class indices must be \[4\]"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, r"target is torch.int32; it must be torch.int64 class indices or probabilities"),
        ({"target": p.double()}, TypeError, r"target is torch.float64 but logits is torch.float32"),
        ({"target": p.to("meta")}, ValueError, r"target is on meta but logits is on cpu"),
        ({"target": [0, 1, 2, 3]}, TypeError, r"target must be a torch.Tensor, got list"),
        ({"logits": z[0]}, ValueError, r"logits has shape \[10\], but must be \[N, L\]"),
        ({"logits": z.long()}, TypeError, r"logits is torch.int64; on the CPU it must be"),
        ({"logits": z.half()}, TypeError, r"logits is torch.float16; on the CPU it must be"),
        ({"kind": "foo"}, ValueError, r"kind must be one of \{kl, se, l2, l1, linf, js, js_distance, l1_squared\}, got 'foo'"),
        ({"clip": -0.1}, ValueError, r"clip must be at least 0, got -0.1"),
        ({"clip": math.nan}, ValueError, r"clip must be at least 0, got nan"),
        ({"clip": None}, TypeError, r"clip must be a number, got NoneType"),
        ({"target": torch.tensor([0, 1, 10, 3])}, ValueError, r"^target\[2\] is 10, but logits has 10 classes: allowed are 0 to 9$"),
        ({"target": torch.tensor([0, -1, 0, 3])}, ValueError, r"^target\[1\] is -1, but logits has 10 classes"),
        ({"target": 1.5 * p}, ValueError, r"is not a probability distribution: its sum is 1.5 \(1 ± 0.001 is allowed\)"),
        ({"target": 0.5 * p}, ValueError, r"is not a probability distribution: its sum is 0.5"),
        ({"target": p - torch.eye(4, 10) + torch.eye(4, 10).roll(1, 1)}, ValueError, r"its smallest entry -0.9 \(at least 0\)"),
    ]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), bad_inputs())
def test_bad_input(change, error, message):
    arguments = {"logits": torch.randn(4, 10), "target": torch.full((4, 10), 0.1), **change}
    with pytest.raises(error, match=message):
        divergence(**arguments)
    if "target" not in change:
        arguments["target_logits"] = arguments.pop("target")
        with pytest.raises(error, match=message):
            logit_divergence(**arguments)


@pytest.mark.skipif(runs_cuda_code("cpu"), reason="on a GPU they are NaN")
@pytest.mark.parametrize("classes", [10, 90])
def test_bad_values_are_found_in_any_row(classes):
    labels = torch.zeros(300, dtype=torch.int64)
    labels[283] = classes
    with pytest.raises(ValueError, match=rf"target\[283\] is {classes}"):
        divergence(torch.randn(300, classes), labels)
    probabilities = torch.full((300, classes), 1 / classes)
    probabilities[299, 0] += 2e-3
    with pytest.raises(ValueError, match=r"target\[299\] is not a probability distribution"):
        divergence(torch.randn(300, classes), probabilities)
    for less, more in ((0, 1), (1, 2), (classes - 1, 0)):  # a sum of 1, with an entry below 0
        probabilities = torch.full((300, classes), 1 / classes)
        probabilities[298, less] -= 0.5
        probabilities[298, more] += 0.5
        with pytest.raises(ValueError, match=r"target\[298\] is not a probability distribution"):
            divergence(torch.randn(300, classes), probabilities)


@pytest.mark.parametrize("classes", [5, 70])
def test_every_row_is_refused(classes):
    """By all threads at once; the message is about one of the rows."""
    with pytest.raises(ValueError, match=r"target\[\d+\] is 1000, but logits has"):
        divergence(torch.randn(300, classes), torch.full((300,), 1000), kind="kl")


def test_bad_values_are_nan_on_cuda(device):
    """An error would have to wait for the GPU."""
    if not runs_cuda_code(device):
        pytest.skip("on the CPU they are errors")
    logits = torch.randn(3, 10, device=device, requires_grad=True)
    for target in (
        torch.tensor([0, 10, 2], device=device),
        torch.tensor([[0.1], [0.2], [0.1]], device=device).expand(3, 10),
    ):
        loss = divergence(logits, target)
        assert loss.isnan().tolist() == [False, True, False]
        assert torch.autograd.grad(loss.sum(), logits)[0][1].isnan().all()


def test_more_classes_than_float32_can_count_are_refused():
    logits = torch.zeros(1, 2**24 + 1)
    with pytest.raises(
        (ValueError, RuntimeError), match="logits has 16777217 classes, expected at most 16777216 in float32"
    ):
        divergence(logits, torch.tensor([0]))


@pytest.mark.parametrize("kind", ["se", "kl"])
def test_logits_without_classes_are_refused(kind: str, device: torch.device) -> None:
    logits = torch.zeros(3, 0, device=device)
    for call in (lambda: divergence(logits, logits, kind=kind), lambda: logit_divergence(logits, logits, kind=kind)):
        with pytest.raises((ValueError, RuntimeError), match=r"logits has shape \[3, 0\], expected at least one class"):
            call()
