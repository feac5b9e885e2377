// product: out = act(a @ w + bias) + residual; the pointwise convolutions, the denoiser's layers, the
// mixing of positions. References: linear, mix; with `gate` the last step of squeeze_excite before linear.
//
// a (B, M, K) real with rows lda apart, w (B, K, N) real with rows ldw apart; a_step and w_step are the
//   elements from one image to the next, 0 where all images share the matrix
// bias (N,) float32 with ldbias = 0, or (period, N) with ldbias = N: row i of a gets bias row i % period; or null
// gate (M / period, K) float32 or null: row i of a is scaled by gate row i / period first
// residual, out (B, M, N) real; residual may be null
// N, lda, ldw and the steps are multiples of 8, and rows of `a` are zero (or finite, against zero rows of w)
//   from K up to the next multiple of 8; w is never read from row K on.
// Launch: grid (ceil(M/TILE) * ceil(N/TILE), 1, B), block 128; TILE 64 or 32, a module for each. A warp
//   owns a quarter of the tile. Whatever TILE, an element is summed in the same order.
//
// All products run on tensor cores. float32 values are split into two halves, x = high + low, and multiplied as
// high*high + low*high + high*low: 22 bits of each factor (values below 65504 in magnitude), float32 sums. With
// PLAIN an ordinary loop over the same tiles, lanes and elements takes their place; tests hold one to the other.
#include "common.cuh"

#ifndef TILE
#define TILE 64
#endif
#define THREADS 128
#define DEPTH 32                 // of K, a step
#define TERMS (HALF ? 1 : 2)     // halves that make up a value
#define A_ROW (DEPTH + 8)        // 16 bytes of padding a row keep the banks apart
#define W_ROW (TILE + 8)
#define CHUNKS (TILE * DEPTH / VECTOR / THREADS)
#define DOWN (TILE / 32)         // 16 x 8 products of a warp, down and across
#define ACROSS (TILE / 16)

typedef unsigned short half_bits;
struct alignas(2 * VECTOR) Halves { half_bits at[VECTOR]; };

// A chunk into shared memory, each term `apart` after the one before.
__device__ __forceinline__ void keep_halves(half_bits* to, int apart, const Chunk& chunk) {
#if HALF
    *reinterpret_cast<Chunk*>(to) = chunk;
#else
    Halves high, low;
#pragma unroll
    for (int v = 0; v < VECTOR; v++) {
        high.at[v] = half_from_float(chunk.at[v]);
        low.at[v] = half_from_float(chunk.at[v] - float_from_half(high.at[v]));
    }
    *reinterpret_cast<Halves*>(to) = high;
    *reinterpret_cast<Halves*>(to + apart) = low;
#endif
}

struct alignas(2 * sizeof(real)) Pair { real at[2]; };

extern "C" __global__ void __launch_bounds__(THREADS) product(
        const real* a, long long a_step, int lda, const real* w, long long w_step, int ldw, const float* bias, int ldbias,
        const float* gate, const real* residual, real* out, int m, int n, int k, int period, int act) {
    __shared__ __align__(16) half_bits tile_a[2][TERMS][TILE * A_ROW];
    __shared__ __align__(16) half_bits tile_w[2][TERMS][DEPTH * W_ROW];
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int tiles_across = (n + TILE - 1) / TILE;
    const int first_row = blockIdx.x / tiles_across * TILE, first_col = blockIdx.x % tiles_across * TILE;
    const int warp_row = warp / 2 * (TILE / 2), warp_col = warp % 2 * (TILE / 2);
    a += blockIdx.z * a_step;
    w += blockIdx.z * w_step;

    Chunk next_a[CHUNKS], next_w[CHUNKS];  // the next step's share of this thread, on its way to shared memory
    auto fetch = [&](int depth) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int at = thread + i * THREADS;
            const int row = first_row + at / (DEPTH / VECTOR), inner = depth + at % (DEPTH / VECTOR) * VECTOR;
            next_a[i] = Chunk();
            if (row < m && inner < k) {
                next_a[i] = load_chunk(a + (long long)row * lda + inner);
                if (gate)
#pragma unroll
                    for (int v = 0; v < VECTOR; v++)
                        put(next_a[i].at[v], get(next_a[i].at[v]) * gate[(long long)(row / period) * k + inner + v]);
            }
            const int down = depth + at / (TILE / VECTOR), col = first_col + at % (TILE / VECTOR) * VECTOR;
            next_w[i] = Chunk();
            if (down < k && col < n) next_w[i] = load_chunk(w + (long long)down * ldw + col);
        }
    };
    auto keep = [&](int buffer) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int at = thread + i * THREADS;
            keep_halves(&tile_a[buffer][0][at / (DEPTH / VECTOR) * A_ROW + at % (DEPTH / VECTOR) * VECTOR], TILE * A_ROW,
                        next_a[i]);
            keep_halves(&tile_w[buffer][0][at / (TILE / VECTOR) * W_ROW + at % (TILE / VECTOR) * VECTOR], DEPTH * W_ROW,
                        next_w[i]);
        }
    };

    float sum[DOWN][ACROSS][4] = {};  // rows lane/4 and lane/4 + 8, columns 2 (lane % 4) and the next
    fetch(0);
    keep(0);
    __syncthreads();
    for (int depth = 0, buffer = 0; depth < k; depth += DEPTH, buffer ^= 1) {
        const bool more = depth + DEPTH < k;
        if (more) fetch(depth + DEPTH);
#ifndef PLAIN
#pragma unroll
        for (int inner = 0; inner < DEPTH; inner += 16) {
            unsigned left[TERMS][DOWN][4], right[TERMS][ACROSS / 2][4];
            const int a_at = (warp_row + lane % 16) * A_ROW + inner + lane / 16 * 8;
            const int w_at = (inner + lane % 16) * W_ROW + warp_col + lane / 16 * 8;
#pragma unroll
            for (int term = 0; term < TERMS; term++) {
#pragma unroll
                for (int i = 0; i < DOWN; i++) load_matrices(left[term][i], &tile_a[buffer][term][a_at + i * 16 * A_ROW]);
#pragma unroll
                for (int j = 0; j < ACROSS / 2; j++)
                    load_matrices_transposed(right[term][j], &tile_w[buffer][term][w_at + j * 16]);
            }
#pragma unroll
            for (int i = 0; i < DOWN; i++)
#pragma unroll
                for (int j = 0; j < ACROSS; j++) {
                    if (TERMS == 2) {  // small before large
                        multiply_add(sum[i][j], left[TERMS - 1][i], &right[0][j / 2][j % 2 * 2]);
                        multiply_add(sum[i][j], left[0][i], &right[TERMS - 1][j / 2][j % 2 * 2]);
                    }
                    multiply_add(sum[i][j], left[0][i], &right[0][j / 2][j % 2 * 2]);
                }
        }
#else
        for (int inner = 0; inner < DEPTH; inner++)
            for (int i = 0; i < DOWN; i++)
                for (int j = 0; j < ACROSS; j++)
                    for (int h = 0; h < 4; h++) {
                        const int row = warp_row + i * 16 + h / 2 * 8 + lane / 4;
                        const int col = warp_col + j * 8 + lane % 4 * 2 + h % 2;
                        float left = 0.f, right = 0.f;
                        for (int term = 0; term < TERMS; term++) {
                            left += float_from_half(tile_a[buffer][term][row * A_ROW + inner]);
                            right += float_from_half(tile_w[buffer][term][inner * W_ROW + col]);
                        }
                        sum[i][j][h] = fmaf(left, right, sum[i][j][h]);
                    }
#endif
        if (more) keep(buffer ^ 1);
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + warp_row + i * 16 + h * 8 + lane / 4;
            if (row >= m) continue;
            const float* offset = bias ? bias + (long long)(ldbias ? row % period : 0) * ldbias : nullptr;
#pragma unroll
            for (int j = 0; j < ACROSS; j++) {
                const int col = first_col + warp_col + j * 8 + lane % 4 * 2;
                if (col >= n) continue;
                const long long to = ((long long)blockIdx.z * m + row) * n + col;
                Pair result;
#pragma unroll
                for (int p = 0; p < 2; p++) {
                    const float y = activate(sum[i][j][h * 2 + p] + (offset ? offset[col + p] : 0.f), act);
                    put(result.at[p], residual ? y + get(residual[to + p]) : y);
                }
                *reinterpret_cast<Pair*>(out + to) = result;
            }
        }
}
