"""Models that other frameworks have wrapped, exported or spread over processes."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from library_autoattack import alone, data
from library_models import small_cnn
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from scorematch import PGD, AutoAttack, Normalised, ThreatModel
from scorematch.model_state import borrowed
from scorematch.objectives import Outcome, pgd_at, score_direct, trades
from scorematch.posteriors import KernelDensity
from scorematch.weight_perturbation import WeightPerturbation

BALL = ThreatModel("linf", 0.1, step_size=0.05)
STEPS = 3


def in_two_processes(work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returns in each of two processes of torch.distributed."""
    start_processes(_process, (work, str(folder), arguments), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(2)]


def _process(rank: int, work: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # Where processes wait for each other forever, this ends them.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    torch.save(work(rank, *arguments), f"{folder}/result{rank}.pt")
    torch.distributed.destroy_process_group()


def objectives(x: Tensor, y: Tensor) -> dict[str, Callable[..., Outcome]]:
    posterior = KernelDensity(x, y, num_classes=10, sigma=0.5)
    return {
        "pgd_at": partial(pgd_at, attack_mode="frozen"),
        "trades": trades,
        "score_direct": partial(score_direct, posterior=posterior),
        "weight perturbation": pgd_at,
    }


def sum_of_processes(gradients: Sequence[Tensor]) -> None:
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)


def trained_weights(rank: int, wrap: Callable[[nn.Module], nn.Module] | None) -> dict[str, Tensor]:
    """The weights after some steps of each objective, each process with its half of the batch.

    Without a wrapper the mean of the gradients is taken by hand.
    """
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(16) % 10
    found = {}
    for name, objective in objectives(x, y).items():
        model = small_cnn().double()
        called = model if wrap is None else wrap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            mine = slice(8 * rank, 8 * rank + 8)
            seed = torch.Generator().manual_seed(10 * step + rank)
            perturbed = name == "weight perturbation"
            with WeightPerturbation(called, 0.01, reduce=sum_of_processes) if perturbed else nullcontext() as weights:
                options = {"threat_model": BALL, "steps": 2, "weights": weights, "generator": seed}
                outcome = objective(called, x[mine], y[mine], **options)
                optimizer.zero_grad()
                outcome.loss.mean().backward()
            if wrap is None:
                sum_of_processes([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.grad /= 2
            optimizer.step()
        found[name] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return found


def ways(rank: int) -> dict[str, dict[str, Tensor]]:
    return {
        "by hand": trained_weights(rank, None),
        "usual": trained_weights(rank, DistributedDataParallel),
        "static graph": trained_weights(rank, partial(DistributedDataParallel, static_graph=True)),
        "a part": trained_weights(rank, lambda model: Normalised(DistributedDataParallel(model), [0.0], [1.0])),
    }


def test_data_parallel_training_takes_the_mean_gradient(processes: ForkServerContext, tmp_path: Path) -> None:
    found = in_two_processes(ways, tmp_path)
    expected = found[0]["by hand"]
    for one in found:
        for way, weights in one.items():
            for name, values in weights.items():
                torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-12, msg=f"{name}, {way}")


def different_passes(rank: int, folder: str) -> Any:
    """An attack by the first process alone, one of both on samples of their own, and one that is shared out."""
    model, x, y = data(batch_norm=True)
    wrapped = DistributedDataParallel(model)
    adversary = alone(wrapped, "apgd-ce", log_path=f"{folder}/log{rank}")
    if rank == 0:
        adversary.run_standard_evaluation(x, y)
    mine = slice(0, 30) if rank == 0 else slice(30, 40)
    own = adversary.run_standard_evaluation(x[mine], y[mine])
    adversary.share_samples = True
    together = adversary.run_standard_evaluation(x, y)
    PGD(BALL, steps=5, restarts=2 - rank)(wrapped, x[mine], y[mine])
    assert not vars(wrapped).get("forward")
    return own, together


def test_processes_attack_a_data_parallel_model_as_they_like(processes: ForkServerContext, tmp_path: Path) -> None:
    model, x, y = data(batch_norm=True)
    expected = alone(model, "apgd-ce").run_standard_evaluation(x, y)
    (first, whole), (second, again) = in_two_processes(different_passes, tmp_path, str(tmp_path))
    alone_line = "this is one of 2 processes, alone with its samples; share_samples=True shares them out"
    assert [(tmp_path / f"log{rank}").read_text().count(alone_line) for rank in range(2)] == [2, 1]
    for found in (whole, again):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    for found, (part, labels) in ((first, (x[:30], y[:30])), (second, (x[30:], y[30:]))):
        by_itself = alone(model, "apgd-ce").run_standard_evaluation(part, labels)
        torch.testing.assert_close(found, by_itself, rtol=0, atol=1e-9)


def refusals(rank: int) -> list[str]:
    """What sharing says to processes that differ, and what an evaluation says to a model spread over them."""
    model, x, y = data()
    told = []

    def tell(adversary: AutoAttack, x: Tensor, y: Tensor) -> None:
        with pytest.raises((TypeError, ValueError)) as refused:
            adversary.run_standard_evaluation(x, y)
        told.append(str(refused.value))

    tell(alone(model, "apgd-ce", share_samples=True), x.roll(rank, 0), y)
    tell(alone(model, "apgd-ce", share_samples=True, eps=0.01 + 0.01 * rank), x, y)
    other = small_cnn(seed=rank).double()
    tell(alone(other, "apgd-ce", share_samples=True), x, y)

    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    tell(alone(fully_shard(model, mesh=mesh), "apgd-ce"), x, y)  # type: ignore[arg-type]
    return told


def test_processes_that_cannot_share_are_refused(processes: ForkServerContext, tmp_path: Path) -> None:
    first, second = in_two_processes(refusals, tmp_path)
    assert first == second
    for message, differs in zip(first, ("data set", "eps, list of attacks", "model"), strict=False):
        assert message.startswith("share_samples takes the same model, samples and settings in all processes, but")
        assert f"ranks 0 and 1 differ in {differs};" in message
    assert "model must be whole in each process" in first[3]


def test_data_parallel_is_given_back_after_an_error(processes: ForkServerContext, tmp_path: Path) -> None:
    assert in_two_processes(given_back, tmp_path) == [True, True]


def given_back(rank: int) -> bool:
    model = DistributedDataParallel(small_cnn())
    with borrowed(model, "train"), borrowed(model):
        assert vars(model)["forward"] == model.module.__call__
    with pytest.raises(KeyError), borrowed(model):
        raise KeyError
    return "forward" not in vars(model)


def test_an_exported_model() -> None:
    model, x, y = data()
    batch = torch.export.Dim("batch", min=1, max=512)
    exported = torch.export.export(model, (x[:8],), dynamic_shapes=({0: batch},)).module()
    expected = alone(model, "apgd-ce").run_standard_evaluation(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its attribute says training mode, but it computes in the one of the export
        found = alone(exported, "apgd-ce").run_standard_evaluation(x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert trades(exported, x, y, threat_model=BALL, steps=2).loss.isfinite().all()


def test_an_output_with_logits_is_explained() -> None:
    model, x, y = data()

    def with_more(x: Tensor) -> Any:
        return SimpleNamespace(logits=model(x))

    hint = r"must return a tensor of logits \[N, L\], got SimpleNamespace; its \.logits are: wrap the model"
    with pytest.raises(ValueError, match=hint):
        AutoAttack(with_more, eps=0.1, verbose=False).run_standard_evaluation(x, y)
    with pytest.raises(ValueError, match=r"got tuple$"):
        AutoAttack(lambda x: (model(x),), eps=0.1, verbose=False).run_standard_evaluation(x, y)
