"""Mutation testing: are the tests strong enough that a broken line is noticed?

    pip install cosmic-ray coverage
    python -m tests.mutation --module objectives --count 300

A *mutant* is the code with one small mistake: a sign, a bound, a number, a condition. Cosmic Ray makes them, and a
seed draws some. The tests of the module run once under coverage, so that each mutant meets only the tests that execute
its line, those first that are short and execute little else. Tests that execute it in processes of their own, where
coverage does not look, come last (APART). It is *killed* by the first one that fails or hangs. It *survives* when none
does. Each mutant has a process of its own, forked after torch was imported, in a copy of the tree (``tree`` in the
folder of the results) where the file has the mistake: so programs that a test starts have it, too.

An interrupted run goes on where it was. Results are kept, a line of JSON each, as long as neither the module nor the
tests that they rest on change. SURVIVORS says why some survivors do no harm. Needs Python 3.11.
"""

import argparse
import ast
import collections
import contextlib
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  imported before the forks, as are the next ones
import matplotlib.pyplot  # noqa: F401
import numpy  # noqa: F401
import pytest
import scipy.io
import scipy.stats
import sklearn.datasets  # noqa: F401
import tomllib
import torch
import torch.nn.functional
import torch.utils.tensorboard
import torchvision.datasets  # noqa: F401
import tyro  # noqa: F401
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
CODE = ("scorematch", "training")
SURVIVORS = Path(__file__).with_suffix(".toml")
OTHERS = "augmentation averaging compilation folding free graphs inputs l1_ball model_state modes normalised sampling"
OTHERS += " self_consistency threat_model weight_perturbation"
MODULES = {
    "objectives": "scorematch/objectives",
    "divergences": "scorematch/divergences.py",
    "posteriors": "scorematch/posteriors",
    "matching": "scorematch/matching",
    "attacks": "scorematch/attacks",
    "bounds": "scorematch/bounds",
    "audit": "scorematch/audit",
    "networks": "scorematch/networks",
    "smoothing": "scorematch/smoothing.py",
    "others": [f"scorematch/{name}.py" for name in OTHERS.split()],
    "compare": "training/compare.py",
    "evaluate": "training/evaluate.py",
    "measures": "training/measures",
    "loop": "training/engine/loop.py",
    "generated": "training/data/generated.py",
    "checkpoint": "training/engine/checkpoint.py",
    "distributed": "training/engine/distributed.py",
}
MEASURED = [
    "tests/training/test_evaluate.py",
    "tests/training/test_certify.py",
    "tests/training/test_judge.py",
    "tests/training/test_obfuscation.py",
    "tests/training/test_posteriors.py::test_exact_scores_imply_the_exact_posterior",
    "tests/training/test_run.py::test_probabilities_along_an_attack_are_those_of_its_points",
    "tests/training/test_run.py::test_what_fools_a_classifier",
    "tests/training/test_toy.py::test_intervals_of_the_judge_are_at_95_per_cent",
    "--deselect=tests/training/test_evaluate.py::test_two_processes_say_what_one_says",
    "--deselect=tests/training/test_evaluate.py::test_processes_without_a_sample",
]
# What pytest is told to run; of a module that is not here, all tests of the library.
TESTS = {
    "compare": ["tests/training/test_compare.py"],
    "evaluate": MEASURED,
    "measures": MEASURED,
    "loop": [
        "tests/training/test_loop.py",
        "tests/training/test_techniques.py",
        "tests/training/test_hardware.py::test_auto_takes_what_the_hardware_does_best",
        "tests/training/test_hardware.py::test_short_runs_are_not_compiled",
        "tests/training/test_hardware.py::test_an_attack_that_communicates_is_not_recorded",
        "--deselect=tests/training/test_loop.py::test_switches_for_speed_change_rounding_alone",
        "--deselect=tests/training/test_loop.py::test_recorded_attacks_train_to_the_same_bits",
    ],
    "generated": ["tests/training/test_generated.py"],
    "checkpoint": [
        "tests/training/test_checkpoint.py",
        "tests/training/test_command_line.py::test_bad_input",
        "tests/training/test_environment.py::test_a_pipe_is_not_replaced",
        "tests/training/test_environment.py::test_devices_are_known_by_their_names",
        "tests/training/test_evaluate.py::test_bad_sources",
        "tests/training/test_evaluate.py::test_files_that_are_read_are_not_written_over",
        "tests/training/test_figures.py::test_a_damaged_summary_is_named",
        "tests/training/test_run.py::test_a_run_that_has_lost_a_file_says_so_before_it_goes_on",
    ],
    "distributed": [
        "tests/training/test_distributed.py",
        "tests/training/test_environment.py::test_a_port_in_use",
        "tests/training/test_environment.py::test_empty_variables_of_torchrun_are_none",
        "tests/training/test_environment.py::test_variables_of_torchrun_left_over",
        "tests/training/test_evaluate.py::test_verdicts_come_back_in_the_order_of_the_samples",
        "--deselect=tests/training/test_distributed.py::test_a_signal_stops_all_processes_after_the_same_twentieth_step",
        "--deselect=tests/training/test_distributed.py::test_torchrun_restarts_a_run_where_it_was",
    ],
}
LIBRARY = ["tests/library"]
# How the names of those begin that execute the module in other processes.
APART = {
    "distributed": ["tests/training/test_distributed.py"],
}
# Mistakes that a person could make. Cosmic Ray knows more, such as a shift in the place of a sum, which every test that
# reaches the line notices: they would only make the score look better.
SWAPS = {"Add": ["Sub", "Mul"], "Sub": ["Add"], "Mul": ["Div", "Add"], "Div": ["Mul"], "FloorDiv": ["Mul"]}
SWAPS |= {"Mod": ["FloorDiv"], "Pow": ["Mul"], "BitAnd": ["BitOr"], "BitOr": ["BitAnd"]}
ORDER = {"Eq": ["NotEq"], "NotEq": ["Eq"], "Lt": ["LtE", "Gt"], "LtE": ["Lt", "Gt"], "Gt": ["GtE", "Lt"]}
ORDER |= {"GtE": ["Gt", "Lt"], "Is": ["IsNot"], "IsNot": ["Is"]}
OPERATORS = [
    *(f"core/ReplaceBinaryOperator_{a}_{b}" for a, others in SWAPS.items() for b in others),
    *(f"core/ReplaceComparisonOperator_{a}_{b}" for a, others in ORDER.items() for b in others),
    *(f"core/ReplaceUnaryOperator_{change}" for change in ("USub_UAdd", "Delete_Not", "Delete_Invert")),
    *("core/AddNot", "core/NumberReplacer", "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue"),
    *("core/ReplaceAndWithOr", "core/ReplaceOrWithAnd", "core/ReplaceBreakWithContinue"),
    *("core/ReplaceContinueWithBreak", "core/ZeroIterationForLoop"),
]


@dataclass(frozen=True)
class Place:
    """Where Cosmic Ray can make a mistake, and which."""

    file: str
    line: int
    column: int
    operator: str
    occurrence: int


@dataclass(frozen=True)
class Result:
    place: Place
    outcome: str  # killed, hung or survived
    by: str  # the test that failed
    tests: int  # how many execute the line
    seconds: float
    change: tuple[str, ...]  # lines removed and added
    evidence: str  # digest of the tests that this rests on


class Coverage:
    """Which tests execute a line, and how long each takes."""

    def __init__(self, lines: dict[str, dict[int, list[str]]], seconds: dict[str, float], module: str) -> None:
        self.lines, self.seconds = lines, seconds
        self.options = TESTS.get(module, LIBRARY)
        self.apart = sorted(
            (test for test in seconds if test.startswith(tuple(APART.get(module, ())))), key=seconds.__getitem__
        )
        self.breadth = collections.Counter(test for by in lines.values() for tests in by.values() for test in tests)

    def tests(self, file: str, *places: int) -> list[str]:
        """Short ones that execute little else come first. What an import executes concerns all that use the file.

        So does what no test seems to execute: coverage does not see inside of a profiling function.

        Args:
            places: lines of which one is enough; the first line of a long statement may execute nothing itself.
        """
        found = {test for line in places for test in self.lines[file].get(line, ())}
        if not found or "" in found:
            found = found.union(*self.lines[file].values())
        seen = found.difference(self.apart, [""])
        return sorted(seen, key=lambda test: (self.breadth[test] * self.seconds[test], test)) + self.apart


# ----------------------------------------------------------------------------------------------------------- mutants


def places(file: str) -> list[Place]:
    """All that Cosmic Ray can do to a file, but for what changes nothing.

    That is what annotations and decorators say, the * before arguments that have a name, and 1 added to 1e30.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source = (ROOT / file).read_text()
    skipped = [
        getattr(owner, name, None) for owner in ast.walk(ast.parse(source)) for name in ("annotation", "returns")
    ]
    skipped += [node for owner in ast.walk(ast.parse(source)) for node in getattr(owner, "decorator_list", [])]
    left_out = [
        (node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0)
        for node in skipped
        if isinstance(node, ast.expr)
    ]
    lines = source.splitlines()
    tree, found = get_ast(source), []
    for operator in OPERATORS:
        change = get_operator(operator)()
        positions = [start for node in ast_nodes(tree) for start, _ in change.mutation_positions(node)]
        for occurrence, (line, column) in enumerate(positions):
            separator = lines[line - 1][column : column + 2] == "*,"
            huge = re.match(r"[\d.]+e[1-9]\d", lines[line - 1][column:])
            if not (separator or huge or any((a, b) <= (line, column) < (c, d) for a, b, c, d in left_out)):
                found.append(Place(file, line, column, operator, occurrence))
    return found


def drawn(files: Iterable[str], count: int, seed: int) -> list[Place]:
    """``count`` mistakes, or as many as there are: one at each place, a second one when no place is left, and so on."""
    everything = sorted((place for file in files for place in places(file)), key=lambda place: shuffled(place, seed))
    turns = collections.Counter[tuple[str, int, int]]()
    ranked = []
    for place in everything:
        turns[place.file, place.line, place.column] += 1
        ranked.append((turns[place.file, place.line, place.column], len(ranked), place))
    return [place for _, _, place in sorted(ranked, key=lambda entry: entry[:2])[:count]]


def shuffled(place: Place, seed: int) -> str:
    """A random number for each place, which does not depend on what else there is."""
    return hashlib.sha256(f"{seed} {place}".encode()).hexdigest()


def mutated(place: Place) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = mutate_code((ROOT / place.file).read_text(), get_operator(place.operator)(), place.occurrence)
    assert code is not None
    return code


def change_of(place: Place) -> tuple[str, ...]:
    before, after = (ROOT / place.file).read_text().splitlines(), mutated(place).splitlines()
    lines = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if line[:3] not in ("---", "+++")]
    return tuple(" ".join(line.split()) for line in lines if line[0] in "+-")


def statement_of(place: Place) -> int:
    """The first line of the innermost statement, which is the one that coverage counts."""
    nodes = [node for node in ast.walk(ast.parse((ROOT / place.file).read_text())) if isinstance(node, ast.stmt)]
    starts = [(min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]), node) for node in nodes]
    around = [(start, node.lineno) for start, node in starts if start <= place.line <= (node.end_lineno or start)]
    return max(around)[1]


# -------------------------------------------------------------------------------------------------- runs of the tests


class Selection:
    """Runs these tests in this order, then those whose names were not known, and says what happened."""

    def __init__(
        self, tests: list[str] | None = None, known: Iterable[str] = (), switch: Callable[[str], None] | None = None
    ) -> None:
        self.tests, self.known, self.switch = tests, set(known), switch
        self.failed: list[str] = []
        self.seconds: dict[str, float] = collections.defaultdict(float)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.tests is not None:
            by_name = {item.nodeid: item for item in items}
            new = [item for item in items if item.nodeid not in self.known]  # a table of the module is their parameters
            items[:] = [by_name[name] for name in self.tests if name in by_name] + new

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self.switch:
            self.switch(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def in_a_process(work: Callable[[], Any], limit: float) -> Any:
    """What ``work`` returns in a forked process, as JSON; None when it did not end in time, or died."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        sys.modules["__main__"] = types.ModuleType("__main__")  # processes that a test starts need not import this file
        os.close(read)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        try:
            answer = json.dumps(work())
        except BaseException as error:  # the process must not go on with what belongs to its parent
            answer = json.dumps({"error": repr(error)})
        with os.fdopen(write, "w") as file:
            file.write(answer)
        os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.alarm(max(1, round(limit)))
    try:
        with os.fdopen(read) as file:
            answer = file.read()
    finally:
        signal.alarm(0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return json.loads(answer) if answer else None


def run_tests(selection: Selection, arguments: Iterable[str], *options: str) -> int:
    command = ["-q", "-p", "no:cacheprovider", *options, *arguments]
    return int(pytest.main(command, plugins=[selection]))


def baseline(arguments: list[str]) -> dict[str, Any]:
    """These tests once, under coverage, test by test: the lines that each executes, and its seconds."""
    import coverage

    def work() -> Any:
        source = [str(ROOT / name) for name in CODE]
        watch = coverage.Coverage(data_file=None, source=source, config_file=False)
        watch.start()
        selection = Selection(switch=watch.switch_context)
        status = run_tests(selection, arguments)
        watch.stop()
        data = watch.get_data()
        lines = {
            str(Path(file).relative_to(ROOT)): {n: sorted(set(names)) for n, names in by_line.items()}
            for file in data.measured_files()
            for by_line in [data.contexts_by_lineno(file)]
        }
        return {"status": status, "failed": selection.failed, "seconds": selection.seconds, "lines": lines}

    found = in_a_process(work, limit=3600)
    if not found or found.get("status") != 0:
        failed = found and found.get("failed", found)
        raise SystemExit(f"error: the tests must pass before mutants are made, failed: {failed}")
    return found


def plant(tree: Path) -> None:
    """A copy of the code and its tests, with all else that they may read."""
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.name in (*CODE, "tests"):
            shutil.copytree(entry, tree / entry.name)
        elif entry.name != "build" and not entry.name.startswith("."):
            (tree / entry.name).symlink_to(entry)


@contextlib.contextmanager
def written(code: str, path: Path) -> Iterator[None]:
    """``code`` in the place of the file, as long as the block takes; what Python has compiled of it is removed."""
    before, compiled = path.read_text(), Path(importlib.util.cache_from_source(str(path)))
    try:
        compiled.unlink(missing_ok=True)
        path.write_text(code)
        yield
    finally:
        path.write_text(before)
        compiled.unlink(missing_ok=True)


def try_mutant(place: Place, coverage: Coverage, tree: Path) -> Result:
    tests = coverage.tests(place.file, statement_of(place), place.line)
    start = time.monotonic()

    def limited(test: str) -> None:
        signal.alarm(60 + round(10 * coverage.seconds.get(test, 0)))

    def work() -> Any:
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).absolute() != ROOT)]
        sys.path_importer_cache.clear()
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        options = [option for option in coverage.options if option.startswith("-")]
        for part in (files[:2], files[2:]):  # to collect all tests takes longer than most of them
            chosen = [test for test in tests if test.partition("::")[0] in part]
            selection = Selection(chosen, coverage.seconds, limited)
            named = [argument for argument in coverage.options if argument.partition("::")[0] in part]
            status = run_tests(selection, named or part, "-x", *options) if part else 0
            if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                return {"status": status, "by": selection.failed[0] if selection.failed else "(collection)"}
        return {"status": 0}

    found = None
    if tests:
        with written(mutated(place), tree / place.file):
            found = in_a_process(work, limit=60 + 10 * sum(coverage.seconds[test] for test in tests))
    outcome = "survived" if not tests or (found and found.get("status") == 0) else "killed" if found else "hung"
    by = (found or {}).get("by", "")
    seconds = round(time.monotonic() - start, 2)
    return Result(place, outcome, by, len(tests), seconds, change_of(place), evidence_of(by, *coverage.options))


# ------------------------------------------------------------------------------------------------------------ program


def digest(files: Iterable[Path]) -> str:
    content = hashlib.sha256()
    for file in sorted(files):
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


@functools.cache
def evidence_of(by: str, *arguments: str) -> str:
    """Digest of the file with the test that killed a mutant, or of all its tests: new ones may kill it."""
    file = ROOT / by.partition("::")[0]
    return digest([file] if file.is_file() else files_of(arguments))


def files_of(arguments: Iterable[str]) -> list[Path]:
    """The files that pytest is told to run."""
    given = [ROOT / argument.partition("::")[0] for argument in arguments if not argument.startswith("-")]
    return [file for path in given for file in ([path] if path.is_file() else path.glob("*.py"))]


def coverage_of(module: str, key: str, path: Path) -> Coverage:
    """As stored, if the code and the tests are still those."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    if stored.get("key") != key:
        print("== the tests under coverage", flush=True)
        stored = baseline(TESTS.get(module, LIBRARY)) | {"key": key}
        path.write_text(json.dumps(stored))
    lines = {file: {int(line): tests for line, tests in by.items()} for file, by in stored["lines"].items()}
    return Coverage(lines, stored["seconds"], module)


def reason(result: Result, survivors: dict[str, list[dict[str, Any]]]) -> str:
    """Why a survivor does no harm: the entry of SURVIVORS with the same change."""
    for entry in survivors.get(result.place.file, []):
        if list(result.change) == entry["change"]:
            return str(entry["why"])
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", choices=MODULES, required=True)
    parser.add_argument("--count", type=int, default=300, help="mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--out", type=Path, default=Path("build/mutation"), help="folder of the results")
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count must be at least 1, got {options.count}")
    assert not sys.modules.keys() & set(CODE), "each mutant imports them anew"
    os.chdir(ROOT)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)

    module = MODULES[options.module]
    targets = [ROOT / path for path in ([module] if isinstance(module, str) else module)]
    paths = [file for target in targets for file in ([target] if target.is_file() else sorted(target.rglob("*.py")))]
    files = [str(path.relative_to(ROOT)) for path in paths]
    tests = TESTS.get(options.module, LIBRARY)
    key = digest([*(file for name in CODE for file in (ROOT / name).rglob("*.py")), *files_of(tests)])
    stored = f"coverage-{options.module}.json" if options.module in TESTS else "coverage.json"
    coverage = coverage_of(options.module, key, options.out / stored)
    tree = options.out.absolute() / "tree"
    plant(tree)

    path = options.out / f"{options.module}.jsonl"
    kept: dict[Place, Result] = {}
    key = digest(map(Path, files))
    if path.exists():
        first, *rest = path.read_text().splitlines()
        if json.loads(first)["key"] == key:
            for line in map(json.loads, rest):
                place = Place(**line.pop("place"))
                result = Result(place, **line | {"change": tuple(line["change"])})
                if result.evidence == evidence_of(result.by, *tests):
                    kept[place] = result
    if not path.exists() or json.loads(path.read_text().partition("\n")[0])["key"] != key:
        path.write_text(json.dumps({"key": key}) + "\n")
    results = []
    for place in tqdm(drawn(files, options.count, options.seed), desc=options.module, unit="mutant"):
        if place not in kept:
            kept[place] = try_mutant(place, coverage, tree)
            with path.open("a") as file:
                file.write(json.dumps(asdict(kept[place])) + "\n")
        results.append(kept[place])
    report(options.module, results)


def report(module: str, results: list[Result]) -> None:
    survivors = tomllib.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}
    lived = [result for result in results if result.outcome == "survived"]
    killed = len(results) - len(lived)
    low, high = scipy.stats.binomtest(killed, len(results)).proportion_ci(method="wilson")
    unexplained = [result for result in lived if not reason(result, survivors)]
    for result in unexplained:
        print(f"\n{result.place.file}:{result.place.line} survives {result.tests} tests")
        print("\n".join(f"    {line}" for line in result.change))
    print(
        f"\n{module}: {killed} of {len(results)} killed ({100 * killed / len(results):.1f} %, 95 % interval"
        f" {100 * low:.1f} to {100 * high:.1f} %), {sum(r.outcome == 'hung' for r in results)} of them hung,"
        f" {len(lived) - len(unexplained)} survivors explained, {len(unexplained)} not"
    )


if __name__ == "__main__":
    main()
