"""Every CUDA kernel compiles to machine code for each supported GPU, in both storage types; no GPU needed.

NVRTC from PyPI (nvidia-cuda-nvrtc-cu12, in the `test` extra) is what CuPy uses too; else nvcc on PATH.
"""
import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from emulated_cuda import KERNELS, source
from twins import OPS

FILES = sorted(p.stem for p in KERNELS.glob("*.cu"))
VARIANTS = {  # macros that the engine sets
    "product": ["-DTILE=32 -DWARPS=4", "-DTILE=16 -DWARPS=8 -DWIDE=1",
                "-DTILE=16 -DWARPS=8 -DWIDE=1 -DTRANSPOSED=1",
                *(f"-DTILE={tile} -DWARPS={warps} -DINTEGER={kind}"
                  for tile, warps in ((32, 4), (16, 8)) for kind in (1, 2))],
    "stem": ["", "-DINTEGER=1"],
    "pool": ["", "-DINTEGER=1"],
    "depthwise": ["-DSMALL=0", "-DSMALL=1", "-DSMALL=0 -DINTEGER=1", "-DSMALL=1 -DINTEGER=1"]}


@functools.cache
def nvrtc():
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations if spec else []):
        for library in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(library))
    return None


@functools.cache
def architectures() -> tuple[int, ...]:
    """75, 80, 90 and the newest the compiler knows."""
    if nvrtc():
        count = ctypes.c_int()
        assert nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(count)) == 0
        known = (ctypes.c_int * count.value)()
        assert nvrtc().nvrtcGetSupportedArchs(known) == 0
        known = list(known)
    else:
        listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
        known = [int(n) for n in re.findall(r"compute_(\d+)$", listed, re.M)]
    return tuple(a for a in (75, 80, 90) if a in known) + (max(known),)


def compile_with_nvrtc(text: str, options: list[str]) -> tuple[bool, str]:
    lib, program = nvrtc(), ctypes.c_void_p()
    assert lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None) == 0
    given = [o.encode() for o in options]
    code = lib.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    cubin = ctypes.c_size_t()
    lib.nvrtcGetCUBINSize(program, ctypes.byref(cubin))
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return code == 0 and cubin.value > 0, log.value.decode()


def compile_with_nvcc(text: str, options: list[str], folder: Path) -> tuple[bool, str]:
    (folder / "kernel.cu").write_text(text)
    done = subprocess.run(["nvcc", "-cubin", "-o", "kernel.cubin", *options, "kernel.cu"], cwd=folder,
                          capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def build(tmp_path):
    if nvrtc():
        return compile_with_nvrtc
    if shutil.which("nvcc"):
        return lambda text, options: compile_with_nvcc(text, options, tmp_path)
    pytest.skip("neither NVRTC (pip install nvidia-cuda-nvrtc-cu12) nor nvcc: CUDA kernels were not compiled")


@pytest.mark.parametrize("half", [0, 1], ids=["float32", "float16"])
@pytest.mark.parametrize("name", FILES)
def test_kernel_compiles_for_every_architecture(build, name, half):
    for macros in VARIANTS.get(name, [""]):
        # in integers the engine compiles with HALF=1 only, and two architectures are enough
        for arch in architectures()[::2] * half if "INTEGER" in macros else architectures():
            options = [f"-arch=sm_{arch}", f"-DHALF={half}", *macros.split()]
            good, log = build(source(name), options)
            assert good, f"{name} for sm_{arch}: {log}"
            assert "warning" not in log, f"{name} for sm_{arch}: {log}"


def test_a_wrong_kernel_does_not_compile(build):
    text = source("pool").replace("sum[v] +=", "sum[v] += undeclared +")
    good, log = build(text, [f"-arch=sm_{architectures()[0]}"])
    assert not good and "undeclared" in log


def test_all_supported_architectures_are_there(build):
    assert {75, 80, 90} <= set(architectures())


def test_every_kernel_lets_the_next_launch_start_and_awaits_the_one_before():
    for name in FILES:
        text = (KERNELS / f"{name}.cu").read_text()
        bodies = re.split(r'(?:extern "C" __global__|__forceinline__) void ', text)[1:]
        bodies = [b for b in bodies if not b.startswith("__launch_bounds__(MOST_PLACES")]  # call convolve
        assert bodies
        for body in bodies:
            first, _, rest = body.partition("{\n")[2].partition("\n")
            assert first.strip() == "allow_next_launch();", (name, body[:60])
            assert rest.count("await_launch();") == 1, (name, body[:60])


def test_every_kernel_file_has_a_head_that_names_its_references():
    for name in FILES:
        head = (KERNELS / f"{name}.cu").read_text().split("#include")[0]
        assert head.startswith(f"// {name}: ") and re.search("Launch: .*grid", head, re.S), name
        named = re.findall(r"\w+", re.search(r"References?: (.+)", head).group(1))
        for op in OPS.values():
            assert op.cuda != name or op.reference.__name__ in named, (name, op.reference)
