"""How robust a classifier is: ``python -m training.evaluate``.

    python -m training.evaluate --run runs/digits-pgd_at-kl-seed0 --attack pgd --steps 100 --restarts 5
    python -m training.evaluate --run runs/digits-pgd_at-kl-seed0 --attack autoattack --state state.pt --out report.json
    python -m training.evaluate --model-from weights.pt --model wrn-28-10-silu --data cifar10 --eps 0.031372549 \
        --attack autoattack --compile
    python -m training.evaluate --run runs/digits-pgd_at-kl-seed0 --attack obfuscation --plot accuracy.png
    python -m training.evaluate --run runs/digits-gaussian-kl-seed0 --attack certify --limit 200 --plot certified.png

Under torchrun the samples are shared among its processes, one device each. Name the weights by --checkpoint there, as
torchrun takes --run for an option of its own.
"""

import dataclasses
import importlib
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from scorematch import PGD, AutoAttack, ThreatModel, smoothing
from scorematch.attacks import inspection
from training import data, measures, models
from training.data import Data, DataName, DataSettings
from training.engine import checkpoint, claims, distributed, hardware
from training.engine.forward import Forward
from training.engine.hardware import PrecisionWish
from training.measures import certification, obfuscation
from training.models import loading
from training.settings import command_line, config
from training.settings.errors import InputError, Interrupted, run_program
from training.settings.help_page import Layout

OFFICIAL = "pip install git+https://github.com/fra31/auto-attack"
DTYPES = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The attacks that each option is for; given with any other attack, it is refused.
USES = {
    "step_size": ("pgd", "obfuscation"),
    "steps": ("pgd", "obfuscation"),
    "restarts": ("pgd", "obfuscation"),
    "losses": ("pgd", "obfuscation"),
    "precision": ("pgd",),
    "engine": ("autoattack",),
    "version": ("autoattack",),
    "rng": ("autoattack",),
    "search_dtype": ("autoattack",),
    "compile": ("autoattack",),
    "state": ("autoattack",),
    "transfer_from": ("obfuscation",),
    "transfer_model": ("obfuscation",),
    "plot": ("obfuscation", "certify"),
    **dict.fromkeys(("norm", "eps"), ("clean", "pgd", "autoattack", "obfuscation")),
    **dict.fromkeys(("sigma", "n0", "n", "alpha"), ("certify",)),
    "radii": ("autoattack", "certify"),
    "verdict_passes": ("autoattack",),
}


@dataclass(frozen=True)
class EvaluateSettings:
    """What to evaluate, and how. Lengths are in the units of the input: pixels in [0, 1]."""

    checkpoint: Path | None = None  # best.pt or checkpoint.pt of a run
    run: Path | None = None  # folder of a run: its selected weights
    model_from: str | None = None  # published weights, a state dict, or module:function; needs --eps
    model: str | None = None  # architecture of --model-from, where its weights do not tell
    # data set for --model-from: a name as for training.run, folder, or module:function; None is cifar10
    data: DataName | None = None
    # folder of CIFAR's files, or of the images of --data folder; None is the run's, or $SCOREMATCH_DATA
    data_root: Path | None = None
    image_size: int | None = None  # --model-from with --data folder: as for training.run
    split: Literal["test", "validation"] = "test"  # samples to evaluate on
    limit: int = 0  # the first so many samples of the split (of a function's data: at equal distances); 0 is all

    # clean accuracy alone, or also PGD, AutoAttack, the checks for masked gradients, or certified accuracy under noise
    attack: Literal["clean", "pgd", "autoattack", "obfuscation", "certify"] = "pgd"
    norm: Literal["linf", "l2", "l1"] | None = None  # norm of the perturbation; None is the run's, or linf
    eps: float | None = None  # radius in input units; None is the run's
    step_size: float | None = None  # PGD: length of a step in input units; None is eps / 4
    steps: int = 40  # PGD: steps per restart
    # PGD: random starts per loss; None is 2, and 5 for obfuscation. Of the search for R_SCORE, where p_d is known, None
    # is 1
    restarts: int | None = None
    losses: tuple[str, ...] = ("ce", "margin")  # losses that PGD increases; a robust sample withstands all
    # pgd: precision of the search; every verdict is in float32. None is the run's, or auto: what is fastest here
    precision: PrecisionWish | None = None
    engine: Literal["native", "official"] = "native"  # AutoAttack of scorematch, or of the official package
    # AutoAttack: its attacks; fast is apgd-ce, apgd-t
    version: Literal["standard", "plus", "rand", "fast"] = "standard"
    rng: Literal["keyed", "reference"] = "keyed"  # AutoAttack: random numbers of a sample, or the official stream
    search_dtype: Literal["none", "bfloat16", "float16"] = "none"  # AutoAttack: searches in this precision
    compile: bool = False  # AutoAttack: searches with torch.compile(model)
    verdict_passes: int = 1  # AutoAttack: passes over which each point is judged, for randomised models
    state: Path | None = None  # AutoAttack: file to resume from and to keep up to date
    transfer_from: str | None = None  # obfuscation: a second classifier, as --model-from, whose attacks are tried
    transfer_model: str | None = None  # obfuscation: architecture of --transfer-from, where its weights do not tell
    # certify: standard deviation of the noise, in input units. None is that at the end of the run (of a range the
    # largest), or .25
    sigma: float | None = None
    n0: int = 100  # certify: noise vectors for each sample that choose its class
    # certify: noise vectors for each sample that bound the probability of that class; more certify larger radii
    n: int = 1000
    alpha: float = 0.001  # certify: probability that the certificate of a sample is wrong
    # radii in input units. autoattack: attack at each of them, instead of at eps; certify: L2 radii of the accuracies,
    # none given are multiples of σ/2
    radii: tuple[float, ...] = ()

    batch_size: int = measures.BATCH  # samples at a time; decides memory (and PGD's random start of each sample)
    seed: int = 0  # of the random numbers
    threads: int = 0  # CPU threads; 0 is all available
    device: str = "auto"  # torch device; auto is cuda where there is one
    out: Path | None = None  # JSON file to write
    plot: Path | None = None  # PNG file to write: obfuscation: accuracy against eps; certify: against the radius
    export: Path | None = None  # file to write the weights to, as a bare state dict


LAYOUT = Layout(
    first=("run", "checkpoint", "model_from", "model", "data", "data_root", "attack", "eps", "limit", "out", "plot"),
    groups={
        "What is evaluated: one of --run, --checkpoint and --model-from": "checkpoint",
        "Attack": "norm",
        "How, and where to": "batch_size",
    },
)


class Subject(NamedTuple):
    """A classifier in eval mode, the data, what it was trained against, and in words for how long."""

    name: str
    model: nn.Module
    data: Data
    run: config.RunSettings | None
    epochs: str = ""


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        EvaluateSettings,
        arguments,
        program="python -m training.evaluate",
        description="Evaluate a trained classifier, clean and under attack, with 95 % intervals.",
        layout=LAYOUT,
    )
    _check(settings)
    torch.set_num_threads(config.resolve_threads(settings.threads))
    device = distributed.device_of_this_process(config.resolve_device(settings.device))
    with distributed.processes(device):
        evaluate(settings, device)


def evaluate(settings: EvaluateSettings, device: torch.device) -> None:
    official = _official() if settings.engine == "official" else None
    subject = read_subject(settings, device)
    threat_model = _threat_model(settings, subject)
    _check_attack(settings, subject)
    x, y = _samples(settings, subject.data)
    other = _other(settings, subject, device)
    doubt = inspection.probabilities(_probe(subject, x[:1]))
    first = distributed.rank() == 0
    for path in filter(None, (settings.out, settings.plot, settings.export, settings.state)):
        checkpoint.check_writable(path)
        _check_spares(settings, path)

    if first:
        kind = f"{subject.run.objective} on {subject.data.name}" if subject.run else subject.data.name
        print(f"{subject.name}{subject.epochs}: {kind}, {len(x)} {settings.split} samples")
        if settings.export is not None:
            loading.export(subject.model, settings.export)
            print(f"the weights are in {settings.export}, a bare state dict")
        if settings.attack == "certify":
            votes = f"{settings.n0} and {settings.n} noise vectors a sample"
            print(f"L2, σ {noise_of(settings, subject.run):g}, {votes}, alpha {settings.alpha:g}")
        if threat_model is not None and settings.attack != "clean":
            step = f", step {threat_model.step_length:g}" if settings.attack in USES["step_size"] else ""
            print(f"{threat_model.norm}, eps {threat_model.eps:g}{step}")
        if doubt is not None and settings.attack in ("pgd", "obfuscation"):  # AutoAttack tells it by itself
            print(f"warning: {doubt}")
        sys.stdout.flush()
    begin = time.perf_counter()
    results: dict[str, Any] = {
        "checkpoint": subject.name,
        "data": subject.data.name,
        "objective": subject.run.objective if subject.run else None,
        "threat_model": threat_model and {"norm": threat_model.norm, "eps": threat_model.eps},
        **{key: getattr(settings, key) for key in ("split", "attack", "seed")},
        "samples": len(x),
    }
    if settings.attack == "autoattack":
        assert threat_model is not None
        if official is not None:
            results |= official_autoattack(settings, official, subject.model, threat_model, x, y)
        else:
            results |= native_autoattack(settings, subject.model, threat_model, x, y)
    elif settings.attack == "obfuscation":
        assert threat_model is not None
        results |= obfuscation.audit(
            subject.model, x, y, threat_model, other=other, **_pgd_options(settings), batch=settings.batch_size
        )
    elif settings.attack == "certify":
        results |= certification.certify(
            subject.model,
            x,
            y,
            sigma=noise_of(settings, subject.run),
            **{name: getattr(settings, name) for name in ("n0", "n", "alpha", "radii", "seed")},
            batch=settings.batch_size,
        )
    else:
        results |= clean_and_pgd(settings, subject, threat_model, x, y)
    results["seconds"] = time.perf_counter() - begin
    if first:
        report(settings, results)


def noise_of(settings: EvaluateSettings, run: config.RunSettings | None) -> float:
    """The standard deviation of the noise to certify under; a run's is the one that its last epochs saw."""
    if settings.sigma is not None:
        return settings.sigma
    if run is None:
        return certification.SIGMA
    return run.final_sigma or run.sigma[-1]


def report(settings: EvaluateSettings, results: dict[str, Any]) -> None:
    """Print the table, write the files."""
    curve = results.get("accuracy_curve")
    pages = {"obfuscation": obfuscation, "certify": certification}
    page = pages.get(settings.attack)
    if curve:
        print(curve["table"])
    elif page is None:
        print_accuracies(results)
    else:
        print(page.table(results))
        if settings.plot is not None:
            checkpoint.write_atomically(settings.plot, page.plot(results))
    if settings.out is not None:
        checkpoint.write_json(settings.out, results)


def clean_and_pgd(
    settings: EvaluateSettings, subject: Subject, threat_model: ThreatModel | None, x: Tensor, y: Tensor
) -> dict[str, Any]:
    model = subject.model
    masks = {"clean": measures.shared(lambda xs, ys: measures.correct(model, xs, ys, settings.batch_size), x, y)}
    options: dict[str, Any] = {}
    if settings.attack == "pgd":
        assert threat_model is not None
        options = _pgd_options(settings)
        seed = options.pop("seed")
        attack = PGD(threat_model, **options)
        wish = settings.precision or (subject.run.precision if subject.run else "auto")
        precision = hardware.precision_of(wish, hardware.hardware_of(x.device))
        hardware.prepare(x.device, precision, deterministic=False)
        search = None if precision == "float32" else Forward(model, precision)
        hidden = not sys.stderr.isatty() or distributed.rank() > 0
        with tqdm(total=measures.share_of(len(x)), desc="pgd", unit="sample", disable=hidden) as progress:

            def robust(xs: Tensor, ys: Tensor) -> Tensor:
                start = Generator(x.device).manual_seed(seed + distributed.rank())
                return measures.robust(model, xs, ys, attack, start, progress, settings.batch_size, search)

            masks["pgd"] = measures.shared(robust, x, y)
    accuracies: dict[str, Any] = {}
    for name, mask in masks.items():
        accuracies |= measures.accuracy(name, mask)
    if settings.attack == "pgd" and subject.data.p_d is not None:
        assert threat_model is not None
        accuracies |= measures.self_consistency(
            model,
            subject.data.p_d,
            x,
            y,
            threat_model,
            steps=settings.steps,
            restarts=1 if settings.restarts is None else settings.restarts,
            seed=settings.seed,
            batch=settings.batch_size,
        )
    return options | accuracies


def native_autoattack(
    settings: EvaluateSettings, model: nn.Module, threat_model: ThreatModel, x: Tensor, y: Tensor
) -> dict[str, Any]:
    adversary = AutoAttack(
        model,
        threat_model.norm,
        threat_model.eps,
        seed=settings.seed,
        version=settings.version,
        rng=settings.rng,
        search_dtype=DTYPES[settings.search_dtype],
        compile=settings.compile,
        verdict_passes=settings.verdict_passes,
        lower=threat_model.lower,
        upper=threat_model.upper,
        device=x.device,
        share_samples=True,
    )
    try:
        if settings.radii:
            size, state = settings.batch_size, settings.state
            curve = measures.accuracy_curve(adversary, x, y, settings.radii, batch=size, state=state)
            return {
                "engine": "native",
                "version": settings.version,
                "clean_acc": 100 * curve.clean_accuracy,
                "accuracy_curve": {**curve.as_dict(), "table": curve.table()},
            }
        found = measures.autoattack(adversary, x, y, batch=settings.batch_size, state=settings.state)
    except Interrupted as signal:
        saved = f"what was found is in {settings.state}, the same command continues"
        raise Interrupted(f"{signal}, {saved if settings.state else 'nothing is saved without --state FILE'}") from None
    return {
        "engine": "native",
        "version": settings.version,
        "clean_acc": 100 * found["clean_accuracy"],
        "clean_interval": [100 * end for end in found["clean_interval"]],
        "autoattack_acc": 100 * found["robust_accuracy"],
        "autoattack_interval": [100 * end for end in found["robust_interval"]],
        "autoattack": found,
    }


def official_autoattack(
    settings: EvaluateSettings, package: ModuleType, model: nn.Module, threat_model: ThreatModel, x: Tensor, y: Tensor
) -> dict[str, Any]:
    """The official package's verdict; what each of its attacks finds, it prints itself."""
    version = settings.version
    options: dict[str, Any] = {"version": version}
    if version == "fast":
        options = {"version": "custom", "attacks_to_run": ["apgd-ce", "apgd-t"]}
    norm = threat_model.norm.capitalize()
    adversary = package.AutoAttack(
        model, norm=norm, eps=threat_model.eps, seed=settings.seed, verbose=True, device=x.device, **options
    )
    x_adv = adversary.run_standard_evaluation(x, y, bs=settings.batch_size)
    results: dict[str, Any] = {"engine": "official", "version": version}
    for name, points in (("clean", x), ("autoattack", x_adv)):
        results |= measures.accuracy(name, measures.correct(model, points.to(x.device), y, settings.batch_size))
    return results


def print_accuracies(results: dict[str, Any]) -> None:
    """The accuracies with their intervals, and what each attack of AutoAttack cost."""
    found = results.get("autoattack", {"attacks": {}})["attacks"]
    lines = {"clean": (results["clean_acc"], results["clean_interval"], "")}
    for name, attack in found.items():
        cost = f"{attack['forwards']:>14,}{attack['backwards']:>14,}{attack['seconds']:>10.1f}"
        lines[name] = (100 * attack["accuracy"], [100 * end for end in attack["interval"]], cost)
    for name in ("pgd", "autoattack"):
        if f"{name}_acc" in results:
            lines[name] = (results[f"{name}_acc"], results[f"{name}_interval"], "")
    costs = f"{'forwards':>14}{'backwards':>14}{'seconds':>10}" if found else ""
    print(f"{'attack':<12}{'accuracy':>10}{'95 % interval':>18}{costs}")
    for name, (accuracy, (low, high), cost) in lines.items():
        print(f"{name:<12}{accuracy:>8.1f} %{f'{low:.1f} to {high:.1f} %':>18}{cost}")
    if "r_score" in results:
        print("against p_d, which is known here:")
        for name, title in (("kl", "KL(p_d, model) at clean points"), ("r_score", "R_SCORE, at least")):
            shown = "{:.4f} to {:.4f}".format(*interval) if (interval := results[f"{name}_interval"]) else ""
            print(f"  {title:<38}{results[name]:>8.4f} nat{shown:>20}")
        low, high = results["disagrees_interval"]
        title = "another class in the ball, at least"
        print(f"  {title:<38}{results['disagrees']:>8.1f} %  {f'{low:.1f} to {high:.1f} %':>20}")
        print("  at least: a search finds some points of the ball; more --steps and --restarts may find worse ones")


def selected_checkpoint(run: Path) -> Path:
    """The file with the weights that the run's final numbers are about."""
    path = run / "config.toml"
    if not path.is_file():
        raise InputError(f"run: {run} holds no config.toml, expected the folder of a run")
    table = config.read_toml(path)
    if "objective" not in table:
        raise InputError(f"run: {run} is no folder of training.run, its config.toml names no objective")
    settings = config.from_table(table, str(path))
    return run / ("best.pt" if settings.selection == "best" else "checkpoint.pt")


def restore(path: Path, device: torch.device, data_root: Path | None = None) -> Subject:
    """The classifier of a checkpoint, with its run's data and settings."""
    state = checkpoint.load(path, device)
    if "name" in state["settings"]:
        kind = state["settings"]["name"]
        raise InputError(f"{path}: holds a posterior ({kind}), expected best.pt or checkpoint.pt of training.run")
    settings = config.from_table(state["settings"], str(path))
    if data_root is not None:
        settings = dataclasses.replace(settings, data_root=data_root)
    loaded = _of_run(settings, state, path).to(device)
    statistics = loading.statistics_of(state, settings.data)
    model = models.build(
        settings.model,
        loaded.input_shape,
        loaded.num_classes,
        statistics,
        pretrained=settings.pretrained,
        weights=False,
    ).to(device)
    checkpoint.load_weights(model, state, path)
    return Subject(str(path), model.eval(), loaded, settings, _epochs(path, state["epoch"], settings.epochs))


def _epochs(path: Path, epoch: int, planned: int) -> str:
    """Which epoch the weights are of, where it is not the last; and how far the run beside them has come."""
    log = path.with_name("metrics.jsonl")
    done = len(checkpoint.read_metrics(log)) if log.exists() else planned
    if done < planned:
        return f" (epoch {epoch}; the run is at {done} of {planned} epochs)"
    return f" (epoch {epoch} of {planned})" if epoch < planned else ""


def _of_run(settings: config.RunSettings, state: dict[str, Any], path: Path) -> Data:
    """The data that a run was trained on, as far as they are there and the same."""
    saved = state.get("data")
    try:
        loaded = data.load(settings.data_settings)
    except InputError as error:
        origin = f"; {path} was trained on {saved['source']}" if saved and saved["source"] else ""
        raise InputError(f"{error}{origin}") from None
    if data.is_own(settings.data):
        for change in data.check_record(saved, loaded, path):
            print(f"{settings.data} has other samples than {path} was trained with: {change}", file=sys.stderr)
    return loaded


def read_subject(settings: EvaluateSettings, device: torch.device) -> Subject:
    if settings.model_from is None:
        path = settings.checkpoint or selected_checkpoint(settings.run or Path())
        return restore(path, device, settings.data_root)
    source = DataSettings(settings.data or "cifar10", root=settings.data_root, image_size=settings.image_size)
    if not data.is_own(source.name):  # a model that cannot be read is told before the data are looked for
        model = loading.load(settings.model_from, model=settings.model, data=source.name, device=device)
        return Subject(settings.model_from, model, data.load(source).to(device), None)
    loaded = data.load(source)
    model = loading.load(settings.model_from, model=settings.model, data=loaded, device=device)
    return Subject(settings.model_from, model, loaded.to(device), None)


def _other(settings: EvaluateSettings, subject: Subject, device: torch.device) -> nn.Module | None:
    """The classifier whose attacks are tried on the subject."""
    if settings.transfer_from is None:
        return None
    source, known = settings.transfer_from, not data.is_own(subject.data.name)
    given, own = Path(source), Path(subject.name)
    if source == subject.name or (given.exists() and own.exists() and given.samefile(own)):
        raise InputError(f"transfer_from: {source} is the classifier that is judged, expected another one")
    try:
        inputs = subject.data.name if known else subject.data
        model = loading.load(source, model=settings.transfer_model, data=inputs, device=device)
    except InputError as error:
        raise InputError(f"transfer_from: {error}") from None
    _probe(subject._replace(name=source, model=model), _samples(settings, subject.data)[0][:1])
    return model


def _samples(settings: EvaluateSettings, loaded: Data) -> tuple[Tensor, Tensor]:
    x, y = getattr(loaded, f"x_{settings.split}"), getattr(loaded, f"y_{settings.split}")
    if not len(x):
        raise InputError(f"split: {settings.split!r} of {loaded.name}, which has no such samples, allowed: test")
    if settings.limit > len(x):
        raise InputError(
            f"limit: {settings.limit} samples, allowed: 0 (all) or up to {len(x)} of the {settings.split} split"
        )
    index = loaded.few(settings.limit or len(x), len(x))
    return x[index], y[index]


def _threat_model(settings: EvaluateSettings, subject: Subject) -> ThreatModel | None:
    """What to attack with; None where clean accuracy is all that is asked for and nothing is known."""
    if settings.attack == "certify":
        return None
    run = subject.run
    norm, eps = settings.norm or (run.norm if run else "linf"), settings.eps
    if settings.radii:
        eps = max(settings.radii)
    if eps is None:
        if run is None and settings.attack != "clean":
            raise InputError("eps: none given, needed with --model-from")
        if run is not None and norm != run.norm:
            raise InputError(f"eps: none given, needed since --norm {norm} differs from the run's {run.norm}")
        eps = run.eps if run else None
    if eps is None:
        return None
    subject.data.format.check_radius(norm, eps, "radii" if settings.radii else "eps")
    if settings.step_size is not None:
        subject.data.format.check_radius(norm, settings.step_size, "step_size")
    return ThreatModel(norm, eps, settings.step_size, subject.data.lower, subject.data.upper)


def _check_attack(settings: EvaluateSettings, subject: Subject) -> None:
    form, images, box = subject.data.format, "images in [0, 1]", (0.0, 1.0)
    if settings.attack not in ("autoattack", "obfuscation"):
        return
    if settings.attack == "autoattack" and settings.engine == "native" and math.isfinite(form.upper - form.lower):
        images, box = "images in a finite box", (form.lower, form.upper)
    if len(form.input_shape) != 3 or (form.lower, form.upper) != box:
        given = f"{settings.attack} on {subject.data.name}"
        raise InputError(f"attack: {given}, allowed: {images}; clean and pgd take others")


@torch.no_grad()
def _probe(subject: Subject, x: Tensor) -> Tensor:
    """The logits [1, L] for x [1, ...]. A classifier that does not give those of the data is refused."""
    wanted = [1, subject.data.num_classes]
    try:
        logits = subject.model(x)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{subject.name}: takes no inputs {list(x.shape)} of {subject.data.name} ({reason})") from None
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != wanted:
        raise InputError(f"{subject.name}: returned {shape}, {subject.data.name} needs logits {wanted}")
    return logits


def _pgd_options(settings: EvaluateSettings) -> dict[str, Any]:
    restarts = settings.restarts or (5 if settings.attack == "obfuscation" else 2)
    return {"steps": settings.steps, "restarts": restarts, "losses": list(settings.losses), "seed": settings.seed}


def _official() -> ModuleType:
    try:
        return importlib.import_module("autoattack")
    except ImportError as error:
        raise InputError(f"engine: the official package cannot be imported ({error}), install it: {OFFICIAL}") from None


def _check_spares(settings: EvaluateSettings, path: Path) -> None:
    """Refuse to write over a file that this evaluation reads, or under a name that a run has or will have."""
    read = [Path(name) for name in (settings.model_from, settings.transfer_from) if name is not None]
    if settings.checkpoint is not None:
        read.append(settings.checkpoint)
    if claims.taken(path) or (path.exists() and any(other.exists() and path.samefile(other) for other in read)):
        raise InputError(f"{path}: is read by this evaluation or belongs to a run, expected another file to write")


def _check_apart(settings: EvaluateSettings) -> None:
    """Refuse one file for two things that are written: the later would take the place of the earlier."""
    taken: dict[Path, str] = {}
    state = settings.state and settings.state.resolve()
    of_state = (f"{state}.eps", f"{state}.rank")  # files of a radius, and of a process
    for name in ("state", "out", "plot", "export"):
        path = getattr(settings, name)
        if path is None:
            continue
        other = taken.setdefault(path.resolve(), name)
        if state is not None and str(path.resolve()).startswith(of_state):
            other = "state"
        if other != name:
            raise InputError(f"{other}, {name}: both would write {path}, expected a file for each")


def _check(settings: EvaluateSettings) -> None:
    sources = [name for name in ("checkpoint", "run", "model_from") if getattr(settings, name) is not None]
    if len(sources) != 1:
        raise InputError(
            f"checkpoint, run, model_from: {' and '.join(sources) or 'none'} given, "
            "expected exactly one of --checkpoint FILE, --run DIR and --model-from FILE|module:function"
        )
    ranges: dict[str, config.Check] = {
        "image_size": config.RANGES["image_size"],
        "limit": (lambda v: v >= 0, "0 (all) or a number of samples"),
        "batch_size": config.AT_LEAST_ONE,
        "eps": config.or_none(config.POSITIVE),
        "step_size": config.or_none(config.POSITIVE),
        "steps": config.RANGES["eval_steps"],
        "restarts": config.or_none(config.AT_LEAST_ONE),
        "losses": config.RANGES["eval_losses"],
        "sigma": config.or_none(config.POSITIVE),
        "n0": config.AT_LEAST_ONE,
        "n": config.AT_LEAST_ONE,
        "alpha": (lambda v: 0 < v < 1, "between 0 and 1, exclusive"),
        "radii": (lambda v: all(0 <= r < math.inf for r in v), "finite numbers of at least 0"),
        "verdict_passes": config.AT_LEAST_ONE,
        "seed": config.RANGES["seed"],
        "threads": config.RANGES["threads"],
    }
    config.check_ranges(settings, ranges)
    if settings.data is not None:
        data.check_name(settings.data)
    if settings.attack == "certify" and settings.n < (least := smoothing.least_votes(settings.alpha)):
        raise InputError(f"n: {settings.n} with alpha {settings.alpha:g} certifies nothing, allowed: at least {least}")
    defaults = EvaluateSettings()
    given = {f.name for f in dataclasses.fields(settings) if getattr(settings, f.name) != getattr(defaults, f.name)}
    for name in ("model", "data", "image_size"):
        if name in given and settings.model_from is None:
            raise InputError(f"{name}: {getattr(settings, name)!r} is for --model-from, a run knows its own")
    for name, attacks in USES.items():
        if name in given and settings.attack not in attacks:
            raise InputError(f"{name}: is for --attack {' and '.join(attacks)}, got --attack {settings.attack}")
    if settings.attack == "autoattack" and "radii" in given:
        if "eps" in given:
            raise InputError("eps: is the radius of a single evaluation, --radii has several")
        if min(settings.radii) <= 0:
            raise InputError(f"radii: {settings.radii!r} is out of range, allowed with --attack autoattack: above 0")
    if "transfer_model" in given and "transfer_from" not in given:
        raise InputError("transfer_model: is for --transfer-from, which is not given")
    if settings.engine == "official":
        for name in ("rng", "search_dtype", "compile", "verdict_passes", "radii", "state"):
            if name in given:
                raise InputError(f"{name}: is for --engine native, the official engine does not have it")
        if distributed.planned_world_size() > 1:
            raise InputError("engine: official runs in one process, allowed under torchrun: native")
    if settings.plot is not None and settings.plot.suffix != ".png":
        raise InputError(f"plot: {settings.plot} is written as PNG, expected a name that ends in .png")
    _check_apart(settings)


if __name__ == "__main__":
    sys.exit(run_program(main))
