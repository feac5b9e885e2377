// anomaly_map: smooth and enlarge weight * z + offset to the image's own size, rows @ cells @ cols^T in one.
// Reference: anomaly_map, operators from map_operator, weight and offset from Prior._map_weights.
//
// z (B, G, G), weight, offset (G, G) float32, G <= 64; images[b]: row_map (H, G), col_map (G, W), map (H, W) float32; a null map is skipped.
// Launch: grid (any, 1, B), any block; a block takes every gridDim.x-th row, so the grid need not know the sizes.
#include "common.cuh"

#define MOST_GRID 64

extern "C" __global__ void anomaly_map(const float* z, const float* weight, const float* offset,
                                       const Image* images, int grid) {
    __shared__ float mixed[MOST_GRID];
    const Image image = images[blockIdx.z];
    if (!image.map) return;
    z += (long long)blockIdx.z * grid * grid;
    for (long long y = blockIdx.x; y < image.height; y += gridDim.x) {
        for (int j = threadIdx.x; j < grid; j += blockDim.x) {
            float sum = 0.f;
            for (int i = 0; i < grid; i++)
                sum += image.row_map[y * grid + i] * (weight[i * grid + j] * z[i * grid + j] + offset[i * grid + j]);
            mixed[j] = sum;
        }
        __syncthreads();
        for (int x = threadIdx.x; x < image.width; x += blockDim.x) {
            float sum = 0.f;
            for (int j = 0; j < grid; j++) sum += mixed[j] * image.col_map[j * image.width + x];
            image.map[y * image.width + x] = sum;
        }
        __syncthreads();
    }
}
