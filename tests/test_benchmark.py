"""`examples/benchmark.py`: layouts, the grid and its cache, other runtimes, how it is found and loaded."""
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastprior as fp
from conftest import ROOT

extraction = fp._room("extraction")

console = fp._room("console")

benchmark = fp._room("benchmark")
fitting = fp._room("fitting")


# -- layouts -------------------------------------------------------------------------------------

def touch(root, *names, value=0):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)


def ten(folder):
    return [f"{folder}/{i}.png" for i in range(10)]


# files; then stems of train, of good and of anomalous test images; masks
LAYOUTS = {
    "mvtec": (["train/good/0.png", "test/good/1.png", "test/hole/2.png", "test/dent/3.png",
               "ground_truth/hole/2_mask.png", "ground_truth/dent/3.png"],
              "0", "1", "32", ["ground_truth/dent/3.png", "ground_truth/hole/2_mask.png"]),
    "btad": (["train/ok/0.bmp", "test/ok/1.bmp", "test/ko/2.bmp", "test/ko/3.bmp",
              "ground_truth/ko/2.bmp", "ground_truth/ko/3.png"],
             "0", "1", "23", ["ground_truth/ko/2.bmp", "ground_truth/ko/3.png"]),
    "loco": (["train/good/0.png", "validation/good/9.png", "test/good/1.png", "test/logical_anomalies/2.png",
              "ground_truth/logical_anomalies/2/000.png", "ground_truth/logical_anomalies/2/001.png"],
             "0", "1", "2", ["ground_truth/logical_anomalies/2"]),
    "plain": ([*ten("good"), "bad/a.png"], "12346789", "05", "a", [None]),
    "visa": ([*ten("Data/Images/Normal"), "Data/Images/Anomaly/a.jpg", "Data/Masks/Anomaly/a.png"],
             "12346789", "05", "a", ["Data/Masks/Anomaly/a.png"]),
    "folder": ([*ten("Normal"), "crack/a.png", "colour/b.png", "mask/crack/a.png"],
               "12346789", "05", "ba", [None, "mask/crack/a.png"]),
    "capitals, hidden, outputs": ([*ten("good"), "good/1.png.map.png", "good/.ipynb_checkpoints/1.png",
                                   ".thumbnails/1.png", "bad/a.png", "bad/._a.png", "bad/a_mask.png",
                                   "Masks/a.png"],
                                  "12346789", "05", "a", ["Masks/a.png"]),
    "flat masks": ([*ten("good"), "crack/a.png", "masks/a.png"], "12346789", "05", "a", ["masks/a.png"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    files, train, good, bad, masks = LAYOUTS[name]
    touch(tmp_path / "set" / "part", *files)
    (tmp_path / "set" / "part" / "maps").mkdir()
    (tmp_path / "set" / "readme.txt").write_text("none")
    one, = benchmark.find_categories(tmp_path / "set")
    itself, = benchmark.find_categories(tmp_path / "set" / "part")
    assert itself.test == one.test and one.name == itself.name == "part"
    assert "".join(p.stem for p in one.train) == train
    assert "".join(p.stem for p in one.test) == good + bad
    assert one.labels.tolist() == [False] * len(good) + [True] * len(bad)
    assert one.masks == [None] * len(good) + [m and tmp_path / "set" / "part" / m for m in masks]


def test_visa_is_split_as_its_table_says(tmp_path):
    touch(tmp_path, *ten("candle/Data/Images/Normal"), *ten("candle/Data/Images/Anomaly"))
    rows = ["object,split,label,image,mask"]
    rows += [f"candle,{'train' if i < 4 else 'test'},,candle/Data/Images/Normal/{i}.png," for i in range(10)]
    rows += [f"candle,test,,candle/Data/Images/Anomaly/{i}.png," for i in range(2)]
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("\n".join(rows))
    candle, = benchmark.find_categories(tmp_path)
    assert [p.stem for p in candle.train] == list("0123")
    assert "".join(p.stem for p in candle.test) == "45678901" and candle.labels.sum() == 2


@pytest.mark.parametrize("files, match", [
    ([], "expected categories"), (["pictures/0.png"], "expected categories"),
    (["m/train/good/0.png", "m/test/hole/1.png"], "m has 1 images to train on, and 0 good and 1 anomalous"),
    (["m/train/good/0.png", "m/test/good/1.png"], "1 good and 0 anomalous"),
    (["m/train/good/0.png"], "0 good and 0 anomalous"),
    (["m/good/0.png", "m/bad/1.png"], "m has 0 images to train on"),
    (["m/good/0.png", "m/good/1.png"], "1 good and 0 anomalous")])
def test_what_is_no_data_set_is_refused(tmp_path, files, match):
    touch(tmp_path, *files)
    with pytest.raises(fp.ImageError, match=match):
        benchmark.find_categories(tmp_path)
    with pytest.raises(fp.ImageError, match="expected categories"):
        benchmark.find_categories(tmp_path / "nowhere")


def test_a_category_is_the_same_from_within(tmp_path, monkeypatch):
    touch(tmp_path, *ten("candle/Data/Images/Normal"), *ten("candle/Data/Images/Anomaly"))
    rows = ["image,split"] + [
        f"candle/Data/Images/{kind}/{i}.png,{'train' if kind == 'Normal' and i < 4 else 'test'}"
        for kind in ("Normal", "Anomaly") for i in range(10)]
    (tmp_path / "split_csv").mkdir()
    (tmp_path / "split_csv" / "1cls.csv").write_text("\n".join(rows))
    want, = benchmark.find_categories(tmp_path)
    monkeypatch.chdir(tmp_path / "candle")
    got, = benchmark.find_categories(".")
    assert (got.name, got.train, got.test) == ("candle", want.train, want.test) and len(got.train) == 4


def test_maps_are_held_against_their_own_masks(tmp_path):
    touch(tmp_path, "train/good/0.png", "test/good/1.png", *(f"test/hole/{i}.png" for i in (2, 3, 4)))
    for i, name in enumerate(("2/0.png", "2/1.png", "3_mask.png")):  # two join; 4 has none
        mask = np.zeros((8, 8), np.uint8)
        mask[2 * i:2 * i + 2] = 1 + 254 * (i == 2)
        path = tmp_path / "ground_truth" / "hole" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)

    class Oracle:
        def score_batch(self, paths, with_map):
            rows = {"1": (0, 0), "2": (0, 4), "3": (4, 6), "4": (0, 8)}
            maps = [np.zeros((8, 8)) for _ in paths]
            for m, p in zip(maps, paths):
                m[slice(*rows[p.stem])] = 2
            return [SimpleNamespace(score=m.max(), anomaly_map=m) for m in maps]
    category, = benchmark.find_categories(tmp_path)
    assert set(benchmark.evaluate(Oracle(), category).values()) == {1.0}
    assert "aupro" not in benchmark.evaluate(Oracle(), category._replace(masks=[None] * 4))


# -- the grid ------------------------------------------------------------------------------------

def draw(path, rng, scratched=False):
    image = rng.normal(90, 8, (64, 64))
    image[20:44, 20:44] += 60
    image[28:34, 12:26] += 200 * scratched
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("disc", "plate"):
        for i in range(20):
            draw(root / name / "good" / f"{i:02}.png", rng)
            draw(root / name / "bad" / f"{i:02}.png", rng, scratched=True)
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A network of 80 channels, random: all here is quick with it."""
    torch = pytest.importorskip("torch", reason="torch is in the extras `train` and `test`")
    from test_backbone import lite_state
    path = tmp_path_factory.mktemp("backbone") / "small.pth"
    torch.save(lite_state(), path)
    return path


@pytest.fixture
def bench(data, backbone, tmp_path, monkeypatch):
    """Runs `fastprior bench` with a cache of its own and hardly any timing."""
    (tmp_path / "cache" / "fastprior").mkdir(parents=True)
    for kernels in benchmark._cache_folder().glob("kernels-*"):
        shutil.copy(kernels, tmp_path / "cache" / "fastprior")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark, "measure_peaks", dict)
    monkeypatch.setattr(benchmark, "bench_speed", lambda *_: {"frame_p50_ms": 2., "frame_p95_ms": 3.,
                                                              "frames_per_second": 500.})

    def run(*arguments, data=(data / "disc",)):
        options = [x for path in data for x in ("--data", str(path))]
        options += [] if "--backbone" in arguments else ["--backbone", str(backbone)]
        command = ["bench", *options, "--size", "64", *map(str, arguments)]
        return CliRunner().invoke(fp._room("commands").build_app(), command)
    return run


def rows_of(done):
    assert done.exit_code == 0, (done.output, done.exception)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_grid_has_every_configuration_and_trains_each_once(bench, data, monkeypatch):
    rest = ["--steps", "1,7", "--seeds", "0,1", "--json"]
    command = ["--variants", "gaussian,joint", "--images", "8,16", *rest]
    first = rows_of(bench(*command, data=[data]))
    accuracy, points = ([r for r in first if ("category" in r) == which] for which in (True, False))
    labels = [f"{v}, {n} images" for n in (8, 16) for v in ("gaussian", "joint")]
    assert [(r["variant"], r["steps"]) for r in points] == [(v, n) for v in labels for n in (1, 7)]
    assert [(r["variant"], r["steps"], r["seed"], r["category"], r["images"]) for r in accuracy] == [
        (v, n, seed, name, int(v.split()[1])) for v in labels for n in (1, 7) for seed in (0, 1)
        for name in ("disc", "plate")]
    for p in points:
        own = [r for r in accuracy if (r["variant"], r["steps"]) == (p["variant"], p["steps"])]
        assert p["image_auroc"] == np.mean([r["image_auroc"] for r in own]) and p["frames_per_second"] == 500

    def refuse(*_, **__):
        raise AssertionError("not from the cache")
    monkeypatch.setattr(extraction, "extract_features", refuse)
    rows_of(bench("--variants", "gaussian", "--images", "12", *rest, data=[data]))
    monkeypatch.setattr(fitting, "whiten_features", refuse)
    assert rows_of(bench(*command, data=[data])) == first


def test_a_model_of_the_grid_is_the_one_that_fit_makes(data, backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    category, = benchmark.find_categories(data / "disc")
    net, settings = fp.load_backbone(backbone), {"size": 64, "seed": 2}
    config = fp.Settings(backbone=net.name, **settings)
    models = dict(benchmark.train(category, net, config, ["gaussian", "joint"], [None], 5, None, fp._quiet))
    for (variant, _), file in models.items():
        changes, iterations = benchmark.VARIANTS[variant]
        ours = fp._arrays_of(fp.Prior.load(file))
        want = fp.fit(category.train, iterations=iterations, backbone=net, **settings, **changes)
        want = fp._arrays_of(want)
        assert ours.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(ours[name], want[name])
        file.write_bytes(file.read_bytes()[:1000])  # a spoilt file is made anew
    for _, file in benchmark.train(category, net, config, ["gaussian", "joint"], [None], 5, None, fp._quiet):
        fp.Prior.load(file)
    moved = dict(benchmark.train(category, net, config, ["gaussian"], [10], 5, None, fp._quiet))
    fewer = category._replace(train=category.train[:-1])
    other = dict(benchmark.train(fewer, net, config, ["gaussian"], [None], 5, None, fp._quiet))
    assert not {*moved.values(), *other.values()} & set(models.values())


def test_report_has_table_and_picture(bench, data, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `bench`")
    done = bench("--variants", "joint", "--steps", "1,2", "--seeds", "0,1", "--multi",
                 "--report", tmp_path / "report", data=[data / "disc", data / "plate"])
    assert done.exit_code == 0, (done.output, done.exception)
    table = (tmp_path / "report" / "table.md").read_text()
    assert table.strip() in done.stdout and "seeds 0, 1 (mean ± deviation)" in table
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if "|" in line]
    head, _, *rows = lines
    assert head == ["backbone", "variant", "steps", "disc", "plate", "mean", "pixel AUROC", "pixel AP",
                    "AUPRO", "box ÷ defect", "ms a frame", "frames/s"]
    assert [r[:3] for r in rows] == [["small", v, n] for v in ("joint", "joint, one model") for n in "12"]
    assert all(re.fullmatch(r"[01]\.\d{4} ± 0\.\d{4}", cell) for cell in rows[0][3:5])
    mean = np.mean([float(cell.split()[0]) for cell in rows[0][3:5]])
    assert float(rows[0][5]) == pytest.approx(mean, abs=1.1e-4)
    assert rows[0][6:] == [*"––––", "2.00", "500"]
    with Image.open(tmp_path / "report" / "tradeoff.png") as picture:
        assert picture.size[0] > 400
    assert "<svg" in (tmp_path / "report" / "tradeoff.svg").read_text()


@pytest.mark.parametrize("arguments, match", [
    (["--variants", "joint,odd"], "--variants: expected some of gaussian, .*, got odd"),
    (["--steps", "7,8"], "at most one besides"), (["--steps", "0"], "steps"),
    (["--steps", "one"], "--steps: expected numbers"), (["--seeds", "a"], "--seeds: expected numbers"),
    (["--images", "4"], "--images: expected 5 to 16, which disc has, got"), (["--images", "17"], "--images"),
    (["--size", "65"], "multiple of 32"), (["--backbone", "odd"], "expected lite0"),
    (["--model", "m.npz"], "leave out --data"), (["--calibration", "odd"], "calibration"),
    (["--against", "odd"], "--against: expected some of onnxruntime, openvino, torch, "
     "openvino-bf16, openvino-int8")])
def test_bad_options_are_refused_before_anything_is_trained(bench, monkeypatch, arguments, match):
    def refuse(*_, **__):
        raise AssertionError("trained")
    monkeypatch.setattr(extraction, "extract_features", refuse)
    done = bench(*arguments)
    assert isinstance(done.exception, fp.FastPriorError), done.exception
    assert re.search(match, str(done.exception)) and "\n" not in str(done.exception)


def test_categories_of_one_name_and_missing_libraries_are_named(bench, data, tmp_path, monkeypatch):
    assert "two categories are called disc" in str(bench(data=[data, data / "disc"]).exception)
    assert "give --data too" in str(bench("--report", tmp_path, data=[]).exception)
    (file := tmp_path / "file").touch()
    assert "a file; expected a folder" in str(bench("--report", file).exception)
    for package, option, need in (("matplotlib.figure", ["--report", tmp_path], "matplotlib"),
                                  ("sklearn", [], "scikit-learn")):
        monkeypatch.setitem(sys.modules, package, None)
        error = bench(*option).exception
        assert isinstance(error, fp.BackendUnavailable) and "\n" not in str(error)
        assert need in str(error) and "pip install 'fastprior[bench]'" in str(error)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(console, "is_installed", lambda name: name != "torch")
    error = bench("--backbone", "lite0").exception
    assert isinstance(error, fp.BackendUnavailable) and "needs torch" in str(error)


def test_an_interrupted_training_is_not_kept(bench, monkeypatch):
    fit = fitting.fit_whitened

    def interrupted(*arguments):
        try:  # as training does: it goes on with what it has
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        return fit(*arguments)
    monkeypatch.setattr(fitting, "fit_whitened", interrupted)
    done = bench("--variants", "gaussian")
    assert done.exit_code == 130 and not list(benchmark._cache_folder().glob("disc-model-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# -- other runtimes, processes -------------------------------------------------------------------

@pytest.fixture(scope="module")
def small():
    return benchmark.untrained("lite0", 64)


def test_against_times_both(small):
    pytest.importorskip("torch", reason="torch is in the extras `train` and `test`")
    got = benchmark.bench_against(small, ["torch"], rounds=1, calls=1)
    assert got.keys() == {"fastprior_ms", "torch_ms", "ratio_torch"}
    assert got["ratio_torch"] == got["fastprior_ms"] / got["torch_ms"] > 0


def test_other_runtimes_get_the_backbone_in_floats(small, monkeypatch):
    floats = fp.load_backbone("lite0")
    assert small.backbone.integer and benchmark.in_floats(floats) is floats
    np.testing.assert_array_equal(benchmark.in_floats(small.backbone).stem_w, floats.stem_w)
    renamed = fp.dataclasses.replace(small.backbone, name="mine")
    with pytest.raises(fp.BackendUnavailable, match="mine in floats.*--backbone$"):
        benchmark.in_floats(renamed, ["lite0", "lite2"])
    mine = fp.dataclasses.replace(floats, name="mine")
    assert benchmark.in_floats(renamed, ["lite0", mine]) is mine


def test_weights_are_counted_as_they_are_written(small):
    written = {k: a.nbytes for k, a in small.backbone.to_arrays().items()}
    want = sum(written.values()) - sum(written[k] for k in ("stem_b", "stem_m", "scales"))
    assert benchmark.count_work(small)[1]["features"] == want
    floats = small._with(small.settings, small.calibrations, {})
    floats.backbone = fp.load_backbone("lite0")
    flops, read = benchmark.count_work(floats)
    assert flops == benchmark.count_work(small)[0]
    assert read["features"] == 2 * sum(
        a.nbytes for k, a in floats.backbone.to_arrays().items() if k != "stem_b")


def test_a_runtime_that_fails_is_named(small, monkeypatch):
    monkeypatch.setattr(console, "is_installed", lambda name: True)
    monkeypatch.setitem(benchmark.RUNTIMES, "odd", None)  # unknown to the child
    with pytest.raises(fp.BackendUnavailable, match="--against: odd failed"):
        benchmark.bench_against(small, ["odd"], rounds=1, calls=1)
    monkeypatch.setattr(console, "is_installed", lambda name: name != "onnx")
    with pytest.raises(fp.BackendUnavailable, match="openvino needs onnx: pip install onnx"):
        benchmark.bench_against(small, ["openvino"])
    monkeypatch.setattr(console, "is_installed", lambda name: name != "nncf")
    with pytest.raises(fp.BackendUnavailable, match="openvino-int8 needs nncf: pip install nncf"):
        benchmark.bench_against(small, ["openvino-int8"])


def test_whole_processes_are_timed(small, tmp_path, monkeypatch):
    runs = []

    def run(command, env, **options):  # the first ever would compile for half a minute
        runs.append(env.get("XDG_CACHE_HOME"))
        if len(runs) > 2:
            return SimpleNamespace(returncode=0, stderr="VmHWM:\t2000 kB")
        return subprocess_run(command, env=env, **options)
    subprocess_run = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    got = benchmark.bench_process(small)
    assert len(runs) == 6 and runs[-1] != runs[0]
    assert got["process_s"] > 0 and got["model_load_s"] > 0 and got["first_process_peak_mb"] == 2
    failed = SimpleNamespace(returncode=2, stderr="error: no\nmore")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(fp.FastPriorError, match="scoring failed: error: no$"):
        benchmark.bench_process(small)


def test_frames_beside_other_work_are_timed(small):
    threads = threading.active_count()
    got = benchmark.bench_neighbours(small, calls=5, rounds=2)
    assert got.keys() == {"quiet_p50_ms", "apart_p50_ratio", "busy_thread_p50_ratio",
                          "busy_process_p95_ratio"}
    assert all(0 < value < math.inf for value in got.values()) and threading.active_count() <= threads + 1


# -- found and loaded ----------------------------------------------------------------------------

def test_a_copy_inside_another_package_loads_its_own(tmp_path):
    package = tmp_path / "host" / "vendor"
    (package / "examples").mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    for name in ("fastprior", "benchmark", "examples"):  # what the host program has under these names
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a module of the host was imported')")
    shutil.copy(ROOT / "fastprior.py", package)
    code = ("import sys; sys.path.insert(0, '.')\nimport host.vendor.fastprior as fp\n"
            "try: fp._room('benchmark')\nexcept fp.BackendUnavailable as e: print(e)\n"
            "else: print(fp._room('benchmark').fp is fp)\n"
            "print(sorted({'fastprior', 'benchmark', 'examples'} & set(sys.modules)))")

    def run():
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        return done.stdout.splitlines(), done.stderr
    missing, nothing = run()[0]
    assert "copy the folder examples/ beside fastprior.py" in missing
    for name in ("__init__", "benchmark"):
        shutil.copy(ROOT / "examples" / f"{name}.py", package / "examples")
    assert run() == (["True", "[]"], "")


@pytest.mark.parametrize("script", ["fastprior.py", "examples/benchmark.py"])
def test_as_a_script_its_errors_are_those_of_the_command(script, data):
    command = [sys.executable, ROOT / script, *["bench"] * (script == "fastprior.py"), "--data", data]
    done = subprocess.run([*map(str, command), "--variants", "odd"], capture_output=True, text=True)
    assert done.returncode == 2, done
    assert done.stderr.splitlines()[-1].startswith("error: --variants: expected some of"), done


@pytest.mark.parametrize("size", [64, (64, 96), fp.Settings.size])
def test_untrained_models_have_the_shapes_of_the_settings(size):
    prior = benchmark.untrained("lite0", size)
    assert prior.grid == fp.Settings(size=size).grid and len(prior.mean) == np.prod(prior.grid)
