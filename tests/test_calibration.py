"""What a score promises: jackknife, false-alarm rates on real good images, re-calibration, regions, drift."""
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats
from typer.testing import CliRunner

import fastprior as fp

extraction = fp._room("extraction")

curation = fp._room("curation")

BOTTLES = Path(__file__).resolve().parents[2] / "shared" / "data" / "mvtec" / "bottle" / "train" / "good"


def washers(folder: Path, count: int, seed: int = 0, tone: float = 1.0, grain: float = 0) -> list[Path]:
    """Discs with a hole and noise, cheap to draw; `tone` darkens the lamp, their `grain` tells them apart."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:64, :64] - 31.5
    paths = []
    for i in range(count):
        r = np.hypot(x - rng.normal(0, .7), y - rng.normal(0, .7))
        base = np.where((r < 24) & (r > 9), 170, 40) + rng.normal(0, 6, (64, 64)) + rng.normal(0, 5)
        for a, b, phase in rng.uniform(-.7, .7, (6 if grain else 0, 3)):
            base += rng.normal(0, grain) * np.sin(a * x + b * y + 9 * phase)
        paths.append(folder / f"{i:03}.png")
        Image.fromarray(np.clip(base * tone, 0, 255).astype(np.uint8)).save(paths[-1])
    return paths


def scratched(path: Path, target: Path) -> Path:
    a = np.array(Image.open(path))
    a[28:34, 12:26] = 255
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(a).save(target)
    return target


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return washers(tmp_path_factory.mktemp("good"), 40)


@pytest.fixture(scope="module")
def prior(good):
    return fp.fit(good, iterations=0, size=64, copies=1)


def test_every_calibration_score_is_standardised_by_the_other_images():
    nll = np.random.default_rng(0).gamma(3, 1, (12, 16))
    settings, details = fp.Settings(size=64, worst=.2), np.ones((12, 8, 8))
    own, z = fp._calibrate(nll)
    got = own | fp._read_scores(fp.worst_mean(z, settings.worst), nll, details, settings)
    raw = []
    for i in range(len(nll)):
        others = np.delete(nll, i, 0)
        deviation = np.sqrt(.5 * others.var(0) + .5 * others.var(0).mean())
        raw.append(fp.worst_mean((nll[i] - others.mean(0)) / deviation, settings.worst))
    raw = np.array(raw)
    low, middle, high = np.quantile(raw, [.25, .5, .75])
    np.testing.assert_allclose(got["scores"], np.sort((raw - middle) / (high - low) * 1.349), rtol=1e-9)
    enlarge = fp.map_operator(4, 8, 0)
    peaks = [(enlarge @ x.reshape(4, 4) @ enlarge.T).max() for x in nll]
    np.testing.assert_allclose(got["peaks"], np.sort(peaks), rtol=1e-12)


@pytest.mark.skipif(not BOTTLES.is_dir(), reason=f"no real images at {BOTTLES}")
def test_false_alarms_on_real_good_images_are_as_promised():
    files = fp.find_images(BOTTLES)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(files))
    model = fp.fit([files[i] for i in order[:60]], iterations=0, size=64, copies=0)
    scores = np.array([r.score for r in model.score_batch([files[i] for i in order[60:]], with_map=False)])
    for fpr in (.05, .1, .2):
        alarms = []
        for _ in range(200):
            rng.shuffle(scores)
            threshold = fp.conformal_threshold(scores[:79], fpr)
            alarms.append(np.mean(scores[79:] > threshold.value))
        # 200 splits of the same 149 scores: the mean is known to far better than the error of one split of 70
        error = np.sqrt(fpr * (1 - fpr) / 70)
        assert abs(np.mean(alarms) - threshold.expected) < error, fpr
        # alarms in 70 images of one draw with the calibration's 79: beta-binomial
        most = stats.betabinom(70, 80 - threshold.rank, threshold.rank).ppf(.95)
        assert np.mean(np.round(70 * np.array(alarms)) > most) < .05 + 3 * np.sqrt(.05 * .95 / 200)


@pytest.mark.skipif(not BOTTLES.is_dir(), reason=f"no real images at {BOTTLES}")
@pytest.mark.parametrize("calibration", ["cross", "holdout"])
def test_false_alarms_of_refitted_models_stay_below_the_promise(calibration, monkeypatch):
    files = fp.find_images(BOTTLES)
    settings = fp.Settings(size=64, copies=0)
    everything = extraction.extract_features(files, settings, fp.load_backbone("lite0"))
    features = everything.features
    monkeypatch.setattr(extraction, "extract_features",
                        lambda images, *_, **__: everything.of(images)._replace(
                            sources=list(range(len(images)))))
    rng = np.random.default_rng(0)
    alarms, count, refits = 0, 0, 6
    for seed in range(refits):
        order = rng.permutation(len(files))
        model = fp.fit(list(np.sort(order[:150])), iterations=0, size=64, copies=0, calibration=calibration,
                       seed=seed, fpr=.1)
        nll = .5 * np.stack([np.square(model.latent(x.astype(np.float32))).sum(-1)
                             for x in features[order[150:]]])
        scores = model._image_scores(nll * model.calibration["gain"] + model.calibration["offset"])
        alarms += int(np.sum(scores > model.threshold.value))
        count += len(scores)
    # thresholds vary between the models: three errors of the beta-binomial, not of the binomial
    promised = model.threshold.expected
    n = model.threshold.count
    error = np.sqrt(promised * (1 - promised) * (1 / count + 1 / (refits * n)))
    assert alarms / count < promised + 3 * error
    assert alarms > 0  # a threshold that never fires promises nothing


def test_recalibration_keeps_the_order_and_restores_the_promise(prior, good, tmp_path):
    dark = washers(tmp_path / "dark", 40, seed=5, tone=.5)
    bad = [scratched(p, tmp_path / "bad" / p.name) for p in washers(tmp_path / "more", 10, seed=6, tone=.5)]
    settings = dataclasses.replace(prior.settings, threshold=99.)
    fixed = prior._with(settings, prior.calibrations, prior.summary)
    again = fixed.calibrate(tmp_path / "dark", fpr=.1, keep_all=True)
    assert again.settings.threshold is None and again.threshold.value < 99  # it was of another zero and unit
    with pytest.raises(TypeError):
        prior.calibrate(tmp_path / "dark", worst=.5)
    probe = [*washers(tmp_path / "test", 30, seed=7, tone=.5), *bad]
    before, after = (np.array([r.score for r in p.score_batch(probe)]) for p in (prior, again))
    assert (np.argsort(before, kind="stable") == np.argsort(after, kind="stable")).all()
    assert len(np.unique(after)) == len(np.unique(before))
    assert np.median(before[:30]) > 1 and abs(np.median(after[:30])) < .5  # the lamp has aged
    assert np.mean(after[:30] > again.threshold.value) < .4
    calibrated = again.calibration["scores"]  # discs without a grain pass for near-duplicates
    assert again.summary["calibrated_on"] == len(calibrated) == 40 - again.summary["near_duplicates_today"]
    scores = np.array([r.score for r in again.score_batch(dark)])
    assert np.abs(scores[:, None] - calibrated).min(0).max() < 1e-4
    for steps in prior.calibrations:  # all step counts, not only the current one
        assert abs(np.median(again.calibrations[steps]["scores"])) < 1e-9
    path = tmp_path / "m.npz"
    again.save(path)
    assert fp.Prior.load(path).score(probe[0]).score == again.score(probe[0]).score


def test_recalibration_needs_ten_images(prior, good, tmp_path):
    new = washers(tmp_path / "new", 10, seed=8)
    with pytest.raises(fp.ImageError, match="9 readable, different good images .*: at least 10"):
        prior.calibrate([*new[:9], new[0]])  # one of them twice
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(fp.ImageError, match="broken.png"):
        prior.calibrate([*new[:9], broken])
    assert prior.calibrate([*new, broken]).summary["unreadable"]
    with pytest.raises(fp.ImageError, match="1 of 11 images were trained on"):
        prior.calibrate([*new, good[3]])


def test_rate_and_threshold_when_loading(prior, good, tmp_path):
    path = tmp_path / "m.npz"
    prior.save(path)
    loose, tight = (fp.Prior.load(path, fpr=f) for f in (.5, .01))
    assert loose.threshold.value < tight.threshold.value
    image = fp.load_image(scratched(good[0], tmp_path / "bad.png"))
    assert loose.score(image).score == tight.score(image).score
    # the map is read against the same rate: a lower threshold is a smaller unit
    assert loose.score(image).anomaly_map.max() > tight.score(image).anomaly_map.max()
    fixed = fp.Prior.load(path, threshold=1.5)
    assert fixed.threshold.value == fixed.score(image).threshold == 1.5
    assert fixed.threshold.rank == np.sum(prior.calibration["scores"] <= 1.5)
    fixed.save(path)
    assert fp.Prior.load(path).threshold.value == 1.5
    assert fp.Prior.load(path, fpr=.5).threshold.value == loose.threshold.value
    with pytest.raises(fp.ShapeError, match="threshold"):
        fp.Prior.load(path, threshold=float("nan"))


def test_a_fixed_threshold_below_all_scores_promises_nothing():
    t = fp.conformal_threshold(np.arange(20.), .1, value=-1.)
    assert t.rank == 0 and t.expected == 1 and t.bound == 1


def test_regions_are_the_connected_parts_above_one():
    m = np.zeros((9, 12), np.float32)
    m[0:2, 0:3] = 2  # touches the corner
    m[2, 3] = 5  # joined over the diagonal
    m[8, 11] = 1.5
    m[4, 6] = 1  # not above
    assert fp.find_regions(m) == [fp.Region(0, 0, 4, 3, 7, 5.0), fp.Region(11, 8, 12, 9, 1, 1.5)]
    assert fp.find_regions(np.ones((4, 4))) == []
    noise = np.random.default_rng(0).uniform(0, 2, (40, 50))
    labels, count = ndimage.label(noise > 1, np.ones((3, 3)))
    got = fp.find_regions(noise)
    assert len(got) == count and sum(r.pixels for r in got) == (labels > 0).sum()
    with pytest.raises(fp.ShapeError, match="with_map=True"):
        fp.find_regions(None)


def test_a_region_is_as_large_as_its_spot_not_as_the_halo():
    y, x = np.mgrid[:90, :120]
    m = 40 * np.exp(-np.hypot(y - 30, x - 40) / 9)  # above 1 within 33 pixels
    m[70:75, 100:110] = 1.5  # weak, but its own part
    strong, weak = fp.find_regions(m)
    radius = 9 * np.log(1 / fp.HALO)
    assert (strong.right - strong.left) == (strong.bottom - strong.top) == 2 * int(radius) + 1
    assert strong.pixels == (np.hypot(y - 30, x - 40) <= radius).sum() and strong.peak == 40
    assert weak == fp.Region(100, 70, 110, 75, 50, 1.5)
    m[30, 70] = 16  # on the halo of the first, so it belongs to it
    assert fp.find_regions(m) == [strong, weak]
    m[30, 51:71] = 16  # a scratch from one to the other
    assert fp.find_regions(m)[0][2:] == (71, strong.bottom, strong.pixels + 20, 40)
    labels = fp.label_regions(m)
    assert labels.dtype == np.int32 and labels[30, 70] == 1 and labels[72, 105] == 2 and labels[30, 71] == 0
    assert not fp.label_regions(np.ones((5, 5))).any()


def test_a_region_lies_on_the_scratch(prior, good, tmp_path):
    result = prior.score(scratched(good[0], tmp_path / "bad.png"))
    assert result.is_anomaly
    region = result.regions[0]
    assert region.left <= 19 < region.right and region.top <= 31 < region.bottom
    drawn = fp._room("console").overlay(fp.load_image(good[0]), np.zeros((64, 64), np.float32), [region])
    assert (drawn[region.top, region.left:region.right] == 255).all()
    assert (drawn != fp.load_image(good[0])).any(-1).sum() <= 2 * (region.right - region.left + region.bottom
                                                                   - region.top)


def test_drift_is_seen_and_not_invented():
    rng = np.random.default_rng(0)
    calibration = np.sort(rng.standard_normal(200))
    threshold = fp.conformal_threshold(calibration, .01).value
    invented = sum(bool(curation.drift(rng.standard_normal(60), calibration, threshold)) for _ in range(300))
    assert invented <= stats.binom.ppf(.999, 300, .001)
    anomalies = np.r_[rng.standard_normal(60), rng.normal(12, 3, 40)]
    assert curation.drift(anomalies, calibration, threshold) == ""  # bad parts are no drift
    assert "drifted" in curation.drift(rng.normal(.9, 1, 60), calibration, threshold)
    mostly_bad = np.r_[rng.standard_normal(20) * .1, np.full(80, 50.)]
    assert "80 of 100 images" in curation.drift(mostly_bad, calibration, threshold)
    assert curation.drift(np.full(19, 50.), calibration, threshold) == ""


def test_the_proposed_threshold_has_the_smallest_sum_of_errors():
    good, bad = np.arange(10.), np.array([8.5, 20., 30.])
    rows = fp._room("console").trade_off(good, bad)
    t, wrong, most, missed, note = next(r for r in rows if r[4])
    assert most == pytest.approx(np.mean(good > t) + np.sqrt(np.log(20) / 20)) and most > wrong
    assert note == "proposed" and 9 < t < 20 and missed == 1 / 3 or (8 <= t < 8.5 and missed == 0)
    every = [(1 + np.sum(good > v)) / 11 + np.mean(bad <= v) for v in np.arange(-1, 31, .25)]
    assert wrong + missed == pytest.approx(min(every))


def test_images_set_aside_count_as_above_every_threshold():
    """In the table as in the promise."""
    good, console = np.arange(20.), fp._room("console")
    rows = console.trade_off(good, np.array([18.5, 30.]), 2)
    t = console.with_aside(fp.conformal_threshold(good, .01), 2)
    assert (t.value, t.expected, t.bound, .5, "") in rows
    t, wrong, most, _, _ = next(r for r in rows if r[4])
    above = np.sum(good > t) + 2
    assert wrong == (1 + above) / 23 and most == pytest.approx(above / 22 + np.sqrt(np.log(20) / 2 / 22))
    assert console.trade_off(np.r_[good, 99, 99], np.array([18.5, 30.]))[0][1] <= rows[0][1]


@pytest.fixture
def data(good, tmp_path):
    root = tmp_path / "data"
    washers(root / "disc" / "good", 20)
    for p in fp.find_images(root / "disc" / "good")[:6]:
        scratched(p, root / "disc" / "bad" / p.name)
    return root


def test_calibrate_command(data, tmp_path):
    model, new = tmp_path / "m.npz", tmp_path / "new.npz"
    run = lambda *a: CliRunner().invoke(fp._room("commands").build_app(), [str(x) for x in a])  # noqa: E731
    assert run("train", data / "disc" / "good", "-o", model, "--iterations", 0, "--size", 64).exit_code == 0
    washers(tmp_path / "today", 20, seed=9)
    done = run("calibrate", tmp_path / "today", "-m", model, "-o", new, "--known-bad", data / "disc" / "bad",
               "--fpr", .1)
    assert done.exit_code == 0, done.output
    assert re.search(r"\d+ held-out good images( and 1 set aside)? promise", done.stderr)
    lines = done.stdout.splitlines()
    assert lines[0].split("\t") == ["threshold", "false alarms", "at most", "missed"]
    assert "proposed" in done.stdout
    assert fp.Prior.load(new).settings.fpr == .1
    scored = run("score", "-m", new, "--json", "--mask", tmp_path / "masks", data / "disc" / "bad")
    assert scored.exit_code == 1, scored.output
    rows = [json.loads(line) for line in scored.stdout.splitlines()]
    assert all(r["regions"] and r["verdict"] == "anomaly" for r in rows)
    mask = np.asarray(Image.open(rows[0]["mask"]))
    assert mask.shape == (64, 64) and set(np.unique(mask)) == {0, 255}
    dark = washers(tmp_path / "dark", 24, seed=3, tone=.5)
    warned = run("score", "-m", new, *dark)
    assert "warning:" in warned.stderr and "warning" not in warned.stdout




@pytest.fixture(scope="module")
def products(tmp_path_factory):
    """Two kinds of part, a folder each."""
    root = tmp_path_factory.mktemp("products")
    washers(root / "washer", 12)
    for p in washers(root / "plate", 12, seed=4):
        Image.fromarray(255 - np.array(Image.open(p))).save(p)
    return root


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_a_model_of_several_products_knows_which_it_sees(products, backend, tmp_path, monkeypatch):
    joint = fp.fit_many(products, iterations=0, size=64, copies=1)
    single = {name: fp.fit(products / name, iterations=0, size=64, copies=1, backbone=joint.backbone)
              for name in ("plate", "washer")}
    assert list(joint.priors) == list(single)
    joint.save(tmp_path / "all.npz")
    if backend == "numpy":
        monkeypatch.setattr(fp, "_cpu_engines", lambda *_: None)
    again = fp.Prior.load(tmp_path / "all.npz")
    images = [fp.find_images(products / name)[i] for i in (0, 1) for name in single]
    images.append(scratched(images[-1], tmp_path / "bad.png"))
    for image, result, name in zip(images, again.score_batch(images), ["plate", "washer"] * 2 + ["washer"]):
        alone = single[name].score(image)
        assert result.product == name
        # features are centred from one mean to the next, which rounds anew
        assert result.score == pytest.approx(alone.score, rel=1e-4, abs=1e-4)
        np.testing.assert_allclose(result.anomaly_map, alone.anomaly_map, rtol=1e-3, atol=1e-3)
        assert result.is_anomaly == alone.is_anomaly == ("bad" in image.name)
        assert again.score(image).score == result.score
    assert again.with_steps(3).score(images[0]).product == "plate"


def test_several_products_on_the_command_line(products, tmp_path):
    run = lambda *a: CliRunner().invoke(fp._room("commands").build_app(), [str(x) for x in a])  # noqa: E731
    model = tmp_path / "all.npz"
    trained = run("train", "--multi", products, "-o", model, "--iterations", 0, "--size", 64)
    assert trained.exit_code == 0 and "plate:" in trained.stderr, trained.output
    scored = run("score", "-m", model, products)
    assert [line.split("\t")[4] for line in scored.stdout.splitlines()] == ["plate"] * 12 + ["washer"] * 12
    assert "washer: calibrated_steps" in run("info", model).stdout
    refused = run("calibrate", products / "plate", "-m", model, "-o", model)
    assert isinstance(refused.exception, fp.FastPriorError) and "2 products" in str(refused.exception)
