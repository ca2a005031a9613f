"""What a run records of its process is read once."""

from __future__ import annotations

from collections import Counter

import pytest

from melens import provenance
from melens.provenance import ModelFacts, RunInfo, versions


@pytest.fixture
def asked(monkeypatch):
    """Git and package metadata, as at the start of a process; how often each is asked."""
    counts = Counter()
    run, version = provenance.subprocess.run, provenance.metadata.version

    def running(command, **options):
        counts["git"] += 1
        return run(command, **options)

    def reading(name):
        counts[name] += 1
        return version(name)

    monkeypatch.setattr(provenance.subprocess, "run", running)
    monkeypatch.setattr(provenance.metadata, "version", reading)
    provenance.git_commit.cache_clear()
    provenance._versions.cache_clear()
    return counts


def test_git_and_versions_are_read_once_a_process(asked):
    facts = ModelFacts("m", None, None, "float32", "cpu")
    runs = [RunInfo.collect(facts, seed=seed, settings={}) for seed in range(3)]
    assert asked == {"git": 1, **dict.fromkeys(provenance.PACKAGES, 1)}
    assert len({run.git for run in runs}) == 1
    assert runs[0].versions == runs[2].versions


def test_what_one_reader_does_to_the_versions_no_other_sees():
    versions()["torch"] = "none"
    assert versions()["torch"] != "none"
