"""The demo model scores as golden.json says on every CPU, and on one to the bit, whatever the threads."""
import json

import numpy as np
import pytest

import fastprior as fp
import golden

# Relative to the larger of 1 (a standard deviation) and the value. Vectors of 8 and of 16 lanes sum in
# different orders: 4e-7 was seen. NumPy sums in the order of its BLAS.
TOLERANCE = {"numba": 1e-5, "numpy": 1e-4}


@pytest.fixture(scope="module")
def kept():
    kept = json.loads(golden.FILE.read_text())
    assert kept["digest"] == golden.digest(), "another demo model or images: run python tests/golden.py"
    return kept["scores"]


def values(found):
    return np.array([[float.fromhex(value) for value in found[name]] for name in sorted(found)])


def check(found, kept, backend):
    assert sorted(found) == sorted(kept)
    got, want = values(found), values(kept)
    error = (np.abs(got - want) / np.maximum(1, np.abs(want))).max()
    assert error < TOLERANCE[backend], f"scores changed by {error:.1e}; if meant: python tests/golden.py"


def test_scores_are_the_kept_ones_whatever_the_threads_and_the_batch(kept, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    found = golden.scores(1, False)
    for threads, batch in ((1, True), (2, False), (2, True)):
        assert golden.scores(threads, batch) == found
    check(found, kept, "numba")


def test_numpy_alone_gives_them_too(kept, monkeypatch):
    monkeypatch.setattr(fp, "_cpu_engines", lambda *_: None)
    check(golden.scores(1, True), kept, "numpy")
