// remove_factors: x - V^T V x over all places of an image at once, in two launches.
// Reference: remove_factors.
//
// x (B, size) real, size = N * C, changed in place; v (size, K) halves, K a multiple of 8 up to 64;
// sums (B, parts, K) float32: what each run of ROWS values adds to V x.
// Launch: project_factors, grid (parts = ceil(size / ROWS), 1, B), block a multiple of 32 up to 256: a warp takes a
//   row of v, a lane two factors of it. Then remove_factors, grid (ceil(size / blockDim.x), 1, B), block any multiple
//   of 32: a thread a value. The first block size sets the order of the sums.
#include "common.cuh"

#define ROWS 1024
#define MOST_FACTORS 64
#define MOST_WARPS 8

struct alignas(4) Pair { unsigned short at[2]; };
struct alignas(16) Eight { unsigned short at[8]; };

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) project_factors(const real* x, const unsigned short* v,
                                                                              float* sums, int size, int k) {
    __shared__ float part[MOST_WARPS][MOST_FACTORS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int first = blockIdx.x * ROWS, last = min(size, first + ROWS);
    x += (long long)blockIdx.z * size;
    float low = 0.f, high = 0.f;
    if (2 * lane < k)
#pragma unroll 8
        for (int i = first + warp; i < last; i += warps) {
            const Pair pair = *reinterpret_cast<const Pair*>(v + (long long)i * k + 2 * lane);
            const float value = get(x[i]);
            low += float_from_half(pair.at[0]) * value;
            high += float_from_half(pair.at[1]) * value;
        }
    part[warp][2 * lane] = low;
    part[warp][2 * lane + 1] = high;
    __syncthreads();
    for (int t = threadIdx.x; t < k; t += blockDim.x) {
        float y = 0.f;
        for (int w = 0; w < warps; w++) y += part[w][t];
        sums[((long long)blockIdx.z * gridDim.x + blockIdx.x) * k + t] = y;
    }
}

extern "C" __global__ void remove_factors(real* x, const unsigned short* v, const float* sums, int size, int k, int parts) {
    __shared__ float along[MOST_FACTORS];
    sums += (long long)blockIdx.z * parts * k;
    for (int t = threadIdx.x; t < k; t += blockDim.x) {
        float y = 0.f;
#pragma unroll 8
        for (int p = 0; p < parts; p++) y += sums[p * k + t];
        along[t] = y;
    }
    __syncthreads();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    v += (long long)i * k;
    float y = 0.f;
    for (int j = 0; j < k; j += 8) {
        const Eight eight = *reinterpret_cast<const Eight*>(v + j);
#pragma unroll
        for (int e = 0; e < 8; e++) y += float_from_half(eight.at[e]) * along[j + e];
    }
    real& value = x[(long long)blockIdx.z * size + i];
    put(value, get(value) - y);
}
