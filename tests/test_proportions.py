"""Images that are not square: a grid of their proportions, and the same scores by every engine."""
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastprior as fp
from test_cli import refused, run

curation = fp._room("curation")
HEIGHT, WIDTH = 80, 200


def parts(seed, count, shape=(HEIGHT, WIDTH)):
    rng = np.random.default_rng(seed)
    wave = np.sin(np.mgrid[:shape[0], :shape[1]].sum(0) / 9)[:, :, None] * 50 + 120
    return [(wave * rng.normal(1, .02) + rng.normal(0, 4, (*shape, 3))).clip(0, 255).astype(np.uint8)
            for _ in range(count)]


@pytest.fixture(scope="module")
def prior():
    return fp.fit(parts(0, 16), size=128, copies=1, iterations=5)


@pytest.mark.parametrize("size, cell, sides, want", [
    (448, 0, (480, 640), (384, 512)), (448, 0, (1080, 1920), (320, 576)), (448, 0, (1920, 1080), (576, 320)),
    (448, 0, (700, 720), 448), (448, 0, (512, 8192), (128, 2048)), (256, 0, (480, 640), (224, 288)),
    (448, 0, (8, 60000), (64, 8192)), (1024, 0, (100, 300), (576, 1728)),
    (96, 48, (100, 200), (96, 192)), (64, 0, (20, 1000), (64, 3200)), (1024, 512, (100, 500), (512, 2048)),
    (1024, 0, (100, 110), (992, 1056))])
def test_a_side_is_that_of_a_square_of_the_same_area(size, cell, sides, want):
    settings = fp.Settings(size=size, cell=cell)
    got = curation.find_shape([sides] * 3 + [(9, 9)], settings)
    made = fp.Settings(size=got, cell=settings.cell)
    made.check()
    assert got == want and made.shape == ((want, want) if isinstance(want, int) else want)
    assert fp.Settings(size=list(made.shape)) == fp.Settings(size=made.shape)  # as a file holds it


def test_random_proportions_are_always_settings():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        cell = int(rng.choice([16, 32, 48, 64, 96, 128]))
        unit = int(np.lcm(cell, 32))
        settings = fp.Settings(size=unit * int(rng.integers(-(-64 // unit), 1024 // unit + 1)), cell=cell)
        settings.check()
        sides = tuple(np.exp(rng.uniform(np.log(8), np.log(65535), 2)).astype(int))
        got = fp.Settings(size=curation.find_shape([sides], settings), cell=cell)
        got.check()
        mirrored = fp.Settings(size=curation.find_shape([sides[::-1]], settings), cell=cell)
        assert mirrored.shape == got.shape[::-1]


def test_what_the_user_names_stays():
    shapes = [(100, 300)] * 3
    assert curation.find_shape(shapes, fp.Settings(size=(320, 640))) == (320, 640)
    assert curation.find_shape(shapes, fp.Settings(size=(448, 448))) == 448
    assert curation.find_shape(shapes, fp.Settings(tile=64)) == 448
    assert curation.find_shape([], fp.Settings()) == 448
    for size in ((64,), (64, 64, 64), (64, 80), (32, 64), (64, 8224), (2048, 1024), (64., 64), "64",
                 (True, 64), [], 10 ** 400, (64, 10 ** 400)):
        with pytest.raises(fp.ShapeError, match="size: expected a .*multiples? of 32 from 64 to"):
            fp.Settings(size=size).check()
    with pytest.raises(fp.ShapeError, match="cell: .* multiple of 16 that divides"):
        fp.Settings(size=(448, 320), cell=64 + 48).check()
    with pytest.raises(fp.ShapeError, match="tile: its windows, squares, need a square size, not 320x448"):
        fp.Settings(size=(448, 320), tile=64).check()


def test_training_takes_the_proportions_of_most_images(prior, tmp_path):
    assert prior.settings.size == (96, 256) and prior.grid == (6, 16) and len(prior.mean) == 96
    for i, image in enumerate(parts(0, 16)):  # a camera that lies on its side, by EXIF
        turned, exif = Image.fromarray(image).transpose(Image.Transpose.ROTATE_90), Image.Exif()
        exif[274] = 6
        turned.save(tmp_path / f"{i:02}.png", exif=exif)
    np.testing.assert_array_equal(fp.load_image(tmp_path / "00.png"), parts(0, 1)[0])
    again = fp.fit(tmp_path, size=128, copies=1, iterations=5)
    assert again.settings == prior.settings
    np.testing.assert_array_equal(again.calibration["scores"], prior.calibration["scores"])


def test_every_engine_agrees_and_the_map_lies_right(prior, tmp_path):
    images = parts(1, 2) + parts(2, 1, (40, 100)) + parts(3, 1, (90, 90))
    images[0][20:30, 160:172] = 0
    want = prior._reference_frames(images, True)
    got = prior.score_batch(images)
    np.testing.assert_allclose([r.score for r in got], want.scores, rtol=1e-3, atol=1e-3)
    for r, image, m in zip(got, images, want.maps):
        assert r.anomaly_map.shape == image.shape[:2]
        np.testing.assert_allclose(r.anomaly_map, m, rtol=1e-3, atol=1e-3)
    y, x = np.unravel_index(got[0].anomaly_map.argmax(), (HEIGHT, WIDTH))
    assert got[0].is_anomaly and 14 <= y < 36 and 154 <= x < 178
    prior.save(tmp_path / "m.npz")
    again = fp.Prior.load(tmp_path / "m.npz")
    assert again.settings == prior.settings and again.score(images[0]).score == got[0].score


def test_the_exported_graph_agrees(prior):
    pytest.importorskip("onnx", reason="onnx is in the extras `export` and `test`")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `test`")
    session = onnxruntime.InferenceSession(fp._room("export").prior_model(prior, "x", {}),
                                           providers=["CPUExecutionProvider"])
    for image in parts(4, 1) + parts(5, 1, (50, 60)):
        (score,), (m,) = session.run(None, {"pixels": image[None]})
        want = prior.score(image)
        np.testing.assert_allclose(score, want.score, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(m, want.anomaly_map, rtol=1e-4, atol=1e-3)


def test_a_region_of_such_images():
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[:, 60:] = True
    made = fp.fit(parts(0, 16), size=128, copies=1, iterations=0, roi=mask)
    inside = made.inside.reshape(made.grid)
    assert made.grid == (6, 16) and not inside[:, :4].any() and inside[:, 5:].all()
    spoilt = parts(1, 1)[0]
    spoilt[:, :60] = 0
    assert made.score(spoilt).score == made.score(parts(1, 1)[0]).score


def test_more_images_keep_the_model_s_proportions(prior, tmp_path, capsys):
    made = fp.fit(parts(0, 16), size=128, copies=1, iterations=0, features=tmp_path / "f.npz")
    more = made.update(parts(6, 8, (90, 90)), tmp_path / "f.npz")
    assert more.settings.size == made.settings.size and more.summary["images"] == 24
    assert more.summary["proportions"] == [1, 2.5]
    for model, said in ((made, False), (more, True)):
        fp._room("console").tell_training(model)
        assert ("proportions (width / height 1.00 to 2.50) are squashed" in capsys.readouterr().err) == said


@pytest.mark.parametrize("name", ["t.tif", "p.png", "j.jpg", "w.webp"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_proportions_are_those_of_the_upright_image(tmp_path, name, turn):
    """And nothing is decoded to learn them."""
    exif = Image.Exif()
    exif[274] = turn
    Image.fromarray(parts(0, 1, (40, 120))[0]).save(tmp_path / name, exif=exif)
    settled, _ = curation.settle([tmp_path / name], fp.Settings(size=64))
    upright = fp.load_image(tmp_path / name).shape[:2]
    assert settled.shape == {(40, 120): (64, 192), (120, 40): (192, 64)}[upright]
    with Image.open(tmp_path / name) as image:
        assert fp._pixels(image, deep_only=True).shape == upright
        image.load()
        assert fp._pixels(image, deep_only=True).shape == fp.load_image(image).shape[:2]


def test_a_png_is_not_decoded_to_learn_its_proportions(tmp_path, monkeypatch):
    Image.fromarray(parts(0, 1)[0]).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda *_: pytest.fail("decoded"))
    assert fp._pixels(tmp_path / "a.png", deep_only=True).shape == (HEIGHT, WIDTH)


def test_products_of_several_proportions_share_one(tmp_path):
    for name, shape in (("wide", (60, 120)), ("wider", (60, 240))):
        (tmp_path / name).mkdir()
        for i, image in enumerate(parts(len(name), 8, shape)):
            Image.fromarray(image).save(tmp_path / name / f"{i}.png")
    made = fp.fit_many(tmp_path, size=128, copies=0, iterations=0)
    assert {(p.settings.size, p.settings.cell) for p in made.priors.values()} == {((96, 192), 16)}


def test_the_command(tmp_path):
    (tmp_path / "good").mkdir()
    for i, image in enumerate(parts(0, 12)):
        Image.fromarray(image).save(tmp_path / "good" / f"{i}.png")
    model, app = tmp_path / "m.npz", fp._room("commands").build_app()
    for given, size, grid in (("128", "256x96", "16x6"), ("128x64", "128x64", "8x4"), ("64X64", 64, "4x4")):
        done = run("train", tmp_path / "good", "-o", model, "--size", given, "--iterations", 0)
        assert done.returncode == 0 and ("x" not in str(size) or f"resized to {size}," in done.stderr), done
        told = json.loads(CliRunner().invoke(app, ["info", str(model), "--json"]).stdout)
        assert told["size"] == size and told["grid"] == grid
    for options, words in ((["12by8"], ("--size", "WIDTHxHEIGHT", "12by8")),
                           (["64x64x64"], ("--size", "WIDTHxHEIGHT")), (["-64"], ("--size", "WIDTHxHEIGHT")),
                           (["1024x2048"], ("size", "8192", "got '1024x2048'")),
                           (["128x64", "--tiles", "64"], ("tile", "squares"))):
        done = CliRunner().invoke(app, ["train", str(tmp_path / "good"), "-o", "m", "--size", *options])
        assert isinstance(done.exception, fp.ShapeError) and all(w in str(done.exception) for w in words)
    done = run("bench", "--size", "96x64", "--input-size", "120x80", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["size"] == "96x64" and told["input_size"] == "120x80"
    refused(run("bench", "--input-size", "9999999"), "8 to 65535 pixels a side")


def test_images_of_other_proportions_are_said_once(prior, tmp_path):
    assert prior.summary["proportions"] == [2.5, 2.5]
    model = tmp_path / "m.npz"
    prior.save(model)
    for i, image in enumerate(parts(1, 2) + parts(2, 2, (90, 90)) + parts(3, 1, (40, 101))):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    done = run("score", tmp_path / "0.png", tmp_path / "1.png", tmp_path / "4.png", "-m", model)
    assert "other proportions" not in done.stderr
    done = run("score", tmp_path, "-m", model)
    text = "90x90 pixels: other proportions than the images that trained (width / height 2.50)"
    assert done.stderr.count(text) == 1
    with fp._room("watch").Watch(prior, tmp_path, journal=tmp_path / "journal") as stream:
        assert len([*itertools.islice(stream, 5)]) == 5 and len(stream.told) == 1


@pytest.mark.parametrize("told", [None, 3, [1], ["a", "b"], [[], []], {}, {"a": 1, "b": 2}])
def test_proportions_of_a_file_are_not_trusted(prior, told):
    made = prior._with(prior.settings, prior.calibrations, prior.summary | {"proportions": told})
    assert curation.squashed((90, 90, 3), made) == ""
