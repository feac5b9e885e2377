// product: out = act(a @ w + bias) + residual; the pointwise convolutions, the denoiser's layers, the
// mixing of positions. References: linear, mix; with `gate` the last step of squeeze_excite before linear;
// in integers linear, then requantize.
//
// a (B, M, K) real with rows lda apart; with TRANSPOSED=1 (B, K, M), and out and residual are (B, N, M).
//   a_step: elements from one image to the next
// w: what `fragments` of cuda.py packs of (K, N): tiles of 16 x 16 halves as a warp's lanes multiply them, K and N
//   filled with zeros up to multiples of 16 and 32; with WIDE=1 every tile is followed by what rounding it left over
// bias (N,) float32 with ldbias = 0, or (period, N) with ldbias = N: row i of a gets bias row i % period; or null
// gate (M / period, K) float32 or null: row i of a is scaled by gate row i / period first; not if TRANSPOSED
// residual, out (B, M, N) real; residual may be null
// N, lda and K are multiples of 8 (TRANSPOSED: M and lda are).
// INTEGER=1 (EXPAND): a int16, requantized by `gate` first, (2,): multiplier and limit, out int16;
// INTEGER=2 (PROJECT): a u8, residual and out int16. Bias holds integers, `ending` multipliers (N,); neither WIDE nor TRANSPOSED.
// Launch: block 32 * WARPS, grid (ceil(tiles * split / WARPS), 1, B), tiles = ceil(M/TILE) * ceil(N/32); TILE 32 or 16
//   and WARPS 4 or 8, a module for each. `split` warps share a tile, and divide WARPS: each takes every split-th 16 of K.
//   An element is summed in an order that only `split` sets, so that a score does not depend on its batch.
//
// All products run on tensor cores. float32 values are split into two halves, x = high + low, and multiplied as
// low*high + high*high (and high*low where w is WIDE): 22 bits of each factor down to the halves' 6e-8, values below
// 65504 in magnitude (others make NaN), float32 sums. Nothing goes through shared memory before it is multiplied: of
// every 16 of K a lane takes four neighbours of a row in one load, and w is packed in that order.
#include "common.cuh"

#define EXPAND 1
#define PROJECT 2
#if INTEGER == PROJECT
typedef Depth In;
typedef Value Out;
#else
typedef Value In;
typedef Activation Out;
#endif

#ifndef TILE
#define TILE 32
#endif
#ifndef WIDE
#define WIDE 0
#endif
#ifndef TRANSPOSED
#define TRANSPOSED 0
#endif
#ifndef WARPS
#define WARPS 8                    // of a block
#endif
#define COLUMNS 32
#define TERMS (HALF || INTEGER ? 1 : 2) // halves that make up a value of a
#define DOWN (TILE / 16)           // 16 x 8 products of a tile, down and across
#define ACROSS (COLUMNS / 8)
#define ROW (COLUMNS + 8)          // padding keeps the banks apart
#define AHEAD (TILE == 16 ? 2 : 1) // sixteens of K that are fetched at a time

struct alignas(16) Packed { unsigned at[4]; };  // a lane's share of a tile of w: columns lane/4 and lane/4 + 8
template <class T> struct alignas(4 * sizeof(T)) QuadOf { T at[4]; };
typedef QuadOf<In> Quad;
struct Fetched { Quad a[DOWN][2]; Packed w[COLUMNS / 16][WIDE + 1]; };

extern "C" __global__ void __launch_bounds__(WARPS * 32) product(
        const In* a, long long a_step, int lda, const Packed* w, const float* bias, int ldbias, const float* gate,
        const Out* residual, Out* out, int m, int n, int k, int period, Ending ending, int split) {
    allow_next_launch();
    __shared__ __align__(16) float part[WARPS][TILE][ROW];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = warp % split;
    const int across = (n + COLUMNS - 1) / COLUMNS, sixteens = (k + 15) / 16;
    const int tile = blockIdx.x * (WARPS / split) + warp / split;
    const int first_row = tile / across * TILE, first_col = tile % across * COLUMNS;
    a += blockIdx.z * a_step;
    w += (long long)first_col / 16 * sixteens * (WIDE + 1) * 32 + lane;

    const In* rows[DOWN][2];  // null: beyond the last row
    const float* gates[DOWN][2];
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = first_row + i * 16 + h * 8 + lane / 4;
            rows[i][h] = row < m ? a + (TRANSPOSED ? row : (long long)row * lda) : nullptr;
            gates[i][h] = gate ? gate + (long long)(row / period) * k : nullptr;
        }

    auto fetch = [&](Fetched& to, int sixteen) {
        const int inner = sixteen * 16 + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                Quad quad = Quad();
                if (rows[i][h] && inner < k) {
                    if (TRANSPOSED) {
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            if (inner + e < k) quad.at[e] = rows[i][h][(long long)(inner + e) * lda];
                    } else {
                        CHECK_ALIGNED(rows[i][h] + inner, sizeof(Quad));
                        quad = *reinterpret_cast<const Quad*>(rows[i][h] + inner);
                        if (gate && !INTEGER)
#pragma unroll
                            for (int e = 0; e < 4; e++) put(quad.at[e], get(quad.at[e]) * gates[i][h][inner + e]);
                    }
                }
                to.a[i][h] = quad;
            }
#pragma unroll
        for (int j = 0; j < COLUMNS / 16; j++)
#pragma unroll
            for (int term = 0; term <= WIDE; term++)
                to.w[j][term] = w[((long long)j * sixteens + sixteen) * (WIDE + 1) * 32 + term * 32];
    };

    float sum[DOWN][ACROSS][4] = {};  // rows lane/4 and lane/4 + 8, columns 2 (lane % 4) and the next
    auto multiply = [&](const Fetched& from) {
        unsigned left[TERMS][DOWN][4];
#pragma unroll
        for (int i = 0; i < DOWN; i++)
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const In* two = from.a[i][r % 2].at + r / 2 * 2;
#if INTEGER == PROJECT
                unsigned halves[2];
                halves_from_bytes(halves, two[0] | two[1] << 8, 0);
                left[0][i][r] = halves[0];
#elif INTEGER == EXPAND
                left[0][i][r] = pair_of(half_from_float(requantize(two[0], gate[0], -gate[1], gate[1])),
                                        half_from_float(requantize(two[1], gate[0], -gate[1], gate[1])));
#elif HALF
                left[0][i][r] = pair_of(two[0].bits, two[1].bits);
#else
                const unsigned short high[2] = {half_from_float(two[0]), half_from_float(two[1])};
                left[0][i][r] = pair_of(high[0], high[1]);
                left[TERMS - 1][i][r] = pair_of(half_from_float(two[0] - float_from_half(high[0])),
                                                half_from_float(two[1] - float_from_half(high[1])));
#endif
            }
        auto add = [&](int of_a, int of_w) {
#pragma unroll
            for (int i = 0; i < DOWN; i++)
#pragma unroll
                for (int j = 0; j < ACROSS; j++)
                    multiply_add(sum[i][j], left[of_a][i], &from.w[j / 2][of_w].at[j % 2 * 2]);
        };
        if (TERMS == 2) add(TERMS - 1, 0);  // small before large
        if (WIDE) add(0, WIDE);
        add(0, 0);
    };

    await_launch();
    if (first_row < m) {
        Fetched next[AHEAD];
#pragma unroll
        for (int p = 0; p < AHEAD; p++)
            if (slice + p * split < sixteens) fetch(next[p], slice + p * split);
        for (int sixteen = slice; sixteen < sixteens; sixteen += AHEAD * split) {
            Fetched now[AHEAD];
#pragma unroll
            for (int p = 0; p < AHEAD; p++) {
                now[p] = next[p];
                const int then = sixteen + (AHEAD + p) * split;
                if (then < sixteens) fetch(next[p], then);
            }
#pragma unroll
            for (int p = 0; p < AHEAD; p++)
                if (sixteen + p * split < sixteens) multiply(now[p]);
        }
    }
#pragma unroll
    for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < ACROSS; j++)
#pragma unroll
            for (int h = 0; h < 4; h++)
                part[warp][i * 16 + h / 2 * 8 + lane / 4][j * 8 + lane % 4 * 2 + h % 2] = sum[i][j][h];
    __syncthreads();
    if (first_row >= m) return;

    const int first = warp - slice;
#pragma unroll 1  // more would cost more registers than it gains
    for (int t = slice * 32 + lane; t < TILE * COLUMNS / 4; t += split * 32) {  // four neighbours of out
        const int row = TRANSPOSED ? t % (TILE / 4) * 4 : t / (COLUMNS / 4);
        const int col = TRANSPOSED ? t / (TILE / 4) : t % (COLUMNS / 4) * 4;
        if (first_row + row >= m || first_col + col >= n) continue;
        float y[4] = {};
        for (int s = 0; s < split; s++)
#pragma unroll
            for (int e = 0; e < 4; e++) y[e] += part[first + s][row + TRANSPOSED * e][col + !TRANSPOSED * e];
        const long long to = TRANSPOSED ? ((long long)blockIdx.z * n + first_col + col) * m + first_row + row
                                        : ((long long)blockIdx.z * m + first_row + row) * n + first_col + col;
        const float* offset = bias + (long long)(ldbias ? (first_row + row) % period : 0) * ldbias + first_col + col;
        QuadOf<Out> result, rest = QuadOf<Out>();
        CHECK_ALIGNED(out + to, sizeof(result));
        if (residual) rest = *reinterpret_cast<const QuadOf<Out>*>(residual + to);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float total = y[e] + (bias ? offset[e] : 0.f);
#if INTEGER == PROJECT
            const float own = requantize(total, ending[first_col + col + e], -32767.f, 32767.f);
            put(result.at[e], clip(own + get(rest.at[e]), -32767.f, 32767.f));
#else
            put(result.at[e], finish(total, ending, first_col + col + e, 2047.f) + get(rest.at[e]));
#endif
        }
        *reinterpret_cast<QuadOf<Out>*>(out + to) = result;
    }
}
