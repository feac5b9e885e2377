// resize_normalize: u8 pixels -> (x/255 - mean)/std at height x width, triangle filter.
// resize_integers: the same in quarters of a grey level, less 510, integers.
// References: resize_normalize, taps from resize_taps; resize_integers, taps from fixed_point_taps.
//
// images (B,) table; out (B, height, width, 4) real, the fourth value of a pixel is 0.
// integers (B, height, width, 4) int16, the fourth value of a pixel is 0. All sums are of integers below 2^24.
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

struct alignas(8) IntegerPixel { short at[4]; };

extern "C" __global__ void resize_integers(const Image* images, IntegerPixel* integers, int height, int width) {
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
    for (int t = 0; t < col_taps; t++) {
        if (col_weight[t] == 0.f) continue;
        const unsigned char* pixel = corner + t * 3;
        float down[3] = {0.f, 0.f, 0.f};
        for (int r = 0; r < row_taps; r++, pixel += image.width * 3)
            for (int c = 0; c < 3; c++) down[c] += row_weight[r] * (float)pixel[c];
        for (int c = 0; c < 3; c++) rgb[c] += col_weight[t] * floorf(down[c] / 256.f + .5f);
    }
    IntegerPixel pixel = {};
    for (int c = 0; c < 3; c++) pixel.at[c] = (short)(floorf(rgb[c] / 16384.f + .5f) - 510.f);
    integers[(long long)blockIdx.z * height * width + i] = pixel;
}
