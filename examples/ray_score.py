#!/usr/bin/env python3
"""Scores of very many images as Parquet, by Ray Data, on one machine or on a cluster.

    python examples/ray_score.py photos/new -m part.npz -o scores
    python examples/ray_score.py s3://line-3/today -m part.npz -o s3://line-3/scores --workers 64

Tasks read the files' bytes, a pool of actors decodes and scores them (`Score`, which `ds.map_batches` of
any other pipeline can use), and this process alone writes. A part is written under a hidden name and then
renamed, so that there is no half of one. A folder of scores has one model and at most one row a path; one
run writes it at a time.

fastprior loads this file by its path and hands itself in as `fp`.
"""
from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import math
import os
import re
import stat
import sys
import time
import warnings
from pathlib import Path

if "fp" not in globals():
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import fastprior as fp

if __name__ == "__main__":  # does not return; before the imports, so that a missing one is told as errors are
    fp._room("console").run(lambda: fp._room("ray_score").build_app())

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
try:
    import pyarrow as pa
    import ray
    import ray.data
    from pyarrow import fs, parquet
    from ray.data.block import BlockAccessor
except ImportError as e:
    raise fp.BackendUnavailable("ray_score needs Ray Data: pip install 'fastprior[ray]'") from e

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it by this name

MOST_BYTES = 2 << 30  # of a file: 2^28 pixels of three 16-bit values and room
MOST_PIXELS = 1 << 26  # decoded at a time
PART_ROWS, PART_SECONDS = 4096, 30  # a part is written after so many rows, or so long
REGION = pa.struct([("left", pa.int32()), ("top", pa.int32()), ("right", pa.int32()), ("bottom", pa.int32()),
                    ("pixels", pa.int64()), ("peak", pa.float64())])
RESULTS = {"score": pa.float64(), "p_value": pa.float64(), "verdict": pa.string(), "threshold": pa.float64(),
           "regions": pa.list_(REGION), "product": pa.string(), "error": pa.string(), "warning": pa.string()}
FILE = {"path": pa.string(), "size": pa.int64(), "modified": pa.timestamp("ns", "UTC")}
ROW = pa.schema({"path": FILE["path"], **RESULTS, **FILE, "model": pa.string()})
TO_READ = pa.schema({**FILE, "file": pa.binary(), "source": pa.string()})  # source: an address, or null


# -- what workers do ---------------------------------------------------------------------------------

def decode(data: bytes, bits: int | None = None):
    """The bytes of an image file -> uint8 (H, W, 3), as `fastprior.load_image` reads the file. ImageError."""
    f = io.BytesIO(data)
    try:
        image = fp._open_pillow(f)
        if image.format == "PNG":  # the decoder does not look at the checksums of what it decodes
            image.verify()
            image = fp._open_pillow(f)
        elif image.format == "JPEG":
            image, f = fp._whole_jpeg(f)
        return fp.load_image(fp._from_pillow(image, again=lambda: fp._open_pillow(f)), bits)
    except Exception as e:  # whatever a decoder makes of foreign bytes
        text = str(e).removeprefix("image: ") or type(e).__name__
        text = text if isinstance(e, fp.FastPriorError) else f"not a readable image ({text})"
        raise fp.ImageError(fp._printable(text)) from e


class Score:
    """For `ds.map_batches`: a batch with a column `bytes`, of image files, gets the columns of RESULTS.

    Any batch_format; a pyarrow.Table comes back. An image that cannot be scored has its reason in `error` and
    null in the other columns, a scored one has null in `error`. Other columns pass; a row whose `error` is
    already there keeps it. `regions` are boxes in pixels, the highest peak first.

    model: a file that workers can read, a loaded model, or a reference to one (`ray.put`).
    threads: CPU threads of a worker, where it loads the model itself.
    """

    def __init__(self, model, threads: int = 1):
        model = ray.get(model) if isinstance(model, ray.ObjectRef) else model
        self.prior = fp.Prior.load(model, threads=threads) if isinstance(model, (str, os.PathLike)) else model

    def __call__(self, batch):
        table = BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()
        known = table["error"].to_pylist() if "error" in table.column_names else [None] * len(table)
        rows = [dict.fromkeys(RESULTS) | {"error": error} for error in known]
        waiting, pixels = [], 0
        for i, row in enumerate(rows):
            if row["error"] is None:
                try:
                    with fp._room("console").silence(), warnings.catch_warnings(record=True) as said:
                        warnings.simplefilter("always", fp.ImageWarning)
                        image = decode(table["bytes"][i].as_py() or b"", fp._bits(self.prior))
                    row["warning"] = "; ".join(str(w.message) for w in said
                                               if issubclass(w.category, fp.ImageWarning)) or None
                    waiting.append((row, image))
                    pixels += image.shape[0] * image.shape[1]
                except fp.ImageError as e:
                    row["error"] = str(e)
            if pixels > MOST_PIXELS or i == len(rows) - 1:
                for (row, _), result in zip(waiting, self.results([image for _, image in waiting])):
                    row.update(fields(result))
                waiting, pixels = [], 0
        table = table.drop_columns([name for name in table.column_names if name in {"bytes", *RESULTS}])
        for name, kind in RESULTS.items():
            table = table.append_column(name, pa.array([row[name] for row in rows], kind))
        return table

    def results(self, images: list) -> list:
        """A Result or an exception each: no image may end a run of millions."""
        try:
            return self.prior.score_batch(images, errors="return")
        except Exception as e:
            return [e] if len(images) == 1 else [r for image in images for r in self.results([image])]


def fields(result) -> dict:
    """A row's columns."""
    try:
        if isinstance(result, Exception):
            raise result
        if not (math.isfinite(result.score) and math.isfinite(result.anomaly_map.sum())):
            raise fp.ShapeError("its score or map is not a number")
        return {"score": result.score, "p_value": result.p_value, "verdict": result.verdict,
                "threshold": result.threshold, "product": result.product or None,
                "regions": [region._asdict() for region in result.regions]}
    except MemoryError:
        return {"error": "out of memory"}
    except Exception as e:
        text = str(e) if isinstance(e, fp.FastPriorError) else f"{type(e).__name__}: {e}"
        return {"error": fp._printable(text.removeprefix("image: "))}


def read(table: pa.Table) -> pa.Table:
    """Rows of TO_READ and the `bytes` of their files, or the `error` for which there are none."""
    data, errors, systems = [], [], {}
    for file, source, size in zip(*(table[name].to_pylist() for name in ("file", "source", "size"))):
        content, error = None, None
        try:
            if size > MOST_BYTES:
                error = f"{size / 1e9:.1f} GB: expected an image file of at most {MOST_BYTES / 1e9:.1f} GB"
            else:
                if source and source not in systems:
                    systems[source] = fs.FileSystem.from_uri(source)[0]
                with systems[source].open_input_file(file.decode()) if source else open(file, "rb") as f:
                    content = f.read()
        except FileNotFoundError:
            error = "no such file"
        except (OSError, MemoryError) as e:
            reason = getattr(e, "strerror", None) or str(e) or "out of memory"
            error = fp._printable(f"cannot be read ({reason})")
        data.append(content)
        errors.append(error)
    return (table.append_column("bytes", pa.array(data, pa.large_binary()))
            .append_column("error", pa.array(errors, pa.string())))


# -- what to score, and what has been ----------------------------------------------------------------

def is_address(path: str) -> bool:
    """s3://..., gs://..., abfs://..., hdfs://..., file://...: what pyarrow opens."""
    return bool(re.match(r"[a-z][a-z0-9+.-]+://", path))


def opened(path: str):
    """The file system of a folder or an address, and the folder's name in it."""
    if not is_address(path):
        return fs.LocalFileSystem(), os.path.abspath(path)
    try:
        return fs.FileSystem.from_uri(path)
    except (OSError, ValueError) as e:
        raise fp.FastPriorError(f"{path}: cannot be opened ({e})") from e


def find(images: list[str]) -> tuple[dict[str, dict], dict[str, str], str]:
    """Files by path (see TO_READ), what cannot be read and why, and what was left out, in words.

    Here as `fastprior score` finds them; in a bucket every image by its suffix, but hidden ones and our maps.
    """
    folders = fp._room("folders")
    found = folders.find_all([path for path in images if not is_address(path)])
    files = {}
    errors = {_shown(os.path.abspath(path) if path else path): text for path, text in found.errors.items()}
    for path in map(os.path.abspath, found.images):
        try:
            s = os.stat(path)
        except OSError as e:
            errors[_shown(path)] = f"cannot be read ({e.strerror})"
            continue
        if stat.S_ISREG(s.st_mode):
            files[_shown(path)] = {"size": s.st_size, "modified": s.st_mtime_ns, "file": os.fsencode(path)}
        else:
            errors[_shown(path)] = "a folder or a device, no image file"
    for source in filter(is_address, images):
        filesystem, base = opened(source)
        before = len(files)
        try:
            infos = filesystem.get_file_info([base])
            if infos[0].type == fs.FileType.Directory:
                infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
        except OSError as e:
            errors[source] = f"cannot be listed ({e})"
            continue
        for info in infos:
            inside = info.path[len(base):].lstrip("/")
            if (info.type == fs.FileType.File and folders.is_image(info.path)
                    and not folders._OUTPUT.search(info.path) and not re.search(r"(^|/)\.", inside)):
                path = source.partition("?")[0].rstrip("/") + ("/" + inside if inside else "")
                files[path] = {"size": info.size, "modified": info.mtime_ns, "file": info.path.encode(),
                               "source": source}
        if len(files) == before:
            errors[source] = "no images here"
    return {path: {"path": path, "source": None, **files[path]} for path in files}, errors, str(found)


def _shown(path: str) -> str:
    """A path as UTF-8, which Parquet wants; of a name that is none the bytes as \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class Scores:
    """A folder of parts, and `verdicts` (good, anomaly, error) by path.

    A row stays if its path is not among `files`, or if it was scored and the file still has that size and
    time of modification. All others go, so that what is scored again has one row.
    """

    def __init__(self, output: str, model: str, files: dict[str, dict]):
        self.output, self.model, self.waiting, self.written = output, model, [], time.monotonic()
        self.verdicts: dict[str, str] = {}
        with self.errors():
            self.filesystem, self.folder = opened(output)
            self.filesystem.create_dir(self.folder, recursive=True)
            for info in self.filesystem.get_file_info(fs.FileSelector(self.folder)):
                if re.fullmatch(r"\.part-.*\.tmp", info.base_name):  # of a run that was killed
                    self.filesystem.delete_file(info.path)
                elif re.fullmatch(r"part-.*\.parquet", info.base_name):
                    self.take(info, files)

    @contextlib.contextmanager
    def errors(self):
        try:
            yield
        except (OSError, pa.ArrowException) as e:
            raise fp.FastPriorError(f"{self.output}: cannot be read or written ({e})") from e

    def take(self, info, files: dict[str, dict]) -> None:
        with self.filesystem.open_input_file(info.path) as f:
            table = parquet.ParquetFile(f).read()
        if table.schema.names != ROW.names:
            raise fp.FastPriorError(f"{info.path}: no rows of ray_score; name another folder for scores")
        if {*table["model"].to_pylist()} != {self.model}:
            raise fp.FastPriorError(f"{self.output}: scores of another model; name another folder for scores")
        keep = []
        columns = (table[name] for name in ("path", "size", "error", "verdict"))
        for path, size, error, verdict, modified in zip(*(c.to_pylist() for c in columns),
                                                        table["modified"].cast(pa.int64()).to_pylist()):
            file = files.get(path)
            same = file is not None and (size, modified) == (file.get("size"), file.get("modified"))
            keep.append((file is None or error is None and same) and path not in self.verdicts)
            if keep[-1]:
                self.verdicts[path] = verdict or "error"
        if not all(keep):
            self.write(table.filter(pa.array(keep)), info.base_name)

    def add(self, table: pa.Table) -> None:
        """Rows, without `model`; written now or when there are more."""
        if not len(table):
            return
        for path, verdict in zip(table["path"].to_pylist(), table["verdict"].to_pylist()):
            self.verdicts[path] = verdict or "error"
        model = pa.array([self.model] * len(table), pa.string())
        self.waiting.append(table.append_column("model", model).select(ROW.names).cast(ROW))
        if sum(map(len, self.waiting)) >= PART_ROWS or time.monotonic() - self.written > PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            name = f"part-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.urandom(4).hex()}.parquet"
            with self.errors():
                self.write(pa.concat_tables(self.waiting), name)
            self.waiting = []
        self.written = time.monotonic()

    def write(self, table: pa.Table, name: str) -> None:
        """A part, whole or not at all; no rows: none."""
        path, temporary = f"{self.folder}/{name}", f"{self.folder}/.{name}.tmp"
        if not len(table):
            self.filesystem.delete_file(path)
            return
        try:
            parquet.write_table(table, temporary, filesystem=self.filesystem)
            self.filesystem.move(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.filesystem.delete_file(temporary)
            raise


# -- the run -----------------------------------------------------------------------------------------

class Lost(logging.Handler):
    """Why blocks were lost: what Ray Data logs, and shows nobody while this lasts."""

    def __enter__(self):
        logger = logging.getLogger("ray.data")
        self.kept, logger.handlers, self.errors = logger.handlers, [self], []
        return self

    def __exit__(self, *_):
        logging.getLogger("ray.data").handlers = self.kept

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.errors.append(record.exc_info[1])


def dataset(files: list[dict], model, workers: int, cpus: float, batch: int):
    """Ray's data set of scored rows. model: see `Score`."""
    blocks = [pa.Table.from_pylist(files[i:i + batch], TO_READ) for i in range(0, len(files), batch)]
    ds = ray.data.from_arrow(blocks)
    ds.context.max_errored_blocks = -1  # a worker that dies takes its block with it and nothing else
    ds.context.enable_progress_bars = False
    ds = ds.map_batches(read, batch_size=batch, batch_format="pyarrow", num_cpus=0,
                        compute=ray.data.TaskPoolStrategy(size=min(workers + 1, len(blocks))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the last two arguments, which Ray 2.64 is to take away
        return ds.map_batches(  # without them it tries for ever a file that kills its worker
            Score, fn_constructor_args=[model], batch_size=batch, batch_format="pyarrow", num_cpus=cpus,
            compute=ray.data.ActorPoolStrategy(
                size=workers, max_tasks_in_flight_per_actor=2 if batch > 1 else 1),
            max_restarts=-1, max_task_retries=0)


def score(images: list[str], model: Path, output: str, workers: int | None = None, cpus: float | None = None,
          threads: int = 1, batch: int = 16) -> int:
    """Scores `images` into Parquet below `output` -> the exit code, of all of them, rows of earlier runs too.

    Uses the Ray that this process is connected to; else connects as `ray.init` does (RAY_ADDRESS, or one that
    runs here), or starts one here and ends it.
    """
    console = fp._room("console")
    prior = fp.Prior.load(model, threads=threads)
    files, errors, left_out = find(images)
    if left_out:
        console.say(left_out)
    for path, text in errors.items():
        console.say(f"error: {path or repr(path)}: {text}")
    digest = hashlib.sha256(Path(model).read_bytes()).hexdigest()[:16]
    scores = Scores(output, digest, files | {path: {} for path in errors})
    to_do = {path: file for path, file in files.items() if path not in scores.verdicts}
    count, began = len(to_do), time.perf_counter()
    try:
        scores.add(unscored([{"path": path} for path in errors], list(errors.values())))
        if to_do:
            with connected(), console.Bars() as bars:
                cpus = threads if cpus is None else cpus
                present = ray.cluster_resources().get("CPU", 0)
                workers = workers or max(1, int(present / cpus))
                if cpus > present:
                    console.say(f"a worker waits for {cpus:g} CPUs, and Ray has {present:g} (see --cpus)")
                reference, told = ray.put(prior), set()
                for size in (batch, 1, 1):  # what dead workers had in hands is tried again, each file alone
                    for table in scored([*to_do.values()], reference, workers, cpus, size):
                        scores.add(table)
                        for path in table["path"].to_pylist():
                            to_do.pop(path, None)
                        for text in {*table["warning"].to_pylist()} - told - {None}:
                            told.add(text)
                            console.say(f"warning: {text}")
                        bars("scoring", count - len(to_do), count)
            text = "its worker died each of three times (out of memory, most often)"
            scores.add(unscored([*to_do.values()], [text] * len(to_do)))
    finally:
        scores.flush()
    verdicts = [scores.verdicts[path] for path in files | errors]
    console.say(f"{len(verdicts)} images, {len(files) - count} of them scored before: "
                f"{verdicts.count('anomaly')} anomalies, {verdicts.count('error')} could not be scored "
                f"(column error); {count} in {time.perf_counter() - began:.1f} s")
    print(output)
    return 2 if "error" in verdicts else int("anomaly" in verdicts)


def scored(files: list[dict], model, workers: int, cpus: float, batch: int):
    """Tables of scored rows, in any order, without those whose workers died."""
    if not files:
        return
    with Lost() as lost:
        try:
            tables = iter(dataset(files, model, workers, cpus, batch).iter_batches(
                batch_size=None, batch_format="pyarrow"))
            with fp._room("console").silence():  # Ray's C++ raises an alarm for each pool that may restart
                table = next(tables, None)
            while table is not None:
                yield table
                table = next(tables, None)
            failed = [e for e in lost.errors if isinstance(e, ray.exceptions.RayTaskError)]
        except ray.exceptions.RayError as e:
            failed = [e]
    if failed:  # no worker that died, and no image's fault
        cause = re.search(r"^[\w.]*(Error|Exception): .*", str(failed[0]), re.MULTILINE)
        hint = "; install fastprior on every machine, or let PYTHONPATH name its folder"
        raise fp.FastPriorError(f"the workers cannot score: {cause[0] if cause else failed[0]}"
                                + hint * ("No module named 'fastprior'" in str(failed[0])))


def unscored(files: list[dict], errors: list[str]) -> pa.Table:
    """Rows that no worker has returned."""
    rows = [{**file, "error": error} for file, error in zip(files, errors)]
    return pa.Table.from_pylist(rows, ROW).drop_columns(["model"])


@contextlib.contextmanager
def connected():
    """Ray, as it is or for as long as this lasts."""
    ours = not ray.is_initialized()
    try:
        if ours:
            ray.init(log_to_driver=False, logging_level="critical")
        yield
    except SystemExit as e:  # what Ray makes of SIGTERM
        raise fp.FastPriorError("terminated; what had been scored is kept, and the next run goes on") from e
    finally:
        if ours:
            ray.shutdown()


def build_app():
    import typer
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
                      context_settings={"help_option_names": ["-h", "--help"]})

    @app.command()
    def ray_score(images: list[str] = typer.Argument(..., help="Files, folders, globs, addresses (s3://)."),
                  model: Path = typer.Option(..., "-m", "--model", help="Model file."),
                  output: str = typer.Option(..., "-o", "--output", help="Folder or address for the scores."),
                  workers: int = typer.Option(None, min=1, help="Processes (default: as many as have CPUs)."),
                  cpus: float = typer.Option(None, min=.01,
                                             help="CPUs that Ray counts a worker (default: --threads)."),
                  threads: int = typer.Option(1, min=1, help="CPU threads of a worker."),
                  batch: int = typer.Option(16, min=1, help="Images that a worker takes at a time.")):
        """Score very many images with Ray Data; Parquet comes out. Run again, it goes on where it was.

        Exit code 0: all good, 1: anomalies, 2: something could not be scored, as `fastprior score`.

        Example: python examples/ray_score.py photos/new -m part.npz -o scores
        """
        raise typer.Exit(score(images, model, output, workers, cpus, threads, batch))

    return app
