// whiten: x0_n = W_n (f_n - mean_n) for every position n, W_n lower-triangular, read once for IMAGES images.
// Reference: whiten; w (N, P(P+1)/2) is what pack_lower returns, in either mode.
//
// f (B, N, C) float32; mean (N, C) float32; x (B, N, C) real; C a multiple of 32, P = C/32.
// Launch: grid (N * P, 1, ceil(B / IMAGES)), block a multiple of 32 up to 256, which sets the order of the sums. Of a
//   warp, four lanes share a column of W, each with eight rows (8 bytes); warps and lanes are added at the end.
//
// whiten_diagonal: w (N, C) float32. Grid (ceil(N*C / blockDim.x), 1, B), any block.
#include "common.cuh"

#define IMAGES 8
#define MOST_WARPS 8

struct alignas(8) Rows { signed char at[8]; };

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) whiten(const float* f, const float* mean,
                                                                     const Qtile* w, real* x, int n, int c,
                                                                     int batch) {
    __shared__ float part[MOST_WARPS][IMAGES][PANEL];
    const int panels = c / PANEL, position = blockIdx.x / panels, panel = blockIdx.x % panels;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int first = blockIdx.z * IMAGES, images = min(IMAGES, batch - first);
    w += (long long)position * (panels * (panels + 1) / 2) + panel * (panel + 1) / 2;
    f += ((long long)first * n + position) * c;
    mean += (long long)position * c;
    float sum[IMAGES][8] = {};
    for (int column = warp * 8 + lane / 4; column < (panel + 1) * PANEL; column += warps * 8) {
        const Qtile& block = w[column / PANEL];
        const Rows rows = *reinterpret_cast<const Rows*>(block.weight[column % PANEL] + lane % 4 * 8);
        float weight[8];
#pragma unroll
        for (int r = 0; r < 8; r++) weight[r] = block.scale[lane % 4 * 8 + r] * rows.at[r];
#pragma unroll
        for (int i = 0; i < IMAGES; i++)
            if (i < images) {
                const float d = f[(long long)i * n * c + column] - mean[column];
#pragma unroll
                for (int r = 0; r < 8; r++) sum[i][r] += weight[r] * d;
            }
    }
#pragma unroll
    for (int i = 0; i < IMAGES; i++)
        if (i < images)
#pragma unroll
            for (int r = 0; r < 8; r++) {
                float y = sum[i][r];
                for (int other = 4; other < 32; other *= 2) y += __shfl_xor_sync(0xffffffffu, y, other);
                if (lane < 4) part[warp][i][lane * 8 + r] = y;
            }
    __syncthreads();
    for (int t = threadIdx.x; t < images * PANEL; t += blockDim.x) {
        float y = 0.f;
        for (int k = 0; k < warps; k++) y += part[k][t / PANEL][t % PANEL];
        put(x[((long long)(first + t / PANEL) * n + position) * c + panel * PANEL + t % PANEL], y);
    }
}

extern "C" __global__ void whiten_diagonal(const float* f, const float* mean, const float* w, real* x, int n, int c) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const long long at = (long long)blockIdx.z * n * c + i;
    if (i < n * c) put(x[at], w[i] * (f[at] - mean[i]));
}
