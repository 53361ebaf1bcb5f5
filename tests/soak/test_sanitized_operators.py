"""Every operator on random inputs, under each sanitizer, on every instruction set of this processor; in a soak only."""

import pytest

from scorematch import _C
from tests.ops.processes import end_of, run_pytest
from tests.ops.sanitized import build

from .drawing import SOAKING

pytestmark = pytest.mark.soak
WIDEST = list(build.INSTRUCTION_SETS).index(_C.instruction_set)


@pytest.mark.skipif(not SOAKING, reason="takes hours; tests/ops/test_sanitizers.py is the short form")
@pytest.mark.parametrize("instruction_set", list(build.INSTRUCTION_SETS)[: WIDEST + 1])
@pytest.mark.parametrize("sanitizer", build.SANITIZERS)
def test_sanitized_operators(sanitizer, instruction_set, tmp_path):
    if build.runtime_libraries(sanitizer) is None:
        pytest.skip(f"needs g++ with {build.SANITIZERS[sanitizer].library}")
    library = build.build(tmp_path, sanitizer, instruction_set)
    done = {"SCOREMATCH_SOAK": "1", "SCOREMATCH_SOAK_DONE": f"build/soak-done-{sanitizer}-{instruction_set}.txt"}
    variables = {**build.variables(library, sanitizer), **done}
    result = run_pytest(["tests/soak/test_operators.py"], variables, timeout=None)
    assert result.returncode == 0, end_of(result)
