"""Which part may import which: arrows point one way only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """The full names of what a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def names(path: Path) -> Iterator[str]:
    """Every dotted name that a file mentions, such as torch.ops.scorematch."""
    yield from (ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))


def belongs(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("path", sources("scorematch"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_no_program(path: Path) -> None:
    outside = ("training", "tests", "benchmarks")
    assert not [name for name in imported(path) if any(belongs(name, module) for module in outside)]


@pytest.mark.parametrize("path", sources("training"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_programs_call_functions_not_operators(path: Path) -> None:
    assert not [name for name in (*imported(path), *names(path)) if belongs(name, "torch.ops")]


@pytest.mark.parametrize("path", sources("scorematch", "training"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_reference_is_for_tests_and_benchmarks_alone(path: Path) -> None:
    if path != ROOT / "scorematch" / "reference.py":
        assert not [name for name in imported(path) if belongs(name, "scorematch.reference")]


def test_the_rules_see_something() -> None:
    assert sources("scorematch")
    assert sources("training")
    assert "scorematch.PGD" in set(imported(ROOT / "training" / "measures" / "__init__.py"))


def test_programs_start_without_what_few_of_them_need() -> None:
    """Each of these takes about as long to import as torch, and `--help` and a misspelt option wait for it."""
    code = (
        "import sys\n"
        "from training import compare, evaluate, generate, plan, run, score\n"
        "print([name for name in ('sklearn', 'torchvision', 'torch._dynamo', 'timm') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
