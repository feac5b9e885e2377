"""Backbones in integers: every path computes the reference's features, bit for bit."""
import dataclasses
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastprior as fp
from conftest import ROOT

KERNELS = "_resize", "_mbconv_integer", "_pool_integer", "_run"


@pytest.fixture(scope="module", params=["this CPU's", "pairs", "quads"])
def engines(request, tmp_path_factory):
    """kernels/cpu.py with the instructions of this CPU, and both layouts of words in plain operations."""
    name = f"integers_{request.param[:5].strip()}"
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels" / "__init__.py",
                                                  submodule_search_locations=[str(ROOT / "kernels")])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    cpu = importlib.import_module(f"{name}.cpu")
    host = cpu._host

    def patched():
        found = host()
        if request.param != "this CPU's":
            vars(cpu).update(_DOT=request.param, _GROUP=cpu._groups(request.param))
        return found
    cpu._host = patched
    cpu._KERNELS[:] = [k for k in cpu._KERNELS if k.fields is None or k.__name__ in KERNELS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp(name)))
        cpu.load_kernels()
    return cpu


def layer(rng, name, *shape, spread=255.0, fill=None):
    """int8 weights, biases and multipliers whose outputs reach both ends of their range and beyond."""
    w = rng.integers(-127, 128, shape) if fill is None else np.full(shape, fill)
    size = int(np.sqrt(np.prod(shape[:-1])) * 127 * 73)
    b = rng.integers(-size // 3, size // 3, shape[-1])
    return {f"{name}_w": w.astype(np.int8), f"{name}_b": b.astype(np.int32),
            f"{name}_m": (spread / size * rng.uniform(.2, 2, shape[-1])).astype(np.float32)}


def network(seed, blocks, fill=None):
    """blocks: (expanded, out, kernel, stride); the first has no expansion, its channels are the stem's."""
    rng = np.random.default_rng(seed)
    made, channels = [], blocks[0][0]
    for i, (mid, out, kernel, stride) in enumerate(blocks):
        p = {}
        if i:
            p = {"input_m": np.array([127 / 20000], np.float32)}
            p |= layer(rng, "expand", channels, mid, fill=fill)
        p |= layer(rng, "dw", kernel, kernel, mid, fill=fill)
        p |= layer(rng, "project", mid, out, spread=20000, fill=fill)
        made.append(fp.Block(p, stride, fp.RELU6, stride == 1 and channels == out and i > 0))
        channels = out
    stages = tuple(sorted({0, len(blocks) // 2, len(blocks) - 1}))
    scales = rng.uniform(1e-4, 1e-3, len(stages)).astype(np.float32)
    stem = layer(rng, "stem", 3, 3, 3, blocks[0][0], fill=fill)
    net = fp.QuantizedBackbone("random", stem, tuple(made), stages, scales)
    net.check()
    return net


NETWORKS = {
    "odd": [(7, 5, 3, 1), (13, 9, 3, 2), (29, 9, 5, 1), (31, 17, 5, 2), (51, 17, 3, 1), (33, 25, 3, 2),
            (75, 25, 5, 1)],
    "narrow": [(1, 1, 5, 1), (1, 3, 5, 2), (3, 3, 3, 1), (9, 1, 3, 2), (2, 2, 5, 2)],
    "early strides": [(33, 24, 5, 2), (96, 40, 3, 2), (64, 40, 5, 1), (120, 48, 5, 2), (130, 48, 3, 1)],
}


def features(engines, net, images, size, threads, shifts=None):
    e = engines.Engine(threads)
    grid = size // 16
    e.keep(e.features(net, size, grid, net.taps)[0], grid * grid, sum(net.channels))
    e.finish()
    return e.run(images, outputs=True, shifts=shifts).outputs[0]


def reference(net, images, size, shifts=None):
    shifts = shifts or [(0, 0)] * len(images)
    settings = SimpleNamespace(size=size)
    return np.stack([fp._reference_tokens(a, net, settings, s) for a, s in zip(images, shifts)])


def pictures(count, rng):
    return [rng.integers(0, 256, (*rng.integers(30, 200, 2), 3), np.uint8) for _ in range(count)]


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_compute_the_reference(engines, name):
    net, rng = network(7, NETWORKS[name]), np.random.default_rng(1)
    for size in (64, 96):
        images = pictures(16, rng)
        shifts = [tuple(s) for s in rng.uniform(-.05, .05, (16, 2))]
        want = reference(net, images, size, shifts)
        assert len(np.unique(want)) > 20
        for threads in (1, 2):
            for batch in (1, 2, 3, 16):
                got = features(engines, net, images[:batch], size, threads, shifts[:batch])
                np.testing.assert_array_equal(got, want[:batch])


@pytest.mark.parametrize("fill", [127, -127])
def test_extremes(engines, fill):
    """Weights and pixels at the ends of their ranges: sums as large as they get, outputs clipped."""
    blocks = [(32, 16, 3, 1), (256, 16, 5, 2), (128, 16, 3, 2), (96, 16, 5, 1), (320, 16, 5, 2)]
    net = network(5, blocks, fill)
    images = [np.full((64, 64, 3), v, np.uint8) for v in (0, 1, 127, 128, 254, 255)]
    np.testing.assert_array_equal(features(engines, net, images, 64, 2), reference(net, images, 64))


def test_ties_go_to_even_and_residuals_saturate(engines):
    net = network(7, [(8, 8, 3, 1), *[(16, 8, 3, stride) for stride in (2, 1, 1, 2, 2)]])
    for block in net.blocks:
        for name, a in block.arrays.items():
            if name.endswith("_m") and name != "input_m":
                a[...] = 30. if name == "project_m" else 2.0 ** -9  # exact halves; projections beyond 32767
    images = pictures(4, np.random.default_rng(2))
    want = reference(net, images, 64)
    np.testing.assert_array_equal(features(engines, net, images, 64, 2), want)
    assert np.abs(want).max() >= .9 * 32767 * net.scales.min()


def test_lite0_is_the_same_by_numpy_and_numba():
    net = fp.load_backbone("lite0")
    images = pictures(6, np.random.default_rng(3))
    net = fp.quantize_on(net, images, 96)
    assert isinstance(net, fp.QuantizedBackbone) and fp._cpu_engines() is not None
    for threads in (1, 2):
        got = features(fp._cpu_engines(), net, images, 96, threads)
        np.testing.assert_array_equal(got, reference(net, images, 96))


def test_integers_are_near_the_floats():
    net = fp.load_backbone("lite0")
    yy, xx = np.mgrid[:96, :96] / 96
    waves = [[128 + 100 * np.sin(6 * (xx * k + yy * c)) for c in (1, 2, 3)] for k in range(3)]
    images = [np.stack(wave, -1).astype(np.uint8) for wave in waves]
    got, want = (reference(b, images, 96) for b in (fp.quantize_on(net, images, 96), net))
    for stage in np.split(np.arange(got.shape[-1]), np.cumsum(net.channels)[:-1]):
        error = got[..., stage] - want[..., stage]
        assert np.std(error) < .35 * np.std(want[..., stage])


def test_ranges_do_not_depend_on_the_order_of_images():
    net, images = fp.load_backbone("lite0"), pictures(30, np.random.default_rng(4))
    first, second = (fp.quantize_on(net, order, 64).to_arrays() for order in (images, images[::-1]))
    assert all(np.array_equal(a, second[k]) for k, a in first.items())


def test_sums_beyond_float32_are_refused():
    net = network(1, [(8, 8, 3, 1), (8, 520, 3, 2), (8, 8, 3, 2), (8, 8, 3, 2)])
    with pytest.raises(fp.ModelError, match="2\\^24"):
        network(1, [(8, 8, 3, 1), (520, 8, 3, 2), (8, 8, 3, 2), (8, 8, 3, 2)], fill=127)
    changes = {"project_b": np.full(8, 1 << 24, np.int32), "dw_m": np.full(8, 200, np.float32),
               "project_m": np.full(8, np.nan, np.float32), "dw_b": np.zeros(8, np.int64),
               "input_m": np.zeros(2, np.float32), "dw_w": np.zeros((3, 3, 8), np.float32)}
    for name, array in changes.items():
        blocks = list(net.blocks)
        blocks[3] = dataclasses.replace(blocks[3], arrays=blocks[3].arrays | {name: array})
        with pytest.raises(fp.ModelError, match="2\\^24" if name == "project_b" else name):
            dataclasses.replace(net, blocks=tuple(blocks)).check()


def test_backbone_survives_its_file(tmp_path):
    net = network(2, NETWORKS["odd"])
    fp._write_npz(tmp_path / "b.npz", net.header(), net.to_arrays())
    again = fp.Backbone.from_arrays(*fp._read_npz(tmp_path / "b.npz"))
    images = pictures(1, np.random.default_rng(5))
    np.testing.assert_array_equal(reference(again, images, 64), reference(net, images, 64))
    header, arrays = fp._read_npz(tmp_path / "b.npz")
    for name in arrays:
        with pytest.raises(fp.ModelError):
            fp.Backbone.from_arrays(header, {k: a for k, a in arrays.items() if k != name})


def test_a_lite_model_is_in_integers_and_scores_alike_without_numba(washers, tmp_path, monkeypatch):
    prior = fp.fit(washers, size=64, iterations=0, copies=0)
    prior.save(tmp_path / "m.npz")
    again = fp.Prior.load(tmp_path / "m.npz")
    images = [fp.load_image(p) for p in fp.find_images(washers / "test")[:5]]
    assert again.backbone.integer
    scores = [r.score for r in prior.score_batch(images)]
    assert scores == [r.score for r in again.score_batch(images)]
    monkeypatch.setattr(fp, "_cpu_engines", lambda: None)
    slow = [r.score for r in fp.Prior.load(tmp_path / "m.npz").score_batch(images)]
    np.testing.assert_allclose(slow, scores, rtol=2e-4, atol=2e-4)


def test_products_that_were_quantised_apart_are_no_one_model(washers):
    images = [fp.load_image(p) for p in fp.find_images(washers)]
    first, second = (fp.fit([a // k for a in images], size=64, iterations=0, copies=0) for k in (1, 4))
    with pytest.raises(fp.ModelError, match="fit_many"):
        fp.MultiPrior({"first": first, "second": second})
    fp.MultiPrior({"first": first, "second": first})


@pytest.mark.parametrize("cpu, lanes, features", [
    ("sapphirerapids", 16, "+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd,+avx512vnni,+avx2,+fma"),
    ("alderlake", 8, "+avx2,+fma,+avxvnni")])
def test_vnni_is_compiled_to_its_instruction(cpu, lanes, features):
    """Products become vpdpbusd where the CPU has it; what it computes is held to `quads` above."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import fastprior as fp
from llvmlite import binding
m = fp._engines("cpu")
def host():
    vars(m).update(_LANES={lanes}, _TILE={lanes // 2}, _DOT="vpdpbusd", _GROUP=4)
    return {cpu!r}, {features!r}
class Machine:
    def emit_object(self, module):
        print(machine.emit_assembly(module)); sys.exit()
def compile_only(found):
    global machine; machine = found
    original(Machine())
original, m._compile_kernels, m._host = m._compile_kernels, compile_only, host
m._read_object = lambda path: None
m._KERNELS[:] = [k for k in m._KERNELS if k.fields is None or k.__name__ == "_mbconv_integer"]
m.load_kernels()
"""
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.count("vpdpbusd") > 100 and "vpmaddubsw" not in done.stdout, done.stderr[-500:]


def test_the_gpu_engine_says_that_it_has_no_integers():
    cuda = fp._engines("cuda")
    with pytest.raises(cuda.Unavailable, match="device='cpu'"):
        cuda.Engine.features(None, network(1, NETWORKS["odd"]), 64, 4, fp.fixed_point_taps)
