// resize_normalize: u8 pixels -> (x/255 - mean)/std at height x width, triangle filter.
// Reference: resize_normalize, taps from resize_taps.
//
// images (B,) table; out (B, height, width, 4) real, the fourth value of a pixel is 0.
// affine (6,): out = value * affine[channel] + affine[3 + channel], that is 1/(255 std), then -mean/std.
// Launch: grid (ceil(height*width / blockDim.x), 1, B), any block; a thread an output pixel.
#include "common.cuh"

struct alignas(4 * sizeof(real)) Pixel { real at[4]; };

extern "C" __global__ void resize_normalize(const Image* images, const float* affine, real* out, int height,
                                            int width) {
    allow_next_launch();
    await_launch();
    const Image image = images[blockIdx.z];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= height * width) return;
    const int y = i / width, x = i % width;
    const int row_taps = (int)image.row_taps, col_taps = (int)image.col_taps;
    const float* row_weight = image.row_weight + y * row_taps;
    const float* col_weight = image.col_weight + x * col_taps;
    const unsigned char* corner = image.pixels + ((long long)image.row_start[y] * image.width + image.col_start[x]) * 3;
    float rgb[3] = {0.f, 0.f, 0.f};
    for (int r = 0; r < row_taps; r++) {
        if (row_weight[r] == 0.f) continue;
        const unsigned char* pixel = corner + (long long)r * image.width * 3;
        float line[3] = {0.f, 0.f, 0.f};
        for (int t = 0; t < col_taps; t++, pixel += 3)
            for (int c = 0; c < 3; c++) line[c] += col_weight[t] * (float)pixel[c];
        for (int c = 0; c < 3; c++) rgb[c] += row_weight[r] * line[c];
    }
    Pixel pixel;
    for (int c = 0; c < 3; c++) put(pixel.at[c], rgb[c] * affine[c] + affine[3 + c]);
    put(pixel.at[3], 0.f);
    reinterpret_cast<Pixel*>(out)[(long long)blockIdx.z * height * width + i] = pixel;
}
