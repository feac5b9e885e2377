"""The exported graph in onnxruntime, and in OpenVINO where it is installed, against our own engine."""
import dataclasses
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastprior as fp
from conftest import ROOT
from damaged_models import half, tiny_backbone, tiny_prior

onnx = pytest.importorskip("onnx", reason="onnx is in the extras `export` and `test`")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra `test`")
export = fp._room("export")


def in_onnxruntime(data, outputs=("score", "map"), argument="pixels"):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    return lambda x: session.run(outputs, {argument: x})


def in_openvino(data, outputs=("score", "map")):
    openvino = pytest.importorskip("openvino", reason="openvino is in no extra: pip install openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(data), "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})

    def run(pixels):
        result = compiled({"pixels": pixels})
        return [result[name] for name in outputs]
    return run


runtimes = pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])


def check(prior, runtime, *batches):
    """Score and map of every batch, (N, H, W, 3) each, as `Prior.score` has them, in one session."""
    run = runtime(export.prior_model(prior, "x", {}))
    for pixels in batches:
        score, anomaly_map = run(pixels)
        want = [prior.score(image) for image in pixels]
        assert score.shape == (len(pixels),) and anomaly_map.shape == pixels.shape[:3]
        np.testing.assert_allclose(score, [r.score for r in want], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(anomaly_map, np.stack([r.anomaly_map for r in want]), rtol=1e-4, atol=1e-4)


def pictures_of(seed, n, height, width):
    """Unlike each other: noise, a gradient, white; (n, height, width, 3)."""
    made = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)
    made[1:2] = np.linspace(0, 255, width).astype(np.uint8)[:, None]
    made[2:3] = 255
    return made


@runtimes
def test_the_demo_model(runtime):
    prior = fp.Prior.load(fp.demo_model())
    names = "chip", "good_0", "scratch"
    washers = np.stack([fp.load_image(ROOT / "examples" / "washers" / f"{name}.png") for name in names])
    check(prior, runtime, washers, washers[:1, :, 20:], washers[:2, ::2, ::3])


@runtimes
@pytest.mark.parametrize("steps", [2, 5])
def test_a_trained_denoiser(trained, pictures, runtime, steps):
    assert trained.backbone.integer and trained.denoiser and np.abs(trained.denoiser["out_w"]).max() > .01
    check(trained.with_steps(steps), runtime, np.stack([pictures[0], pictures[2], pictures[4]]),
          pictures[1][None], pictures_of(0, 2, 8, 300))


@runtimes
@pytest.mark.parametrize("model", [
    {"act": fp.SILU, "squeeze": True}, {"squeeze": True, "denoiser": False}, {"variant": "plain"}])
def test_other_networks_and_variants(runtime, model):
    check(tiny_prior(**model), runtime, pictures_of(1, 3, 70, 50), pictures_of(2, 1, 64, 64))


@runtimes
def test_a_region_of_interest(runtime):
    for net in (None, in_integers(tiny_backbone(np.random.default_rng(0)), 64)):
        check(tiny_prior(roi=half(), backbone=net), runtime, pictures_of(1, 3, 40, 56),
              pictures_of(2, 2, 33, 46))


def in_integers(net, size):
    """For the middle picture of `pictures_of`: the others leave its ranges."""
    made, _ = fp._room("quantization").quantize_on(net, pictures_of(0, 2, 70, 90)[1:], fp.Settings(size=size))
    assert made.integer
    return made


def check_features(net, settings, runtime, *batches):
    """Those of both views: bit for bit the reference's."""
    g, made = export.Graph(), fp.load_backbone(net)
    outputs = export.backbone_outputs(g, export.resize(g, "pixels", settings.shape, made), made)
    views = [export.features(g, outputs, made, settings.shape, *view) for view in made.views(settings)]
    run = runtime(g.model("features", {"pixels": (onnx.TensorProto.UINT8, ["N", "H", "W", 3])},
                          {name: ["N", None, None] for name in views}, {}), views)
    for pixels in batches:
        want = zip(*(fp._reference_tokens(image, made, settings) for image in pixels))
        for got, view in zip(run(pixels), want, strict=True):
            np.testing.assert_array_equal(got.swapaxes(1, 2), np.stack(view))


@runtimes
@pytest.mark.parametrize("name, size, cell", [("lite0", 64, 0), ("lite2", (64, 96), 32)])
def test_a_backbone_in_integers(runtime, name, size, cell):
    net, settings = in_integers(fp.load_backbone(name), size), fp.Settings(size=size, cell=cell)
    check_features(net, settings, runtime, pictures_of(1, 3, 64, 96), pictures_of(2, 3, 90, 70),
                   pictures_of(3, 1, 8, 700))


@pytest.mark.parametrize("cell", [1, 16, 48])
def test_cells_of_integers_whose_sums_float32_does_not_hold(cell):
    x = np.random.default_rng(0).integers(20000, 32768, (2 * cell, 3 * cell, 4)).astype(np.float32)
    g, unit = export.Graph(), np.float32(.003)
    output = export.pool(g, "x", (2, 3), cell, unit)
    data = g.model("pool", {"x": (onnx.TensorProto.FLOAT, [1, 4, 2 * cell, 3 * cell])},
                   {output: [1, 4, 2, 3]}, {})
    got, = in_onnxruntime(data, [output], "x")(x.transpose(2, 0, 1)[None])
    np.testing.assert_array_equal(got[0].transpose(1, 2, 0), fp.pool(x, (2, 3), unit))


@runtimes
def test_a_model_in_integers_that_is_no_square(runtime):
    net = in_integers(tiny_backbone(np.random.default_rng(0)), (64, 96))
    check(tiny_prior(backbone=net, size=(64, 96)), runtime, pictures_of(1, 3, 70, 50),
          pictures_of(2, 1, 64, 96))


def test_the_settings_travel(trained):
    """Smoothing, more places to a score, another rate; cells that are not the smallest."""
    settings = dataclasses.replace(trained.settings, smooth=1.2, worst=.2, fpr=.2)
    check(trained._with(settings, trained.calibrations, {}), in_onnxruntime, pictures_of(3, 3, 100, 96))
    coarse = fp.fit(list(np.random.default_rng(4).integers(0, 256, (12, 64, 64, 3), np.uint8)), iterations=0,
                    size=64, cell=32, copies=0)
    assert coarse.factors is not None and coarse.denoiser is None
    check(coarse, in_onnxruntime, pictures_of(5, 2, 64, 90))


@pytest.mark.parametrize("n_in, n_out", [
    (8, 448), (448, 448), (449, 448), (4097, 96), (65535, 64), (14, 65535),
    (4096, 64), (12288, 64)])  # of these two some taps in fixed point are ties
def test_the_resize_rule(n_in, n_out):
    g = export.Graph()
    outputs = [taps(g, "n_in", "n_out") for taps in (export.resize_taps, export.fixed_point_taps)]
    scalar = (onnx.TensorProto.INT64, [])
    data = g.model("taps", {"n_in": scalar, "n_out": scalar}, {name: [None, None] for name in outputs}, {})
    got = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(
        outputs, {"n_in": np.array(n_in), "n_out": np.array(n_out)})
    for taps, rule, tolerance in zip(got, (fp.resize_taps, fp.fixed_point_taps), (1e-6, 0)):
        start, weight = rule(n_in, n_out)
        want = np.zeros((n_out, n_in), np.float32)
        np.put_along_axis(want, start[:, None] + np.arange(weight.shape[1]), weight.astype(np.float32), 1)
        np.testing.assert_allclose(taps, want, rtol=tolerance, atol=tolerance / 10)


# -- the command ---------------------------------------------------------------------------------

@pytest.fixture
def command():
    """`fastprior export` with these arguments; errors are in its `exception`."""
    app = fp._room("commands").build_app()
    return lambda *options: CliRunner().invoke(app, ["export", *map(str, options)])


def test_the_command_and_the_readme(trained, model_file, washers, command, tmp_path):
    done = command("-m", model_file, tmp_path / "part.onnx", "--steps", 3, "--fpr", .2)
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'part.onnx'}\n", done
    assert "opset 17" in done.stderr and "promise false alarms" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["part.onnx"]
    prior = fp.Prior.load(model_file, steps=3, fpr=.2)

    model = onnx.load(tmp_path / "part.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    told = {p.key: p.value for p in model.metadata_props}
    assert float(told["threshold"]) == prior.threshold.value != trained.threshold.value
    assert told["fastprior"] == fp.__version__ and told["model"] == model_file.name and told["steps"] == "3"
    assert told["promise"] == fp._room("console").promise(prior)
    assert told["verdict"].startswith("good if score <= threshold") and "16 bits" not in told["input"]

    section = (ROOT / "README.md").read_text().partition("\n## Export\n")[2].partition("\n## ")[0]
    code = re.search("```python\n(.*?)```", section, re.S)[1]
    assert "fastprior" not in code and len([line for line in code.splitlines() if "import" not in line]) == 5
    for kind in ("good", "stain"):
        image = sorted((washers / "test" / kind).glob("*.png"))[0]
        Image.open(image).save(tmp_path / "new.png")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        score, verdict = done.stdout.split()
        want = prior.score(image)
        assert float(score) == pytest.approx(want.score, rel=1e-4, abs=1e-4) and verdict == want.verdict


def test_one_product_of_several(trained, command, tmp_path):
    other = trained._with(trained.settings, trained.calibrations | {
        2: trained.calibration | {"scores": trained.calibration["scores"] + 1}}, {})
    fp.MultiPrior({"bolt": trained, "nut": other}).save(tmp_path / "all.npz")
    for options, words in (([], "--product, one of bolt, nut"),
                           (["--product", "cap"], "bolt, nut; got 'cap'")):
        error = command("-m", tmp_path / "all.npz", tmp_path / "x.onnx", *options).exception
        assert isinstance(error, fp.FastPriorError) and words in str(error) and "\n" not in str(error)
    assert command("-m", tmp_path / "all.npz", tmp_path / "x.onnx", "--product", "nut").exit_code == 0
    told = {p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}
    assert told["product"] == "nut" and float(told["threshold"]) == other.threshold.value
    assert other.threshold.value != trained.threshold.value


def test_deep_images_are_told_how_to_become_8_bits(trained):
    prior = trained._with(dataclasses.replace(trained.settings, bits=12), trained.calibrations, {})
    rule = re.search(r"min\(value, (\d+)\) >> (\d+)", export.describe(prior, "x", "")["input"])
    most, shift = map(int, rule.groups())
    deep = np.random.default_rng(0).integers(0, 4096, (16, 16, 3), np.uint16)
    np.testing.assert_array_equal(np.minimum(deep, most) >> shift, fp.load_image(deep, 12))


def test_what_cannot_be_is_one_line_and_leaves_nothing(model_file, command, tmp_path, monkeypatch):
    def refused(kind, words, *options):
        error = command("-m", model_file, *options).exception
        assert isinstance(error, kind) and words in str(error) and "\n" not in str(error), error
        assert not list(tmp_path.iterdir())
    refused(fp.ShapeError, "ends in .onnx", model_file)
    refused(fp.FastPriorError, "does not exist", tmp_path / "no" / "x.onnx")
    refused(fp.FastPriorError, "leave --product out", tmp_path / "x.onnx", "--product", "nut")
    refused(fp.ShapeError, "steps: this model is calibrated for", tmp_path / "x.onnx", "--steps", 7)
    with monkeypatch.context() as m:
        m.setattr(export, "MOST_BYTES", 1 << 20)
        refused(fp.FastPriorError, "an ONNX file ends at 2 GiB", tmp_path / "x.onnx")

    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        refused(fp.FastPriorError, "No space left on device", tmp_path / "x.onnx")


def test_without_onnx_the_command_says_what_to_install(model_file, tmp_path):
    code = "import sys; sys.modules['onnx'] = None; import fastprior; fastprior.main()"
    done = subprocess.run([sys.executable, "-c", code, "export", "-m", model_file, tmp_path / "x.onnx"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "error: export needs onnx: pip install 'fastprior[export]'\n"
