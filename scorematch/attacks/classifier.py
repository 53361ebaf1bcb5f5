"""A model as attacks use it: logits and input gradients, counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..folding import Folding, copy_sharing_tensors
from ..inputs import handed
from .precision import full_precision

PACKAGE = __name__.partition(".")[0] + "."
Loss = Callable[..., Tensor]  # (logits [N, L], labels [N], …) to [N]


def logits_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a model returns for x [N, …]: [N, L] in float32 or float64; half precision becomes float32.

    Raises:
        ValueError: the model returns anything but a tensor [N, L] of floating-point numbers with L ≥ 2.
        RuntimeError, TypeError, ValueError: it fails; see :func:`output_of`.
    """
    logits = output_of(model, x)
    check_logits(logits, x)
    return logits if logits.dtype == torch.float64 else logits.float()


def output_of(model: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Whatever a model returns for x [N, …].

    Raises:
        RuntimeError, TypeError, ValueError: the model fails, as it does for inputs of another dtype, shape or device
            than it is made for; the message names those of x and of the parameters. Errors that say enough by
            themselves stay as they are: those of this package, those of a lack of memory, and all other classes.
    """
    if torch.compiler.is_compiling():
        return model(x)
    try:
        return model(handed(x))
    except (RuntimeError, TypeError, ValueError) as error:
        if not _is_bare(error, x):
            raise
        told = f"the model failed on {_kind(x)} inputs {list(x.shape)} on {x.device} ({_reason(error)})"
        own = dict.fromkeys(
            f"{_kind(parameter)} on {parameter.device}"
            for parameter in (model.parameters() if isinstance(model, nn.Module) else ())
        )
        raise type(error)(f"{told}; its parameters are {' and '.join(own)}" if own else told) from error


def _is_bare(error: Exception, x: Tensor) -> bool:
    """Whether what a model raised at x comes from torch or from the model, and may name nothing that the caller gave.

    A subclass, such as torch's for a lack of memory on a GPU, says what it is about.
    """
    if type(error) not in (RuntimeError, TypeError, ValueError) or "can't allocate memory" in str(error):
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    raised_in = "" if innermost is None else innermost.tb_frame.f_globals.get("__name__", "")
    return not raised_in.startswith(PACKAGE)


def _kind(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def _reason(error: Exception) -> str:
    """The line of an error that says what is wrong: the first one, but TorchScript puts its own words before it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "TorchScript" in lines[0] else 0]


def check_logits(logits: Any, x: Tensor) -> None:
    """Refuse what a model returned for x [N, …] if it is anything but floating-point logits [N, L] with L ≥ 2.

    Raises:
        ValueError: as said.
    """
    if not isinstance(logits, Tensor):
        hint = "; its .logits are: wrap the model in a module that returns those" if hasattr(logits, "logits") else ""
        raise ValueError(f"the model must return a tensor of logits [N, L], got {type(logits).__name__}{hint}")
    if logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        raise ValueError(
            f"the model must return logits [N, L] with L >= 2, got {list(logits.shape)} for x of shape {list(x.shape)}"
        )
    if not logits.is_floating_point():
        raise ValueError(f"the model must return floating-point logits, got {logits.dtype}")


def gradient_at(x: Tensor, values: Tensor, weights: Tensor | None = None, *, keep_graph: bool = False) -> Tensor:
    """The gradient of Σ w v in x, like x.

    Args:
        x: [N, …], where the graph of the values ends.
        values: what a model gave at x, or a function of it, with its graph.
        weights: w, like the values; None is 1.
        keep_graph: whether the graph will be used again.

    Raises:
        ValueError: no graph leads from the values to x.
    """
    weights = torch.ones_like(values) if weights is None else weights
    if (gradient := _along_graph(values, x, weights, keep_graph)) is None:
        raise ValueError(
            "the model must be differentiable in x, but no graph leads from its logits to x: let it run without "
            "torch.no_grad and without detach (of the attacks, Square alone needs no gradient)"
        )
    return gradient


def gradient_of(values: Tensor, x: Tensor, weights: Tensor, source: object, name: str = "model") -> Tensor:
    """Σ_y w_y ∇ₓ v_y for values v(x) [N, L] and weights w [N, L], like x; 0 where the values do not depend on x.

    Args:
        values: what ``source`` gave at x, with its graph.
        x: [N, …], where the graph ends.
        weights: [N, L].
        source: the model.
        name: what errors call it.

    Raises:
        ValueError: the values differ between samples although no graph leads to x, as those of a model that runs under
            ``no_grad``; their gradient would not be 0.
    """
    if (gradient := _along_graph(values, x, weights)) is not None:
        return gradient
    if not torch.allclose(values, values[:1].expand_as(values), rtol=0.0, atol=0.0, equal_nan=True):
        raise ValueError(
            f"{name} must be differentiable in x, got a {type(source).__name__} whose values differ between samples, "
            "though no graph leads to x: let it run without no_grad and without detach"
        )
    return torch.zeros_like(x)


def _along_graph(values: Tensor, x: Tensor, weights: Tensor, keep_graph: bool = False) -> Tensor | None:
    """The gradient of Σ w v in x; None where no graph leads from v to x."""
    if not values.requires_grad:
        return None
    return torch.autograd.grad(values, x, weights, retain_graph=keep_graph, allow_unused=True)[0]


def check_unwritten(x: Tensor, model: Any) -> None:
    """Refuse a model that wrote to its input: it would change the points that an attack goes on from.

    Args:
        x: a copy that was made for the one pass of ``model`` that it has gone through.

    Raises:
        ValueError: it was written to.
    """
    if x._version:
        name = type(model).__name__
        raise ValueError(f"the model, a {name}, changes its input in place: let it begin with x.clone()")


def log_mean_probabilities(passes: Sequence[Tensor]) -> Tensor:
    """log of the mean over K passes of softmax(z), [N, L]: the logits of a randomised model's expected prediction.

    NaN for a sample where some pass has a NaN. An infinite logit counts as the largest finite one.

    Args:
        passes: K logits [N, L].
    """
    logits = torch.stack(list(passes)).nan_to_num(nan=torch.nan, neginf=-torch.inf)
    return logits.log_softmax(2).logsumexp(0) - math.log(len(passes))


def predicted(logits: Tensor) -> Tensor:
    """The class of the largest logit, int64 [N]; −1, which is no class, where a logit is NaN.

    So a NaN counts as misclassified, whatever the label is.

    Args:
        logits: [N, L]; further dimensions before the classes stay as they are.
    """
    largest, labels = logits.max(-1)  # NaN counts as the largest
    return labels.masked_fill(largest.isnan(), -1)


class Classifier:
    """Calls a model and counts its passes over samples.

    Args:
        model: maps [N, …] to logits [N, L]; its parameters should not require gradients meanwhile.
        dtype: None computes as the model does; bfloat16 or float16 runs it under autocast. Logits come back in float32
            either way (float64 stays). Gradients have no NaN: it becomes 0, an infinite value the largest finite one.
        on_pass: called with the number of samples after each pass, forward or backward.
        chunk: about how many samples go through the model at once, always fewer than twice as many; None is all.
        channels_last: hand images to the model in this memory format.
        verdict_passes: over how many passes of a randomised model a verdict is taken; see :meth:`logits`.

    Attributes:
        is_sure: whether a point that fools the model once does so again. Otherwise chance may have decided at the first
            point that a search meets, and the search goes on to look for a clearer one.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        dtype: torch.dtype | None = None,
        on_pass: Callable[[int], None] = lambda samples: None,
        chunk: int | None = None,
        channels_last: bool = False,
        verdict_passes: int = 1,
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._on_pass = on_pass
        self._chunk = chunk
        self._arranged = in_channels_last if channels_last else torch.detach
        self._verdict_passes = verdict_passes
        self.is_sure = verdict_passes == 1
        self.forwards = 0  # passes of one sample
        self.backwards = 0
        self._broken: Tensor | int = 0

    def take_broken(self) -> int:
        """Gradients of one sample since the last call in which an element was NaN or infinite; waits for the device."""
        broken, self._broken = int(self._broken), 0
        return broken

    def _logits(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self._on_pass(len(x))
        if self._dtype is None:
            return logits_of(self._model, x)
        with torch.autocast(x.device.type, self._dtype):
            return logits_of(self._model, x)

    def _parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Tensors [N, …], cut alike, into parts of equal size."""
        count = max(len(tensors[0]) // self._chunk, 1) if self._chunk else 1
        return zip(*(t.tensor_split(count) for t in tensors), strict=True)

    def logits(self, x: Tensor) -> Tensor:
        """The logits by which a verdict is made, [N, L], without a graph.

        Over several passes, they are the :func:`log_mean_probabilities` of all passes.
        """
        with torch.no_grad():
            return _joined([self._judged(self._arranged(part)) for (part,) in self._parts(x)])

    def _judged(self, x: Tensor, known: Sequence[Tensor] = ()) -> Tensor:
        """The same for one part, with the logits of the passes that were made there already."""
        passes = [*known, *(self._logits(x) for _ in range(self._verdict_passes - len(known)))]
        return passes[-1] if self._verdict_passes == 1 else log_mean_probabilities(passes)

    def label(self, x: Tensor) -> Tensor:
        """The predicted class, int64 [N]; −1 where a logit is NaN."""
        return predicted(self.logits(x))

    def gradient(
        self, x: Tensor, loss: Loss, *goals: Tensor, passes: int = 1, judge: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, L], loss [N] (−∞ where it is NaN) and its gradient like x [N, …].

        Args:
            x: [N, …].
            loss: from logits [n, L] and the goals of the same n samples to [n].
            goals: labels [N] and whatever else the loss takes for each sample.
            passes: over how many evaluations of a randomised model the gradient is averaged; the loss is that of the
                last.
            judge: whether the logits are those of a verdict, for which further passes are made where these are too few.
        """
        parts = [self._gradient(part, loss, of_part, passes, judge) for part, *of_part in self._parts(x, *goals)]
        logits, values, gradients = (_joined(list(column)) for column in zip(*parts, strict=True))
        return logits, values, gradients

    def _gradient(
        self, x: Tensor, loss: Loss, goals: Sequence[Tensor], passes: int, judge: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self._arranged(x).requires_grad_()
        total: Tensor | None = None
        seen = []
        for _ in range(passes):
            with torch.enable_grad():
                logits = self._logits(x)
                value = loss(logits, *goals)
                gradient = gradient_at(x, value)
            seen.append(logits.detach())
            gradient = self._usable(gradient, passes)
            total = gradient if total is None else total + gradient
        assert total is not None
        value = value.detach().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        with torch.no_grad():
            judged = self._judged(x.detach(), seen) if judge else seen[-1]
        return judged, value, (total if passes == 1 else total / passes).contiguous()

    def class_gradients(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits [N, L], and a function for the gradients of single logits.

        The function takes one class for each sample, int64 [N], and returns the gradients of their logits, [N, …]. Each
        call is one backward pass.
        """
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(x)

        def gradient(classes: Tensor) -> Tensor:
            with torch.enable_grad():
                chosen = logits.gather(1, classes[:, None])
            return self._usable(gradient_at(x, chosen, keep_graph=True))

        return logits.detach(), gradient

    def _usable(self, gradient: Tensor, passes: int = 1) -> Tensor:
        """Count a backward pass and take out of its gradient [N, …] what is not finite."""
        self.backwards += len(gradient)
        self._on_pass(len(gradient))
        finite = gradient.sum(tuple(range(1, gradient.dim()))).isfinite()  # NaN and infinite elements show in the sum
        if gradient.device.type == "cpu" and bool(finite.all()):
            return gradient
        self._broken = self._broken + (~finite).sum()
        largest = torch.finfo(gradient.dtype).max / passes
        return gradient.nan_to_num(nan=0.0, posinf=largest, neginf=-largest)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def in_channels_last(x: Tensor) -> Tensor:
    """Images x [N, C, H, W] with the channels innermost in memory, without a graph.

    Of grey images torch's own conversion leaves the strides as they are, and convolutions then take them for the other
    format.
    """
    channels, height, width = x.shape[1:]
    arranged = x.detach().contiguous(memory_format=torch.channels_last)
    return arranged.as_strided(x.shape, (channels * height * width, 1, channels * width, channels))


def channels_last_works(model: Any, x: Tensor) -> bool:
    """Whether a model on the CPU computes the same from images that are channels_last in memory.

    Convolutions then are up to twice as fast. A model that flattens its images with ``view`` cannot take them.

    Args:
        model: a module in eval mode; anything else is not tried.
        x: [N, …], N ≥ 1.
    """
    if x.device.type != "cpu" or x.dim() != 4 or not isinstance(model, nn.Module):
        return False
    return _computes_the_same(model, in_channels_last(x[:2]), model, x[:2])


@contextmanager
def folded_copy(model: Any, x: Tensor) -> Iterator[nn.Module | None]:
    """A copy of a model whose batch norms are folded into the convolutions before them; the model stays as it is.

    The copy shares all tensors with the model but those that are folded. It is None where there is nothing to fold,
    where the model cannot be copied, or where the copy computes otherwise.

    Args:
        model: a module in eval mode; anything else is not looked into.
        x: [N, …], N ≥ 1.
    """
    if not isinstance(model, nn.Module):
        yield None
        return
    try:
        copied = copy_sharing_tensors(model)
    except Exception:  # whatever an attribute that cannot be copied raises
        yield None
        return
    folding = Folding(copied)
    with folding.applied():
        yield copied if folding.pairs and _computes_the_same(copied, x, model, x) else None


def _computes_the_same(model: nn.Module, x: Tensor, original: nn.Module, original_x: Tensor) -> bool:
    """Whether a model at x gives the logits of the original at its x, but for rounding, which TF32 would coarsen."""
    with torch.no_grad(), full_precision(x.device):
        expected = original(original_x)
        try:
            return _same(model(x), expected)
        except Exception:  # whatever a model raises when it is given what it is not made for
            return False


def _same(given: Tensor, expected: Tensor) -> bool:
    """Whether logits agree but for rounding."""
    size = float(expected.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max())
    return torch.allclose(given, expected, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def cache_chunk(model: Any, x: Tensor, threads: int, cache: int = 1 << 20) -> int | None:
    """How many samples to pass through a model at once on the CPU, so that its widest layer stays in the cache.

    Beside other work a pass of a small network is up to three times as fast in such chunks; alone, up to 1.3 times.

    Args:
        model: a module; anything else is not looked into.
        x: [N, …], N ≥ 1.
        threads: how many compute it; each has a cache of its own.
        cache: bytes, the second-level cache of a core of common processors.

    Returns:
        A power of two from 32, or None for whole batches.
    """
    if x.device.type != "cpu" or not isinstance(model, nn.Module):
        return None
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    if not modules:  # scripted modules take no hooks
        return None
    widest = 1

    def measure(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal widest
        if isinstance(output, Tensor):
            widest = max(widest, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(measure) for module in modules]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    fit = max(cache * threads // widest, 1)
    return max(32, 1 << (fit.bit_length() - 1))
