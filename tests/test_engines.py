"""The engines: one interface, checked fields, memory by threads; a prior that travels between processes."""
import copy
import inspect
import multiprocessing
import os
import pickle
import sys

import numpy as np
import pytest

import fastprior as fp
from damaged_models import tiny_prior
from twins import cpu

METHODS = [name for name, _ in inspect.getmembers(fp.Engine, inspect.isfunction) if not name.startswith("_")]


def parameters(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_an_engine_has_the_methods_of_the_interface(kind):
    engine = fp._engines(kind).Engine
    for name in METHODS:
        assert parameters(getattr(engine, name)) == parameters(getattr(fp.Engine, name)), name
    assert engine.device == kind and len(METHODS) > 12
    assert set(fp.Engine.__annotations__) == {"device", "threads"}


def test_a_frame_calls_nothing_but_the_interface(trained):
    called = set()

    class Recorder:
        def __getattr__(self, name):
            called.add(name)
            # a place is a number here, and a place with its columns two
            one = {"given": (0, 32), "linear": (0, 32), "features": [(0, 32)] * 2}.get(name, 0)
            return lambda *_, **__: one
    for prior in (trained, tiny_prior()):  # without and with coarse places
        for from_pixels in (True, False):
            prior._emit(Recorder(), from_pixels)
    assert called <= set(METHODS)
    assert called == set(METHODS) - {"run", "run_only"}


def test_a_brief_frame_keeps_the_interpreters_lock(pictures, trained, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    prior = trained._with(trained.settings, trained.calibrations, {})  # with an engine of its own
    engine, calls = prior._engine(), []
    free, kept = engine._frame, engine._held
    engine._frame, engine._held = (lambda *a: calls.append("free") or free(*a),
                                   lambda *a: calls.append("held") or kept(*a))

    def run(image, batch=1):
        calls.clear()
        engine.run([image] * batch)
        return calls[0]
    image, turn = pictures[0], sys.getswitchinterval()
    assert run(image) == "free" and 0 < engine._quickest < 60  # nothing is known of it yet
    for seconds, want in ((1.9 * turn, "held"), (2.1 * turn, "free")):
        engine._quickest = seconds
        assert engine._frame_call([image]) is (engine._held if want == "held" else engine._frame)
    engine._quickest = 0
    assert run(image) == "held" and run(image, 2) == "free"
    engine._quickest = 0
    assert run(image) == "free"  # after a batch as after an image of another size
    engine._quickest, engine._all_cores = 0, False  # other threads may score on the other cores
    assert run(image) == "free"
    assert cpu.Engine(1)._all_cores is False and cpu.Engine(2)._all_cores is True


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity of threads")
def test_helpers_keep_off_the_core_of_the_caller(pictures, trained, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    engine = trained._with(trained.settings, trained.calibrations, {})._engine()
    want = engine.run(pictures[:1]).scores[0]
    team, ours = engine._team, os.sched_getaffinity(0)
    for core in ours:  # wherever the caller is
        team.find_core = lambda core=core: core
        assert engine.run(pictures[:1]).scores[0] == want
        assert len(team.helpers) == 2
        for helper in team.helpers:
            assert os.sched_getaffinity(helper.native_id) == (ours - {core} or ours)
    assert os.sched_getaffinity(0) == ours

    def refuse(*_):
        raise PermissionError
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    team.find_core = lambda: -2
    assert engine.run(pictures[:1]).scores[0] == want and team.find_core is None


def test_emit_refuses_missing_and_unknown_fields_and_what_is_no_integer():
    fields = {"x": 0, "n": 4, "d": 8, "gain": 0, "bias": 0, "out": 64}
    engine = cpu.Engine(1)
    engine.emit(cpu._layer_norm, **fields)
    for name in fields:
        with pytest.raises(TypeError, match=rf"_layer_norm: missing or unknown fields \['{name}'\]"):
            engine.emit(cpu._layer_norm, **{k: v for k, v in fields.items() if k != name})
        for value in (1.5, None, np.zeros(3)):
            with pytest.raises(TypeError):
                engine.emit(cpu._layer_norm, **fields | {name: value})
    for name in ("gian", "scratch", "operation"):
        with pytest.raises(TypeError, match=name):
            engine.emit(cpu._layer_norm, **fields, **{name: 16})
    with pytest.raises(TypeError, match="scratch"):  # a kernel that needs some
        engine.emit(cpu._fine_density, x=0, n=4, c=32, mean=0, w=0, m=32, f=0)
    assert len(engine._rows) == 1


def test_rows_have_room_for_all_fields_and_the_operation_first():
    operations = [k.fields for k in cpu._KERNELS if k.fields is not None and k.fields is not cpu._JOB]
    assert len(operations) > 10 and {fields.names[0] for fields in operations} == {"operation"}
    for fields in (cpu._IMAGE, *operations):
        assert fields.itemsize <= cpu._ROW_BYTES
        assert {fields[name] for name in fields.names} == {np.dtype(np.int64)}


def test_memory_grows_with_the_threads_and_no_faster(trained, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "64")
    shapes = {}
    for threads in (1, 2, 64):
        engine = cpu.Engine(threads)
        trained._emit(engine, True)
        shapes[threads] = engine._memory.shape
    assert [n for n, _ in shapes.values()] == [1, 2, 64]
    assert len({floats for _, floats in shapes.values()}) == 1


def test_only_some_stages_run_again(trained, pictures):
    want = trained.score(pictures[0])
    engine = trained._engine()
    assert {stage for stage, _, _ in engine._rows} == set(fp.STAGES)
    states = engine.prepare(1)
    before = states.copy()
    engine.run_only(["map"], pictures[:1])
    np.testing.assert_array_equal(states, before)
    states[...] = np.nan
    engine.run_only(["resize", "features"], pictures[:1])
    assert np.isfinite(states).any() and np.isnan(states).any()
    states[...] = 0  # as a frame finds them when they are new
    assert trained.score(pictures[0]).score == want.score


# -- a prior travels -----------------------------------------------------------------------------

def assert_same(a, b):
    assert (a.score, a.p_value, a.verdict, a.product) == (b.score, b.p_value, b.verdict, b.product)
    np.testing.assert_array_equal(a.anomaly_map, b.anomaly_map)


@pytest.mark.parametrize("several", [False, True], ids=["prior", "several"])
@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],
                         ids=["copy", "deepcopy", "pickle"])
def test_a_prior_can_be_copied_and_pickled(trained, pictures, travel, several):
    prior = fp.MultiPrior({"one": trained, "two": trained.with_steps(2)}) if several else trained
    want = [prior.score(p) for p in pictures]  # it has an engine now, which does not travel
    for a, b in zip(travel(prior).score_batch(pictures), want):
        assert_same(a, b)


def test_a_result_is_pickled_without_its_batch(trained, pictures):
    results = trained.score_batch(pictures)
    for result in results:
        data = pickle.dumps(result)
        assert len(data) < result.anomaly_map.nbytes + 4096 and b"_fastprior_kernels" not in data
        assert_same(pickle.loads(data), result)
        assert_same(copy.deepcopy(result), result)
    bare = pickle.loads(pickle.dumps(trained.score(pictures[0], with_map=False)))
    assert bare.anomaly_map is None and bare.score == results[0].score


def test_a_prior_scores_in_a_spawned_worker(trained, pictures):
    want = [trained.score(p) for p in pictures]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for a, b in zip(pool.map(trained.score, pictures), want):
            assert_same(a, b)
