"""Whether a verdict can be trusted: bad images among good ones, duplicates, order, what is no number."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

import fastprior as fp
from conftest import ROOT, SHARED
from test_calibration import washers as discs

extraction = fp._room("extraction")

curation = fp._room("curation")
fitting = fp._room("fitting")

BOTTLE = SHARED / "data" / "mvtec" / "bottle"


def fit(images, **settings):
    return fp.fit(images, **{"iterations": 0, "size": 64, "copies": 1} | settings)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return discs(tmp_path_factory.mktemp("good"), 40, grain=4)


@pytest.fixture(scope="module")
def bad(good, tmp_path_factory):
    """Scratches of other places and looks."""
    folder, rng = tmp_path_factory.mktemp("bad"), np.random.default_rng(0)
    for p in good[::4]:
        a = np.array(Image.open(p))
        y, x = rng.integers(8, 44, 2)
        a[y:y + rng.integers(4, 9), x:x + rng.integers(8, 15)] = 255
        Image.fromarray(a).save(folder / f"bad_{p.name}")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def grained(tmp_path_factory):
    """Parts with a grain of their own, as wood has."""
    folder, rng = tmp_path_factory.mktemp("grained"), np.random.default_rng(0)
    y, x = np.mgrid[:256, :256] / 256
    for i in range(24):
        waves = sum(rng.normal(0, 12) * np.sin(2 * np.pi * (a * x + b * y + c))
                    for a, b, c in rng.uniform(-6, 6, (12, 3)))
        image = 120 + waves + 60 * (np.hypot(x - .5, y - .5) < .3) + rng.normal(0, 2, (256, 256))
        Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).convert("RGB").save(folder / f"{i:03}.png")
    return sorted(folder.iterdir())


# -- contamination -------------------------------------------------------------------------------

def test_a_bad_image_of_one_product_does_not_decide_the_rounding_of_all(good, bad, tmp_path):
    made = []
    for name, extra in {"mixed": bad[1:2], "clean": []}.items():
        for product, files in {"a": [*good[:20], *extra], "b": good[20:]}.items():
            (tmp_path / name / product).mkdir(parents=True)
            for p in files:
                shutil.copy(p, tmp_path / name / product)
        made.append(fp.fit_many(tmp_path / name, iterations=0, size=64, copies=1))
    mixed, clean = made
    assert mixed.priors["a"].summary["set_aside"] == [str(tmp_path / "mixed" / "a" / bad[1].name)]
    whole, without = (m.backbone.to_arrays() for m in made)  # the bad one's key is low, see below
    assert all(np.array_equal(whole[k], without[k]) for k in without)
    assert mixed.priors["a"].threshold == clean.priors["a"].threshold


@pytest.mark.parametrize("count", [1, 2])
def test_bad_images_among_the_good_are_named_and_set_aside(good, bad, count):
    clean = fit(good)
    mixed = fit([*good, *bad[1:count + 1]])
    assert mixed.summary["set_aside"] == sorted(map(str, bad[1:count + 1])) and mixed.summary["images"] == 40
    assert mixed.threshold == clean.threshold  # as if they had never been there
    keys = [fp.image_key(fp.load_image(p)) for p in (bad[1], *good)]
    assert keys[0] in sorted(keys)[:24]  # it had helped to decide that at first
    whole, without = (p.backbone.to_arrays() for p in (mixed, clean))
    assert all(np.array_equal(whole[k], without[k]) for k in without)
    kept = fit([*good, *bad[1:count + 1]], keep_all=True, backbone=clean.backbone)
    assert kept.summary["set_aside"] == [] and kept.threshold.value != mixed.threshold.value
    assert count == 1 or kept.threshold.value > mixed.threshold.value  # of one, its good twin calibrates
    told = fp._room("console").promise
    assert f"40 held-out good images and {count} set aside promise" in told(mixed)
    assert f"{(1 + count) / (41 + count):.1%} on average" in told(mixed)  # if those set aside are good
    assert f"({1 / 41:.1%} on average if the {count} are bad)" in told(mixed)


def test_what_is_a_little_unlike_does_not_calibrate_but_trains():
    e = extracted(np.random.default_rng(0), 100)
    e.features[[0, 1, 3]] *= 1.52
    config = fp.Settings(size=96, cell=32, factors=4)
    made, kept = (fitting.whiten_features(e, config, k) for k in (False, True))
    assert made.summary["set_aside"] == [0, 1, 3] and made.summary["held_out"] == 97 == made.clean.sum()
    assert made.summary["images"] == len(made.views[0].x0) == 98  # two of them by far
    assert kept.clean.all() and len(kept.views[0].x0) == 100


@pytest.mark.skipif(not BOTTLE.is_dir(), reason=f"no real images at {BOTTLE}")
def test_one_broken_bottle_among_forty_does_not_switch_detection_off():
    files = fp.find_images(BOTTLE)[:40]
    broken = BOTTLE / "test" / "broken_large" / "000.jpg"
    clean, mixed = (fit(images, size=128) for images in (files, [*files, broken]))
    aside = set(mixed.summary["set_aside"]) - set(clean.summary["set_aside"])
    assert str(broken) in aside and len(aside) <= 2  # each has its own backbone: one may lie at the limit
    test = sorted(set((BOTTLE / "test").rglob("*.jpg")) - {broken, *(BOTTLE / "test" / "good").iterdir()})
    found = [sum(r.is_anomaly for r in prior.score_batch(test, with_map=False)) for prior in (clean, mixed)]
    assert found[1] >= .95 * found[0] and found[0] >= 58


def test_hardly_any_clean_image_is_set_aside():
    rng = np.random.default_rng(0)  # places of 16 correlated channels: |x|^2 / 2, skewed as real ones are
    share = [curation.outliers(.5 * rng.chisquare(16, (n, 64)), .03)[0].mean()
             for n in (40, 100, 300) for _ in range(60)]
    assert np.mean(share) < .02


def test_bad_images_that_score_like_the_best_good_ones_do_not_raise_the_threshold():
    """Five in a hundred, a little above the good ones, in a few places: what would set the threshold goes."""
    rng, highest, named, wrong = np.random.default_rng(0), [], 0, 0
    for _ in range(40):
        nll = .5 * rng.chisquare(16, (105, 64))
        nll[100:, :3] += rng.uniform(8, 16, (5, 1))
        unlike = curation.outliers(nll, .03)[0]
        raw = fp.worst_mean((nll - 8) / 8 ** .5, .03)
        highest.append([raw[:100].max(), raw[~unlike].max(), raw.max()])
        named, wrong = named + unlike[100:].sum(), wrong + unlike[:100].sum()
    good, rest, every = np.mean(highest, 0)
    assert every > 1.3 * good and rest < 1.1 * good and named > 60 and wrong < .01 * 4000


@pytest.mark.parametrize("count, among", [(3, 20), (6, 34)])
def test_more_than_a_tenth_that_stands_far_apart(good, count, among):
    """They would decide what is ordinary: 3 among 20 made a threshold of 90, and nothing was found."""
    rng, gross = np.random.default_rng(0), []
    for p in good[-count:]:
        gross.append(np.asarray(Image.open(p).convert("RGB")).copy())
        y, x = rng.integers(2, 24, 2)
        gross[-1][y:y + 36, x:x + 36] = rng.integers(0, 256, (36, 36, 3))
    clean, mixed = fit(good[:among]), fit([*good[:among], *gross])
    names = {f"image {among + i}" for i in range(count)}
    assert names <= {*mixed.summary["set_aside"]} and mixed.threshold == clean.threshold
    today = fit(good[20:]).calibrate([*good[:20], *gross[:3]])
    assert {*today.summary["set_aside_today"]} >= {"image 20", "image 21", "image 22"}
    assert today.threshold.value < 10


def test_a_fifth_that_stands_apart_and_not_more():
    rng = np.random.default_rng(0)
    nll = rng.chisquare(20, (40, 16))
    for count in (2, 5, 8):
        own = nll.copy()
        own[:count] += rng.uniform(300, 500, (count, 1))
        unlike, far = curation.outliers(own, .1)
        assert (unlike == (np.arange(40) < count)).all() and (far == unlike).all()
    heavy = rng.standard_t(3, (300, 40, 16)) ** 2  # tails as heavy as these are no gap
    assert np.mean([curation.outliers(own, .1)[0].sum() > 4 for own in heavy]) < .01


def test_at_most_a_tenth_is_set_aside(good, bad):
    mixed = fit([*good[:30], *bad])
    assert len(mixed.summary["set_aside"]) <= 4


def test_one_wild_image_hardly_moves_the_unit():
    settings = fp.Settings(size=64)
    nll = .5 * np.random.default_rng(0).chisquare(16, (60, 16))
    raw = fp.worst_mean(nll, .1)
    details = np.ones((61, 8, 8))
    calm = fp._read_scores(raw, nll, details[:60], settings)["moments"]
    wild = fp._read_scores(np.r_[raw, 1e4], np.r_[nll, np.full((1, 16), 1e4)], details, settings)["moments"]
    np.testing.assert_allclose(wild, calm, rtol=.1)


# -- duplicates and order ------------------------------------------------------------------------

def test_equal_pixels_count_once(good, tmp_path):
    copies = [shutil.copy(p, tmp_path / f"copy{k}_{p.name}") for k in range(2) for p in good[:14]]
    once, thrice = fit(good[:14]), fit([*good[:14], *copies])
    assert thrice.summary["repeated"] == 28 and thrice.threshold == once.threshold
    with pytest.raises(fp.ImageError, match="1 readable, different good images, and 19 with the same pixels"):
        fit([good[0]] * 20)


def frames(path, count, rng):
    """An image as a camera sees it again: moved by less than a pixel, noisy, compressed or smaller."""
    image = Image.open(path)
    for k in range(count):
        moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, *rng.uniform(-1, 1, 1), 0, 1,
                                *rng.uniform(-1, 1, 1)), Image.Resampling.BILINEAR)
        noisy = np.asarray(moved) + rng.normal(0, 2, np.asarray(moved).shape)
        yield Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def near(images, folder, count, how="frames"):
    rng, out = np.random.default_rng(1), []
    folder.mkdir(exist_ok=True)
    for p in images:
        name = str(folder / f"{how}_{Path(p).stem}")
        if how == "frames":
            for k, frame in enumerate(frames(p, count, rng)):
                out.append(f"{name}_{k}.png")
                frame.save(out[-1])
        else:
            out.append(name + (".jpg" if how == "jpeg" else ".png"))
            image = Image.open(p)
            image = image.resize((image.width * 3 // 4, image.height * 3 // 4)) if how == "smaller" else image
            image = image.crop((1, 1, image.width - 1, image.height - 1)) if how == "crop" else image
            image.save(out[-1], **({"quality": 85} if how == "jpeg" else {}))
    return out


@pytest.mark.parametrize("how, count", [("frames", 2), ("jpeg", 1), ("smaller", 1), ("crop", 1)])
def test_near_duplicates_share_a_fold_and_count_once(grained, tmp_path, how, count):
    images = [*grained[:20], *near(grained[:20], tmp_path / how, count, how)]
    made = fit(images, copies=4, size=128, keep_all=True)
    assert made.summary["near_duplicates"] == 20 * count and made.summary["held_out"] == 20
    assert made.threshold.count == 20 and made.summary["images"] == len(images)
    e = extraction.extract_features(images, fp.Settings(size=128), fp.load_backbone("lite0"))
    group, owner = curation.near_duplicates(e), np.array(e.sources)
    for i in range(20):  # the image and its likes, and nothing else
        assert set(owner[group == group[owner == i]]) == {i, *range(20 + i * count, 20 + (i + 1) * count)}
    fold = fitting.whiten_features(e, fp.Settings(size=128), keep_all=True).fold
    assert all(len(set(fold[np.isin(e.owner, np.flatnonzero(group == g))])) == 1 for g in set(group))


def test_calibration_doubts_copies_of_what_trained_and_other_products(good, tmp_path, caplog):
    new, model = discs(tmp_path / "new", 20, seed=5, grain=4), fit(good)

    def told(images):
        caplog.clear()
        model.calibrate(images)
        return " ".join(r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert told(new) == ""
    rng = np.random.default_rng(0)
    copies = [np.asarray(Image.open(p).convert("RGB")).astype(int) + rng.integers(-1, 2, (64, 64, 3))
              for p in good]
    assert "copies of images that trained" in told([a.clip(0, 255).astype(np.uint8) for a in copies])
    others = [255 - np.asarray(Image.open(p).convert("RGB")) for p in new]
    assert "another product" in told(others)


def test_different_images_are_no_near_duplicates(good, grained):
    for images, size in ((good, 64), (good, 128), (grained, 128)):
        e = extraction.extract_features(images, fp.Settings(size=size), fp.load_backbone("lite0"))
        assert len(set(curation.near_duplicates(e))) == len(images)


def test_near_duplicates_calibrate_once(good, grained, tmp_path):
    prior, today = fit(good), grained[:12]
    again = prior.calibrate([*today, *near(today, tmp_path / "again", 2)], keep_all=True)
    assert again.threshold.count == 12 and again.summary["near_duplicates_today"] == 24
    with pytest.raises(fp.ImageError, match="9 readable.*near-duplicates count once"):
        prior.calibrate([*today[:9], *near(today[:9], tmp_path / "again", 2)])


def test_bad_images_among_those_of_today(good, bad, tmp_path):
    prior, today = fit(good), discs(tmp_path / "today", 30, seed=9, grain=4)
    clean, mixed, kept = (prior.calibrate(x, keep_all=k) for x, k in
                          ((today, False), ([*today, bad[0]], False), ([*today, bad[0]], True)))
    assert mixed.summary["set_aside_today"] == [str(bad[0])] and mixed.summary["held_out_aside"] == 1
    assert kept.threshold.value > 2 * mixed.threshold.value and mixed.threshold == clean.threshold


@pytest.mark.parametrize("calibration", ["cross", "holdout"])
def test_names_and_order_do_not_matter(good, tmp_path, calibration):
    images = [*good, *discs(tmp_path / "more", 12, seed=3, grain=4)]
    other = [shutil.copy(p, tmp_path / f"{len(images) - i:03}.png") for i, p in enumerate(images)]
    a, b = (fit(x, calibration=calibration) for x in (images, other[::-1]))
    assert a.threshold == b.threshold
    for name, array in fp._arrays_of(a).items():
        np.testing.assert_array_equal(array, fp._arrays_of(b)[name], err_msg=name)


def test_what_was_trained_on_is_known(good, tmp_path):
    model = tmp_path / "m.npz"
    fit(good).save(model)
    run = lambda *a: subprocess.run([sys.executable, str(ROOT / "fastprior.py"), *map(str, a)],  # noqa: E731
                                    capture_output=True, text=True)
    assert "40 of 40 images were trained on" in run("score", "-m", model, good[0].parent).stderr
    discs(tmp_path / "new", 5, seed=8)
    assert "trained on" not in run("score", "-m", model, tmp_path / "new").stderr
    refused = run("calibrate", good[0].parent, "-m", model, "-o", tmp_path / "o.npz")
    assert refused.returncode == 2 and "40 of 40 images were trained on" in refused.stderr


# -- holdout is exact ----------------------------------------------------------------------------

def extracted(rng, n, places=9, channels=16):
    mix = rng.standard_normal((channels, channels)) / 4
    f = (rng.standard_normal((n, places, channels)) @ mix).astype(np.float16)
    looks = np.random.default_rng(9).standard_normal((n, 128, 65)).astype(np.complex64)  # none alike
    keys = [f"{i:016x}" for i in range(n)]
    return extraction.Extracted(f, np.arange(n), looks, keys, list(range(n)), 0, [],
                        rng.standard_normal((n, 144, 4)).astype(np.float16))


def small_backbone():
    class Net:
        name, channels = "small", (16,)
    return Net()


def test_a_bad_image_among_the_held_out():
    config = fp.Settings(size=96, cell=32, calibration="holdout", factors=4)
    e = extracted(np.random.default_rng(1), 100)
    away = np.flatnonzero(np.random.default_rng(config.seed).permutation(100) < 20)
    e.features[away[3]] *= 8
    found, kept = (fitting.whiten_features(e, config, keep) for keep in (False, True))
    assert found.summary["set_aside"] == [away[3]] and found.summary["held_out_aside"] == 1
    assert len(found.views[1].fresh) == len(found.views[0].fresh) == found.summary["held_out"] == 19
    assert len(kept.views[0].fresh) == 20
    np.testing.assert_array_equal(found.views[0].x0, kept.views[0].x0)


@pytest.mark.parametrize("calibration", ["cross", "holdout"])
def test_what_only_a_coarse_place_shows_is_set_aside(calibration):
    """A little of everything, at four places."""
    config = fp.Settings(size=96, cell=32, factors=4, calibration=calibration)
    e, bad = extracted(np.random.default_rng(2), 100), 5
    assert calibration == "cross" or np.random.default_rng(config.seed).permutation(100)[bad] < 20
    e.features[bad, fp.coarse_cells(np.ones(9, bool), config.grid)[0]] += np.float16(.25)
    alone = dataclasses.replace(config, coarse=False)
    both, places = (fitting.whiten_features(e, c).summary["set_aside"] for c in (config, alone))
    assert bad in both and bad not in places


def test_what_is_set_aside_of_the_held_out_is_decided_one_by_one():
    """So that what they promise is exact: others among them change nothing for an image."""
    rng = np.random.default_rng(2)
    reference, of = rng.gamma(3, 1, (80, 9)), rng.gamma(3, 1, (200, 9)) * rng.uniform(.8, 1.3, (200, 1))
    unlike, far = curation.outliers(reference, .3, of)
    assert 0 < unlike.sum() < 20 and not far[~unlike].any()
    for some in (slice(100, 200), slice(0, 150), rng.permutation(200)[:120]):
        np.testing.assert_array_equal(curation.outliers(reference, .3, of[some])[0], unlike[some])
    assert curation.outliers(reference, .3, of * 9)[0].sum() == 20  # a tenth at most
    own, same = (curation.outliers(reference, .3, *of)[0] for of in ((), (reference,)))
    np.testing.assert_array_equal(own, same)


def test_holdout_touches_nothing_before_the_threshold():
    """Other images in the held-out fifth: the same model, but for its threshold."""
    rng = np.random.default_rng(0)
    config = fp.Settings(size=96, cell=32, calibration="holdout", factors=4)
    e = extracted(rng, 60)
    away = np.random.default_rng(config.seed).permutation(60) < 12
    changed = e.features.copy()
    changed[away] *= 3
    models = [fitting.whiten_features(e._replace(features=f), config) for f in (e.features, changed)]
    np.testing.assert_array_equal(*(m.fold for m in models))
    for views in zip(*(m.views for m in models)):
        for name in ("x0", "mean", "whitener"):
            np.testing.assert_array_equal(*(getattr(view, name) for view in views))
        assert not np.array_equal(*(view.fresh for view in views))
    with pytest.raises(fp.ImageError, match="'holdout' needs at least 50"):
        fitting.whiten_features(extracted(rng, 49), config)


def test_holdout_keeps_its_promise_with_a_denoiser(monkeypatch):
    """200 simulated trainings, the denoiser's early stopping on: false alarms as split conformal promises."""
    monkeypatch.setattr(fp, "Prior", lambda config, backbone, *parts, coarse, **_: (*parts[:4], coarse))
    torch = pytest.importorskip("torch", reason="torch is in the extras `train` and `test`")
    torch.set_num_threads(1)
    monkeypatch.setattr(fp, "_CALIBRATED_STEPS", (1,))
    monkeypatch.setattr(fp, "_cpu_engines", lambda *_: None)
    monkeypatch.setattr(fp, "pack_lower", lambda w: w)
    config = fp.Settings(size=96, cell=32, calibration="holdout", factors=0, width=16, mixers=0, steps=1)
    timesteps = fp.select_timesteps(1, config.first, config.last)
    cells = fp.coarse_cells(np.ones(9, bool), config.grid)
    alarms, promised = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        everything = extracted(rng, 90)
        fitted = everything.of(np.arange(50))
        own = dataclasses.replace(config, seed=seed)
        w = fitting.whiten_features(fitted, own)
        iterations = 60 if seed < 20 else 0
        *view, denoiser, calibrations, coarse = fitting.fit_whitened(w, own, small_backbone(), iterations)
        new, c = everything.features[50:], calibrations[1]
        both = (new, view, denoiser), (np.stack([fp.coarsen(f, cells) for f in new]), coarse[:2], None)
        nll = np.concatenate([fp._nll_of(fitting.apply_whitener(x, *view), f, timesteps, "v")
                              for x, view, f in both], 1)
        z = fp.worst_mean(nll * c["gain"] + c["offset"], own.worst)
        threshold = fp.conformal_threshold(c["scores"], .1)
        alarms.append(np.sum((z - c["moments"][0]) / c["moments"][1] > threshold.value))
        aside = w.summary["held_out_aside"]  # counted as good, as it is printed
        promised.append(dataclasses.replace(threshold, count=threshold.count + aside).expected)
    assert min(promised) == 1 / 11 and threshold.count + aside == 10  # held out
    spread = stats.betabinom(40, 1, 10).std() / 40 / np.sqrt(200)
    assert abs(np.mean(alarms) / 40 - np.mean(promised)) < 3 * spread


# -- numbers that are none -----------------------------------------------------------------------

def test_not_a_number_is_never_good(good):
    result = fit(good).score(good[0])
    vars(result)["score"] = float("nan")
    assert result.is_anomaly and result.verdict == "anomaly"


# -- several products ----------------------------------------------------------------------------

def test_the_likelihood_decides_and_a_stranger_fits_none(good, tmp_path):
    for p in good[:20]:
        for name, change in (("washer", lambda a: a), ("plate", lambda a: 255 - a)):
            (tmp_path / "products" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(change(np.array(Image.open(p)))).save(tmp_path / "products" / name / p.name)
    both = fp.fit_many(tmp_path / "products", iterations=0, size=64, copies=1)
    for name, prior in both.priors.items():
        z = prior.z(discs(tmp_path / "z", 3, seed=9))
        w = fp.unpack_lower(prior.whitener, prior.mean.shape[1]).astype(np.float64)
        v = fp.unpack_factors(prior.factors, prior.settings.factors, *prior.mean.shape).astype(np.float64)
        v = v.reshape(len(v), -1)
        dense = sum(np.log(np.diagonal(own)).sum() for own in w)
        dense += np.linalg.slogdet(np.eye(len(v)) - v @ v.T)[1]
        nll = (z - prior.calibration["offset"]) / prior.calibration["gain"]
        nll = nll[:, :len(prior.mean)]  # of the coarse places it is said already
        np.testing.assert_allclose(prior.log_likelihood(z), dense - nll.sum(1), rtol=1e-3)
    new = discs(tmp_path / "new", 4, seed=11)
    assert [both.score(p).product for p in new] == ["washer"] * 4
    assert [both.score(255 - fp.load_image(p)).product for p in new] == ["plate"] * 4
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    stranger = both.score(noise)
    assert stranger.product == "unknown" and stranger.is_anomaly
    model = tmp_path / "all.npz"
    both.save(model)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    done = subprocess.run([sys.executable, str(ROOT / "fastprior.py"), "score", "-m", str(model), "--json",
                           str(tmp_path / "noise.png")], capture_output=True, text=True)
    assert done.returncode == 1 and json.loads(done.stdout)["product"] == "unknown"


# -- drift of what the network does not mind -------------------------------------------------------

def test_traits_are_light_focus_and_place():
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:200, :200]
    disc = np.hypot(y - 95, x - 90) < 40
    discs = [40 + disc * (100 + 30 * rng.standard_normal((200, 200))) for _ in range(6)]
    images = [np.repeat(np.clip(a, 0, 255).astype(np.uint8)[..., None], 3, 2) for a in discs]

    def traits(change):
        return np.mean(curation.traits(np.array([curation.look(change(a)) for a in images])), 0)
    before = traits(lambda a: a)
    np.testing.assert_allclose(traits(lambda a: np.rint(a * .9).astype(np.uint8)) - before,
                               [np.log(.9), 0, 0, 0], atol=.01)
    side = len(images[0])
    by = round(.04 * side)
    rolled = traits(lambda a: np.roll(a, (by, 2 * by), (0, 1))) - before
    way = np.array([by, 2 * by]) / side
    assert (rolled[2:] > .4 * way).all() and (rolled[2:] < way).all()
    blurred = traits(lambda a: ndimage.gaussian_filter(a, (side / 100, side / 100, 0))) - before
    assert blurred[1] < -.1 and abs(blurred[2:]).max() < .005


def test_drift_of_traits_is_named_and_not_invented():
    rng = np.random.default_rng(0)
    mean, deviation = np.array([5, -1, .5, .5]), np.array([.03, .05, .01, .01])
    calibration, quiet = np.sort(rng.standard_normal(100)), np.zeros(40)

    def said(by, known_of=100, new_of=40, scores=None):
        old, new = (mean + deviation * rng.standard_normal((n, 4)) for n in (known_of, new_of))
        return curation.drift(rng.standard_normal(new_of) - 1 if scores is None else scores, calibration, 3.,
                              new + by, [known_of, old.mean(0).tolist(), old.std(0).tolist()])
    assert not any(said(0, *sizes) for sizes in ((100, 40), (20, 20), (300, 256)) for _ in range(200))
    for by, words in (([np.log(.9), 0, 0, 0], "less light"), ([.1, 0, 0, 0], "more light"),
                      ([0, -.1, 0, 0], "blurred"), ([0, .1, 0, 0], "sharper"),
                      ([0, 0, .02, 0], "lower"), ([0, 0, 0, -.02], "further left")):
        got = [said(np.array(by)) for _ in range(40)]
        assert sum(words.split("% ")[-1] in g for g in got) >= 38, (words, got)
    bad = np.r_[quiet[:19], quiet + 9]  # fewer than 20 that look good tell nothing
    assert "less light" not in said(np.array([-.1, 0, 0, 0]), new_of=59, scores=bad)
    for known in (None, [], [40], "x", {"a": 1}, [40, [1], [2]], [None, [1] * 4, [1] * 4],
                  [40, "abcd", "abcd"]):
        assert curation.drift(quiet - 1, calibration, 3., np.ones((40, 4)), known) == ""


def test_a_darker_lamp_is_seen_by_the_command(good, tmp_path, capfd):
    made = fit(good)
    assert made.summary["traits"][0] == made.summary["images"]
    made.save(tmp_path / "m.npz")
    for name, light in (("same", 1), ("darker", .85)):
        (tmp_path / name).mkdir()
        for i, path in enumerate(good):
            image = np.rint(fp.load_image(path) * light).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
        fp._room("console").score([str(tmp_path / name)], tmp_path / "m.npz", None, None, False)
        said = capfd.readouterr().err
        assert ("less light" in said) == (light < 1), said


def test_overlapping_trainings_give_the_threads_of_blas_back():
    code = """
import sys, threading, time
import numpy, scipy.linalg
from threadpoolctl import threadpool_info
import fastprior as fp

def blas():
    return {i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}

@fp._one_blas_thread
def work(began, ended):
    began.set()
    ended.wait(1)
    seen.append(blas())
before, seen, (a, b, c) = blas(), [], [threading.Event() for _ in range(3)]
threads = [threading.Thread(target=work, args=own) for own in ((a, b), (b, c))]
threads[0].start()
a.wait()
threads[1].start()  # within the first, and ends after it
for t in threads: t.join()
print(before == {2}, seen == [{1}, {1}], blas() == {2})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True,
                          env=os.environ | {"OPENBLAS_NUM_THREADS": "2"})
    assert done.stdout.split() == ["True"] * 3, done


def test_the_number_of_threads_changes_no_bit():
    """Each step has one thread of BLAS, and those of whoever calls it are given back."""
    from threadpoolctl import threadpool_info
    e, config = extracted(np.random.default_rng(3), 40), fp.Settings(size=96, cell=32, factors=4)

    def blas():
        return {i["filepath"]: i["num_threads"] for i in threadpool_info() if i["user_api"] == "blas"}
    before, seen, models = blas(), [], []
    for threads in (1, 2, 5):
        w = fitting.whiten_features(e, config, threads=threads,
                                    progress=lambda *_: seen.extend(blas().values()))
        for v in w.views:
            models.append([v.x0.copy(), v.mean, v.whitener, fp.fit_factors(v.x0, w.fold, 4, threads), v.x0])
    assert seen and set(seen) == {1} and {k: n for k, n in blas().items() if k in before} == before
    for own in (*zip(*models[::2]), *zip(*models[1::2])):
        assert len({a.tobytes() for a in own}) == 1
