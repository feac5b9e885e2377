// anomaly_map: the fine map at the image's own size, two samples a side.
// Reference: anomaly_map, whose taps are those of linear_taps.
//
// m (B, height, width) float32; images[b]: start and share of its rows and columns, map (H, W) float32; a null map is skipped.
// Launch: grid (any, 1, B), any block; a block takes every gridDim.x-th row, so the grid need not know the sizes.
#include "common.cuh"

extern "C" __global__ void anomaly_map(const float* m, const Image* images, int height, int width) {
    allow_next_launch();
    await_launch();
    const Image image = images[blockIdx.z];
    if (!image.map) return;
    m += (long long)blockIdx.z * height * width;
    for (long long y = blockIdx.x; y < image.height; y += gridDim.x) {
        const float* above = m + image.map_row[y] * width;
        const float down = image.map_row_share[y];
        for (int x = threadIdx.x; x < image.width; x += blockDim.x) {
            const float* at = above + image.map_col[x];
            const float right = image.map_col_share[x];
            image.map[y * image.width + x] = (1.f - down) * ((1.f - right) * at[0] + right * at[1])
                                             + down * ((1.f - right) * at[width] + right * at[width + 1]);
        }
    }
}
