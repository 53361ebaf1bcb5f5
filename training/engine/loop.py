"""The training of a classifier: what a step is, what is validated, and what a checkpoint holds."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from scorematch import PGD, objectives
from scorematch.free import FreeAttack
from scorematch.graphs import AttackGraphs
from scorematch.noise import normal_like
from scorematch.objectives import Outcome, first_iterate, noise_directions
from scorematch.posteriors import Posterior
from scorematch.weight_perturbation import WeightPerturbation
from training import measures
from training.data import Data, check_record, is_own, spread, toy
from training.data.batches import Batches
from training.engine import Course, Engine, distributed, hardware
from training.engine.forward import forward_at
from training.engine.hardware import Hardware, Speed
from training.engine.optimisation import (
    batchnorm_momentum,
    build_average,
    build_optimizer,
    build_schedule,
    set_batchnorm_momentum,
)
from training.settings.config import RunSettings, as_table
from training.settings.errors import InputError

# Each purpose draws from a generator of its own, so that a longer attack does not change the order of the data.
PURPOSES = ("order", "augmentation", "attack", "validation", "evaluation")


class Draws(NamedTuple):
    """The random numbers of one step, None where its objective needs none.

    Attributes:
        start: [N, …] first iterate of the attack.
        directions: [K, N, …] noise in the place of the data gradient, for the K steps of the attack.
        noise: [N, …] noise of Gaussian augmentation.
        levels: [N] its standard deviations, in input units.
    """

    start: Tensor | None = None
    directions: Tensor | None = None
    noise: Tensor | None = None
    levels: Tensor | None = None

    def of(self, share: slice, dense: Callable[[Tensor], Tensor]) -> "Draws":
        """Those of some samples, laid out as ``dense`` does."""
        return Draws(
            start=None if self.start is None else dense(self.start[share]),
            directions=None if self.directions is None else self.directions[:, share].contiguous(),
            noise=None if self.noise is None else dense(self.noise[share]),
            levels=None if self.levels is None else self.levels[share],
        )


StepObjective = Callable[[nn.Module, Tensor, Tensor, Draws, WeightPerturbation | None], Outcome]


def generator(seed: int, purpose: str, device: torch.device | str = "cpu") -> Generator:
    """A generator for one purpose of one run."""
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose)])
    return Generator(device).manual_seed(int(sequence.generate_state(1, np.uint64)[0]) >> 1)


def bind_objective(
    settings: RunSettings,
    data: Data,
    posterior: Posterior | None,
    graphs: AttackGraphs | None = None,
    free: FreeAttack | None = None,
) -> StepObjective:
    """The objective of a run as a function of model, images, targets, random numbers and weight perturbation."""
    objective = _objective_of_targets(settings, data, posterior, graphs, free)
    if not settings.soft_targets:
        return objective
    assert posterior is not None
    return lambda model, x, y, *others: objective(model, x, objectives.soft_targets(posterior, x, y), *others)


def _objective_of_targets(
    settings: RunSettings,
    data: Data,
    posterior: Posterior | None,
    graphs: AttackGraphs | None,
    free: FreeAttack | None,
) -> StepObjective:
    if free is not None:
        return lambda model, x, y, *others: free.step(model, x, y)
    if settings.objective == "standard":
        return lambda model, x, y, *others: objectives.standard(model, x, y, divergence=settings.divergence)
    if settings.objective == "gaussian":
        gaussian = functools.partial(
            objectives.gaussian,
            gamma=settings.gamma if settings.held_alignment is None else 0.0,
            alignment=settings.held_alignment,
            divergence=settings.divergence,
            antithetic=settings.antithetic,
        )

        def noisy(model: nn.Module, x: Tensor, y: Tensor, draws: Draws, weights: WeightPerturbation | None) -> Outcome:
            assert draws.levels is not None
            return gaussian(model, x, y, sigma=draws.levels, noise=draws.noise)

        return noisy
    attack: dict[str, Any] = {
        "divergence": settings.divergence,
        "threat_model": settings.threat_model(data.lower, data.upper),
        "attack": settings.attack,
        "steps": settings.steps,
        "clip": settings.clip,
        "clip_form": settings.clip_form,
        "graphs": graphs,
    }
    if settings.attack_mode is not None:
        attack["attack_mode"] = settings.attack_mode
    function: Callable[..., Outcome]
    if settings.objective == "pgd_at":
        function = functools.partial(objectives.pgd_at, **attack)
    elif settings.objective == "trades":
        if settings.transported:
            attack |= {"posterior": posterior, "transport": settings.transported}
        function = functools.partial(objectives.trades, beta=settings.beta, **attack)
    else:
        assert posterior is not None
        attack |= {"target_mix": settings.target_mix, "data_gradient": settings.data_gradient}
        function = functools.partial(objectives.score_direct, posterior=posterior, **attack)

    def step(model: nn.Module, x: Tensor, y: Tensor, draws: Draws, weights: WeightPerturbation | None) -> Outcome:
        given = {} if draws.directions is None else {"data_gradient": draws.directions}
        return function(model, x, y, start=draws.start, weights=weights, **given)

    return step


def add_metrics(sums: dict[str, Tensor], outcome: Outcome) -> None:
    """Add the loss, the metrics and the number of the samples of an outcome; accuracies in per cent."""
    metrics = dict(outcome.metrics)
    metrics["train_attacked_acc"] = 100 * metrics.pop("accuracy")
    values = {"loss": outcome.loss.detach().mean(), **metrics, "samples": torch.ones_like(outcome.loss[0])}
    for name, value in values.items():
        sums[name] = sums.get(name, torch.zeros_like(value.detach())) + value.detach() * len(outcome.loss)


def course(settings: RunSettings, steps: int) -> Course:
    return Course(
        name=f"train {settings.objective}",
        epochs=settings.epochs,
        steps=steps,
        validate_every=settings.validate_every,
        save_every=settings.save_every,
        save_minutes=settings.save_minutes,
        keep_last=settings.keep_last,
        lr_hint=f"; try a smaller --lr (now {settings.lr:g})",
    )


def speed_of(settings: RunSettings, device: Hardware, steps: int, processes: int = 1) -> Speed:
    """How the network of a run is called on this hardware, with every ``auto`` decided.

    Args:
        settings: those of the run.
        device: what it runs on.
        steps: steps of the whole run.
        processes: the number of torchrun's processes.

    Raises:
        InputError: a graph is asked for, but the attack communicates between processes, which a graph cannot record.
    """
    searches = settings.searches and not settings.free_replays
    passes = settings.free_replays or 1 + (settings.attack_steps if searches else 0)
    attack_mode = settings.attack_mode_in_steps
    communicates = processes > 1 and settings.sync_batchnorm and attack_mode != "eval"
    if settings.graph == "on" and communicates:
        raise InputError(
            f"graph: 'on' in {processes} processes, whose attack in {attack_mode} mode synchronises batch norm, "
            "allowed: with --no-sync-batchnorm or --attack-mode eval"
        )
    return Speed(
        precision=hardware.precision_of(settings.precision, device),
        compile=hardware.compiles(settings.compile, device, steps * passes),
        graph=hardware.records(settings.graph, device, possible=searches and not communicates),
        fold=settings.fold,
        channels_last=settings.channels_last,
        fused=settings.fused,
    )


class LossOfStep(nn.Module):
    """An objective as a module.

    DistributedDataParallel then sees one forward and one backward pass in each step. The passes of the attack, which
    runs inside without parameter gradients, synchronise nothing.
    """

    def __init__(self, model: nn.Module, objective: StepObjective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, x: Tensor, y: Tensor, draws: Draws, weights: WeightPerturbation | None) -> Outcome:
        return self.objective(self.model, x, y, draws, weights)


class Trainer(Engine):
    """Training of a classifier.

    Under torchrun each process has a Trainer. All make the same batches and random starts, and take every
    ``world_size``-th sample of them. So what is computed depends on the number of processes only by rounding.
    """

    def __init__(
        self, settings: RunSettings, data: Data, model: nn.Module, posterior: Posterior | None, out: Path
    ) -> None:
        self.settings, self.data = settings, data
        device = data.x_train.device
        if settings.channels_last and len(data.input_shape) == 3:
            model = model.to(memory_format=torch.channels_last)
        self.generators = {
            "order": generator(settings.seed, "order"),
            "augmentation": generator(settings.seed, "augmentation", device),
            "attack": generator(settings.seed, "attack", device),
        }
        # Estimated posteriors get labels: an anchor at p_d(y|x) would hand them the oracle. (In TRADES it cancels.)
        use_labels = data.p_train is None or settings.objective == "score_direct" or settings.soft_targets
        targets: Tensor = data.y_train if use_labels else data.p_train  # type: ignore[assignment]
        self.batches = Batches(settings, data, targets, self.generators["order"], self.generators["augmentation"])
        super().__init__(course(settings, self.batches.steps), device, out)
        self._check_shares(model)
        self.model = model
        # A network from elsewhere may draw where no layer tells; others draw nothing.
        self.random_layers = ":" in settings.model or any(isinstance(m, _DropoutNd) for m in model.modules())
        if self.world > 1 and settings.sync_batchnorm:
            self.model = distributed.synchronise_batchnorm(model)

        self.threat_model = settings.threat_model(data.lower, data.upper)
        self.speed = speed_of(
            settings, hardware.hardware_of(device), self.course.epochs * self.course.steps, self.world
        )
        hardware.prepare(device, self.speed.precision, deterministic=settings.deterministic)
        self.forward = forward_at(self.speed, self.model)
        self.start = settings.attack_start or objectives.default_of(settings.objective, "start")
        self.free: FreeAttack | None = None
        if settings.free_replays:
            self.free = FreeAttack(self.threat_model, settings.free_replays, settings.divergence)
        graphs = AttackGraphs() if self.speed.graph else None
        objective = bind_objective(settings, data, posterior, graphs, self.free)
        self.loss_of_step: nn.Module = LossOfStep(self.forward, objective)
        if self.world > 1:
            self.loss_of_step = DistributedDataParallel(
                self.loss_of_step, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True
            )
        self.optimizer = build_optimizer(settings, self.model)
        updates = self.course.steps * (settings.free_replays or 1)
        self.schedule = build_schedule(settings, self.optimizer, updates)
        self.average = build_average(settings, self.model, settings.epochs * updates)
        self.search = self._fast_path()
        # What is told of it: whether something is folded, in the attack of a step or in the search of a validation.
        in_eval_mode = settings.attack_mode_in_steps == "eval" or self.search is not None
        self.speed = dataclasses.replace(self.speed, fold=self.forward.folds and in_eval_mode)
        self.lr = settings.lr  # of the last step
        self.start_of_epoch = self.generators["order"].get_state()

    def _fast_path(self) -> nn.Module | None:
        """The network to evaluate, called as in training, where that differs from calling it as it is."""
        if self.speed.precision == "float32" and not self.speed.compile:
            return None
        return forward_at(self.speed, self.network)

    def _check_shares(self, model: nn.Module) -> None:
        """Every process needs a sample of every part of every batch, and two where batch norm sees that part alone."""
        settings, total = self.settings, len(self.data.x_train)
        size, parts = settings.batch_size, self.world * settings.accumulate
        smallest = size if settings.generated else min(size, total - (self.batches.steps - 1) * size)
        alone = self.world == 1 or not settings.sync_batchnorm
        two = alone and any(isinstance(module, _BatchNorm) for module in model.modules())
        if smallest < parts * (2 if two else 1):
            shared = f" for {self.world} processes with {settings.accumulate} parts each" if parts > 1 else ""
            least = "two samples each, as the model has batch norm" if two else "one sample each"
            raise InputError(
                f"batch_size: {size} of {total} samples leaves a batch of {smallest}{shared}, allowed: at least {least}"
            )

    @property
    def network(self) -> nn.Module:
        """The classifier to evaluate."""
        return self.model if self.average is None else self.average.module

    def description(self) -> dict[str, Any]:
        return {
            "settings": as_table(self.settings),
            "network": self.network.state_dict(),
            "statistics": self.data.statistics,
            "data": self.record,
        }

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data; made once, as it waits for the device."""
        return self.data.record()

    def check_saved(self, saved: dict[str, Any], path: Path) -> None:
        if is_own(self.settings.data):
            check_record(saved.get("data"), self.data, path, exact=True)

    def resume(self) -> None:
        super().resume()
        if self._is_of_best() or not self.best or self.settings.selection == "last":
            return
        if not (self.out / "best.pt").exists():
            raise InputError(f"resume: {self.out} holds no best.pt, which the run ends with, expected all of its files")

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generators": {purpose: g.get_state() for purpose, g in self.generators.items()},
            "start_of_epoch": self.start_of_epoch if self.step else self.generators["order"].get_state(),
            "lr": self.lr,
            "free": self._free_state(),
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        for purpose, generator_state in saved["generators"].items():
            self.generators[purpose].set_state(generator_state.cpu())
        if self.free is not None:
            held = saved["free"]["perturbation"]  # of the whole batch: the number of processes may have changed
            mine = None if held is None else held[self.rank :: self.world].to(self.device)
            self.free.load_state_dict({"perturbation": mine})
        self.start_of_epoch = saved.get("start_of_epoch", saved["generators"]["order"]).cpu()
        self.lr = saved.get("lr", self.lr)

    def _free_state(self) -> dict[str, Any] | None:
        if self.free is None:
            return None
        held = self.free.state_dict()["perturbation"]
        return {"perturbation": None if held is None else distributed.interleaved(held)}

    def steps_from(self, first: int) -> Iterator[dict[str, Tensor]]:
        if first:
            self.generators["order"].set_state(self.start_of_epoch)
        else:
            self.start_of_epoch = self.generators["order"].get_state()
        for index in self.batches.epoch(first):
            yield self._step(index)

    def weights(self) -> list[Tensor]:
        return list(self.model.parameters())

    def epoch_metrics(self) -> dict[str, float]:
        return {"lr": self.lr, "weight_norm": float(torch.nn.utils.get_total_norm(self.weights()))}

    def _step(self, index: Tensor) -> dict[str, Tensor]:
        """One step on the samples ``index`` (and the generated ones that belong to it); the sums of its metrics."""
        settings = self.settings
        x, targets = self.batches.batch(index, self.steps_done)
        if self.random_layers:
            distributed.seed_step(settings.seed, self.steps_done)
        self.model.train()
        self._set_batchnorm(self.steps_done)
        draws = self._draws(x)
        sums: dict[str, Tensor] = {}
        for _ in range(settings.free_replays or 1):  # free adversarial training: each time an update
            self.optimizer.zero_grad(set_to_none=True)
            counted = self._accumulated(x, targets, draws, sums)
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            sums["gradient_norm"] = sums.get("gradient_norm", torch.zeros_like(norm)) + norm * counted
            self._update()
        return sums

    def _draws(self, x: Tensor) -> Draws:
        settings, generator = self.settings, self.generators["attack"]
        if settings.objective == "gaussian":
            levels = self._noise_levels(x)
            return Draws(noise=normal_like(x, generator), levels=levels)
        if not settings.searches or self.free is not None:
            return Draws()
        assert self.start is not None
        start = first_iterate(x, self.threat_model, self.start, generator, settings.attack)
        directions = None
        if settings.data_gradient == "noise":
            directions = noise_directions(x, settings.steps, generator, settings.attack)
        return Draws(start, directions)

    def _noise_levels(self, x: Tensor) -> Tensor:
        """The standard deviations [N] of this step's Gaussian augmentation."""
        settings = self.settings
        first, last = settings.sigma[0], settings.sigma[-1]
        sigma: float | tuple[float, float] = (first, last) if first < last else first
        if settings.final_sigma is not None:
            share = self.steps_done / max(self.course.all_steps - 1, 1)
            sigma = objectives.annealed(share, sigma=first, final_sigma=settings.final_sigma).sigma
        return objectives.noise_levels(x, sigma, self.generators["attack"])

    def _accumulated(self, x: Tensor, targets: Tensor, draws: Draws, sums: dict[str, Tensor]) -> int:
        """The gradient of the mean loss over a batch, in parts; adds to the sums of the metrics.

        Returns the number of samples of this process.
        """
        settings, counted = self.settings, 0
        for part in range(settings.accumulate):
            share = slice(self.rank * settings.accumulate + part, None, self.world * settings.accumulate)
            mine = draws.of(share, self._dense)
            with self._perturbation() as weights:
                if isinstance(self.loss_of_step, DistributedDataParallel):
                    self.loss_of_step.require_backward_grad_sync = part == settings.accumulate - 1
                outcome: Outcome = self.loss_of_step(self._dense(x[share]), targets[share], mine, weights)
                # DistributedDataParallel takes the mean over the processes.
                whole = len(outcome.loss) == len(x)
                (outcome.loss.mean() if whole else outcome.loss.sum() * (self.world / len(x))).backward()
            add_metrics(sums, outcome)
            counted += len(outcome.loss)
        return counted

    def _update(self) -> None:
        self.lr = float(self.schedule.get_last_lr()[0])
        self.optimizer.step()
        if self.speed.fused:  # it does not tell that it has written
            torch.autograd.graph.increment_version(list(self.model.parameters()))
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _set_batchnorm(self, step: int) -> None:
        momentum = batchnorm_momentum(self.settings, step)
        if momentum is not None:
            set_batchnorm_momentum(self.model, momentum)

    def _perturbation(self) -> AbstractContextManager[WeightPerturbation | None]:
        if not self.settings.awp or self.epoch < self.settings.awp_warmup:
            return nullcontext()

        def reduce(gradients: Sequence[Tensor]) -> None:
            for gradient in gradients:
                distributed.summed(gradient)

        return WeightPerturbation(self.model, self.settings.awp, reduce=reduce)

    def _dense(self, values: Tensor) -> Tensor:
        return values.contiguous(memory_format=self.batches.format) if values.dim() == 4 else values.contiguous()

    def validate(self) -> dict[str, float]:
        """Clean and robust accuracy on the validation split, per cent, always from the same random starts.

        Beside them the clean accuracy on as many training images, not augmented. Every process then has the statistics
        of the first one, also where there is nothing to measure: that is the network which is saved and evaluated.
        """
        # DistributedDataParallel does so at the start of a step alone, and never for the average.
        distributed.share_buffers(self.model)
        if self.average is not None:
            distributed.share_buffers(self.average.module)  # not its count, on the CPU, which NCCL cannot send
        settings, data = self.settings, self.data
        x, y = data.x_validation, data.y_validation
        if not len(x):
            return {}
        attack = PGD(self.threat_model, steps=settings.validation_steps, restarts=1, losses=settings.validation_losses)
        start = generator(settings.seed, "validation", x.device)

        def robust(x: Tensor, y: Tensor) -> Tensor:
            parts = []
            for xs, ys in zip(x.split(measures.BATCH), y.split(measures.BATCH), strict=True):
                self.stop_if_asked()
                parts.append(measures.robust(self.network, xs, ys, attack, start, search=self.search))
            return torch.cat(parts)

        seen = spread(len(x), len(data.x_train)).to(x.device)
        values = {
            "train_acc": measures.per_cent(measures.correct(self.network, data.x_train[seen], data.y_train[seen])),
            "val_acc": measures.per_cent(measures.correct(self.network, x, y)),
            "val_pgd_acc": measures.per_cent(measures.shared(robust, x, y)),
        }
        return values | (toy.robust_errors(self.network) if data.name == "toy" else {})

    def is_best(self, entry: dict[str, float]) -> bool:
        """Highest robust validation accuracy, then highest clean one, then the later epoch.

        Standard training is ranked by clean accuracy first: its robust accuracy is highest before it has learned much.
        """
        order = ("val_pgd_acc", "val_acc") if self.settings.searches else ("val_acc", "val_pgd_acc")
        if not len(self.data.x_validation):
            return False
        better = [entry[key] for key in order] >= [self.best.get(key, -1.0) for key in order]
        if better:
            self.best = {"epoch": self.epoch, **{key: entry[key] for key in order}}
        return better

    def _shown(self, entry: dict[str, float]) -> dict[str, str]:
        robust = {"val_pgd": f"{entry['val_pgd_acc']:.1f} %"} if "val_pgd_acc" in entry else {}
        return super()._shown(entry) | robust
