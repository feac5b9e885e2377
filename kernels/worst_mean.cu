// worst_mean: the image's score, the standardised mean of the `count` highest positions.
// Reference: worst_mean, then (raw - zero) / unit.
//
// z (B, N) float32, N <= 5120; images[b].score = (mean - zero) * per_unit. A NaN ranks first and so comes out.
// Launch: grid (1, 1, B), block a power of two up to 256, which sets the order of the sum.
#include "common.cuh"

#define MOST_POSITIONS 5120
#define MOST_THREADS 256

extern "C" __global__ void worst_mean(const float* z, const Image* images, int n, int count, float zero, float per_unit) {
    allow_next_launch();
    __shared__ float value[MOST_POSITIONS];
    __shared__ float part[MOST_THREADS];
    await_launch();
    for (int i = threadIdx.x; i < n; i += blockDim.x) value[i] = z[(long long)blockIdx.z * n + i];
    __syncthreads();
    float sum = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float own = value[i];
        int above = 0;
        for (int j = 0; j < n; j++) above += value[j] > own || (value[j] == own && j < i);
        if (above < count) sum += own;
    }
    part[threadIdx.x] = sum;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *images[blockIdx.z].score = (part[0] / (float)count - zero) * per_unit;
}
