// coarsen: the mean of four places each, whose sum is in one order, so that it is the CPU's to the bit.
// Reference: coarsen.
//
// x (B, N, C) float32; cells (M, 4) int32, places of x; out (B, M, C) float32.
// Launch: grid (ceil(M * C / blockDim.x), 1, B), any block; a thread a number.
#include "common.cuh"

extern "C" __global__ void coarsen(const float* x, const int* cells, float* out, int n, int m, int c) {
    allow_next_launch();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    await_launch();
    if (i >= m * c) return;
    const int* cell = cells + i / c * 4;
    x += (long long)blockIdx.z * n * c + i % c;
    const float upper = x[cell[0] * c] + x[cell[1] * c], lower = x[cell[2] * c] + x[cell[3] * c];
    out[(long long)blockIdx.z * m * c + i] = (upper + lower) * .25f;
}
