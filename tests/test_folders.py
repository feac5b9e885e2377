"""Folders: what is taken, what is left out and said, what is an error; and where outputs go."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fastprior as fp
from conftest import ROOT

folders = fp._room("folders")

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))


def tree(root, *names):
    """Files (images where their suffix says so) and folders (with a slash at the end)."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg", ".bmp", ".tif", ".gif", ".webp", ".jfif"):
            PICTURE.save(path, "JPEG" if path.suffix in (".jpg", ".jfif") else None)
        elif not name.endswith("/"):
            path.write_text("no image")
    return root


def under(root, *patterns):
    found = folders.find_all([str(root / p) if p else p for p in patterns])
    errors = {str(p).replace(str(root) + "/", ""): e for p, e in found.errors.items()}
    return {str(p.relative_to(root)) for p in found.images}, errors, found


# -- scanning ----------------------------------------------------------------------------------------

def test_what_is_taken_and_what_is_left_out(tmp_path):
    root = tree(tmp_path / "in", "a.png", "b/c.JPG", "b/c/d.tif", "e.jfif", "f.gif", "g.webp", "._a.png",
                ".thumbs/a.png", "notes.txt", "b/x.jp2",
                "README", "__MACOSX/a.png", "a.png.map.png", "b/c.JPG.3fa2b1c4.mask.png",
                "photo.png/inside.png")
    PICTURE.save(root / "b" / "c.JPG", "JPEG")
    images, errors, found = under(root, "")[0] or under(tmp_path, "in")
    assert images == {f"in/{n}" for n in ("a.png", "b/c.JPG", "b/c/d.tif", "e.jfif", "f.gif", "g.webp",
                                          "photo.png/inside.png")} and not errors
    assert str(found) == ("left out: 3 hidden, 2 maps and masks of fastprior, "
                          "3 not images (.jp2, .txt, no suffix)")
    assert list(found.images) == sorted(found.images)


def test_links_are_followed_once(tmp_path):
    root = tree(tmp_path / "in", "a/x.png", "b/")
    tree(tmp_path / "elsewhere", "y.png", "deep/z.png")
    for link, to in {"b/loop": "..", "other": tmp_path / "elsewhere", "again": tmp_path / "elsewhere",
                     "x too.png": "a/x.png",
                     "gone.png": "nowhere", "gone": "/nowhere/at all", "self": "self"}.items():
        os.symlink(to, root / link)
    images, errors, found = under(tmp_path, "in")
    assert len(images) == 3 and any(i.endswith("y.png") for i in images)
    assert any(i.endswith("z.png") for i in images)
    assert set(errors) == {"in/gone.png", "in/gone", "in/self"} and "3 seen by another name" in str(found)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_never_hangs(tmp_path):
    root = tree(tmp_path / "in", "a.png")
    os.mkfifo(root / "pipe.png")
    assert under(tmp_path, "in")[1] == {"in/pipe.png": "a pipe or device, no image file"}
    for path in (root / "pipe.png", root, "/dev/zero", "/dev/tty"):
        with pytest.raises(fp.ImageError):
            fp.load_image(path)


def test_a_locked_folder_is_an_error(tmp_path, monkeypatch):
    root = tree(tmp_path / "in", "a.png", "locked/b.png")
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)
    monkeypatch.setattr(os, "scandir", locked)
    assert under(tmp_path, "in")[:2] == ({"in/a.png"}, {"in/locked": "cannot be read (Permission denied)"})
    with pytest.raises(fp.ImageError, match="locked: cannot be read"):
        folders.find_good(root / "locked")


def test_masks_are_left_out_by_layout_and_below_the_argument_only(tmp_path):
    mvtec = tree(tmp_path / "ground_truth" / "bottle", "train/good/0.png", "test/good/0.png",
                 "test/broken/0.png", "ground_truth/broken/0_mask.png")
    images, _, found = under(mvtec, "ground_truth", ".")
    assert images == {"ground_truth/broken/0_mask.png", "train/good/0.png", "test/good/0.png",
                      "test/broken/0.png"}
    images, _, found = under(tmp_path, "ground_truth/bottle")
    assert len(images) == 3 and str(found) == "left out: 1 in ground_truth/"
    assert len(under(tmp_path, "ground_truth/bottle/*")[0]) == 3
    visa = tree(tmp_path / "visa", "Data/Images/Normal/0.png", "Data/Images/Anomaly/0.png",
                "Data/Masks/Anomaly/0.png")
    assert len(under(visa, ".")[0]) == 2
    dagm = tree(tmp_path / "dagm", "Train/1.png", "Train/Label/1_label.png")
    assert under(dagm, ".")[0] == {"Train/1.png"}
    beside = tree(tmp_path / "beside", "1.jpg", "1_mask.png", "2.jpg", "2_label.bmp", "gt.png", "x_mask.png")
    assert under(beside, ".")[0] == {"1.jpg", "2.jpg", "gt.png", "x_mask.png"}
    views = tree(tmp_path / "views", "1.jpg", "1_label.jpg", "1_front.png", "2.tif", "2_gt.tif", "2_MASK.jpg")
    assert under(views, ".")[0] == {"1.jpg", "1_label.jpg", "1_front.png", "2.tif"}
    products = tree(tmp_path / "products", "masks/0.png", "caps/0.png")  # masks that one wears
    assert len(under(products, ".")[0]) == 2


def test_arguments_of_every_kind(tmp_path):
    root = tree(tmp_path, "p/a/1.png", "p/b/2.png", "p/3.png", "p/n.txt", "q[1].png", "empty/", "texts/n.txt")
    assert under(root, "p/*")[0] == {"p/a/1.png", "p/b/2.png", "p/3.png"}
    assert under(root, "p/**/*.png")[0] == {"p/a/1.png", "p/b/2.png", "p/3.png"}
    assert under(root, "q[1].png", "p/3.png", "p/3.png")[0] == {"q[1].png", "p/3.png"}
    assert under(root, "p", "p/3.png", "p/a")[0] == {"p/a/1.png", "p/b/2.png", "p/3.png"}
    long = "x" * 500
    images, errors, _ = under(root, "none.png", "p/3.png", "empty", "texts", "no*.png", "", long)
    assert images == {"p/3.png"} and set(errors) == {"none.png", "empty", "texts", "no*.png", "", long}
    for path in ("", tmp_path / "none", long):
        for find in (folders.find_images, folders.find_good):
            with pytest.raises(fp.ImageError, match="no such file or folder"):
                find(path)


# -- layouts for training ----------------------------------------------------------------------------

LAYOUTS = {  # files: those that are good
    "plain": (["1.png", "2.jpg", "n.txt"], ["1.png", "2.jpg"]),
    "mvtec": (["train/good/1.png", "test/good/2.png", "test/hole/3.png", "ground_truth/hole/3_mask.png"],
              ["train/good/1.png"]),
    "mvtec ad 2": (["train/good/1.png", "validation/good/2.png", "test_public/bad/3.png",
                    "test_public/ground_truth/bad/3.png"], ["train/good/1.png"]),
    "a test folder": (["good/1.png", "hole/2.png", "cut/3.png"], ["good/1.png"]),
    "good and bad": (["good/1.png", "good/2.png", "bad/3.png"], ["good/1.png", "good/2.png"]),
    "capitals": (["OK/1.png", "NG/2.png"], ["OK/1.png"]),
    "train/OK": (["train/OK/1.png", "train/NG/2.png", "test/OK/3.png"], ["train/OK/1.png"]),
    "pass and fail": (["Pass/1.png", "Fail/2.png"], ["Pass/1.png"]),
    "words": (["01_good_parts/1.png", "02_bad_parts/2.png"], ["01_good_parts/1.png"]),
    "negated": (["no defect/1.png", "not ok/2.png"], ["no defect/1.png"]),
    "visa": (["Data/Images/Normal/1.png", "Data/Images/Anomaly/2.png", "Data/Masks/Anomaly/2.png",
              "image_anno.csv"], ["Data/Images/Normal/1.png"]),
    "below good": (["good/monday/1.png", "good/tuesday/2.png", "good/defects/3.png", "bad/4.png"],
                   ["good/monday/1.png", "good/tuesday/2.png"]),
    "named good": (["good/"], None),
    "good of a kind, alone": (["good_bottles/1.png"], ["good_bottles/1.png"]),
    "good of a kind beside a test": (["good_bottles/1.png", "test/2.png"], ["good_bottles/1.png"]),
    "good of a kind": (["good_bottles/1.png", "bad_bottles/2.png"], ["good_bottles/1.png"]),
    "good and old ones": (["good/1.png", "good_old/2.png", "bad/3.png"], ["good/1.png"]),
    "defects below good": (["good/1.png", "good/crack/2.png", "good/rework/3.png"], ["good/1.png"]),
    "to be checked": (["ok_to_be_checked/1.png", "x/2.png"], None),
    "by mistake": (["passed_by_mistake/1.png", "others/2.png"], None),
    "a board": (["io_board/1.png", "sensor/2.png"], None),
    "a normal map": (["normal_map/1.png", "rgb/2.png"], None),
    "one folder": (["2024/06/1.png", "2024/06/2.png"], ["2024/06/1.png", "2024/06/2.png"]),
    "images with others below": (["1.png", "old/2.png", "bad/3.png"], ["1.png"]),
    "train alone": (["train/1.png", "test/2.png", "val/3.png"], ["train/1.png"]),
    "outputs": (["good/1.png", "bad/2.png", "3.png.map.png"], ["good/1.png"]),
    "categories": (["bottle/train/good/1.png", "cable/train/good/2.png"], None),
    "unknown": (["left/1.png", "right/2.png"], None),
    "bad alone": (["bad/1.png"], None),
    "two good ones": (["good/1.png", "ok/2.png"], None),
    "loose beside good": (["1.png", "good/2.png", "bad/3.png"], None),
    "loose beside masks": (["1.png", "2.png", "masks/1.png"], None),
    "images and masks": (["images/1.png", "masks/1.png"], None),
    "masks by name": (["1.png", "1_mask.png", "2.png"], None),
    "masks in train": (["train/1.png", "train/1_GT.png", "test/2.png"], None),
    "images and masks in train": (["train/images/1.png", "train/masks/1.png"], None),
    "train in images and in masks": (["images/train/1.png", "images/val/2.png", "masks/train/1.png"], None),
    "images and labels in train": (["train/images/1.png", "train/labels/1.png", "test/images/2.png"], None),
    "masks by name, as the images": (["1.jpg", "1_mask.jpg", "2.jpg"], None),
    "good beside masks of others": (["images/good/1.png", "images/bad/2.png", "masks/2.png"],
                                    ["images/good/1.png"]),
    "nothing": (["n.txt"], None),
    "nothing in good": (["good/n.txt", "bad/1.png"], None),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_good_images_of_a_layout(name, tmp_path):
    files, good = LAYOUTS[name]
    root = tree(tmp_path / "root", *files)
    if good is None:
        with pytest.raises(fp.ImageError, match="root") as e:
            folders.find_good(root)
        assert str(e.value).isprintable()
        return
    found = folders.find_good(root)
    assert [str(p.relative_to(root)) for p in found.images] == good
    left = sum(found.left_out.values()) + sum(found.suffixes.values())
    unsaid = name in ("mvtec ad 2", "visa", "outputs")  # masks left out, files beside the chosen
    assert len(good) + left + unsaid == len(files) and str(found).startswith(f"{len(good)} images from ")


def test_the_name_of_the_folder_itself_counts(tmp_path, monkeypatch):
    tree(tmp_path, "good/monday/1.png", "good/tuesday/2.png", "rejects/1.png", "hole/ground_truth/1.png",
         "masks/good/1.png", "masks/bad/1.png")
    assert len(folders.find_good(tmp_path / "good").images) == 2
    assert len(folders.find_good(tmp_path / "masks").images) == 1
    for name in ("rejects", "hole/ground_truth"):
        with pytest.raises(fp.ImageError, match="not clear"):
            folders.find_good(tmp_path / name)
    monkeypatch.chdir(tmp_path / "good")
    assert len(folders.find_good(".").images) == 2
    assert [p.parent.name for p in fp.find_images(tree(tmp_path / "test", "good/1.png", "hole/2.png",
                                                       "cut/3.png"), without="good")] == ["cut", "hole"]


def test_training_says_what_it_used_and_refuses_mostly_unreadable_images(washers, tmp_path):
    for i, file in enumerate(fp.find_images(washers)):
        for name in ("good", "bad") if i < 6 else ("good",):
            target = tmp_path / name / file.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    (tmp_path / "good" / "a.png").write_bytes(b"none")
    os.symlink("nowhere", tmp_path / "good" / "b.png")
    prior = fp.fit(tmp_path, iterations=0, size=64, copies=0)
    assert prior.summary["images"] == 24 and prior.summary["not_read"] == 2
    assert len(prior.summary["unreadable"]) == 2
    assert prior.summary["found"] == f"25 images from {tmp_path / 'good'}; left out: 6 in bad/"
    for i in range(30):
        (tmp_path / "good" / f"x{i}.png").write_bytes(b"none")
    with pytest.raises(fp.ImageError, match="32 of 56 images cannot be read"):
        fp.fit(tmp_path, iterations=0, size=64, copies=0)


def test_a_glob_leaves_out_what_the_folder_does(tmp_path):
    root = tree(tmp_path / "root", "train/good/1.png", "test/hole/2.png", "ground_truth/hole/2.png",
                "ground_truth/cut/3.png")
    wanted = ["test/hole/2.png", "train/good/1.png"]
    for pattern in ("", "**", "*", "*/*", "**/*.png", "*/*/*.png"):
        found = folders.find_all([str(root / pattern) if pattern else str(root)])
        assert sorted(str(p.relative_to(root)) for p in found.images) == wanted, pattern
        assert found.left_out["in ground_truth/"] == 2, (pattern, found.left_out)
    named = folders.find_all([str(root / "ground_truth" / "*")])
    assert len(named.images) == 2  # whoever names them means them


def test_masks_are_no_bad_images(tmp_path):
    root = tree(tmp_path / "root", "ground_truth/hole/1.png", "test/hole/1.png", "test/good/2.png")
    for folder in ("ground_truth", "ground_truth/hole"):
        with pytest.raises(fp.ImageError, match="masks, by its name"):
            folders.find_bad(root / folder)
    assert [p.name for p in folders.find_bad(root / "test")] == ["1.png"]


def test_many_products_are_checked_before_the_first_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(fp, "fit", lambda *_, **__: pytest.fail("trained"))
    for name, count, match in (("unknown", 6, "not 'unknown'"), ("few", 4, "few: 4 good images: at least 5")):
        root = tree(tmp_path / name, *(f"bolt/{i}.png" for i in range(6)),
                    *(f"{name}/{i}.png" for i in range(count)))
        with pytest.raises(fp.FastPriorError, match=match):
            fp.fit_many(root, iterations=0)
    for what in ({"features": tmp_path / "f.npz"}, {"tile": 64}):
        with pytest.raises(fp.ShapeError, match="of one product"):
            fp.fit_many(root, **what)


# -- outputs -----------------------------------------------------------------------------------------

def score(*args, expect=(0, 1), **environment):
    done = subprocess.run([sys.executable, str(ROOT / "fastprior.py"), "score", *map(str, args)],
                          capture_output=True, text=True,
                          env=os.environ | environment)
    assert done.returncode in expect, done
    return done


def test_outputs_mirror_the_input_and_never_collide(model_file, washers, tmp_path):
    good, stain = (sorted((washers / "test" / kind).iterdir()) for kind in ("good", "stain"))
    names = {"in/a/b.png": good[0], "in/a_b.png": stain[0], "in/a.png": good[1], "other/a.png": stain[1],
             "in/deep/er/c.png": good[2]}
    for name, file in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(file.read_bytes())
    Image.open(stain[0]).convert("RGB").save(tmp_path / "in" / "a.jpg")
    maps = tmp_path / "in" / "maps"
    rows = [json.loads(line) for call in ([tmp_path / "in"], [tmp_path / "other"],
                                          [tmp_path / "in" / "a.png"],
                                          [str(tmp_path / "in" / "**" / "*.png")],
                                          [tmp_path / "in"])
            for line in score("-m", model_file, "--json", "--map", maps, "--mask", maps,
                              *call).stdout.splitlines()]
    assert len(rows) == 5 + 1 + 1 + 4 + 5
    owners = {}
    for row in rows:
        for kind in ("map", "mask"):
            assert owners.setdefault(row[kind], (row["path"], kind)) == (row["path"], kind)
            with Image.open(row[kind]) as a, Image.open(row["path"]) as b:
                assert a.size == b.size
    assert {os.path.relpath(r["map"], maps) for r in rows[:5]} == {"a/b.png.map.png", "a_b.png.map.png",
                                                                   "a.png.map.png", "a.jpg.map.png",
                                                                  "deep/er/c.png.map.png"}
    assert not [p for p in maps.rglob("*") if p.suffix == ".tmp"]


def test_what_cannot_be_written_is_that_images_error(model_file, washers, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    data = (washers / "test" / "stain" / "000.png").read_bytes()
    for name in ("a.png", "b" * 245 + ".png", "c.png"):
        (folder / name).write_bytes(data)
    maps = tmp_path / "maps"
    done = score("-m", model_file, folder, "--map", maps, expect=[2])
    assert len(done.stdout.splitlines()) == 3 and "File name too long" in done.stderr
    assert "1 of 3" in done.stderr.splitlines()[-1]
    assert sorted(p.name for p in maps.iterdir()) == ["a.png.map.png", "c.png.map.png"]
    done = score("-m", model_file, folder / ("b" * 245 + ".png"), "--json", "--mask", maps, expect=[2])
    row, = map(json.loads, done.stdout.splitlines())
    assert row["verdict"] == "anomaly" and "cannot be written" in row["error"]
    assert len(done.stderr.splitlines()) == 1
    (maps / "a.png.map.png").unlink()
    (maps / "a.png.map.png").write_text("of somebody else")
    score("-m", model_file, folder / "a.png", "--map", maps)
    assert (maps / "a.png.map.png").read_text() == "of somebody else" and len(list(maps.iterdir())) == 3


@pytest.mark.parametrize("option", ["--map", "--mask"])
def test_a_folder_of_outputs_is_tried_before_the_work(option, model_file, washers, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, words in {"file": "a file; expected a folder", "file/maps": "cannot be made",
                          "n" * 300: "cannot be"}.items():
        done = score("-m", model_file, washers / "test", option, tmp_path / folder, expect=[2])
        assert not done.stdout and words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    score("-m", tmp_path / "none.npz", washers / "test", option, tmp_path / "new" / "maps", expect=[2])
    assert not (tmp_path / "new").exists()  # nothing is left of what was not done
    folders.check_folder(tmp_path / "new" / "maps")
    assert not list((tmp_path / "new" / "maps").iterdir())


def test_the_model_file_is_tried_before_training(washers, tmp_path):
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "real.npz", tmp_path / "link.npz")
    for output, words in {"folder": "a folder or a device", "no/m.npz": "does not exist",
                          "m" * 250 + ".npz": "cannot be written", "m" * 300: "cannot be written"}.items():
        with pytest.raises(fp.FastPriorError, match=words):
            folders.check_output(tmp_path / output)
    for output in ("m.npz", "link.npz"):
        folders.check_output(tmp_path / output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link.npz"]
    with pytest.raises(fp.FastPriorError, match="device"):
        folders.check_output(fp.Path(os.devnull))


def test_a_file_of_another_kind_is_never_replaced(model_file, washers, tmp_path):
    good, image, model = washers / "train" / "good", tmp_path / "image.png", tmp_path / "m.npz"
    page, log, text = tmp_path / "page.html", tmp_path / "log.jsonl", tmp_path / "notes.txt"
    PICTURE.save(image)
    model.write_bytes(model_file.read_bytes())
    text.write_text("of somebody\n")

    def run(*args):
        before = {p: p.read_bytes() for p in (image, model, text)}
        done = subprocess.run([sys.executable, ROOT / "fastprior.py", *map(str, args)], capture_output=True,
                              text=True, env=os.environ | {"XDG_STATE_HOME": str(tmp_path)})
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is not replaced" in done.stderr
        assert not done.stdout and before == {p: p.read_bytes() for p in (image, model, text)}
    run("score", image, "-m", model, "--report", model)
    run("score", image, "-m", model, "--report", image)
    run("train", good, "--iterations", 0, "-o", image)
    run("calibrate", good, "-m", model, "-o", text)
    run("watch", tmp_path, "-m", model, "--log", model)
    run("watch", tmp_path, "-m", model, "--journal", image)
    for path, kind, begin in ((model, "model", b""), (page, "web page", b"<!DOCTYPE html>\n<"), (log, (
            "file of JSON lines"), b'{"path": "a"}\n'), (tmp_path / "new", "model", b""), (log, (
            "file of JSON lines"), b"")):
        if path != model and path.name != "new":
            path.write_bytes(begin)
        folders.check_output(path, kind)
    onnx = tmp_path / "m.onnx"
    onnx.write_bytes(b"\x08\x08\x12\x09fastprior")
    folders.check_output(onnx, "ONNX file")


def test_the_overlay_of_a_large_image_is_made_in_strips():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1500, 1000, 3), np.uint8)
    nll = rng.uniform(0, 3, (1500, 1000)).astype(np.float32)
    region = fp.Region(10, 20, 900, 1400, 1, 2.0)
    drawn = fp._room("console").overlay(image, nll, [region])
    np.testing.assert_array_equal(drawn[1400:], fp._room("console").overlay(image[1400:], nll[1400:]))
    assert (drawn[20, 10:900] == 255).all() and (drawn[1399, 10:900] == 255).all()
    assert not (drawn[700, 100:800] == 255).all()
