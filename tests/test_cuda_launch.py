"""The CUDA engine without a GPU: its launches run on the CPU through the stand-in of emulated_cuda.py.

The whole model therefore runs "on CUDA", its launches, arguments, memory plan and graphs included, and
its scores are held against the CPU path's.
"""
import copy
import ctypes
import pickle
import sys
import types

import numpy as np
import pytest

import fastprior as fp
from damaged_models import coarse_of, fine_of, half, tiny_backbone, tiny_prior
from emulated_cuda import DeviceArray, FakeCupy, LaunchError, gxx

engines = fp._engines("cuda")
pytestmark = pytest.mark.skipif(gxx() is None, reason="no g++ with 16-bit floats to emulate CUDA with")

# Relative to the larger of 1 (a standard deviation) and the value. float32 differs by the order of sums and
# by the 22 bits of a split factor; float16 rounds every activation to 11 bits, and whitening magnifies that.
TOLERANCE = {"float32": 1e-5, "float16": 1e-2}


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    engines.import_cupy.cache_clear()
    yield fake
    engines.import_cupy.cache_clear()


def small_backbone(rng):
    """Odd channel counts, every size and stride, squeeze-excitation, a block without expansion, a skip."""
    def w(*shape, scale):
        return (rng.standard_normal(shape) * scale).astype(np.float16).astype(np.float32)

    def block(c_in, mid, out, size, stride, squeeze, expands, skip=False):
        p = {"dw_w": w(size, size, mid, scale=1.5 / size), "dw_b": w(mid, scale=.1),
             "project_w": w(mid, out, scale=mid ** -.5), "project_b": w(out, scale=.1)}
        if expands:
            p |= {"expand_w": w(c_in, mid, scale=c_in ** -.5), "expand_b": w(mid, scale=.1)}
        if squeeze:
            p |= {"se_reduce_w": w(mid, squeeze, scale=mid ** -.5), "se_reduce_b": w(squeeze, scale=.1),
                  "se_expand_w": w(squeeze, mid, scale=1), "se_expand_b": w(mid, scale=.1)}
        return fp.InvertedResidual(p, stride, fp.SILU, skip)
    blocks = (block(12, 12, 10, 3, 1, 3, False), block(10, 20, 14, 5, 2, 5, True),
              block(14, 28, 14, 3, 1, 0, True, True), block(14, 30, 18, 3, 2, 4, True),
              block(18, 36, 22, 5, 2, 4, True), block(22, 44, 22, 5, 1, 4, True, True),
              block(22, 44, 21, 5, 1, 4, True))
    return fp.Backbone("small", (.485, .456, .406), (.229, .224, .225), fp.SILU, w(3, 3, 3, 12, scale=.3),
                       w(12, scale=.1), blocks, (0, 2, 3, 5, 6))


def model(backbone="small", size=64, steps=2, variant="whitened", denoiser=True, seed=0, **where):
    """A prior with random weights; calibrated so that scores are of the order of one."""
    rng = np.random.default_rng(seed)
    backbone = small_backbone(rng) if backbone == "small" else fp.load_backbone(backbone)
    settings = fp.Settings(backbone=backbone.name, size=size, steps=steps, variant=variant, width=48,
                           worst=.1, factors=0 if variant == "plain" else 10, coarse=True)
    n, c = int(np.prod(settings.grid)), sum(backbone.channels)
    mean = rng.standard_normal((n, c)).astype(np.float32)
    if variant == "plain":
        whitener = rng.uniform(.5, 2, (n, c)).astype(np.float32)
    else:
        whitener = fp.pack_lower(np.tril(rng.standard_normal((n, c, c)) / np.sqrt(c)) + np.eye(c))
    factors = None
    if variant != "plain":
        factors = fp.pack_factors(rng.standard_normal((10, n, c)) * .3 / np.sqrt(n * c))
    weights = None
    if denoiser:
        weights = fp._room("training").initial_denoiser(n, c, settings)
        weights["out_w"] = (rng.standard_normal(weights["out_w"].shape) / 20).astype(np.float32)
        weights["out_b"] = (rng.standard_normal(c) / 20).astype(np.float32)
        weights["gain_w"] = (rng.standard_normal(weights["gain_w"].shape) / 20).astype(np.float32)
    fine, coarse = fine_of(rng, backbone, settings), coarse_of(rng, backbone, settings)
    k = n + (len(coarse[0]) if coarse else 0)
    flat = {"gain": np.ones(k, np.float32), "offset": np.zeros(k, np.float32),
            "moments": np.array([0, 1, 0.0]), "scores": np.sort(rng.standard_normal(50)),
            "peaks": np.linspace(90, 100, 50)}

    def make(calibration, **where):
        return fp.Prior(settings, backbone, mean, whitener, weights, {steps: calibration}, {},
                        factors=factors, fine=fine, coarse=coarse, **where)
    raw = make(flat).z(images(seed=9))
    unit = np.float32(1 / raw[:, :n].std())
    calibration = flat | {"gain": np.full(k, unit), "offset": -raw.mean(0) * unit}
    return make(calibration, **where), make(calibration)


def images(seed=1, sizes=((70, 90), (96, 96), (41, 33))):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


def in_integers(backbone, shape):
    """The backbone, settings, and images of which some are all ends: white, and a step from black to it.

    "tiny" has widths that are no multiple of anything.
    """
    tiny = tiny_backbone(np.random.default_rng(0), channels=(5, 7, 8, 17, 17))
    step = np.zeros((96, 60, 3), np.uint8)
    step[:, 25:] = 255
    batch = [*images(), step, np.full((50, 70, 3), 255, np.uint8)]
    settings = fp.Settings(size=shape)
    net, _ = fp._room("quantization").quantize_on(tiny if backbone == "tiny" else fp.load_backbone(backbone),
                                                    batch, settings)
    assert net.integer
    return net, settings, batch


def feature_engine(backbone, settings, precision):
    """As fp._feature_engine, in any precision."""
    e, views = engines.Engine(precision), backbone.views(settings)
    for (x, _), (grid, blocks) in zip(e.features(backbone, settings.shape, views, backbone.taps), views):
        e.keep(x, int(np.prod(grid)), sum(backbone.blocks[i].channels[2] for i in blocks))
    e.finish()
    return e


def check_features_in_integers(backbone, precision, shape=(64, 96)):
    """Bit for bit those of the reference, alone and in a batch, with a shift too."""
    net, settings, batch = in_integers(backbone, shape)
    shifts = [(.02, -.03), *[(0.0, 0.0)] * (len(batch) - 1)]
    want = [net.features(net.pixels(image, shape, shift), *net.views(settings))
            for image, shift in zip(batch, shifts)]
    assert all(len(np.unique(view)) > .5 * view.size for view in want[0])
    e = feature_engine(net, settings, precision)
    for part in (slice(2, 3), slice(0, len(batch))):
        frames = e.run(batch[part], outputs=True, shifts=shifts[part])
        for view, of_images in zip(frames.outputs, zip(*want[part]), strict=True):
            np.testing.assert_array_equal(frames.to_host(view), of_images)


def relative(got, want):
    return float((np.abs(got - want) / np.maximum(1, np.abs(want))).max())


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("case", [
    {}, {"size": (64, 96), "steps": 3}, {"variant": "plain", "steps": 1}, {"denoiser": False},
    {"backbone": "lite0", "size": 64, "steps": 2}],
    ids=["small", "three-steps-wide", "plain", "no-denoiser", "lite0"])
def test_whole_model_agrees_with_the_cpu(cuda, case, precision):
    gpu, cpu = model(**case, device="cuda", precision=precision)
    batch = images()
    assert gpu.backend == "cuda"
    want, got = cpu.z(batch), gpu.z(batch)
    assert got.dtype == np.float32 and got.shape == want.shape
    assert relative(got, want) < TOLERANCE[precision]
    for a, b in zip(gpu.score_batch(batch), cpu.score_batch(batch)):
        assert relative(a.score, b.score) < TOLERANCE[precision]
        assert relative(a.anomaly_map, b.anomaly_map) < TOLERANCE[precision]
        assert abs(b.score - b.threshold) > .02, "too close to call: choose another seed"
        assert a.is_anomaly == b.is_anomaly and a.verdict == b.verdict and a.threshold == b.threshold


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("backbone", ["lite0", "tiny"])
def test_features_in_integers_are_those_of_the_reference(cuda, backbone, precision):
    check_features_in_integers(backbone, precision)


def test_a_backbone_in_integers_needs_no_more_launches(cuda):
    (net, settings, _), launches = in_integers("lite0", (64, 96)), []
    for backbone in (fp.load_backbone("lite0"), net):
        e = engines.Engine()
        e.features(backbone, settings.shape, backbone.views(settings), backbone.taps)
        launches.append(len(e.steps))
    assert launches[0] == launches[1]


def test_whole_model_in_integers_agrees_with_numpy(cuda, monkeypatch):
    monkeypatch.setattr(fp, "_cpu_engines", lambda *_: None)
    net, settings, _ = in_integers("lite0", (64, 96))
    gpu, cpu = model(net, settings.size, steps=1, device="cuda", precision="float32")
    assert (gpu.backend, cpu.backend) == ("cuda", "numpy")
    assert relative(gpu.z(images()), cpu.z(images())) < TOLERANCE["float32"]


def test_a_region_of_interest_agrees_with_the_cpu(cuda):
    """By the same launches; images that lie on the GPU too, whose maps stay there."""
    prior = tiny_prior(roi=half())
    batch = images(sizes=((40, 56), (80, 112)))
    want = prior.score_batch(batch)
    prior.device = "cuda"
    gpu = prior.with_steps(2)
    for given in (batch, [cuda.asarray(image) for image in batch]):
        for a, b in zip(gpu.score_batch(given), want):
            assert relative(a.score, b.score) < TOLERANCE["float32"]
            assert relative(a.anomaly_map, b.anomaly_map) < TOLERANCE["float32"]
            assert (a.anomaly_map[~prior.roi.at(*a.anomaly_map.shape)[0]] == 0).all()
            assert isinstance(a.device_map, DeviceArray)


@pytest.mark.parametrize("schedule", [1, 7])
def test_whole_model_does_not_depend_on_the_order_of_threads(cuda, schedule):
    gpu, _ = model(device="cuda", precision="float32")
    want = gpu.z(images())
    cuda.schedule = schedule
    np.testing.assert_array_equal(gpu.z(images()), want)


def test_a_batch_too_large_for_the_gpu_does_not_spoil_the_next(cuda, monkeypatch):
    gpu, _ = model(device="cuda", precision="float32")
    want, empty = gpu.z(images()[:1]), cuda.empty

    def full(shape, *rest):
        if np.prod(shape) > 1 << 16:
            raise MemoryError
        return empty(shape, *rest)
    monkeypatch.setattr(cuda, "empty", full, raising=False)
    with pytest.raises(MemoryError):
        gpu.z(images())
    monkeypatch.setattr(cuda, "empty", empty, raising=False)
    np.testing.assert_array_equal(gpu.z(images()[:1]), want)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_score_does_not_depend_on_the_batch(cuda, precision):
    gpu, _ = model(device="cuda", precision=precision)
    batch = images(sizes=((70, 90),) * 9)
    together = gpu.z(batch)
    for i in (0, 4, 8):
        np.testing.assert_array_equal(gpu.z(batch[i:i + 1])[0], together[i])


def test_first_frame_is_launched_and_captured_later_ones_replay_one_graph(cuda):
    gpu, _ = model(device="cuda")
    first = [r.score for r in gpu.score_batch(images())]
    launched, compiled = len(cuda.launches), cuda.modules
    assert cuda.replays == 0 and set(gpu._engine().frames) == {3}
    again = [r.score for r in gpu.score_batch(images())]
    other = [r.score for r in gpu.score_batch(images(seed=2, sizes=((50, 50), (51, 60), (99, 200))))]
    assert cuda.replays == 2 and len(cuda.launches) == launched and cuda.modules == compiled
    assert again == first and not np.allclose(other, first)
    gpu.score_batch(images()[:2])
    assert set(gpu._engine().frames) == {2, 3}
    gpu.score_batch(images() + images())  # more than the workspace holds: a larger one, and every graph anew
    assert set(gpu._engine().frames) == {6} and cuda.replays == 2
    assert [r.score for r in gpu.score_batch(images())] == first


def test_a_frame_is_launched_as_the_kernels_expect(cuda):
    gpu, _ = model(device="cuda", steps=2)
    gpu.score(images()[0])
    names = [name for name, *_ in cuda.launches[:len(gpu._engine().steps)]]
    gate = ["squeeze", "excite", "product"]
    blocks = [["depthwise_31", *gate, "pool"],
              ["product", "depthwise_52", *gate],
              ["product", "depthwise_31", "product", "pool", "pool"],  # to the coarse and to the fine grid
              ["product", "depthwise_32", *gate, "pool", "pool"],
              ["product", "depthwise_52", *gate],
              *[["product", "depthwise_51", *gate, "pool"]] * 2]
    step = ["product", "layer_norm", "product", "product", "layer_norm", "product", "product", "layer_norm",
            "product", "rotate_density"]
    assert names == [
        "resize_normalize", "stem", *sum(blocks, []), "fine_density", "coarsen", "whiten",
        "whiten", *["project_factors", "sum_factors", "remove_factors"] * 2, *step, *step,
        *["rotate_density"] * 2, "worst_mean", "sharpen", "anomaly_map"]
    rotations = [args for name, _, _, args in cuda.launches if name == "rotate_density"][:2]
    assert (rotations[0][4] != 0, rotations[1][4] != 0) == (True, False)  # at the last step x' goes nowhere
    assert (rotations[0][7] != 0, rotations[1][7] != 0) == (False, True)  # and z only there
    np.testing.assert_allclose([[a[2], a[3]] for a in rotations], fp.rotation(gpu.timesteps), rtol=1e-6)


def test_arrays_on_the_gpu_are_not_copied_and_results_stay_there(cuda, monkeypatch):
    gpu, cpu = model(device="cuda", precision="float32")
    batch = images()
    on_gpu = [cuda.asarray(i) for i in batch]

    class Foreign:  # another library's CUDA array
        __cuda_array_interface__ = on_gpu[1].__cuda_array_interface__
    gpu.score_batch([on_gpu[0], Foreign(), on_gpu[2]])
    made, fetched, get = [], [], DeviceArray.get
    monkeypatch.setattr(cuda, "asarray", lambda a, *r, real=cuda.asarray: made.append(a) or real(a, *r))
    monkeypatch.setattr(DeviceArray, "get", lambda self: fetched.append(1) or get(self))
    results = gpu.score_batch([on_gpu[0], Foreign(), on_gpu[2]])
    rows = gpu._engine().table.host[:3]
    assert [int(p) for p in rows[:, 0]] == [a.data.ptr for a in on_gpu]
    assert not any(isinstance(a, np.ndarray) for a in made) and not fetched
    want = cpu.score_batch(batch)
    assert relative(np.array([r.score for r in results]), np.array([r.score for r in want])) < 1e-5
    assert len(fetched) == 1  # three scores, one copy
    assert results[2].device_map.shape == batch[2].shape[:2]
    assert results[2].anomaly_map is results[2].anomaly_map
    assert len(fetched) == 2
    assert results[0].p_value == fp.conformal_p_value(results[0].score, gpu.calibration["scores"])


def test_results_survive_later_frames(cuda):
    gpu, _ = model(device="cuda")
    first, second = gpu.score(images()[0]), gpu.score(images(seed=5)[0])
    assert first.score == gpu.score(images()[0]).score != second.score
    np.testing.assert_array_equal(first.anomaly_map, gpu.score(images()[0]).anomaly_map)
    assert gpu.score(images()[0], with_map=False).anomaly_map is None


def test_results_are_read_while_another_gpu_is_current(cuda):
    gpu, _ = model(device="cuda")
    want = gpu.score(images()[0])
    want.score, want.anomaly_map
    with cuda.cuda.Device(1), cuda.cuda.Stream(non_blocking=True):
        with pytest.raises(LaunchError, match="GPU 0 is read while GPU 1"):
            want.device_map.get()
        result = gpu.score(images()[0])
        assert result.score == want.score and result.device_map.device.id == 0
        np.testing.assert_array_equal(result.anomaly_map, want.anomaly_map)
        np.testing.assert_array_equal(gpu.z(images()[:1]), gpu.z(images()[:1]))
        with pytest.raises(fp.ShapeError, match="image on GPU 1, the model is on GPU 0"):
            gpu.score(cuda.asarray(images()[0]))


def test_a_result_that_is_pickled_leaves_the_gpu(cuda):
    gpu, _ = model(device="cuda")
    result = gpu.score_batch(images())[1]
    again = pickle.loads(pickle.dumps(result))
    assert (again.score, again.p_value, again.verdict) == (result.score, result.p_value, result.verdict)
    assert isinstance(again.device_map, np.ndarray)
    np.testing.assert_array_equal(again.anomaly_map, result.anomaly_map)


@pytest.mark.parametrize("twin_of", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))],
                         ids=["copy", "deepcopy", "pickle"])
def test_a_prior_is_copied_with_its_device(cuda, twin_of):
    gpu, _ = model(device="cuda", size=64)
    twin = twin_of(gpu)
    assert twin.backend == "cuda" and twin.score(images()[0]).score == gpu.score(images()[0]).score
    assert twin._engine() is not gpu._engine()


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_several_products_on_the_gpu_are_those_of_the_cpu(cuda, precision):
    def products(prior, **where):
        """Two that differ by little: each takes some of the images."""
        shifted = fp.Prior(prior.settings, prior.backbone, prior.mean + np.float32(.03), prior.whitener,
                           prior.denoiser, prior.calibrations, {}, factors=prior.factors, fine=prior.fine,
                           coarse=prior.coarse, **where)
        return fp.MultiPrior({"one": prior, "two": shifted})
    gpu, cpu = model(device="cuda", precision=precision)
    gpu, cpu = products(gpu, device="cuda", precision=precision), products(cpu)
    batch = [image // (4 if k % 2 else 1) for k, image in enumerate(
        images(sizes=((96, 96), (41, 33), (90, 80), (60, 61))))]
    want = cpu.score_batch(batch)
    z = np.array([p.z(batch)[:, :len(p.mean)].mean(-1) for p in cpu.priors.values()])  # what decides
    assert set(z.argmin(0)) == {0, 1} and np.abs(z[0] - z[1]).min() > .0015, "choose another shift"
    mixed = [cuda.asarray(i) if k % 2 else i for k, i in enumerate(batch)]
    for given in (batch, mixed, [cuda.asarray(i) for i in batch]):
        for a, b in zip(gpu.score_batch(given, chunk=3), want, strict=True):
            assert a.product == b.product and relative(a.score, b.score) < TOLERANCE[precision]
            assert relative(a.anomaly_map, b.anomaly_map) < TOLERANCE[precision]
    again = pickle.loads(pickle.dumps(gpu))
    assert [r.score for r in again.score_batch(batch, chunk=3)] == [
        r.score for r in gpu.score_batch(batch, chunk=3)]


def test_only_some_stages_run_again(cuda):
    gpu, _ = model(device="cuda")
    want = gpu.score(images()[0])
    want.score
    cuda.launches.clear()
    gpu._engine().run_only(["map", "density"], images()[:1])
    assert [name for name, *_ in cuda.launches] == [
        "fine_density", *["rotate_density"] * 4, "worst_mean", "sharpen", "anomaly_map"]
    assert gpu.score(images()[0]).score == want.score


def test_the_image_table_is_copied_only_when_it_changes(cuda):
    gpu, _ = model(device="cuda")
    frame, results = cuda.asarray(images()[0]), []
    results.append(gpu.score(frame, with_map=False))
    before = len(cuda.copies)
    results.append(gpu.score(frame, with_map=False))  # the first is kept, so this one has its own memory
    assert len(cuda.copies) == before + 1 and cuda.copies[-1] == 15 * 8
    engine = gpu._engine()
    monkey = engine.written.copy()
    engine.write_table(monkey, cuda.cuda.get_current_stream())
    assert len(cuda.copies) == before + 2


def test_buffers_share_memory_but_never_while_both_live(cuda):
    engine = model(device="cuda")[0]._engine()
    launches, lives = [make(1) for _, make in engine.steps], {}
    for i, launch in enumerate(launches):
        # what a branch names lives on until the trunk has waited for the branch
        joins = [k for k, later in enumerate(launches)
                 if k > i and not later.beside and launch.beside in later.waits]
        end = min(joins, default=len(launches)) if launch.beside else i
        for a in launch.args:
            if isinstance(a, engines.Buffer):
                lives.setdefault(a, []).extend([i, end])
    buffers = list(lives)
    assert engine.image_bytes < .6 * sum(b.size for b in buffers)
    for i, a in enumerate(buffers):
        for b in buffers[:i]:
            together = max(lives[a][0], lives[b][0]) <= min(max(lives[a]), max(lives[b]))
            apart = a.offset + a.size <= b.offset or b.offset + b.size <= a.offset
            assert apart or not together


def test_what_a_branch_made_is_waited_for(cuda):
    launches = [make(1) for _, make in model(device="cuda")[0]._engine().steps]
    made, waited, branches = {}, set(), set()
    for launch in launches:
        seen = {*launch.waits, launch.beside} | (set() if launch.beside else waited)
        waited |= set() if launch.beside else {*launch.waits}
        for a in launch.args:
            if isinstance(a, engines.Buffer):
                assert made.setdefault(a, launch.beside) in seen | {None}
        branches.add(launch.beside)
    assert branches == {None, "pools", "fine", "score"} and waited == {"pools", "fine"}


def test_a_captured_graph_overlaps_the_launches_of_its_trunk(cuda, monkeypatch):
    def driver(configuration, function, arguments, extra):
        c = configuration._obj
        a = c.attributes[0]
        assert (c.count, a.id, a.value, c.stream, extra) == (1, 6, 1, 77, None)
        given.append((tuple(c.grid), tuple(c.block), c.shared, function.value, ctypes.c_uint64.from_address(
            arguments[0]).value, ctypes.c_int32.from_address(arguments[1]).value, ctypes.c_float.from_address(
            arguments[2]).value))
        return refusal
    given, refusal, stream = [], 0, types.SimpleNamespace(ptr=77)
    monkeypatch.setattr(engines, "overlapping_launch", lambda: driver)
    array = cuda.empty(4)
    kernel = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=99))
    launch = engines.Launch(kernel, (3, 1, 2), (32, 4), (array, np.int32(5), np.float32(.5)))
    assert engines.launch_overlapping(launch, stream)
    assert given == [((3, 1, 2), (32, 4, 1), 0, 99, array.data.ptr, 5, .5)]
    refusal = 1
    assert not engines.launch_overlapping(launch, stream)
    assert not engines.launch_overlapping(launch._replace(kernel=object()), stream)  # no CuPy kernel


def test_torch_tensors_run_on_torchs_stream(cuda, monkeypatch):
    gpu, _ = model(device="cuda")

    class Tensor:
        __cuda_array_interface__ = cuda.asarray(images()[0]).__cuda_array_interface__
    stream = types.SimpleNamespace(cuda_stream=1234)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(
        Tensor=Tensor, cuda=types.SimpleNamespace(current_stream=lambda device: stream)))
    assert gpu._engine().stream_of([images()[0]]) is cuda.cuda.get_current_stream()
    assert gpu._engine().stream_of([Tensor()]).ptr == 1234
    stream.cuda_stream = 0
    assert gpu._engine().stream_of([Tensor()]).ptr == 0


@pytest.mark.parametrize("bad", [np.zeros((40, 40, 4), np.uint8), np.zeros((40, 40, 3), np.float32),
                                 np.zeros((4, 40, 3), np.uint8)])
def test_a_wrong_array_on_the_gpu_is_a_shape_error(cuda, bad):
    gpu, cpu = model(device="cuda")
    with pytest.raises(fp.ShapeError, match="expected uint8"):
        gpu.score(cuda.asarray(bad))
    with pytest.raises(fp.ShapeError, match="device='cuda'"):
        cpu.score(cuda.asarray(images()[0]))


def raising(error):
    def fail(*_, **__):
        raise error
    return fail


def no_kernels(name):
    raise fp.BackendUnavailable("nowhere is missing: copy the folder kernels/ beside fastprior.py")


@pytest.mark.parametrize("break_it, message", [
    (lambda m, c: m.setitem(sys.modules, "cupy", None), "CuPy is missing.*pip install cupy-cuda12x.*13x"),
    (lambda m, c: m.setattr(c.cuda.runtime, "driverGetVersion", lambda: 0), "no NVIDIA driver"),
    (lambda m, c: m.setattr(c.cuda.runtime, "driverGetVersion", lambda: 11080), "CUDA up to 11.*needs 12"),
    (lambda m, c: m.setattr(c.cuda.runtime, "getDeviceCount", lambda: 0), "no GPU is visible"),
    (lambda m, c: m.setattr(c.cuda.runtime, "getDeviceCount", raising(RuntimeError("wedged"))),
     "no GPU answers .wedged"),
    (lambda m, c: m.setattr(fp, "_engines", no_kernels), "copy the folder kernels/"),
], ids=["cupy", "driver", "old-driver", "gpu", "wedged", "kernels"])
def test_what_is_missing_is_named_and_auto_falls_back(cuda, monkeypatch, break_it, message):
    assert fp.resolve_device("auto") == "cuda"
    engines.import_cupy.cache_clear()
    break_it(monkeypatch, cuda)
    with pytest.raises(fp.BackendUnavailable, match=message) as caught:
        fp.resolve_device("cuda")
    assert "\n" not in str(caught.value)
    assert fp.resolve_device("auto") == "cpu"


def turing(monkeypatch, cuda, capability):
    properties = cuda.cuda.runtime.getDeviceProperties(0) | {"major": capability[0], "minor": capability[1]}
    monkeypatch.setattr(cuda.cuda.runtime, "getDeviceProperties", lambda i: properties)


class CompileException(Exception):
    """As CuPy's: no RuntimeError, and the compiler's text of many lines."""


def no_compiler(error):
    return lambda m, c: m.setattr(c.RawModule, "get_function", raising(error))


@pytest.mark.parametrize("break_it, message", [
    (lambda m, c: turing(m, c, (7, 0)), r"emulated has compute capability 7\.0, 7\.5 .*device='cpu'"),
    (lambda m, c: turing(m, c, (6, 1)), r"capability 6\.1"),
    (no_compiler(CompileException("\nkernel.cu(3): bad\nmore")), r"kernels/\w+\.cu \(kernel\.cu\(3\): bad\)"),
    (no_compiler(CompileException()), "CompileException"),
    (no_compiler(RuntimeError("libnvrtc.so.12: cannot open")), r"libnvrtc.*cupy-cuda12x\[ctk\]"),
    (lambda m, c: m.setattr(engines, "__file__", "/nowhere/cuda.py"), "nowhere.*copy the whole folder"),
], ids=["volta", "pascal", "source", "wordless", "nvrtc", "cu"])
def test_an_engine_that_cannot_be_built_says_why_and_auto_falls_back(cuda, monkeypatch, caplog, break_it,
                                                                     message):
    break_it(monkeypatch, cuda)
    engines.kernel_source.cache_clear()
    with pytest.raises(fp.BackendUnavailable, match=message) as caught:
        model(device="cuda")
    assert "\n" not in str(caught.value)
    gpu, cpu = model(device="auto")
    assert gpu.device == "cpu" and gpu.backend == cpu.backend
    assert [r.getMessage() for r in caplog.records] == [f"scoring on the CPU: {caught.value}"]
    assert gpu.score(images()[0]).score == cpu.score(images()[0]).score


def test_auto_falls_back_from_a_gpu_that_is_full(cuda, monkeypatch, caplog):
    monkeypatch.setattr(engines.Engine, "finish", raising(MemoryError("Out of memory allocating 9 bytes")))
    with pytest.raises(MemoryError):
        model(device="cuda")
    gpu, _ = model(device="auto")
    assert gpu.device == "cpu" and "scoring on the CPU: Out of memory" in caplog.text


def test_an_image_that_no_gpu_takes_is_an_error_of_its_own(cuda):
    gpu, _ = model(device="cuda")
    good = images()[0]
    wrong = [cuda.asarray(np.zeros(shape, kind)) for shape, kind in (
        ((4, 64, 3), np.uint8), ((64, 64), np.uint8), ((64, 64, 3), np.float32))]
    wrong.append(np.zeros((8, 32769, 3), np.uint8))
    results = gpu.score_batch([good, *wrong, good], errors="return")
    assert results[0].score == results[-1].score
    assert all(isinstance(r, fp.ShapeError) and "8 to 32768 pixels" in str(r) for r in results[1:-1])


def test_turing_is_enough(cuda, monkeypatch):
    turing(monkeypatch, cuda, (7, 5))
    assert model(device="cuda")[0].backend == "cuda"


def test_unknown_device_and_precision_are_errors(cuda):
    with pytest.raises(fp.ShapeError, match="'cpu', 'cuda' or 'auto'"):
        model(device="gpu")
    with pytest.raises(fp.ShapeError, match="'float32' or 'float16'"):
        model(device="cuda", precision="bfloat16")


@pytest.mark.parametrize("change, message", [
    (lambda a: (a[1], a[0], *a[2:]), None),  # two addresses swapped: only the numbers can tell
    (lambda a: (*a[:3], a[4], a[3], *a[5:]), "argument 3"),
    (lambda a: a[:-1], "5 arguments for 6 parameters"),
    (lambda a: (*a[:4], np.int64(a[4]), a[5]), "argument 4"),
], ids=["swapped", "kind", "count", "width"])
def test_the_stand_in_refuses_wrong_arguments(cuda, change, message):
    engine = model(device="cuda", precision="float16")[0]._engine()
    kernel = engine.kernel("layer_norm")
    x, gain = (cuda.asarray(np.arange(n, dtype=t)) for n, t in ((64, np.float16), (64, np.float32)))
    out = cuda.zeros(64, np.float16)
    good = (x, gain, gain, out, np.int32(1), np.int32(64))
    kernel((1,), (32,), good)
    right = out.get()
    if message:
        with pytest.raises(LaunchError, match=message):
            kernel((1,), (32,), change(good))
    else:
        kernel((1,), (32,), change(good))
        assert not np.array_equal(out.get(), right)


def test_bench_reports_every_figure(cuda):
    engine = model(device="cuda", size=64)[0]._engine()
    report = engines.bench_cuda(engine, images=(1, 2), frames=2, pixels=(32, 32), values=1 << 14)
    assert set(report["batches"]) == {1, 2}
    assert set(report["stages_p50_ms"]) == set(fp.STAGES)
    assert report["gpu"] == "emulated" and report["rotate_share_of_copy"] > 0
