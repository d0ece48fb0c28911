"""Memory that stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_mm.allocation import keep_freed_memory

FAULTS = """
import resource, sys
import numpy as np
from recbole_mm.allocation import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for step in range(6):
    if step == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = np.empty(48 << 20, dtype=np.uint8)
    large.fill(1)
    del large
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that gives memory back")
def test_a_large_buffer_is_not_paged_in_again_and_again():
    root = Path(__file__).resolve().parents[1]
    faults = {
        mode: int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], cwd=root, check=True, capture_output=True).stdout
        )
        for mode in ("keep", "stock")
    }
    assert faults["keep"] < 20 < faults["stock"]


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
