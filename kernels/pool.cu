// pool: average of a stage's map over the cells of a G x G lattice, into its columns of the token matrix.
// Reference: pool.
//
// x (B, side, side, ldx) real, side a multiple of G; out (B, G*G, columns) float32, written from column
// `first` to `first + channels`: float32, because whitening subtracts the mean and magnifies the rest. The
// `fill` columns after that become zero (the last stage pads the matrix to whole panels).
// Launch: grid (ceil(G*G * ceil((channels+fill)/VECTOR) / blockDim.x), 1, B), any block; a thread a chunk of a cell.
#include "common.cuh"

extern "C" __global__ void pool(const real* x, float* out, int side, int ldx, int channels, int fill, int grid,
                                int first, int columns) {
    allow_next_launch();
    const int chunks = (channels + fill + VECTOR - 1) / VECTOR, cell = side / grid;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    await_launch();
    if (i >= grid * grid * chunks) return;
    const int channel = i % chunks * VECTOR, position = i / chunks;
    x += (long long)blockIdx.z * side * side * ldx + channel;
    float sum[VECTOR] = {};
    for (int y = position / grid * cell; channel < channels && y < (position / grid + 1) * cell; y++)
        for (int column = position % grid * cell; column < (position % grid + 1) * cell; column++) {
            const Chunk value = load_chunk(x + ((long long)y * side + column) * ldx);
#pragma unroll
            for (int v = 0; v < VECTOR; v++) sum[v] += get(value.at[v]);
        }
    out += ((long long)blockIdx.z * grid * grid + position) * columns + first + channel;
#pragma unroll
    for (int v = 0; v < VECTOR; v++)
        if (channel + v < channels + fill) out[v] = channel + v < channels ? sum[v] / (float)(cell * cell) : 0.f;
}
