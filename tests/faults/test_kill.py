"""A run that is killed at random moments and started again is bit-identical to an uninterrupted one.

`python -m tests.stress.faults` is the long form.
"""

import pytest

from tests.stress import faults
from tests.test_end_to_end import DIGITS


@pytest.mark.long
def test_five_kills_lose_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    report = faults.run(5, 0, [*DIGITS, "--max-epochs", "4"], tmp_path)
    print(report.markdown())
    assert report.mismatches == []
    assert sum(report.kills.values()) + report.terminations >= 4
    assert report.runs >= 1
