"""The arithmetic of benchmarks.kernels --floor and --compare; no verdict here depends on how fast the machine is."""

import json
import random
from pathlib import Path

import pytest
import torch
from elsewhere import DEVICE, elsewhere

from benchmarks import autoattack, class_scores, endurance, floor, kernels, overhead, record, training
from scorematch.attacks import classifier, inspection, precision
from training import models
from training.settings.errors import run_program

pytestmark = pytest.mark.usefixtures("untouched_process")

PEAK = floor.Peak(operations=1e9, exponentials=1e8)


def probes(**changes: float) -> floor.Probes:
    """1 ns for a byte read, 3 ns for a byte written, 10 µs for a call."""
    given = {"moved": 1000, "read": 11e-6, "read_in_two": 12e-6, "copied": 12e-6, "call": 10e-6, "backward": 40e-6}
    return floor.Probes(**{**given, **changes})


def test_a_byte_read_or_written_has_its_own_time():
    found = floor.floor_of(floor.Work(20_000, 10_000, 1000), probes(), PEAK, cache_bytes=2**20)
    assert found["call_us"] == pytest.approx(10)
    assert found["moving_us"] == pytest.approx(20 * 1 + 10 * 3)
    assert found["computing_us"] == pytest.approx(1)
    assert found["floor_us"] == pytest.approx(10 + 50)
    assert found["bound"] == "cache"


def test_the_fastest_way_to_read_counts():
    work = floor.Work(20_000, 10_000, 1000)
    assert floor.floor_of(work, probes(read=13e-6, read_in_two=11e-6), PEAK, 0)["moving_us"] == pytest.approx(50)
    slow = probes(read=13e-6, read_in_two=14e-6)  # 3 ns, but a copy moves a byte in 2 ns
    assert floor.floor_of(work, slow, PEAK, 0)["moving_us"] == pytest.approx(60)


def test_operations_and_exponentials_add_up():
    found = floor.floor_of(floor.Work(1000, 0, 30_000, 2000), probes(), PEAK, cache_bytes=2**20)
    assert found["computing_us"] == pytest.approx(30 + 20)
    assert found["floor_us"] == pytest.approx(10 + 50)
    assert found["bound"] == "arithmetic"


def test_what_bounds_a_call():
    small, large = floor.Work(8, 8, 4), floor.Work(500_000, 500_000, 4)
    assert floor.floor_of(small, probes(), PEAK, cache_bytes=2**20)["bound"] == "call"
    assert floor.floor_of(large, probes(), PEAK, cache_bytes=10**6)["bound"] == "cache"
    assert floor.floor_of(large, probes(), PEAK, cache_bytes=10**6 - 1)["bound"] == "memory"
    in_turns = floor.Work(500_000, 500_000, 4, turns=6)
    found = floor.floor_of(in_turns, probes(), PEAK, cache_bytes=6 * 10**6 - 1)
    assert found["bound"] == "memory"
    assert found["footprint"] == 6 * 10**6
    backward = floor.Work(8, 8, 4, backward=True)
    assert floor.floor_of(backward, probes(), PEAK, cache_bytes=2**20)["call_us"] == pytest.approx(40)


def test_probes_faster_than_a_call_give_no_negative_time():
    found = floor.floor_of(
        floor.Work(8, 8, 4), probes(read=9e-6, read_in_two=9e-6, copied=9e-6), PEAK, cache_bytes=2**20
    )
    assert found["moving_us"] == 0


def test_probes_move_what_the_case_moves():
    moved, runs = floor.probe_runs(floor.Work(300_000, 100_000, 0, turns=3), "cpu")
    assert moved == 400_000
    assert set(runs) == {"read", "read_in_two", "copied", "call"}
    assert floor.probe_runs(floor.Work(8, 8, 4), "cpu")[0] == floor.SMALLEST_PROBE
    assert "backward" in floor.probe_runs(floor.Work(8, 8, 4, backward=True), "cpu")[1]


def test_every_case_says_what_it_has_to_do():
    suites = (kernels.threat_model_cases, kernels.auto_attack_cases, kernels.divergence_cases, kernels.score_cases)
    cases = {case.name: case.work for suite in suites for case in suite("cpu")}
    elements = 128 * 3 * 32 * 32
    assert all(work.read > 0 and work.written > 0 and work.operations > 0 for work in cases.values())
    assert cases["pgd_step linf [128,3,32,32]"] == floor.Work(12 * elements, 4 * elements, 9 * elements)
    assert cases["score_step [128,10,3072] from memory"] == floor.Work(
        4 * (11 * elements + 1280), 4 * elements, 20 * elements, turns=6
    )
    assert cases["keyed_uniform [128,5]"] == floor.Work(8 * 128, 4 * 5 * 128, 128 * (2 * 80 + 15))
    assert all(work.backward == ("divergence" in name) for name, work in cases.items())
    logits = 512 * 10
    assert cases["divergence kl, labels [512,10]"] == floor.Work(
        4 * logits + 8 * 512, 4 * (logits + 512), 13 * logits, logits, backward=True
    )


@pytest.mark.parametrize(("count", "outside"), [(5, 0), (6, 0), (9, 1), (20, 5), (60, 21)])
def test_interval_of_the_median(count, outside):
    """As many values are left out at each end as tables of the sign test say."""
    values = torch.randperm(count).tolist()
    assert floor.interval_of_median(values) == (outside, count - 1 - outside)


def measured(*, ours: float, eager: float, noise: float = 0.02, **changes: object) -> dict:
    results = {
        "name": "step",
        "ours": {"median_us": ours, "low_us": ours * (1 - noise), "high_us": ours * (1 + noise)},
        "eager/ours": eager / ours,
        "eager/ours_interval": [eager / ours * (1 - noise), eager / ours * (1 + noise)],
    }
    return {"device": "a processor", "threads": 2, "results": [results], **changes}


@pytest.mark.parametrize(
    ("new", "slower"),
    [
        (measured(ours=10, eager=30), False),
        (measured(ours=13, eager=30), True),
        (measured(ours=11, eager=30), False),  # less than the threshold
        (measured(ours=13, eager=30, noise=0.35), False),  # the intervals overlap
        (measured(ours=13, eager=39), False),  # the machine is slower
        (measured(ours=10, eager=20), False),  # PyTorch is faster
        (measured(ours=7, eager=30), False),
    ],
)
def test_regressions(new, slower, tmp_path, capsys):
    files = [tmp_path / name for name in ("old.json", "new.json")]
    for file, content in zip(files, (measured(ours=10, eager=30), new), strict=True):
        file.write_text(json.dumps(content))
    assert run_program(kernels.main, ["--compare", *map(str, files)]) == int(slower)
    printed, told = capsys.readouterr()
    assert told == ("stopped: 1 of 1 cases are slower\n" if slower else "")
    assert ("step: 1.30 times as long (10.0 to 13.0 µs), 1.30 times beside eager PyTorch" in printed) == slower
    assert ("no case is slower" in printed) != slower


def test_what_cannot_be_compared(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(measured(ours=10, eager=30)))
    cases = {
        "threads must be the same in both files, got 2 and 1": measured(ours=10, eager=30, threads=1),
        "the new file has no intervals": measured(ours=10, eager=30, results=[{"name": "step", "ours": {}}]),
    }
    for message, content in cases.items():
        new.write_text(json.dumps(content))
        assert run_program(kernels.main, ["--compare", str(old), str(new)]) == 2
        assert message in capsys.readouterr().err
    assert run_program(kernels.main, ["--compare", str(old), str(tmp_path / "missing.json")]) == 2


def test_a_case_in_one_file_alone_is_named(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(measured(ours=10, eager=30)))
    new.write_text(json.dumps(measured(ours=10, eager=30, results=[])))
    assert run_program(kernels.main, ["--compare", str(old), str(new)]) == 0
    assert "only in one file: step" in capsys.readouterr().out


def test_a_measured_file_can_be_compared(tmp_path):
    """From the command line to the verdict, on the smallest case."""
    files = [tmp_path / name for name in ("a.json", "b.json")]
    options = ["--only", "score_step fixed", "--no-compile", "--rounds", "7", "--threads", "1"]
    for file in files:
        assert run_program(kernels.main, [*options, "--out", str(file)]) == 0
    assert run_program(kernels.main, ["--compare", *map(str, files)]) in (0, 1)


def test_a_measured_floor_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(floor, "larger_than_caches", lambda device: 2**22)
    out = Path(tmp_path / "floor.json")
    options = ["--only", "score_step fixed", "--no-compile", "--rounds", "7", "--threads", "1", "--floor"]
    assert run_program(kernels.main, [*options, "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["machine"]["peak"]["operations"] > 0
    assert [line["bytes"] for line in written["machine"]["bandwidth"]][-1] == 2**22
    found = written["results"][0]["floor"]
    assert found["floor_us"] >= found["call_us"] > 0
    assert found["bound"] in ("call", "cache", "memory", "arithmetic")


def test_every_pass_is_counted_with_its_samples():
    network, recorder = torch.nn.Linear(3, 4).requires_grad_(False), overhead.Recorder(classifier.logits_of)
    x = torch.rand(5, 3)
    for _ in range(11):
        recorder(network, x)
    logits = recorder(network, x[:2].requires_grad_())
    for _ in range(3):
        torch.autograd.grad(logits.sum(), logits, retain_graph=True)
    assert recorder.passes == {("logits", 5): 11, ("graph", 2): 1, ("back", 2): 3}
    assert {kind: len(values) for kind, values in recorder.bare.items()} == {
        ("logits", 5): 2,
        ("graph", 2): 1,
        ("back", 2): 1,
    }


def test_the_floor_of_an_attack_is_its_passes():
    recorder = overhead.Recorder(classifier.logits_of)
    recorder.passes.update({("logits", 5): 10, ("graph", 5): 2, ("back", 5): 3})
    recorder.bare = {("logits", 5): [0.1, 0.1, 9.0], ("graph", 5): [0.2], ("back", 5): [0.3, 0.4, 0.5]}
    assert recorder.floor_seconds() == pytest.approx(10 * 0.1 + 2 * 0.2 + 3 * 0.4)


def test_passes_of_the_checks_do_not_count():
    network, recorder = torch.nn.Linear(3, 4), overhead.Recorder(classifier.logits_of)
    recorder(network, torch.rand(5, 3))
    assert recorder.check(recorder, network, torch.rand(2, 3)).shape == (2, 4)
    assert recorder.passes == {("logits", 5): 1}
    assert recorder.checks > 0


def test_overheads_from_the_command_line(tmp_path):
    out = tmp_path / "overhead.json"
    options = ["--samples", "3", "--steps", "2", "--queries", "4", "--out", str(out)]
    overhead.main([*options, "--attacks", "apgd-ce", "fab-t"])
    first, second = json.loads(out.read_text())["attacks"]
    assert (first["attack"], second["attack"]) == ("apgd-ce", "fab-t")
    assert first["passes"]["graph"] == first["passes"]["back"] == 3, "at the start, and after each of two steps"
    assert first["checks_seconds"] > 0
    assert first["times_floor"] == pytest.approx(first["seconds"] / first["floor_seconds"])
    assert (classifier.logits_of.__name__, inspection.doubts.__name__) == ("logits_of", "doubts")


def cycles(slope: float) -> list[dict]:
    """40 cycles of three minutes, each objective with a level of its own, and a warm-up that grows fast."""
    rest = [0.3, -0.2, -0.4, 0.1, 0.2]  # megabytes of noise
    return [
        {
            "minutes": 3 * i,
            "objective": list(endurance.OBJECTIVES)[i % 4],
            "resident_mb": 500 + 10 * (i % 4) + slope * 3 * i / 60 + rest[i % 5] - max(0, 3 - i) * 50,
        }
        for i in range(40)
    ]


@pytest.mark.parametrize("slope", [0.0, 4.0])
def test_growth_of_memory_is_found_below_the_levels_of_the_objectives(slope):
    found = endurance.growth(cycles(slope))
    assert found["lower"] < slope < found["upper"]
    assert found["upper"] - found["lower"] < 0.5
    assert found["estimate"] == pytest.approx((found["lower"] + found["upper"]) / 2)


def test_growth_of_memory_allows_for_cycles_that_are_alike():
    """A level that stays for ten cycles, then changes: far fewer independent values than cycles."""
    slow = cycles(0.0)
    for i, cycle in enumerate(slow):
        cycle["resident_mb"] += 3.0 * (-1) ** (i // 10)
    wide, narrow = (found["upper"] - found["lower"] for found in map(endurance.growth, (slow, shuffled(slow))))
    assert wide > 2 * narrow
    assert endurance.growth(slow)["lower"] < 0.0 < endurance.growth(slow)["upper"]


def shuffled(found: list[dict]) -> list[dict]:
    """The same levels in an order without memory; the times stay."""
    order = random.Random(0).sample(range(4, len(found)), len(found) - 4)
    rest = [found[i] for i in order]
    return found[:4] + [{**cycle, "minutes": other["minutes"]} for cycle, other in zip(rest, found[4:], strict=True)]


def test_a_short_run_says_nothing_about_growth():
    assert endurance.growth(cycles(0.0)[:11]) is None


def test_a_cycle_is_interrupted_and_repeats_itself(tmp_path):
    settings = endurance.EnduranceSettings(epochs=1, limit=64, samples=4, threads=1)
    first, second = (endurance.cycle(settings, "pgd_at", tmp_path / "cycle", random.Random(seed)) for seed in (0, 1))
    assert first == second
    assert len(first[1]) == 4


def test_each_variant_is_timed_with_the_arithmetic_that_it_asks_for(tmp_path, monkeypatch):
    """Whether TF32 is allowed holds for the process; runs are made first, and then take turns."""
    found = []

    def look(trainer, index):
        found.append((trainer.speed.precision, torch.get_float32_matmul_precision()))

    monkeypatch.setattr(training.config, "validate_machine", lambda settings: None)  # TF32 on a CPU
    monkeypatch.setattr(training.Trainer, "_step", look)
    before = torch.get_float32_matmul_precision()
    options = ["--data", "toy", "--model", "toy_mlp", "--batch", "8", "--steps", "1", "--attack-steps", "1"]
    try:
        training.main([*options, "--variants", "tf32", "plain", "--rounds", "1", "--threads", "1"])
    finally:
        precision.allow_tf32(before != "highest")
    assert set(found) == {("tf32", "high"), ("float32", "highest")}


def test_shares_of_a_step(tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(training.time, "process_time", lambda: next(clock))  # a second passes at each look
    out = tmp_path / "shares.json"
    options = ["--data", "toy", "--model", "toy_mlp", "--batch", "8", "--steps", "1", "--attack-steps", "3"]
    objectives = ["--objectives", "pgd_at", "score_direct:kernel_density", "--variants", "plain"]
    training.main([*options, *objectives, "--rounds", "2", "--threads", "1", "--outside", "--out", str(out)])
    surrogate, direct = json.loads(out.read_text())["lines"]
    # Of 17 seconds of direct SCORE 8 are of its posterior, looked at twice each: a trace, 3 pull_backs, 4 moves.
    assert direct["posterior_per_cent"]["median"] == pytest.approx(100 * 8 / 17, abs=0.1)
    assert direct["outside_per_cent"]["median"] == pytest.approx(100 * 8 / 17, abs=0.1)
    # Of PGD-AT's one second all is for the passes, which take one when they are repeated.
    assert surrogate["posterior_per_cent"]["median"] == surrogate["outside_per_cent"]["median"] == 0


def test_attacks_and_packages_side_by_side(tmp_path, monkeypatch, capsys):
    """Each attack on the samples that the one before has left, and every stream and number of workers on the same."""
    (tmp_path / "network_of_mine.py").write_text(
        "import torch\n\n\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(autoattack, "official_class", lambda: None)
    out = tmp_path / "made" / "result.json"
    options = ["--model-from", "network_of_mine:build", "--eps", "0.02", "--samples", "60", "--workers", "1", "2"]
    options += ["--attacks", "apgd-ce", "apgd-t", "--repeats", "2", "--out", str(out)]
    assert run_program(autoattack.main, options) == 0
    written = json.loads(out.read_text())
    assert (written["samples"], written["repeats"], written["processes"]) == (60, 2, 1)
    first, second = written["attacks"]
    assert first["before"] == written["clean"] > first["reference stream"]["stand"] == second["before"] > 0
    labels = {"reference stream", "own stream", "workers 1", "workers 2"}
    assert set(written["seconds"]) == labels < set(first)
    for line in written["attacks"]:
        stand = {line[label]["stand"] for label in labels}
        assert max(stand) - min(stand) <= max(len(line[label]["differ"]) for label in labels)
        assert line["workers 1"]["differ"] == line["workers 2"]["differ"]
        assert line["reference stream"]["differ"] == []
    assert "times as fast as reference stream" in capsys.readouterr().out


def test_verdicts_that_processes_share_are_on_the_cpu(tmp_path, monkeypatch):
    """One on the device of the first process would be there in every process, whose samples are on another."""
    shared = []
    monkeypatch.setattr(autoattack.distributed, "from_first", lambda value: shared.append(value.device.type) or value)
    monkeypatch.setattr(autoattack, "official_class", lambda: None)
    torch.manual_seed(0)
    torch.save(models.build("digits_cnn", (1, 8, 8), 10).state_dict(), tmp_path / "weights.pt")
    options = ["--model-from", str(tmp_path / "weights.pt"), "--model", "digits_cnn", "--eps", "0.02", "--samples", "9"]
    with elsewhere(monkeypatch):
        autoattack.main([*options, "--attacks", "apgd-ce", "--no-reference-stream", "--device", str(DEVICE)])
    assert shared == ["cpu"]


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        (kernels, "--rounds 1", "rounds: 1 is out of range, allowed: at least 2"),
        (kernels, "--only nothing", "only: nothing is in the name of no case, allowed: parts of ['pgd_step linf"),
        (kernels, "--threads -1", "threads: -1 is out of range"),
        (kernels, "--device abacus", "device: 'abacus' is unknown"),
        (kernels, "--out made/file/x.json", "made/file/x.json: its folder cannot be made"),
        (kernels, "--out made", "made: is a folder, expected a file to write"),
        (autoattack, "--model-from x.pt --eps 0", "eps: 0.0 is out of range, allowed: a finite number above 0"),
        (autoattack, "--model-from x.pt --eps 0.1 --samples -1", "samples: -1 is out of range, allowed: 0 or more"),
        (autoattack, "--model-from x.pt --eps 0.1 --workers 0", "workers: (0,) is out of range"),
        (
            autoattack,
            "--model-from x.pt --eps 0.1 --attacks apgd",
            "attacks: 'apgd' is unknown, allowed: apgd-ce, apgd-",
        ),
        (training, "--batch 0", "batch: 0 is out of range, allowed: at least 1"),
        (training, "--data toy --batch 100000", "batch: 100000 samples, toy has"),
        (training, "--variants quick", "variants: 'quick' is unknown, allowed: plain, fused optimiser, channels_last"),
        (training, "--variants", "variants: none given, allowed: plain"),
        (training, "--objectives", "objectives: none given, allowed: standard, gaussian, pgd_at, trades, score_direct"),
        (overhead, "--samples 0", "samples: 0 is out of range, allowed: at least 1"),
        (overhead, "--input-shape 0", "input_shape: (0,) is out of range, allowed: numbers of at least 1"),
        (class_scores, "--teacher x.pt --points 0", "points: 0 is out of range, allowed: at least 1"),
        (endurance, "--minutes nan", "minutes: nan is out of range, allowed: a finite number above 0"),
        (endurance, "--out made", "out: made is there already, give a new folder"),
    ],
    ids=lambda given: given if isinstance(given, str) else given.__name__,
)
def test_what_cannot_be_measured_is_told_before(program, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").touch()
    assert run_program(program.main, options.split()) == 2
    told = capsys.readouterr().err
    assert f"error: {message}" in told
    assert told.count("\n") == 1


def test_some_cases_leave_the_record_of_all_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "RESULTS", tmp_path)
    options = ["--only", "score_step fixed", "--no-compile", "--rounds", "7", "--threads", "1"]
    assert run_program(kernels.main, options) == 0
    assert not list(tmp_path.iterdir())
    assert "not written, as these are not all cases" in capsys.readouterr().out


def test_what_was_measured_before_the_end_is_kept(tmp_path, monkeypatch):
    """On a GPU that is lent for minutes, compilations may take all of them."""
    measure, out = kernels.measure, tmp_path / "kernels.json"

    def stopped(case, *options):
        if "line_integral" in case.name:
            raise KeyboardInterrupt
        return measure(case, *options)

    monkeypatch.setattr(kernels, "measure", stopped)
    options = ["--only", "score_step fixed", "score_line_integral", "pgd_step linf fixed", "--no-compile"]
    with pytest.raises(KeyboardInterrupt):
        kernels.main([*options, "--rounds", "2", "--threads", "1", "--out", str(out)])
    assert [result["name"] for result in json.loads(out.read_text())["results"]] == ["pgd_step linf fixed [1,3,4,4]"]


def test_a_record_says_how_it_was_made(tmp_path):
    record.write(tmp_path / "x.json", "kernels", ["--only", "a b"], torch.device("cpu"), found=float("nan"))
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["command"] == "python -m benchmarks.kernels --only 'a b'"
    assert written["threads"] == torch.get_num_threads()
    assert written["device"] == record.device_name(torch.device("cpu"))
    assert written["found"] is None  # JSON has no word for it
