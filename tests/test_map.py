"""The map: as fine as 8 pixels, from what places know and a fine view; the score knows nothing of it."""
import numpy as np
import pytest
from scipy import ndimage

import fastprior as fp

extraction = fp._room("extraction")

curation = fp._room("curation")
fitting = fp._room("fitting")


@pytest.fixture(scope="module")
def prior(washers):
    return fp.fit(washers, iterations=0, size=96, copies=1)


def fine_map(prior, image):
    """The map before it is enlarged, by the reference operations, (F, F), in its unit."""
    coarse, fine = fp._reference_tokens(image, prior.backbone, prior.settings)
    z = .5 * np.square(prior.latent(coarse)).sum(-1) * prior.calibration["gain"] + prior.calibration["offset"]
    weight, offset = prior._map_weights()
    z = z[:len(weight)]
    f = fp.fine_density(fine, prior.fine[0].astype(np.float32), prior.fine[1])
    f = f.reshape(prior.settings.fine)
    return fp.sharpen((weight * z + offset).reshape(prior.grid), f, *fp._enlargers(prior.settings))


def test_the_detail_is_a_ratio_to_the_largest_beside():
    f = np.random.default_rng(0).gamma(1, 1, (20, 20))
    want = np.sqrt(f / ndimage.maximum_filter(f, 5, mode="nearest"))
    np.testing.assert_allclose(fp.detail(f), want, rtol=1e-12)
    assert want.max() == 1 and want.min() > 0
    np.testing.assert_allclose(fp.detail(1e3 * f), want, rtol=1e-12)
    assert (fp.detail(np.zeros((8, 8))) == 0).all()  # and no 0 / 0


def test_sharpening_lowers_or_keeps_and_keeps_where_the_fine_view_is_highest():
    rng = np.random.default_rng(1)
    cells, f, operator = rng.uniform(0, 9, (4, 4)), rng.gamma(1, 1, (16, 16)), fp.map_operator(4, 16, 0)
    coarse, sharp = operator @ cells @ operator.T, fp.sharpen(cells, f, operator, operator)
    assert (sharp <= coarse).all()
    top = f == ndimage.maximum_filter(f, 5, mode="nearest")
    np.testing.assert_array_equal(sharp[top], coarse[top])


@pytest.mark.parametrize("n_in, n_out", [(12, 12), (12, 96), (12, 301), (12, 5), (56, 448), (1, 8)])
def test_linear_taps_are_scipys_interpolation(n_in, n_out):
    x = np.random.default_rng(2).standard_normal(n_in)
    start, share = fp.linear_taps(n_in, n_out)
    at = (np.arange(n_out) + .5) * n_in / n_out - .5
    want = ndimage.map_coordinates(x, [at], order=1, mode="nearest")
    np.testing.assert_allclose((1 - share) * x[start] + share * x[start + 1 if n_in > 1 else start], want,
                               atol=1e-12)


def test_the_score_knows_nothing_of_the_fine_view(prior, pictures):
    c = prior.backbone.fine_channels
    other = fp.Prior(prior.settings, prior.backbone, prior.mean, prior.whitener, None, prior.calibrations, {},
                     factors=prior.factors, fine=(prior.fine[0] + 1, np.eye(c, dtype=np.float32)),
                     coarse=prior.coarse)
    for image in pictures:
        a, b = prior.score(image), other.score(image)
        assert a.score == b.score == prior.score(image, with_map=False).score
        assert not np.array_equal(a.anomaly_map, b.anomaly_map)


def test_a_batch_in_which_only_shapes_differ_has_the_same_maps(prior, pictures):
    for a, image in zip(prior.score_batch(pictures), pictures):
        np.testing.assert_array_equal(a.anomaly_map, prior.score(image).anomaly_map)


def test_mean_and_whitener_are_those_of_the_images_that_are_fitted_on(washers):
    config = fp.Settings(size=64, copies=0, factors=0)
    good = fp.find_images(washers / "train" / "good")
    e = extraction.extract_features(good, config, fp.load_backbone("lite0"))
    used = np.arange(0, 24, 2)
    mean, w = fitting.fit_fine([e.fine[i] for i in used], config)
    x = np.array([e.fine[i] for i in used], np.float64)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-3, atol=1e-3)
    flat = (x - x.mean(0)).reshape(-1, x.shape[2])
    cov = np.cov(flat, rowvar=False, bias=True)
    cov += config.floor * np.trace(cov) / len(cov) * np.eye(len(cov))
    np.testing.assert_allclose(w @ cov @ w.T, np.eye(len(cov)), atol=1e-3)


def test_peaks_are_those_of_the_maps_of_images_that_are_held_out(prior, washers):
    """calibrate's, of new images: each is the maximum of its own map, in the map's own unit."""
    files = fp.find_images(washers / "test" / "good") + fp.find_images(washers / "train" / "good")
    new = [np.ascontiguousarray(fp.load_image(path)[:, ::-1]) for path in files]
    again = prior.calibrate(new, keep_all=True)
    zero = again.calibration["moments"][2]
    one = max(fp.conformal_threshold(again.calibration["peaks"], again.settings.fpr).value, 1.001 * zero)
    maxima = np.array([fine_map(again, image).max() for image in new])
    got = (again.calibration["peaks"] - zero) / (one - zero)
    assert len(got) == again.summary["calibrated_on"]
    assert np.abs(maxima[:, None] - got).min(0).max() < 5e-3  # fine features are kept in float16
    assert np.mean(maxima > 1.005) <= again.settings.fpr


def extracted(rng):
    looks = np.stack([curation.look(image) for image in rng.integers(0, 256, (60, 64, 64, 3), np.uint8)])
    return extraction.Extracted(rng.standard_normal((60, 9, 16)).astype(np.float16), np.arange(60), looks,
                        [f"{i:016x}" for i in range(60)], list(range(60)), 0, [],
                        rng.standard_normal((60, 144, 4)).astype(np.float16))


def test_what_does_not_calibrate_has_no_peak():
    e = extracted(np.random.default_rng(0))
    e.features[7] *= 20
    config = fp.Settings(size=96, cell=32, factors=0)
    w = fitting.whiten_features(e, config)
    aside = w.summary["set_aside"]
    assert 7 in aside and len(aside) <= 6
    kept = np.delete(np.arange(60), aside)
    np.testing.assert_array_equal(w.details, fp._details([e.fine[i] for i in kept], *w.fine, config))
    assert len(w.details) == w.clean.sum()


def test_holdout_reads_peaks_from_what_took_no_part():
    """Other fine features of the held-out fifth: another threshold of the map, and nothing else."""
    rng = np.random.default_rng(0)
    config, e = fp.Settings(size=96, cell=32, calibration="holdout", factors=0), extracted(rng)
    away = np.random.default_rng(config.seed).permutation(60) < 12
    changed, inside = e.fine.copy(), e.fine.copy()
    changed[away] = rng.standard_normal((12, 144, 4))
    inside[~away] *= 2
    a, b, c = (fitting.whiten_features(e._replace(fine=x), config) for x in (e.fine, changed, inside))
    assert len(a.details) == len(a.views[0].fresh) and not np.array_equal(a.details, b.details)
    for x, y in zip(a.fine, b.fine):
        np.testing.assert_array_equal(x, y)
    assert not np.array_equal(a.fine[0], c.fine[0])


def test_of_many_images_only_some_fine_features_are_held(washers, prior, monkeypatch):
    monkeypatch.setattr(extraction, "MOST_FINE", 9)
    few = fp.fit(washers, iterations=0, size=96, copies=1)
    e = extraction.extract_features(fp.find_images(washers / "train" / "good"), few.settings, few.backbone)
    assert len(e.fine) == 9 and len(e.keys) == 24
    first = fp.load_image(fp.find_images(washers / "train" / "good")[e.sources[0]])
    own = few.backbone.features(few.backbone.pixels(first, 96), (12, few.backbone.fine))[0]
    np.testing.assert_allclose(e.fine[0], own, rtol=2e-3, atol=2e-3)  # of the first key
    assert len(few.calibration["peaks"]) <= 9 < len(few.calibration["scores"])
    np.testing.assert_array_equal(few.calibration["scores"], prior.calibration["scores"])


def test_one_place_a_side_has_a_map(washers, pictures):
    prior = fp.fit(washers, iterations=0, size=64, cell=64, copies=0, factors=0)
    result = prior.score(pictures[0])
    want = prior._reference_frames([pictures[0]], True).maps[0]
    np.testing.assert_allclose(result.anomaly_map, want, rtol=1e-3, atol=1e-3)
    assert np.isfinite(want).all() and np.ptp(want) > 0
