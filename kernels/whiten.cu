// whiten: x0_n = W_n (f_n - mean_n) for every position n, W_n lower-triangular, read once for 16 images.
// Reference: whiten; w (N, P(P+1)/2) is what pack_lower returns, each tile in the order of `byte_fragments` of cuda.py.
//
// f (B, N, C) float32; mean (N, C) float32; x (B, N, C) real; C a multiple of 32, P = C/32.
// Launch: grid (N * P, 1, ceil(B / 16)), block a multiple of 32 up to 128, which sets the order of the sums: warps share
//   the tiles of a row of W, and are added at the end.
// On tensor cores: the weights, 8 bits, are halves exactly; f - mean is split into high + low / 2048, halves that are
//   multiplied apart, so that 22 bits remain of differences down to 1e-4, and 1.5e-11 below (whitening magnifies what
//   hardly varies).
//
// whiten_diagonal: w (N, C) float32. Grid (ceil(N*C / blockDim.x), 1, B), any block.
#include "common.cuh"

#define IMAGES 16
#define MOST_WARPS 4
#define ACROSS (PANEL / 8)
#define ROW (PANEL + 8)
#define LOW 2048.f

struct alignas(16) Packed { unsigned at[ACROSS]; };  // a lane's share of 16 rows: four of each column lane/4 + 8 j
struct alignas(16) Tile { float scale[PANEL]; Packed weight[PANEL / 16][32]; };
struct alignas(16) Four { float at[4]; };

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) whiten(const float* f, const float* mean, const Tile* w,
                                                                     real* x, int n, int c, int batch) {
    allow_next_launch();
    __shared__ float part[MOST_WARPS][IMAGES][ROW];
    const int panels = c / PANEL, position = blockIdx.x / panels, panel = blockIdx.x % panels;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int first = blockIdx.z * IMAGES;
    await_launch();
    w += (long long)position * (panels * (panels + 1) / 2) + panel * (panel + 1) / 2;
    f += ((long long)first * n + position) * c;
    mean += (long long)position * c;
    float sum[ACROSS][4] = {};  // images lane/4 and lane/4 + 8, columns 2 (lane % 4) and the next of eight
    for (int step = warp; step <= panel; step += warps) {
        const Tile& tile = w[step];
        float high[ACROSS][4] = {}, low[ACROSS][4] = {};
#pragma unroll
        for (int half = 0; half < PANEL / 16; half++) {
            const int column = step * PANEL + half * 16 + lane % 4 * 4;
            const Packed weight = tile.weight[half][lane];
            const Four middle = *reinterpret_cast<const Four*>(mean + column);
            unsigned left[2][4];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                Four value = middle;
                if (first + h * 8 + lane / 4 < batch)
                    value = *reinterpret_cast<const Four*>(f + (long long)(h * 8 + lane / 4) * n * c + column);
                unsigned short bits[2][4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float away = value.at[e] - middle.at[e];
                    bits[0][e] = half_from_float(away);
                    bits[1][e] = half_from_float((away - float_from_half(bits[0][e])) * LOW);
                }
#pragma unroll
                for (int term = 0; term < 2; term++) {
                    left[term][h] = pair_of(bits[term][0], bits[term][1]);
                    left[term][h + 2] = pair_of(bits[term][2], bits[term][3]);
                }
            }
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                unsigned right[2];
                halves_from_bytes(right, weight.at[j]);
                multiply_add(low[j], left[1], right);
                multiply_add(high[j], left[0], right);
            }
        }
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sum[j][i] += tile.scale[j * 8 + lane % 4 * 2 + i % 2] * (high[j][i] + low[j][i] * (1.f / LOW));
    }
#pragma unroll
    for (int j = 0; j < ACROSS; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) part[warp][i / 2 * 8 + lane / 4][j * 8 + lane % 4 * 2 + i % 2] = sum[j][i];
    __syncthreads();
    for (int t = threadIdx.x; t < min(IMAGES, batch - first) * PANEL; t += blockDim.x) {
        float y = 0.f;
        for (int k = 0; k < warps; k++) y += part[k][t / PANEL][t % PANEL];
        put(x[((long long)(first + t / PANEL) * n + position) * c + panel * PANEL + t % PANEL], y);
    }
}

extern "C" __global__ void whiten_diagonal(const float* f, const float* mean, const float* w, real* x, int n, int c) {
    allow_next_launch();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const long long at = (long long)blockIdx.z * n * c + i;
    await_launch();
    if (i < n * c) put(x[at], w[i] * (f[at] - mean[i]));
}
