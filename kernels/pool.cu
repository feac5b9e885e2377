// pool: average of a stage's map over the cells of a lattice, into its columns of the token matrix.
// Reference: pool.
//
// x (B, down * cell, across * cell, ldx) real; out (B, down * across, columns) float32, written from column
// `first` to `first + channels`: float32, because whitening subtracts the mean and magnifies the rest. The
// `fill` columns after that become zero (the last stage pads the matrix to whole panels). With INTEGER=1 x int16,
// and the exact sum, rounded to float32, is multiplied by `scale`, that of the map over the pixels of a cell.
// Launch: grid (ceil(down * across * ceil((channels+fill)/VECTOR) / blockDim.x), 1, B), any block; a thread a chunk of a cell.
#include "common.cuh"

#if INTEGER
typedef long long Total;
#else
typedef float Total;
#endif

extern "C" __global__ void pool(const Value* x, float* out, int cell, int ldx, int channels, int fill, int down,
                                int across, int first, int columns, float scale) {
    allow_next_launch();
    const int chunks = (channels + fill + VECTOR - 1) / VECTOR, wide = across * cell;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    await_launch();
    if (i >= down * across * chunks) return;
    const int channel = i % chunks * VECTOR, position = i / chunks;
    const int top = position / across * cell, left = position % across * cell;
    x += (long long)blockIdx.z * down * cell * wide * ldx + channel;
    Total sum[VECTOR] = {};
    for (int y = top; channel < channels && y < top + cell; y++)
        for (int column = left; column < left + cell; column++) {
            const ChunkOf<Value> place = load_chunk(x + ((long long)y * wide + column) * ldx);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) sum[v] += get(place.at[v]);
        }
    out += ((long long)blockIdx.z * down * across + position) * columns + first + channel;
#pragma unroll
    for (int v = 0; v < VECTOR; v++)
        if (channel + v < channels + fill)
            out[v] = channel + v >= channels ? 0.f
                     : INTEGER               ? __fmul_rn((float)sum[v], scale)
                                             : sum[v] / (float)(cell * cell);
}
