"""Tables 1 to 4 of the paper beside stored runs of ``training.run``.

A row of a table is a recipe with a few settings, such as recipe table2 with PGD-AT, squared error and no clipping. A
stored run is about a row if it has these settings, its data set, norm, eps and network, and used all training images
(no ``limit``). It counts for the row if all other settings that can change an accuracy are the recipe's, too; else it
is listed below the table with the differences, as its numbers are not those of the table. Settings that the row does
not read change nothing. Accuracies are per cent, of the test split; ours are the mean over runs with their standard
deviation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from training.settings import config, unused
from training.settings.config import RunSettings
from training.settings.errors import InputError

RATES = (0.1, 0.05, 0.01)  # columns of Table 1
ROUNDING = 1e-4  # relative
DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(RunSettings) if field.default is not dataclasses.MISSING
}
OF_SUBJECT = ("objective", "data", "norm", "eps", "model", "limit")
OF_SELECTION = ("validation_losses",)  # how the epoch is chosen: part of a row, but not what it is about
# Settings that change no accuracy but for rounding, or say where files are and how often to save.
INDIFFERENT = (
    *("seed", "data_root", "download", "generated", "threads", "device", "out", "resume", "deterministic", "graph"),
    *("fused", "precision", "channels_last", "compile", "fold", "autoattack_compile", "curve_points"),
    *("save_every", "save_minutes", "keep_last", "posterior_from", "posterior_settings"),
)


def _of_table_2(objective: str, divergence: str, lr: float, clip: float = 0.0) -> tuple[str, dict[str, Any]]:
    title = {"pgd_at": "PGD-AT", "trades": "TRADES"}[objective]
    words = f"{title} {divergence.upper()}" + (f", clip {clip:g}" if clip else "")
    settings = {"objective": objective, "divergence": divergence, "lr": lr, "clip": clip}
    # The paper chooses the epoch by the loss of training; that of the recipe is "ce".
    return words, settings | ({"validation_losses": ("se",)} if divergence == "se" else {})


OF_TABLE_2 = {
    "pgd_at_kl": _of_table_2("pgd_at", "kl", 0.1),
    "pgd_at_se": _of_table_2("pgd_at", "se", 0.05),
    "pgd_at_se_clip": _of_table_2("pgd_at", "se", 0.05, 0.4),
    "trades_kl": _of_table_2("trades", "kl", 0.1),
    "trades_se": _of_table_2("trades", "se", 0.05),
    "trades_se_clip": _of_table_2("trades", "se", 0.05, 0.3),
}
OF_TABLE_4 = {  # recipe, title, network
    "cifar10_linf_wrn28_10": ("table3", "cifar10, linf, WRN-28-10", "wrn-28-10-silu"),
    "cifar10_linf_wrn70_16": ("table3", "cifar10, linf, WRN-70-16", "wrn-70-16-silu"),
    "cifar10_l2_wrn28_10": ("table4-l2", "cifar10, l2, WRN-28-10", "wrn-28-10-silu"),
    "cifar100_linf_wrn28_10": ("table3-cifar100", "cifar100, linf, WRN-28-10", "wrn-28-10-silu"),
    "cifar100_linf_wrn70_16": ("table3-cifar100", "cifar100, linf, WRN-70-16", "wrn-70-16-silu"),
}


class Row(NamedTuple):
    """One row of a table, or of Table 1 one cell.

    Attributes:
        table: 1 to 4.
        title: in words.
        recipe: of training.recipes.
        settings: what the row is about, over the recipe.
        paper: clean accuracy, its standard deviation, robust accuracy, its standard deviation; None where not given.
        robust: key of a summary.json that the robust accuracy is, under PGD-10 in Table 1 and AutoAttack elsewhere.
    """

    table: int
    title: str
    recipe: str
    settings: dict[str, Any]
    paper: tuple[float, float | None, float, float | None]
    robust: str = "autoattack_acc"


class Run(NamedTuple):
    """A finished run: its folder, the settings in config.toml, and summary.json."""

    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any]


def paper() -> dict[str, Any]:
    """The accuracies of the paper, from paper.toml beside this file."""
    return config.read_toml(Path(__file__).with_name("paper.toml"))


def rows() -> list[Row]:
    """All rows, in the order of the paper."""
    facts = paper()
    found = []
    for kind, by_rate in facts["table1"].items():
        for rate, (clean, pgd) in zip(RATES, by_rate, strict=True):
            settings = {"objective": "pgd_at", "divergence": kind, "lr": rate}
            found.append(Row(1, f"{kind}, rate {rate:g}", "table1", settings, (clean, None, pgd, None), "pgd_acc"))
    for name, values in facts["table2"].items():
        title, settings = OF_TABLE_2[name]
        found.append(Row(2, title, "table2", settings, tuple(values)))
    for data, by_beta in facts["table3"].items():
        recipe = {"cifar10": "table3", "cifar100": "table3-cifar100"}[data]
        for name, values in by_beta.items():
            beta = float(name.removeprefix("beta"))
            settings = {"beta": beta, "model": "wrn-28-10-silu"}
            found.append(Row(3, f"{data}, β = {beta:g}", recipe, settings, tuple(values)))
    for group, by_beta in facts["table4"].items():
        recipe, title, model = OF_TABLE_4[group]
        for name, (clean, robust) in by_beta.items():
            beta = float(name.removeprefix("beta"))
            settings = {"beta": beta, "model": model}
            found.append(Row(4, f"{title}, β = {beta:g}", recipe, settings, (clean, None, robust, None)))
    return found


def stored(folder: Path | None) -> list[Run]:
    """All finished runs below a folder; none without one.

    Raises:
        InputError: there is no such folder, or no finished run in it.
    """
    if folder is None:
        return []
    if not folder.is_dir():
        raise InputError(f"runs: {folder} is not a folder, expected one with runs of training.run")
    found = []
    for path in sorted(folder.rglob("summary.json")):
        settings = path.with_name("config.toml")
        if settings.exists():
            found.append(Run(path.parent, config.read_toml(settings), summary_of(path)))
    if not found:
        raise InputError(f"runs: {folder} holds no finished run, expected config.toml and summary.json in its folders")
    return found


def summary_of(path: Path) -> dict[str, Any]:
    """What a run found.

    Raises:
        InputError: the file is damaged.
    """
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        float(summary["clean_acc"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"runs: {path} is damaged ({error}), expected what training.run writes") from None
    return summary


def same(a: Any, b: Any) -> bool:
    """Whether two values of a setting are equal, but for rounding and for lists instead of tuples."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return abs(a - b) <= ROUNDING * max(abs(a), abs(b))
    return bool(a == b)


def settings_of(row: Row) -> RunSettings:
    """What a run of the row is trained with: the recipe over that of its data set, and what the row says."""
    return dataclasses.replace(config.from_recipes(None, row.recipe), **row.settings)


def value_of(run: Run, name: str) -> Any:
    """A setting of a run; a config.toml leaves out what is None."""
    return run.settings.get(name, DEFAULTS.get(name))


def belongs(run: Run, row: Row, wanted: RunSettings) -> bool:
    """Whether a run is about what the row is about, however it was trained."""
    if row.table in (3, 4) and not run.settings.get("generated"):
        return False
    subject = (*OF_SUBJECT, *(name for name in row.settings if name not in OF_SELECTION))
    return all(same(value_of(run, name), getattr(wanted, name)) for name in subject)


def differences(run: Run, row: Row, wanted: RunSettings) -> list[str]:
    """In which settings a run differs from its row, each as ``name value instead of value``."""
    generated = run.settings.get("generated")
    compared = [
        field.name
        for field in dataclasses.fields(RunSettings)
        if field.name not in INDIFFERENT and unused.reads(wanted, field.name)
    ]
    return [
        *(["generated images instead of none"] if generated and row.table in (1, 2) else []),
        *(
            f"{name} {value_of(run, name)} instead of {getattr(wanted, name)}"
            for name in compared
            if not same(value_of(run, name), getattr(wanted, name))
        ),
    ]


def page(folder: Path | None) -> str:
    """The tables as Markdown.

    Args:
        folder: with runs, at any depth; None shows the paper's numbers alone.

    Raises:
        InputError: the folder holds no finished run.
    """
    runs, listed = stored(folder), rows()
    lines = [
        "# Tables 1 to 4 of the paper, and ours",
        "",
        f"{len(runs)} stored runs were read. Accuracies in per cent.",
        "",
    ]
    for table in sorted({row.table for row in listed}):
        chosen = [row for row in listed if row.table == table]
        attack = "PGD-10" if table == 1 else "AutoAttack"
        lines += [
            f"## Table {table}",
            "",
            f"| row | recipe | clean, paper | clean, ours | {attack}, paper | {attack}, ours | runs |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        notes: list[str] = []
        for row in chosen:
            wanted = settings_of(row)
            members = [run for run in runs if belongs(run, row, wanted)]
            exact = [run for run in members if not differences(run, row, wanted)]
            lines.append(line(row, exact))
            notes += [note(run, row, wanted) for run in members if run not in exact]
        lines += ["", *([*notes, ""] if notes else [])]
    return "\n".join(lines)


def line(row: Row, runs: Sequence[Run]) -> str:
    """One row of a Markdown table."""
    clean, clean_spread, robust, robust_spread = row.paper
    attacked = [run.summary[row.robust] for run in runs if run.summary.get(row.robust) is not None]
    cells = [
        row.title,
        row.recipe,
        shown(clean, clean_spread),
        ours([run.summary["clean_acc"] for run in runs]),
        shown(robust, robust_spread),
        ours(attacked),
        str(len(runs)) + (f", of which {len(attacked)} attacked" if len(attacked) < len(runs) else ""),
    ]
    return f"| {' | '.join(cells)} |"


def shown(mean: float, spread: float | None) -> str:
    """A mean and its standard deviation."""
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"


def ours(values: Sequence[float]) -> str:
    """The mean of our runs."""
    if not values:
        return "not run"
    return shown(fmean(values), stdev(values) if len(values) > 1 else None)


def note(run: Run, row: Row, wanted: RunSettings) -> str:
    """A run that is about a row, but not trained as its recipe says."""
    robust = run.summary.get(row.robust)
    of_robust = "not run" if robust is None else f"{robust:.2f}"
    changed = ", ".join(differences(run, row, wanted))
    clean = run.summary["clean_acc"]
    return f"- {row.title}, {run.folder.name}: clean {clean:.2f}, robust {of_robust}, with {changed}"
