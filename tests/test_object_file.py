"""The compiled kernels: made once, kept in a file that only we can have written, missed in one line."""
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from concurrent import futures

import numpy as np
import pytest

import fastprior as fp
import twins
from conftest import ROOT
from twins import cpu

posix = pytest.mark.skipif(os.name == "nt", reason="owners and modes are those of POSIX")


def python(code, *args, path=ROOT, **environment):
    code = f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True,
                          env=os.environ | environment)


_OWNERS = []  # of machine code in which helper threads may sleep: never freed
LOAD = "import fastprior as fp; fp._engines('cpu').load_kernels('integers'); print('numba' in sys.modules)"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Two processes that compiled at once in an empty cache, and the file that was kept."""
    cache = tmp_path_factory.mktemp("cache")
    with futures.ThreadPoolExecutor() as pool:
        done = [*pool.map(lambda _: python(LOAD, XDG_CACHE_HOME=str(cache)), range(2))]
    file, of_integers = sorted((cache / "fastprior").iterdir(), key=lambda p: len(p.name))
    assert of_integers.name.startswith("kernels-integers-")
    return done, file


@pytest.fixture
def load(compiled, tmp_path, monkeypatch):
    """load() in a cache of its own: whether that compiled. Compiling takes no time: it returns `compiled`."""
    cpu.load_kernels()
    for kernel in cpu._KERNELS:
        if kernel.fields is not None and not kernel.part:
            monkeypatch.setattr(kernel, "address", kernel.address)  # other tests go on with the old code
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, kept = [], cpu._read_object(compiled[1])
    monkeypatch.setattr(cpu, "_compile_kernels", lambda machine, part: made.append(1) or kept)

    def load() -> bool:
        made.clear()
        _OWNERS.append(cpu._load_kernels.__wrapped__(""))
        return bool(made)
    load.file = cpu._object_file("")
    return load


def test_compiling_prints_nothing_and_a_later_process_does_without_numba(compiled):
    both, file = compiled
    assert {(done.returncode, done.stderr) for done in both} == {(0, "")}
    assert "True\n" in (outputs := {done.stdout for done in both}) and outputs <= {"True\n", "False\n"}
    def kept():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in file.parent.iterdir()}
    before = kept()
    again = python(LOAD, XDG_CACHE_HOME=str(file.parents[1]))
    assert (again.stdout, again.stderr) == ("False\n", "")
    assert kept() == before and len(before) == 2


def test_the_file_is_kept_and_loaded(load, caplog):
    caplog.set_level(logging.INFO, "fastprior")
    assert load() and not load() and not caplog.records
    if os.name != "nt":
        assert [p.stat().st_mode & 0o777 for p in (load.file, load.file.parent)] == [0o600, 0o700]
    assert list(load.file.parent.iterdir()) == [load.file]
    x = np.random.default_rng(0).standard_normal((5, 16))
    np.testing.assert_allclose(twins.layer_norm(x, np.ones(16), np.zeros(16)),
                               fp.layer_norm(x, np.ones(16), np.zeros(16)), atol=1e-6)


def test_a_spoilt_file_is_compiled_anew(load):
    load()
    whole = load.file.read_bytes()
    head = len(cpu._MAGIC)
    spoilt = [whole[:n] for n in (0, 5, head, head + 16, head + 32, head + 40, 5000, len(whole) - 1)]
    spoilt += [whole + b"\0", whole[:head] + whole[head:][::-1], os.urandom(len(whole))]
    names_end = whole.index(b"\n", head + 32)
    for place in (0, head, head + 31, head + 33, names_end, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        spoilt.append(bytes(flipped))
    for data in spoilt:
        load.file.write_bytes(data)
        assert load() and load.file.read_bytes() == whole
    assert not load()


def linked(path):
    aside = path.rename(path.with_name("aside"))
    path.symlink_to(aside)


# what is done to a path, and whether to the folder
UNTRUSTED = {
    "file for all": (lambda p: p.chmod(0o666), False),
    "file for a group": (lambda p: p.chmod(0o620), False),
    "file of another": (lambda p: os.chown(p, 12345, -1), False),
    "linked file": (linked, False),
    "folder for all": (lambda p: p.chmod(0o1777), True),
    "folder for a group": (lambda p: p.chmod(0o770), True),
    "folder of another": (lambda p: os.chown(p, 12345, -1), True),
    "linked folder": (linked, True),
}


@posix
@pytest.mark.parametrize("case", UNTRUSTED)
def test_what_others_could_have_written_is_not_loaded(load, case, caplog):
    spoil, whole_folder = UNTRUSTED[case]
    if "another" in case and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    load()
    spoil(load.file.parent if whole_folder else load.file)
    before = load.file.resolve().read_bytes()
    assert load()
    if whole_folder:  # nothing can be kept there
        assert load() and "could be written by others" in caplog.text
        assert load.file.resolve().read_bytes() == before
    else:  # replaced by one that is ours
        assert not load() and load.file.stat().st_mode & 0o777 == 0o600 and not load.file.is_symlink()


def test_where_nothing_can_be_kept_each_process_compiles_and_says_so(load, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load() and load()
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2 and "cannot be kept" in caplog.text


def test_at_most_twelve_files_are_kept_and_nothing_else_is_touched(load):
    folder = load.file.parent
    folder.mkdir(mode=0o700)
    for age, name in enumerate([*(f"kernels-{i:024}.o" for i in range(15)), "bottle-123.npz", "notes"]):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (1000 - age, 1000 - age))
    assert load() and not load()
    assert {p.name for p in folder.iterdir()} == {
        load.file.name, "bottle-123.npz", "notes", *(f"kernels-{i:024}.o" for i in range(11))}


def test_the_name_of_the_file_is_the_text_of_the_kernels(compiled, tmp_path):
    """An edit of fastprior.py or of a .cu file compiles nothing; one of what the code is made from does."""
    shutil.copy(ROOT / "fastprior.py", tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    cache = compiled[1].parents[1]
    name = "import fastprior as fp; cpu = fp._engines('cpu'); print(cpu.__file__, cpu._object_file(str()))"
    for file, same in (("fastprior.py", True), ("kernels/cuda.py", True), ("kernels/pool.cu", True),
                       ("kernels/cpu.py", False), ("kernels/__init__.py", False)):
        text = (tmp_path / file).read_text()
        comment = "\n// more\n" if file.endswith(".cu") else "\n# more\n"
        (tmp_path / file).write_text(text + comment)
        loaded, path = python(name, path=tmp_path, XDG_CACHE_HOME=str(cache)).stdout.split()
        assert loaded == str(tmp_path / "kernels" / "cpu.py") and (path == str(compiled[1])) == same, file
        (tmp_path / file).write_text(text)


# -- what cannot be compiled ----------------------------------------------------------------------

def calls_outside(row, band, bands, ws, own, state, image, batch, state_stride):
    if np.tan(np.float64(ws)) > 2:
        cpu._add(state, 1)


def not_typed(row, band, bands, ws, own, state, image, batch, state_stride):
    return row.nothing


@pytest.mark.parametrize("kernel, message", [
    (calls_outside, "this numba compiles calls of tan into the kernels: install the numba"),
    (not_typed, "this numba cannot compile the kernels .*install the numba")])
def test_kernels_that_would_not_run_are_refused(kernel, message, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_KERNELS", [kernel])
    monkeypatch.setattr(cpu, "_load_kernels", cpu._load_kernels.__wrapped__)
    monkeypatch.setattr(kernel, "fields", cpu._LAYER_NORM, raising=False)
    monkeypatch.setattr(kernel, "exact", False, raising=False)
    monkeypatch.setattr(kernel, "part", "", raising=False)
    caplog.set_level(logging.INFO, "fastprior")
    with pytest.raises(cpu.Unavailable, match=message) as caught:
        cpu.load_kernels()
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    assert fp._cpu_engines.__wrapped__() is None
    compiling, again, falling_back = caplog.records
    assert compiling.levelname == again.levelname == "INFO" and "once" in compiling.getMessage()
    assert falling_back.levelname == "WARNING"
    assert falling_back.getMessage() == f"scoring with NumPy alone, slowly: {caught.value}"
    assert capfd.readouterr() == ("", "")


SCORE = """
import json, os
for name in sys.argv[3:]:
    sys.modules[name] = None
import numpy as np
import fastprior as fp
prior = fp.Prior.load(sys.argv[1])
print(json.dumps([prior.backend, [r.score for r in prior.score_batch(list(np.load(sys.argv[2])))]]))
"""


@pytest.mark.parametrize("without, environment, message", [
    (["numba"], {}, "numba cannot compile"), (["llvmlite"], {}, "numba is missing.*pip install numba"),
    ([], {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT")], ids=["numba", "llvmlite", "no-jit"])
def test_without_numba_numpy_scores_and_one_line_says_so(without, environment, message, model_file, trained,
                                                         pictures, compiled, tmp_path):
    np.save(tmp_path / "images.npy", np.stack([pictures[0], pictures[2]]))
    args = [str(model_file), str(tmp_path / "images.npy"), *without]
    done = python(SCORE, *args, XDG_CACHE_HOME=str(tmp_path / "empty"), **environment)
    backend, scores = json.loads(done.stdout)
    assert backend == "numpy"
    line, = done.stderr.splitlines()
    assert line.startswith("scoring with NumPy alone, slowly: ")
    assert re.search(message, line), line
    want = [trained.score(pictures[i]).score for i in (0, 2)]
    np.testing.assert_allclose(scores, want, rtol=1e-4, atol=1e-4)
    # kernels that are compiled already need no Numba
    kept = python(SCORE, *args, XDG_CACHE_HOME=str(compiled[1].parents[1]), **environment)
    assert json.loads(kept.stdout)[0] == ("numpy" if "llvmlite" in without else "numba")


def test_info_says_what_would_score(compiled, tmp_path):
    def backend(**environment):
        done = python("import fastprior as fp; fp.main()", "info", "--json", **environment)
        return json.loads(done.stdout)["backend"]
    assert backend(XDG_CACHE_HOME=str(compiled[1].parents[1])) == "numba (cpu)"
    text = backend(XDG_CACHE_HOME=str(tmp_path), NUMBA_DISABLE_JIT="1")
    assert text.startswith("numpy (slow: ") and "NUMBA_DISABLE_JIT" in text


def test_the_command_says_that_it_compiles(model_file, compiled, tmp_path):
    code = """if True:
        import fastprior as fp
        cpu = fp._engines("cpu")
        kept = {part: cpu._read_object(cpu.Path(sys.argv.pop(1))) for part in ("", "integers")}
        cpu._compile_kernels = lambda machine, part: cpu._log.info("compiling") or kept[part]
        fp.main()"""
    image = str(ROOT / "examples" / "washers" / "good_0.png")
    integers = next(compiled[1].parent.glob("kernels-integers-*"))
    files = str(compiled[1]), str(integers)
    done = python(code, *files, "score", "-m", str(model_file), image, XDG_CACHE_HOME=str(tmp_path))
    assert done.stderr.splitlines()[0] == "fastprior: compiling", done.stderr
