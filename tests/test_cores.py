"""The number of cores, on systems that restrict a process to some of them and on those that do not."""

import json
import os

import jax

from empssl_jax.run_folder.step_files import TIMING_FILE, TimingFile
from empssl_jax.runtime.cores import usable_cores


def test_only_the_cores_of_this_process_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 4, 6}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert usable_cores() == 3


def test_all_cores_count_on_systems_without_affinity(monkeypatch, tmp_path):
    """As on macOS. The devices of a run are recorded in the first step."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert usable_cores() == 5
    file = TimingFile(tmp_path, 0)
    file.add(0)
    file.close()
    assert json.loads((tmp_path / TIMING_FILE).read_text())["devices"] == "5 CPU cores"
