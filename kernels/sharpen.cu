// sharpen: the cells weight * z + offset enlarged to the fine grid, times sqrt(f / its maximum over 5 x 5 places).
// Reference: sharpen, down and across from map_operator, weight and offset from Prior._map_weights.
//
// z (B, ldz), of which the first are those of (rows, columns), weight, offset (rows, columns), f (B, height, width), down (height, rows), across (width,
// columns), out (B, height, width) float32, columns <= MOST_COLUMNS; of images whose map is wanted.
// Launch: grid (height, 1, B), any block; a block has a row of the fine grid.
#include "common.cuh"

#define MOST_COLUMNS 512
#define REACH 2

__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN if one is

extern "C" __global__ void sharpen(const float* z, const float* weight, const float* offset, const float* f,
                                   const float* down, const float* across, float* out, const Image* images,
                                   int height, int rows, int width, int columns, int ldz) {
    allow_next_launch();
    __shared__ float mixed[MOST_COLUMNS];
    await_launch();
    if (!images[blockIdx.z].map) return;
    const int y = blockIdx.x;
    z += (long long)blockIdx.z * ldz;
    f += (long long)blockIdx.z * height * width;
    out += (long long)blockIdx.z * height * width;
    for (int j = threadIdx.x; j < columns; j += blockDim.x) {
        float sum = 0.f;
#pragma unroll 8
        for (int i = 0; i < rows; i++) {
            const int at = i * columns + j;
            sum += down[y * rows + i] * (weight[at] * z[at] + offset[at]);
        }
        mixed[j] = sum;
    }
    __syncthreads();
    for (int x = threadIdx.x; x < width; x += blockDim.x) {
        float sum = 0.f, most = 1.17549435e-38f;
#pragma unroll 8
        for (int j = 0; j < columns; j++) sum += mixed[j] * across[x * columns + j];
#pragma unroll
        for (int i = -REACH; i <= REACH; i++)  // beyond the border, the border again
#pragma unroll
            for (int j = -REACH; j <= REACH; j++)
                most = larger(f[min(max(y + i, 0), height - 1) * width + min(max(x + j, 0), width - 1)], most);
        out[y * width + x] = sum * sqrtf(f[y * width + x] / most);
    }
}
