"""Train one classifier with one objective and measure its robustness: ``python -m training.run``.

    python -m training.run --objective score_direct
    python -m training.run --objective trades --divergence se --seed 1 --out runs/trades-se-1
    python -m training.run --resume runs/trades-se-1

A run writes into its folder: config.toml, metrics.jsonl (one object an epoch), checkpoint.pt (last epoch), best.pt
(best validation), posterior.pt (where one is used; its networks are trained in score-network/ and classifier/),
tensorboard/, and at the end curve.json, paths.json, fooled.npz (a few images that fool the model), toy.json where they
apply, summary.json and, last of all, report.html, a page that shows all this.
autoattack.pt exists only until AutoAttack is finished.
"""

import dataclasses
import functools
import io
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from torch import Generator, Tensor, nn

import scorematch
from scorematch import PGD, AutoAttack
from scorematch.posteriors import Posterior
from training import data, measures, models
from training.data import Data, toy
from training.data.batches import fewer_steps
from training.data.generated import EXPECTED
from training.engine import checkpoint, distributed, hardware, posteriors
from training.engine.claims import OF_RUNS_FOLDER, claimed, refuse_left_over
from training.engine.hardware import Hardware, Speed
from training.engine.loop import Trainer, generator
from training.engine.progress import progress_bar
from training.reports import run as report
from training.settings import command_line, config, unused
from training.settings.config import RunSettings
from training.settings.errors import InputError, Interrupted, StopError, out_of_memory, run_program

STATE = "autoattack.pt"  # how far AutoAttack has come
AUDITED = 500  # test samples on which the posterior is attacked itself
FOOLED, FOOLED_AMONG = 8, 256  # images that fool the network, shown in the report, among the first so many of the test
PATH_SAMPLES = 4  # test samples whose posteriors are followed along an attack, for the report


def main(arguments: list[str]) -> None:
    settings = config.parse(arguments)
    settings = dataclasses.replace(settings, threads=config.resolve_threads(settings.threads))
    found = unused.unused(settings, arguments)
    if settings.dry_run:
        unused.print_notes(found)
        print(tomli_w.dumps(config.as_table(settings)), end="")
        return
    torch.set_num_threads(settings.threads)
    if settings.deterministic:
        hardware.only_deterministic()
    device = distributed.device_of_this_process(config.resolve_device(settings.device))
    with distributed.processes(device):
        if distributed.rank() == 0:
            unused.print_notes(found)
        run(settings, device)


def run(settings: RunSettings, device: torch.device) -> None:
    load = functools.partial(data.load, settings.data_settings)
    loaded = (distributed.in_turns(load) if settings.download else load()).to(device)
    config.validate_for(settings, loaded.format)
    if settings.autoattack != "none" and settings.autoattack_samples > len(loaded.x_test):
        raise InputError(
            f"autoattack_samples: {settings.autoattack_samples} is out of range, allowed: 0 (all) or up to "
            f"{len(loaded.x_test)} test samples"
        )
    for path in settings.generated:
        if not path.is_file():  # what is in it is looked at after the posterior
            raise InputError(f"generated: {path} is not a file, expected {EXPECTED}")
    torch.manual_seed(settings.seed)
    # A run that goes on has weights of its own.
    fresh = settings.resume is None or not (settings.resume / "checkpoint.pt").exists()
    model = models.build(
        settings.model,
        loaded.input_shape,
        loaded.num_classes,
        loaded.statistics,
        pretrained=settings.pretrained,
        weights=fresh,
    ).to(device)

    given = None
    if settings.posterior_from is not None and not has_posterior(settings.resume):
        given = read_posterior(settings, settings.posterior_from, loaded)

    with ExitStack() as claims:
        out = distributed.by_first(lambda: prepare_folder(settings, claims))
        if (out / "summary.json").exists():
            if distributed.rank() == 0:
                (out / STATE).unlink(missing_ok=True)
                report.write(out)
                print(f"{out} is finished already")
                print_table(checkpoint.read_json(out / "summary.json"))
            return
        try:
            train_and_evaluate(settings, loaded, model, given, out)
        except InputError:
            if distributed.rank() == 0 and settings.resume is None:
                leave_if_empty(out)
            raise
        except Interrupted as signal:
            raise Interrupted(f"{signal}, {saved(settings, out)}") from None
        except Exception as error:
            if (told := out_of_memory(error)) is None:
                raise
            raise StopError(
                f"out of memory ({told}); --accumulate 2 in a new run needs about half of it; {saved(settings, out)}"
            ) from None


def leave_if_empty(out: Path) -> None:
    """Remove the folder of a run in which nothing is but its settings, so that the corrected command can have it."""
    if [path.name for path in out.iterdir()] == ["config.toml"]:
        (out / "config.toml").unlink()
        out.rmdir()


def has_posterior(folder: Path | None) -> bool:
    """Whether a run that goes on in this folder has its own posterior.pt already."""
    return folder is not None and (folder / "posterior.pt").exists()


def saved(settings: RunSettings, out: Path) -> str:
    """How far an interrupted run has come, and how to go on."""
    path = out / "checkpoint.pt"
    last = checkpoint.epoch_of(path) if path.exists() else 0
    resume = command_line.command("python", "-m", "training.run", "--resume", out)
    return f"{last} of {settings.epochs} epochs are saved; continue with: {resume}"


def prepare_folder(settings: RunSettings, claims: ExitStack) -> Path:
    """The folder of the run, claimed, with its config.toml. An earlier run in it is continued only if asked for."""
    content = tomli_w.dumps(config.as_table(settings))
    out = settings.resume or settings.out or begun_before(settings, content) or fresh_folder(settings)
    claims.enter_context(claimed(out))
    path = out / "config.toml"
    if settings.resume is not None:
        saved, now = config.read_toml(path), config.as_table(settings)
        if any(saved.get(name) != now.get(name) for name in config.MAY_MOVE):
            checkpoint.write_atomically(path, content)
        return out
    if path.exists():
        if distributed.restarts() and path.read_text(encoding="utf-8") == content:
            return out
        raise InputError(
            f"out: {out} holds a run already, give {command_line.command('--resume', out)} or another folder"
        )
    refuse_left_over(out, OF_RUNS_FOLDER)
    checkpoint.write_atomically(path, content)
    return out


def usual_folders(settings: RunSettings) -> Iterator[Path]:
    """Where a run goes by itself: folders in runs/, named after what matters most, and numbered."""
    parts = [data.slug(settings.data), settings.objective, settings.divergence]
    if settings.posterior is not None:
        parts.append(settings.posterior)
    if settings.soft_targets:
        parts.append("soft")
    name = "-".join([*parts, f"seed{settings.seed}"])
    yield Path("runs") / name
    for number in itertools.count(2):
        yield Path("runs") / f"{name}-{number}"


def begun_before(settings: RunSettings, content: str) -> Path | None:
    """Where this run has begun, if torchrun has started it again: the last folder with these settings, unfinished."""
    if not distributed.restarts():
        return None
    found = None
    for out in itertools.takewhile(Path.exists, usual_folders(settings)):
        path = out / "config.toml"
        if path.exists() and not (out / "summary.json").exists() and path.read_text(encoding="utf-8") == content:
            found = out
    return found


def fresh_folder(settings: RunSettings) -> Path:
    """The first of the usual folders that there is not yet, made."""
    for out in usual_folders(settings):
        try:
            out.mkdir(parents=True)  # by this program, even if another one is looking for a name, too
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"out: {out} cannot be made ({error.strerror})") from None
        return out
    raise AssertionError("there is always another number")


def train_and_evaluate(
    settings: RunSettings, loaded: Data, model: nn.Module, given: dict[str, Any] | None, out: Path
) -> None:
    sizes = ", ".join(f"{count} {name}" for name, count in loaded.sizes.items())
    first = distributed.rank() == 0
    if first:
        objective = f"{settings.objective} ({settings.divergence})"
        print(f"{objective} on {settings.data}: {sizes}; {settings.model}; folder {out}", flush=True)
    begin, earlier = time.perf_counter(), seconds_of_posterior(out)
    posterior = None
    if settings.posterior is not None:
        posterior = get_posterior(settings, loaded, given, out)
    posterior_seconds = earlier + time.perf_counter() - begin

    torch.manual_seed(settings.seed + 1)  # a posterior trained before draws from the global generator, one loaded not
    trainer = Trainer(settings, loaded, model, posterior, out)
    if first:
        print(f"{trainer.speed}; {hardware.parameters_of(model)}; {settings.threads} CPU threads", flush=True)
    if first and (told := fewer_steps(settings, trainer.course.steps)):
        print(told)
    if first and trainer.forward.folds_nothing:
        print(f"fold: torch.fx finds no batch norm behind a convolution in {settings.model}, nothing is folded")
    if (out / "checkpoint.pt").exists():
        trainer.resume()
    else:
        trainer.save()
        trainer.written()
    trainer.fit()
    distributed.barrier()

    begin = time.perf_counter()
    epoch = trainer.epoch
    if settings.selection == "best":
        state = checkpoint.load(out / "best.pt", loaded.x_train.device)
        checkpoint.load_weights(trainer.network, state, out / "best.pt")
        epoch = state["epoch"]
    log = checkpoint.read_metrics(out / "metrics.jsonl")
    results = measure(settings, loaded, trainer.network, posterior, out, search=trainer.search)
    before_autoattack = time.perf_counter() - begin
    results |= attack_with_ensemble(settings, loaded, trainer.network, out)
    # AutoAttack's own seconds have those before an interruption in them.
    eval_seconds = max(time.perf_counter() - begin, before_autoattack + (results["autoattack_seconds"] or 0.0))
    summary = {
        **{key: getattr(settings, key) for key in ("objective", "divergence", "data", "model", "norm", "eps", "seed")},
        "posterior": settings.posterior,
        "soft_targets": settings.soft_targets,
        "transport": settings.transported,
        "target_mix": settings.target_mix if settings.objective == "score_direct" else None,
        "data_gradient": settings.data_gradient if settings.objective == "score_direct" else None,
        **{
            key: getattr(settings, key) if settings.objective == "gaussian" else None
            for key in ("sigma", "gamma", "alignment", "final_sigma")
        },
        "epochs": settings.epochs,
        "steps": settings.epochs * trainer.course.steps,
        "limit": settings.limit,
        "split": {"seed": loaded.split_seed, **loaded.sizes},
        "selection": settings.selection,
        "selected_epoch": epoch,
        "best_epoch": trainer.best.get("epoch"),
        "val_pgd_acc": trainer.best.get("val_pgd_acc"),
        **results,
        "data_gradient_ratio": log[-1].get("data_gradient_ratio"),
        "sign_change_share": log[-1].get("sign_change_share"),
        "train_seconds": sum(entry["seconds"] for entry in log),
        "posterior_seconds": posterior_seconds,
        "eval_seconds": eval_seconds,
        "device": str(loaded.x_train.device),
        "speed": str(trainer.speed),
        "threads": settings.threads,
        "torch": torch.__version__,
        "scorematch": scorematch.__version__,
        "processes": distributed.world_size(),
        "commit": commit(),
    }
    if first:
        checkpoint.write_json(out / "summary.json", summary)
        for left in out.glob(f"{STATE}*"):
            left.unlink()
        report.write(out)
        print_table(summary)
        print(f"everything is in {out}; {out / 'report.html'} shows it")


def read_posterior(settings: RunSettings, path: Path, loaded: Data) -> dict[str, Any]:
    """The state of a posterior of the kind that the settings name, estimated from such data."""
    saved = checkpoint.load(path)
    kind = saved["settings"].get("name")
    if kind != settings.posterior:
        raise InputError(f"posterior_from: {path} holds a {kind}, expected {settings.posterior}")
    posteriors.check_source(path, saved, loaded, vars(settings), "posterior_from: ")
    return posteriors.state_from(path, settings.posterior_settings, loaded)


def get_posterior(settings: RunSettings, loaded: Data, given: dict[str, Any] | None, out: Path) -> Posterior:
    """The data posterior: the run's own posterior.pt, one given, or a new one, trained on the training split."""
    path = out / "posterior.pt"
    state = read_posterior(settings, path, loaded) if path.exists() else given
    about = posteriors.description(settings.posterior_settings, settings.data_settings)
    device = loaded.x_train.device
    speed = speed_of_posterior(settings, hardware.hardware_of(device))
    hardware.prepare(device, speed.precision, deterministic=settings.deterministic)  # it may have to be trained
    try:
        posterior = posteriors.build(
            settings.posterior_settings,
            loaded,
            seed=settings.seed,
            device=device,
            state=state,
            folder=out,
            speed=speed,
            save_minutes=settings.save_minutes,
            about=about,
        )
    except ValueError as error:
        raise InputError(f"posterior_settings: {error}") from None
    if not path.exists() and distributed.rank() == 0:
        checkpoint.save(path, epoch=0, settings=about, network=posterior.state_dict(), data=loaded.record())
    distributed.barrier()
    return posteriors.at_speed(posterior, speed)


def seconds_of_posterior(out: Path) -> float:
    """How long the networks of the run's posterior have been trained so far, by this process and by earlier ones."""
    folders = [folder / name for folder in (out, *out.glob("fold-*")) for name in ("score-network", "classifier")]
    return sum(entry["seconds"] for folder in folders for entry in checkpoint.read_metrics(folder / "metrics.jsonl"))


def speed_of_posterior(settings: RunSettings, device: Hardware) -> Speed:
    """How the networks of the posterior are called, in their training and by the attacks of the run."""
    steps = settings.posterior_settings.steps or 0
    return Speed(
        precision=hardware.precision_of(settings.precision, device),
        compile=hardware.compiles(settings.compile, device, steps),
        fused=settings.fused,
    )


def measure(
    settings: RunSettings,
    loaded: Data,
    network: nn.Module,
    posterior: Posterior | None,
    out: Path,
    search: nn.Module | None = None,
) -> dict[str, Any]:
    """The final numbers on the test split, but for AutoAttack's.

    Writes curve.json, paths.json and toy.json where they apply. ``search`` is the network made faster, see
    :func:`training.measures.robust`.
    """
    x, y = loaded.x_test, loaded.y_test
    threat_model = settings.threat_model(loaded.lower, loaded.upper)
    half = settings.curve_points // 2
    radii = [settings.eps * (i / half) for i in range(1, settings.curve_points + 1)] if half else [settings.eps]
    radii = [eps for eps in radii if eps <= max(settings.eps, loaded.format.largest_radius(settings.norm))]

    results = measures.accuracy("clean", measures.correct(network, x, y))
    curve = [{"eps": 0.0, "acc": results["clean_acc"]}]
    results |= measures.calibration(network, x, y)
    with progress_bar(total=len(radii) * measures.share_of(len(x)), desc="evaluate", unit="sample") as progress:
        for eps in radii:
            attack = PGD(
                measures.scaled(threat_model, eps),
                steps=settings.eval_steps,
                restarts=settings.eval_restarts,
                losses=settings.eval_losses,
            )
            start = generator(settings.seed, "evaluation", x.device)

            def under_attack(xs: Tensor, ys: Tensor, attack: PGD = attack, start: Generator = start) -> Tensor:
                return measures.robust(network, xs, ys, attack, start, progress, search=search)

            robust = measures.shared(under_attack, x, y)
            curve.append({"eps": eps, "acc": measures.per_cent(robust)})
            if eps == settings.eps:
                results |= measures.accuracy("pgd", robust)
    write_json(out / "curve.json", curve)

    if loaded.name == "toy":
        results |= toy.robust_errors(network)
        write_json(out / "toy.json", toy.curves(network))
    elif loaded.p_d is not None:
        results |= measures.self_consistency(
            network, loaded.p_d, x, y, threat_model, steps=settings.eval_steps, seed=settings.seed
        )
    if len(loaded.input_shape) == 3 and distributed.rank() == 0:
        save_fooled(settings, loaded, network, out)
    if posterior is not None:
        if loaded.name != "toy":
            first = loaded.few(PATH_SAMPLES, len(x))
            paths = measures.posteriors_along_attack(
                network, posterior, x[first], y[first], threat_model, settings.steps
            )
            write_json(out / "paths.json", paths)
        index = loaded.few(AUDITED, len(x))
        few = x[index], y[index]
        results |= posteriors.audit(posterior, *few, threat_model, steps=settings.eval_steps, seed=settings.seed)
        results["posterior_samples"] = len(few[0])
        if posteriors.anchored_at_labels(posterior):
            results["posterior_clean_acc"] = None  # the labels themselves
    return results


def save_fooled(settings: RunSettings, loaded: Data, network: nn.Module, out: Path) -> None:
    """A few test images that fool the network, for the report, as a file of arrays."""
    attack = PGD(
        settings.threat_model(loaded.lower, loaded.upper),
        steps=settings.eval_steps,
        restarts=1,
        losses=settings.eval_losses[:1],
    )
    start = generator(settings.seed, "evaluation", loaded.x_test.device)
    few = loaded.few(FOOLED_AMONG, len(loaded.x_test))
    found = measures.fooled(network, loaded.x_test[few], loaded.y_test[few], attack, start, FOOLED)
    if not len(found["index"]):
        return
    found["index"] = few[found["index"]]
    buffer = io.BytesIO()
    names = np.array(loaded.classes or [str(label) for label in range(loaded.num_classes)])
    arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in found.items()}
    np.savez(buffer, names=names, box=np.array([loaded.lower, loaded.upper]), **arrays)
    checkpoint.write_atomically(out / report.EXAMPLES, buffer.getvalue())


def write_json(path: Path, value: object) -> None:
    """By the first process alone."""
    if distributed.rank() == 0:
        checkpoint.write_json(path, value)


def attack_with_ensemble(settings: RunSettings, loaded: Data, network: nn.Module, out: Path) -> dict[str, Any]:
    """AutoAttack on the test split. It goes on from the file that an interruption has left."""
    if settings.autoattack == "none":
        keys = ("autoattack_acc", "autoattack_interval", "autoattack_samples", "autoattack_seconds", "autoattack")
        return {"autoattack_version": "none", **dict.fromkeys(keys)}
    count = settings.autoattack_samples or len(loaded.x_test)
    adversary = AutoAttack(
        network.eval(),
        settings.norm,
        settings.eps,
        seed=settings.seed,
        version=settings.autoattack,
        compile=settings.autoattack_compile,
        lower=loaded.lower,
        upper=loaded.upper,
        share_samples=True,
    )
    index = loaded.few(count, len(loaded.x_test))
    report = measures.autoattack(adversary, loaded.x_test[index], loaded.y_test[index], state=out / STATE)
    return {
        "autoattack_acc": 100 * report["robust_accuracy"],
        "autoattack_interval": [100 * end for end in report["robust_interval"]],
        "autoattack_version": settings.autoattack,
        "autoattack_samples": count,
        "autoattack_seconds": report["seconds"],
        "autoattack": report,
    }


def commit() -> str | None:
    """The git commit of the source tree that runs, with ``+`` where it has changes; None outside a repository."""
    file = Path(__file__).resolve()
    commands = (
        ["ls-files", "--error-unmatch", str(file)],  # fails where it is installed within a project of somebody else
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no"],
    )
    # Such as GIT_DIR, within a hook of another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    outputs = []
    for command in commands:
        try:
            finished = subprocess.run(
                ["git", "-C", str(file.parent.parent), *command],
                env=environment,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if finished.returncode:
            return None
        outputs.append(finished.stdout.strip())
    return outputs[1] + ("+" if outputs[2] else "")


def print_table(summary: dict[str, Any]) -> None:
    """The numbers of a finished run, one a line."""
    seconds = (
        f"{summary['posterior_seconds']:.0f} s posterior, {summary['train_seconds']:.0f} s training, "
        f"{summary['eval_seconds']:.0f} s evaluation"
    )
    rows = [*report.rows(summary), ["time", seconds]]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(run_program(main))
