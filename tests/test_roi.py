"""The region of interest: what lies outside changes nothing, and what is promised is promised inside."""
import dataclasses
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastprior as fp
from damaged_models import half, tiny_prior

extraction = fp._room("extraction")
fitting = fp._room("fitting")

HEIGHT, WIDTH = 72, 96
ROWS, COLUMNS = np.mgrid[:HEIGHT, :WIDTH]
MASK = (ROWS >= 6) & (COLUMNS < 70)
MASK[44:58, 20:44] = False  # a label
SETTINGS = {"iterations": 0, "size": (64, 64), "copies": 1, "worst": .2}


def part(rng):
    """A disc on a dark ground, uint8 (72, 96, 3)."""
    shade = np.where(np.hypot(ROWS - 34, COLUMNS - 36) < 26, rng.normal(170, 5), 50)
    return (shade[:, :, None] + rng.normal(0, 4, (HEIGHT, WIDTH, 3))).clip(0, 255).astype(np.uint8)


def parts(seed, count):
    rng = np.random.default_rng(seed)
    return [part(rng) for _ in range(count)]


def spoilt(image, mask=MASK):
    """Another content wherever the mask is 0, and white right beside the region."""
    noise = np.random.default_rng(5).integers(0, 256, image.shape, np.uint8)
    noise[:6], noise[:, 70:76] = 255, 255
    return np.where(mask[:, :, None], image, noise)


def scratched(image):
    out = image.copy()
    out[30:40, 30:42] = 10
    return out


@pytest.fixture(scope="module")
def prior():
    return fp.fit(parts(0, 24), roi=MASK, **SETTINGS)


@pytest.fixture(params=["engine", "numpy"])
def scoring(request, prior, monkeypatch):
    """The model by the CPU engine and by NumPy."""
    if request.param == "numpy":
        monkeypatch.setattr(fp, "_cpu_engines", lambda *_: None)
    made = pickle.loads(pickle.dumps(prior))
    assert made.backend == ("numpy" if request.param == "numpy" else "numba")
    return made


def same(a, b):
    for name, array in fp._arrays_of(a).items():
        np.testing.assert_array_equal(array, fp._arrays_of(b)[name], err_msg=name)
    assert fp._arrays_of(a).keys() == fp._arrays_of(b).keys() and a.settings == b.settings


# -- scores, maps ------------------------------------------------------------------------------------

def test_what_is_outside_changes_nothing_bit_for_bit(scoring):
    for image in parts(1, 3) + [scratched(part(np.random.default_rng(2)))]:
        a, b = scoring.score(image), scoring.score(spoilt(image))
        assert (a.score, a.verdict, a.regions) == (b.score, b.verdict, b.regions)
        np.testing.assert_array_equal(a.anomaly_map, b.anomaly_map)
        np.testing.assert_array_equal(scoring.z([image]), scoring.z([spoilt(image)]))


def test_without_the_region_it_does():
    whole = fp.fit(parts(0, 24), **SETTINGS)
    image = parts(1, 1)[0]
    assert whole.score(spoilt(image)).score > 10 + whole.score(image).score


def test_a_defect_inside_is_found(scoring):
    good, bad = parts(1, 1)[0], scratched(parts(1, 1)[0])
    assert scoring.score(good).verdict == "good" and scoring.score(bad).verdict == "anomaly"
    first = scoring.score(bad).regions[0]
    assert first.left < 36 < first.right and first.top < 35 < first.bottom


@pytest.mark.parametrize("scale", [.5, 1, 2])
def test_the_map_ends_with_the_region_at_any_size(scoring, scale):
    size = int(WIDTH * scale), int(HEIGHT * scale)
    image = np.asarray(Image.fromarray(scratched(parts(1, 1)[0])).resize(size))
    mask = np.asarray(Image.fromarray(MASK).resize(size, Image.Resampling.NEAREST))
    got = scoring.score(image).anomaly_map
    assert got.shape == mask.shape and (got[~mask] == 0).all() and (got[mask] != 0).mean() > .99


def test_a_place_counts_if_half_of_it_is_inside(prior):
    share = MASK.reshape(4, HEIGHT // 4, 4, WIDTH // 4).mean((1, 3)).ravel()
    np.testing.assert_array_equal(prior.inside, share >= .5)
    assert 0 < prior.inside.sum() < 16 and len(prior.mean) == prior.inside.sum()


@pytest.mark.parametrize("worst", [.2, .8, 1.0])
def test_the_score_is_the_mean_of_the_worst_share_of_the_places_inside(scoring, worst):
    scoring = scoring._with(dataclasses.replace(scoring.settings, worst=worst), scoring.calibrations, {})
    image = parts(1, 1)[0]
    z, n = scoring.z([image])[0], int(scoring.inside.sum()) + len(scoring.cells)
    assert z.shape == (n,) and round(worst * n) != round(worst * 20) and (z < 0).any()
    zero, unit = scoring.calibration["moments"][:2]
    want = (np.sort(z)[-round(worst * n):].mean() - zero) / unit
    assert scoring.score(image).score == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("model", [
    {}, {"variant": "plain"}, {"denoiser": False}, {"act": fp.SILU, "squeeze": True}],
    ids=["denoiser", "plain", "no-denoiser", "silu"])
def test_engine_and_reference_agree(model):
    """The engine computes all places, the reference those inside only."""
    prior = tiny_prior(roi=half(), **model)
    images = [prior.roi.paint(a) for a in np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8)]
    want = prior._reference_frames(images, True)
    for result, score, m in zip(prior.score_batch(images), want.scores, want.maps):
        assert result.score == pytest.approx(score, rel=1e-3, abs=1e-3)
        np.testing.assert_allclose(result.anomaly_map, m, rtol=1e-3, atol=1e-3)
        assert (m != 0).any()


@pytest.mark.parametrize("size", [(40, 56), (80, 112), (33, 46)])
def test_the_exported_graph_agrees(size):
    pytest.importorskip("onnx", reason="onnx is in the extras `export` and `test`")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `test`")
    prior = tiny_prior(roi=half())
    session = onnxruntime.InferenceSession(fp._room("export").prior_model(prior, "x", {}),
                                           providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    score, maps = session.run(["score", "map"], {"pixels": pixels})
    for a, m, r in zip(score, maps, prior.score_batch(list(pixels))):
        assert a == pytest.approx(r.score, rel=1e-4, abs=1e-4)
        np.testing.assert_allclose(m, r.anomaly_map, rtol=1e-4, atol=1e-4)
    pixels[:, ~prior.roi.at(*size)[0]] = 255
    again = session.run(["score", "map"], {"pixels": pixels})
    np.testing.assert_array_equal(again[0], score)
    np.testing.assert_array_equal(again[1], maps)


# -- training, calibration, files ----------------------------------------------------------------------

def test_training_does_not_see_what_is_outside(prior):
    same(fp.fit([spoilt(image) for image in parts(0, 24)], roi=MASK, **SETTINGS), prior)


def test_what_is_painted_stays_in_place_when_a_copy_is_shifted():
    hole = np.ones((64, 64), bool)
    hole[20:40, 28:36] = False
    shift = 8 / 64, -4 / 64  # whole pixels, so that nothing is interpolated
    painted = fp.RegionOfInterest(hole).paint(np.full((64, 64, 3), 255, np.uint8), shift)
    moved = fp.resize_normalize(painted, 64, (0, 0, 0), (1 / 255,) * 3, shift)
    np.testing.assert_allclose(moved, np.where(hole, 255, fp.GREY)[:, :, None].repeat(3, 2), atol=1e-9)


def test_copies_are_painted_too(monkeypatch):
    seen, tokens = [], fp._reference_tokens
    monkeypatch.setattr(fp, "_feature_engine", lambda *_, **__: None)
    monkeypatch.setattr(fp, "_reference_tokens",
                        lambda image, *at: seen.append((image, at[2])) or tokens(image, *at))
    region = fp.RegionOfInterest(MASK)
    settings, backbone = fp.Settings(size=64, copies=3), fp.load_backbone("lite0")
    e = extraction.extract_features(parts(0, 1), settings, backbone, roi=region)
    assert len(seen) == 4 and e.features.shape[:2] == (4, fp._inside(region, (4, 4)).sum())
    for image, shift in seen:
        outside = ~region.at(HEIGHT, WIDTH, shift)[0]
        assert (image[outside] == fp.GREY).all() and (image[~outside] != fp.GREY).mean() > .9


def test_the_denoiser_knows_the_places_inside_only():
    made = fp.fit(parts(0, 12), roi=MASK, **SETTINGS | {"iterations": 1})
    assert made.denoiser["pos"].shape[0] == made.inside.sum() < 16
    assert .7 < made.summary["loss_start"] < 1.3  # of noise: it is not diluted by places that hold none


def test_the_fine_view_is_that_of_the_places_inside():
    rng, region = np.random.default_rng(0), fp.RegionOfInterest(MASK)
    fine, settings = rng.standard_normal((6, 64, 5)).astype(np.float16), fp.Settings(size=64)
    outside = ~fp._inside(region, (8, 8))
    changed = fine.copy()
    changed[:, outside] *= 9
    (_, a), (_, b), (_, c) = (fitting.fit_fine(x, settings, r)
                              for x, r in ((fine, region), (changed, region), (changed, None)))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(b, c) and outside.any()
    near = fp._details(fine, *fitting.fit_fine(fine, settings, region), settings, region) > 0
    seen = np.zeros((8, 8), bool)  # those that a pixel inside is interpolated from, by brute force
    (y, dy), (x, dx) = fp.linear_taps(8, HEIGHT), fp.linear_taps(8, WIDTH)
    for i, j in np.argwhere(MASK):
        seen[y[i]:y[i] + 1 + (dy[i] > 0), x[j]:x[j] + 1 + (dx[j] > 0)] = True
    assert (near[:, seen]).all() and not near.all()


def test_a_region_of_the_whole_image_is_none():
    whole, plain = (fp.fit(parts(0, 12), roi=roi, **SETTINGS) for roi in (np.ones_like(MASK), None))
    same(whole, plain)
    assert whole.roi is None and whole.inside.all()


def test_it_is_stored_in_the_file(prior, tmp_path):
    prior.save(tmp_path / "part.npz")
    again = fp.Prior.load(tmp_path / "part.npz", fpr=.05)
    np.testing.assert_array_equal(again.roi.mask, MASK)
    a, b = prior.score(parts(1, 1)[0]), again.score(spoilt(parts(1, 1)[0]))
    assert a.score == b.score and a.anomaly_map.any()
    same(fp.Prior.load(tmp_path / "part.npz"), prior)
    assert (tmp_path / "part.npz").stat().st_size < 7e6


@pytest.mark.parametrize("name, value", [
    ("roi/size", np.array([HEIGHT, WIDTH + 8])), ("roi/size", np.array([4, 4])), ("roi/size", None),
    ("roi/size", np.array([[HEIGHT, WIDTH]])), ("roi/size", np.array([0, WIDTH])),
    ("roi/size", np.array([1 << 62, 8])), ("roi/bits", np.zeros(864, np.uint8)), ("roi/bits", None),
    ("roi/bits", np.ones(864, np.float32)), ("roi/bits", np.full(864, 255, np.uint8))])
def test_a_damaged_region_is_refused(prior, tmp_path, name, value):
    header, arrays = fp._pack_model({"": prior})
    arrays[name] = value
    fp._write_npz(tmp_path / "x.npz", header, {k: a for k, a in arrays.items() if a is not None})
    with pytest.raises(fp.ModelError, match="x.npz: [^\n]+$"):
        fp.Prior.load(tmp_path / "x.npz")


def test_calibrate_keeps_the_region_in_force(prior):
    new = parts(7, 20)
    a, b = prior.calibrate(new, keep_all=True), prior.calibrate([spoilt(x) for x in new], keep_all=True)
    same(a, b)
    assert a.roi is prior.roi and a.threshold != prior.threshold
    scores = [r.score for r in a.score_batch(new)]
    np.testing.assert_allclose(np.sort(scores), a.calibration["scores"], rtol=1e-3, atol=1e-3)
    assert max(r.anomaly_map.max() for r in a.score_batch(new)) <= 1.005  # fine features are kept in float16
    with pytest.raises(fp.ImageError, match="trained on"):
        prior.calibrate([spoilt(image) for image in parts(0, 24)])


def test_update_is_training_at_once_with_the_same_region(prior, tmp_path):
    few = fp.fit(parts(0, 12), roi=MASK, features=tmp_path / "features.npz", backbone=prior.backbone,
                 **SETTINGS)
    same(few.update(parts(0, 24)[12:], tmp_path / "features.npz"), prior)
    with pytest.raises(fp.ModelError, match="another region"):
        few.update(parts(0, 24)[12:], tmp_path / "features.npz", roi=~MASK)


def test_several_products_have_one_region(prior):
    shared = SETTINGS | {"backbone": prior.backbone}
    second = fp.fit([255 - image for image in parts(3, 12)], roi=MASK, **shared)
    both = fp.MultiPrior({"a": prior, "b": second})
    for image, name, own in ((parts(1, 1)[0], "a", prior), (255 - parts(4, 1)[0], "b", second)):
        a, b = both.score(image), both.score(spoilt(image))
        assert a.product == b.product == name and a.score == b.score == pytest.approx(own.score(image).score)
        np.testing.assert_array_equal(a.anomaly_map, b.anomaly_map)
    with pytest.raises(fp.ModelError, match="one region"):
        fp.MultiPrior({"a": prior, "b": fp.fit(parts(3, 12), **shared)})


# -- masks, polygons, errors -----------------------------------------------------------------------------

def read(path, text):
    path.write_text(json.dumps(text))
    return fp._room("region").read_mask(path)


def test_polygons_are_those_of_matplotlib(tmp_path):
    path = pytest.importorskip("matplotlib.path", reason="matplotlib is in the extra `test`")
    rng = np.random.default_rng(0)
    polygons = [rng.uniform(0, [90, 60], (3, 2)).tolist() for _ in range(4)]
    polygons.append([[2, 3], [40, 3], [40, 50], [20, 20.5], [2, 50]])
    centres = np.stack(np.meshgrid(np.arange(90) + .5, np.arange(60) + .5), -1).reshape(-1, 2)
    want = np.zeros((60, 90), bool)
    for polygon in polygons:
        want ^= path.Path(polygon).contains_points(centres).reshape(60, 90)
    np.testing.assert_array_equal(read(tmp_path / "a.json", {"size": [90, 60], "polygons": polygons}), want)
    assert .05 < want.mean() < .95


def test_a_polygon_within_another_is_a_hole(tmp_path):
    box = {"size": [WIDTH, HEIGHT], "polygons": [[[0, 6], [70, 6], [70, HEIGHT], [0, HEIGHT]],
                                                 [[20, 44], [44, 44], [44, 58], [20, 58]]]}
    np.testing.assert_array_equal(read(tmp_path / "a.json", box), MASK)


@pytest.mark.parametrize("text", [
    [], {"size": [90, 60]}, {"size": [90, 60], "polygons": [[[1, 1], [2, 2]]]},
    {"size": [90], "polygons": []}, {"size": [90, "60"], "polygons": []}, {"size": [9e9, 60], "polygons": []},
    {"size": [90, 60], "polygons": [[[1, 1], [91, 2], [3, 50]]]}, {"size": [90, 60], "polygons": [1]},
    {"size": [90, 60], "polygons": [[[1, 1], [float("nan"), 2], [3, 50]]]},
    {"size": [90, 60], "polygons": [], "holes": []}, {"size": [1 << 40, 1 << 40], "polygons": []}])
def test_what_is_no_polygon_is_refused(tmp_path, text):
    with pytest.raises(fp.ShapeError, match="^roi: [^\n]+a.json: expected [^\n]+$"):
        read(tmp_path / "a.json", text)


@pytest.mark.parametrize("mode, low", [("L", 1), ("RGB", 3), ("1", 255), ("I;16", 1), ("P", 1)])
def test_masks_of_any_kind(tmp_path, mode, low):
    mask = Image.fromarray(MASK.astype(np.uint16 if mode == "I;16" else np.uint8) * low)
    if mode == "P":
        mask = mask.convert("P")
        mask.putpalette([0, 0, 0, 200, 0, 0])
    (mask if mode in ("I;16", "P") else mask.convert(mode)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(fp._room("region").read_mask(tmp_path / "mask.png"), MASK)


def fit_with(roi, count=5):
    return fp.fit(parts(0, count), roi=roi, **SETTINGS)


def test_what_is_no_region_is_refused(tmp_path):
    thin = np.zeros_like(MASK)
    thin[10:12] = True
    clear = Image.fromarray(np.dstack([MASK.astype(np.uint8) * 255] * 4))
    clear.save(tmp_path / "clear.png")
    clear.convert("RGB").save(tmp_path / "mask.jpg")
    clear.convert("RGB").save(tmp_path / "renamed.png", format="JPEG")
    clear.convert("RGB").save(tmp_path / "mask.webp")
    (tmp_path / "text.png").write_text("no image")
    for roi, why in (
            (np.zeros_like(MASK), "expected a mask .* 0 not 0"), (MASK[..., None], "expected a mask"),
            (MASK * 1.0, "expected a mask"), (MASK[:, :90], "90x72 pixels, but images of 96x72"),
            (thin, "at least half inside"), (tmp_path / "clear.png", "transparent"),
            (tmp_path / "mask.jpg", "in a JPEG black.*PNG"),
            (tmp_path / "renamed.png", "in a JPEG black.*PNG"), (tmp_path / "mask.webp", "in a WEBP black"),
            (tmp_path / "text.png", "text.png: expected a mask"),
            (tmp_path / "none.png", "no such file")):
        with pytest.raises(fp.ShapeError, match=f"^roi: [^\n]*{why}[^\n]*$"):
            fit_with(roi)


def test_larger_and_smaller_images_are_taken_in_any_order():
    """By proportions, as `score` takes them; others are named one by one."""
    images = [*parts(0, 5), np.kron(parts(9, 1)[0], np.ones((2, 2, 1), np.uint8)), parts(1, 1)[0][:, :80]]
    for some in (images, images[::-1]):
        made = fp.fit(some, roi=MASK, **SETTINGS)
        assert made.summary["images"] == 6 and len(made.summary["unreadable"]) == 1
    assert fit_with(np.kron(MASK, np.ones((2, 2), bool))).roi is not None


def test_an_image_of_other_proportions_is_an_error_of_its_own(prior, tmp_path):
    Image.fromarray(parts(1, 1)[0][:, :80]).save(tmp_path / "cut.png")
    good, other = prior.score_batch([parts(1, 1)[0], tmp_path / "cut.png"], errors="return")
    assert good.verdict == "good" and isinstance(other, fp.ImageError)
    assert "cut.png: 80x72 pixels, but the region is for 96x72" in str(other)
    with pytest.raises(fp.ShapeError, match="image: 80x72 pixels"):
        prior.score(parts(1, 1)[0][:, :80])
    near = np.asarray(Image.fromarray(parts(1, 1)[0]).resize((35, 26)))  # 26.25 rounded
    assert np.isfinite(prior.score(near).score)


# -- the command -------------------------------------------------------------------------------------------

def run(*args):
    return CliRunner().invoke(fp._room("commands").build_app(), [*map(str, args)], catch_exceptions=True)


def test_the_command(tmp_path):
    (tmp_path / "good").mkdir()
    for i, image in enumerate(parts(0, 24)):
        Image.fromarray(image).save(tmp_path / "good" / f"{i:02}.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(spoilt(parts(1, 1)[0])).save(tmp_path / "new.png")
    model, at = tmp_path / "part.npz", ["--size", "64x64", "--iterations", 0]
    done = run("train", tmp_path / "good", "--roi", tmp_path / "mask.png", "-o", model, *at)
    made = fp.Prior.load(model)
    told = f"{MASK.mean():.1%} of the image, {made.inside.sum()} of 16 places"
    assert done.exit_code == 0 and f"looks at {told}" in done.stderr
    assert told in json.loads(run("info", model, "--json").stdout)["looks_at"]
    assert json.loads(run("info", fp.demo_model(), "--json").stdout)["looks_at"] == "the whole image"
    done = run("score", "-m", model, tmp_path / "new.png", "--mask", tmp_path / "masks", "--json",
               "--report", tmp_path / "page.html")
    assert done.exit_code == 0 and json.loads(done.stdout)["regions"] == []
    assert not np.asarray(Image.open(tmp_path / "masks" / "new.png.mask.png")).any()
    assert "most of" not in done.stderr and (tmp_path / "page.html").exists()
    done = run("score", "-m", model, tmp_path / "good")
    assert "24 of 24 images were trained on" in done.stderr
    with fp._room("watch").Watch(made, tmp_path / "good", journal=tmp_path / "journal") as stream:
        assert next(iter(stream)).row["verdict"] == "good"
    done = run("train", tmp_path / "good", "--roi", tmp_path / "none.png", "-o", tmp_path / "x.npz", *at)
    assert isinstance(done.exception, fp.ShapeError) and not (tmp_path / "x.npz").exists()
