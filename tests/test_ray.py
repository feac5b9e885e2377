"""examples/ray_score.py on a local Ray of one CPU, against a plain loop; and its parts without a Ray."""
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from PIL import Image

import fastprior as fp
from conftest import ROOT
from test_images import REFUSED, SAME

pa = pytest.importorskip("pyarrow", reason="pyarrow and ray are in the extra `ray`")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ray = pytest.importorskip("ray", reason="ray is in the extra `ray`")
    pytest.importorskip("ray.data", reason="ray[data] is in the extra `ray`")
    ray_score = fp._room("ray_score")
from pyarrow import parquet  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, about itself


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="critical",
             object_store_memory=100 << 20)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small one of 16-bit images too: that has a depth."""
    rng = np.random.default_rng(0)
    images = [rng.normal(120, 20, (64, 64, 3)).clip(0, 255).astype(np.uint8) for _ in range(12)]
    path = tmp_path_factory.mktemp("model") / "noise.npz"
    fp.fit(images, iterations=0, size=64, cell=32, copies=1, bits=12).save(path)
    return path


def picture(path, seed):
    pixels = np.random.default_rng(seed).normal(100 + 5 * seed, 30, (64 + seed, 64, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, "PNG")


def rows(folder):
    """Rows by path, all parts read by their own; nothing else may lie there."""
    found = {}
    for part in os.listdir(folder):
        assert part.startswith("part-") and part.endswith(".parquet")
        for row in parquet.ParquetFile(folder / part).read().to_pylist():
            assert row["path"] not in found
            found[row["path"]] = row
    return found


def check_like_a_loop(row, prior, path):
    want = prior.score(path)
    assert row == row | {
        "score": want.score, "p_value": want.p_value, "verdict": want.verdict, "threshold": want.threshold,
        "regions": [region._asdict() for region in want.regions], "error": None, "product": None,
        "size": os.stat(path).st_size}
    assert row["modified"].value == os.stat(path).st_mtime_ns


# -- on a cluster ------------------------------------------------------------------------------------

INTERRUPTED = """
import sys
sys.path[:0] = [{root!r}]
import fastprior as fp
ray_score = fp._room("ray_score")
ray_score.PART_ROWS = 4
sys.argv[1:] = {args!r}
fp._room("console").run(ray_score.build_app)
"""


def test_interrupt_and_resume_like_a_plain_loop(cluster, model, tmp_path, monkeypatch, capfd):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = [b"a b.png", b"#?%41*[x]=1.png", "\u65e5\u672c \u202e.png".encode(), b"new\nline\t.png",
             b"\xff\xfe.png"]
    names += [b"%03d.png" % i for i in range(60)]
    paths = [os.fsdecode(os.path.join(os.fsencode(folder), name)) for name in names]
    for i, path in enumerate(paths):
        picture(path, i % 9)
    (folder / "zcut.png").write_bytes((folder / "000.png").read_bytes()[:999])  # late, after the interrupt
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    Image.fromarray(np.full((64, 64), 60000, np.uint16)).save(folder / "zdeep.png")
    args = [str(folder), "-m", str(model), "-o", str(output), "--batch", "2"]
    code = INTERRUPTED.format(root=str(ROOT), args=args)
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=os.environ | {"RAY_ADDRESS": cluster}, text=True)
    deadline = time.monotonic() + 60
    while not (output.is_dir() and [n for n in os.listdir(output) if n[0] == "p"]) and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(.01)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert said[1].splitlines()[-1] == "interrupted" and said[0] == ""
    first = rows(output)
    assert 4 <= len(first) < len(paths)  # the rest of what had come is a part too

    (output / ".part-killed.parquet.tmp").write_bytes(b"half")  # of a run that had no time to clean up
    scored = [path for path in paths if ray_score._shown(path) in first]
    picture(scored[0], 40)  # another size
    os.utime(scored[1], ns=(1, 1))  # another time
    parts = {name: os.stat(output / name).st_mtime_ns for name in os.listdir(output) if name[0] == "p"}
    monkeypatch.chdir(tmp_path)
    assert ray_score.score(["in"], model, str(output), workers=1) == 2
    said = capfd.readouterr()
    assert said.out == f"{output}\n" and f"68 images, {len(scored) - 2} of them scored before" in said.err
    assert sum(os.stat(output / name).st_mtime_ns == at for name, at in parts.items()) >= len(parts) - 2
    got, prior = rows(output), fp.Prior.load(model, threads=1)
    assert got.keys() == {ray_score._shown(p) for p in paths} | {str(folder / n) for n in (
        "zcut.png", "gone.png", "zdeep.png")}
    for path in paths:
        check_like_a_loop(got[ray_score._shown(path)], prior, path)
    assert got[str(folder / "zcut.png")]["error"].startswith("not a readable image")
    assert got[str(folder / "gone.png")]["error"].startswith("cannot be read (No such file")
    assert got[str(folder / "gone.png")]["score"] is None and got[str(folder / "gone.png")]["size"] is None
    assert got[str(folder / "zdeep.png")]["warning"].startswith("values above 12 bits are cut")
    assert "warning: values above 12 bits are cut" in said.err
    scored = [p for p, row in got.items() if row["error"] is None]
    assert len(scored) == len(paths) + 1

    for name in ("zcut.png", "gone.png"):
        (folder / name).unlink()
    monkeypatch.setattr(ray_score, "scored", lambda *_: pytest.fail("nothing is to be scored"))
    assert ray_score.score([str(folder)], model, str(output)) == int(
        any(got[p]["verdict"] == "anomaly" for p in scored))


def test_in_a_pipeline_of_ones_own(cluster, model, tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "no.png").write_text("no image")
    ds = ray.data.read_binary_files(str(tmp_path), include_paths=True, num_cpus=.5)
    ds = ds.map_batches(ray_score.Score, fn_constructor_args=[str(model)], batch_size=3, num_cpus=.5,
                        compute=ray.data.ActorPoolStrategy(size=1))
    got = {os.path.basename(row["path"]): row for row in ds.take_all()}
    assert got.keys() == {"0.png", "1.png", "2.png", "3.png", "no.png"}
    for i in range(4):
        assert got[f"{i}.png"]["score"] == fp.Prior.load(model).score(tmp_path / f"{i}.png").score
    assert "bytes" not in got["0.png"] and got["no.png"]["error"].startswith("no image of a kind")


# -- without one -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*SAME, *REFUSED])
def test_bytes_are_read_as_their_file(name, tmp_path):
    data = (SAME.get(name) or REFUSED[name])[0]
    (tmp_path / name).write_bytes(data)
    try:
        want = fp.load_image(tmp_path / name)
    except fp.ImageError as e:
        with pytest.raises(fp.ImageError) as got:
            ray_score.decode(data)
        assert str(e) == f"{tmp_path / name}: {got.value}"
    else:
        np.testing.assert_array_equal(ray_score.decode(data), want)


@pytest.mark.parametrize("kind", ["pyarrow", "numpy", "pandas"])
def test_batches_of_every_format(model, tmp_path, kind, monkeypatch):
    for i in range(3):
        picture(tmp_path / f"{i}.png", i)
    data = [(tmp_path / f"{i}.png").read_bytes() for i in range(3)] + [b"", b"no image", b""]
    table = pa.table({"bytes": pa.array(data, pa.binary()), "mine": range(6),
                      "error": [None] * 5 + ["not there"]})
    batch = {"pyarrow": table, "pandas": table.to_pandas(),
             "numpy": {name: table[name].to_numpy() for name in table.column_names}}[kind]
    score, prior = ray_score.Score(model), fp.Prior.load(model)
    for most in (1 << 26, 1):
        monkeypatch.setattr(ray_score, "MOST_PIXELS", most)
        got = score(batch).to_pylist()
        assert [row["mine"] for row in got] == [*range(6)]
        want = [prior.score(tmp_path / f"{i}.png").score for i in range(3)]
        assert [row["score"] for row in got[:3]] == want
        assert [row["error"] for row in got[:5:2]] == [None, None, got[4]["error"]]
        assert got[3]["error"] == "an empty file" and got[5]["error"] == "not there"
    assert len(score(table[:0])) == 0

    def broken(images, **_):
        if any(len(image) == 65 for image in images):
            raise MemoryError
        return real(images, **_)
    real = score.prior.score_batch
    monkeypatch.setattr(score.prior, "score_batch", broken)
    got = score(table).to_pylist()
    assert [row["error"] for row in got[:3]] == [None, "out of memory", None] and got[1]["verdict"] is None


def fake_run(monkeypatch, lose):
    """Scores without Ray; lose(path, attempt) tells which rows are lost."""
    tries = {}

    def dataset(files, model, workers, cpus, batch):
        blocks = [files[i:i + batch] for i in range(0, len(files), batch)]
        for block in blocks:
            for file in block:
                tries[file["path"]] = tries.get(file["path"], 0) + 1
        done = [ray_score.Score(model)(ray_score.read(pa.Table.from_pylist(block, ray_score.TO_READ)))
                for block in blocks if not any(lose(f["path"], tries[f["path"]]) for f in block)]
        return type("Dataset", (), {"iter_batches": lambda *_, **__: done})
    monkeypatch.setattr(ray_score, "dataset", dataset)
    monkeypatch.setattr(ray_score, "connected", ray_score.contextlib.nullcontext)
    monkeypatch.setattr(ray, "put", lambda value: value)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    return tries


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "in"
    path.mkdir()
    for i in range(6):
        picture(path / f"{i}.png", i)
    return path


def test_a_worker_that_dies_costs_its_image_alone(folder, model, tmp_path, monkeypatch):
    tries = fake_run(monkeypatch, lambda path, attempt: path.endswith("2.png"))
    assert ray_score.score([str(folder)], model, str(tmp_path / "out"), batch=4) == 2
    got = rows(tmp_path / "out")
    assert {os.path.basename(p): n for p, n in tries.items()} == {
        "0.png": 2, "1.png": 2, "2.png": 3, "3.png": 2, "4.png": 1, "5.png": 1}
    assert [p for p, row in got.items() if row["error"]] == [str(folder / "2.png")]
    assert "died" in got[str(folder / "2.png")]["error"]


def test_an_address(folder, model, tmp_path, monkeypatch):
    fake_run(monkeypatch, lambda *_: False)
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "0.png.map.png").write_bytes(b"")
    (folder / "a b#?%41.png").write_bytes((folder / "0.png").read_bytes())
    output = f"file://{tmp_path}/out/day=3"
    assert ray_score.score([f"file://{folder}/"], model, output) < 2
    got = rows(tmp_path / "out" / "day=3")
    assert {path.removeprefix(f"file://{folder}/") for path in got} == {
        "a b#?%41.png", *(f"{i}.png" for i in range(6))}
    tries = fake_run(monkeypatch, lambda *_: False)
    assert ray_score.score([f"file://{folder}"], model, output) < 2 and not tries
    for bad in ("file:///no/such/folder", "nosuch://x"):
        with pytest.raises(fp.FastPriorError) if bad[0] == "n" else ray_score.contextlib.nullcontext():
            assert ray_score.score([bad], model, output) == 2


def test_a_file_that_is_gone_and_rows_of_other_folders(folder, model, tmp_path, monkeypatch):
    fake_run(monkeypatch, lambda *_: False)
    output = tmp_path / "out"
    assert ray_score.score([str(folder)], model, str(output)) < 2
    (folder / "0.png").unlink()
    assert ray_score.score([str(folder)], model, str(output)) < 2  # its row stays: nobody asked for it
    assert rows(output)[str(folder / "0.png")]["error"] is None
    assert ray_score.score([str(folder / "0.png"), ""], model, str(output)) == 2
    got = rows(output)
    assert len(got) == 7 and got[str(folder / "0.png")]["error"] and got[""]["error"]
    assert all(got[str(folder / f"{i}.png")]["score"] is not None for i in range(1, 6))


def test_folders_of_scores_that_do_not_fit(folder, model, tmp_path, monkeypatch):
    fake_run(monkeypatch, lambda *_: False)
    output = tmp_path / "out"
    assert ray_score.score([str(folder)], model, str(output)) < 2
    before = rows(output)
    other = shutil.copy(model, tmp_path / "other.npz")
    fp.Prior.load(model, fpr=.2).save(other)
    with pytest.raises(fp.FastPriorError, match="scores of another model"):
        ray_score.score([str(folder)], other, str(output))
    parquet.write_table(pa.table({"x": [1]}), output / "part-mine.parquet")
    with pytest.raises(fp.FastPriorError, match="no rows of ray_score"):
        ray_score.score([str(folder)], model, str(output))
    (output / "part-mine.parquet").write_bytes(b"x")
    with pytest.raises(fp.FastPriorError, match="cannot be read or written"):
        ray_score.score([str(folder)], model, str(output))
    (output / "part-mine.parquet").unlink()
    with pytest.raises(fp.FastPriorError, match="cannot be read or written"):
        ray_score.score([str(folder)], model, str(folder / "0.png"))
    assert rows(output) == before


def test_a_part_is_whole_or_not_there(folder, model, tmp_path, monkeypatch):
    fake_run(monkeypatch, lambda *_: False)
    real = parquet.write_table

    def full(table, path, **how):
        real(table, path, **how)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ray_score.parquet, "write_table", full)
    with pytest.raises(fp.FastPriorError, match="No space left"):
        ray_score.score([str(folder)], model, str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


def test_without_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError('none here')")
    command = [sys.executable, str(ROOT / "examples" / "ray_score.py"), "x", "-m", "y", "-o", "z"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True,
                          text=True)
    assert done.returncode == 2
    assert done.stderr == "error: ray_score needs Ray Data: pip install 'fastprior[ray]'\n"
