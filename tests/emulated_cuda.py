"""A stand-in for the part of CuPy that fastprior uses: it runs every launch on the CPU.

`build` compiles a kernel's text with g++ behind cuda_emulator.h; `FakeCupy` offers device arrays (NumPy
arrays between guard bytes), streams, events, graphs and RawModule on top of it, and records what was
launched. Arguments are checked against the kernel's own parameters, one by one, before it runs.
"""
from __future__ import annotations

import collections
import ctypes
import functools
import hashlib
import itertools
import re
import shutil
import subprocess
import tempfile
import types
import weakref
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "kernels"
_GUARD = 16384  # bytes of NaN (in either precision) on both sides of a device array
_PATTERNS = itertools.cycle(range(0xff01, 0xffff))  # another NaN for each array: a copied one is seen too
_DTYPES = {"i": np.int32, "l": np.int64, "f": np.float32}


class LaunchError(AssertionError):
    """A launch that the hardware would refuse, or that would read or write where it must not."""


def gxx() -> str | None:
    """The C++ compiler, or None where it is missing or has no 16-bit floats."""
    return _working_gxx()


@functools.cache
def _working_gxx() -> str | None:
    path = shutil.which("g++")
    probe = path and subprocess.run([path, "-x", "c++", "-fsyntax-only", "-"], input="_Float16 x;", text=True,
                                    capture_output=True)
    return path if probe and probe.returncode == 0 else None


def source(name: str) -> str:
    """A kernel's text with common.cuh pasted in, as the engine does."""
    common = (KERNELS / "common.cuh").read_text()
    return (KERNELS / f"{name}.cu").read_text().replace('#include "common.cuh"', common)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="emulated_cuda_")


def compile_command(text: str, options: tuple[str, ...]) -> tuple[list[str], Path]:
    """The g++ command for a kernel's text, and the library it writes."""
    bare = re.sub(r"__launch_bounds__\((?:[^()]|\([^()]*\))*\) ", "", text)
    names = re.findall(r'extern "C" __global__ void (\w+)\(', bare)
    names += [f"depthwise_{k}{s}" for k, s in re.findall(r"^DEPTHWISE\((\d), (\d)\)", text, re.M)]
    text += "".join(f"\nEMULATE({name})" for name in names)
    stem = hashlib.sha256((text + " ".join(options)).encode()).hexdigest()[:16]
    file = Path(_folder().name) / f"{stem}.cpp"
    library = file.with_suffix(".so")
    file.write_text(text)
    return [gxx(), "-std=c++17", "-O2", "-march=native", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-w",
            "-fno-strict-aliasing", "-include", str(HERE / "cuda_emulator.h"), *options, str(file), "-o",
            str(library)], library


@functools.cache
def build(text: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """The emulated library of a kernel's text; -D and -I options are passed on, once per process."""
    command, library = compile_command(text, tuple(o for o in options if o.startswith("-D")))
    if not library.exists():
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise LaunchError(done.stderr[:3000])
    return ctypes.CDLL(str(library))


class DeviceArray:
    """Bytes between guards, seen as an array; only what the engine and the tests need of a CuPy array."""

    live: "weakref.WeakSet[DeviceArray]" = weakref.WeakSet()

    def __init__(self, shape, dtype):
        shape = (shape,) if np.isscalar(shape) else tuple(shape)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._pattern = next(_PATTERNS)
        self._raw = np.full(-(-size // 2) + 3 * _GUARD // 2, self._pattern, np.uint16).view(np.uint8)
        self._start = _GUARD + -(self._raw.ctypes.data + _GUARD) % 256
        self._size = size
        self.host = self._raw[self._start:self._start + size].view(dtype).reshape(shape)
        self.device = types.SimpleNamespace(id=_Device.current)
        DeviceArray.live.add(self)

    @property
    def guards_intact(self) -> bool:
        before, after = self._raw[:self._start], self._raw[-(-(self._start + self._size) // 2) * 2:]
        return all(bool((part.view(np.uint16) == self._pattern).all()) for part in (before, after))

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.host.ctypes.data)

    @property
    def __cuda_array_interface__(self):
        return self.host.__array_interface__ | {"version": 3, "stream": 1}

    dtype = property(lambda self: self.host.dtype)
    shape = property(lambda self: self.host.shape)
    ndim = property(lambda self: self.host.ndim)
    nbytes = property(lambda self: self.host.nbytes)
    flags = property(lambda self: types.SimpleNamespace(c_contiguous=self.host.flags.c_contiguous))

    def copy(self):
        return _as_device(self.host)

    def get(self, stream=None):
        if self.device.id != _Device.current:
            raise LaunchError(f"an array of GPU {self.device.id} is read while GPU {_Device.current} is the "
                              "current one")
        return self.host.copy()

    def fill(self, value):
        self.host[...] = value

    def _seen_as(self, host):
        view = object.__new__(DeviceArray)
        view.__dict__ = self.__dict__ | {"host": host}
        return view

    def __getitem__(self, key):
        return self._seen_as(self.host[key])

    def __setitem__(self, key, value):
        if not (isinstance(value, DeviceArray) or np.isscalar(value)):
            raise TypeError(f"Unsupported type {type(value)}")  # a host array is no source
        self.host[key] = value.host if isinstance(value, DeviceArray) else value

    def __imul__(self, other):
        if not isinstance(other, DeviceArray):
            raise TypeError(f"Unsupported type {type(other)}")
        self.host *= other.host
        return self

    def reshape(self, *shape):
        return self._seen_as(self.host.reshape(*shape))

    def view(self, dtype):
        return self._seen_as(self.host.view(dtype))

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")


def _as_device(a) -> DeviceArray:
    if isinstance(a, DeviceArray):
        return a
    a = np.asarray(a)
    out = DeviceArray(a.shape, a.dtype)
    out.host[...] = a
    return out


class Kernel:
    """A compiled kernel; calling it runs it, or adds it to the graph that is being captured."""

    def __init__(self, owner: "FakeCupy", library: ctypes.CDLL, name: str):
        self.owner, self.name = owner, name
        try:
            self._launch, kinds = library[f"launch_{name}"], library[f"kinds_{name}"]
        except AttributeError as e:
            raise LaunchError(f"no kernel {name}") from e
        kinds.restype = self._launch.restype = ctypes.c_char_p
        self.kinds = kinds().decode()

    def __call__(self, grid, block, args, *, shared_mem=0):
        grid, block = (tuple(x) + (1,) * (3 - len(x)) for x in (grid, block))
        fits = 0 < grid[0] < 2 ** 31 and 0 < grid[1] < 65536 and 0 < grid[2] < 65536
        if not (fits and 0 < np.prod(block) <= 1024):
            raise LaunchError(f"{self.name}: grid {grid}, block {block}: outside what a GPU takes")
        if len(args) != len(self.kinds):
            raise LaunchError(f"{self.name}: {len(args)} arguments for {len(self.kinds)} parameters "
                              f"({self.kinds})")
        values = []
        for i, (arg, kind) in enumerate(zip(args, self.kinds)):
            if kind == "p":
                if not isinstance(arg, (DeviceArray, np.uint64)):
                    raise LaunchError(f"{self.name}: argument {i} is {arg!r}, the kernel takes an address")
                values.append(ctypes.c_uint64(arg.data.ptr if isinstance(arg, DeviceArray) else int(arg)))
            elif not isinstance(arg, _DTYPES[kind]):
                raise LaunchError(f"{self.name}: argument {i} is {arg!r} ({type(arg).__name__}), "
                                  f"the kernel takes {_DTYPES[kind].__name__}")
            else:
                values.append(np.ctypeslib.as_ctypes_type(type(arg))(arg.item()))
        dims = (ctypes.c_uint * 6)(*grid, *block)
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])

        def run():
            error = self._launch(dims, pointers, self.owner.schedule)
            if error:
                raise LaunchError(f"{self.name}: {error.decode()}")
            values and dims  # the closure keeps what the pointers name
        self.owner.launches.append((self.name, grid, block, tuple(args)))
        self.owner.submit(run)


class _Device:
    """A GPU; as a context the current one."""

    current = 0

    def __init__(self, id=None):
        self.id, self._before = _Device.current if id is None else id, []

    def __enter__(self):
        self._before.append(_Device.current)
        _Device.current = self.id

    def __exit__(self, *_):
        _Device.current = self._before.pop()


class FakeCupy(types.ModuleType):
    """Stands where `cupy` would: FakeCupy().install(monkeypatch)."""

    def __init__(self, schedule: int = 0):
        super().__init__("cupy")
        self.__version__ = "0.emulated"
        self.schedule = schedule
        self.launches: list[tuple] = []  # (kernel, grid, block, arguments)
        self.copies: list[int] = []  # bytes of every host-to-device copy
        self.replays = 0
        self.modules = 0
        self._capture: list | None = None
        owner = self

        class Stream:
            def __init__(self, ptr=0, null=False, non_blocking=False, **_):
                self.ptr = ptr or (0 if null else id(self))
                self.gpu = _Device.current if self.ptr else None  # the default stream is that of any GPU

            def __enter__(self):
                if self.gpu not in (None, _Device.current):
                    raise LaunchError(f"a stream of GPU {self.gpu} while GPU {_Device.current} is current")
                owner._streams[_Device.current].append(self)
                return self

            def __exit__(self, *_):
                assert owner._streams[_Device.current].pop() is self

            def begin_capture(self, mode=None):
                if self.ptr == 0:
                    raise LaunchError("the default stream cannot be captured")
                owner._capture = []

            def end_capture(self):
                work, owner._capture = owner._capture, None

                def launch(stream=None):
                    owner.replays += 1
                    for run in work:
                        run()
                return types.SimpleNamespace(launch=launch, upload=lambda stream=None: None, work=work)

            def synchronize(self):
                if owner._capture is not None:
                    raise LaunchError("synchronised while capturing")

            def wait_event(self, event):
                pass

            def record(self, event=None):
                pass

        class Event:
            def __init__(self, *_, **__):
                pass

            def record(self, stream=None):
                pass

            def synchronize(self):
                pass

        class RawModule:
            def __init__(self, code, options=(), **_):
                owner.modules += 1
                self._library = build(code, tuple(options))

            def get_function(self, name):
                return Kernel(owner, self._library, name)

        self._streams = collections.defaultdict(lambda: [default])  # a GPU's, the current one last
        default = Stream(null=True)
        self.RawModule = RawModule
        self.uint8, self.float32 = np.uint8, np.float32
        runtime = types.SimpleNamespace(
            memcpyHostToDevice=1, memcpyDeviceToDevice=3, CUDARuntimeError=RuntimeError,
            getDeviceCount=lambda: 1,
            runtimeGetVersion=lambda: 12090, driverGetVersion=lambda: 13000,
            memcpyAsync=self._memcpy,
            getDeviceProperties=lambda i: {"name": b"emulated", "multiProcessorCount": 4, "major": 9,
                                           "minor": 0})
        self.cuda = types.SimpleNamespace(
            runtime=runtime, Stream=Stream, ExternalStream=Stream, Event=Event, Device=_Device,
            get_current_stream=lambda: self._streams[_Device.current][-1],
            get_elapsed_time=lambda a, b: 1.0,
            alloc_pinned_memory=lambda size: np.zeros(size, np.uint8))

    def install(self, monkeypatch):
        import sys
        monkeypatch.setitem(sys.modules, "cupy", self)
        return self

    def submit(self, run):
        if self._capture is None:
            run()
            broken = [a.shape for a in DeviceArray.live if not a.guards_intact]
            if broken:
                raise LaunchError(f"{self.launches[-1][0]}: wrote beside arrays of shape {broken}")
        else:
            self._capture.append(run)

    def _memcpy(self, to, source, size, kind, stream):
        if self._capture is not None:
            raise LaunchError("host copy while capturing")
        if kind == 1:
            self.copies.append(size)
        ctypes.memmove(to, source, size)

    def empty(self, shape, dtype=np.float32):
        if self._capture is not None:
            raise LaunchError("allocation while capturing")
        return DeviceArray(shape, dtype)

    def zeros(self, shape, dtype=np.float32):
        out = self.empty(shape, dtype)
        out.fill(0)
        return out

    def asarray(self, a, dtype=None):
        if not isinstance(a, DeviceArray) and hasattr(a, "__cuda_array_interface__"):
            foreign = types.SimpleNamespace(__array_interface__=a.__cuda_array_interface__)
            view = object.__new__(DeviceArray)
            view.__dict__ = {"host": np.asarray(foreign), "_keep": a,
                             "device": types.SimpleNamespace(id=_Device.current)}
            return view
        if self._capture is not None:
            raise LaunchError("allocation while capturing")
        return _as_device(a if dtype is None else np.asarray(a, dtype))

    def ascontiguousarray(self, a):
        return a if a.flags.c_contiguous else _as_device(np.ascontiguousarray(a.host))
