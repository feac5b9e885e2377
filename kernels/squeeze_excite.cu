// squeeze_excite: the gate of every channel from the sums that depthwise left; product applies it.
// Reference: squeeze_excite, which also applies the gate.
//
// sums (B, parts, C) float32; reduce_w (S, C) float32, transposed, so that lanes read one run; reduce_b (S,);
// expand_w (S, C), expand_b (C,) float32; gate (B, C) float32 = sigmoid(W2 silu(W1 mean + b1) + b2).
// C <= 4096, S <= 256.
// Launch: grid (1, 1, B), block a multiple of 32; the result does not depend on it.
#include "common.cuh"

#define MOST_CHANNELS 4096
#define MOST_SQUEEZED 256

extern "C" __global__ void squeeze_excite(const float* sums, const float* reduce_w, const float* reduce_b,
                                          const float* expand_w, const float* expand_b, float* gate, int parts, int c,
                                          int squeezed, int pixels) {
    __shared__ float mean[MOST_CHANNELS];
    __shared__ float hidden[MOST_SQUEEZED];
    sums += (long long)blockIdx.z * parts * c;
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        float total = 0.f;
        for (int part = 0; part < parts; part++) total += sums[(long long)part * c + i];
        mean[i] = total / (float)pixels;
    }
    __syncthreads();
    for (int s = threadIdx.x / 32; s < squeezed; s += blockDim.x / 32) {
        float total = 0.f;
        for (int i = threadIdx.x % 32; i < c; i += 32) total += mean[i] * reduce_w[s * c + i];
        total = warp_sum(total);
        if (threadIdx.x % 32 == 0) hidden[s] = activate(total + reduce_b[s], SILU);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < c; i += blockDim.x) {
        float total = expand_b[i];
        for (int s = 0; s < squeezed; s++) total += hidden[s] * expand_w[s * c + i];
        gate[(long long)blockIdx.z * c + i] = 1.f / (1.f + expf(-total));
    }
}
