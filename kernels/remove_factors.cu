// remove_factors: x - V^T V x over all places of an image at once, in three launches.
// Reference: remove_factors.
//
// x (B, size) real, size = N * C, changed in place; v (size/32, G) is what pack_factors returns: G groups of 32 factors,
// 1 or 2. sums (B, parts, 32 G) float32: what each run of ROWS values adds to V x; along (B, 32 G) float32: V x.
// Launch: project_factors, grid (parts = ceil(size / ROWS), 1, B), block a multiple of 32 up to 256: a warp takes a
//   panel of 32 values and a group, a lane a factor. Then sum_factors, grid (1, 1, B), block a multiple of 64 up to 512.
//   Then remove_factors, grid (ceil(size / blockDim.x), 1, B), block a multiple of 32: a warp a panel, a lane four
//   values and eight factors of each group. Block sizes set the order of the sums.
#include "common.cuh"

#define ROWS 512
#define MOST_FACTORS 64
#define MOST_WARPS 8
#define MOST_THREADS 512

struct alignas(16) Sixteen { signed char at[16]; };
struct alignas(4) Four { signed char at[4]; };

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) project_factors(const real* x, const Qtile* v, float* sums,
                                                                              int size, int groups) {
    allow_next_launch();
    __shared__ float part[MOST_WARPS][MOST_FACTORS];
    __shared__ float scaled[MOST_WARPS][PANEL];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, k = groups * PANEL;
    const int first = blockIdx.x * (ROWS / PANEL), last = min(size / PANEL, first + ROWS / PANEL);
    x += (long long)blockIdx.z * size;
    await_launch();
    for (int g = 0; g < groups; g++) {
        float y = 0.f;
        for (int panel = first + warp; panel < last; panel += warps) {
            const Qtile& block = v[panel * groups + g];
            Sixteen weight[2];
#pragma unroll
            for (int h = 0; h < 2; h++) weight[h] = *reinterpret_cast<const Sixteen*>(block.weight[lane] + h * 16);
            __syncwarp();
            scaled[warp][lane] = block.scale[lane] * get(x[panel * PANEL + lane]);
            __syncwarp();
#pragma unroll
            for (int e = 0; e < PANEL; e++) y += weight[e / 16].at[e % 16] * scaled[warp][e];
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

extern "C" __global__ void __launch_bounds__(MOST_THREADS) sum_factors(const float* sums, float* along, int groups,
                                                                       int parts) {
    allow_next_launch();
    __shared__ float part[MOST_THREADS];
    const int k = groups * PANEL;
    await_launch();
    sums += (long long)blockIdx.z * parts * k + threadIdx.x % k;
    float own = 0.f;
#pragma unroll 8
    for (int p = threadIdx.x / k; p < parts; p += blockDim.x / k) own += sums[p * k];
    part[threadIdx.x] = own;
    __syncthreads();
    for (int t = threadIdx.x; t < k; t += blockDim.x) {
        float all = 0.f;
        for (int other = t; other < blockDim.x; other += k) all += part[other];
        along[(long long)blockIdx.z * k + t] = all;
    }
}

extern "C" __global__ void remove_factors(real* x, const Qtile* v, const float* along, int size, int groups) {
    allow_next_launch();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int panel = blockIdx.x * warps + warp, value = lane % 8 * 4, factor = lane / 8 * 8;
    await_launch();
    if (panel >= size / PANEL) return;
    along += (long long)blockIdx.z * groups * PANEL;
    float y[4] = {};
    for (int g = 0; g < groups; g++) {
        const Qtile& block = v[panel * groups + g];
        float of[4] = {};
#pragma unroll
        for (int j = factor; j < factor + 8; j++) {
            const Four weight = *reinterpret_cast<const Four*>(block.weight[j] + value);
#pragma unroll
            for (int e = 0; e < 4; e++) of[e] += weight.at[e] * along[g * PANEL + j];
        }
#pragma unroll
        for (int e = 0; e < 4; e++) y[e] += block.scale[value + e] * of[e];
    }
#pragma unroll
    for (int e = 0; e < 4; e++)
        for (int other = 8; other < 32; other *= 2) y[e] += __shfl_xor_sync(0xffffffffu, y[e], other);
    if (factor > 0) return;
    x += (long long)blockIdx.z * size + panel * PANEL + value;
#pragma unroll
    for (int e = 0; e < 4; e++) put(x[e], get(x[e]) - y[e]);
}
