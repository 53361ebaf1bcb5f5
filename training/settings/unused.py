"""Options that a run does not read. Whoever gives one expects it to change something, so the programs name them."""

import dataclasses
import sys
from collections.abc import Callable, Sequence

from training.data import FOLDER, OFFICIAL
from training.settings import command_line
from training.settings.config import RunSettings
from training.settings.posterior import PosteriorSettings

OF_GAUSSIAN = ("sigma", "gamma", "alignment", "final_sigma", "antithetic")
OF_SEARCH = ("attack", "attack_start", "attack_mode", "clip")
OF_SCORES = ("anchor", "smoothing", "centering", "nodes", "linear", "top_k", "classes", "teacher", "augment")
OF_CLASSIFIERS = ("likelihood_weight", "energy_weight", "temperature")
OF_POSTERIORS = tuple(field.name for field in dataclasses.fields(PosteriorSettings))
OF_NETWORKS = tuple(name for name in OF_POSTERIORS if name not in ("sigma", "max_points"))


def _asks_posterior(settings: RunSettings) -> bool:
    return settings.objective == "score_direct" or settings.soft_targets or settings.transported > 0


def _folds(settings: RunSettings) -> bool:
    """Whether attacks may fold batch norm: in training in eval mode, or in validations in another precision."""
    if settings.compile == "on":
        return False
    return settings.attack_mode_in_steps == "eval" or settings.precision != "float32"


# What options there are, what reads them, and whether this run does. All lines that name an option must hold for it.
OF_ASKING = "with transport above 0, soft_targets or objective score_direct"
READERS: tuple[tuple[tuple[str, ...], str, Callable[[RunSettings], bool]], ...] = (
    (("posterior", "posterior_from"), OF_ASKING, lambda s: s.posterior is None or _asks_posterior(s)),
    (("beta",), "with objective trades", lambda s: s.objective == "trades"),
    (OF_GAUSSIAN, "with objective gaussian", lambda s: s.objective == "gaussian"),
    (OF_SEARCH, "with objectives pgd_at, trades and score_direct", lambda s: s.searches),
    (("fold",), "with an attack in eval mode, such as that of trades, and without compile", _folds),
    (("steps",), "with attack pgd in training", lambda s: s.searches and s.attack == "pgd" and not s.free_replays),
    (("clip_form",), "with clip above 0", lambda s: s.clip > 0),
    (("label_smoothing_over",), "with label_smoothing above 0", lambda s: s.label_smoothing > 0),
    (("toy_labels",), "on the toy", lambda s: s.data == "toy"),
    (("momentum",), "with optimizer sgd", lambda s: s.optimizer == "sgd"),
    (("nesterov",), "with optimizer sgd and a momentum", lambda s: s.optimizer == "sgd" and s.momentum > 0),
    (("warmup",), "with schedule onecycle", lambda s: s.schedule == "onecycle"),
    (("milestones", "lr_decay"), "with schedule multistep", lambda s: s.schedule == "multistep"),
    (("averaging_buffers",), "with averaging above 0", lambda s: s.averaging > 0),
    (("autoattack_samples", "autoattack_compile"), "with autoattack", lambda s: s.autoattack != "none"),
)
READERS_OF_DATA = {  # the data sets that read an option
    "data_root": (*OFFICIAL, FOLDER),
    "download": OFFICIAL,
}
READERS_OF_POSTERIORS: tuple[tuple[tuple[str, ...], str, Callable[[PosteriorSettings], bool]], ...] = (
    (OF_NETWORKS, "with a posterior that is a network", lambda p: p.name not in ("kernel_density", "oracle")),
    (("sigma",), "with a posterior that is estimated", lambda p: p.name != "oracle"),
    (("max_points",), "with kernel_density, as posterior or anchor", lambda p: "kernel_density" in (p.name, p.anchor)),
    (OF_SCORES, "with posterior score_network", lambda p: p.name == "score_network"),
    (("smoothing",), "with anchor label", lambda p: p.anchor in (None, "label")),
    (
        OF_CLASSIFIERS,
        "with noise_conditional_classifier or joint_energies, and with anchor classifier",
        lambda p: p.name != "score_network" or p.anchor == "classifier",
    ),
    (("averaging",), "with half_life 0", lambda p: p.half_life == 0),
    (("noise_mean", "noise_deviation"), "with noise log_normal", lambda p: p.noise == "log_normal"),
    (("multipliers",), "with network unet", lambda p: p.network == "unet"),
    (("depth",), "with network mlp or conv", lambda p: p.network != "unet"),
    (("patch",), "with network conv", lambda p: p.network == "conv"),
)


def unused(settings: RunSettings, arguments: Sequence[str]) -> dict[str, str]:
    """The options among ``arguments`` that a run with these settings does not read, each with what does read it.

    Milestones that come too late are among them even if a recipe names them.
    """
    found = unused_of_data(settings.data, arguments)
    for name in command_line.names(arguments):
        group, _, own = name.rpartition(".")
        if not group:
            where = [where for options, where, reads in READERS if name in options and not reads(settings)]
        elif _asks_posterior(settings):
            posterior = settings.posterior_settings
            where = [where for names, where, reads in READERS_OF_POSTERIORS if own in names and not reads(posterior)]
        else:
            where = ["with a posterior" if settings.posterior is None else OF_ASKING]
        if where:
            found[name] = where[0]
    late = [epoch for epoch in settings.milestones if epoch >= settings.epochs]
    if settings.schedule == "multistep" and late:  # those of a recipe are given by no option, but --epochs may be
        found[" ".join(["milestones", *map(str, late)])] = f"with more epochs than {settings.epochs}"
    return found


def unused_of_data(data: str, arguments: Sequence[str]) -> dict[str, str]:
    """The options among ``arguments`` that look for files which the data set does not have, each with what has them."""
    given = command_line.names(arguments)
    readers = {name: which for name, which in READERS_OF_DATA.items() if name in given and data not in which}
    return {name: f"with --data {', '.join(which)}" for name, which in readers.items()}


def reads(settings: RunSettings, name: str) -> bool:
    """Whether a run with these settings reads the option ``name``."""
    return all(reader(settings) for options, _, reader in READERS if name in options)


def posterior_reads(settings: PosteriorSettings, name: str) -> bool:
    """Whether a posterior with these settings, in its training or afterwards, reads the one called ``name``."""
    return all(reader(settings) for options, _, reader in READERS_OF_POSTERIORS if name in options)


def print_notes(found: dict[str, str]) -> None:
    """Say so on standard error, a line for each option."""
    for name, where in found.items():
        print(f"note: --{name.replace('_', '-')} changes nothing here, it counts {where}", file=sys.stderr)
