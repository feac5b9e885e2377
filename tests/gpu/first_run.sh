#!/usr/bin/env bash
# Everything that a GPU has to tell, the most telling first, each part under a time limit; some four minutes
# on an H100.
#
#     tests/gpu/first_run.sh LOGS [B4.safetensors]      from the repository's root; logs into LOGS
#
# Needs CuPy, NumPy, pytest, typer; torch for the comparisons. g++ for the emulator's checks is not needed.
set -u
logs=${1:?expected a folder for the logs}
b4=${2:-}
mkdir -p "$logs"
python=${PYTHON:-python3}
bench() { "$python" fastprior.py bench --steps 2 --device cuda "$@"; }

part() {  # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*" | tee -a "$logs/summary.txt"
    local began=$SECONDS
    timeout -k 5 "$seconds" "$@" > "$logs/$name.txt" 2>&1
    echo "   exit $? after $((SECONDS - began)) s" | tee -a "$logs/summary.txt"
    tail -n 6 "$logs/$name.txt" | tee -a "$logs/summary.txt"
}
export -f bench
export python

part environment 20 bash -c 'nvidia-smi; "$python" -c "import cupy, numpy; cupy.show_config(); print(numpy.__version__)"'
part info 30 "$python" fastprior.py info
part kernels 90 "$python" -m pytest tests/gpu -q -k kernel -p no:cacheprovider
part models 90 "$python" -m pytest tests/gpu -q -k 'not kernel and not frames' -p no:cacheprovider
part frames 90 "$python" -m pytest tests/gpu -q -k frames -p no:cacheprovider
part bench_lite0 60 bash -c 'bench --backbone lite0 --size 256 --cell 16 --against torch'
part bench_default 60 bash -c 'bench --tier default --against torch'
[ -n "$b4" ] && part bench_b4 60 bash -c "bench --backbone '$b4' --size 448 --cell 32 --against torch"
part bench_half 60 bash -c 'bench --backbone lite0 --size 256 --cell 16 --precision float16'
part profile 60 "$python" tests/gpu/launches.py
[ -n "$b4" ] && part profile_b4 60 "$python" tests/gpu/launches.py --backbone "$b4" --size 448
part profile_batch 60 "$python" tests/gpu/launches.py --batch 64 --repeats 10
part sanitizer 120 compute-sanitizer --error-exitcode 3 "$python" -m pytest tests/gpu -x -q -k kernel -p no:cacheprovider
