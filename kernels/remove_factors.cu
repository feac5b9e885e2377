// remove_factors: x - V^T V x over all places of an image at once, in two launches.
// Reference: remove_factors.
//
// x (B, size) real, size = N * C, changed in place; v (size/32, G) is what pack_factors returns: G groups of 32 factors,
// 1 or 2. sums (B, parts, 32 G) float32: what each run of ROWS values adds to V x.
// Launch: project_factors, grid (parts = ceil(size / ROWS), 1, B), block a multiple of 32 up to 256: a warp takes a
//   panel of 32 values, a lane a factor of each group. Then remove_factors, grid (ceil(size / blockDim.x), 1, B), block
//   any multiple of 32: a thread a value. The first block size sets the order of the sums.
#include "common.cuh"

#define ROWS 1024
#define MOST_FACTORS 64
#define MOST_WARPS 8

struct alignas(16) Sixteen { signed char at[16]; };

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) project_factors(const real* x, const Qtile* v, float* sums,
                                                                              int size, int groups) {
    __shared__ float part[MOST_WARPS][MOST_FACTORS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, k = groups * PANEL;
    const int first = blockIdx.x * (ROWS / PANEL), last = min(size / PANEL, first + ROWS / PANEL);
    x += (long long)blockIdx.z * size;
    for (int g = 0; g < groups; g++) {
        float y = 0.f;
        for (int panel = first + warp; panel < last; panel += warps) {
            const Qtile& block = v[panel * groups + g];
#pragma unroll
            for (int j = 0; j < PANEL; j += 16) {
                const Sixteen weight = *reinterpret_cast<const Sixteen*>(block.weight[lane] + j);
#pragma unroll
                for (int e = 0; e < 16; e++) y += weight.at[e] * (block.scale[j + e] * get(x[panel * PANEL + j + e]));
            }
        }
        part[warp][g * PANEL + lane] = y;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < k; t += blockDim.x) {
        float y = 0.f;
        for (int w = 0; w < warps; w++) y += part[w][t];
        sums[((long long)blockIdx.z * gridDim.x + blockIdx.x) * k + t] = y;
    }
}

extern "C" __global__ void remove_factors(real* x, const Qtile* v, const float* sums, int size, int groups, int parts) {
    __shared__ float along[MOST_FACTORS];
    const int k = groups * PANEL;
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
    float y = 0.f;
    for (int g = 0; g < groups; g++) {
        const Qtile& block = v[i / PANEL * groups + g];
        float own = 0.f;
#pragma unroll 8
        for (int j = 0; j < PANEL; j++) own += block.weight[j][i % PANEL] * along[g * PANEL + j];
        y += block.scale[i % PANEL] * own;
    }
    real& value = x[(long long)blockIdx.z * size + i];
    put(value, get(value) - y);
}
