"""The CPU engine: a frame as a program of fused operations, compiled by Numba and LLVM.

A program is a table of rows, one a fused operation: the address of its compiled function and the fields that
its kernel names (`_fields`). Each operation is cut into bands of rows, one a thread (in a batch: an image a
thread). What must be fast is emitted as LLVM vector code: a register-tiled matrix product, a depthwise row.
Each output is summed in one fixed order, so scores do not depend on threads, bands or batch.

`_kernel` only marks a function: importing this file is light. When the first engine is built, Numba compiles
all of them to one object file, which is kept in the user's cache folder: later processes load that, and never
import Numba (half a second). So no kernel allocates or raises.

In kernels an *address* is in bytes and an *offset* in float32 elements; counts and strides are in elements.
`ws` is the address of the frame's workspace, `own` of the thread's (which may be the same; scratch is always
there), `state` of what an image keeps between operations. To add an operation: see README.md in this folder.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import math
import operator
import os
import stat
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import numpy as np

from . import NONE, PANEL, QTILE, RELU6, SILU, Unavailable, padded_to, round_up, same_padding

_log = logging.getLogger("fastprior")

# contract: fused multiply-add; reassoc: vectorised sums (the order is fixed at compile time).
# Never nnan or ninf: a NaN in must be a NaN out.
_FASTMATH = {"contract", "reassoc", "nsz"}
_KERNELS: list[Callable] = []
_QTILE_BYTES = QTILE.itemsize
_TINY = float(np.finfo(np.float32).tiny)


def _fields(names: str) -> np.dtype:
    """The int64 fields of a row; `emit` demands all of them, and a kernel reads them by name."""
    return np.dtype([(name, np.int64) for name in names.split()])


def _kernel(fields: np.dtype | None = None, exact: bool = False, part: str = ""):
    """Marks what Numba compiles. With `fields` it is an operation of a program, called by its address.

    part: see `load_kernels`.

    `exact`: every float operation is rounded as it is written.
    """
    def mark(function):
        function.fields, function.exact, function.part = fields, exact, part
        _KERNELS.append(function)
        return function
    return mark


# ------------------------------------------------------------------------------------------------
# Compiling once, and keeping the object file
# ------------------------------------------------------------------------------------------------

def _words_of(dot: str, lanes: int) -> dict:
    """What depends on the instruction `dot` that multiplies and adds the values in 32-bit words.

    _GROUP: values in a word, two i16 or four of 8 bits; _WIDE: vectors in a panel of weights, fewer where
    product and sum are two instructions, which want a register between them; _LOWERED: what is added to
    inputs of projections where i8 must hold them, and their biases undo.
    """
    signed, unsigned = dot in ("sdot", "signed quads"), dot in ("vpdpbusd", "quads")
    group = 4 if signed or unsigned else 2
    return {"_DOT": dot, "_GROUP": group, "_WIDE": 2 if dot == "vpmaddwd" and lanes == 8 else 3,
            "_LOWERED": -128 if signed else 0}


def _machine(target, cpu: str, features: str):
    """LLVM's machine, as Numba makes it."""
    return target.create_target_machine(cpu=cpu, features=features, opt=3, codemodel="jitdefault",
                                        reloc="static" if target.name.startswith("x86") else "default")


def _has_sdot(machine) -> bool:
    """Whether LLVM makes `sdot` of products of bytes: it goes by the CPU's name, and lists no feature."""
    from llvmlite import binding
    return "sdot" in machine.emit_assembly(binding.parse_assembly("""
        declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
        define i32 @sum(<16 x i8> %a, <16 x i8> %b) {
            %x = sext <16 x i8> %a to <16 x i32>
            %y = sext <16 x i8> %b to <16 x i32>
            %xy = mul <16 x i32> %x, %y
            %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %xy)
            ret i32 %sum
        }"""))


@functools.cache
def _host() -> tuple[str, str]:
    """Name and features of this CPU, as LLVM writes them. Sets what the packing of weights depends on."""
    from llvmlite import binding
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = binding.get_host_cpu_name(), binding.get_host_cpu_features()
    lanes = 16 if features.get("avx512f") else 8
    if features.get("avx512vnni" if lanes == 16 else "avxvnni"):
        dot = "vpdpbusd"
    elif features.get("avx512bw" if lanes == 16 else "avx2"):
        dot = "vpmaddwd"
    else:  # 64-bit Arm: `sdot` of signed bytes (most since Armv8.2), or i16 with `smlal`
        machine = _machine(binding.Target.from_default_triple(), name, features.flatten())
        dot = "sdot" if _has_sdot(machine) else "pairs"
    # 8x3 of 32 registers, or 4x3 of 16: sums + panel + one (of 32 on Arm: a vector is two)
    globals().update(_LANES=lanes, _TILE=8 if lanes == 16 else 4, **_words_of(dot, lanes))
    return name, features.flatten()


_MOST_THREADS = 8  # by default: a frame has no more work than these share well


def available_threads() -> int:
    """NUMBA_NUM_THREADS, or the cores that this process may use: its affinity, its quota of time."""
    text = os.environ.get("NUMBA_NUM_THREADS", "")
    if text.isdecimal() and text.isascii() and 0 < int(text) < 1000:
        return int(text)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for file in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        try:
            quota, period = (Path(file).read_text().split() + ["100000"])[:2]
            cores = min(cores, max(1, -(-int(quota) // int(period)))) if int(quota) > 0 else cores
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return cores


def usual_threads(threads: int | None = None) -> int:
    """So many of the cores that this process may use; None: NUMBA_NUM_THREADS, or all, at most 8."""
    most = min(available_threads(), 64)  # bands are bits of a word
    usual = most if "NUMBA_NUM_THREADS" in os.environ else min(most, _MOST_THREADS)
    return max(1, min(threads or usual, most))


class _System(NamedTuple):
    """What the operating system offers: addresses of giving a core away and of semaphores, and functions."""
    give_way: int
    post: int
    wait: int
    make: Callable[[int], int]  # a semaphore: address of 64 bytes -> what post and wait take
    core: Callable[[], int] | None = None  # that the caller is on, where threads can be kept off it


@functools.cache
def _system() -> _System:
    def address(function) -> int:
        return ctypes.cast(function, ctypes.c_void_p).value
    if os.name == "nt":
        kernel = ctypes.windll.kernel32
        kernel.CreateSemaphoreW.restype = ctypes.c_void_p
        return _System(address(kernel.SwitchToThread), address(kernel.ReleaseSemaphore),
                       address(kernel.WaitForSingleObject),
                       lambda _: kernel.CreateSemaphoreW(None, 0, 1 << 30, None))
    libc = ctypes.CDLL(None)
    if sys.platform == "darwin":
        libc.dispatch_semaphore_create.restype = ctypes.c_void_p
        return _System(address(libc.sched_yield), address(libc.dispatch_semaphore_signal),
                       address(libc.dispatch_semaphore_wait),
                       lambda _: libc.dispatch_semaphore_create(ctypes.c_long(0)))

    def make(at: int) -> int:
        libc.sem_init(ctypes.c_void_p(at), 0, 0)
        return at
    core = getattr(ctypes.PyDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
    return _System(address(libc.sched_yield), address(libc.sem_post), address(libc.sem_wait), make, core)


_LOADING = threading.Lock()
_ENGINES: weakref.WeakSet = weakref.WeakSet()


def _unlock() -> None:
    """In a forked child: another thread of the parent may have held the locks."""
    global _LOADING
    _LOADING = threading.Lock()
    for engine in _ENGINES:
        engine._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastprior"


_MAGIC = b"fastprior kernels 1\n"
_KEPT = 12  # object files: parts, of other versions and CPUs that share a home


def _only_ours(status: os.stat_result) -> bool:
    """Whether nobody else can have written this file or folder: it holds machine code."""
    return os.name == "nt" or status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o022


def _read_object(path: Path) -> tuple[dict[str, str], bytes] | None:
    """Symbols of the operations and the object file; None unless it is whole and certainly ours."""
    folder = os.lstat(path.parent)
    if not (stat.S_ISDIR(folder.st_mode) and _only_ours(folder)):
        return None
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not (stat.S_ISREG(status.st_mode) and _only_ours(status)):
            return None
        data = file.read()
    head = len(_MAGIC) + 32
    if data[:len(_MAGIC)] != _MAGIC or hashlib.sha256(data[head:]).digest() != data[len(_MAGIC):head]:
        return None
    names, code = data[head:].split(b"\n", 1)
    return json.loads(names), code


def _write_object(path: Path, names: dict[str, str], code: bytes) -> None:
    """Written to a temporary name, then renamed; the oldest of several versions go."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.lstat(path.parent)
    if not (stat.S_ISDIR(folder.st_mode) and _only_ours(folder)):
        raise OSError(f"{path.parent} could be written by others")
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    body = json.dumps(names).encode() + b"\n" + code
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            file.write(_MAGIC + hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    files = sorted(path.parent.glob("kernels-*"), key=lambda p: p.stat().st_mtime)
    for old in files[:-_KEPT]:
        old.unlink(missing_ok=True)


def load_kernels(part: str = "") -> None:
    """Give operations their machine `address`; compiles once. Unavailable says why it cannot.

    part: also those that features in "integers", or in "floats", need: a model has one of the two.
    """
    with _LOADING:
        for each in ("", part):
            _load_kernels(each)


def _object_file(part: str) -> Path:
    """Named after everything that decides the code."""
    from importlib.metadata import version
    sources = b"".join((Path(__file__).parent / name).read_bytes() for name in ("__init__.py", "cpu.py"))
    key = repr([*_host(), *map(version, ("numba", "llvmlite"))]).encode() + sources
    name = "-".join(filter(None, ("kernels", part, hashlib.sha256(key).hexdigest()[:24])))
    return cache_folder() / f"{name}.o"


@functools.cache
def _load_kernels(part: str):
    """Returns the engine of LLVM that owns the code."""
    try:
        from llvmlite import binding
    except (ImportError, OSError) as e:  # the latter: its library does not load here
        raise Unavailable(f"numba is missing ({e}): pip install numba") from e
    cpu, features = _host()
    machine = _machine(binding.Target.from_default_triple(), cpu, features)

    # nothing kept yet, read-only, no home, a frozen program without sources or versions
    nowhere = OSError, RuntimeError, ImportError, ValueError
    try:
        kept = _read_object(_object_file(part))
    except nowhere:
        kept = None
    if kept is None:
        names, code = _compile_kernels(machine, part)
        try:
            _write_object(_object_file(part), names, code)
        except nowhere as e:
            _log.warning("compiled kernels cannot be kept, each process will compile them (%s)", e)
    else:
        names, code = kept
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    for function in _KERNELS:
        if function.fields is not None and function.part == part:
            function.address = engine.get_function_address(names[function.__name__])
            if not function.address:
                raise Unavailable(f"compiled kernels without {function.__name__}: delete {cache_folder()}")
    return engine


# What the object file may ask of the process beside it; more would crash when it is called.
_OUTSIDE = {"memset", "memcpy", "memmove", "expf", "sqrtf"}


def _compile_kernels(machine, part: str) -> tuple[dict[str, str], bytes]:
    """Symbols of the operations of a part, and the object file that holds them."""
    try:
        import numba
        if numba.config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set")
    except ImportError as e:
        raise Unavailable(f"numba cannot compile ({e})") from e
    from llvmlite import binding
    _log.info("compiling kernels for this CPU, once (about %d s)", 10 if part else 15)
    scope = globals()
    marked = {function.__name__: function for function in _KERNELS}
    _define_intrinsics(_LANES)
    scope["carray"] = numba.carray
    names, whole = {}, binding.parse_assembly("")
    try:
        for function in _KERNELS:
            options = {"fastmath": not function.exact and _FASTMATH, "error_model": "numpy"}
            if function.fields is not None and function.part == part:
                arguments = [numba.int64] * function.__code__.co_argcount
                compiled = numba.cfunc(numba.void(*arguments), **options)(function)
                names[function.__name__] = compiled.native_name
                whole.link_in(binding.parse_assembly(compiled.inspect_llvm()))
            elif function.fields is None:
                scope[function.__name__] = numba.njit(**options)(function)
    except (numba.core.errors.NumbaError, RuntimeError) as e:  # the latter: LLVM's
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise Unavailable(f"this numba cannot compile the kernels ({reason}): install the numba that "
                          "fastprior names") from e
    finally:
        scope.update(marked)
    # Numba's wrappers know what to do if a kernel raises, which none can: its runtime is not needed for that
    unneeded = "NRT_", "Py", "numba_"
    traps = [f"define void @{f.name}() {{ call void @llvm.trap() unreachable }}" for f in whole.functions
             if f.is_declaration and f.name.startswith(unneeded)]
    traps += [f"@{g.name} = global ptr null" for g in whole.global_variables
              if g.is_declaration and g.name.startswith(unneeded)]
    whole.link_in(binding.parse_assembly("\n".join(["declare void @llvm.trap()", *traps])))
    asked = {f.name for f in whole.functions if f.is_declaration} - _OUTSIDE
    asked = sorted(name for name in asked if not name.startswith("llvm."))
    if asked:
        raise Unavailable(f"this numba compiles calls of {', '.join(asked)} into the kernels: "
                          "install the numba that fastprior names")
    return names, machine.emit_object(whole)


# ------------------------------------------------------------------------------------------------
# Vector code
# ------------------------------------------------------------------------------------------------

def _define_intrinsics(lanes: int) -> None:
    """The vector intrinsics, as globals."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    f32, i8, i32, i64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
    vec, byte_vec, int_vec = ir.VectorType(f32, lanes), ir.VectorType(i8, lanes), ir.VectorType(i32, lanes)
    rows = _TILE

    def const(x):
        return ir.Constant(i64, x)

    def splat(b, x):
        empty = ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined)
        one = b.insert_element(empty, x, ir.Constant(i32, 0))
        return b.shuffle_vector(one, one, ir.Constant(int_vec, [0] * lanes))

    def value(x):
        return ir.Constant(vec, [x] * lanes)

    def call(b, name, *args):
        kind = ir.FunctionType(vec, [a.type for a in args])
        return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.{name}.v{lanes}f32"), args)

    def at(b, address, offset, kind):  # offset in float32 elements
        return b.inttoptr(b.add(address, b.shl(offset, const(2))), kind.as_pointer())

    def load(b, address, offset, kind=vec):
        return b.load(at(b, address, offset, kind), align=4)

    def store(b, x, address, offset):
        b.store(x, at(b, address, offset, vec), align=4)

    def silu(b, x):
        # exp(-x) = 2^n * p(r): p is the degree-6 Taylor polynomial on |r| <= ln(2)/2, error < 2e-7 relative
        y = call(b, "maxnum", call(b, "minnum", b.fneg(x), value(87.)), value(-87.))
        n = call(b, "rint", b.fmul(y, value(1.4426950408889634)))
        r = call(b, "fma", n, value(-0.693145751953125), y)
        r = call(b, "fma", n, value(-1.428606765330187e-06), r)
        p = value(1 / 720)
        for k in (120, 24, 6, 2, 1, 1):
            p = call(b, "fma", p, r, value(1 / k))
        bias, place = (ir.Constant(int_vec, [k] * lanes) for k in (127, 23))  # of a float32's exponent
        power = b.shl(b.add(b.fptosi(n, int_vec), bias), place)
        return b.fdiv(x, call(b, "fma", p, b.bitcast(power, vec), value(1.)))

    def relu6(b, x):
        # ordered comparisons are false for NaN, which therefore passes through
        low = b.select(b.fcmp_ordered("<", x, value(0.)), value(0.), x)
        return b.select(b.fcmp_ordered(">", low, value(6.)), value(6.), low)

    def activated(b, act, emit):
        """Run emit(activation) in the branch that the run-time code `act` names."""
        with b.if_else(b.icmp_signed("==", act, const(SILU))) as (yes, no):
            with yes:
                emit(lambda x: silu(b, x))
            with no, b.if_else(b.icmp_signed("==", act, const(RELU6))) as (clip, plain):
                with clip:
                    emit(lambda x: relu6(b, x))
                with plain:
                    emit(lambda x: x)

    wide = PANEL // lanes  # vectors in a row of a QTILE

    def tile_row(b, w, k):
        """Row k of the weights of the QTILE at w, without their scales. Asks for the tile after the next."""
        prefetch = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        later = b.add(b.add(w, const(2 * _QTILE_BYTES)), b.mul(k, const(_QTILE_BYTES // PANEL)))
        b.call(cgutils.get_or_insert_function(b.module, prefetch, "llvm.prefetch.p0"),
               [b.inttoptr(later, cgutils.voidptr_t), *(ir.Constant(i32, n) for n in (0, 3, 1))])
        row = b.add(b.add(w, const(4 * PANEL)), b.mul(k, const(PANEL)))
        whole = [b.load(b.inttoptr(b.add(row, const(n * lanes)), byte_vec.as_pointer()), align=1)
                 for n in range(wide)]
        return [b.sitofp(b.sext(v, int_vec), vec) for v in whole]

    def make_qtile(m_rows: int):
        chains = 4 // wide  # sums side by side, as many as a multiply-add takes to finish

        @intrinsic
        def qtile(typing, a, w, c, ld):
            """c += a @ QTILE for a, c (m_rows, PANEL), rows ld apart in both."""
            def codegen(context, b, signature, args):
                a, w, c, ld = args
                acc = [[[cgutils.alloca_once(b, vec) for _ in range(wide)] for _ in range(m_rows)]
                       for _ in range(chains)]
                for chain in acc:
                    for sums in chain:
                        for total in sums:
                            b.store(value(0.), total)
                with cgutils.for_range(b, const(PANEL // chains), intp=i64) as loop:
                    for i, chain in enumerate(acc):
                        k = b.add(b.mul(loop.index, const(chains)), const(i))
                        weights = tile_row(b, w, k)
                        for m in range(m_rows):
                            x = splat(b, load(b, a, b.add(b.mul(ld, const(m)), k), f32))
                            for n in range(wide):
                                b.store(call(b, "fma", x, weights[n], b.load(chain[m][n])), chain[m][n])
                for m in range(m_rows):
                    for n in range(wide):
                        total = b.load(acc[0][m][n])
                        for chain in acc[1:]:
                            total = b.fadd(total, b.load(chain[m][n]))
                        to = b.add(b.mul(ld, const(m)), const(n * lanes))
                        store(b, call(b, "fma", load(b, w, const(n * lanes)), total, load(b, c, to)), c, to)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 4), codegen
        return qtile

    @intrinsic
    def dots(typing, x, w, sums):
        """sums (PANEL, lanes) += products that are one lane's share of QTILE @ x, x (PANEL,)."""
        def codegen(context, b, signature, args):
            x, w, sums = args
            scaled = [b.fmul(load(b, x, const(n * lanes)), load(b, w, const(n * lanes))) for n in range(wide)]
            with cgutils.for_range(b, const(PANEL), intp=i64) as loop:
                at_sum = b.mul(loop.index, const(lanes))
                total = load(b, sums, at_sum)
                for mine, other in zip(scaled, tile_row(b, w, loop.index)):
                    total = call(b, "fma", mine, other, total)
                store(b, total, sums, at_sum)
            return context.get_dummy_value()
        return types.void(*[types.int64] * 3), codegen

    def make_tile(m_rows: int, n_vecs: int):
        @intrinsic
        def tile(typing, a, lda, w, ldw, k, bias, ldbias, res, ldres, c, ldc, act):
            """c = act(bias + a @ w) + res for m_rows x (n_vecs * lanes); bias and res may be 0."""
            def codegen(context, b, signature, args):
                a, lda, w, ldw, k, bias, ldbias, res, ldres, c, ldc, act = args
                acc = [[cgutils.alloca_once(b, vec) for _ in range(n_vecs)] for _ in range(m_rows)]
                cells = [(m, n) for m in range(m_rows) for n in range(n_vecs)]
                with b.if_else(b.icmp_signed("!=", bias, const(0))) as (some, none):
                    with some:
                        for m, n in cells:
                            to = b.add(b.mul(ldbias, const(m)), const(n * lanes))
                            b.store(load(b, bias, to), acc[m][n])
                    with none:
                        for m, n in cells:
                            b.store(value(0.), acc[m][n])
                with cgutils.for_range(b, k, intp=i64) as loop:
                    row = b.mul(loop.index, ldw)
                    panel = [load(b, w, b.add(row, const(n * lanes))) for n in range(n_vecs)]
                    for m in range(m_rows):
                        x = splat(b, load(b, a, b.add(b.mul(lda, const(m)), loop.index), f32))
                        for n in range(n_vecs):
                            b.store(call(b, "fma", x, panel[n], b.load(acc[m][n])), acc[m][n])

                for m, n in cells:
                    store(b, b.load(acc[m][n]), c, b.add(b.mul(ldc, const(m)), const(n * lanes)))
                # a second pass over the tile, still in the first-level cache, keeps the code small
                more = b.or_(b.icmp_signed("!=", act, const(NONE)), b.icmp_signed("!=", res, const(0)))
                with b.if_then(more):
                    with cgutils.for_range(b, const(m_rows), intp=i64) as loop:
                        for n in range(n_vecs):
                            to = b.add(b.mul(ldc, loop.index), const(n * lanes))
                            y = cgutils.alloca_once(b, vec)
                            x = load(b, c, to)
                            activated(b, act, lambda f: b.store(f(x), y))
                            with b.if_then(b.icmp_signed("!=", res, const(0))):
                                other = load(b, res, b.add(b.mul(ldres, loop.index), const(n * lanes)))
                                b.store(b.fadd(b.load(y), other), y)
                            store(b, b.load(y), c, to)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 12), codegen
        return tile

    def make_depthwise(size: int, stride: int):
        # whether all taps stay in registers; else a row of them does
        kept = size * size + 5 <= (32 if lanes == 16 else 16)
        group = 4 if size == 3 or not kept else 2  # outputs at once: they share loads

        @intrinsic
        def row(typing, lines, n_out, channels, w, bias, out, ldo, sums, act):
            """One output row. lines: address of `size` int64 row addresses; sums (channels,) or 0."""
            def codegen(context, b, signature, args):
                lines, n_out, channels, w, bias, out, ldo, sums, act = args
                with cgutils.for_range(b, b.udiv(channels, const(lanes)), intp=i64) as loop:
                    first = b.mul(loop.index, const(lanes))

                    def tap(i):
                        return load(b, w, b.add(first, b.mul(channels, const(i))))

                    taps = [tap(i) for i in range(size * size)] if kept else None
                    offset = load(b, bias, first)
                    bases = [b.load(b.inttoptr(b.add(lines, const(8 * i)), i64.as_pointer()))
                             for i in range(size)]
                    total = cgutils.alloca_once(b, vec)
                    b.store(value(0.), total)

                    def outputs(x, count):
                        start = b.mul(b.mul(x, const(stride)), channels)
                        acc = [offset] * count
                        for i in range(size):
                            row = [taps[i * size + j] if kept else tap(i * size + j) for j in range(size)]
                            for j in range((count - 1) * stride + size):
                                at_x = b.add(b.add(start, b.mul(channels, const(j))), first)
                                users = [o for o in range(count) if 0 <= j - o * stride < size]
                                if users:
                                    v = load(b, bases[i], at_x)
                                for o in users:
                                    acc[o] = call(b, "fma", v, row[j - o * stride], acc[o])

                        def finish(activation):
                            for o in range(count):
                                y = activation(acc[o])
                                store(b, y, out, b.add(b.mul(b.add(x, const(o)), ldo), first))
                                b.store(b.fadd(b.load(total), y), total)
                        activated(b, act, finish)
                    groups = b.udiv(n_out, const(group))
                    with cgutils.for_range(b, groups, intp=i64) as inner:
                        outputs(b.mul(inner.index, const(group)), group)
                    rest = b.mul(groups, const(group))
                    with cgutils.for_range_slice(b, rest, n_out, const(1), intp=i64) as (x, _):
                        outputs(x, 1)
                    with b.if_then(b.icmp_signed("!=", sums, const(0))):
                        store(b, b.load(total), sums, first)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 9), codegen
        return row

    # Integers. A word is `_GROUP` values; `dot` adds the products of two words, lane by lane.
    short_vec = ir.VectorType(ir.IntType(16), lanes)
    narrow_vec = ir.VectorType(ir.IntType(32 // _GROUP), lanes)
    half_vec, pair = ir.VectorType(ir.IntType(16), 2 * lanes), ir.VectorType(ir.IntType(16), 2)
    at_once = _DOT in ("vpdpbusd", "vpmaddwd")  # products of the two i16 of a word: one instruction adds them
    apart = ir.VectorType(i32, 2 * lanes)  # else sums of them are, in a depthwise layer
    of_bits = {8: "256", 16: "512"}[lanes]

    def ints(x):
        return ir.Constant(int_vec, [x] * lanes)

    def at_byte(b, address, kind):
        return b.inttoptr(address, kind.as_pointer())

    def plus(b, address, *terms):
        """address + sum of terms, a term an i64 value, a Python int or a product of two."""
        for term in terms:
            if isinstance(term, tuple):
                x, y = (const(t) if isinstance(t, int) else t for t in term)
                term = b.mul(x, y)
            address = b.add(address, const(term) if isinstance(term, int) else term)
        return address

    def part(b, x, indices):
        return b.shuffle_vector(x, x, ir.Constant(ir.VectorType(i32, len(indices)), list(indices)))

    def spread(b, total, x, w, count):
        """total + products of the `count` fields of each word; those of x are unsigned if they are u8."""
        kind = ir.VectorType(ir.IntType(32 // count), count * lanes)
        for i in range(count):
            x_i, w_i = (part(b, b.bitcast(v, kind), range(i, count * lanes, count)) for v in (x, w))
            x_i = b.zext(x_i, int_vec) if count == 4 and not _LOWERED else b.sext(x_i, int_vec)
            total = b.add(total, b.mul(x_i, b.sext(w_i, int_vec)))
        return total

    def intrinsic_of(b, name, *args):
        kind = ir.FunctionType(int_vec, [a.type for a in args])
        return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)

    def neon(b, name, *args):
        """An instruction of Arm for each four lanes -> i32. All but the first are taken as bytes."""
        parts, four, sixteen = [], ir.VectorType(i32, 4), ir.VectorType(i8, 16)
        for i in range(0, lanes, 4):
            own, *more = (part(b, x, range(i, i + 4)) for x in args)
            own = [own, *(b.bitcast(x, sixteen) for x in more)]
            kind = ir.FunctionType(four, [x.type for x in own])
            function = cgutils.get_or_insert_function(b.module, kind, f"llvm.aarch64.neon.{name}")
            parts.append(b.call(function, own))
        return b.shuffle_vector(*parts, ir.Constant(int_vec, list(range(lanes))))

    def dot_pairs(b, total, x, w):
        """total + products of the two i16 in each word; side by side where the total is two i32 a word."""
        if total.type == apart:
            x, w = (b.sext(b.bitcast(v, half_vec), total.type) for v in (x, w))
            return b.add(total, b.mul(x, w))
        if _DOT == "vpdpbusd":
            return intrinsic_of(b, f"llvm.x86.avx512.vpdpwssd.{of_bits}", total, x, w)
        if _DOT == "vpmaddwd":
            name = "llvm.x86.avx2.pmadd.wd" if lanes == 8 else "llvm.x86.avx512.pmaddw.d.512"
            return b.add(total, intrinsic_of(b, name, b.bitcast(x, half_vec), b.bitcast(w, half_vec)))
        return spread(b, total, x, w, 2)

    def dot(b, total, x, w):
        """total + products of the values in each word."""
        if _DOT == "vpdpbusd":
            return intrinsic_of(b, f"llvm.x86.avx512.vpdpbusd.{of_bits}", total, x, w)
        if _DOT == "sdot":
            return neon(b, "sdot.v4i32.v16i8", total, x, w)
        return spread(b, total, x, w, 4) if _GROUP == 4 else dot_pairs(b, total, x, w)

    def rounded(b, total, multiplier):
        """rint(float32(total) * multiplier), i32: `_check_integers` has seen that it fits."""
        y = b.fmul(b.sitofp(total, vec), multiplier)
        if _DOT == "sdot":
            return neon(b, "fcvtns.v4i32.v4f32", y)
        if not at_once:
            return b.fptosi(call(b, "rint", y), int_vec)
        kind = ir.FunctionType(int_vec, [vec])
        name = f"llvm.lrint.v{lanes}i32.v{lanes}f32"
        return b.call(cgutils.get_or_insert_function(b.module, kind, name), [y])

    def clipped(b, x, low, high):
        low, high = (ir.Constant(x.type, [n] * x.type.count) for n in (low, high))
        x = b.select(b.icmp_signed("<", x, low), low, x)
        return b.select(b.icmp_signed(">", x, high), high, x)

    def both_in_shorts(b, most, first, second):
        """Two vectors of i32 -> (2 * lanes) i16 in 0..most."""
        indices = ir.Constant(ir.VectorType(i32, 2 * lanes), list(range(2 * lanes)))
        both = b.shuffle_vector(first, second, indices)
        shorts = b.trunc(clipped(b, both, 0, 65535), half_vec)  # one instruction, packusdw
        high = ir.Constant(half_vec, [most] * 2 * lanes)
        return b.select(b.icmp_unsigned("<", shorts, high), shorts, high)

    def in_words(b, first, second):
        """Two vectors of i32, clipped to 0..2047 -> words of two i16, the first in the lower halves."""
        if _DOT in ("vpdpbusd", "vpmaddwd"):  # four lanes of the one, four of the other, and so on
            name = "llvm.x86.avx2.packusdw" if lanes == 8 else "llvm.x86.avx512.packusdw.512"
            kind = ir.FunctionType(half_vec, [int_vec] * 2)
            packed = b.call(cgutils.get_or_insert_function(b.module, kind, name), [first, second])
            most = ir.Constant(half_vec, [2047] * 2 * lanes)
            packed = b.select(b.icmp_unsigned("<", packed, most), packed, most)
            return part(b, packed, [i // 4 * 8 + j + i % 4 for i in range(lanes) for j in (0, 4)])
        both = both_in_shorts(b, 2047, first, second)
        return part(b, both, [i + lanes * j for i in range(lanes) for j in (0, 1)])

    def make_product(n_vecs: int, paired: bool, dot: Callable):
        m_rows, tall = rows, rows // 2 if paired else rows

        @intrinsic
        def product(typing, a, a_hi, lda, last, k, w, bias, multiplier, res, out, ldo):
            """`tall` pixels x (n_vecs * lanes) of a layer: k words of inputs, pixels lda bytes apart.

            Where there are fewer, the `last` is computed again. Paired: a word of out has the u8 of a's row
            below that of a_hi's; pixels follow one another, and ldo bytes on come the next `lanes` channels.
            Else out is i16 with the residual at res (0: none) added, and pixels are ldo bytes apart.
            """
            def codegen(context, b, signature, args):
                a, a_hi, lda, last, k, w, bias, multiplier, res, out, ldo = args
                wide = n_vecs * lanes
                pixels = [b.select(b.icmp_signed("<", last, const(m)), last, const(m)) for m in range(tall)]
                starts = [plus(b, row, (lda, m)) for row in ((a, a_hi) if paired else (a,)) for m in pixels]
                acc = [[cgutils.alloca_once(b, int_vec) for _ in range(n_vecs)] for _ in range(m_rows)]
                for n in range(n_vecs):
                    start = b.load(at_byte(b, plus(b, bias, 4 * n * lanes), int_vec), align=4)
                    for m in range(m_rows):
                        b.store(start, acc[m][n])
                with cgutils.for_range(b, k, intp=i64) as loop:
                    line = plus(b, w, (loop.index, 4 * wide))
                    weights = [b.load(at_byte(b, plus(b, line, 4 * n * lanes), int_vec), align=4)
                               for n in range(n_vecs)]
                    for m in range(m_rows):
                        kind = i32 if at_once else pair  # in which LLVM finds each half's splat
                        x = b.load(at_byte(b, plus(b, starts[m], (loop.index, 4)), kind), align=4)
                        x = splat(b, x) if at_once else b.bitcast(part(b, x, [0, 1] * lanes), int_vec)
                        for n in range(n_vecs):
                            b.store(dot(b, b.load(acc[m][n]), x, weights[n]), acc[m][n])
                for n in range(n_vecs):
                    m_n = b.load(at_byte(b, plus(b, multiplier, 4 * n * lanes), vec), align=4)
                    y = [rounded(b, b.load(acc[m][n]), m_n) for m in range(m_rows)]
                    if paired:
                        for m in range(tall):
                            place = plus(b, out, (ldo, n), (pixels[m], 4 * lanes))
                            b.store(in_words(b, y[m], y[m + tall]), at_byte(b, place, half_vec), align=2)
                        continue
                    for m in range(m_rows):
                        place = (ldo, pixels[m]), 2 * n * lanes
                        total = cgutils.alloca_once(b, int_vec)
                        b.store(y[m], total)
                        with b.if_then(b.icmp_signed("!=", res, const(0))):
                            other = b.load(at_byte(b, plus(b, res, *place), short_vec), align=2)
                            b.store(b.add(clipped(b, y[m], -32767, 32767), b.sext(other, int_vec)), total)
                        short = b.trunc(clipped(b, b.load(total), -32768, 32767), short_vec)  # packssdw
                        short = clipped(b, short, -32767, 32767)
                        b.store(short, at_byte(b, plus(b, out, *place), short_vec), align=2)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 11), codegen
        return product

    def make_depthwise_pairs(size: int, stride: int):
        pairs = size // 2 + 1
        kept = size == 3 or lanes == 16  # whether all weights stay in registers
        group = 4 if size == 3 else 2 if lanes == 16 else 4

        @intrinsic
        def row(typing, lines, block, n_out, channels, w, bias, multiplier, out):
            """One output row, values of `_GROUP` a word. w (pairs, size, channels) in words.

            lines: addresses of pairs of rows (channels / lanes, width, lanes), `block` bytes from one to the
            next of the first axis.
            """
            def codegen(context, b, signature, args):
                lines, block, n_out, channels, w, bias, multiplier, out = args
                with cgutils.for_range(b, b.udiv(channels, const(lanes)), intp=i64) as loop:
                    first = b.mul(loop.index, const(lanes))

                    def words(address, *terms, kind=int_vec):
                        return b.load(at_byte(b, plus(b, address, (first, 4), *terms), kind), align=4)

                    def tap(i):
                        return words(w, (b.mul(channels, const(i)), 4))
                    taps = [tap(i) for i in range(pairs * size)] if kept else None
                    start, scale = words(bias), words(multiplier, kind=vec)
                    bases = [plus(b, b.load(at_byte(b, plus(b, lines, 8 * i), i64)), (loop.index, block))
                             for i in range(pairs)]

                    def outputs(x, count):
                        acc = [start if at_once else ir.Constant(apart, [0] * 2 * lanes)] * count
                        starts = [plus(b, base, (x, 4 * lanes * stride)) for base in bases]
                        for i in range(pairs):
                            row = [taps[i * size + j] if kept else tap(i * size + j) for j in range(size)]
                            for j in range((count - 1) * stride + size):
                                users = [o for o in range(count) if 0 <= j - o * stride < size]
                                if users:
                                    place = plus(b, starts[i], 4 * lanes * j)
                                    v = b.load(at_byte(b, place, int_vec), align=4)
                                for o in users:
                                    acc[o] = dot_pairs(b, acc[o], v, row[j - o * stride])
                        if not at_once:
                            ends = [[part(b, x, range(i, 2 * lanes, 2)) for i in (0, 1)] for x in acc]
                            acc = [b.add(start, b.add(*two)) for two in ends]
                        to = plus(b, out, (b.add(b.mul(x, channels), first), 4 // _GROUP))
                        halves = []
                        for o in range(0, count, 2):
                            y = [rounded(b, total, scale) for total in acc[o:o + 2]]
                            if lanes == 16:  # in its few lanes AVX2 does better with two at once
                                halves += [b.trunc(clipped(b, x, 0, 255), narrow_vec) for x in y]
                                continue
                            both = both_in_shorts(b, 255, y[0], y[-1])
                            halves += [b.trunc(part(b, both, range(i * lanes, (i + 1) * lanes)), narrow_vec)
                                       if _GROUP == 4 else part(b, both, range(i * lanes, (i + 1) * lanes))
                                       for i in range(len(y))]
                        for i, half in enumerate(halves):
                            if _LOWERED:
                                half = b.add(half, ir.Constant(narrow_vec, [_LOWERED] * lanes))
                            place = plus(b, to, (channels, 4 // _GROUP * i))
                            b.store(half, at_byte(b, place, narrow_vec), align=1)
                    groups = b.udiv(n_out, const(group))
                    with cgutils.for_range(b, groups, intp=i64) as inner:
                        outputs(b.mul(inner.index, const(group)), group)
                    rest = b.mul(groups, const(group))
                    with cgutils.for_range_slice(b, rest, n_out, const(1), intp=i64) as (x, _):
                        outputs(x, 1)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 8), codegen
        return row

    def make_narrow(in_bytes: bool):
        kind = ir.VectorType(i8, lanes) if in_bytes else short_vec

        @intrinsic
        def narrow(typing, x, n, input_m, out):
            """n i16 times a multiplier -> as many i16 or, in bytes, what `dot` takes of such with a sign."""
            def codegen(context, b, signature, args):
                x, n, input_m, out = args
                scale, most = (splat(b, load(b, input_m, const(i), f32)) for i in (0, 1))
                most = b.fptosi(most, int_vec)
                least = b.neg(most)
                with cgutils.for_range(b, b.udiv(n, const(lanes)), intp=i64) as loop:
                    first = b.mul(loop.index, const(lanes))
                    v = b.sext(b.load(at_byte(b, plus(b, x, (first, 2)), short_vec), align=2), int_vec)
                    y = rounded(b, v, scale)
                    y = b.select(b.icmp_signed("<", y, least), least, y)
                    y = b.trunc(b.select(b.icmp_signed(">", y, most), most, y), kind)
                    if in_bytes:
                        y = b.add(y, ir.Constant(kind, [128 + _LOWERED] * lanes))
                    b.store(y, at_byte(b, plus(b, out, (first, 1 if in_bytes else 2)), kind), align=1)
                return context.get_dummy_value()
            return types.void(*[types.int64] * 4), codegen
        return narrow

    four = ir.VectorType(f32, 4)

    @intrinsic
    def resize_pixels(typing, line, start, weight, taps, n, affine, out):
        """out (n, 3) = scale * (sum of taps of line) + shift, scale and shift four values each at affine.

        A pixel is four lanes: the last is 0, and the next pixel's to write.
        """
        def codegen(context, b, signature, args):
            line, start, weight, taps, n, affine, out = args
            scale, shift = load(b, affine, const(0), four), load(b, affine, const(4), four)
            kind = ir.FunctionType(four, [four] * 3)
            fma = cgutils.get_or_insert_function(b.module, kind, "llvm.fma.v4f32")
            total = cgutils.alloca_once(b, four)
            with cgutils.for_range(b, n, intp=i64) as pixel:
                first = b.load(b.inttoptr(b.add(start, b.shl(pixel.index, const(3))), i64.as_pointer()))
                own = b.mul(pixel.index, taps)

                def add(tap, total):
                    share = load(b, weight, b.add(own, tap), f32)
                    one = b.insert_element(ir.Constant(four, ir.Undefined), share, ir.Constant(i32, 0))
                    share = b.shuffle_vector(one, one, ir.Constant(ir.VectorType(i32, 4), [0] * 4))
                    value = load(b, line, b.mul(b.add(first, tap), const(3)), four)
                    return b.fmul(share, value) if total is None else b.call(fma, [share, value, total])
                b.store(add(const(0), None), total)
                with cgutils.for_range_slice(b, const(1), taps, const(1), intp=i64) as (tap, _):
                    b.store(add(tap, b.load(total)), total)
                y = b.call(fma, [scale, b.load(total), shift])
                b.store(y, at(b, out, b.mul(pixel.index, const(3)), four), align=4)
            return context.get_dummy_value()
        return types.void(*[types.int64] * 7), codegen

    @intrinsic
    def as_pointer(typing, address):
        def codegen(context, b, signature, args):
            return b.inttoptr(args[0], cgutils.voidptr_t)
        return types.voidptr(types.int64), codegen

    @intrinsic
    def call_operation(typing, function, row, band, bands, ws, own, state, image, batch, state_stride):
        def codegen(context, b, signature, args):
            kind = ir.FunctionType(ir.VoidType(), [i64] * 9)
            b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
            return context.get_dummy_value()
        return types.void(*[types.int64] * 10), codegen

    @intrinsic
    def call3(typing, function, x, y, z):
        """A function of the C library of up to three arguments, each a word."""
        def codegen(context, b, signature, args):
            b.call(b.inttoptr(args[0], ir.FunctionType(i32, [i64] * 3).as_pointer()), args[1:])
            return context.get_dummy_value()
        return types.void(*[types.int64] * 4), codegen

    @intrinsic
    def load_word(typing, address):
        def codegen(context, b, signature, args):
            return b.load_atomic(b.inttoptr(args[0], i64.as_pointer()), "acquire", 8)
        return types.int64(types.int64), codegen

    @intrinsic
    def store_word(typing, address, word):
        def codegen(context, b, signature, args):
            b.store_atomic(args[1], b.inttoptr(args[0], i64.as_pointer()), "release", 8)
            return context.get_dummy_value()
        return types.void(*[types.int64] * 2), codegen

    @intrinsic
    def add_word(typing, address, word):
        def codegen(context, b, signature, args):
            b.atomic_rmw("add", b.inttoptr(args[0], i64.as_pointer()), args[1], "acq_rel")
            return context.get_dummy_value()
        return types.void(*[types.int64] * 2), codegen

    @intrinsic
    def claim(typing, address):
        """The word, and one less in its place; 0 if it is 0, which stays."""
        def codegen(context, b, signature, args):
            word = b.inttoptr(args[0], i64.as_pointer())
            seen = cgutils.alloca_once(b, i64)
            b.store(b.load_atomic(word, "acquire", 8), seen)
            again, end = b.append_basic_block("again"), b.append_basic_block("end")
            b.branch(again)
            b.position_at_end(again)
            old = b.load(seen)
            new = b.select(b.icmp_signed("==", old, const(0)), old, b.sub(old, const(1)))
            result = b.cmpxchg(word, old, new, "acq_rel", "acquire")
            b.store(b.extract_value(result, 0), seen)
            b.cbranch(b.extract_value(result, 1), end, again)
            b.position_at_end(end)
            return b.load(seen)
        return types.int64(types.int64), codegen

    @intrinsic
    def take(typing, address, bit):
        """Set a bit of the word: 1, or 0 if it was set."""
        def codegen(context, b, signature, args):
            mask = b.shl(const(1), args[1])
            old = b.atomic_rmw("or", b.inttoptr(args[0], i64.as_pointer()), mask, "acq_rel")
            return b.zext(b.icmp_signed("==", b.and_(old, mask), const(0)), i64)
        return types.int64(*[types.int64] * 2), codegen

    @intrinsic
    def pause(typing):
        def codegen(context, b, signature, args):
            if "86" in b.module.triple:
                kind = ir.FunctionType(ir.VoidType(), [])
                b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])
            elif "aarch64" in b.module.triple or "arm64" in b.module.triple:
                kind = ir.FunctionType(ir.VoidType(), [i32])
                hint = cgutils.get_or_insert_function(b.module, kind, "llvm.aarch64.hint")
                b.call(hint, [ir.Constant(i32, 1)])
            return context.get_dummy_value()
        return types.void(), codegen

    scope = globals()
    scope.update(_as_pointer=as_pointer, _call=call_operation, _call3=call3, _load=load_word,
                 _store=store_word, _add=add_word, _claim=claim, _take=take, _pause=pause)
    for n_vecs in (1, 2, 3):
        scope[f"_tile_{n_vecs}"] = make_tile(rows, n_vecs)
        scope[f"_tile_{n_vecs}_row"] = make_tile(1, n_vecs)
        scope[f"_pairs_{n_vecs}"], scope[f"_words_{n_vecs}"], scope[f"_sums_{n_vecs}"] = (
            make_product(n_vecs, paired, f) for paired, f in ((True, dot_pairs), (True, dot), (False, dot)))
    scope.update(_qtile_rows=make_qtile(rows // 2), _qtile_row=make_qtile(1), _dots=dots,
                 _resize_pixels=resize_pixels,
                 _narrow=make_narrow(False), _narrow_bytes=make_narrow(True))
    for size in (3, 5):
        for stride in (1, 2):
            scope[f"_depthwise_{size}{stride}"] = make_depthwise(size, stride)
            scope[f"_depthwise_pairs_{size}{stride}"] = make_depthwise_pairs(size, stride)


# ------------------------------------------------------------------------------------------------
# Kernels
# ------------------------------------------------------------------------------------------------

@_kernel()
def _columns(left):
    """How many vectors wide the next panel is: threes, and 2 + 2 rather than 3 + 1."""
    return 2 if left == 4 else min(left, 3)


@_kernel()
def _matmul(a, lda, m, k, w, ldw, n, bias, ldbias, res, ldres, c, ldc, act):
    """c = act(bias + a @ w) + res, a (m, k), n a multiple of _LANES; ldw = 0: w is packed in panels.

    The last tile of rows overlaps the one before it, so c must not alias a or res.
    """
    j = 0
    while j < n:
        wide = _columns((n - j) // _LANES)
        panel = w + 4 * j * (k if ldw == 0 else 1)
        step = wide * _LANES if ldw == 0 else ldw
        b = bias + 4 * j if bias != 0 else 0
        i = 0
        while i < m:
            if m >= _TILE:
                i = min(i, m - _TILE)
            x, y = a + 4 * i * lda, c + 4 * (i * ldc + j)
            r = res + 4 * (i * ldres + j) if res != 0 else 0
            bi = b + 4 * i * ldbias if b != 0 else 0
            if m >= _TILE:
                if wide == 3:
                    _tile_3(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                elif wide == 2:
                    _tile_2(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                else:
                    _tile_1(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                i += _TILE
            else:
                if wide == 3:
                    _tile_3_row(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                elif wide == 2:
                    _tile_2_row(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                else:
                    _tile_1_row(x, lda, panel, step, k, bi, ldbias, r, ldres, y, ldc, act)
                i += 1
        j += wide * _LANES


@_kernel()
def _floats(address, n):
    """n float32 at an address, as an array."""
    return carray(_as_pointer(address), n, np.float32)


@_kernel()
def _bytes(address, n):
    """n uint8 at an address."""
    return carray(_as_pointer(address), n, np.uint8)


@_kernel()
def _shorts(address, n):
    """n int16 at an address."""
    return carray(_as_pointer(address), n, np.int16)


@_kernel()
def _ints(address, n):
    """n int32 at an address."""
    return carray(_as_pointer(address), n, np.int32)


@_kernel()
def _longs(address, n):
    """n int64 at an address."""
    return carray(_as_pointer(address), n, np.int64)


@_kernel()
def _doubles(address, n):
    """n float64 at an address."""
    return carray(_as_pointer(address), n, np.float64)


@_kernel()
def _row(address, fields):
    """A row of a program, of the image table, or the job: its fields by name."""
    return carray(_as_pointer(address), 1, fields)[0]


# A row of the image table: all that differs from image to image. The taps are `fastprior.resize_taps`,
# map_* those of the map, `fastprior.linear_taps`, map 0 if none is wanted.
# Before a thread's workspace lies a `line` of floats for the resize, after it its scratch.
_IMAGE = _fields("pixels height width row_start row_weight row_taps col_start col_weight col_taps "
                 "map map_row map_row_share map_col map_col_share line")

_RESIZE = _fields("operation out height width row_stride affine integer scratch")


@_kernel(_RESIZE)
def _resize(row, band, bands, ws, own, state, image, batch, state_stride):
    """The image's pixels -> (height, width, 3) normalised, rows `row_stride` floats apart.

    `integer`: as int16, see `resize_integers`. Taps are integers then, and all sums exact.
    """
    p, image = _row(row, _RESIZE), _row(image, _IMAGE)
    height, pixels, w, row_taps = p.height, image.pixels, image.width, image.row_taps
    rs = carray(_as_pointer(image.row_start), height, np.int64)
    rw = _floats(image.row_weight, height * row_taps)
    line_at = own - 4 * image.line
    line = _floats(line_at, w * 3 + 1)
    for y in range(band * height // bands, (band + 1) * height // bands):
        line[:] = 0
        t = 0
        while t < row_taps:
            a, weight = pixels + (rs[y] + t) * w * 3, rw[y * row_taps + t:(y + 1) * row_taps]
            if t + 4 <= row_taps:  # at once: the line is read and written less often
                s0, s1 = _bytes(a, w * 3), _bytes(a + w * 3, w * 3)
                s2, s3 = _bytes(a + w * 6, w * 3), _bytes(a + w * 9, w * 3)
                w0, w1, w2, w3 = weight[0], weight[1], weight[2], weight[3]
                for i in range(w * 3):
                    line[i] += ((w0 * np.float32(s0[i]) + w1 * np.float32(s1[i]))
                                + (w2 * np.float32(s2[i]) + w3 * np.float32(s3[i])))
                t += 4
            else:
                s0, w0 = _bytes(a, w * 3), weight[0]
                if w0 != 0:
                    for i in range(w * 3):
                        line[i] += w0 * np.float32(s0[i])
                t += 1
        to = ws + 4 * (p.out + y * p.row_stride)
        if p.integer:
            for i in range(w * 3):
                line[i] = np.float32(np.int32(line[i] / np.float32(256) + np.float32(.5)))
            sums = own + 4 * p.scratch
            _resize_pixels(line_at, image.col_start, image.col_weight, image.col_taps, p.width, p.affine,
                           sums)
            x, pixel = _floats(sums, p.width * 3), _shorts(to, p.width * 3)
            for i in range(p.width * 3):
                pixel[i] = np.int16(x[i] / np.float32(16384) + np.float32(.5)) - np.int16(510)
        else:
            _resize_pixels(line_at, image.col_start, image.col_weight, image.col_taps, p.width, p.affine, to)


_COPY, _POINTWISE, _STEM = 0, 1, 2  # where an inverted residual's expanded rows come from


@_kernel()
def _expand_row(source, x, y, w, c_in, c_mid, weight, bias, act, patches, out):
    """Row y of the expanded map, (w, c_mid) at address out; x is the input map's address."""
    if source == _POINTWISE:
        stride = (c_in + _LANES - 1) // _LANES * _LANES
        _matmul(x + 4 * y * w * stride, stride, w, c_in, weight, 0, c_mid, bias, 0, 0, 0, out, c_mid, act)
    elif source == _STEM:  # im2col: three runs of nine floats a pixel, then a product with K = 27
        line = (2 * w + 1) * 3
        to = _floats(patches, w * 27)
        for i in range(3):
            pixels = _floats(x + 4 * (2 * y + i) * line, line)
            for j in range(w):
                for k in range(9):
                    to[j * 27 + i * 9 + k] = pixels[j * 6 + k]
        _matmul(patches, 27, w, 27, weight, 0, c_mid, bias, 0, 0, 0, out, c_mid, act)
    else:
        a, b = _floats(x + 4 * y * w * c_mid, w * c_mid), _floats(out, w * c_mid)
        for i in range(w * c_mid):
            b[i] = a[i]


_MBCONV = _fields("operation source x h w c_in c_mid size stride act expand_w expand_b dw_w dw_b project_w "
                  "project_b c_out residual out sums scratch zeros chunk")


@_kernel(_MBCONV, part="floats")
def _mbconv(row, band, bands, ws, own, state, image, batch, state_stride):
    """Expand -> depthwise -> project, row by row; the expanded map is only ever k rows.

    With squeeze-excitation (sums >= 0) it stops after the depthwise part, and `_project` follows.
    """
    p = _row(row, _MBCONV)
    x, h, w, c_mid, size, stride, act = p.x, p.h, p.w, p.c_mid, p.size, p.stride, p.act
    c_out, out, sums, chunk = p.c_out, p.out, p.sums, p.chunk
    h_out, w_out = (h + stride - 1) // stride, (w + stride - 1) // stride
    top = max((h_out - 1) * stride + size - h, 0) // 2
    across = max((w_out - 1) * stride + size - w, 0)
    left = across // 2
    line = (w + across) * c_mid
    slots = (chunk - 1) * stride + size
    ring = own + 4 * p.scratch
    depth = ring + 4 * slots * line
    patches = depth + 4 * chunk * w_out * c_mid
    for i in range(slots):
        padded = _floats(ring + 4 * i * line, line)
        padded[:left * c_mid] = 0
        padded[(left + w) * c_mid:] = 0
    taps_at = patches + 4 * ((w * 27 + 1) // 2 * 2)
    lines = carray(_as_pointer(taps_at), size, np.int64)
    first, last = band * h_out // bands, (band + 1) * h_out // bands
    ready = max(first * stride - top, 0)
    y = first
    while y < last:
        count = min(chunk, last - y)
        bottom = min((y + count - 1) * stride - top + size, h)
        while ready < bottom:
            _expand_row(p.source, ws + 4 * x, ready, w, p.c_in, c_mid, p.expand_w, p.expand_b, act, patches,
                        ring + 4 * (ready % slots * line + left * c_mid))
            ready += 1
        target = ws + 4 * (out + y * w_out * c_mid) if sums >= 0 else depth
        for r in range(count):
            for i in range(size):
                above = (y + r) * stride - top + i
                lines[i] = ring + 4 * (above % slots) * line if 0 <= above < h else p.zeros
            to = target + 4 * r * w_out * c_mid
            total = ws + 4 * (sums + (y + r) * c_mid) if sums >= 0 else 0
            if size == 3 and stride == 1:
                _depthwise_31(taps_at, w_out, c_mid, p.dw_w, p.dw_b, to, c_mid, total, act)
            elif size == 3:
                _depthwise_32(taps_at, w_out, c_mid, p.dw_w, p.dw_b, to, c_mid, total, act)
            elif stride == 1:
                _depthwise_51(taps_at, w_out, c_mid, p.dw_w, p.dw_b, to, c_mid, total, act)
            else:
                _depthwise_52(taps_at, w_out, c_mid, p.dw_w, p.dw_b, to, c_mid, total, act)
        if sums < 0:
            skip = ws + 4 * (x + y * w_out * c_out) if p.residual else 0
            _matmul(depth, c_mid, count * w_out, c_mid, p.project_w, 0, c_out, p.project_b, 0, skip, c_out,
                    ws + 4 * (out + y * w_out * c_out), c_out, NONE)
        y += count


_PROJECT = _fields("operation x h w c_mid sums squeezed reduce_w reduce_b expand_w expand_b project_w "
                   "project_b c_out residual out scratch")


@_kernel(_PROJECT, part="floats")
def _project(row, band, bands, ws, own, state, image, batch, state_stride):
    """Squeeze-excitation folded into a scaled copy of the projection, then the product."""
    p = _row(row, _PROJECT)
    h, w, c_mid, squeezed, c_out = p.h, p.w, p.c_mid, p.squeezed, p.c_out
    work = own + 4 * p.scratch
    mean, gate = _floats(work, c_mid), _floats(work + 4 * c_mid, c_mid)
    hidden = _floats(work + 8 * c_mid + 4 * c_mid * c_out, squeezed)
    total = _floats(ws + 4 * p.sums, h * c_mid)
    mean[:] = 0
    for y in range(h):
        for c in range(c_mid):
            mean[c] += total[y * c_mid + c]
    weight, bias = _floats(p.reduce_w, c_mid * squeezed), _floats(p.reduce_b, squeezed)
    for s in range(squeezed):
        hidden[s] = bias[s]
    for c in range(c_mid):
        average = mean[c] / np.float32(h * w)
        for s in range(squeezed):
            hidden[s] += average * weight[c * squeezed + s]
    weight, bias = _floats(p.expand_w, c_mid * squeezed), _floats(p.expand_b, c_mid)
    for c in range(c_mid):
        gate[c] = bias[c]
    for s in range(squeezed):
        scaled = hidden[s] / (np.float32(1) + np.exp(-hidden[s]))
        for c in range(c_mid):
            gate[c] += scaled * weight[s * c_mid + c]
    weight, copy = _floats(p.project_w, c_mid * c_out), _floats(work + 8 * c_mid, c_mid * c_out)
    for c in range(c_mid):
        gate[c] = np.float32(1) / (np.float32(1) + np.exp(-gate[c]))
    j = 0
    while j < c_out:
        wide = _columns((c_out - j) // _LANES) * _LANES
        for c in range(c_mid):
            for i in range(wide):
                copy[j * c_mid + c * wide + i] = gate[c] * weight[j * c_mid + c * wide + i]
        j += wide
    first, last = band * h * w // bands, (band + 1) * h * w // bands
    skip = ws + 4 * (p.residual + first * c_out) if p.residual >= 0 else 0
    _matmul(ws + 4 * (p.x + first * c_mid), c_mid, last - first, c_mid, work + 8 * c_mid, 0, c_out,
            p.project_b, 0, skip, c_out, ws + 4 * (p.out + first * c_out), c_out, NONE)


_POOL = _fields("operation x cell stride channels down across out columns")


@_kernel(_POOL, part="floats")
def _pool(row, band, bands, ws, own, state, image, batch, state_stride):
    """Mean over the cells of a stage's map into its slice of the token matrix."""
    p = _row(row, _POOL)
    cell, stride, channels, across = p.cell, p.stride, p.channels, p.across
    share = np.float32(1) / np.float32(cell * cell)
    for gy in range(band * p.down // bands, (band + 1) * p.down // bands):
        for gx in range(across):
            to = _floats(state + 4 * (p.out + (gy * across + gx) * p.columns), channels)
            to[:] = 0
            for y in range(gy * cell, (gy + 1) * cell):
                for column in range(gx * cell, (gx + 1) * cell):
                    pixel = _floats(ws + 4 * (p.x + (y * across * cell + column) * stride), channels)
                    for c in range(channels):
                        to[c] += pixel[c]
            for c in range(channels):
                to[c] *= share


# Integers. Maps in the workspace are int16 (h, w, c); `_mbconv_integer` packs values in words: two rows of
# the expanded map, so that the depthwise part reads two taps at once; for projections, `_GROUP` channels.

@_kernel(exact=True)
def _product_pairs(a, a_hi, lda, m, k, w, bias, multiplier, out, block, n, in_bytes):
    """Two rows of m pixels -> words (n / _LANES, m, _LANES), the second row in the upper halves.

    A word of a holds two i16 or, in_bytes, the `_GROUP` values of 8 bits that `dot` takes.
    """
    j, last = 0, m - 1
    while j < n:
        wide = min((n - j) // _LANES, _WIDE)
        to, panel = out + j // _LANES * block, w + 4 * j * k
        at_bias, at_scale = bias + 4 * j, multiplier + 4 * j
        i = 0
        while i < m:
            i = max(min(i, m - _TILE // 2), 0)
            x, x_hi, y = a + i * lda, a_hi + i * lda, to + 4 * _LANES * i
            if in_bytes and wide == 1:
                _words_1(x, x_hi, lda, last, k, panel, at_bias, at_scale, 0, y, block)
            elif in_bytes and wide == 2:
                _words_2(x, x_hi, lda, last, k, panel, at_bias, at_scale, 0, y, block)
            elif in_bytes:
                _words_3(x, x_hi, lda, last, k, panel, at_bias, at_scale, 0, y, block)
            elif wide == 1:
                _pairs_1(x, x_hi, lda, last, k, panel, at_bias, at_scale, 0, y, block)
            elif wide == 2:
                _pairs_2(x, x_hi, lda, last, k, panel, at_bias, at_scale, 0, y, block)
            elif _WIDE == 3:
                _pairs_3(x, x_hi, lda, last, k, panel, at_bias, at_scale, 0, y, block)
            i += _TILE // 2
        j += wide * _LANES


@_kernel(exact=True)
def _product_sums(a, lda, m, k, w, bias, multiplier, res, out, n):
    """m pixels of k words -> int16 (m, n), plus those at res (0: none), which may not be where out is."""
    j, last = 0, m - 1
    while j < n:
        wide = min((n - j) // _LANES, _WIDE)
        to, panel, at_bias, at_scale = out + 2 * j, w + 4 * j * k, bias + 4 * j, multiplier + 4 * j
        i = 0
        while i < m:
            i = max(min(i, m - _TILE), 0)
            x, y = a + i * lda, to + 2 * i * n
            r = res + 2 * (i * n + j) if res != 0 else 0
            if wide == 1:
                _sums_1(x, 0, lda, last, k, panel, at_bias, at_scale, r, y, 2 * n)
            elif wide == 2:
                _sums_2(x, 0, lda, last, k, panel, at_bias, at_scale, r, y, 2 * n)
            elif _WIDE == 3:
                _sums_3(x, 0, lda, last, k, panel, at_bias, at_scale, r, y, 2 * n)
            i += _TILE
        j += wide * _LANES


_PATCH_WORDS = 15  # of the stem: three rows of nine values, each filled to five words of two


@_kernel(exact=True)
def _patches(image, row_words, w, out):
    """What the stem sees at two rows of w outputs: words (2, w, _PATCH_WORDS)."""
    for y in range(2):
        for i in range(3):
            line = image + 4 * (2 * y + i) * row_words
            for j in range(w):
                a, to = _ints(line + 12 * j, 5), _ints(out + 4 * ((y * w + j) * _PATCH_WORDS + 5 * i), 5)
                a0, a1, a2, a3, a4 = a[0], a[1], a[2], a[3], a[4]  # before any is written: then at once
                to[0], to[1], to[2], to[3], to[4] = a0, a1, a2, a3, a4


_MBCONV_INTEGER = _fields("operation x row_words expand_k in_bytes h w c_in c_mid size stride input_m "
                          "expand_w expand_b expand_m dw_w dw_b dw_m project_w project_b project_m c_out "
                          "residual out scratch zeros chunk")


@_kernel(_MBCONV_INTEGER, exact=True, part="integers")
def _mbconv_integer(row, band, bands, ws, own, state, image, batch, state_stride):
    """`_mbconv` in integers, two rows of the expanded map at once. With row_words > 0, x is the image."""
    p = _row(row, _MBCONV_INTEGER)
    x, h, w, c_mid, size, stride = ws + 4 * p.x, p.h, p.w, p.c_mid, p.size, p.stride
    c_out, out, chunk, value = p.c_out, ws + 4 * p.out, p.chunk, 4 // _GROUP
    h_out, w_out = (h + stride - 1) // stride, (w + stride - 1) // stride
    top = max((h_out - 1) * stride + size - h, 0) // 2
    across = max((w_out - 1) * stride + size - w, 0)
    left = across // 2
    stem, c_in = p.row_words > 0, (p.c_in + _LANES - 1) // _LANES * _LANES
    in_bytes = _GROUP == 4 and p.in_bytes > 0
    stride_in = 4 * _PATCH_WORDS if stem else c_in if in_bytes else 2 * c_in
    block = 4 * _LANES * (w + across)  # bytes
    line = block * (c_mid // _LANES)
    slots, pairs = ((chunk - 1) * stride + size - 1) // 2 + 2, size // 2 + 1
    ring = own + 4 * p.scratch
    depth = ring + slots * line
    narrowed = depth + value * chunk * w_out * c_mid
    lines_at = narrowed + (2 * w * stride_in + 7) // 8 * 8
    lines = _longs(lines_at, pairs)
    for i in range(slots):
        for j in range(c_mid // _LANES):
            padded = _ints(ring + i * line + j * block, block // 4)
            padded[:left * _LANES] = 0
            padded[(left + w) * _LANES:] = 0
    first, last = band * h_out // bands, (band + 1) * h_out // bands
    ready = max((first * stride - top) >> 1, 0)
    y = first
    while y < last:
        count = min(chunk, last - y)
        bottom = min((y + count - 1) * stride - top + size + 1, h + 1) >> 1
        while ready < bottom:
            to, whole = ring + ready % slots * line + 4 * left * _LANES, 2 * ready + 1 < h
            if stem:
                _patches(x + 16 * ready * p.row_words, p.row_words, w, narrowed)
            elif in_bytes:
                _narrow_bytes(x + 4 * ready * w * c_in, (2 if whole else 1) * w * c_in, p.input_m, narrowed)
            else:
                _narrow(x + 4 * ready * w * c_in, (2 if whole else 1) * w * c_in, p.input_m, narrowed)
            _product_pairs(narrowed, narrowed + w * stride_in if whole else narrowed, stride_in, w,
                           p.expand_k, p.expand_w, p.expand_b, p.expand_m, to, block, c_mid, in_bytes)
            if not whole:
                for j in range(c_mid // _LANES):
                    words = _ints(to + j * block, w * _LANES)
                    for i in range(w * _LANES):
                        words[i] &= np.int32(65535)
            ready += 1
        for r in range(count):
            above = (y + r) * stride - top
            for i in range(pairs):
                pair = (above >> 1) + i
                lines[i] = ring + pair % slots * line if 0 <= pair < (h + 1) // 2 else p.zeros
            to, taps = depth + value * r * w_out * c_mid, p.dw_w + 4 * (above & 1) * pairs * size * c_mid
            if size == 3 and stride == 1:
                _depthwise_pairs_31(lines_at, block, w_out, c_mid, taps, p.dw_b, p.dw_m, to)
            elif size == 3:
                _depthwise_pairs_32(lines_at, block, w_out, c_mid, taps, p.dw_b, p.dw_m, to)
            elif stride == 1:
                _depthwise_pairs_51(lines_at, block, w_out, c_mid, taps, p.dw_b, p.dw_m, to)
            else:
                _depthwise_pairs_52(lines_at, block, w_out, c_mid, taps, p.dw_b, p.dw_m, to)
        skip = x + 2 * y * w_out * c_out if p.residual else 0
        _product_sums(depth, value * c_mid, count * w_out, c_mid // _GROUP, p.project_w, p.project_b,
                      p.project_m, skip, out + 2 * y * w_out * c_out, c_out)
        y += count


_POOL_INTEGER = _fields("operation x cell stride channels down across out columns scale scratch")


@_kernel(_POOL_INTEGER, exact=True, part="integers")
def _pool_integer(row, band, bands, ws, own, state, image, batch, state_stride):
    """Sums over the cells of a stage's int16 map, times one factor, into its slice of the token matrix."""
    p = _row(row, _POOL_INTEGER)
    cell, stride, channels, across, scale = p.cell, p.stride, p.channels, p.across, _floats(p.scale, 1)[0]
    width = across * cell * stride
    columns, total = _ints(own + 4 * p.scratch, width), _doubles(own + 4 * (p.scratch + width), channels)
    for gy in range(band * p.down // bands, (band + 1) * p.down // bands):
        columns[:] = 0
        for y in range(gy * cell, (gy + 1) * cell):
            line = _shorts(ws + 4 * p.x + 2 * y * width, width)
            for i in range(width):
                columns[i] += np.int32(line[i])
        for gx in range(across):
            to = _floats(state + 4 * (p.out + (gy * across + gx) * p.columns), channels)
            total[:] = 0
            for i in range(gx * cell, (gx + 1) * cell):
                column = _ints(own + 4 * (p.scratch + i * stride), channels)
                for c in range(channels):
                    total[c] += np.float64(column[c])  # exact, and converts at once
            for c in range(channels):
                to[c] = np.float32(total[c]) * scale


@_kernel()
def _add_qtile(a, w, c, batch, state_stride):
    """c += a @ QTILE for all images, a and c (32,); the same bits whatever the batch."""
    b, tall = 0, _TILE // 2
    while b < batch:
        u, y = a + 4 * b * state_stride, c + 4 * b * state_stride
        if batch - b >= tall:
            _qtile_rows(u, w, y, state_stride)
            b += tall
        else:
            _qtile_row(u, w, y, state_stride)
            b += 1


_COARSEN = _fields("operation f out n c cells")


@_kernel(_COARSEN)
def _coarsen(row, band, bands, ws, own, state, image, batch, state_stride):
    """Mean of four places each, a band of coarse ones."""
    p = _row(row, _COARSEN)
    n, c, quarter = p.n, p.c, np.float32(.25)
    cells = carray(_as_pointer(p.cells), 4 * n, np.int64)
    for i in range(band * n // bands, (band + 1) * n // bands):
        x0, x1 = (_floats(state + 4 * (p.f + cells[4 * i] * c), c),
                  _floats(state + 4 * (p.f + cells[4 * i + 1] * c), c))
        x2, x3 = (_floats(state + 4 * (p.f + cells[4 * i + 2] * c), c),
                  _floats(state + 4 * (p.f + cells[4 * i + 3] * c), c))
        to = _floats(state + 4 * (p.out + i * c), c)
        for j in range(c):
            to[j] = ((x0[j] + x1[j]) + (x2[j] + x3[j])) * quarter


_WHITEN = _fields("operation f x n c mean w diagonal")


@_kernel(_WHITEN)
def _whiten(row, band, bands, ws, own, state, image, batch, state_stride):
    """x0 = W (f - mean) for a band of positions and all images, W read once; f is left centred."""
    p = _row(row, _WHITEN)
    f, x, n, c, w = p.f, p.x, p.n, p.c, p.w
    panels = c // PANEL
    for i in range(band * n // bands, (band + 1) * n // bands):
        centre = _floats(p.mean + 4 * i * c, c)
        for b in range(batch):
            features = _floats(state + 4 * (b * state_stride + f + i * c), c)
            for j in range(c):
                features[j] -= centre[j]
        first_f, first_x = state + 4 * (f + i * c), state + 4 * (x + i * c)
        if p.diagonal:
            scale = _floats(w + 4 * i * c, c)
            for b in range(batch):
                features = _floats(first_f + 4 * b * state_stride, c)
                to = _floats(first_x + 4 * b * state_stride, c)
                for j in range(c):
                    to[j] = scale[j] * features[j]
            continue
        for b in range(batch):
            to = _floats(first_x + 4 * b * state_stride, c)
            to[:] = 0
        qtile = w + _QTILE_BYTES * i * (panels * (panels + 1) // 2)
        for q in range(panels):
            for k in range(q + 1):
                _add_qtile(first_f + 4 * k * PANEL, qtile, first_x + 4 * q * PANEL, batch, state_stride)
                qtile += _QTILE_BYTES


_PARTS = 16  # of the sum over places: as many whatever the threads, so that its order is always the same
_PROJECT_FACTORS = _fields("operation x size v k sums parts")


@_kernel(_PROJECT_FACTORS)
def _project_factors(row, band, bands, ws, own, state, image, batch, state_stride):
    """V x of all images, in parts of the sum; V read once."""
    p = _row(row, _PROJECT_FACTORS)
    x, v, k, sums = p.x, p.v, p.k, p.sums
    panels, groups = p.size // PANEL, k // PANEL
    for part in range(band * _PARTS // bands, (band + 1) * _PARTS // bands):
        for b in range(batch):
            lanes = _floats(state + 4 * (b * state_stride + sums + part * k * _LANES), k * _LANES)
            lanes[:] = 0
        for q in range(part * panels // _PARTS, (part + 1) * panels // _PARTS):
            for b in range(batch):
                its = state + 4 * b * state_stride
                for g in range(groups):
                    _dots(its + 4 * (x + q * PANEL), v + _QTILE_BYTES * (q * groups + g),
                          its + 4 * (sums + (part * k + g * PANEL) * _LANES))
        for b in range(batch):
            its = state + 4 * b * state_stride
            lanes = _floats(its + 4 * (sums + part * k * _LANES), k * _LANES)
            to = _floats(its + 4 * (p.parts + part * k), k)
            for j in range(k):
                total = np.float32(0)
                for i in range(_LANES):
                    total += lanes[j * _LANES + i]
                to[j] = total


_REMOVE_FACTORS = _fields("operation x size v k parts projected")


@_kernel(_REMOVE_FACTORS)
def _remove_factors(row, band, bands, ws, own, state, image, batch, state_stride):
    """x -= V^T (V x) of all images, a band of places, V read once."""
    p = _row(row, _REMOVE_FACTORS)
    x, v, k, projected = p.x, p.v, p.k, p.projected + band * p.k
    panels, groups = p.size // PANEL, k // PANEL
    for b in range(batch):
        its = state + 4 * b * state_stride
        part, total = _floats(its + 4 * p.parts, _PARTS * k), _floats(its + 4 * projected, k)
        total[:] = 0
        for i in range(_PARTS):
            for j in range(k):
                total[j] -= part[i * k + j]
    for q in range(band * panels // bands, (band + 1) * panels // bands):
        for g in range(groups):
            _add_qtile(state + 4 * (projected + g * PANEL), v + _QTILE_BYTES * (q * groups + g),
                       state + 4 * (x + q * PANEL), batch, state_stride)


_LAYER_NORM = _fields("operation x n d gain bias out")


@_kernel(_LAYER_NORM)
def _layer_norm(row, band, bands, ws, own, state, image, batch, state_stride):
    """Over rows of d."""
    p = _row(row, _LAYER_NORM)
    n, d = p.n, p.d
    g, b = _floats(p.gain, d), _floats(p.bias, d)
    for i in range(band * n // bands, (band + 1) * n // bands):
        x, to = _floats(ws + 4 * (p.x + i * d), d), _floats(ws + 4 * (p.out + i * d), d)
        mean = np.float32(0)
        for j in range(d):
            mean += x[j]
        mean /= np.float32(d)
        square = np.float32(0)
        for j in range(d):
            square += (x[j] - mean) * (x[j] - mean)
        scale = np.float32(1) / np.sqrt(square / np.float32(d) + np.float32(1e-5))
        for j in range(d):
            to[j] = (x[j] - mean) * scale * g[j] + b[j]


_ROTATE = _fields("operation h d w bias x n c coef out z gain offset scratch")


@_kernel(_ROTATE)
def _rotate(row, band, bands, ws, own, state, image, batch, state_stride):
    """`rotate_density`: the denoiser's last product, DDIM rotation and log-density; F never leaves the cache.

    out < 0: the last step, only z = gain |x'|^2 / 2 + offset leaves.
    """
    p = _row(row, _ROTATE)
    d, n, c, out = p.d, p.n, p.c, p.out
    work = own + 4 * p.scratch
    ab = _floats(p.coef, 2)
    a, b = ab[0], ab[1]
    gain, offset, z = _floats(p.gain, n), _floats(p.offset, n), _floats(state + 4 * p.z, n)
    i, last = band * n // bands, (band + 1) * n // bands
    while i < last:
        count = min(_TILE, last - i)
        _matmul(ws + 4 * (p.h + i * d), d, count, d, p.w, 0, c, p.bias, 0, 0, 0, work, c, NONE)
        for r in range(count):
            f, x = _floats(work + 4 * r * c, c), _floats(state + 4 * (p.x + (i + r) * c), c)
            if out >= 0:
                to = _floats(state + 4 * (out + (i + r) * c), c)
                for j in range(c):
                    to[j] = a * x[j] + b * f[j]
            else:
                square = np.float32(0)
                for j in range(c):
                    y = a * x[j] + b * f[j]
                    square += y * y
                z[i + r] = np.float32(.5) * square * gain[i + r] + offset[i + r]
        i += count


_FINE_DENSITY = _fields("operation x n c mean w m f scratch")


@_kernel(_FINE_DENSITY)
def _fine_density(row, band, bands, ws, own, state, image, batch, state_stride):
    """|w (x - mean)|^2 / 2 of a band of fine places, a tile of rows at once."""
    p = _row(row, _FINE_DENSITY)
    if _row(image, _IMAGE).map == 0:
        return
    n, c, m = p.n, p.c, p.m
    work = own + 4 * p.scratch
    product = work + 4 * _TILE * c
    f = _floats(state + 4 * p.f, n)
    i, last = band * n // bands, (band + 1) * n // bands
    while i < last:
        count = min(_TILE, last - i)
        x, mean = _floats(state + 4 * (p.x + i * c), count * c), _floats(p.mean + 4 * i * c, count * c)
        d = _floats(work, count * c)
        for j in range(count * c):
            d[j] = x[j] - mean[j]
        _matmul(work, c, count, c, p.w, 0, m, 0, 0, 0, 0, product, m, NONE)
        for r in range(count):
            y = _floats(product + 4 * r * m, m)
            square = np.float32(0)
            for j in range(m):
                square += y[j] * y[j]
            f[i + r] = np.float32(.5) * square
        i += count


@_kernel()
def _larger(a, b):
    """The larger of two; NaN if one is."""
    return a if a > b or a != a else b


_SHARPEN = _fields("operation z rows columns weight offset f height width down across out scratch")


@_kernel(_SHARPEN)
def _sharpen(row, band, bands, ws, own, state, image, batch, state_stride):
    """`sharpen` of the cells weight * z + offset, a band of fine rows; down is (rows, height)."""
    p = _row(row, _SHARPEN)
    if _row(image, _IMAGE).map == 0:
        return
    rows, columns, height, width = p.rows, p.columns, p.height, p.width
    places, work = rows * columns, own + 4 * p.scratch
    cells, mixed = _floats(work, places), _floats(work + 4 * places, columns)
    most = _floats(work + 4 * (places + columns), width + 4)  # of five rows; two more at either end
    down, across = _floats(p.down, rows * height), _floats(p.across, columns * width)
    z = _floats(state + 4 * p.z, places)
    weight, offset = _floats(p.weight, places), _floats(p.offset, places)
    for i in range(places):
        cells[i] = weight[i] * z[i] + offset[i]
    for y in range(band * height // bands, (band + 1) * height // bands):
        to, f = _floats(state + 4 * (p.out + y * width), width), _floats(state + 4 * (p.f + y * width), width)
        mixed[:] = 0
        for i in range(rows):
            for j in range(columns):
                mixed[j] += down[i * height + y] * cells[i * columns + j]
        to[:] = 0
        for i in range(columns):
            for x in range(width):
                to[x] += mixed[i] * across[i * width + x]
        for x in range(width):
            most[x + 2] = f[x]
        for other in range(max(y - 2, 0), min(y + 3, height)):
            beside = _floats(state + 4 * (p.f + other * width), width)
            for x in range(width):
                most[x + 2] = _larger(most[x + 2], beside[x])
        most[0] = most[1] = most[2]
        most[width + 2] = most[width + 3] = most[width + 1]
        for x in range(width):
            a, b = _larger(most[x], most[x + 1]), _larger(most[x + 3], most[x + 4])
            largest = _larger(_larger(a, b), _larger(most[x + 2], np.float32(_TINY)))
            to[x] = to[x] * np.sqrt(f[x] / largest)


_MAP = _fields("operation m columns")


@_kernel(_MAP)
def _map(row, band, bands, ws, own, state, image, batch, state_stride):
    """Enlarge to the image's own size: its rows lie between two of the fine map, enlarged to its width."""
    p, image = _row(row, _MAP), _row(image, _IMAGE)
    columns, target, h, w = p.columns, image.map, image.height, image.width
    if target == 0:
        return
    row_at, row_share = carray(_as_pointer(image.map_row), h, np.int64), _floats(image.map_row_share, h)
    col_at, col_share = carray(_as_pointer(image.map_col), w, np.int64), _floats(image.map_col_share, w)
    lines, held = own - 4 * image.line, -1  # row i of the fine map, i % 2 of the two lines
    for y in range(band * h // bands, (band + 1) * h // bands):
        first = row_at[y]
        for i in range(max(first, held + 1), first + 2):
            source = _floats(state + 4 * (p.m + i * columns), columns)
            line = _floats(lines + 4 * (i % 2) * w, w)
            for x in range(w):
                share, at = col_share[x], col_at[x]
                line[x] = (np.float32(1) - share) * source[at] + share * source[at + 1]
        held = first + 1
        above, below = _floats(lines + 4 * (first % 2) * w, w), _floats(lines + 4 * (held % 2) * w, w)
        to, share = _floats(target + 4 * y * w, w), row_share[y]
        rest = np.float32(1) - share
        for x in range(w):
            to[x] = rest * above[x] + share * below[x]


_LINEAR = _fields("operation x n k w m bias ldbias residual out act lda from_state")


@_kernel(_LINEAR)
def _linear(row, band, bands, ws, own, state, image, batch, state_stride):
    """act(x @ w + bias) + residual, a band of rows; bias is one row, or one a position."""
    p = _row(row, _LINEAR)
    n, m = p.n, p.m
    first, last = band * n // bands, (band + 1) * n // bands
    a = (state if p.from_state else ws) + 4 * (p.x + first * p.lda)
    skip = ws + 4 * (p.residual + first * m) if p.residual >= 0 else 0
    _matmul(a, p.lda, last - first, p.k, p.w, 0, m, p.bias + 4 * first * p.ldbias, p.ldbias, skip, m,
            ws + 4 * (p.out + first * m), m, p.act)


_MIX = _fields("operation w n_out n x d residual out act")


@_kernel(_MIX)
def _mix(row, band, bands, ws, own, state, image, batch, state_stride):
    """act(w @ x) + residual, a band of output positions."""
    p = _row(row, _MIX)
    n, d = p.n, p.d
    first, last = band * p.n_out // bands, (band + 1) * p.n_out // bands
    skip = ws + 4 * (p.residual + first * d) if p.residual >= 0 else 0
    _matmul(p.w + 4 * first * n, n, last - first, n, ws + 4 * p.x, d, d, 0, 0, skip, d,
            ws + 4 * (p.out + first * d), d, p.act)


# A frame's work is a row of claims: every operation once for each band, operation after operation. A thread
# that finds none left goes to sleep; one that lost its core holds up only the band that it had claimed.
# `left` (claims) and `done` lie on cache lines of their own; the job is written when no claim is open.
_JOB = _fields("rows length whole_first whole_last workspace stride states table batch state_stride bands "
               "total left done taken quit give_way post wait")
_ANY = _fields("operation")  # every row begins with it
_ROW_BYTES = 8 * 32  # from one row of a program or of the image table to the next
_SPINS = 4000  # pauses before a thread that waits gives its core away or sleeps, some 100 us


@_kernel()
def _work(job, thread):
    """Claim and compute until nothing is left to claim."""
    p = _row(job, _JOB)
    left, done = p.left, p.done
    while True:
        claims = _claim(left)
        if claims == 0:
            return
        rows, batch, bands, stride = p.rows, p.batch, p.bands, p.stride
        own = p.workspace + 4 * thread * stride
        index = p.total - claims
        # the operations up to `whole_first`, those up to `whole_last` (of all images at once), and the
        # rest: of few images each operation is cut into bands; of many, an image is one claim
        first = steps = 0
        for part in range(3):
            start = 0 if part == 0 else p.whole_first if part == 1 else p.whole_last
            stop = p.whole_first if part == 0 else p.whole_last if part == 1 else p.length
            by_image = part != 1 and batch >= bands
            each = 1 if part == 1 else batch
            claimed = (batch if stop > start else 0) if by_image else each * (stop - start) * bands
            if index < first + claimed:
                break
            first += claimed
            steps += each * (stop - start)
        polls = 0
        before = first if by_image else index - (index - first) % bands
        while _load(done) < before:
            polls += 1
            if polls < _SPINS:
                _pause()
            else:
                _call3(p.give_way, 0, 0, 0)
        if by_image:
            b = index - first
            for k in range(start, stop):
                row = rows + _ROW_BYTES * k
                _call(_row(row, _ANY).operation, row, 0, 1, own, own, p.states + 4 * b * p.state_stride,
                      p.table + _ROW_BYTES * b, 1, p.state_stride)
        else:
            step, band = (index - first) // bands, thread
            while _take(p.taken + 8 * (steps + step), band) == 0:  # rows it knows, or what a late one left
                band = (band + 1) % bands
            b, k = step // (stop - start), step % (stop - start)
            row = rows + _ROW_BYTES * (start + k)
            _call(_row(row, _ANY).operation, row, band, bands, p.workspace, own,
                  p.states + 4 * b * p.state_stride, p.table + _ROW_BYTES * b, batch if part == 1 else 1,
                  p.state_stride)
        _add(done, 1)


@_kernel(_JOB)
def _frame(job, sleepers, helpers):
    """A whole frame for its caller: offer the claims, wake the helpers, work, wait for the last claim."""
    p = _row(job, _JOB)
    _store(p.done, 0)
    _store(p.left, p.total)
    for i in range(helpers):
        _call3(p.post, _load(sleepers + 8 * i), 1, 0)
    _work(job, 0)
    polls = 0
    while _load(p.done) < p.total:
        polls += 1
        if polls < _SPINS:
            _pause()
        else:
            _call3(p.give_way, 0, 0, 0)


@_kernel(_JOB)
def _help(job, sleeper, thread):
    """Life of a helper: work, look out for more a short while, sleep. Never takes the interpreter's lock."""
    p = _row(job, _JOB)
    while _load(p.quit) == 0:
        _work(job, thread)
        polls = 0
        while _load(p.left) == 0 and polls < _SPINS:
            _pause()
            polls += 1
        if _load(p.left) == 0:
            _call3(p.wait, sleeper, -1, 0)


# ------------------------------------------------------------------------------------------------
# The engine
# ------------------------------------------------------------------------------------------------

def _aligned(shape, dtype=np.float32) -> np.ndarray:
    """Zeros that start on a cache line."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size].view(dtype).reshape(shape)


class _Team:
    """The helpers of an engine in this process, asleep between frames; they end with the team."""

    def __init__(self, threads: int):
        self.process, system = os.getpid(), _system()
        self.job, self.counters = np.zeros(1, _JOB), _aligned(24, np.int64)
        left, done = self.counters.ctypes.data, self.counters[8:].ctypes.data
        semaphores = _aligned(8 * max(threads - 1, 1), np.int64)
        self.sleepers = np.array([system.make(semaphores[8 * i:].ctypes.data) for i in range(threads - 1)],
                                 np.int64)
        self.job["left"], self.job["done"], self.job["quit"] = left, done, self.counters[16:].ctypes.data
        self.job["give_way"], self.job["post"], self.job["wait"] = system[:3]
        memory = self.job, self.counters, semaphores  # a helper may still look at them when the team is gone
        self.helpers = [threading.Thread(target=self._live, args=(memory, sleeper, i + 1), name="fastprior",
                                         daemon=True) for i, sleeper in enumerate(self.sleepers.tolist())]
        for helper in self.helpers:
            helper.start()
        self.core, self.find_core = -1, system.core
        post = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 3)(system.post)
        weakref.finalize(self, self._end, memory, self.sleepers, post, self.process)

    def make_room(self) -> None:
        """Keep the helpers off the core that the caller is on.

        Linux wakes a helper there, though another core idles, and the frame takes as long as with one thread:
        half of those that came every 20 ms did.
        """
        core = self.find_core() if self.find_core and self.helpers else self.core
        if core == self.core:
            return
        try:
            others = os.sched_getaffinity(0) - {core}
            for helper in self.helpers if others else ():
                os.sched_setaffinity(helper.native_id, others)
            self.core = core
        except OSError:  # forbidden here
            self.find_core = None

    @staticmethod
    def _live(memory: tuple, sleeper: int, number: int) -> None:
        _entry(_help)(memory[0].ctypes.data, sleeper, number)

    @staticmethod
    def _end(memory: tuple, sleepers: np.ndarray, post: Callable, process: int) -> None:
        memory[1][16] = 1
        if os.getpid() == process:
            for sleeper in sleepers.tolist():
                post(sleeper, 1, 0)


def _entry(function: Callable, held: bool = False) -> Callable:
    """A compiled function, called from Python; the interpreter's lock is free meanwhile, or held."""
    kind = ctypes.PYFUNCTYPE if held else ctypes.CFUNCTYPE
    return kind(None, *[ctypes.c_int64] * function.__code__.co_argcount)(function.address)


def _words(values: np.ndarray, group: int) -> np.ndarray:
    """Integers (..., group, M) -> int32 (..., M), the first in the lowest bits."""
    bits = 32 // group
    values = np.asarray(values, np.int64)
    words = sum((values[..., i, :] & ((1 << bits) - 1)) << bits * i for i in range(group))
    return words.astype(np.uint32).view(np.int32)


class Frames(NamedTuple):
    """What `run` made of a batch. Everything is on the host already."""
    scores: np.ndarray | None  # (B,)
    maps: list  # float32 (H, W) or None
    outputs: list  # what was kept, float32 (B, ...)

    def to_host(self, array):
        return array


class Engine:
    """The program of one model, its packed weights and its memory. See `fastprior.Engine` for the interface.

    Safe to call from several threads, one at a time; two engines run side by side.
    """

    device = "cpu"
    _TOGETHER = _whiten, _project_factors, _remove_factors  # take all images of a batch; emitted in a row

    def __init__(self, threads: int | None = None):
        load_kernels()
        self.threads = usual_threads(threads)
        self._frame, self._held, self._team = _entry(_frame), _entry(_frame, True), None
        self._all_cores = self.threads >= available_threads()
        self._usual, self._quickest = (), math.inf  # size of the last image alone; seconds it took at best
        self._programs: dict[tuple, tuple[np.ndarray, int, int]] = {}  # by stages
        self._rows: list[tuple[str, Callable, dict[str, int]]] = []  # stage, operation, fields
        self._stage = "resize"
        self._constants: list[np.ndarray] = []  # whatever the program points to
        self._workspace_floats = self._state_floats = self._scratch_floats = self._zero_floats = 0
        self._tables: dict[tuple, tuple] = {}  # taps of a size of image
        self._line = 0  # floats of an image's row between the passes of the resize
        self._memory = self._states = None
        self._score = self._taps = self._map_taps = None
        self._given: list[tuple[int, int, int, int]] = []
        self._kept: list[tuple[int, tuple[int, ...], int]] = []
        self._shape = 0, 0
        self._lock = threading.Lock()
        _ENGINES.add(self)

    # -- building blocks ---------------------------------------------------------------------------

    def constant(self, array, dtype=np.float32) -> int:
        """Address of an aligned copy."""
        copy = _aligned(np.shape(array), dtype)
        copy[...] = array
        self._constants.append(copy)
        return copy.ctypes.data

    def workspace(self, *shape: int) -> int:
        """Offset of so many floats, that live for a frame."""
        offset = self._workspace_floats
        self._workspace_floats += round_up(int(np.prod(shape)), 16)
        return offset

    def state(self, *shape: int) -> int:
        """Offset of so many floats of an image, that outlive its operations."""
        offset = self._state_floats
        self._state_floats += round_up(int(np.prod(shape)), 16)
        return offset

    def emit(self, operation: Callable, scratch: int = 0, zeros: int = 0, **fields: int) -> None:
        """Append an operation. `scratch`: floats that each thread needs for itself while it runs; `zeros`:
        floats that it reads as zeros and never writes. Where they are, `finish` knows."""
        if scratch:
            self._scratch_floats = max(self._scratch_floats, round_up(scratch, 16))
            fields["scratch"] = 0
        if zeros:
            self._zero_floats = max(self._zero_floats, zeros)
            fields["zeros"] = 0
        wanted = set(operation.fields.names) - {"operation"}
        if set(fields) != wanted:
            raise TypeError(f"{operation.__name__}: missing or unknown fields {sorted(set(fields) ^ wanted)}")
        fields = {name: operator.index(value) for name, value in fields.items()}
        self._rows.append((self._stage, operation, fields))

    def packed(self, w: np.ndarray) -> tuple[int, int]:
        """(K, M) as panels of up to three vectors, M padded to whole vectors -> address, padded M."""
        k, m = w.shape
        padded = round_up(m, _LANES)
        full = padded_to(w, k, padded)
        panels, j = [], 0
        while j < padded:
            wide = _columns((padded - j) // _LANES) * _LANES
            panels.append(full[:, j:j + wide].ravel())
            j += wide
        return self.constant(np.concatenate(panels)), padded

    def padded(self, b: np.ndarray, m: int) -> int:
        """Address of a copy whose last axis is filled with zeros up to m."""
        return self.constant(padded_to(b, *b.shape[:-1], m))

    # -- operations: the interface -----------------------------------------------------------------

    def features(self, backbone, shape: tuple[int, int], views: Sequence,
                 taps: Callable) -> list[tuple[int, int]]:
        integer, (h, w) = backbone.integer, (n // 2 for n in shape)
        load_kernels("integers" if integer else "floats")
        x = self.resize(shape, backbone.mean, backbone.std, taps, integer)
        self._stage = "features"
        tokens, filled = [], [0] * len(views)
        for grid, blocks in views:
            columns = round_up(sum(backbone.blocks[i].channels[2] for i in blocks), PANEL)
            tokens.append((self.state(*grid, columns), columns))
        for i, block in enumerate(backbone.blocks):
            weights = (backbone.stem_w, backbone.stem_b) if i == 0 else (None, None)
            if integer:
                x, h, w = self.mbconv_integer(x, h, w, block, *weights, backbone.stem_m)
            else:
                x, h, w = self.mbconv(x, h, w, block, *weights)
            channels = block.channels[2]
            for k, (((down, across), blocks), (out, columns)) in enumerate(zip(views, tokens)):
                if i in blocks:
                    fields = dict(x=x, cell=h // down, stride=round_up(channels, _LANES), channels=channels,
                                  down=down, across=across, out=out + filled[k], columns=columns)
                    if integer:
                        scale = np.float32(backbone.scales[i]) / np.float32((h // down) ** 2)
                        self.emit(_pool_integer, **fields, scale=self.constant([scale]),
                                  scratch=w * fields["stride"] + 2 * channels)
                    else:
                        self.emit(_pool, **fields)
                    filled[k] += channels
        return tokens

    def given(self, n: int, c: int) -> tuple[int, int]:
        columns = round_up(c, PANEL)
        self._given.append((self.state(n, columns), n, c, columns))
        return self._given[-1][0], columns

    def fine_density(self, x: int, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> int:
        self._stage, f = "map", self.state(n)
        address, m = self.packed(padded_to(w.T, c, len(w)))
        self.emit(_fine_density, x=x, n=n, c=c, mean=self.padded(mean, c), w=address, m=m, f=f,
                  scratch=_TILE * (c + m))
        return f

    def coarsen(self, f: int, n: int, c: int, cells: np.ndarray) -> int:
        self._stage, out = "whitening", self.state(len(cells), c)
        self.emit(_coarsen, f=f, out=out, n=len(cells), c=c, cells=self.constant(cells, np.int64))
        return out

    def whiten(self, f: int, n: int, c: int, mean: np.ndarray, w: np.ndarray) -> int:
        self._stage = "whitening"
        x, diagonal = self.state(n, c), w.dtype != QTILE
        weights = self.padded(w, c) if diagonal else self.constant(w, QTILE)
        self.emit(_whiten, f=f, x=x, n=n, c=c, mean=self.padded(mean, c), w=weights, diagonal=diagonal)
        return x

    def remove_factors(self, x: int, n: int, c: int, factors: np.ndarray) -> int:
        self._stage = "whitening"
        v, k = self.constant(factors, QTILE), factors.shape[1] * PANEL
        parts, projected = self.state(_PARTS, k), self.state(self.threads, k)
        sums = self.state(_PARTS, k, _LANES)
        self.emit(_project_factors, x=x, size=n * c, v=v, k=k, sums=sums, parts=parts)
        self.emit(_remove_factors, x=x, size=n * c, v=v, k=k, parts=parts, projected=projected)
        return x

    def linear(self, x: int, n: int, k: int, w: np.ndarray, b: np.ndarray, act: int = NONE,
               residual: int | None = None, lda: int | None = None,
               from_state: bool = False) -> tuple[int, int]:
        self._stage = "denoiser"
        address, m = self.packed(padded_to(w, k, w.shape[1]))
        out = self.workspace(n, m)
        self.emit(_linear, x=x, n=n, k=k, w=address, m=m, bias=self.padded(b, m),
                  ldbias=m if b.ndim == 2 else 0, residual=-1 if residual is None else residual, out=out,
                  act=act, lda=lda or k, from_state=from_state)
        return out, m

    def mix(self, x: int, d: int, w: np.ndarray, act: int = NONE, residual: int | None = None) -> int:
        self._stage = "denoiser"
        n_out, n = w.shape
        out = self.workspace(n_out, d)
        self.emit(_mix, w=self.constant(w), n_out=n_out, n=n, x=x, d=d,
                  residual=-1 if residual is None else residual, out=out, act=act)
        return out

    def layer_norm(self, x: int, n: int, d: int, gain: np.ndarray, bias: np.ndarray) -> int:
        self._stage = "denoiser"
        out = self.workspace(n, d)
        self.emit(_layer_norm, x=x, n=n, d=d, gain=self.constant(gain), bias=self.constant(bias), out=out)
        return out

    def rotate(self, h: int, d: int, w: np.ndarray, b: np.ndarray, x: int, n: int, c: int, coef, last: bool,
               z: int, at: tuple[int, int], gain: np.ndarray, offset: np.ndarray) -> None:
        self._stage = "density"
        self.emit(_rotate, h=h, d=d, w=self.packed(padded_to(w, d, c))[0], bias=self.padded(b, c), x=x, n=n,
                  c=c, coef=self.constant(coef), out=-1 if last else x, z=z + at[0], gain=self.constant(gain),
                  offset=self.constant(offset), scratch=c * _TILE)

    def score(self, z: int, n: int, worst: int, zero: float, unit: float) -> None:
        self._score = z, n, worst, zero, unit

    def sharpen(self, z: int, n: int, weight: np.ndarray, offset: np.ndarray, f: int, down: np.ndarray,
                across: np.ndarray) -> int:
        self._stage, (height, rows), (width, columns) = "map", down.shape, across.shape
        out = self.state(height, width)
        self.emit(_sharpen, z=z, rows=rows, columns=columns, weight=self.constant(weight),
                  offset=self.constant(offset), f=f, height=height, width=width, down=self.constant(down.T),
                  across=self.constant(across.T), out=out, scratch=(rows + 1) * columns + width + 4)
        return out

    def map(self, m: int, fine: tuple[int, int], taps: Callable) -> None:
        self._stage, self._map_taps = "map", lambda sides: map(taps, fine, sides)
        self.emit(_map, m=m, columns=fine[1])

    def keep(self, x: int, n: int, c: int | None = None) -> None:
        columns = 1 if c is None else round_up(c, PANEL)
        self._kept.append((x, (n, columns), c))

    # -- what the interface's operations are made of -------------------------------------------------

    def resize(self, shape: tuple[int, int], mean, std, taps: Callable, integer: bool = False) -> int:
        """Pixels of the image table -> (height + 1, width + 1, 3), zero in the last row and column.

        integer: int16 values, a row filled to whole words of two.
        """
        self._shape, self._taps, (height, width) = shape, taps, shape
        row_stride = (width + 1) * 3 if not integer else -(-(width + 1) * 3 // 2)
        out = self.workspace(height + 1, row_stride)
        mean, std = np.asarray(mean), np.asarray(std)
        affine = [1, 1, 1, 0, 0, 0, 0, 0] if integer else [*1 / (255 * std), 0, *-mean / std, 0]
        self.emit(_resize, out=out, height=height, width=width, row_stride=row_stride,
                  affine=self.constant(affine), integer=integer, scratch=3 * width + 1)
        return out

    def mbconv_integer(self, x: int, h: int, w: int, block, stem_w=None, stem_b=None,
                       stem_m=None) -> tuple[int, int, int]:
        """`mbconv` in integers: the output map is int16. With stem weights, x is the resized image."""
        p, stride, (c_in, mid, c_out) = block.arrays, block.stride, block.channels
        mid_padded, out_padded = round_up(mid, _LANES), round_up(c_out, _LANES)
        kernel = len(p["dw_w"])
        pairs, in_bytes = kernel // 2 + 1, False
        dw = np.zeros((2, 2 * pairs, kernel, mid_padded))  # for an even and an odd first row
        for odd in (0, 1):
            dw[odd, odd:odd + kernel, :, :mid] = p["dw_w"]
        if stem_w is not None:
            runs = np.zeros((3, 10, mid))  # see `_PATCH_WORDS`
            runs[:, :9] = stem_w.reshape(3, 9, mid)
            expand = self._layer("expand", runs.reshape(30, mid), stem_b, stem_m, 2)
            row_words, expand_k, stride_in = -(-(2 * w + 1) * 3 // 2), _PATCH_WORDS, 4 * _PATCH_WORDS
        else:
            in_bytes = _GROUP == 4 and bool(p["input_m"][1] <= 127)
            group, above = (_GROUP, 128 + _LOWERED) if in_bytes else (2, 0)
            expand = self._layer("expand", p["expand_w"], p["expand_b"], p["expand_m"], group, above)
            row_words, expand_k, stride_in = 0, -(-c_in // group), 4 // group * round_up(c_in, _LANES)
        project_w = padded_to(p["project_w"], mid_padded, c_out)
        h_out, w_out = -(-h // stride), -(-w // stride)
        chunk = min(h_out, max(1, 64 // w_out))
        line = (w + sum(same_padding(w, kernel, stride))) * mid_padded
        slots = ((chunk - 1) * stride + kernel - 1) // 2 + 2
        scratch = slots * line + chunk * w_out * mid_padded // _GROUP + -(-w * stride_in // 2) + 4 + 2 * pairs
        out = self.workspace(-(-h_out * w_out * out_padded // 2))
        self.emit(_mbconv_integer, x=x, row_words=row_words, expand_k=expand_k, in_bytes=in_bytes, h=h, w=w,
                  c_in=c_in, c_mid=mid_padded, size=kernel, stride=stride,
                  input_m=self.constant(p.get("input_m", [0, 0])),
                  **expand, dw_w=self.constant(_words(dw.reshape(2, pairs, 2, -1), 2), np.int32),
                  dw_b=self.padded_ints(p["dw_b"], mid_padded), dw_m=self.padded(p["dw_m"], mid_padded),
                  **self._layer("project", project_w, p["project_b"], p["project_m"], _GROUP, _LOWERED),
                  c_out=out_padded, residual=bool(block.skip), out=out, chunk=chunk, scratch=scratch,
                  zeros=line)
        return out, h_out, w_out

    def padded_ints(self, b: np.ndarray, m: int) -> int:
        """Address of int32, filled with zeros up to m."""
        return self.constant(np.pad(b, (0, m - len(b))), np.int32)

    def _layer(self, name: str, w: np.ndarray, b: np.ndarray, m: np.ndarray, group: int,
               above: int = 0) -> dict[str, int]:
        """Fields of a product in integers: w (K, M), K filled to whole words, M to vectors, in panels.

        above: its inputs are so much larger than they should be.
        """
        (k, columns), padded = w.shape, round_up(w.shape[1], _LANES)
        b = b - above * w.astype(np.int64).sum(0)
        words = _words(padded_to(w, round_up(k, group), padded).reshape(-1, group, padded), group)
        panels = [words[:, j:j + _WIDE * _LANES].ravel() for j in range(0, padded, _WIDE * _LANES)]
        return {f"{name}_w": self.constant(np.concatenate(panels), np.int32),
                f"{name}_b": self.padded_ints(b, padded), f"{name}_m": self.padded(m, padded)}

    def mbconv(self, x: int, h: int, w: int, block, stem_w=None, stem_b=None) -> tuple[int, int, int]:
        """Returns offset and size of the output map. With stem weights, x is the normalised image."""
        p = block.arrays
        c_in, mid, c_out = block.channels
        mid_padded, out_padded = round_up(mid, _LANES), round_up(c_out, _LANES)
        source, expand_w, expand_b = _COPY, 0, 0
        if stem_w is not None:
            source, c_in = _STEM, 27
            expand_w, expand_b = self.packed(stem_w.reshape(27, -1))[0], self.padded(stem_b, mid_padded)
        elif "expand_w" in p:
            source = _POINTWISE
            expand_w, expand_b = self.packed(p["expand_w"])[0], self.padded(p["expand_b"], mid_padded)
        size, stride = p["dw_w"].shape[0], block.stride
        h_out, w_out = -(-h // stride), -(-w // stride)
        project_w = self.packed(padded_to(p["project_w"], mid_padded, c_out))[0]
        project_b = self.padded(p["project_b"], out_padded)
        chunk = min(h_out, max(1, 64 // w_out))
        line = (w + sum(same_padding(w, size, stride))) * mid_padded
        scratch = (((chunk - 1) * stride + size) * line + chunk * w_out * mid_padded + round_up(w * 27, 2)
                   + 2 * size)
        squeeze = "se_reduce_w" in p
        out = self.workspace(h_out, w_out, out_padded)
        middle = self.workspace(h_out, w_out, mid_padded) if squeeze else out
        sums = self.workspace(h_out, mid_padded) if squeeze else -1
        self.emit(_mbconv, source=source, x=x, h=h, w=w, c_in=c_in, c_mid=mid_padded, size=size,
                  stride=stride, act=block.act, expand_w=expand_w, expand_b=expand_b,
                  dw_w=self.padded(p["dw_w"].reshape(size * size, mid), mid_padded),
                  dw_b=self.padded(p["dw_b"], mid_padded), project_w=project_w, project_b=project_b,
                  c_out=out_padded, residual=bool(block.skip), out=middle, sums=sums, chunk=chunk,
                  scratch=scratch, zeros=line)
        if squeeze:
            squeezed = p["se_reduce_w"].shape[1]
            self.emit(_project, x=middle, h=h_out, w=w_out, c_mid=mid_padded, sums=sums, squeezed=squeezed,
                      reduce_w=self.constant(padded_to(p["se_reduce_w"], mid_padded, squeezed)),
                      reduce_b=self.constant(p["se_reduce_b"]),
                      expand_w=self.padded(p["se_expand_w"], mid_padded),
                      expand_b=self.padded(p["se_expand_b"], mid_padded), project_w=project_w,
                      project_b=project_b, c_out=out_padded, residual=x if block.skip else -1, out=out,
                      scratch=mid_padded * (2 + out_padded) + squeezed)
        return out, h_out, w_out

    # -- running -----------------------------------------------------------------------------------

    def finish(self) -> None:
        zeros = self.constant(np.zeros(self._zero_floats))
        for _, _, fields in self._rows:
            if "scratch" in fields:
                fields["scratch"] = self._workspace_floats
            if "zeros" in fields:
                fields["zeros"] = zeros
        self._allocate(16)

    def _allocate(self, line: int) -> None:
        memory = _aligned((self.threads, line + self._workspace_floats + self._scratch_floats))
        self._memory, self._line = memory, line  # at once: an interrupt leaves them as they were

    def run(self, images: Sequence[np.ndarray] | None, *, with_map: bool = False, outputs: bool = False,
            shifts: Sequence[tuple[float, float]] | None = None,
            given: Sequence[np.ndarray] | None = None, masks: Sequence[np.ndarray] | None = None) -> Frames:
        batch = len(given[0]) if images is None else len(images)
        images, shifts = images or [None] * batch, shifts or [(0.0, 0.0)] * batch
        maps = [np.empty(image.shape[:2], np.float32) if with_map else None for image in images]
        scores, kept = None, []
        with self._lock:
            states = self.prepare(batch)
            for (x, n, c, columns), rows in zip(self._given, given or ()):
                places = states[:, x:x + n * columns].reshape(batch, n, columns)
                places[:, :, :c] = rows
                places[:, :, c:] = 0
            call = self._frame_call(images)
            began = time.perf_counter()
            self._run(self._program(), self._image_table(images, shifts, maps), states, call)
            if self._usual:
                self._quickest = min(self._quickest, time.perf_counter() - began)
            if self._score:
                z, n, worst, zero, unit = self._score
                worst_z = np.partition(states[:, z:z + n], -worst, -1)[:, -worst:]
                scores = (worst_z.mean(-1) - zero) / unit
            for x, shape, c in self._kept if outputs else ():
                places = states[:, x:x + shape[0] * shape[1]].reshape(batch, *shape)
                kept.append(places[:, :, 0].copy() if c is None else places[:, :, :c].copy())
        for m, mask in zip(maps, masks or ()):
            m *= mask
        return Frames(scores, maps, kept)

    def _frame_call(self, images: Sequence) -> Callable:
        """Whether a frame keeps the interpreter's lock: if it lasts at most two turns of a Python thread.

        Beside a busy thread, one that gives it up is back a whole turn after it is done, and has shared its
        cores meanwhile. Only where the frame has all cores: else other threads could score on theirs.
        """
        size = images[0].shape if len(images) == 1 and images[0] is not None else ()
        if size != self._usual:
            self._usual, self._quickest = size, math.inf
        brief = self._quickest <= 2 * sys.getswitchinterval()
        return self._held if brief and self._all_cores else self._frame

    def run_only(self, stages: Sequence[str], images: Sequence[np.ndarray], with_map: bool = True) -> None:
        """Only the operations of these stages, on whatever the others left: for timing."""
        maps = [np.empty(image.shape[:2], np.float32) if with_map else None for image in images]
        with self._lock:
            table = self._image_table(images, [(0.0, 0.0)] * len(images), maps)
            self._run(self._program(tuple(stages)), table, self.prepare(len(images)))

    def _program(self, stages: tuple[str, ...] | None = None) -> tuple[np.ndarray, int, int]:
        """Rows of the operations of these stages (all), and which of them take all images of a batch."""
        if stages not in self._programs:
            kept = [(operation, fields) for stage, operation, fields in self._rows
                    if stages is None or stage in stages]
            rows = np.zeros((max(len(kept), 1), _ROW_BYTES // 8), np.int64)
            for row, (operation, fields) in zip(rows, kept):
                row[:len(operation.fields)] = [fields.get(name, operation.address)
                                               for name in operation.fields.names]
            whole = [i for i, (operation, _) in enumerate(kept) if operation in self._TOGETHER]
            first, last = (whole[0], whole[-1] + 1) if whole else (len(kept), len(kept))
            if len(whole) != last - first:
                raise ValueError("operations that take all images of a batch must follow each other")
            self._programs[stages] = rows[:len(kept)], first, last
        return self._programs[stages]

    def _image_table(self, images: Sequence, shifts: Sequence, maps: Sequence) -> np.ndarray:
        """A row of _IMAGE for each image; taps are kept by size."""
        table = np.zeros((len(images), _ROW_BYTES // 8), np.int64)
        rows = table[:, :len(_IMAGE)].view(_IMAGE)[:, 0]
        widest = 0
        for i, (image, shift, m) in enumerate(zip(images, shifts, maps)):
            if image is not None:
                height, width = image.shape[:2]
                widest = max(widest, width)
                tables, addresses = self._tables_of(height, width, shift)
                target = 0 if m is None else m.ctypes.data
                rows[i] = (image.ctypes.data, height, width, *addresses[:6], target, *addresses[6:], 0)
        while len(self._tables) > max(256, len(images)):  # never one that this batch points to
            del self._tables[next(iter(self._tables))]
        line = round_up(3 * widest + 1, 16)
        if line > self._line:
            self._allocate(line)
        rows["line"] = self._line
        return table

    def _tables_of(self, height: int, width: int, shift: tuple[float, float]) -> tuple[list, list[int]]:
        key = height, width, *shift
        entry = self._tables.pop(key, None)
        if entry is None:
            tables = []
            for n, out, s in zip((height, width), self._shape, shift):
                if self._taps:
                    start, weight = self._taps(n, out, s)
                    tables += [start, weight.astype(np.float32), weight.shape[1]]
                else:
                    tables += [0, 0, 0]
            for start, share in self._map_taps((height, width)) if self._map_taps else ():
                tables += [start, share.astype(np.float32)]
            addresses = [t if isinstance(t, int) else t.ctypes.data for t in tables]
            entry = tables, addresses + [0] * (10 - len(tables))
        self._tables[key] = entry  # most recently used last
        return entry

    def _run(self, program: tuple[np.ndarray, int, int], table: np.ndarray, states: np.ndarray,
             call: Callable | None = None) -> None:
        if self._team is None or self._team.process != os.getpid():  # a fork has no helpers
            self._team = _Team(self.threads)
        rows, first, last = program
        batch, bands, job = len(table), self.threads, self._team.job
        by_image = batch >= bands
        before, after = (batch * (n > 0) if by_image else batch * bands * n
                         for n in (first, len(rows) - last))
        taken = np.zeros(len(rows) * max(batch, 1), np.int64)  # bits of bands, a word a step
        values = {"rows": rows.ctypes.data, "length": len(rows), "whole_first": first, "whole_last": last,
                  "workspace": self._memory.ctypes.data + 4 * self._line, "stride": self._memory.shape[1],
                  "states": states.ctypes.data, "table": table.ctypes.data, "batch": batch,
                  "state_stride": states.shape[1], "bands": bands, "taken": taken.ctypes.data,
                  "total": before + (last - first) * bands + after}
        for name, value in values.items():
            job[name] = value
        self._team.make_room()
        # one call of C code: a KeyboardInterrupt comes before or after, never between
        (call or self._frame)(job.ctypes.data, self._team.sleepers.ctypes.data, self.threads - 1)

    def prepare(self, batch: int) -> np.ndarray:
        """The states of a batch, float32 (batch, floats an image)."""
        if self._states is None or len(self._states) < batch:
            self._states = _aligned((batch, max(self._state_floats, 16)))
        return self._states[:batch]
