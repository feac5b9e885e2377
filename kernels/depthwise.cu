// depthwise: depthwise convolution, SAME padding, bias, activation; sums for squeeze-excitation on the way.
// References: depthwise; in integers requantize.
//
// x (B, H, W, C) real; w (k, k, C) real; bias (C,) float32; out (B, Ho, Wo, C) real, Ho = ceil(H/stride).
// sums (B, gridDim.y, C) float32 or null: the outputs of each block summed over its pixels, in a fixed order.
// top, left: rows and columns of zero padding before the map.
// With INTEGER=1 x and w int16, out u8, `ending` the multipliers (C,), and sums null.
// Launch: depthwise_KS for kernel K (3, 5) and stride S (1, 2); threadIdx.x a chunk of channels, threadIdx.y a
//   strip of STRIP outputs of a row; grid (ceil(C/VECTOR / blockDim.x), ceil(Ho * ceil(Wo/STRIP) / blockDim.y), B),
//   blockDim.x * blockDim.y up to 128. Large maps take strips of 4; with SMALL=1 strips of 2, and K threads share
//   one, threadIdx.z a row of the filter, so that there are enough of them to hide what reading takes. An output
//   has the same bits in both; which of its block's sums it is in differs.
#include "common.cuh"

#ifndef SMALL
#define SMALL 0
#endif
#define STRIP (SMALL ? 2 : 4)
#define MOST_PLACES 128

template <int KERNEL, int STRIDE>
__device__ __forceinline__ void convolve(const Activation* x, const Value* w, const float* bias, Depth* out,
                                         float* sums, Sum* part, int height, int width, int c, int top, int left,
                                         Ending ending) {
    allow_next_launch();
    const int height_out = (height + STRIDE - 1) / STRIDE, width_out = (width + STRIDE - 1) / STRIDE;
    const int strips = (width_out + STRIP - 1) / STRIP;
    const int first = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    const int strip = blockIdx.y * blockDim.y + threadIdx.y, place = threadIdx.y * blockDim.x + threadIdx.x;
    const int row = strip / strips, column = strip % strips * STRIP;
    const bool works = first < c && row < height_out;
    Sum sum[STRIP][VECTOR] = {};
    float total[VECTOR] = {};
    await_launch();
    if (works) {
        x += (long long)blockIdx.z * height * width * c + first;
        out += (((long long)blockIdx.z * height_out + row) * width_out + column) * c + first;
#pragma unroll
        for (int i = 0; i < KERNEL; i++) {
            const int y_in = row * STRIDE - top + i;
            if (y_in < 0 || y_in >= height || (SMALL && i != threadIdx.z)) continue;
            Sum line[STRIP][VECTOR] = {};  // of one row of the filter, as threads that share a strip have it
            ChunkOf<Value> taps[KERNEL];
#pragma unroll
            for (int j = 0; j < KERNEL; j++) taps[j] = load_chunk(w + (i * KERNEL + j) * c + first);
#pragma unroll
            for (int j = 0; j < (STRIP - 1) * STRIDE + KERNEL; j++) {
                const int x_in = column * STRIDE - left + j;
                const ChunkOf<Activation> pixel =
                    x_in < 0 || x_in >= width ? ChunkOf<Activation>()
                                              : load_chunk(x + ((long long)y_in * width + x_in) * c);
#pragma unroll
                for (int o = 0; o < STRIP; o++)
                    if (j - o * STRIDE >= 0 && j - o * STRIDE < KERNEL)
#pragma unroll
                        for (int v = 0; v < VECTOR; v++) line[o][v] += get(pixel.at[v]) * get(taps[j - o * STRIDE].at[v]);
            }
#pragma unroll
            for (int o = 0; o < STRIP; o++)
#pragma unroll
                for (int v = 0; v < VECTOR; v++) sum[o][v] += line[o][v];
        }
    }
#if SMALL
    if (threadIdx.z > 0)
#pragma unroll
        for (int o = 0; o < STRIP; o++)
#pragma unroll
            for (int v = 0; v < VECTOR; v++)
                part[((threadIdx.z - 1) * STRIP * VECTOR + o * VECTOR + v) * MOST_PLACES + place] = sum[o][v];
    __syncthreads();
#endif
    if (works && threadIdx.z == 0) {
#pragma unroll
        for (int o = 0; o < STRIP; o++) {
            if (column + o >= width_out) continue;
            ChunkOf<Depth> result;
#pragma unroll
            for (int v = 0; v < VECTOR; v++) {
                Sum all = sum[o][v];
#if SMALL
#pragma unroll
                for (int i = 0; i < KERNEL - 1; i++)
                    all += part[(i * STRIP * VECTOR + o * VECTOR + v) * MOST_PLACES + place];
#endif
                const float y = finish(all + bias[first + v], ending, first + v, 255.f);
                total[v] += y;
                put(result.at[v], y);
            }
            store_chunk(out + (long long)o * c, result);
        }
    }
    if (INTEGER || !sums) return;
    if (SMALL) __syncthreads();  // what was shared has been read
    if (threadIdx.z == 0)
#pragma unroll
        for (int v = 0; v < VECTOR; v++) part[place * VECTOR + v] = total[v];
    __syncthreads();
    if (threadIdx.z > 0 || threadIdx.y > 0 || first >= c) return;
    for (int v = 0; v < VECTOR; v++) {
        float y = 0.f;
        for (int t = 0; t < blockDim.y; t++) y += part[(t * blockDim.x + threadIdx.x) * VECTOR + v];
        sums[((long long)blockIdx.z * gridDim.y + blockIdx.y) * c + first + v] = y;
    }
}

#define DEPTHWISE(KERNEL, STRIDE)                                                                                       \
    extern "C" __global__ void __launch_bounds__(MOST_PLACES * (SMALL ? KERNEL : 1)) depthwise_##KERNEL##STRIDE(        \
            const Activation* x, const Value* w, const float* bias, Depth* out, float* sums, int height,                \
            int width, int c, int top, int left, Ending ending) {                                                       \
        __shared__ Sum part[MOST_PLACES * VECTOR * (SMALL ? (KERNEL - 1) * STRIP : 1)];                                 \
        convolve<KERNEL, STRIDE>(x, w, bias, out, sums, part, height, width, c, top, left, ending);                     \
    }

DEPTHWISE(3, 1)
DEPTHWISE(3, 2)
DEPTHWISE(5, 1)
DEPTHWISE(5, 2)
