"""Mutation testing of the kernels: are their tests strong enough that a mistake in csrc is noticed?

    python -m tests.mutation_of_kernels --only threat_model

The mutants are made by hand, since no tool changes C++ as sensibly: MUTANTS says in which file which text becomes which,
and whose tests have to notice it. Each mutant is compiled without sanitizers, which takes seconds, and stands in the
place of the kernels in a forked process that runs tests/ops/test_NAME.py and what tests/soak draws for the operators of
NAME. It is *killed* when a test fails, and when the process crashes or hangs. A mutant that cannot be compiled, and
tests that cannot be collected, are mistakes of this file: they end the program with an error.

A run that is interrupted goes on where it was: results are kept in build/mutation/kernels.jsonl, a line of JSON each,
as long as neither the sources of a mutant nor the tests that its result rests on change.
"""

# ruff: noqa: E501 (a table of sources)

import argparse
import ast
import collections
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import hypothesis  # noqa: F401  imported before the forks, as are the next ones
import pytest
import scipy.optimize  # noqa: F401
import torch
from tqdm import tqdm

from scorematch import ops, reference  # noqa: F401

from .mutation import Selection, in_a_process, run_tests
from .ops.emulated_device.build import CSRC, substitute
from .ops.sanitized import build

ROOT = Path(__file__).parent.parent
RESULTS = Path("build/mutation/kernels.jsonl")
BUILD = "plain"
SECONDS = 120  # for the tests of an operator, which take about ten
SOAK = "tests/soak/test_operators.py"
# The public operators of csrc/cpu/NAME.cpp, as tests/soak/test_operators.py calls them.
DRAWN = {
    "apgd_step": ["apgd_step"],
    "divergence": ["divergence", "logit_divergence"],
    "fab_step": ["fab_steps"],
    "keyed_uniform": ["keyed_uniform"],
    "l1_step": ["l1_step", "l1_project"],
    "score_step": ["score_step", "score_line_integral"],
    "square": ["square_linf", "square_l2"],
    "threat_model": ["pgd_step", "project", "random_start"],
}
# Not what is slow and about Python; nor what the instruction set of the build, the oldest, rounds worse than allowed.
SELECTED = "not (opcheck or gradcheck or refused_by_name) and not (l1_squared and 1000) and not (fab_step and 31)"


@dataclass(frozen=True)
class Change:
    old: str
    new: str
    harmless: str = ""  # why no test can notice it


# (file of csrc, NAME of csrc/cpu/NAME.cpp): mistakes in it
# fmt: off
MUTANTS: dict[tuple[str, str], list[Change]] = {
    ("arithmetic.h", "threat_model"): [
        Change("select(v > A(0), A(1), select(v < A(0), A(-1), v))", "select(v > A(0), A(1), select(v < A(0), A(-1), A(0)))"),
        Change("select(v > A(0), A(1), select(", "select(v >= A(0), A(1), select("),
        Change("select(v < lower, lower, v)", "select(v >= lower, v, lower)"),
        Change("select(raised > upper, upper, raised)", "select(raised < upper, raised, upper)"),
        Change("return select(v < A(0), -v, v);", "return v;"),
    ],
    ("arithmetic.h", "divergence"): [
        Change("k >= 0; --k", "k > 0; --k"),
        Change("int k = count - 2", "int k = count - 3"),
    ],
    ("threat_model.h", "threat_model"): [
        Change("clamp(v, x0 - A(eps), x0 + A(eps))", "clamp(v, x0 - A(eps), x0 + A(2 * eps))"),
        Change("return select(x0 == x0, inside, x0);", "return inside;"),
        Change("clamp(near, A(box.lower), A(box.upper))", "near"),
        Change("x + A(step_size) * sign(grad)", "x - A(step_size) * sign(grad)"),
        Change("return linf_projection(x + A(step_size) * sign(grad), x0, eps, box);", "return x + A(step_size) * sign(grad);"),
        Change("clamp(noise, A(-1), A(1))", "noise"),
        Change("clamp(noise, A(-1), A(1))", "clamp(noise, A(0), A(1))"),
        Change("largest = 0x1p48f", "largest = 0x1p100f"),
        Change("smallest = 0x1p-48f", "smallest = 0x1p-100f"),
        Change("shrink = 0x1p-80f", "shrink = 0x1p-20f"),
        Change("grow = 0x1p100f", "grow = 0x1p20f"),
        Change("largest = 0x1p480", "largest = 0x1p1000"),
        Change("smallest = 0x1p-480", "smallest = 0x1p-1000"),
        Change("shrink = 0x1p-600", "shrink = 0x1p-60"),
        Change("grow = 0x1p600", "grow = 0x1p60"),
        Change("  largest = lanes.max(largest);\n", ""),
        Change("select(m > largest, m, largest)", "select(m < largest, m, largest)"),
        Change("squares = lanes.sum(squares);\n  return {scale", "return {scale"),
        Change("select(squares == A(0), A(0), length / square_root(squares))", "length / square_root(squares)"),
        Change("length / square_root(squares)", "length / squares"),
        Change("const A scaled = v(j) * scale;", "const A scaled = v(j);"),
        Change("relative_length > A(1), x0", "relative_length > A(2), x0"),
        Change("relative_length > A(1), x0", "relative_length >= A(1), x0", harmless="on the sphere, both are v up to rounding"),
        Change("x0 + (v - x0) * shrink", "v + (v - x0) * shrink"),
        Change("return select(relative_length == relative_length, clamp(projected, A(box.lower), A(box.upper)), relative_length);", "return clamp(projected, A(box.lower), A(box.upper));"),
        Change("clamp(projected, A(box.lower), A(box.upper))", "projected"),
        Change("const A offset = (x(j) + (grad(j) * step.scale) * step.factor - x0(j))", "const A offset = (x(j) - x0(j))"),
        Change("square_root(lanes.sum(squares));\n  if", "square_root(squares);\n  if"),
        Change("uniform(relative_length) > std::numeric_limits<T>::max()", "false"),
        Change("rescaling_to_length<A>(lanes, offset, count, A(eps))", "rescaling_to_length<A>(lanes, offset, count, A(step_size))"),
        Change("clamp(x0(j) + (offset(j) * back.scale) * back.factor, A(box.lower), A(box.upper))", "x0(j) + (offset(j) * back.scale) * back.factor"),
        Change("rounded_product(A(eps), clamp(noise, A(-1), A(1)))", "A(eps) * clamp(noise, A(-1), A(1))", harmless="mutants are compiled without instructions that multiply and add"),
        Change("l2_projection(x(j) + (grad(j)", "l2_projection(x(j) - (grad(j)"),
        Change("clamp(x(j) + (noise(j) * start.scale) * start.factor, A(box.lower), A(box.upper))", "x(j) + (noise(j) * start.scale) * start.factor"),
        Change("clamp(x(j) + (noise(j)", "clamp(x(j) - (noise(j)"),
    ],
    ("divergence.h", "divergence"): [
        Change("return (z - largest) - log_sum;", "return (z - largest) + log_sum;"),
        Change("largest = lanes.max(largest);\n  A sum(0);", "A sum(0);"),
        Change("sum = lanes.sum(sum);\n  return {largest", "return {largest"),
        Change("(label >= A(0)) & (label < A(classes))", "label < A(classes)"),
        Change("label < A(classes)", "label <= A(classes)"),
        Change("number(j) == label, A(0), A(-INFINITY)", "number(j) == label, A(0), A(-1)"),
        Change("select(none, A(0), p * ratio)", "p * ratio"),
        Change("select(none, A(0), ratio + A(1))", "ratio + A(1)"),
        Change("select(none, A(0), ratio + A(1))", "select(none, A(0), ratio)"),
        Change("return {weighted, -p, select", "return {weighted, p, select"),
        Change("-1. / 120, ", "1. / 120, "),
        Change("0.5 : 0.0625", "0.0 : 0.0"),
        Change("0.5 : 0.0625", "4.0 : 2.0"),
        Change("weighted + (q - p)", "weighted"),
        Change("twice = difference + difference", "twice = difference"),
        Change("twice * q, through_softmax", "twice * p, through_softmax"),
        Change("-twice * p : select(p == A(0), A(0), -twice)", "-twice * p : -twice"),
        Change("-direction * p : select(p == A(0), A(0), -direction)", "-direction * p : -direction"),
        Change("-direction * p :", "direction * p :"),
        Change("select(log_p == log_q, A(0), magnitude(log_p - log_q))", "magnitude(log_p - log_q)", harmless="NaN where both are -inf, but there no logarithm is used"),
        Change("-e / (A(2) + e)", "-e / (A(2) - e)"),
        Change("smaller = larger - d", "smaller = larger + d"),
        Change("p_is_larger = log_p > log_q", "p_is_larger = log_p >= log_q", harmless="if they are the same, so are both logarithms: 0"),
        Change("select(p == A(0), A(0), p * log_p_m)", "p * log_p_m"),
        Change("select(q == A(0), A(0), q * log_q_m)", "q * log_q_m"),
        Change("1. / 28, ", "1. / 27, "),
        Change("0.25 : 0.1", "0.0 : 0.0"),
        Change("0.25 : 0.1", "0.9 : 0.9"),
        Change("half * (through_softmax ? p_part", "(through_softmax ? p_part"),
        Change("kind == Kind::l2 || kind == Kind::js_distance", "kind == Kind::l2"),
        Change("select(root == A(0), A(0), A(scalar_of<A>(0.5)) / root)", "A(scalar_of<A>(0.5)) / root"),
        Change("return {sum * sum, sum + sum};", "return {sum * sum, sum};"),
        Change("select(d.value <= A(clip), A(0), d.value - A(clip))", "d.value - A(clip)"),
        Change("select(d.value <= A(clip), A(0)", "select(d.value < A(clip), A(0)", harmless="D - clip is 0 as well"),
        Change("stopped = d.value <= A(", "stopped = d.value < A("),
        Change("A(clip > T(0) ? clip : T(-INFINITY))", "A(clip)"),
        Change("select(d.value == d.value, select(stopped, A(0), d.slope), d.value)", "select(stopped, A(0), d.slope)"),
        Change("farther = terms.value > farthest", "farther = terms.value >= farthest"),
        Change("distance = lanes.max(farthest)", "distance = farthest"),
        Change("sum = select(sum == sum, distance, sum);", "sum = distance;"),
        Change("-lanes.max(select(farthest == distance, -farthest_class, A(-INFINITY)))", "lanes.max(select(farthest == distance, farthest_class, A(-INFINITY)))"),
        Change("(farthest == distance) & (farthest_class == nearest_number)", "farthest == distance"),
        Change("if (kind == Kind::kl && !Target::checked) sum_by_log_q = A(-1);", ""),
        Change("mass = lanes.sum(mass);", ""),
        Change("lowest = -lanes.max(-lowest);", ""),
        Change("(lowest < A(0)) | (magnitude(mass - A(1)) > A(tolerance))", "magnitude(mass - A(1)) > A(tolerance)"),
        Change("magnitude(mass - A(1)) > A(tolerance)", "mass - A(1) > A(tolerance)"),
        Change("valid = !((lowest < A(0)) | (magnitude(mass - A(1)) > A(tolerance)));", "valid = (lowest >= A(0)) & (magnitude(mass - A(1)) <= A(tolerance));"),
        Change("terms.by_log_q - q * sum_by_log_q", "terms.by_log_q - q"),
        Change("terms.by_target - p * sum_by_log_p", "terms.by_target"),
        Change("if (!through_softmax && want_target_gradient) terms.by_target = target_gradient.get(j);", "", harmless="what was kept is what is computed again; it saves logarithms"),
        Change("log_softmax.log_sum - (label_logit - log_softmax.largest)", "log_softmax.log_sum - label_logit"),
        Change("(q - target.probability(j))", "q"),
        Change("select(valid, loss, A(NAN))", "loss", harmless="on the CPU the row is an error; on a GPU tests/ops/test_divergence.py wants NaN"),
    ],
    ("score_step.h", "score_step"): [
        Change("for (int64_t y = 0; y < classes", "for (int64_t y = 1; y < classes"),
        Change("y < classes; ++y", "y < classes - 1; ++y"),
        Change("const A w = weight(y);", "const A w = weight(0);"),
        Change("w * score(y, k)", "w * score(y, 0)"),
        Change("move(at) * (score0(at) + score1(at))", "move(at) * (score0(at) + score0(at))"),
        Change("partial[0] += move(j)", "partial[0] = move(j)"),
        Change("move(j) * (score0(j) + score1(j))", "move(j) * (score1(j) + score1(j))"),
        Change("(ways - 1) * width < count", "(ways - 2) * width < count", harmless="on the CPU, a row is 0 beyond its end"),
        Change("(ways - 1) * width < count", "ways * width < count", harmless="the loop below does what is left"),
        Change("j += ways * width", "j += (ways - 1) * width"),
        Change("(partial[2] + partial[3])", "partial[2]"),
        Change("A(scalar_of<A>(0.5)) * lanes.sum(total)", "lanes.sum(total)"),
        Change("lanes.sum(total)", "total"),
    ],
    ("apgd_step.h", "apgd_step"): [
        Change("rounded_product(z - start, A(options.momentum))", "rounded_product(z - start, A(options.inertia))"),
        Change("rounded_product(start - x_prev", "rounded_product(x_prev - start"),
        Change("return linf_projection(moved, x0, options.eps, options.box);", "return moved;"),
        Change("const A z = linf_step(start, grad, x0, step_size, options.eps, options.box);", "const A z = start + A(step_size) * sign(grad);"),
        Change("(stepped(j) - x0(j)) * inverse_eps", "(start(j) - x0(j)) * inverse_eps"),
        Change("squares = A(0);  // of", "// of"),
        Change("z = l2_projection(stepped(j), x0(j), length, options.box)", "z = stepped(j)"),
        Change("(z - from) * A(options.momentum)", "(z - from) * A(options.inertia)"),
        Change("(from - previous(j)) * A(options.inertia)", "(z - previous(j)) * A(options.inertia)"),
        Change("offset = (moved - x0(j)) * inverse_eps", "offset = moved - x0(j)"),
        Change("x_prev.put(j, from)", "x_prev.put(j, z)"),
        Change("l2_projection(x.get(j), x0(j), moved_length, options.box)", "x.get(j)"),
        Change("x0(j), moved_length, options.box", "x0(j), length, options.box"),
        Change("square_root(lanes.sum(squares));\n  squares", "square_root(squares);\n  squares"),
    ],
    ("fab_step.h", "fab_step"): [
        Change("if constexpr (norm == Norm::linf) return A(1);\n", ""),
        Change("direction > A(0), A(box.upper) - p", "direction < A(0), A(box.upper) - p"),
        Change("return select(room > A(0), room, A(0));", "return room;"),
        Change("select(reach < room, reach, room)", "reach"),
        Change("select(reach < room, reach, room)", "select(reach > room, room, reach)"),
        Change("weight >= A(move.all), room", "weight > A(move.all), room"),
        Change("weight >= A(move.some), A(move.share)", "weight > A(move.some), A(move.share)"),
        Change("if (!(initial_slope > T(0))) return T(0);", "", harmless="a normal of 0 moves nothing, whatever the time is"),
        Change("step < 100", "step < 2"),
        Change(">= room;", "> room;", harmless="where time * rate is the room, both pieces have the same value"),
        Change("slope += select(at_box, A(0), weight * rate)", "slope += weight * rate"),
        Change("return T(INFINITY);", "return time;", harmless="at this time, too, all elements are at the box"),
        Change("if (!(next > time)) return time;", "", harmless="further steps stay where they are, up to rounding"),
        Change("if (!(gain > distance)) return {towards, T(0), T(0), T(0)};", ""),
        Change("* T(2);  // above all", ";"),
        Change("number_low - number_high > T(1)", "number_low - number_high > T(2)"),
        Change("if (!(middle > low && middle < high)) break;", ""),
        Change("if (gain > distance) {", "if (gain < distance) {"),
        Change("(distance - gain_high) / (gain_low - gain_high)", "distance / gain_low"),
        Change("towards = -sign(difference)", "towards = sign(difference)"),
        Change("kShortestMove = 1e-8", "kShortestMove = 1e-2"),
        Change("a = a > shortest ? a : shortest;", ""),
        Change("a0 = a0 > shortest ? a0 : shortest;", ""),
        Change("return normal(j) * scale;", "return normal(j);"),
        Change("difference * uniform(scale)", "difference"),
        Change("magnitude(difference) > largest ? scaled : clamp(scaled, -largest, largest)", "scaled"),
        Change("magnitude(difference) > largest ? scaled : clamp", "clamp"),
        Change("(x0(j) - x(j))", "(x(j) - x0(j))"),
        Change("length += magnitude(by);", "length += by;"),
        Change("select(magnitude(by) > length, magnitude(by), length)", "magnitude(by)"),
        Change("length0 += by0 * by0;", "length0 += by * by;"),
        Change("a0 = square_root(uniform(lanes.sum(length0)));", "a0 = uniform(lanes.sum(length0));"),
        Change("ratio = a / (a + a0)", "ratio = a0 / (a + a0)"),
        Change("ratio < options.alpha_max ? ratio : options.alpha_max", "ratio"),
        Change("A(options.overshoot) * moved_by<norm>(x0(j)", "moved_by<norm>(x0(j)"),
        Change("clamp(p * A(T(1) - alpha) + p0 * A(alpha), A(box.lower), A(box.upper))", "(p * A(T(1) - alpha) + p0 * A(alpha))"),
        Change(" + A(poison));", ");"),
        Change("const T check = slope + there", "const T check = there", harmless="what makes the slope NaN makes the other NaN, too"),
    ],
    ("square.h", "square"): [
        Change("channel * image.channel_stride + row", "channel + row"),
        Change("image.rows - side_", "image.columns - side_"),
        Change("v < 0 ? 0 : v > last ? last : v", "v < 0 ? 0 : v"),
        Change("r < row + side &&", "r <= row + side &&"),
        Change("column <= c &&", "column < c &&"),
        Change("if (column >= columns_) {", "if (column > columns_) {"),
        Change("lanes.width() / columns)", "lanes.width() % columns)"),
        Change("return select(v < A(0), A(0), v);", "return select(v > A(0), v, A(0));"),
        Change("kSquareFloor = 1e-12", "kSquareFloor = 1e-3"),
        Change("if (!gains.holds(row, column))", "if (true)"),
        Change("own + lanes.sum(other)", "own"),
        Change("bump(at.row, at.column) + delta", "bump(at.column, at.row) + delta"),
        Change("loses.row + at.row", "gains.row + at.row"),
        Change("square_root(spare + lost)", "square_root(lost)"),
        Change("squares * factor * factor", "squares * factor"),
        Change("(bump + delta * channel.inverse)", "(bump - delta * channel.inverse)"),
        Change("square_root(positive_part(outside) + inside)", "square_root(outside + inside)"),
    ],
    ("l1_step.h", "l1_step"): [
        Change("select(change > A(0), A(box.upper), A(box.lower))", "select(change < A(0), A(box.upper), A(box.lower))"),
        Change("return select(room > A(0), room, A(0));", "return room;"),
        Change("if (!(positive > wanted)) return smallest;", "", harmless="the bisection ends there, later"),
        Change("largest < finite ? largest : finite", "largest"),
        Change("if (at_least(few) >= wanted) return few;", "", harmless="the bisection ends just below the largest, with the same elements"),
        Change("if (number == wanted) return middle;", ""),
        Change("step < 20 ?", "step < 0 ?", harmless="halves in bits find the same, later where the gradients are usual"),
        Change("a += (b - a) / 2;", ""),
        Change("select(m > A(0), m, A(-1)) >= A(bound)", "m > A(bound)"),
        Change("select(m > A(0), m, A(-1)) >= A(bound)", "m >= A(bound)"),
        Change("(number > wanted ? enough : few) = middle", "(number > wanted ? few : enough) = middle"),
        Change("if (!(middle > enough && middle < few)) return enough;", ""),
        Change("left > A(0), select(at_box, room, left)", "left > A(0), left"),
        Change("select(at_box, A(0), A(1)), A(0))", "A(1), A(0))"),
        Change("if (!(sum > eps)) return T(0);", "", harmless="the search ends next to 0, later, and rounding hides the rest"),
        Change("t + (sum - eps) / slope", "t - (sum - eps) / slope", harmless="Newton's steps leave the bracket, and bisection does it"),
        Change("magnitude(next - t) <= rounding * t", "magnitude(next - t) <= t"),
        Change("step < 200", "step < 3"),
        Change("(sum > eps ? low : high) = t", "(sum > eps ? high : low) = t"),
        Change("smallest = magnitude_of_largest<A>(lanes, grad, count, moving);", "smallest = magnitude_of_largest<A>(lanes, grad, count, moving + T(1));"),
        Change("unit = step_size / moves", "unit = step_size / moving"),
        Change("if (moves > T(0)) unit", "unit", harmless="where no element moves, the infinite unit is not used"),
        Change("A(unit) * sign(g)", "A(unit) * g"),
        Change("clamp(stepped(j) - sign(moved) * A(shorter), A(box.lower), A(box.upper))", "stepped(j) - sign(moved) * A(shorter)"),
        Change("stepped(j) - sign(moved)", "x(j) - sign(moved)"),
        Change("select(kept > A(0), inside, x0(j))", "inside"),
        Change("select(kept > A(0), inside, x0(j))", "select(kept >= A(0), inside, x0(j))", harmless="x0 + 0 is x0, up to rounding"),
        Change(" + A(poison));", ");"),
        Change("kept >= l1_room(moved, x0(j), box)", "kept > l1_room(moved, x0(j), box)", harmless="where they are the same, both are the bound, up to rounding"),
    ],
    ("philox.h", "keyed_uniform"): [
        Change("round < 10", "round < 9"),
        Change("0xCD9E8D57u", "0xCD9E8D59u"),
        Change("key0 += 0x9E3779B9u", "key0 += 0x9E3779B1u"),
        Change("(product1 >> 32) ^ words[1][i] ^ key0", "(product1 >> 32) ^ words[1][i] ^ key1"),
        Change("(product0 >> 32) ^ words[3][i] ^ key1", "(product1 >> 32) ^ words[3][i] ^ key1"),
        Change("key1 = static_cast<uint32_t>(key >> 32)", "key1 = static_cast<uint32_t>(key >> 31)"),
        Change("word >> 8", "word >> 9"),
        Change("static_cast<int32_t>(word >> 8)", "static_cast<int32_t>(word) / 256"),
    ],
    ("lanes.h", "square"): [
        Change("width() const { return 1; }", "width() const { return 2; }"),
    ],
    ("cpu/job_bodies.h", "threat_model"): [
        Change("for (; i + P::size <= end; i += P::size)\n    linf_step(", "for (; i + P::size < end; i += P::size)\n    linf_step(", harmless="the loop below does what is left"),
        Change("for (; i < end; ++i) job.out[i] = linf_step(", "for (; i < end - 1; ++i) job.out[i] = linf_step("),
        Change("job.eps * clamp(job.radius[n], T(0), T(1))", "job.eps * clamp(job.radius[0], T(0), T(1))"),
        Change("clamp(job.radius[n], T(0), T(1))", "job.radius[n]"),
        Change("job.radius == nullptr ? job.eps :", "job.radius == nullptr ? 2 * job.eps :"),
    ],
    ("cpu/job_bodies.h", "apgd_step"): [
        Change("std::memcpy(job.best_grad + at, job.grad + at", "std::memcpy(job.best_grad + at, x"),
        Change("job.restart[n] ? job.best_x + at : x", "job.improved[n] ? job.best_x + at : x"),
        Change("job.restart[n] ? job.best_grad : job.grad", "job.grad"),
        Change("const T rest = clamp(T(0), job.options.box.lower, job.options.box.upper);", "const T rest = 0;"),
        Change("for (; j < count; ++j) {\n      const T from", "for (; j < count - 1; ++j) {\n      const T from"),
        Change("x_prev[j] = from;", "x_prev[j] = next;"),
    ],
    ("cpu/job_bodies.h", "l1_step"): [
        Change("job.step_size[n],\n                   T(job.moving[n])", "job.step_size[0],\n                   T(job.moving[n])"),
        Change("T(job.moving[n])", "T(job.moving[0])"),
    ],
    ("cpu/job_bodies.h", "fab_step"): [
        Change("job.difference[n]", "job.difference[0]"),
        Change("row_of<P>(job.normal + at, count)", "row_of<P>(job.normal + at, count, 1)"),
    ],
    ("cpu/job_bodies.h", "square"): [
        Change("const Window window(job.corner + 2 * n", "const Window window(job.corner + n"),
        Change("sign(job.sign[n * image.channels + c]) * (2 * job.eps)", "sign(job.sign[n * image.channels + c]) * job.eps"),
        Change("row < window.row + job.side; ++row", "row < window.row + job.side - 1; ++row"),
        Change("k < job.side; ++k", "k < job.side - 1; ++k"),
        Change("positive_part(job.eps * job.eps - total)", "(job.eps * job.eps - total)"),
        Change("- total) / T(image.channels)", "- total)"),
        Change("job.transpose[n] ? 1 : side, along", "job.transpose[0] ? 1 : side, along"),
        Change("x0[j] + T(0) * stretch", "x0[j]"),
        Change("left = left - move.lost;", ""),
        Change("gained = gained + move.gained;", "gained = move.gained;"),
    ],
    ("cpu/job_bodies.h", "keyed_uniform"): [
        Change("static_cast<uint32_t>(job.stream >> 32)", "static_cast<uint32_t>(job.stream)"),
        Change("static_cast<uint32_t>(job.samples[n])", "static_cast<uint16_t>(job.samples[n])"),
        Change("row[4 * (block + i) + k] = unit_interval<T>(words[k][i])", "row[4 * (block + i) + k] = unit_interval<T>(words[3 - k][i])"),
        Change("job.count - 4 * block < 4 ? job.count - 4 * block : 4", "job.count - 4 * block < 4 ? job.count - 4 * block : 3"),
        Change("n = begin / job.blocks, block = begin % job.blocks", "n = begin / job.blocks, block = 0"),
    ],
    ("cpu/job_bodies.h", "divergence"): [
        Change("if (0 <= y && y < classes) label_logit.v[i] = logits.values[y * P::size + i];", "label_logit.v[i] = logits.values[i];"),
        Change("*job.refused = first + i;", "*job.refused = first;"),
        Change("form == TargetForm::logits ? T(-INFINITY) : T(0)", "T(0)"),
        Change("row_of<P>(job.logits + at, classes, T(-INFINITY))", "row_of<P>(job.logits + at, classes, T(0))"),
        Change("constexpr int64_t kMostClassesAcrossRows = 32", "constexpr int64_t kMostClassesAcrossRows = 16", harmless="rows of 17 to 32 classes are done in the other way, with the same result"),
        Change("values[j * P::size + i] = row[j];", "values[j * P::size + i] = row[0];"),
    ],
    ("cpu/job_bodies.h", "score_step"): [
        Change("(i % job.blocks) * kScoreBlock", "(i % job.blocks) * (kScoreBlock - 1)"),
        Change("for (; f < last; ++f) {", "for (; f < last - 1; ++f) {"),
        Change("start(j) + row.get(j)", "start(j) - row.get(j)"),
        Change("row_of<P>(job.log_p + n * job.classes, job.classes, T(-INFINITY))", "row_of<P>(job.log_p + n * job.classes, job.classes, T(0))"),
        Change("row_of<P>(job.scores1 + row * count, count)", "row_of<P>(job.scores0 + row * count, count)"),
    ],
    ("cpu/pack.h", "divergence"): [
        Change("exp_underflow = -87.3f", "exp_underflow = -60.f"),
        Change("exp_underflow = -708.", "exp_underflow = -400."),
        Change("denormal_exponent = 24", "denormal_exponent = 23"),
        Change("denormal_exponent = 54", "denormal_exponent = 53"),
        Change("1.9875691500e-4}", "1.9875691500e-3}"),
        Change("1. / 9, 1. / 11};", "1. / 9, 1. / 19};", harmless="the difference is below the rounding of float32"),
        Change("0.41421356237309504880", "0.9"),
        Change("x == P(T(0)), P(T(-INFINITY))", "x == P(T(0)), P(T(-100))", harmless="a class of p = 0 counts as 0, and in JS e^-100 is 0 to rounding"),
        Change("P(T(0)), above);\n  return select(x == x, both, x);", "P(T(0)), above);\n  return both;", harmless="a NaN passes through the polynomial, too"),
        Change("r.v[i] += static_cast<T>(i)", "r.v[i] += static_cast<T>(i + 1)"),
        Change("for (int i = 0; i < Pack<T, bytes>::size; ++i) r.v[i] = std::sqrt(x.v[i])", "for (int i = 0; i < Pack<T, bytes>::size; ++i) r.v[i] = std::sqrt(x.v[0])"),
    ],
    ("cpu/pack.h", "threat_model"): [
        Change("int half = P::size / 2; half", "int half = P::size / 4; half"),
        Change("y > x ? y : x", "y < x ? y : x"),
        Change("P::load_first(data + j, count - j, rest)", "P::load_first(data + j, count - j - 1, rest)"),
        Change("value.store_first(data + j, count - j)", "value.store_first(data + j, count - j - 1)"),
    ],
    ("cpu/parallel.h", "threat_model"): [
        Change("return run_items(job, 0, items);", "return run_items(job, 0, items - 1);"),
        Change("run_items(job, begin, end); }", "run_items(job, begin + 1, end); }"),
    ],
}
# fmt: on


@dataclass(frozen=True)
class Mutant:
    changed: str  # a file of csrc
    operator: str  # csrc/cpu/OPERATOR.cpp is compiled
    old: str
    new: str
    harmless: str = ""

    def __str__(self) -> str:
        return f"{self.changed} ({self.operator}): {self.old!r} becomes {self.new!r}"


@dataclass(frozen=True)
class Result:
    changed: str
    operator: str
    old: str
    new: str
    outcome: str  # killed, died (it crashed or hung) or survived
    by: str  # the test that failed
    evidence: str  # digest of the sources and the tests that this rests on


def mutants() -> Iterator[Mutant]:
    for (changed, operator), changes in MUTANTS.items():
        for change in changes:
            yield Mutant(changed, operator, change.old, change.new, change.harmless)


def digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@functools.cache
def up_to(test: str) -> str:
    """The file of a test up to its end, where its helpers are: what is added below changes nothing. A whole file as it is."""
    path, _, name = test.partition("::")
    text, name = (ROOT / path).read_text(), name.partition("[")[0]
    ends = [node.end_lineno for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name]
    return "\n".join(text.splitlines()[: ends[0] if ends else None])


def tests_of(operator: str) -> list[str]:
    return [f"tests/ops/test_{operator}.py", SOAK]


def evidence_of(changed: str, operator: str, by: str) -> str:
    """Digest of the sources and of the test that killed a mutant, or of all tests: new ones may kill it."""
    sources = [(CSRC / file).read_text() for file in (changed, f"cpu/{operator}.cpp")]
    return digest([*sources, *map(up_to, [by] if by else tests_of(operator))])


def try_sources(operator: str, mutant: Mutant | None = None) -> tuple[str, str]:
    """The outcome, and the test that failed, of csrc with the change of `mutant`."""
    drawn = " or ".join(f"{name}]" if name != "fab_steps" else name for name in DRAWN[operator])
    selected = f"({SELECTED}) and (test_{operator}.py or {drawn})"
    with tempfile.TemporaryDirectory() as folder:
        csrc = build.copy_sources(Path(folder), BUILD)
        if mutant:
            substitute(csrc / mutant.changed, mutant.old, mutant.new)
        library = build.compile_sources(csrc, BUILD, [operator])

        def work() -> tuple[int, list[str]]:
            os.environ |= build.variables(library, BUILD)
            selection = Selection()
            return run_tests(selection, tests_of(operator), "-x", "-k", selected), selection.failed

        answer = in_a_process(work, SECONDS)
    if answer is None:
        return "died", ""
    if "error" in answer or answer[0] not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests of {operator} could not be run: {answer}")
    return ("killed", answer[1][0]) if answer[1] else ("survived", "")


def try_mutant(mutant: Mutant) -> Result:
    try:
        outcome, by = try_sources(mutant.operator, mutant)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"error: {mutant}\n{error}") from error
    evidence = evidence_of(mutant.changed, mutant.operator, by)
    return Result(mutant.changed, mutant.operator, mutant.old, mutant.new, outcome, by, evidence)


def stored() -> dict[Mutant, Result]:
    """Results that still count, each for its mutant, whether that is harmless or not."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    results = [Result(**json.loads(line)) for line in lines]
    return {
        Mutant(r.changed, r.operator, r.old, r.new): r
        for r in results
        if r.evidence == evidence_of(r.changed, r.operator, r.by)
    }


def places(mutant: Mutant) -> int:
    """How often the text that a mutant changes is in its file."""
    return (CSRC / mutant.changed).read_text().count(mutant.old)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=build.OPERATORS, help="mutants that are compiled with this operator")
    options = parser.parse_args()
    if build.runtime_libraries(BUILD) is None:
        sys.exit("g++ is needed")
    os.chdir(ROOT)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)

    chosen = [mutant for mutant in mutants() if options.only in (None, mutant.operator)]
    for mutant in chosen:  # before hours go by
        if (count := places(mutant)) != 1:
            sys.exit(f"error: {mutant}\nthe text is there {count} times, expected once")
    known = stored()
    keys = {mutant: Mutant(mutant.changed, mutant.operator, mutant.old, mutant.new) for mutant in chosen}
    left = [mutant for mutant in chosen if keys[mutant] not in known]
    for operator in tqdm(sorted({mutant.operator for mutant in left}), desc="without mutants", unit="operator"):
        outcome, by = try_sources(operator)
        if outcome != "survived":
            sys.exit(
                f"error: the tests of {operator} must pass before mutants are made; {outcome} by {by or 'a signal'}"
            )
    for mutant in tqdm(left, unit="mutant"):
        result = known[keys[mutant]] = try_mutant(mutant)
        with RESULTS.open("a") as file:
            file.write(json.dumps(asdict(result)) + "\n")
    report({mutant: known[keys[mutant]] for mutant in chosen})


def report(results: dict[Mutant, Result]) -> None:
    total, killed = collections.Counter[str](), collections.Counter[str]()
    for mutant, result in results.items():
        total[mutant.changed] += 1
        killed[mutant.changed] += result.outcome != "survived"
    survivors = [mutant for mutant, result in results.items() if result.outcome == "survived"]
    print()
    for mutant in survivors:
        print(f"survives, {'harmless: ' + mutant.harmless if mutant.harmless else 'NOT EXPLAINED'}\n    {mutant}")
    for mutant, result in results.items():
        if mutant.harmless and result.outcome != "survived":
            print(f"said to be harmless, but {result.outcome} by {result.by or 'a signal'}\n    {mutant}")
    print()
    for changed in total:
        print(f"{changed:20} {killed[changed]:4} of {total[changed]:4} killed")
    harmless = sum(bool(mutant.harmless) for mutant in survivors)
    print(
        f"{sum(killed.values())} of {len(results)} killed, {harmless} survivors explained, {len(survivors) - harmless} not"
    )


if __name__ == "__main__":
    main()
