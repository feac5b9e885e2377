// sharpen: the cells weight * z + offset enlarged to the fine grid, times sqrt(f / its maximum over 5 x 5 places).
// Reference: sharpen, operator from map_operator, weight and offset from Prior._map_weights.
//
// z (B, G, G), weight, offset (G, G), f (B, F, F), enlarge (F, G), out (B, F, F) float32, G <= 64; of images whose
// map is wanted.
// Launch: grid (F, 1, B), any block; a block has a row of the fine grid.
#include "common.cuh"

#define MOST_GRID 64
#define REACH 2

__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN if one is

extern "C" __global__ void sharpen(const float* z, const float* weight, const float* offset, const float* f,
                                   const float* enlarge, float* out, const Image* images, int grid, int fine) {
    allow_next_launch();
    __shared__ float mixed[MOST_GRID];
    await_launch();
    if (!images[blockIdx.z].map) return;
    const int y = blockIdx.x;
    z += (long long)blockIdx.z * grid * grid;
    f += (long long)blockIdx.z * fine * fine;
    out += (long long)blockIdx.z * fine * fine;
    for (int j = threadIdx.x; j < grid; j += blockDim.x) {
        float sum = 0.f;
#pragma unroll 8
        for (int i = 0; i < grid; i++)
            sum += enlarge[y * grid + i] * (weight[i * grid + j] * z[i * grid + j] + offset[i * grid + j]);
        mixed[j] = sum;
    }
    __syncthreads();
    for (int x = threadIdx.x; x < fine; x += blockDim.x) {
        float sum = 0.f, most = 1.17549435e-38f;
#pragma unroll 8
        for (int j = 0; j < grid; j++) sum += mixed[j] * enlarge[x * grid + j];
#pragma unroll
        for (int i = -REACH; i <= REACH; i++)  // beyond the border, the border again
#pragma unroll
            for (int j = -REACH; j <= REACH; j++)
                most = larger(f[min(max(y + i, 0), fine - 1) * fine + min(max(x + j, 0), fine - 1)], most);
        out[y * fine + x] = sum * sqrtf(f[y * fine + x] / most);
    }
}
