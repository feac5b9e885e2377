"""Backbones in integers: which images decide their ranges, what is kept apart from these, what is shared."""
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fastprior as fp
import make_demo
from conftest import ROOT
from damaged_models import tiny_backbone, tiny_prior

extraction = fp._room("extraction")
fitting = fp._room("fitting")

quantization, curation = fp._room("quantization"), fp._room("curation")
SETTINGS = fp.Settings(size=64)


def net():
    return tiny_backbone(np.random.default_rng(0))


def noise(seed, n, height=48, width=40):
    """Images of different contrasts, so that ranges differ."""
    rng = np.random.default_rng(seed)
    made = rng.integers(0, 256, (n, height, width, 3)) * rng.uniform(.2, 1, (n, 1, 1, 1))
    return list(made.astype(np.uint8))


def same(a, b):
    a, b = a.to_arrays(), b.to_arrays()
    assert a.keys() == b.keys()
    return all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


# -- ranges --------------------------------------------------------------------------------------

def test_order_names_and_duplicates_decide_nothing(tmp_path):
    images = noise(1, quantization.RANGE_IMAGES + 8)
    made, ranged = quantization.quantize_on(net(), images, SETTINGS)
    lowest = sorted(map(fp.image_key, images))[:quantization.RANGE_IMAGES]
    assert made.integer and ranged == lowest
    files = []
    for i, image in enumerate(images):
        files.append(tmp_path / f"{i * 7 % len(images)}.png")
        Image.fromarray(image).save(files[-1])
    (tmp_path / "broken.png").write_bytes(b"no image")
    other = [tmp_path / "broken.png", *images[5:9], *files[::-1], images[0]]
    again, keys = quantization.quantize_on(net(), other, SETTINGS)
    assert keys == ranged and same(again, made)
    chosen = [image for image in images if fp.image_key(image) in ranged]
    assert same(quantization.quantize_on(net(), chosen, SETTINGS)[0], made)
    assert not same(quantization.quantize_on(net(), chosen[:4], SETTINGS)[0], made)


def test_ranges_are_those_inside_a_region():
    image, mask = noise(2, 1)[0], np.zeros((48, 40), bool)
    mask[:, :20] = True
    roi, changed = fp.RegionOfInterest(mask), image.copy()
    changed[:, 20:] = 255
    one, other = (quantization.quantize_on(net(), [a], SETTINGS, roi) for a in (image, changed))
    assert one[1] == other[1] == [fp.image_key(roi.paint(image))] and same(one[0], other[0])


def test_what_cannot_be_in_integers_stays_as_it_is():
    for b in (tiny_backbone(np.random.default_rng(0), fp.SILU), quantization.quantize_on(
            net(), noise(3, 1), SETTINGS)[0]):
        assert quantization.quantize_on(b, noise(4, 2), SETTINGS) == (b, [])
    b = net()
    assert quantization.quantize_on(b, ["no such.png"], SETTINGS) == (b, [])


@pytest.mark.parametrize("n_in, n_out, shift", [(8, 64, 0), (4096, 64, 0), (500, 96, .029), (77, 64, -.03)])
def test_taps_in_fixed_point_sum_to_one(n_in, n_out, shift):
    start, weight = fp.fixed_point_taps(n_in, n_out, shift)
    where, exact = fp.resize_taps(n_in, n_out, shift)
    np.testing.assert_array_equal(start, where)
    np.testing.assert_array_equal(weight.sum(1), 4096)
    np.testing.assert_array_equal(weight, np.rint(weight))
    assert weight.min() >= 0 and np.abs(weight - 4096 * exact).max() <= 1


# -- rounding ------------------------------------------------------------------------------------

def mixed(rng, n, k):
    """Integers (n, k) that vary together, as channels do."""
    few = rng.standard_normal((n, 6)) @ rng.standard_normal((6, k)) + .3 * rng.standard_normal((n, k))
    return np.clip(np.rint(18 * few), -127, 127)


def test_rounding_moves_products_less_than_each_weight_by_itself():
    rng = np.random.default_rng(0)
    w, x = np.clip(40 * rng.standard_normal((24, 8)), -127, 127), mixed(rng, 4100, 24)
    seen, new = x[:4000], x[4000:]
    out = quantization.rounded(w, np.linalg.cholesky(np.linalg.inv(seen.T @ seen)).T)
    assert np.array_equal(out, np.rint(out)) and np.abs(out).max() <= 127 and np.abs(out - w).max() < 8
    assert np.std(new @ (out - w)) < .6 * np.std(new @ (np.rint(w) - w))


@pytest.mark.parametrize("n", [96, 5000])
def test_weights_make_up_for_what_was_rounded_before(n):
    rng = np.random.default_rng(2)
    x, w, change = mixed(rng, n, 24), rng.standard_normal((24, 8)), .02 * rng.standard_normal((24, 24))
    unit, halves = .125, (slice(n // 2), slice(n // 2, None))
    y = unit * (x + x @ change)  # what x misses, x tells
    u, w2 = quantization.followed(w, [(x[rows].astype(np.float32), y[rows]) for rows in halves], unit)
    assert np.array_equal(u, np.triu(u))
    h = np.linalg.inv(u.T @ u)
    np.testing.assert_allclose(h - np.diag(np.full(24, h[0, 0] - x[:, 0] @ x[:, 0])), x.T @ x, rtol=1e-9)
    exact = w + n / (n + 96) * np.linalg.solve(h, x.T @ x @ change @ w)
    np.testing.assert_allclose(w2, exact, rtol=1e-6, atol=1e-9)
    assert np.std(x @ w2 - y @ w / unit) < (.6 if n == 96 else .2) * np.std(x @ w - y @ w / unit)


def test_images_bring_features_nearer_to_those_of_floats():
    """Of lite0 on demo images that decided nothing, in standard deviations of good images."""
    pictures = [make_demo.draw_part(np.random.default_rng([3, i]), 128) for i in range(18)]
    settings, b = fp.Settings(size=128), fp.load_backbone("lite0")

    def of(net):
        return np.stack([net.features(net.pixels(i, settings.shape), *net.views(settings))[0]
                         for i in pictures[-6:]])

    def error(net):
        moved = of(net) - exact
        return np.sqrt(np.mean(((moved - moved.mean(0)) / spread) ** 2))
    exact = of(b)
    spread = exact.std(0) + .1 * exact.std()
    made, _ = quantization.quantize_on(b, pictures[:-6], settings)
    ranges = np.max([quantization.output_ranges(b, b.pixels(i, settings.shape)) for i in pictures[:-6]], 0)
    assert error(made) < .75 * error(quantization.quantize_backbone(b, ranges))


@pytest.mark.parametrize("cell, first", [(16, 64), (32, 24)])
def test_expansions_of_many_channels_have_eight_bits(cell, first):
    """The more pixels a place averages, the more do."""
    settings = fp.Settings(size=64, cell=cell)
    made, _ = quantization.quantize_on(fp.load_backbone("lite0"), noise(1, 1), settings)
    for block in made.blocks[1:]:
        assert block.arrays["input_m"][1] == (127 if block.channels[0] >= first else 1023)


# -- files ---------------------------------------------------------------------------------------

def test_a_model_keeps_the_integers(tmp_path):
    made, _ = quantization.quantize_on(net(), noise(1, 3), SETTINGS)
    prior = tiny_prior(backbone=made)
    prior.save(tmp_path / "m.npz")
    loaded = fp.Prior.load(tmp_path / "m.npz")
    assert loaded.backbone.integer and same(loaded.backbone, made)
    kinds = {k[-2:]: a.dtype for k, a in made.to_arrays().items() if not k.endswith(("stem_w", "dw_w"))}
    assert (kinds["_w"], kinds["_b"], kinds["_m"]) == (np.int8, np.int32, np.float32)
    for image in noise(5, 2):
        assert loaded.score(image).score == prior.score(image).score


def test_info_says_so(tmp_path):
    made, _ = quantization.quantize_on(net(), noise(1, 3), SETTINGS)
    for name, backbone in (("integers", made), ("floats", net())):
        tiny_prior(backbone=backbone).save(tmp_path / "m.npz")
        done = subprocess.run([sys.executable, ROOT / "fastprior.py", "info", tmp_path / "m.npz",
                               "--json"], capture_output=True, text=True)
        assert done.returncode == 0 and json.loads(done.stdout)["features"] == name, done.stderr


# -- held-out images -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sixty():
    """Extracted features of sixty images, the first number of each is its place; 7 and 8 look alike."""
    rng, count = np.random.default_rng(0), 60
    looks = np.array([curation.look(image) for image in noise(6, count, 140, 140)])
    looks[8] = looks[7]
    features = rng.standard_normal((count, 16, 3)).astype(np.float16)
    features[:, 0, 0] = np.arange(count)
    fine = rng.standard_normal((count, 64, 2)).astype(np.float16)
    return extraction.Extracted(features, np.arange(count), looks, [f"{i:016x}" for i in range(count)],
                        list(range(count)), 0, [], fine)


def test_what_decided_ranges_is_never_held_out(sixty, monkeypatch):
    def held_out(ranged, seed):
        seen = []

        def apply(features, *rest):
            seen.append(features[:, 0, 0].astype(int))
            return original(features, *rest)
        with monkeypatch.context() as m:
            m.setattr(fitting, "apply_whitener", apply)
            config = fp.Settings(size=64, cell=16, calibration="holdout", seed=seed)
            e = sixty._replace(ranged=[sixty.keys[i] for i in ranged])
            fitting.whiten_features(e, config, keep_all=True)
        return set(seen[-1].tolist())
    original, decided = fitting.apply_whitener, [7, *range(20, 43)]
    away = [held_out(decided, seed) for seed in range(4)]
    for own in away:
        assert len(own) == 59 // 5 and not own & {8, *decided}
    assert len(set().union(*away)) > 20  # chance decides among the others
    assert any(held_out([], seed) & set(decided) for seed in range(4))


def test_a_training_says_what_decided_its_ranges(monkeypatch):
    seen, original = [], fitting.whiten_features
    monkeypatch.setattr(fitting, "whiten_features", lambda e, *a: seen.append(e.ranged) or original(e, *a))
    images = noise(7, 6)
    made = fp.fit(images, iterations=0, size=64, copies=0)
    assert made.backbone.integer and seen == [sorted(map(fp.image_key, images))]


# -- several products ----------------------------------------------------------------------------

def test_products_quantised_apart_are_refused():
    one, other = (quantization.quantize_on(net(), noise(seed, 3), SETTINGS)[0] for seed in (1, 2))
    with pytest.raises(fp.ModelError, match=r"one backbone.*train them together \(fit_many\)$") as e:
        fp.MultiPrior({"a": tiny_prior(backbone=one), "b": tiny_prior(backbone=other)})
    assert "\n" not in str(e.value)
    with pytest.raises(fp.ModelError, match="fit_many"):
        fp.MultiPrior({"a": tiny_prior(backbone=one), "b": tiny_prior(backbone=net())})
    both = fp.MultiPrior({"a": tiny_prior(backbone=one), "b": tiny_prior(1, backbone=one)})
    assert both.score(noise(3, 1)[0]).product in ("a", "b", "unknown")


@pytest.mark.parametrize("region", [False, True])
def test_fit_many_quantises_once_on_all(tmp_path, monkeypatch, region):
    images, mask = noise(8, 12), np.ones((48, 40), bool)
    mask[:16] = not region
    for i, image in enumerate(images):
        folder = tmp_path / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    calls, ranged, original, whiten = [], [], quantization.quantize_backbone, fitting.whiten_features
    monkeypatch.setattr(quantization, "quantize_backbone", lambda *a: calls.append(1) or original(*a))
    monkeypatch.setattr(fitting, "whiten_features", lambda e, *a: ranged.append(e.ranged) or whiten(e, *a))
    made = fp.fit_many(tmp_path, iterations=0, size=64, copies=0, roi=mask if region else None)
    roi = fp.RegionOfInterest(mask)
    want, keys = quantization.quantize_on(fp.load_backbone("lite0"), images, SETTINGS, roi)
    assert len(calls) == 2 and same(made.backbone, want)  # the second is ours, above
    assert ranged == [keys, keys] and len(keys) == 12
    made.save(tmp_path / "m.npz")
    assert same(fp.Prior.load(tmp_path / "m.npz").backbone, want)
