// stem: 3x3 convolution of the image, stride 2, SAME (TensorFlow: even S pads after only), bias, activation.
// Reference: stem.
//
// x (B, S, S, 4) real, the fourth value of a pixel is ignored, S even; w (3, 3, 3, C) real; bias (C,)
// float32; out (B, S/2, S/2, C) real.
// Launch: grid (ceil(S/2 * S/2 * C/VECTOR / blockDim.x), 1, B), any block; a thread a pixel's chunk of channels.
#include "common.cuh"

struct alignas(4 * sizeof(real)) Pixel { real at[4]; };

extern "C" __global__ void stem(const real* x, const real* w, const float* bias, real* out, int size, int c, int act) {
    const int side = size / 2, chunks = c / VECTOR;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= side * side * chunks) return;
    const int first = i % chunks * VECTOR, column = i / chunks % side, row = i / chunks / side;
    const Pixel* pixels = reinterpret_cast<const Pixel*>(x) + (long long)blockIdx.z * size * size;
    float sum[VECTOR];
#pragma unroll
    for (int v = 0; v < VECTOR; v++) sum[v] = bias[first + v];
#pragma unroll
    for (int ky = 0; ky < 3; ky++)
#pragma unroll
        for (int kx = 0; kx < 3; kx++) {
            const int y_in = 2 * row + ky, x_in = 2 * column + kx;
            if (y_in >= size || x_in >= size) continue;
            const Pixel pixel = pixels[y_in * size + x_in];
#pragma unroll
            for (int rgb = 0; rgb < 3; rgb++) {
                const Chunk weight = load_chunk(w + ((ky * 3 + kx) * 3 + rgb) * c + first);
#pragma unroll
                for (int v = 0; v < VECTOR; v++) sum[v] += get(pixel.at[rgb]) * get(weight.at[v]);
            }
        }
    Chunk result;
#pragma unroll
    for (int v = 0; v < VECTOR; v++) put(result.at[v], activate(sum[v], act));
    store_chunk(out + ((long long)blockIdx.z * side * side + i / chunks) * c + first, result);
}
