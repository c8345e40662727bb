"""Goldens and invariants of the fused lowering at the instruction set levels that this process does not use.

A process chooses its level once, so each level gets a pytest of its own. The level in use is what all other tests
run on.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from golden_cases import without_library

from chatglm_ov.native import native, unavailable

TESTS = Path(__file__).parent
FILES = ("test_runtime.py", "test_lowering_fused.py", "test_kv_cache.py")
CHOSEN = "(fused or kv_cache) and not v1_28l"
"""The deep set is of sizes that a tiny one has as well."""
LEVELS = native().ISA_LEVELS if unavailable() is None else ("avx2", "avx_vnni", "avx512", "avx512_bf16", "amx")
EMULATED = "amx_emulated"
"""AMX's kernels on tiles in plain C++: where there is AVX-512 BF16, and no AMX."""


def present() -> list[str]:
    levels = native().present_isa_levels()
    return [*levels, EMULATED] if "avx512_bf16" in levels and "amx" not in levels else levels


pytestmark = without_library


@pytest.mark.parametrize("level", [*LEVELS, EMULATED])
def test_fused_lowering_at(level: str):
    if level not in present():
        pytest.skip(f"this machine lacks {level}")
    if level == native().isa():
        pytest.skip(f"{level} is in use: the other tests run on it")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", CHOSEN, *FILES]
    environment = {**os.environ, "CHATGLM_OV_ISA": level, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout[-5000:]


def test_a_trial_of_an_instruction_that_is_not_there_is_no_crash():
    assert native().survives_illegal_instruction() is False
    assert native().survives_illegal_instruction() is False
