"""The model file: the damaged, hostile or absurd is refused by one line; writing is all or nothing."""
import json
import os
import stat
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest

import damaged_models as dm
import fastprior as fp
from conftest import ROOT


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of every part, of 100 kB."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    dm.tiny_prior().save(path)
    return path


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    path, net = tmp_path_factory.mktemp("several") / "several.npz", dm.tiny_backbone(np.random.default_rng(9))
    fp.MultiPrior({"a": dm.tiny_prior(4, backbone=net), "b": dm.tiny_prior(5, backbone=net)}).save(path)
    return path


def refused(path, match=None):
    with pytest.raises(fp.ModelError, match=match) as e:
        fp.Prior.load(path)
    assert "\n" not in str(e.value) and str(e.value).startswith(f"{path}: ") and len(str(e.value)) < 700


def header_changed(source, target, change):
    """`source` with a changed header and the right digest."""
    def edit(text):
        header = json.loads(text)
        change(header)
        return dm.canonical(header)
    dm.assemble(target, dm.with_header(dm.entries_of(source), edit))
    return target


def array_changed(source, target, name, change):
    """`source` with what `change` makes of an array (None: without it), and the right digest."""
    entries = [(n, d) if n != f"{name}.npy" else (n, change(dm.array_of(d).copy())) for n,
               d in dm.entries_of(source)]
    dm.assemble(target, [(n, a if isinstance(a, bytes) else dm.npy(a)) for n, a in entries if a is not None])
    return target


# -- what is kept --------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [{}, {"act": fp.SILU, "squeeze": True}, {"denoiser": False},
                                  {"variant": "plain"}], ids=str)
def test_a_model_comes_back_as_it_was(kind, tmp_path):
    prior = dm.tiny_prior(**kind)
    prior.save(tmp_path / "m.npz")
    again = fp.Prior.load(tmp_path / "m.npz")
    assert (again.settings, again.summary, again.timesteps.tolist()) == (
        prior.settings, prior.summary, [50, 238, 500])
    np.testing.assert_array_equal(again.z(dm.IMAGES), prior.z(dm.IMAGES))
    again.save(tmp_path / "again.npz")
    assert fp._read_npz(tmp_path / "again.npz")[0] == fp._read_npz(tmp_path / "m.npz")[0]
    assert dm.verdict(tmp_path / "again.npz") == "scored"
    dm.assemble(tmp_path / "rebuilt.npz", dm.entries_of(tmp_path / "m.npz"))  # each fails for its own reason
    assert dm.verdict(tmp_path / "rebuilt.npz") == "scored"


def test_overrides_are_the_callers_not_the_files(tiny):
    prior = fp.Prior.load(tiny, steps=3, fpr=.2, threshold=4)
    assert (prior.settings.steps, prior.settings.fpr, prior.threshold.value) == (3, .2, 4)
    for wrong in ({"steps": 7}, {"fpr": 2}, {"threshold": float("nan")}, {"steps": "2"}, {"fpr": True}):
        with pytest.raises(fp.ShapeError, match=next(iter(wrong))):
            fp.Prior.load(tiny, **wrong)


def test_the_same_model_is_the_same_bytes(tmp_path):
    for name in "ab":
        dm.tiny_prior().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert {e.compress_type for e in archive.infolist()} == {zipfile.ZIP_STORED}


# -- bytes and zip -------------------------------------------------------------------------------

def test_files_that_are_none_of_ours(tiny, tmp_path):
    data, bad = tiny.read_bytes(), tmp_path / "bad.npz"
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    for content in (*(data[:cut] for cut in (0, 1, 21, 41, 100, len(data) // 3, len(data) - 10)),
                    b"PK\3\4 no zip", b"\x93NUMPY",
                    bytes(flipped), data + b"x", b"x" + data, data[:-22] + data[-22:-2] + b"\1\0x"):
        bad.write_bytes(content)
        refused(bad, "not a fastprior model")
    np.savez(bad, a=np.zeros(3))
    refused(bad, "the header is not as fastprior writes it")
    np.savez(bad, header=np.array([{"evil": 1}], object), allow_pickle=True)
    refused(bad, "not a plain array")
    refused(tmp_path / "none.npz", "no such model")
    refused(tmp_path, "no such model")
    refused(ROOT / "weights" / "lite0.npz", "holds a 'backbone', not a trained model")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "fifo")  # would wait for ever
        refused(tmp_path / "fifo", "no such model")


def test_every_array_is_covered_by_the_digest(tiny, tmp_path):
    """One bit flipped in each, and the zip as it should be."""
    with zipfile.ZipFile(tiny) as archive:
        entries = [(e.filename, archive.read(e)) for e in archive.infolist()]
    assert len(entries) > 60
    for i, (name, data) in enumerate(entries):
        changed = [*entries[:i], (name, data[:-1] + bytes([data[-1] ^ 4])), *entries[i + 1:]]
        dm.assemble(tmp_path / "m.npz", changed, digest=False)
        refused(tmp_path / "m.npz", "digest" if name != "header.npy" else "JSON")
    names = [n for n, _ in entries]
    one, two = names.index("denoiser/norm_gain.npy"), names.index("denoiser/mix0_norm1_gain.npy")  # alike
    entries[one], entries[two] = (names[one], entries[two][1]), (names[two], entries[one][1][:-1] + b"\0")
    dm.assemble(tmp_path / "m.npz", entries, digest=False)
    refused(tmp_path / "m.npz", "digest")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_not_inflated(tiny, tmp_path, method):
    bomb = [(n, dm.npy(np.zeros(1 << 24, "f4")) if n == "mean.npy" else d) for n, d in dm.entries_of(tiny)]
    dm.assemble(tmp_path / "m.npz", bomb, how=lambda n: {"compress_type": method} if n == "mean.npy" else {})
    assert (tmp_path / "m.npz").stat().st_size < 300_000
    refused(tmp_path / "m.npz", "'mean' is compressed")


def test_zip_tricks(tiny, tmp_path):
    entries, bad = dm.entries_of(tiny), tmp_path / "bad.npz"
    for more, match in ((("mean.npy", entries[1][1]), "there twice"),
                        (("header.npy", entries[0][1]), "there twice"),
                        (("../mean.npy", entries[1][1]), "unknown or missing"),
                        (("/mean.npy", entries[1][1]), "unknown or missing"),
                        (("mean.npy/", entries[1][1]), "unknown or missing"),
                        (("backbone/block9_dw_w.npy", entries[1][1]), "missing"),
                        (("backbone/extra.npy", dm.npy(np.zeros(3, "f2"))), "unknown or missing"),
                        (("mean", entries[1][1]), "twice"),
                        (("denoiser/mix1_token1.npy", entries[1][1]), "missing"),
                        (("calibration/x.npy", entries[1][1]), "not a"),
                        (("calibration/02/gain.npy", entries[1][1]), "calibration|unknown"),
                        (("x.npy", b"text"), "not a plain array")):
        dm.assemble(bad, entries + [more])
        refused(bad, match)
    data = tiny.read_bytes()
    size, start = struct.unpack("<II", data[-10:-2])
    for at, fmt, value in ((-10, "<I", size - 46), (-6, "<I", start + 1), (start + 8, "<H", 1),
                           (start + 10, "<H", 8),
                           (start + 20, "<I", 1 << 31), (start + 24, "<I", 1 << 31),
                           (start + 42, "<I", len(data) - 100)):
        changed = bytearray(data)
        struct.pack_into(fmt, changed, at % len(data), value)
        bad.write_bytes(bytes(changed))
        refused(bad)
    bad.write_bytes(data[:-22] + b"PK\6\6" + bytes(52) + b"PK\6\7" + bytes(16) + data[-22:])  # 64-bit sizes
    refused(bad, "another kind")
    dm.assemble(bad, entries, digest=False)
    refused(bad, "sha256")


def test_a_header_that_claims_more_than_is_there(tiny, tmp_path):
    for text in (b"'shape': (999999999999, 1024), ", b"'shape': (-1, 1), ", b"'shape': (1e9,), ",
                 b"'shape': (" + b"1, " * 99 + b"), "):
        path = array_changed(tiny, tmp_path / "m.npz", "mean",
                             lambda a: (h := dm.npy(a))
                             and h.replace(b"'shape': (16, 43), ", text.ljust(len(b"'shape': (16, 43), "))))
        refused(path, "not a plain array|not a fastprior model")
    for dtype in ("O", ">f4", "S4", "M8[s]", "c8", "f4,i1", "i4"):
        refused(array_changed(tiny, tmp_path / "m.npz", "mean", lambda a: dm.npy(np.zeros(a.shape, "f4"))[:10]
                              + (
            f"{{'descr': {np.lib.format.dtype_to_descr(np.dtype(dtype))!r}, 'fortran_order': False, 'shape': "
            f"(16, 43), }}\n").encode()
            + bytes(9999)), "not a fastprior model")
    refused(array_changed(tiny, tmp_path / "m.npz", "mean", np.asfortranarray), "not a plain array")


# -- header --------------------------------------------------------------------------------------

def setting(name, value):
    return lambda h: h["settings"].update({name: value})


@pytest.mark.parametrize("change, match", [
    *((setting(name, value), name) for name, values in {
        "size": [96.0, "96", True, 95, 0, -32, 10 ** 400, None, [96]],
        "steps": [0, 201, 2.0, True, "2", 10 ** 400, 7, [2]],
        "first": [50.5, -1, 999, 600, "50", False], "last": [1000, 50, 500.0, 10 ** 400, None],
        "shrink": [-.1, 1.1, "a", True],
        "floor": [0, 2, -1], "factors": [-1, 65, 3.0], "copies": [-1, 65, 4.0],
        "worst": [0, 1.5, 10 ** 400, "x"],
        "smooth": [-1, 1e10, 10 ** 400, None], "width": [0, 15, 2048, 16.0], "mixers": [-1, 99],
        "fpr": [0, 1, 2, "a", 1e-300, True],
        "threshold": [1e300, "a", True, []], "variant": ["x", 1, None, ["plain"]],
        "calibration": ["x", 0, None, {}],
        "seed": [-1, 1.0, 1 << 70]}.items() for value in values),
    (setting("new", 1), "new"), (lambda h: h["settings"].pop("seed"), "unknown or missing"),
    (setting("backbone", "other"), "unknown"),
    (setting("backbone", 5), "unknown"), (lambda h: h.update(settings=[]), "not a fastprior model"),
    (lambda h: h.update(summary=[]), "unknown or missing"), (lambda h: h.pop("summary"), "summary"),
    (lambda h: h.update(summary="x"), "not a fastprior model"),
    (lambda h: h.update(extra=1), "unknown or missing"),
    (lambda h: h.update(kind="model"), "holds a 'model'"), (lambda h: h.update(kind=["prior"]), "holds a"),
    (lambda h: h.update(kind="priors"), "products"), (lambda h: h.update(fastprior=1), "unknown or missing"),
    (lambda h: h.update(backbone=None), "not a fastprior model"),
], ids=lambda c: "" if callable(c) else None)
def test_header_fields_are_checked(tiny, tmp_path, change, match):
    refused(header_changed(tiny, tmp_path / "m.npz", change), match)


@pytest.mark.parametrize("name, values", {
    "mean": [[.5] * 2, [.5] * 4, [.5, .5, True], [.5, .5, "0.5"], [.5, .5, 1e30], [.5, .5, None], 5,
             [[.5]] * 3, "555"],
    "std": [[0, .5, .5], [-.5] * 3, [.5, .5, 1e-30], [.5, .5, 10 ** 400], {}],
    "act": [0, 3, "1", True, 1.0, fp.SILU],
    "stages": [[], [0, 1, 2, 3], [4, 3], [0, 0, 4], [-1, 4], [0, 9], [0, 4.0], [True, 4], ["4"], 4, None],
    "blocks": [[], {}, None, [{}] * 5, [1] * 5], "name": [1, None], "extra": [1]}.items(),
                         ids=lambda v: v if isinstance(v, str) else "")
def test_backbone_fields_are_checked(tiny, tmp_path, name, values):
    for value in values:
        refused(header_changed(tiny, tmp_path / "m.npz", lambda h: h["backbone"].update({name: value})))


@pytest.mark.parametrize("field, values", {"stride": [0, 3, -1, 2.0, True, "1", None, 10 ** 400],
                                           "act": [0, fp.SILU, 1.0, True, "1"],
                                           "skip": [1, 0, None, "true", True], "new": [1]}.items())
def test_block_fields_are_checked(tiny, tmp_path, field, values):
    for i in (0, 3):
        for value in values:
            refused(header_changed(tiny, tmp_path / "m.npz",
                                   lambda h: h["backbone"]["blocks"][i].update({field: value})))


@pytest.mark.parametrize("change", [
    lambda t: t.replace(b'"loss": 0.5', b'"loss": NaN'),
    lambda t: t.replace(b'"loss": 0.5', b'"loss": 1e400'),
    lambda t: t.replace(b'"loss": 0.5', b'"loss": -Infinity'),
    lambda t: t.replace(b'"loss": 0.5', b'"loss": 0.50'),
    lambda t: t.replace(b'"seed": 0', b'"seed": ' + b"9" * 5000),
    lambda t: t.replace(b'"size": 64', b'"size": 64, "size": 64'),
    lambda t: t.replace(b'"mean": [0.5', b'"mean": [NaN'),
    lambda t: t.replace(b'"std": [0.5', b'"std": [NaN'),
    lambda t: t.replace(b'"worst": 0.03', b'"worst": 1e400'),
    lambda t: t.replace(b'"loss": 0.5', b'"loss": ' + b"[" * 100000),
    lambda t: t.replace(b'"loss": 0.5', b'"loss": ' + b"[" * 500 + b"]" * 500 + b" "), lambda t: t + b" ",
    lambda t: t + t,
    lambda t: b"[" + t + b"]", lambda t: b"\xff" + t, lambda t: t.decode().encode("utf-16"), lambda t: b"",
    lambda t: b"null",
    lambda t: b"7", lambda t: b'"text"'])
def test_the_headers_text_is_json_as_we_write_it(tiny, tmp_path, change):
    entries = dm.with_header(dm.entries_of(tiny), lambda text: change(text) if change(text) != text
                             else pytest.fail("no change"))
    dm.assemble(tmp_path / "m.npz", entries)
    refused(tmp_path / "m.npz", "not a fastprior model")


@pytest.mark.parametrize("number, match", [
    (fp.FORMAT + 1, f"written by a newer fastprior, format {fp.FORMAT + 1}, not {fp.FORMAT}"),
    (10 ** 400, "newer fastprior, format 10000"),
    (fp.FORMAT - 1, "written by an older fastprior"), (-1, "older"), (True, "header"),
    (float(fp.FORMAT), "header"), (None, "header"),
    ("2", "header")])
def test_other_formats_say_so(tiny, tmp_path, number, match):
    path = header_changed(tiny, tmp_path / "m.npz", lambda h: h.update(format=number))
    refused(path, match)
    if type(number) is int:  # whatever else differs in a file of that format
        dm.assemble(path, [(n, d if n == "header.npy" else dm.npy(np.zeros(3, "c8"))) for n,
                           d in dm.entries_of(path)][::-1])
        refused(path, match)


# -- arrays --------------------------------------------------------------------------------------

def put(value, at=0, field=None):
    def change(a):
        (a if field is None else a[field]).flat[at] = value
        return a
    return change


@pytest.mark.parametrize("name, change, match", [
    ("mean", lambda a: a[:, 1:], "mean: shape .16, 42. does not fit"), ("mean", lambda a: None, "mean"),
    ("mean", put(np.nan), "not finite"),
    ("mean", put(np.inf), "not finite"), ("mean", put(1e30), "absurd"),
    ("mean", lambda a: a.astype("i8"), "not finite, or absurd"),
    ("mean", lambda a: a[:0], "does not fit"), ("whitener", lambda a: None, "whitener"),
    ("whitener", lambda a: a[:, 1:], "does not fit"),
    ("whitener", put(np.nan, 7, "scale"), "not finite"), ("whitener", put(np.inf, 7, "scale"), "not finite"),
    ("whitener", put(1e14, 7, "scale"), "overflow"), ("whitener", lambda a: np.zeros((16, 3, 32, 32), "f2"),
                                                      "does not fit"),
    ("coarse/mean", lambda a: None, "missing arrays: coarse/mean"),
    ("coarse/mean", lambda a: a[1:], "coarse/.* does not fit"), ("coarse/mean", put(np.nan), "not finite"),
    ("coarse/mean", lambda a: a[:, 1:], "coarse/mean: .* does not fit"),
    ("coarse/whitener", lambda a: None, "missing arrays: coarse/whitener"),
    ("coarse/whitener", lambda a: a[1:], "does not fit"),
    ("coarse/whitener", put(np.inf, 7, "scale"), "not finite"),
    ("coarse/whitener", put(1e14, 7, "scale"), "overflow"),
    ("coarse/factors", lambda a: None, "coarse/factors"), ("coarse/factors", lambda a: a[1:], "does not fit"),
    ("coarse/factors", put(1e12, 0, "scale"), "overflow"),
    ("fine/mean", lambda a: None, "missing arrays: fine/mean"),
    ("fine/mean", lambda a: a[1:], "fine/mean: .* does not fit"),
    ("fine/mean", put(np.inf), "not finite"), ("fine/mean", put(np.nan), "not finite"),
    ("fine/whitener", lambda a: a[:, 1:], "fine/whitener: .* does not fit"),
    ("fine/whitener", put(1e15), "overflow"),
    ("factors", lambda a: None, "factors"), ("factors", lambda a: a[1:], "does not fit"),
    ("factors", put(1e12, 0, "scale"), "overflow"),
    ("factors", lambda a: a["scale"].copy(), "damaged"), ("denoiser/in_w", lambda a: None, "in_w"),
    ("denoiser/in_w", put(np.nan), "not finite"),
    ("denoiser/in_w", lambda a: a.T.copy(), "does not fit"),
    ("denoiser/norm_gain", put(np.nan, 3), "not finite"),
    ("denoiser/norm_gain", lambda a: np.r_[a, a], "does not fit"), ("denoiser/out_w", put(1e14), "overflow"),
    ("denoiser/gain_w", put(1e15), "overflow"),
    ("denoiser/mix0_token1", lambda a: a[1:], "mix0_token2: shape"),
    ("denoiser/mix0_w1", put(1e14), "overflow"), ("calibration/2/peaks", lambda a: None, "peaks"),
    ("calibration/2/gain", put(0), "above zero"), ("calibration/2/gain", put(-1), "above zero"),
    ("calibration/2/gain", put(np.nan), "finite"),
    ("calibration/1/gain", put(np.nan), "finite"), ("calibration/3/moments", put(0, 1), "above zero"),
    ("calibration/2/moments", put(1e-300, 1), "overflow"),
    ("calibration/2/moments", put(-5, 2), "above zero"),
    ("calibration/2/moments", put(np.nan, 0), "finite"),
    ("calibration/2/moments", lambda a: a[:2], "does not fit"),
    ("calibration/2/gain", put(1e-37), "overflow"),
    ("calibration/2/offset", put(1e15), "^(?!.*overflow)|"),
    ("calibration/2/scores", put(np.nan, 11), "finite"), ("calibration/2/scores", lambda a: a[::-1].copy(),
                                                          "rise"),
    ("calibration/1/peaks", lambda a: a[::-1].copy(), "rise"),
    ("calibration/2/scores", lambda a: a[:1], "does not fit"),
    ("backbone/stem_w", lambda a: a[..., :3], "does not fit"), ("backbone/stem_w", put(np.nan), "finite"),
    ("backbone/stem_w", lambda a: a.astype("f4"), "stem_w"), ("backbone/block1_dw_w", put(np.inf), "finite"),
    ("backbone/block1_dw_w", lambda a: a[:4, :4], "fit together"),
    ("backbone/block1_dw_w", lambda a: a[:3], "does not fit"),
    ("backbone/block2_expand_b", lambda a: None, "expand_b"),
    ("backbone/block4_project_b", lambda a: a[:0], "does not fit"),
    ("backbone/block3_project_w", lambda a: a[:, :-1], "does not fit"),
    ("backbone/block0_dw_w", lambda a: None, "dw_w"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_arrays_are_checked(tiny, tmp_path, name, change, match):
    if name == "calibration/2/offset":  # far off, and finite all the same
        assert dm.verdict(array_changed(tiny, tmp_path / "m.npz", name, change)) == "scored"
    else:
        refused(array_changed(tiny, tmp_path / "m.npz", name, change), match)


def test_calibrations_are_those_of_the_settings(tiny, tmp_path):
    def renamed(to):
        dm.assemble(tmp_path / "m.npz",
                    [(n.replace("calibration/3/", to), d) for n, d in dm.entries_of(tiny)])
        return tmp_path / "m.npz"
    assert fp.Prior.load(renamed("calibration/5/")).calibrations.keys() == {1, 2, 5}
    for name in ("calibration/03/", "calibration/+3/", "calibration/3_0/", "calibration/201/",
                 "calibration/0/", "calibration/-3/",
                 "calibration/x/", "calibration//", "calibration/3/x/", "calibration/\u0663/",
                 "calibration/900/", "Calibration/3/"):
        refused(renamed(name))
    dm.assemble(tmp_path / "m.npz",
                [(n, d) for n, d in dm.entries_of(tiny) if not n.startswith("calibration/2/")])
    refused(tmp_path / "m.npz", "calibrated for .1, 3., got 2")


def test_scales_of_the_map(tiny, tmp_path):
    """The map divides by the threshold of its peaks less the mean: that must not be zero at any rate."""
    path = array_changed(tiny, tmp_path / "m.npz", "calibration/2/moments", put(0, 2))
    assert dm.verdict(path) == "scored"
    refused(array_changed(path, tmp_path / "n.npz", "calibration/2/peaks", lambda a: a - a[0]), "overflow")


# -- networks that the kernels cannot compute ----------------------------------------------------

def with_block(net, i, **changes):
    return replace(net, blocks=(*net.blocks[:i], replace(net.blocks[i], **changes), *net.blocks[i + 1:]))


def test_networks_that_kernels_would_get_wrong_are_refused():
    rng = np.random.default_rng(0)
    net = dm.tiny_backbone(rng, channels=(4, 4, 5, 6, 6))
    assert dm.tiny_prior(backbone=net).score(dm.IMAGES[0]).score
    expand = {"expand_w": np.ones((4, 4), "f4"), "expand_b": np.zeros(4, "f4")}
    for wrong in (with_block(net, 0, skip=True), with_block(net, 0, act=fp.SILU),
                  with_block(net, 2, act=fp.SILU),
                  with_block(net, 0, arrays=net.blocks[0].arrays | expand), replace(net, act=fp.SILU),
                  with_block(net, 1, skip=True),
                  with_block(net, 1, stride=1), replace(net, std=(.5, .5, float("nan"))),
                  replace(net, mean=(.5, .5, float("nan"))),
                  replace(net, std=(.5, .5, 0)), replace(net, stages=(0, 1, 2, 3)),
                  replace(net, stages=(4, 4)),
                  with_block(net, 3, arrays=net.blocks[3].arrays | {"project_b": np.full(6, np.inf, "f4")}),
                  with_block(net, 3, arrays=net.blocks[3].arrays | {"dw_x": np.zeros(3, "f4")})):
        with pytest.raises(fp.ModelError):
            fp._check_backbone(wrong)
        with pytest.raises(fp.ModelError):
            fp.Backbone.from_arrays(wrong.header(), wrong.to_arrays())


@pytest.mark.parametrize("seed", range(6))
def test_any_other_network_scores_the_same_everywhere(seed, monkeypatch):
    """Random widths, kernels, skips: NumPy, Numba and every number of threads agree."""
    monkeypatch.setenv("NUMBA_NUM_THREADS", "3")
    rng = np.random.default_rng(seed)
    net = dm.tiny_backbone(rng, act=(fp.RELU6, fp.SILU)[seed % 2], squeeze=seed % 3 == 1,
                           channels=(*rng.integers(1, 40, 4), 6))
    if seed % 2:
        net = replace(net, stages=(1, 4))
    prior = dm.tiny_prior(seed, backbone=net, variant=("whitened", "plain")[seed % 4 == 3])
    by_threads = []
    for prior.threads in (1, 2, 3):
        prior._built = {}
        by_threads.append(prior.z(dm.IMAGES))
    for z in by_threads:
        np.testing.assert_array_equal(z, by_threads[0])
    want = prior._reference_frames([fp.load_image(i) for i in dm.IMAGES], False).outputs[0]
    np.testing.assert_allclose(by_threads[0], want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_weights_that_overflow_or_skip_onto_the_stem_are_not_imported():
    from test_backbone import lite_state
    state = {k: v.numpy() for k, v in lite_state().items()}
    assert fp._room("backbones").import_backbone(state, "x")
    with np.errstate(over="ignore"), pytest.raises(fp.ModelError, match="project_w holds numbers that "
                                                   "are not finite"):
        huge = state["blocks.1.0.conv_pwl.weight"] * 1e6
        fp._room("backbones").import_backbone(state | {"blocks.1.0.conv_pwl.weight": huge}, "x")
    narrow = {k: v[:8] if k.startswith("blocks.0.0.") and v.shape[:1] == (10,) else v for k,
              v in state.items()}
    narrow["blocks.1.0.conv_pw.weight"] = state["blocks.1.0.conv_pw.weight"][:, :8]
    with pytest.raises(fp.ModelError, match="do not fit together"):
        fp._room("backbones").import_backbone(narrow, "x")


def test_a_frame_has_a_sane_size(tmp_path):
    """Wide inside and narrow at both ends: the file would be some MB, a frame of 64 pixels 2 GB."""
    net = dm.tiny_backbone(np.random.default_rng(0))
    wide = {k: np.zeros([1 << 19 if n == net.blocks[1].channels[1] else n for n in a.shape], "f4")
            for k, a in net.blocks[1].arrays.items()}
    with pytest.raises(fp.ModelError, match="bytes a frame"):
        dm.tiny_prior(backbone=with_block(net, 1, arrays=wide))


def test_silu_is_tried_with_a_picture():
    net = dm.tiny_backbone(np.random.default_rng(0), fp.SILU)
    for i in range(1, 5):
        net = with_block(net, i, arrays={k: a * 3e4 if k.endswith("_w") else a for k,
                                         a in net.blocks[i].arrays.items()})
    with pytest.raises(fp.ModelError, match="overflow"):
        dm.tiny_prior(backbone=net)


# -- several products ----------------------------------------------------------------------------

@pytest.mark.parametrize("change, match", [
    (lambda p: p.clear(), "damaged"), (lambda p: p.pop(), "unknown or missing"),
    (lambda p: p.append(p[0]), "mean"),
    (lambda p: p[1].__setitem__(0, "a"), "unknown or missing"), (lambda p: p[0].__setitem__(0, ""), "mean"),
    (lambda p: p[0].__setitem__(0, "x\ty"), "printable"), (lambda p: p[0].__setitem__(0, 5), "printable"),
    (lambda p: p[0].__setitem__(0, "x" * 256), "255"),
    (lambda p: p[0].__setitem__(0, None), "mean|damaged|products"),
    (lambda p: p[0].append(1), "damaged"), (lambda p: p[0][1]["settings"].update(size=96), "does not fit"),
    (lambda p: p[0][1]["settings"].update(steps=3), "one backbone"),
    (lambda p: p[0][1].update(more=1), "unknown or missing"),
    (lambda p: p[1][1].pop("summary"), "summary"), (lambda p: p.insert(0, 3), "damaged")])
def test_products_are_checked(several, tmp_path, change, match):
    assert dm.verdict(several) == "scored"
    refused(header_changed(several, tmp_path / "m.npz", lambda h: change(h["products"])), match)


def test_products_need_names_that_can_be_printed(tmp_path):
    prior = dm.tiny_prior()
    for name in ("", "a\nb", "a\tb", "\x1b[2J", "\ud800", "x" * 256, 3):
        with pytest.raises(fp.ModelError, match="printable"):
            fp.MultiPrior({name: prior})
    fp.MultiPrior({"Gehäuse 日本": prior}).save(tmp_path / "m.npz")
    long = prior._with(prior.settings, prior.calibrations, prior.summary | {"trained_on": ["0" * 99] * 50000})
    with pytest.raises(fp.FastPriorError, match="too many names"):  # which could not be read again
        long.save(tmp_path / "long.npz")
    assert fp.Prior.load(tmp_path / "m.npz").priors.keys() == {"Gehäuse 日本"}


# -- settings ------------------------------------------------------------------------------------

@pytest.mark.parametrize("setting, match", [
    ({"size": 100}, "size: expected a multiple of 32 from 64 to 1024, got 100"), ({"size": "a"}, "size"),
    ({"size": 64.0}, "size"),
    ({"steps": 0}, "steps: expected an integer from 1 to 200, got 0"), ({"steps": True}, "steps"),
    ({"seed": -1}, "seed"),
    ({"steps": 200, "first": 50, "last": 60}, "do not fit"), ({"first": 500, "last": 50}, "first < last"),
    ({"fpr": float("nan")}, "fpr"),
    ({"variant": "x"}, "variant: expected 'whitened' or 'plain', got 'x'"),
    ({"threshold": float("inf")}, "threshold"),
    ({"smooth": 1e10}, "smooth: expected a number from 0 to 64"), ({"worst": None}, "worst"),
    ({"width": -16}, "width"),
    ({"mixers": 1.5}, "mixers"), ({"copies": 10 ** 400}, "copies"), ({"calibration": 5}, "calibration")])
def test_settings_have_a_type_and_a_range(setting, match):
    with pytest.raises(fp.ShapeError, match=match) as e:
        fp.Settings(**setting).check()
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


def test_every_setting_has_a_range():
    fp.Settings().check()
    fp.Settings(threshold=2, shrink=0, worst=1, smooth=np.float64(.5)).check()
    for name in fp.Settings.__dataclass_fields__:
        if name != "backbone":
            for wrong in (object(), "x", "1" * 400, b"1", [1], {}, 1j, 10 ** 400, -1e300):  # at once, too
                with pytest.raises(fp.ShapeError, match=name):
                    fp.Settings(**{name: wrong}).check()


# -- writing -------------------------------------------------------------------------------------

def test_saving_is_all_or_nothing(tiny, tmp_path, monkeypatch):
    target, prior = tmp_path / "m.npz", fp.Prior.load(tiny)
    prior.save(target)
    before = target.read_bytes()

    def full(f, **arrays):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    def interrupted(f, **arrays):
        f.write(b"half")
        raise KeyboardInterrupt
    for savez, error in ((full, fp.FastPriorError), (interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as m, pytest.raises(error):
            m.setattr(np, "savez", savez)
            prior.save(target)
        assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.npz"]
    for nowhere in (tmp_path / "no folder" / "m.npz", target / "m.npz", tmp_path / ("m" * 300 + ".npz"),
                    tmp_path):
        with pytest.raises(fp.FastPriorError, match="cannot be written"):
            prior.save(nowhere)
    prior.save(tmp_path / ("m" * 251 + ".npz"))  # as long as a name can be
    assert len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as m, pytest.raises(fp.FastPriorError, match="larger than a model can be"):
        m.setattr(fp, "_MAX_BYTES", 10_000)
        prior.save(target)
    prior.summary["odd"] = object()
    with pytest.raises(fp.FastPriorError, match="cannot be written .*JSON"):
        prior.save(target)
    prior.summary["odd"] = float("nan")
    with pytest.raises(fp.FastPriorError, match="cannot be written .*JSON"):
        prior.save(target)
    assert target.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    prior.summary["odd"] = {10: "a", 9: ("b",)}  # what JSON can hold comes back as JSON holds it
    prior.save(target)
    assert fp.Prior.load(target).summary["odd"] == {"10": "a", "9": ["b"]}


@pytest.mark.skipif(os.name == "nt", reason="POSIX links and permissions")
def test_links_permissions_and_devices(tiny, tmp_path):
    prior = fp.Prior.load(tiny)
    (tmp_path / "there").mkdir()
    (tmp_path / "link.npz").symlink_to("there/m.npz")  # dangling at first
    for _ in range(2):
        prior.save(tmp_path / "link.npz")
        assert (tmp_path / "link.npz").is_symlink() and not (tmp_path / "there" / "m.npz").is_symlink()
    assert dm.verdict(tmp_path / "link.npz") == "scored"
    (tmp_path / "there" / "new").touch()
    made, new = ((tmp_path / "there" / name).stat().st_mode for name in ("m.npz", "new"))
    assert stat.S_IMODE(made) == stat.S_IMODE(new)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(fp.FastPriorError, match="is no file"):
        prior.save(tmp_path / "fifo")
    with pytest.raises(fp.FastPriorError, match="is no file"):
        prior.save("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo", "link.npz", "there"]


def test_bytes_are_on_the_disk_before_the_name(tiny, tmp_path, monkeypatch):
    order, prior = [], fp.Prior.load(tiny)
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (order.append(name), real(*a))[1])
    prior.save(tmp_path / "m.npz")
    assert order == ["fsync", "replace"]


# -- fuzz ----------------------------------------------------------------------------------------

def test_damaged_files_are_refused_or_score(tmp_path):
    """Thousands of them in a process of little memory; `python tests/damaged_models.py 3600` for longer."""
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "damaged_models.py"), "12",
                           str(np.random.default_rng().integers(1 << 40))],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert {"array scored", "array refused", "header refused", "zip refused",
            "bytes refused"} <= counts.keys()


def test_any_header_and_any_array(tiny, tmp_path):
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is in the extra `test`")
    st = hypothesis.strategies
    entries = dm.entries_of(tiny)
    header = json.loads(dm.array_of(entries[0][1]).tobytes())
    text = st.text("ab\n\ud800é", max_size=5)
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from(dm.VALUES)
    values = st.recursive(scalars, lambda v: st.lists(v, max_size=4)
                          | st.dictionaries(st.text("abc", max_size=3), v, max_size=3))
    numbers = st.floats(width=16) | st.floats(width=32) | st.sampled_from(dm.NUMBERS)
    check = hypothesis.settings(max_examples=60, deadline=None, database=None,
                                suppress_health_check=list(hypothesis.HealthCheck))

    @check
    @hypothesis.given(st.sampled_from([p for p in dm.places(header) if p]), values)
    def headers(place, value):
        changed = json.loads(json.dumps(header))
        inside = changed
        for k in place[:-1]:
            inside = inside[k]
        inside[place[-1]] = value
        dm.assemble(tmp_path / "m.npz", dm.with_header(entries, lambda _: dm.canonical(changed)))
        dm.verdict(tmp_path / "m.npz")

    @check
    @hypothesis.given(st.integers(1, len(entries) - 1),
                      st.lists(st.tuples(st.integers(0, 10 ** 6), numbers), min_size=1, max_size=3))
    def arrays(i, changes):
        a = dm.array_of(entries[i][1]).copy()
        flat = a.reshape(-1)["scale"].reshape(-1) if a.dtype == fp.QTILE else a.reshape(-1)
        with np.errstate(over="ignore"):
            for at, value in changes:
                flat[at % len(flat)] = value
        if a.dtype == fp.QTILE:
            a["scale"] = flat.reshape(a["scale"].shape)
        dm.assemble(tmp_path / "m.npz", [*entries[:i], (entries[i][0], dm.npy(a)), *entries[i + 1:]])
        dm.verdict(tmp_path / "m.npz")
    headers()
    arrays()
