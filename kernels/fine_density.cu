// fine_density: |W (x_n - mean_n)|^2 / 2 of each fine place n, one W for all places; of images whose map is wanted.
// Reference: fine_density.
//
// x (B, N, C) float32; mean (N, C) float32; w (C, C) float32, transposed: an input of W is a row; f (B, N) float32.
// Launch: grid (ceil(N / PLACES), 1, B), block a multiple of 32 up to 256, which sets the order of the sums. A thread
//   has an output of W for PLACES places; warps are added at the end.
#include "common.cuh"

#define PLACES 8
#define DEPTH 64
#define MOST_WARPS 8

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) fine_density(const float* x, const float* mean,
                                                                           const float* w, float* f,
                                                                           const Image* images, int n, int c) {
    allow_next_launch();
    __shared__ float away[PLACES][DEPTH];
    __shared__ float part[MOST_WARPS][PLACES];
    await_launch();
    if (!images[blockIdx.z].map) return;
    const int first = blockIdx.x * PLACES, places = min(PLACES, n - first);
    x += ((long long)blockIdx.z * n + first) * c;
    mean += (long long)first * c;
    float square[PLACES] = {};
    for (int start = 0; start < c; start += blockDim.x) {
        const int output = start + threadIdx.x;
        float sum[PLACES] = {};
        for (int k = 0; k < c; k += DEPTH) {
            const int depth = min(DEPTH, c - k);
            __syncthreads();
            for (int t = threadIdx.x; t < places * depth; t += blockDim.x) {
                const int at = t / depth * c + k + t % depth;
                away[t / depth][t % depth] = x[at] - mean[at];
            }
            __syncthreads();
            for (int i = 0; output < c && i < depth; i++) {
                const float weight = w[(k + i) * c + output];
#pragma unroll
                for (int p = 0; p < PLACES; p++)
                    if (p < places) sum[p] += weight * away[p][i];
            }
        }
#pragma unroll
        for (int p = 0; p < PLACES; p++) square[p] += sum[p] * sum[p];
    }
#pragma unroll
    for (int p = 0; p < PLACES; p++) {
        const float y = warp_sum(square[p]);
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32][p] = y;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < places; p += blockDim.x) {
        float y = 0.f;
        for (int k = 0; k < blockDim.x / 32; k++) y += part[k][p];
        f[(long long)blockIdx.z * n + first + p] = .5f * y;
    }
}
