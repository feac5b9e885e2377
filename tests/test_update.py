"""`update`: a model that grows by good images, without those it was trained on."""
import os
import subprocess
import sys

import numpy as np
import pytest

import fastprior as fp
from conftest import ROOT

extraction = fp._room("extraction")

kept = fp._room("kept")

SIZE = {"size": 64, "copies": 2, "iterations": 0}


@pytest.fixture(scope="module")
def parts(washers):
    files = sorted((washers / "train" / "good").iterdir())
    return files[:14], files[14:]


@pytest.fixture(scope="module")
def grown(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    first = fp.fit(parts[0], features=folder / "first.npz", **SIZE)
    new = first.update(parts[1], folder / "first.npz", features=folder / "all.npz")
    return folder, first, new, fp.fit(parts[0] + parts[1], features=folder / "both.npz",
                                      backbone=first.backbone, **SIZE)


def arrays_of(prior):
    return fp._pack_model({"": prior})[1]


def test_it_is_the_training_on_all_images_bit_for_bit(grown):
    folder, first, new, both = grown
    assert new.settings == both.settings and first.summary["images"] < new.summary["images"]
    of_new, of_both = arrays_of(new), arrays_of(both)
    assert of_new.keys() == of_both.keys()
    for name, a in of_new.items():
        np.testing.assert_array_equal(a, of_both[name], err_msg=name)
    for name in ("images", "held_out", "trained_on", "near_duplicates"):
        assert new.summary[name] == both.summary[name]
    about = kept.about(new.settings, new.backbone)
    have, wanted = (kept.read(folder / f"{name}.npz", about) for name in ("all", "both"))
    assert have.keys == wanted.keys
    assert [have.names[i] for i in have.sources] == [wanted.names[i] for i in wanted.sources]
    np.testing.assert_array_equal(have.features, wanted.features)


def test_the_backbone_stays_and_what_decided_it(grown, parts, washers):
    folder, first, new, _ = grown
    assert first.backbone.integer and new.backbone is first.backbone
    about = kept.about(new.settings, new.backbone)
    before, after = (kept.read(folder / f"{name}.npz", about).ranged for name in ("first", "all"))
    assert before == after == sorted(fp.image_key(fp.load_image(file)) for file in parts[0])
    anew = fp.fit(parts[0] + parts[1], **SIZE)  # whose ranges are those of all images
    assert not np.array_equal(anew.backbone.scales, new.backbone.scales)


def test_new_images_of_another_product_are_doubted(grown, parts, caplog):
    folder, first, _, _ = grown
    new = [fp.load_image(p) for p in parts[1]]
    for images, doubts in ((new, 0), ([255 - a for a in new], 1)):
        caplog.clear()
        first.update(images, folder / "first.npz")
        assert sum("another product" in r.getMessage() for r in caplog.records) == doubts


def test_old_images_among_the_new_count_once(grown, parts):
    folder, _, new, _ = grown
    again = new.update(parts[0][:3], folder / "all.npz")
    assert again.summary["repeated"] == 3 and again.summary["images"] == new.summary["images"]
    for name, a in arrays_of(again).items():
        np.testing.assert_array_equal(a, arrays_of(new)[name], err_msg=name)
    third = new.update([np.asarray(fp.load_image(parts[0][0]))[::-1].copy()], folder / "all.npz",
                       keep_all=True)
    assert third.summary["images"] == new.summary["images"] + 1


def test_where_more_images_leave_room_for_fewer_copies_old_ones_lose_some(grown):
    folder, first, *_ = grown
    e = kept.read(folder / "first.npz", kept.about(first.settings, first.backbone))
    settings = fp.dataclasses.replace(first.settings, copies=1)
    fewer = extraction.extract_features([], settings, first.backbone, known=e)
    assert np.bincount(fewer.owner).tolist() == [2] * len(e.keys)
    np.testing.assert_array_equal(fewer.features[::2], e.features[::3])
    np.testing.assert_array_equal(fewer.features[1::2], e.features[1::3])


@pytest.mark.parametrize("change, message", [
    ({"size": 96}, "another size"), ({"seed": 3}, "another seed"), ({"copies": 3}, "another copies"),
    ({"bits": 12}, "another bits"), ({"backbone": "lite2"}, "another network")])
def test_features_of_another_kind_are_refused(grown, parts, change, message):
    folder, first, *_ = grown
    with pytest.raises(fp.ModelError, match=f"first.npz.*{message}.*train anew"):
        fp.fit(parts[1], known=folder / "first.npz", **SIZE | {"backbone": first.backbone} | change)


def test_a_model_is_no_file_of_features(grown, parts, tmp_path):
    _, first, *_ = grown
    first.save(tmp_path / "model.npz")
    with pytest.raises(fp.ModelError, match="expected features"):
        first.update(parts[1], tmp_path / "model.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "model.npz").read_bytes()[:5000])
    with pytest.raises(fp.ModelError):
        first.update(parts[1], tmp_path / "cut.npz")


def test_what_is_interrupted_leaves_model_and_features_as_they_were(grown, parts, tmp_path):
    folder, first, *_ = grown
    file = tmp_path / "part.features.npz"
    before = (folder / "first.npz").read_bytes()

    def stop(what, *_):
        if what == "calibration":
            raise KeyboardInterrupt
    for again in (lambda: first.update(parts[1], file, features=file, progress=stop),
                  lambda: fp.fit(parts[1], features=file, progress=stop, **SIZE)):
        file.write_bytes(before)
        with pytest.raises(KeyboardInterrupt):
            again()
        assert file.read_bytes() == before


def test_features_of_other_images_than_the_models_are_refused(grown, parts):
    folder, first, new, _ = grown
    for model, file, count in ((first, "all", 24), (new, "first", 14)):
        with pytest.raises(fp.ModelError, match=f"{file}.npz: features of {count} images, not of those"):
            model.update(parts[1], folder / f"{file}.npz")


def test_images_may_come_from_an_iterator(grown, parts):
    folder, first, new, _ = grown
    again = first.update(iter(parts[1]), folder / "first.npz")
    assert again.summary["trained_on"] == new.summary["trained_on"]


def test_images_none_of_which_can_be_read(grown, tmp_path):
    folder, first, *_ = grown
    for i in range(3):
        (tmp_path / f"{i}.png").write_text("no image")
    with pytest.raises(fp.ImageError, match="3 of 3 images cannot be read"):
        first.update(tmp_path, folder / "first.npz")


def test_a_threshold_of_another_zero_and_unit_goes(grown, parts):
    folder, first, new, _ = grown
    settings = fp.dataclasses.replace(first.settings, threshold=7.)
    fixed = first._with(settings, first.calibrations, first.summary)
    assert fixed.update(parts[1], folder / "first.npz").threshold.value == new.threshold.value
    assert fixed.update(parts[1], folder / "first.npz", threshold=6.).threshold.value == 6


def test_factors_are_as_many_as_were_wished_for(parts, tmp_path):
    few = fp.fit(parts[0], features=tmp_path / "f.npz", factors=3, **SIZE)
    assert few.update(parts[1], tmp_path / "f.npz").settings.factors == 3


def test_the_denoiser_stays_while_it_helps(grown, parts, monkeypatch):
    folder, first, new, _ = grown
    n, c = first.mean.shape
    own = fp._room("training").initial_denoiser(n, c, first.settings)
    had = first._with(first.settings, first.calibrations, first.summary | {"loss_start": 1.0, "loss": .95})
    had.denoiser, seen = own, []

    def loss(x0, p, prediction):
        seen.append((len(x0), x0.dtype, prediction))
        return with_it if p else 1.0
    monkeypatch.setattr(fp._room("training"), "denoiser_loss", loss)
    with_it = .97
    kept = had.update(parts[1], folder / "first.npz")
    for name, a in own.items():
        np.testing.assert_array_equal(kept.denoiser[name], a)
    assert kept.summary["gain_kept"] == pytest.approx(.03) and kept.summary["loss"] == .95
    assert seen == [(6, np.float32, "v")] * 2  # two folds of 24
    np.testing.assert_array_equal(kept.whitener, new.whitener)
    with_it = 1.01
    dropped = had.update(parts[1], folder / "first.npz")
    assert dropped.denoiser is None and dropped.summary["gain_kept"] == pytest.approx(-.01)


def test_the_loss_is_the_one_that_training_lowers(trained):
    held = np.random.default_rng(1).standard_normal((2, *trained.mean.shape)).astype(np.float32)
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(held)
    total = []
    rng = np.random.default_rng(0)
    for i in range(2):
        for t in (50, 100, 200, 400):
            eps, abar = rng.standard_normal(held.shape[1:], np.float32), float(fp._alpha_bar_table()[t])
            noisy = abar ** .5 * x[i] + (1 - abar) ** .5 * torch.from_numpy(eps)
            p = {k: torch.from_numpy(a) for k, a in trained.denoiser.items()}
            f = fp._room("training").torch_denoise(torch, p, noisy[None], torch.tensor([t]))[0]
            target = abar ** .5 * torch.from_numpy(eps) - (1 - abar) ** .5 * x[i]
            total.append(float(((f - target) ** 2).mean()))
    loss = fp._room("training").denoiser_loss(held, trained.denoiser, "v")
    assert loss == pytest.approx(np.mean(total), rel=1e-4)


def test_the_loss_without_a_denoiser_is_that_of_the_target():
    x = np.random.default_rng(1).standard_normal((3, 4, 500)).astype(np.float32)
    loss = fp._room("training").denoiser_loss
    assert loss(x, None, "v") == pytest.approx(1, abs=.03)  # both have unit variance
    assert loss(3 * x, None, "eps") == pytest.approx(1, abs=.03)


def run(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "fastprior.py"), *map(str, arguments)],
                          capture_output=True, text=True)


def test_the_command(washers, parts, tmp_path):
    for name, files in zip(("old", "more"), parts):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    options = "--size", "64", "--iterations", "0"
    done = run("train", tmp_path / "old", "-o", tmp_path / "part.npz", "--keep-features", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "part.features.npz").is_file()
    done = run("update", tmp_path / "more", "-m", tmp_path / "part.npz", "-o", tmp_path / "new.npz")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "new.npz"), done.stderr
    assert (tmp_path / "new.features.npz").is_file()
    new = fp.Prior.load(tmp_path / "new.npz")
    assert new.summary["images"] + len(new.summary["set_aside"]) == 24
    assert f"{new.summary['images']} held-out good images" in done.stderr
    before = {p.name: p.read_bytes() for p in tmp_path.glob("*.npz")}
    code = ("import sys, fastprior as fp\ndef full(*_): raise fp.FastPriorError('disk full')\n"
            "fp.Prior.save = full\nfp.main()")
    for arguments in (["update", "more", "-m", "part.npz", "-o", "part.npz"],
                      ["train", "more", "-o", "part.npz", "--keep-features", *options]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 2 and "disk full" in done.stderr, done
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    (tmp_path / "part.features.npz").unlink()
    done = run("update", tmp_path / "more", "-m", tmp_path / "part.npz", "-o", tmp_path / "no.npz")
    assert done.returncode == 2 and "--keep-features" in done.stderr and not (tmp_path / "no.npz").exists()
