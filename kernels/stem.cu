// stem: 3x3 convolution of the image, stride 2, SAME (TensorFlow: even sides pad after only), bias, activation.
// References: stem; in integers requantize.
//
// x (B, H, W, 4) real, the fourth value of a pixel is ignored, H and W even; w (3, 3, 3, C) real; bias (C,)
// float32; out (B, H/2, W/2, C) real. With INTEGER=1 x, w and out int16, `ending` the multipliers (C,).
// Launch: grid (ceil(H/2 * ceil(W/2 / STRIP) * C/VECTOR / blockDim.x), 1, B), any block; a thread has a chunk of the
//   channels of STRIP pixels of a row, which share its weights.
#include "common.cuh"

#define STRIP 4

struct alignas(4 * sizeof(Value)) Pixel { Value at[4]; };

extern "C" __global__ void stem(const Value* x, const Value* w, const float* bias, Activation* out,
                                int height, int width, int c, Ending ending) {
    allow_next_launch();
    const int high = height / 2, wide = width / 2, chunks = c / VECTOR, strips = (wide + STRIP - 1) / STRIP;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= high * strips * chunks) return;
    const int first = i % chunks * VECTOR, column = i / chunks % strips * STRIP, row = i / chunks / strips;
    await_launch();
    const Pixel* pixels = reinterpret_cast<const Pixel*>(x) + (long long)blockIdx.z * height * width;
    Sum sum[STRIP][VECTOR];
#pragma unroll
    for (int o = 0; o < STRIP; o++)
#pragma unroll
        for (int v = 0; v < VECTOR; v++) sum[o][v] = (Sum)bias[first + v];
#pragma unroll
    for (int ky = 0; ky < 3; ky++) {
        const int y_in = 2 * row + ky;
        if (y_in >= height) continue;
        Pixel line[2 * STRIP + 1];
#pragma unroll
        for (int j = 0; j < 2 * STRIP + 1; j++)
            line[j] = 2 * column + j < width ? pixels[y_in * width + 2 * column + j] : Pixel();
#pragma unroll
        for (int kx = 0; kx < 3; kx++)
#pragma unroll
            for (int rgb = 0; rgb < 3; rgb++) {
                const ChunkOf<Value> weight = load_chunk(w + ((ky * 3 + kx) * 3 + rgb) * c + first);
#pragma unroll
                for (int o = 0; o < STRIP; o++)
#pragma unroll
                    for (int v = 0; v < VECTOR; v++) sum[o][v] += get(line[2 * o + kx].at[rgb]) * get(weight.at[v]);
            }
    }
#pragma unroll
    for (int o = 0; o < STRIP; o++) {
        if (column + o >= wide) continue;
        ChunkOf<Activation> result;
#pragma unroll
        for (int v = 0; v < VECTOR; v++) put(result.at[v], finish(sum[o][v], ending, first + v, 2047.f));
        store_chunk(out + (((long long)blockIdx.z * high + row) * wide + column + o) * c + first, result);
    }
}
