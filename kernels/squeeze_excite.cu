// squeeze_excite: the gate of every channel from the sums that depthwise left, in two launches; product applies it.
// Reference: squeeze_excite, which also applies the gate.
//
// sums (B, parts, C) float32; reduce_w (S, C) float32, transposed, so that lanes read one run; reduce_b (S,);
// expand_w (S, C), expand_b (C,) float32; hidden (B, rows, S) float32: what 32 channels of a piece of the parts add;
// gate (B, C) float32 = sigmoid(W2 silu(W1 mean + b1) + b2). S <= 256.
// Launch: squeeze, grid (ceil(C/32), pieces, B), rows their product; then excite, grid (ceil(C/32), 1, B); block a
//   multiple of 32 up to 512, which sets the order of the sums. A lane has a channel; warps share parts, then the S.
#include "common.cuh"

#define MOST_SQUEEZED 256
#define MOST_WARPS 16
#define QUARTERS 4

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) squeeze(const float* sums, const float* reduce_w,
                                                                      float* hidden, int parts, int c, int squeezed,
                                                                      int pixels) {
    allow_next_launch();
    __shared__ float part[MOST_WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int channel = min((int)blockIdx.x * 32 + lane, c - 1);
    const int piece = (parts + gridDim.y - 1) / gridDim.y, last = min(parts, ((int)blockIdx.y + 1) * piece);
    await_launch();
    sums += (long long)blockIdx.z * parts * c + channel;
    float total = 0.f;
#pragma unroll 8
    for (int p = blockIdx.y * piece + warp; p < last; p += warps) total += sums[(long long)p * c];
    part[warp][lane] = total;
    __syncthreads();
    float mean = 0.f;
    for (int w = 0; w < warps; w++) mean += part[w][lane];
    mean = (int)blockIdx.x * 32 + lane < c ? mean / (float)pixels : 0.f;
    hidden += (((long long)blockIdx.z * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y) * squeezed;
#pragma unroll 4
    for (int s = warp; s < squeezed; s += warps) {
        const float y = warp_sum(mean * reduce_w[s * c + channel]);
        if (lane == 0) hidden[s] = y;
    }
}

extern "C" __global__ void __launch_bounds__(MOST_WARPS * 32) excite(const float* hidden, const float* reduce_b,
                                                                     const float* expand_w, const float* expand_b,
                                                                     float* gate, int rows, int c, int squeezed) {
    allow_next_launch();
    __shared__ float quarter[QUARTERS][MOST_SQUEEZED];
    __shared__ float inner[MOST_SQUEEZED];
    __shared__ float part[MOST_WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int channel = (int)blockIdx.x * 32 + lane;
    await_launch();
    hidden += (long long)blockIdx.z * rows * squeezed;
    for (int t = threadIdx.x; t < QUARTERS * squeezed; t += blockDim.x) {
        float y = 0.f;
#pragma unroll 8
        for (int row = t / squeezed; row < rows; row += QUARTERS) y += hidden[row * squeezed + t % squeezed];
        quarter[t / squeezed][t % squeezed] = y;
    }
    __syncthreads();
    for (int s = threadIdx.x; s < squeezed; s += blockDim.x) {
        float y = reduce_b[s];
        for (int q = 0; q < QUARTERS; q++) y += quarter[q][s];
        inner[s] = activate(y, SILU);
    }
    __syncthreads();
    float y = 0.f;
#pragma unroll 4
    for (int s = warp; channel < c && s < squeezed; s += warps) y += inner[s] * expand_w[s * c + channel];
    part[warp][lane] = y;
    __syncthreads();
    if (warp > 0 || channel >= c) return;
    float total = expand_b[channel];
    for (int w = 0; w < warps; w++) total += part[w][lane];
    gate[(long long)blockIdx.z * c + channel] = 1.f / (1.f + expf(-total));
}
