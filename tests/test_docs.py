"""The documentation: the site builds strictly, every Python block runs, every command line is valid."""

import importlib
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from markdown.extensions.toc import slugify
from mkdocs.commands.build import build
from mkdocs.config import load_config
from torch import nn

import scorematch as sm
from training.settings import command_line, config
from training.settings.config import RunSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.exists() and "figures" not in page.relative_to(ROOT).parts]
WITH_PYTHON = [page for page in PAGES if "```python\n" in page.read_text()]
REASONS = ("needs a download", "needs a GPU")  # the only ones for which a block may be left out
NOT_RUN = re.compile(r"# not run in the tests: (.*)")
PROGRAM = re.compile(r"-m (training|benchmarks)\.")


def names_of(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    settings = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out))
    settings.plugins.on_startup(command="build", dirty=False)
    build(settings)  # strict: a warning, such as a link that leads nowhere, is an error
    return out


def test_the_site_builds_and_asks_nothing_of_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    loaded = re.compile(r'<(?:script|img|iframe|link(?! rel="canonical"))[^>]*(?:src|href)="?(?:https?:)?//')
    for page in pages:
        assert not loaded.search(page.read_text()), page


def test_equations_are_drawn_without_scripts(site: Path) -> None:
    page = (site / "ideas" / "self-consistency.html").read_text()
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') >= 4
    for found in site.rglob("*.html"):
        assert "arithmatex" not in found.read_text(), found


def test_the_reference_has_the_public_names(site: Path) -> None:
    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    modules = (sm, sm.objectives, sm.posteriors, sm.matching, sm.networks, sm.audit, sm.bounds)
    for module in modules:
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if isinstance(thing, (type, types.FunctionType)):
                assert f'id="{module.__name__}.{name}"' in text or f'id="{thing.__module__}.{name}"' in text, name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and GitHub make them."""
    return {slugify(line.lstrip("#").strip(), "-") for line in page.read_text().splitlines() if line.startswith("#")}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_from_outside_the_site_lead_somewhere(name: str) -> None:
    for path, anchor in re.findall(r"\]\((?!http)([^)#\s]+)#?([^)\s]*)\)", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(ROOT / path), f"{path}#{anchor}"


# Python


class Block(NamedTuple):
    line: int
    code: str


def python_blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield Block(text[: found.start()].count("\n") + 2, found[1])


def hidden() -> dict[str, Any]:
    """What a block may take for granted: data, a model and an optimiser of the reader's, and the imports."""
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(count) % 10
        noise = 0.1 * torch.rand(count, 3, 8, 8, generator=generator)
        return (0.09 * y.view(-1, 1, 1, 1) + noise).clamp(0, 1), y

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    names: dict[str, Any] = {"torch": torch, "nn": nn, "sm": sm, "model": model, "__name__": "page"}
    for part, count in (("train", 60), ("validation", 20), ("test", 10)):
        names[f"x_{part}"], names[f"y_{part}"] = images(count)
    names["loader"] = [images(20) for _ in range(2)]
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    names["generator"] = torch.Generator().manual_seed(0)
    names["fit"] = sm.matching.Fit(steps=3, batch_size=8)
    names["network"] = sm.networks.MLPBackbone((3, 8, 8), 10, width=8, depth=1)
    names["threat_model"] = sm.ThreatModel("linf", eps=8 / 255)
    return names


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the files that pages speak of, in which long trainings take three steps."""
    monkeypatch.chdir(tmp_path)
    images, labels = np.zeros((400, 32, 32, 3), np.uint8), np.arange(400) % 10
    np.savez(tmp_path / "1m.npz", image=images, label=labels)
    torch.save((torch.rand(90, 3, 48, 48), torch.arange(90) % 4), tmp_path / "mine.pt")
    finish = sm.matching.Fit.__post_init__

    def short(fit: sm.matching.Fit) -> None:
        finish(fit)
        if fit.steps > 1000:  # the length of a real training
            object.__setattr__(fit, "steps", 3)
            object.__setattr__(fit, "batch_size", 4)

    monkeypatch.setattr(sm.matching.Fit, "__post_init__", short)
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=names_of(WITH_PYTHON))
def test_the_python_of_a_page_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = types.ModuleType("page")
    names.__dict__.update(hidden())
    monkeypatch.setitem(sys.modules, "page", names)  # for dataclasses of a block
    for block in python_blocks(page):
        reason = NOT_RUN.match(block.code)
        if reason:
            assert reason[1] in REASONS, f"{page.name}:{block.line} gives no reason that counts"
            compile(block.code, f"{page.name}:{block.line}", "exec")
            continue
        # Numbered as in the page, so that a traceback shows the line.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        exec(code, names.__dict__)


# Commands

PLACEHOLDERS = {"…": "", "OPTIONS": "", "NORM": "Linf", "EPS": "0.1"}
STUBS = """
PATH=
command_not_found_handle() { :; }
python() { printf '%s\\0' "$@"; printf '\\n\\0'; }
torchrun() { python "$@"; }
env() { :; }
"""


def shell_blocks(page: Path) -> Iterator[str]:
    """Fenced and indented blocks, and commands within a sentence, that call one of our programs."""
    text = page.read_text()
    for found in re.finditer(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield found[1]
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"(?:^|\n)\n((?: {4,}.*\n?)+)", text):
        yield "\n".join(line.strip() for line in found[1].splitlines())
    for found in re.finditer(r"`((?:python|torchrun)[^`]*-m [^`]*)`", text):
        yield " ".join(found[1].split())


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Module and arguments of each call, loops unrolled."""
    calls = []
    for block in shell_blocks(page):
        if not PROGRAM.search(block):
            continue
        lines = subprocess.run(
            ["/bin/bash", "-c", STUBS + block], capture_output=True, text=True, check=False, cwd="/"
        ).stdout.split("\n\0")
        for line in lines:
            words = [PLACEHOLDERS.get(word, word) for word in line.split("\0")[:-1]]
            words = [word for word in words if word]
            while "-m" in words:  # torchrun has options before it
                words = words[words.index("-m") + 1 :]
                if PROGRAM.match(f"-m {words[0]}") and len(words) > 1:
                    calls.append((words[0], words[1:]))
                    break
    return calls


class Parsed(Exception):
    """The command line is valid; the program need not start."""


def without(arguments: list[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    if option not in arguments:
        return arguments
    place = arguments.index(option)
    return arguments[:place] + arguments[place + 2 :]


def check_run(arguments: list[str]) -> None:
    """The options of training.run, whose files need not be there."""
    if "--resume" in arguments:
        arguments = [*without(arguments, "--resume"), "--objective", "standard"]
    data, recipe = (command_line.value_of(arguments, name) for name in ("data", "recipe"))
    default = config.from_recipes(None if data == "folder" else data, recipe)  # a folder would be looked at
    command_line.parse(RunSettings, arguments, program="run", description="", default=default)


def check(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option exists and has a value of its type."""
    if module == "training.run":
        return check_run(arguments)
    if module == "training.compare" and "--" in arguments:
        end = arguments.index("--")
        check_run(["--objective", "standard", *arguments[end + 1 :]])
        arguments = arguments[:end]
    parsers = {name: getattr(command_line, name) for name in ("parse", "parse_known")}
    depth = 0

    def stopping(name: str) -> Any:
        def parse(*given: Any, **more: Any) -> Any:
            nonlocal depth
            depth += 1
            result = parsers[name](*given, **more)
            depth -= 1
            if depth == 0:
                if name == "parse_known":
                    check_run(result[1])
                raise Parsed
            return result

        return parse

    arguments = without(arguments, "--resume")
    if module == "training.score":  # which reads the file for its defaults
        arguments = without(arguments, "--posterior-from")
    program = importlib.import_module(module)
    if hasattr(program, "__path__"):
        program = importlib.import_module(f"{module}.__main__")
    with monkeypatch.context() as patch:
        for name in parsers:
            patch.setattr(command_line, name, stopping(name))
        with pytest.raises(Parsed):
            program.main(arguments)


@pytest.mark.parametrize("page", PAGES, ids=names_of(PAGES))
def test_the_commands_of_a_page_are_valid(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for module, arguments in commands(page):
        options = (module, command_line.value_of(arguments, "recipe"), *(a for a in arguments if a.startswith("--")))
        if module == "benchmarks.kernels" or options in seen:  # a loop: tests/training/test_recipes.py has its values
            continue
        seen.add(options)
        try:
            check(module, arguments, monkeypatch)
        except Exception as error:
            raise AssertionError(f"{page.name}: python -m {module} {shlex.join(arguments)}: {error}") from error


def test_commands_are_found_and_mistakes_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(commands(ROOT / "docs" / "recipes.md")) > 60
    with pytest.raises(Exception, match="epochs"):
        check("training.run", ["--objective", "standard", "--epoch", "3"], monkeypatch)
    with pytest.raises(Exception, match="best"):
        check("training.evaluate", ["--run", "r", "--attack", "best"], monkeypatch)
