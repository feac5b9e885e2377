"""Windows of large images: where they lie, how their maps join, what thresholds of whole images promise."""
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import fastprior as fp
from conftest import ROOT

tiles = fp._room("tiles")
SMALL = {"size": 64, "iterations": 0, "copies": 1}


def web(rng, spot=None, height=64, width=160):
    """A grained web; with a dark spot of 10 pixels at (y, x)."""
    grain = ndimage.gaussian_filter(rng.standard_normal((height, width)), 1.2)
    image = np.clip(128 + 20 * grain / grain.std(), 0, 255)
    if spot:
        image[spot[0]:spot[0] + 10, spot[1]:spot[1] + 10] = 10
    return np.repeat(image.astype(np.uint8)[..., None], 3, 2)


@pytest.fixture(scope="module")
def webs():
    rng = np.random.default_rng(0)
    return [web(rng) for _ in range(24)]


@pytest.fixture(scope="module")
def tiled(webs):
    return fp.fit(webs, tile=64, **SMALL)


@pytest.mark.parametrize("tile", [64, 100, 448])
def test_windows_cover_a_side_and_overlap_by_a_quarter(tile):
    for length in [*range(tile, 4 * tile, 7), 8192]:
        at = tiles.starts(length, tile)
        assert at[0] == 0 and at[-1] == length - tile
        steps = np.diff(at)
        assert (steps > 0).all() and (steps <= .75 * tile + 1).all()
        assert len(at) < (length - tile) / (.75 * tile) + 2


def test_maps_join_without_seams(tiled, monkeypatch):
    y, x = np.mgrid[:150, :333]
    truth = (np.sin(y / 30) + x / 100).astype(np.float32)  # of an image whose pixels say where they lie
    image = np.dstack([y, x // 2, x % 2]).astype(np.uint8)

    class Window:
        def score_batch(self, windows, with_map):
            assert with_map
            for w in windows:
                rows, columns = w[..., 0].astype(int), 2 * w[..., 1].astype(int) + w[..., 2]
                yield type("Result", (), {"score": float(columns.max()), "anomaly_map": truth[rows, columns]})
    monkeypatch.setattr(tiles, "window_prior", lambda prior: Window())
    scores, joined = tiles._score(tiled, image, True, 4)
    np.testing.assert_allclose(joined, truth, atol=1e-5)
    assert max(scores) == 332 and len(scores) == len(tiles.corners(150, 333, 64)) == 3 * 7


def test_the_worst_window_is_the_images_score(tiled, webs):
    window = tiled._with(dataclasses.replace(tiled.settings, tile=0), tiled.calibrations, tiled.summary)
    own = [window.score(webs[0][:, x:x + 64]).score for x in (0, 48, 96)]
    for r in (tiled.score(webs[0]), tiled.score(webs[0], with_map=False), *tiled.score_batch(webs[:1])):
        assert r.score == max(own)
    assert tiled.score(webs[0], with_map=False).anomaly_map is None
    assert tiled.score(webs[0]).anomaly_map.shape == (64, 160)


def test_a_spot_is_found_where_it_is(tiled):
    rng = np.random.default_rng(1)
    for y, x in ((8, 20), (30, 45), (40, 110), (20, 149)):  # one of them on the edge of windows
        r = tiled.score(web(rng, (y, x)))
        assert r.is_anomaly and r.p_value == 1 / 11
        box = r.regions[0]
        assert box.left < x + 10 and box.right > x and box.top < y + 10 and box.bottom > y
        assert box.right - box.left < 64
        row, column = np.unravel_index(r.anomaly_map.argmax(), r.anomaly_map.shape)
        assert abs(row - y - 5) <= 13 and abs(column - x - 5) <= 13  # of fine places, 8 pixels


def test_thresholds_are_of_whole_images(tiled):
    assert tiled.threshold.count == 10 and tiled.summary["windows"] == 3
    assert list(tiled.calibrations) == [2] and tiled.summary["images"] == 14
    rng = np.random.default_rng(2)
    scores = np.array([r.score for r in tiled.score_batch([web(rng) for _ in range(60)], with_map=False)])
    # Beta(1, 10) over models, of one threshold: above .4 by chance in 1 of 165
    assert np.mean(scores > tiled.threshold.value) < .4
    assert abs(np.median(scores)) < 1.5
    assert np.median(tiled.calibration["scores"]) == pytest.approx(0, abs=1e-9)
    peaks = [r.anomaly_map.max() for r in tiled.score_batch([web(rng) for _ in range(20)])]
    assert .2 < np.median(peaks) < 1.2  # in units of the map's threshold


def test_the_same_from_a_file_and_in_another_process(tiled, webs, tmp_path):
    tiled.save(tmp_path / "m.npz")
    for again in (fp.Prior.load(tmp_path / "m.npz"), pickle.loads(pickle.dumps(tiled))):
        r, own = again.score(webs[3]), tiled.score(webs[3])
        assert r.score == own.score and again.settings.tile == 64
        np.testing.assert_array_equal(r.anomaly_map, own.anomaly_map)
    odd = tiled._with(tiled.settings, tiled.calibrations, {"windows": "x"})
    assert odd.score(webs[3]).score == tiled.score(webs[3]).score  # with a warning
    with pytest.raises(fp.ShapeError, match="64 to 4096, got 8"):
        tiled._with(dataclasses.replace(tiled.settings, tile=8), tiled.calibrations, {})
    strict = fp.Prior.load(tmp_path / "m.npz", threshold=3.5)
    assert strict.score(webs[3]).threshold == 3.5


def test_order_decides_nothing(tiled, webs):
    again = fp.fit(webs[::-1], tile=64, **SMALL)
    for name, a in fp._arrays_of(again).items():
        np.testing.assert_array_equal(a, fp._arrays_of(tiled)[name], err_msg=name)


def test_calibrate_reads_whole_images(tiled, webs):
    rng = np.random.default_rng(3)
    new = [web(rng) for _ in range(12)]
    again = tiled.calibrate([*new, new[0]], keep_all=True)
    assert again.threshold.count == 12 and again.summary["calibrated_on"] == 12
    scores = np.sort([r.score for r in again.score_batch(new)])
    np.testing.assert_allclose(scores, again.calibration["scores"], atol=1e-4)
    assert max(r.anomaly_map.max() for r in again.score_batch(new)) == pytest.approx(1, abs=1e-3)
    with pytest.raises(fp.ImageError, match="were trained on"):
        tiled.calibrate(webs)
    with pytest.raises(fp.ImageError, match="9 readable, different good images"):
        tiled.calibrate(new[:9])


def test_a_bad_image_among_the_good_is_named(webs):
    rng = np.random.default_rng(4)
    spoilt = [web(rng, (20, 70)) for _ in range(2)]
    made = fp.fit([*webs, *spoilt], tile=64, **SMALL)
    named = set(made.summary["set_aside"])
    assert named <= {"image 24", "image 25"}  # those that calibrate; those that train have few windows of all
    assert made.score(web(rng, (30, 30))).is_anomaly


def test_an_image_whose_windows_do_not_train_is_named(webs):
    bad, left_out = np.full((64, 160, 3), 250, np.uint8), 0
    bad[::9] = 0
    for seed in range(4):
        made = fp.fit([*webs, bad], tile=64, seed=seed, **SMALL)
        lost = made.summary["windows_trained_on"] < 3 * made.summary["images"]
        assert not lost or "image 24" in made.summary["set_aside"]
        left_out += lost
    assert left_out


def test_holdout_and_cross_are_the_same(webs, tiled):
    """A fifth of the images calibrates, whatever a window's calibration would be."""
    exact = fp.fit(webs, tile=64, calibration="holdout", **SMALL)
    assert exact.settings.calibration == "holdout" and exact.threshold.value == tiled.threshold.value


def test_a_z_is_a_windows(tiled, webs):
    with pytest.raises(fp.ShapeError, match="windows"):
        tiled.z(webs[:1])


def test_what_cannot_be(tiled, webs, tmp_path):
    rng = np.random.default_rng(5)
    for images, match, options in (
            (webs[:19], "19 readable, different good images: at least 20", {"tile": 64}),
            ([*webs, web(rng, width=161)], "got 160x64 .image 0. and 161x64 .image 24", {"tile": 64}),
            (webs, "160x64 pixels, but windows of 65", {"tile": 65}),
            (webs, "64 to 4096, got 10", {"tile": 10}),
            (webs, "tile: expected an integer from 0 to 4096", {"tile": 5000}),
            (webs, "not together", {"tile": 64, "roi": np.ones((64, 160), bool)}),
            (webs, "not together", {"tile": 64, "features": tmp_path / "f.npz"})):
        with pytest.raises((fp.ImageError, fp.ShapeError), match=match):
            fp.fit(images, **SMALL | options)
    with pytest.raises(fp.ShapeError, match="90x60 pixels, but windows of 64"):
        tiled.score(web(rng, height=60, width=90))
    first, second = tiled.score_batch([webs[0], web(rng, height=60, width=90)], errors="return")
    assert isinstance(first, fp.Result) and isinstance(second, fp.ShapeError)
    with pytest.raises(fp.ModelError, match="windows"):
        fp.MultiPrior({"a": tiled, "b": tiled})


def test_another_size_is_scored_with_a_warning(tiled, caplog):
    r = tiled.score(web(np.random.default_rng(6), (10, 200), 70, 400))
    assert r.is_anomaly and "windows in an image of 400x70, but 3 in those" in caplog.text


def test_the_command(webs, tmp_path):
    (tmp_path / "good").mkdir()
    for i, image in enumerate(webs):
        Image.fromarray(image).save(tmp_path / "good" / f"{i}.png")
    Image.fromarray(web(np.random.default_rng(7), (20, 90))).save(tmp_path / "bad.png")

    def run(*args):
        return subprocess.run([sys.executable, str(ROOT / "fastprior.py"), *args], cwd=tmp_path,
                              capture_output=True, text=True)
    done = run("train", "good", "--tiles", "64", "--size", "64", "--iterations", "0", "--keep-all",
               "-o", "m.npz")
    text = "14 images, 42 windows of them train, 10 other images calibrate;"
    assert done.returncode == 0 and text in done.stderr, done.stderr
    done = run("score", "-m", "m.npz", "bad.png", "--map", "maps")
    assert done.returncode == 1 and done.stdout.split("\t")[3].strip() == "anomaly", done
    with Image.open(tmp_path / "maps" / "bad.png.map.png") as drawn:
        assert drawn.size == (160, 64)
    done = run("export", "-m", "m.npz", "m.onnx")
    assert done.returncode == 2 and "windows" in done.stderr
    done = run("train", "good", "--tiles", "64", "--multi", "-o", "n.npz")
    assert done.returncode == 2 and "--tiles: of one product" in done.stderr
