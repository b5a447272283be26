"""A step's peak memory: weights, one copy, one gradient; measured as resident memory of a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step_memory.py"


@pytest.mark.slow
def test_a_step_holds_one_copy_and_one_gradient():
    peaks = {}
    for who in ("plain", "flatmin"):
        done = subprocess.run([sys.executable, str(SCRIPT), "--who", who, "--millions", "36"], capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peaks[who] = float(done.stdout)
    assert abs(peaks["plain"] - 1) < 0.15
    assert 1.8 < peaks["flatmin"] < 2.1  # over five steps; 2.05 at 36 million
