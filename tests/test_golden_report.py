"""tools/golden_report.py: its figures are those of the goldens."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_cases import V1, V2, each_ops


@each_ops
def test_report_of_the_small_sets(
    ops: str,
    tmp_path: Path,
    import_tool: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    golden_report = import_tool("golden_report")
    monkeypatch.setattr(golden_report, "GOLDENS", [V1, V2])
    chosen = ["--formats", "f32", "int8", "--ops", ops, "--precisions", "f32"]
    options = [*chosen, "--json", str(tmp_path / "report.json")]
    monkeypatch.setattr(sys, "argv", ["golden_report.py", *options])
    golden_report.main()
    rows = json.loads((tmp_path / "report.json").read_text())
    assert [(row["set"], row["weights"]) for row in rows] == [
        ("v1_tiny", "f32"), ("v1_tiny", "int8"), ("v2_tiny", "f32"), ("v2_tiny", "int8")
    ]  # fmt: skip
    assert {row["ops"] for row in rows} == {ops}
    for row in rows:
        golden = {"v1_tiny": V1, "v2_tiny": V2}[row["set"]]
        steps = sum(np.prod(golden[key].shape[:2]) for key in golden.arrays.files if key.endswith("_dec_logits"))
        # p5 is the one prompt that a small set holds in full; its last column is the first decode step.
        assert row["positions"] == steps + 4
        exact = row["weights"] == "f32"
        assert (row["max error"] < 1e-3) == exact
        assert row["mean error"] < row["max error"]
        assert row["same top-1"] == 1 if exact else row["same top-1"] > 0.5
    assert capsys.readouterr().out.count("int8") == 2
