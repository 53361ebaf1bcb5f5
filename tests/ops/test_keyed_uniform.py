"""keyed_uniform against scorematch.reference, Philox in plain integers and the published answers."""

# ruff: noqa: E501 (tables of messages)

import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from scorematch import reference
from scorematch.ops import keyed_uniform

from .conftest import runs_cuda_code

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# Random123's known answers of philox4x32 with 10 rounds: counter, key, result
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        product0, product1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            product1 // 2**32 ^ counter[1] ^ key[0],
            product1 % 2**32,
            product0 // 2**32 ^ counter[3] ^ key[1],
            product0 % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_plain_integers_give_the_known_answers(counter, key, answer):
    assert philox(counter, key) == answer


def test_the_header_gives_the_known_answers(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    checks = "".join(
        f"  for (int i = 0; i < 3; ++i) for (int k = 0; k < 4; ++k) w[k][i] = c{n}[k];\n"
        f"  scorematch::philox(w, {key[0] + key[1] * 2**32}u);\n"
        f"  for (int i = 0; i < 3; ++i) for (int k = 0; k < 4; ++k) wrong += w[k][i] != a{n}[k];\n"
        for n, (_, key, _) in enumerate(KNOWN_ANSWERS)
    )
    tables = "".join(
        f"constexpr uint32_t c{n}[] = {{{', '.join(map(str, counter))}}}, a{n}[] = {{{', '.join(map(str, answer))}}};\n"
        for n, (counter, _, answer) in enumerate(KNOWN_ANSWERS)
    )
    source = tmp_path / "philox.cpp"
    body = f"int main() {{\n  uint32_t w[4][3];\n  int wrong = 0;\n{checks}  return wrong;\n}}\n"
    source.write_text(f'#include "{CSRC}/philox.h"\n{tables}{body}')
    binary = tmp_path / "philox"
    command = [compiler, "-std=c++20", "-O1", str(source), "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert built.returncode == 0, built.stderr
    assert subprocess.run([str(binary)], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 2**32), (2**63 - 1, 2**63 - 1), (0x299F31D0A4093822, 77)])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 64, 67, 300])
def test_is_philox_bit_for_bit(count, seed, stream, device):
    ids = [0, 7, 2**32 - 1]
    expected = [
        [
            (philox([j // 4, n, stream % 2**32, stream >> 32], [seed % 2**32, seed >> 32])[j % 4] >> 8) / 2**24
            for j in range(count)
        ]
        for n in ids
    ]
    samples = torch.tensor(ids, device=device)
    for dtype in (torch.float32, torch.float64):
        actual = keyed_uniform(samples, count, seed=seed, stream=stream, dtype=dtype)
        assert actual.dtype == dtype
        assert actual.tolist() == expected


@pytest.mark.parametrize(
    ("samples", "count"), [(1, 40_000), (5, 1), (333, 7), (128, 3072), (70, 257), (40_000, 2), (0, 5), (5, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_the_reference(samples, count, dtype, device):
    ids = torch.randint(2**32, (samples,), device=device)
    actual = keyed_uniform(ids, count, seed=123456789012345, stream=2**40 + 3, dtype=dtype)
    expected = reference.keyed_uniform(ids, count, seed=123456789012345, stream=2**40 + 3, dtype=dtype)
    assert torch.equal(actual, expected)
    assert actual.is_contiguous()


def test_a_value_depends_only_on_its_own_key(device):
    ids = torch.randperm(501, device=device)  # an odd number: two threads meet within a row
    whole = keyed_uniform(ids, 100, seed=5, stream=6)
    for part, threads in ((slice(3, 4), 1), (slice(17, 450, 7), 2), (slice(None), 1), (slice(None), 2)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert torch.equal(keyed_uniform(ids[part], 100, seed=5, stream=6), whole[part])
        finally:
            torch.set_num_threads(before)
    assert torch.equal(keyed_uniform(ids, 33, seed=5, stream=6), whole[:, :33])
    for other in (keyed_uniform(ids, 100, seed=6, stream=6), keyed_uniform(ids, 100, seed=5, stream=7)):
        assert (other == whole).double().mean() < 1e-3


def test_values_are_uniform(device):
    values = keyed_uniform(torch.arange(1000, device=device), 1000, seed=0, stream=0).double()
    assert values.min() >= 0
    assert values.max() < 1
    share = torch.histc(values, 16, min=0, max=1) / values.numel()
    assert (share - 1 / 16).abs().max() < 5 * math.sqrt(1 / 16 / values.numel())
    for pairs in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1])):
        assert torch.corrcoef(torch.stack([p.flatten() for p in pairs]))[0, 1].abs() < 5e-3


def test_a_sample_out_of_range(device):
    for bad in (-1, 2**32):
        samples = torch.tensor([1, bad], device=device)
        if not runs_cuda_code(device):
            with pytest.raises(ValueError, match=rf"samples must be at least 0 and less than 2\^32, got {bad} at 1"):
                keyed_uniform(samples, 3, seed=0, stream=0)
        else:
            assert keyed_uniform(samples, 3, seed=0, stream=0).isnan().all(1).tolist() == [False, True]


def test_opcheck(device):
    samples = torch.arange(12, device=device)
    for dtype in (torch.float32, torch.float64):
        opcheck(torch.ops.scorematch.keyed_uniform.default, (samples, 5, 3, 4, dtype))
    opcheck(torch.ops.scorematch.keyed_uniform.default, (samples[::3], 5, 3, 4, torch.float32))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": [1]}, TypeError, r"samples must be a torch.Tensor, got list"),
        ({"samples": torch.ones(2)}, TypeError, r"samples is torch.float32, expected torch.int64"),
        ({"samples": torch.ones(2, 2, dtype=torch.int64)}, ValueError, r"samples has shape \[2, 2\], expected \[N\]"),
        ({"samples": torch.ones(2, dtype=torch.int64, device="meta")}, RuntimeError, r"samples is on meta, but scorematch"),
        ({"count": -1}, ValueError, r"count must be at least 0 and less than \d+, got -1"),
        ({"count": 1.0}, TypeError, r"count must be an int, got float"),
        ({"seed": -1}, ValueError, r"seed must be at least 0 and less than 9223372036854775808, got -1"),
        ({"seed": 2**63}, ValueError, r"seed must be at least 0 and less than 9223372036854775808, got 9223372036854775808"),
        ({"stream": -1}, ValueError, r"stream must be at least 0"),
        ({"stream": None}, TypeError, r"stream must be an int, got NoneType"),
        ({"dtype": torch.float16}, TypeError, r"dtype must be torch.float32 or torch.float64, got torch.float16"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {"samples": torch.arange(3), "count": 2, "seed": 0, "stream": 0, **change}
    with pytest.raises(error, match=message):
        keyed_uniform(arguments.pop("samples"), arguments.pop("count"), **arguments)
