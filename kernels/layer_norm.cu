// layer_norm: zero mean and unit variance over a row, tiny = 1e-5, then gain and bias.
// Reference: layer_norm.
//
// x, out (rows, D) real, D a multiple of VECTOR; gain, bias (D,) float32.
// Launch: grid (ceil(rows / (blockDim.x / 32))), block a multiple of 32; a warp a row.
#include "common.cuh"

extern "C" __global__ void layer_norm(const real* x, const float* gain, const float* bias, real* out, int rows, int d) {
    allow_next_launch();
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    await_launch();
    if (row >= rows) return;
    x += (long long)row * d;
    out += (long long)row * d;
    float sum = 0.f;
    for (int i = lane * VECTOR; i < d; i += 32 * VECTOR) {
        const Chunk value = load_chunk(x + i);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum += get(value.at[v]);
    }
    const float mean = warp_sum(sum) / (float)d;
    float square = 0.f;
    for (int i = lane * VECTOR; i < d; i += 32 * VECTOR) {
        const Chunk value = load_chunk(x + i);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) square += (get(value.at[v]) - mean) * (get(value.at[v]) - mean);
    }
    const float scale = 1.f / sqrtf(warp_sum(square) / (float)d + 1e-5f);
    for (int i = lane * VECTOR; i < d; i += 32 * VECTOR) {
        Chunk value = load_chunk(x + i);
#pragma unroll
        for (int v = 0; v < VECTOR; v++) put(value.at[v], (get(value.at[v]) - mean) * scale * gain[i + v] + bias[i + v]);
        store_chunk(out + i, value);
    }
}
