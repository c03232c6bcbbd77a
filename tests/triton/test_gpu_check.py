"""The script for GPU machines, on tiny shapes and without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_kind_of_row_is_written(tmp_path):
    out = tmp_path / "rows.jsonl"
    only = "selection, topk|attention, causal|variance, video|dry causal"
    command = ["sh", str(ROOT / "benchmarks" / "gpu_check.sh"), "--dry", "--only", only, "--out", str(out)]
    environment = os.environ | {"PYTHON": sys.executable}
    for _ in range(2):  # the second finds everything done, and adds nothing
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("0 rows")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    checks = {row["name"] for row in rows if row["kind"] == "check" and row["ok"]}
    assert checks == {"public call, variance, video", "attention, causal, grouped", "selection, topk"}
    timed = {row["what"]: row for row in rows if row["kind"] == "time"}
    for what in ("dense math", "attend", "pool", "select", "whole call", "attend, binary", "attend, one mean"):
        assert timed[what]["ms"] > 0, timed[what]
    assert 0 < timed["whole call"]["density"] <= 1 and timed["whole call"]["of_ideal"] > 0
    assert timed["select"]["share"] > 0 and timed["attend"]["gpu"] == "interpreter"
