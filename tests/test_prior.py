"""`Prior`: the same scores whatever the company, the thread or the file; every kind of bad input."""
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import fastprior as fp
from conftest import ROOT
from twins import cpu

extraction = fp._room("extraction")


def assert_same(a, b):
    assert (a.score, a.p_value, a.is_anomaly) == (b.score, b.p_value, b.is_anomaly)
    np.testing.assert_array_equal(a.anomaly_map, b.anomaly_map)


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) > 20


# -- determinism ---------------------------------------------------------------------------------

def test_save_and_load_keep_every_bit(trained, model_file, pictures):
    loaded = fp.Prior.load(model_file)
    assert loaded.settings == trained.settings and loaded.summary == trained.summary
    for image in pictures:
        assert_same(loaded.score(image), trained.score(image))


def test_score_does_not_depend_on_company_batch_or_chunk(trained, pictures):
    alone = [trained.score(p) for p in pictures]
    for batch, chunk in ((pictures, 16), (pictures, 2), (pictures[::-1], 3), (pictures * 5, 16)):
        results = trained.score_batch(batch, chunk=chunk)
        for image, result in zip(batch, results):
            assert_same(result, alone[next(i for i, p in enumerate(pictures) if p is image)])
    assert trained.score_batch([]) == []
    for a, b in zip(alone, trained.score_batch(pictures, with_map=False)):
        assert b.anomaly_map is None and a.score == b.score


def test_score_does_not_depend_on_threads(model_file, pictures):
    one, two = (fp.Prior.load(model_file, threads=t).score_batch(pictures) for t in (1, 2))
    for a, b in zip(one, two):
        assert_same(a, b)


@pytest.mark.parametrize("steps", [1, 2, 5, 10])
def test_numpy_scores_as_numba_does(model_file, pictures, monkeypatch, steps):
    numba = fp.Prior.load(model_file, steps=steps)
    want = numba.score_batch(pictures)
    monkeypatch.setattr(fp, "_cpu_engines", lambda *_: None)
    plain = fp.Prior.load(model_file, steps=steps)
    assert (numba.backend, plain.backend) == ("numpy", "numpy")  # both see the patch now
    for a, b in zip(want, plain.score_batch(pictures)):
        assert b.score == pytest.approx(a.score, rel=1e-4, abs=1e-4)
        np.testing.assert_allclose(b.anomaly_map, a.anomaly_map, rtol=1e-3, atol=1e-4)


def test_priors_in_several_python_threads(model_file, pictures):
    shared, own = fp.Prior.load(model_file), [fp.Prior.load(model_file) for _ in range(2)]
    want = [shared.score(p).score for p in pictures]
    wrong = []

    def work(prior):
        for _ in range(10):
            wrong.extend(k for k, p in enumerate(pictures) if prior.score(p).score != want[k])
    threads = [threading.Thread(target=work, args=(p,)) for p in (shared, shared, *own)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("load", ["", "p.score(image)"])
def test_first_scores_from_several_threads(load, model_file, tmp_path):
    """In a new process: one loads and builds, the others wait for it."""
    code = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
import numpy as np, fastprior as fp
image = np.zeros((64, 64, 3), np.uint8)
p = fp.Prior.load({str(model_file)!r})
{load}
p = fp.Prior.load({str(model_file)!r})
built, emit, scores, gate = [], fp.Prior._emit, [], threading.Barrier(4)
fp.Prior._emit = lambda *a: built.append(1) or emit(*a)
def work():
    gate.wait()
    scores.append(p.score(image).score)
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print(len(built), len(scores), len(set(scores)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "4", "1"], done


def test_threads_are_those_asked_for(trained, pictures, monkeypatch):
    want, pools = trained.score(pictures[0]).score, {}
    for asked, allowed in ((1, ""), (None, "1"), (None, "3"), (2, "3"), (5, "3")):
        monkeypatch.setenv("NUMBA_NUM_THREADS", allowed)
        prior = fp.Prior(trained.settings, trained.backbone, trained.mean, trained.whitener, trained.denoiser,
                         trained.calibrations, {}, threads=asked, factors=trained.factors, fine=trained.fine,
                         coarse=trained.coarse)
        assert prior.score(pictures[0]).score == want  # 3 may be more than there are cores
        pools[asked, allowed] = prior._engine().threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert pools == {(1, ""): 1, (None, "1"): 1, (None, "3"): 3, (2, "3"): 2, (5, "3"): 3}
    assert cpu.available_threads() == 3
    monkeypatch.setenv("NUMBA_NUM_THREADS", "none")
    assert cpu.available_threads() == cores


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
def test_an_interrupted_frame_leaves_nothing_behind(trained, pictures, monkeypatch):
    class Interrupt(BaseException):
        pass

    def interrupt(*_):
        raise Interrupt

    def work():
        while True:
            assert prior.score(pictures[0]).score == want
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    prior = fp.Prior(trained.settings, trained.backbone, trained.mean, trained.whitener, trained.denoiser,
                     trained.calibrations, {},
                     factors=trained.factors, fine=trained.fine, coarse=trained.coarse)
    want = prior.score(pictures[0]).score
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for delay in np.random.default_rng(0).uniform(.0005, .01, 300):
            with pytest.raises(Interrupt):
                signal.setitimer(signal.ITIMER_REAL, delay)
                work()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert prior.score(pictures[0]).score == want


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_scores_too(trained, pictures, monkeypatch):
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    prior = fp.Prior(trained.settings, trained.backbone, trained.mean, trained.whitener, trained.denoiser,
                     trained.calibrations, {},
                     factors=trained.factors, fine=trained.fine, coarse=trained.coarse)
    want, stop = prior.score(pictures[0]).score, threading.Event()

    def work():
        while not stop.is_set():
            prior.score(pictures[0])
    busy = threading.Thread(target=work)  # within a frame when the process forks
    busy.start()
    try:
        for _ in range(5):
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that waits for threads it does not have
                os._exit(prior.score(pictures[0]).score != want)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        busy.join()


def test_helpers_end_with_their_engine():
    """On one core, where the helper is still in the last barrier when the frame ends and its engine goes."""
    code = """if True:
        import os, sys, threading, time
        import numpy as np
        sys.path.insert(0, sys.argv[1])
        import fastprior as fp
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for _ in range(50):
            engine = fp._engines("cpu").Engine(2)
            engine.whiten(engine.state(4, 32), 4, 32, np.zeros((4, 32)), np.ones((4, 32)))
            engine.finish()
            for _ in range(3):
                engine.run([np.zeros((1, 1, 3), np.uint8)])
            del engine
            keep = [np.zeros(128, np.uint8) for _ in range(4)]
        until = time.monotonic() + 20
        while threading.active_count() > 1 and time.monotonic() < until:
            time.sleep(.05)
        print(threading.active_count())
        os._exit(0)"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True,
                          timeout=120,
                          env=os.environ | {"NUMBA_NUM_THREADS": "2"})
    assert done.stdout == "1\n", done.stderr


def test_no_memory_for_one_image_does_not_spoil_the_next(model_file, monkeypatch):
    prior = fp.Prior.load(model_file)
    wide = np.random.default_rng(0).integers(0, 256, (64, 8000, 3), np.uint8)
    want = fp.Prior.load(model_file).score(wide).score
    prior.score(wide[:, :64])
    aligned = cpu._aligned

    def nothing_left(*_):
        raise MemoryError
    monkeypatch.setattr(cpu, "_aligned", nothing_left)
    with pytest.raises(MemoryError):
        prior.score(wide)
    monkeypatch.setattr(cpu, "_aligned", aligned)
    assert prior.score(wide).score == want


def test_a_batch_of_more_sizes_than_are_kept(model_file):
    prior = fp.Prior.load(model_file)
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    images = [np.ascontiguousarray(noise[:8 + i % 40, :8 + i // 40]) for i in range(300)]
    together = prior.score_batch(images, chunk=300)
    for i in (0, 1, 40, 150, 299):
        assert_same(prior.score(images[i]), together[i])
    assert len(prior._engine()._tables) <= 300


def test_a_denoiser_of_any_hidden_width(trained, pictures):
    weights = dict(trained.denoiser)
    weights |= {"mix0_w1": weights["mix0_w1"][:, :21], "mix0_b1": weights["mix0_b1"][:21],
                "mix0_w2": 30
                * np.random.default_rng(0).standard_normal((21,
                                                            weights["mix0_w2"].shape[1])).astype(np.float32)}
    prior = fp.Prior(trained.settings, trained.backbone, trained.mean, trained.whitener, weights,
                     trained.calibrations, {},
                     factors=trained.factors, fine=trained.fine, coarse=trained.coarse)
    want = prior._reference_frames(pictures[:1], False).outputs[0]
    np.testing.assert_allclose(prior.z(pictures[:1]), want, rtol=1e-3, atol=1e-3)


def test_z_takes_what_score_takes_and_is_what_it_reads(trained, pictures, washers):
    path, image = fp.find_images(washers)[0], pictures[0]
    z = trained.z([path, image, image[:, ::2], image[..., 0]])
    assert z.shape == (4, np.prod(trained.grid) + len(trained.cells)) and z.dtype == np.float32
    for row, source in zip(z, (path, image, np.ascontiguousarray(image[:, ::2]), image[..., 0])):
        np.testing.assert_array_equal(trained.z([source])[0], row)
        assert trained._image_scores(row) == pytest.approx(trained.score(source).score, rel=1e-6)
    with pytest.raises(fp.ShapeError, match="float64"):
        trained.z([np.zeros((64, 64, 3))])


def test_the_scores_make_sense(trained, washers):
    good = [trained.score(p).score for p in fp.find_images(washers / "test" / "good")]
    bad = [trained.score(p).score for kind in ("scratch", "stain")
           for p in fp.find_images(washers / "test" / kind)]
    assert min(bad) > max(good)


def test_maps_have_the_size_of_their_image(trained, pictures):
    rgb = pictures[0]
    tall = trained.score(rgb[:, :40])
    assert tall.anomaly_map.shape == (96, 40) and np.isfinite(tall.score)
    assert trained.score(rgb[..., 0]).score == trained.score(np.repeat(rgb[..., :1], 3, 2)).score


# -- training ------------------------------------------------------------------------------------

def test_too_few_images(pictures, washers, tmp_path):
    with pytest.raises(fp.ImageError, match="4 good images: at least 5"):
        fp.fit(pictures[:4], iterations=0, size=64)
    paths = []
    for i in range(5):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.roll(pictures[0], i, 0)).save(paths[-1])
    paths[0].write_bytes(b"no")
    with pytest.raises(fp.ImageError, match="4 readable, different good images.*0.png"):
        fp.fit(paths, iterations=0, size=64)
    with pytest.raises(fp.ImageError, match="no such"):
        fp.fit(tmp_path / "none")
    made = fp.fit([paths[0], *fp.find_images(washers)], iterations=0, size=64, copies=0, keep_all=True)
    assert len(made.summary["unreadable"]) == 1 and made.summary["images"] == 24


@pytest.mark.parametrize("setting, match", [
    ({"size": 100}, "multiple of 32"), ({"steps": 0}, "steps"), ({"fpr": 0}, "a number from"),
    ({"variant": "x"}, "whitened"),
    ({"calibration": "x"}, "holdout"), ({"copies": -1}, "copies"), ({"width": 10}, "multiple of 16")])
def test_settings_are_checked_before_the_work(setting, match, washers):
    with pytest.raises(fp.ShapeError, match=match):
        fp.fit(washers, iterations=0, **setting)


@pytest.mark.parametrize("setting",
                         [{"variant": "plain", "iterations": 5}, {"iterations": 5},
                          {"iterations": 0}, {"variant": "plain", "iterations": 0}, {"minutes": .02}],
                         ids=["plain", "full", "gaussian", "plain-gaussian", "minutes"])
def test_every_way_to_train(washers, setting, tmp_path):
    prior = fp.fit(washers, size=64, copies=1, **setting)
    prior.save(tmp_path / "m.npz")
    again = fp.Prior.load(tmp_path / "m.npz")
    image = fp.find_images(washers)[0]
    assert again.score(image).score == prior.score(image).score
    assert (prior.denoiser is None) == (prior.summary["iterations"] == 0)
    assert ("iterations_run" in prior.summary) == (setting.get("iterations") != 0)
    assert len(prior.calibration["scores"]) == 24 - len(prior.summary["set_aside"])


def test_minutes_bound_a_training_whose_last_step_counts(washers):
    short = fp.fit(washers, size=64, copies=0, minutes=1e-6)
    assert short.summary["iterations_run"] == 1
    for wrong in (0, -1, float("nan")):
        with pytest.raises(fp.ShapeError, match="minutes: expected a positive number"):
            fp.fit(washers, size=64, minutes=wrong)


def test_the_hosts_random_numbers_stay_its_own(washers):
    torch = pytest.importorskip("torch", reason="torch is in the extras `train` and `test`")
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    fp.fit(washers, size=64, copies=0, iterations=2)
    assert torch.equal(torch.rand(3), want)


def test_images_that_are_all_alike_are_named(pictures):
    with pytest.raises(fp.ImageError, match="1 readable, different good images, and 5 with the same pixels"):
        fp.fit([pictures[0]] * 6, iterations=0, size=64, copies=0)


def test_an_untrained_prior_needs_no_torch(washers, tmp_path):
    code = ("import sys; sys.modules['torch'] = None; import fastprior as fp; "
            f"fp.fit({str(washers)!r}, iterations=0, size=64, copies=0).save({str(tmp_path / 'm.npz')!r})\n"
            f"try: fp.fit({str(washers)!r}, size=64)\nexcept fp.BackendUnavailable as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "pip install" in done.stdout and "torch" in done.stdout
    assert fp.Prior.load(tmp_path / "m.npz").denoiser is None


def test_an_interrupted_training_leaves_nothing_or_a_whole_model(washers, tmp_path):
    def interrupt(what, done, total):
        if what == "features" and done > 3:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fp.fit(washers, iterations=0, size=64, progress=interrupt)

    def later(what, done, total):
        if what == "training" and done == 12:
            raise KeyboardInterrupt
    prior = fp.fit(washers, iterations=50, size=64, copies=0, progress=later)
    assert prior.summary["iterations_run"] == 12 and prior.summary["interrupted"]
    assert prior.denoiser is None  # nothing had been evaluated
    assert np.isfinite(prior.score(fp.find_images(washers)[0]).score)


# -- conformal calibration -----------------------------------------------------------------------

def test_p_values_and_threshold_agree():
    scores = np.sort(np.random.default_rng(0).standard_normal(50))
    for fpr in (.02, .05, .1, .5):
        t = fp.conformal_threshold(scores, fpr)
        above = scores > t.value
        assert above.sum() == t.count - t.rank and t.expected <= fpr + 1e-12
        assert fp.conformal_p_value(np.nextafter(t.value, 9), scores) == pytest.approx(t.expected)
        assert t.bound == pytest.approx(stats.beta(51 - t.rank, t.rank).ppf(.95))
    beyond = fp.conformal_threshold(scores, .001)  # 50 images cannot promise this: the best they can
    assert beyond.value == scores[-1] and beyond.expected == pytest.approx(1 / 51) and beyond.needed == 2995
    for almost in (1 - 1e-9, 1 - 1e-12):
        t = fp.conformal_threshold(scores, almost)
        assert (t.value, t.rank) == (scores[0], 1)
    for bad in (0, 1, -1):
        with pytest.raises(fp.ShapeError):
            fp.conformal_threshold(scores, bad)
    with pytest.raises(fp.ShapeError, match="at least two"):
        fp.conformal_threshold(scores[:1], .1)


def test_the_promise_holds_in_simulation():
    rng = np.random.default_rng(0)
    alarms, bounded, p_values = [], [], []
    for _ in range(2000):
        t = fp.conformal_threshold(scores := rng.gumbel(size=60), .05)
        rate = 1 - stats.gumbel_r.cdf(t.value)
        alarms.append(rate)
        bounded.append(rate <= t.bound)
        p_values.append(fp.conformal_p_value(rng.gumbel(), scores))
    assert abs(np.mean(alarms) - t.expected) < 4 * np.std(alarms) / np.sqrt(2000)
    assert abs(np.mean(bounded) - .95) < 4 * np.sqrt(.05 * .95 / 2000)
    for level in (.05, .2, .5):
        share = np.mean(np.array(p_values) <= level)
        assert share <= level + 4 * np.sqrt(level * (1 - level) / 2000) and share > .6 * level


# -- memory of a training ------------------------------------------------------------------------

def test_a_training_that_does_not_fit_is_refused_before_it_starts(monkeypatch):
    config, net, training = fp.Settings(), fp.load_backbone("lite0"), fp._room("training")
    needed, most = (training.training_memory(n, config, net) for n in (300, 2400))
    assert 1e9 < needed < 2e9 and most < 4 * needed  # at most 2400 rows
    monkeypatch.setattr(extraction, "extract_features", lambda *a, **k: pytest.fail("it began"))
    images = [np.full((64, 64, 3), i, np.uint8) for i in range(20)]
    monkeypatch.setattr(training, "memory_left", lambda: 2e8)
    with pytest.raises(fp.FastPriorError, match=r"20 images at 448 pixels takes 0\.\d GB of memory, 0\.2"):
        fp.fit(images, iterations=0)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc/meminfo here")
def test_memory_left_heeds_what_the_system_says_and_the_limit_of_the_process():
    free = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]
    assert 0 < fp._room("training").memory_left() < 3 * 1024 * int(free) + 2 ** 36
    code = ("import resource, fastprior as fp; "
            "training = fp._room('training'); size = int(open('/proc/self/statm').read().split()[0]) * 4096; "
            "resource.setrlimit(resource.RLIMIT_AS, (size + 2 ** 28,) * 2); print(training.memory_left())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1e8 < float(done.stdout) <= 2 ** 28
