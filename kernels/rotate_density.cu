// rotate_density: a DDIM step x' = a x + b F and, at the last one, the Gaussian density of where it lands.
// Reference: rotate_density, whose product F = h @ w + b is left to product.cu.
//
// x (rows, C) real, rows = B * N; f (rows, C) real, or null for F = 0; C a multiple of VECTOR.
// out (rows, C) real, may be x, or null: the last step, x' never leaves the registers.
// z (B, ldz) float32 or null: gain_n |x'|^2 / 2 + offset_n, n = row % N, from an image's number `first` on.
// gain, offset (N,) float32.
// Launch: grid (ceil(rows / (blockDim.x / 32))), block a multiple of 32; a warp a row.
#include "common.cuh"

extern "C" __global__ void rotate_density(const real* x, const real* f, float a, float b, real* out,
                                          const float* gain, const float* offset, float* z, int first,
                                          int ldz, int rows, int n, int c) {
    allow_next_launch();
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    await_launch();
    if (row >= rows) return;
    const long long start = (long long)row * c;
    float square = 0.f;
    for (int i = lane * VECTOR; i < c; i += 32 * VECTOR) {
        Chunk value = load_chunk(x + start + i), turn = Chunk();
        if (f) turn = load_chunk(f + start + i);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) {
            const float y = a * get(value.at[v]) + b * get(turn.at[v]);
            square += y * y;
            put(value.at[v], y);
        }
        if (out) store_chunk(out + start + i, value);
    }
    square = warp_sum(square);
    if (!z || lane > 0) return;
    z[(long long)(row / n) * ldz + first + row % n] = .5f * square * gain[row % n] + offset[row % n];
}
