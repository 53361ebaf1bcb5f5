"""score_step and score_line_integral against scorematch.reference."""

# ruff: noqa: E501 (tables of messages)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from scorematch import reference
from scorematch.ops import logit_divergence, score_line_integral, score_step

from .conftest import assert_close

SIZES = [  # [N, L, *F]
    (3, 2, 5),
    (2, 3, 64),
    (4, 10, 3, 9, 11),
    (2, 17, 129),
    (3, 10, 1024),
    (1, 100, 33),
    (2, 1000, 17),
    (30, 3, 7),
    (5, 10),
    (0, 10, 4),
    (2, 10, 0),
]


def inputs(size: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A value a class, two score tensors, a value a feature."""
    samples, classes, *features = size
    per_class = torch.randn(samples, classes, dtype=torch.float64)
    scores0, scores1 = torch.randn(2, *size, dtype=torch.float64).unbind()
    per_feature = torch.randn(samples, *features, dtype=torch.float64)
    return tuple(t.to(device, dtype) for t in (per_class, scores0, scores1, per_feature))  # type: ignore[return-value]


def exact(t: Tensor) -> Tensor:
    return t.double()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_step_is_the_reference(size, device_dtype):
    weights, scores, _, grad = inputs(size, *device_dtype)
    result = score_step(weights, scores, grad)
    assert result.dtype == grad.dtype
    assert result.is_contiguous()
    assert_close(result, reference.score_step(exact(weights), exact(scores), exact(grad)))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_line_integral_is_the_reference(size, device_dtype):
    log_p, scores0, scores1, move = inputs(size, *device_dtype)
    move = move * 0.05
    result = score_line_integral(log_p, scores0, scores1, move)
    assert result.dtype == (torch.float64 if log_p.dtype == torch.float64 else torch.float32)
    expected = reference.score_line_integral(exact(log_p), exact(scores0), exact(scores1), exact(move))
    assert_close(result, expected, log_p.dtype)
    torch.testing.assert_close(result.exp().sum(1), torch.ones_like(result[:, 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arranged", ["scores", "features", "classes"])
def test_strided_inputs(arranged, device):
    per_class, scores0, scores1, per_feature = inputs((4, 10, 3, 6, 5), device, torch.float32)
    expected = (
        score_step(per_class, scores0, per_feature),
        score_line_integral(per_class, scores0, scores1, per_feature),
    )
    if arranged == "scores":
        scores0 = scores0.permute(2, 4, 0, 1, 3).contiguous().permute(2, 3, 0, 4, 1)
        scores1 = torch.stack([scores1, scores1], dim=-1)[..., 0]
        assert not scores0.is_contiguous()
    elif arranged == "features":
        per_feature = per_feature.to(memory_format=torch.channels_last)
    else:
        per_class = per_class.t().contiguous().t()
    actual = score_step(per_class, scores0, per_feature), score_line_integral(per_class, scores0, scores1, per_feature)
    assert all(t.is_contiguous() for t in actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_impossible_classes_stay_impossible(device):
    log_p, scores0, scores1, move = inputs((3, 40, 7), device, torch.float32)
    log_p[:, ::3] = -math.inf
    result = score_line_integral(log_p, scores0, scores1, move)
    assert (result[:, ::3] == -math.inf).all()
    assert not result.isnan().any()
    assert_close(result, reference.score_line_integral(exact(log_p), exact(scores0), exact(scores1), exact(move)))


def test_nan_stays_nan(device):
    per_class, scores0, scores1, per_feature = inputs((3, 10, 50), device, torch.float32)
    scores0[1, 4, 33] = math.nan
    step = score_step(per_class, scores0, per_feature)
    assert step.isnan().nonzero().tolist() == [[1, 33]]
    assert score_line_integral(per_class, scores0, scores1, per_feature).isnan().any(1).tolist() == [False, True, False]


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 70), st.sampled_from(["kl", "se", "js", "l1_squared"]))
def test_a_class_independent_field_changes_nothing(seed, classes, features, kind):
    """The unconditional score cancels (Eq. 34): in the weights of any divergence, and in the normalisation."""
    generator = torch.Generator().manual_seed(seed)
    logits, log_p = torch.randn(2, 3, classes, generator=generator, dtype=torch.float64).log_softmax(2)
    scores0, scores1 = torch.randn(2, 3, classes, features, generator=generator, dtype=torch.float64)
    grad, move, field = torch.randn(3, 3, features, generator=generator, dtype=torch.float64)
    log_p.requires_grad_()
    weights = torch.autograd.grad(logit_divergence(logits, log_p, kind=kind).sum(), log_p)[0]
    same = score_step(weights, scores0 + 100 * field[:, None], grad)
    torch.testing.assert_close(same, score_step(weights, scores0, grad), rtol=1e-9, atol=1e-9)
    moved = score_line_integral(log_p, scores0 + field[:, None], scores1 + 3 * field[:, None], move)
    torch.testing.assert_close(moved, score_line_integral(log_p, scores0, scores1, move), rtol=1e-9, atol=1e-9)


def test_step_is_the_gradient_through_the_posterior(device):
    """Eq. 33 for Gaussian classes, where log p(·|x) can be differentiated: -Σ p ∇ log q + Cov(r, s)."""
    means, readout = torch.randn(4, 6, device=device).double(), torch.randn(6, 4, device=device).double()
    x = torch.randn(5, 6, device=device).double().requires_grad_()
    log_p = (-0.5 * (x[:, None] - means).square().sum(2)).log_softmax(1)
    expected = torch.autograd.grad(logit_divergence(torch.tanh(x) @ readout, log_p, kind="kl").sum(), x)[0]

    data_log_p = log_p.detach().requires_grad_()
    loss = logit_divergence(torch.tanh(x) @ readout, data_log_p, kind="kl").sum()
    model_gradient, weights = torch.autograd.grad(loss, (x, data_log_p))
    scores = (means - x[:, None]).detach()  # ∇ log p(x|y)
    torch.testing.assert_close(score_step(weights, scores, model_gradient), expected, rtol=1e-10, atol=1e-12)


def test_line_integral_is_exact_for_gaussian_classes(device):
    """Scores that are linear in x have an exact trapezoid."""
    means = torch.randn(4, 6, device=device).double()
    x, move = torch.randn(2, 5, 6, device=device).double()

    def log_posterior(x: Tensor) -> Tensor:
        return (-0.5 * (x[:, None] - means).square().sum(2)).log_softmax(1)

    end = score_line_integral(log_posterior(x), means - x[:, None], means - (x + move)[:, None], move)
    torch.testing.assert_close(end, log_posterior(x + move), rtol=1e-10, atol=1e-12)


def test_float32_accumulates_well(device):
    """A dot product of 200,000 terms."""
    log_p, scores0, scores1, move = inputs((1, 3, 200_000), device, torch.float32)
    result = score_line_integral(log_p, scores0, scores1, 1e-3 * move)
    expected = reference.score_line_integral(exact(log_p), exact(scores0), exact(scores1), exact(1e-3 * move))
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_gradient_passes_through(device):
    tensors = [t.requires_grad_() for t in inputs((2, 3, 4), device, torch.float32)]
    assert not score_step(tensors[0], tensors[1], tensors[3]).requires_grad
    assert not score_line_integral(*tensors).requires_grad


def test_opcheck(device):
    per_class, scores0, scores1, per_feature = inputs((4, 10, 3, 6, 5), device, torch.float32)
    channels_last = per_feature.to(memory_format=torch.channels_last)
    step, integral = torch.ops.scorematch.score_step.default, torch.ops.scorematch.score_line_integral.default
    opcheck(step, (per_class, scores0, per_feature))
    opcheck(step, (per_class.t().contiguous().t(), scores0.transpose(3, 4), channels_last.transpose(2, 3)))
    opcheck(integral, (per_class, scores0, scores1, per_feature))
    opcheck(integral, (per_class.t().contiguous().t(), scores0, scores1, channels_last))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": torch.rand(2, 4)}, ValueError, r"weights has shape \[2, 4\] but scores has shape \[2, 3, 5\]: expected \[2, 3\]"),
        ({"grad": torch.rand(2, 6)}, ValueError, r"grad has shape \[2, 6\] but scores has shape \[2, 3, 5\]: expected \[2, 5\]"),
        ({"scores": torch.rand(2)}, ValueError, r"scores has shape \[2\], but must be \[N, L, ...\]"),
        ({"weights": torch.rand(2, 3).double()}, TypeError, r"weights is torch.float64 but scores is torch.float32"),
        ({"grad": torch.rand(2, 5).double()}, TypeError, r"grad is torch.float64 but scores is torch.float32"),
        ({"grad": torch.rand(2, 5, device="meta")}, ValueError, r"grad is on meta but scores is on cpu"),
        ({"weights": None}, TypeError, r"weights must be a torch.Tensor, got NoneType"),
        ({"scores": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, r"scores is torch.int64; on the CPU"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {"weights": torch.rand(2, 3), "scores": torch.rand(2, 3, 5), "grad": torch.rand(2, 5)}
    with pytest.raises(error, match=message):
        score_step(**{**arguments, **change})


def test_bad_line_integral():
    log_p, scores, move = torch.rand(2, 3), torch.rand(2, 3, 5), torch.rand(2, 5)
    with pytest.raises(ValueError, match=r"scores1 has shape \[2, 3, 6\] but scores0 has shape \[2, 3, 5\]"):
        score_line_integral(log_p, scores, torch.rand(2, 3, 6), move)
    with pytest.raises(ValueError, match=r"move has shape \[2, 4\] but scores0 has shape"):
        score_line_integral(log_p, scores, scores, torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"log_p has shape \[2, 2\] but scores0"):
        score_line_integral(torch.rand(2, 2), scores, scores, move)
