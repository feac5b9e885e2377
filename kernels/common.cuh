// Shared by every kernel: the storage type, 16-byte chunks, activations, warp sums, the image table.
//
// HALF=1 stores activations and weights in 16 bits, HALF=0 in 32; sums are float32 in both. The loader
// pastes this text where a kernel says #include "common.cuh", so that CuPy's cache sees all of it.
// Half precision is spelled in PTX here: NVRTC then needs no header at all. Where CUDA_EMULATOR is
// defined, tests/cuda_emulator.h supplies what PTX does.
//
// INTEGER=1 is for a backbone in integers (see `Backbone`): its maps hold integers of 8 and 16 bits, whatever HALF
// says, and its features are the reference's bit for bit, because sums are exact and nothing else is reordered.
//
// Maps are (B, H, W, C), C padded to a multiple of 8 with zeros. blockIdx.z is the image. No kernel
// uses atomics and every sum has one order, so a score does not depend on its batch.
#pragma once

#ifndef HALF
#define HALF 0
#endif

#if HALF
struct alignas(2) real { unsigned short bits; };
#else
typedef float real;
#endif

#ifndef INTEGER
#define INTEGER 0
#endif

// Activation: what a depthwise layer takes, 0..2047. Depth: what it gives, 0..255. Value: all else, -32767..32767, that
// is pixels, what a block gives, and the weights of stem and depthwise. Sum: what their products add up to.
#if INTEGER
typedef unsigned char Depth;
typedef short Activation, Value;
typedef int Sum;
#else
typedef real Activation, Depth, Value;
typedef float Sum;
#endif

#define PANEL 32

// 32 x 32 weights of 8 bits as `quantize` makes them: a column is an output, with a scale of its own; a row is an input.
struct alignas(16) Qtile { float scale[PANEL]; signed char weight[PANEL][PANEL]; };

#define NONE 0
#define RELU6 1
#define SILU 2

#ifndef CUDA_EMULATOR
#define CHECK_ALIGNED(address, bytes)

__device__ __forceinline__ float float_from_half(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

__device__ __forceinline__ unsigned short half_from_float(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Of four bytes u the halves u - zero, two to a register: 1024 + u is the half 0x6400 | u.
__device__ __forceinline__ void halves_from_bytes(unsigned two[2], unsigned four, unsigned zero = 128) {
    asm("{ .reg .b32 x, y; prmt.b32 x, %2, 0x64646464, 0x4140; prmt.b32 y, %2, 0x64646464, 0x4342;\n"
        "sub.f16x2 %0, x, %3; sub.f16x2 %1, y, %3; }"
        : "=r"(two[0]), "=r"(two[1]) : "r"(four), "r"((0x6400u | zero) * 0x10001u));
}

// A launch that follows another in a graph may start while that one still runs (see `Engine.capture` of cuda.py): what
// the other left may be read, and what it reads overwritten, only after await_launch. Every kernel calls both.
__device__ __forceinline__ void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void await_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// c (16x8, float32) += a (16x16, halves) @ b (16x8, halves), one warp.
__device__ __forceinline__ void multiply_add(float c[4], const unsigned a[4], const unsigned b[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int i = 0; i < 2; i++)  // before sm_80 the product is 8 deep
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}
#endif

__device__ __forceinline__ unsigned pair_of(unsigned short low, unsigned short high) { return low | (unsigned)high << 16; }

__device__ __forceinline__ float get(float x) { return x; }
__device__ __forceinline__ void put(float& to, float x) { to = x; }
#if HALF
__device__ __forceinline__ float get(real x) { return float_from_half(x.bits); }
__device__ __forceinline__ void put(real& to, float x) { to.bits = half_from_float(x); }
#endif

__device__ __forceinline__ int get(unsigned char x) { return x; }
__device__ __forceinline__ int get(short x) { return x; }
__device__ __forceinline__ void put(unsigned char& to, float x) { to = (unsigned char)x; }
__device__ __forceinline__ void put(short& to, float x) { to = (short)x; }

#define VECTOR (INTEGER ? 8 : 16 / (int)sizeof(real))  // elements of a chunk: 8, or 4 floats

template <class T> struct alignas(VECTOR * sizeof(T)) ChunkOf { T at[VECTOR]; };
typedef ChunkOf<real> Chunk;

template <class T> __device__ __forceinline__ ChunkOf<T> load_chunk(const T* from) {
    CHECK_ALIGNED(from, sizeof(ChunkOf<T>));
    return *reinterpret_cast<const ChunkOf<T>*>(from);
}

template <class T> __device__ __forceinline__ void store_chunk(T* to, const ChunkOf<T>& chunk) {
    CHECK_ALIGNED(to, sizeof(ChunkOf<T>));
    *reinterpret_cast<ChunkOf<T>*>(to) = chunk;
}

// NaN passes through both activations.
__device__ __forceinline__ float activate(float x, int act) {
    if (act == RELU6) return x < 0.f ? 0.f : x > 6.f ? 6.f : x;
    return act == SILU ? x / (1.f + expf(-x)) : x;
}

__device__ __forceinline__ float clip(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// Two roundings, of the product and to the nearest integer, as the reference has them.
__device__ __forceinline__ float requantize(float total, float m, float low, float high) {
    return clip(rintf(__fmul_rn(total, m)), low, high);
}

// What ends a layer with an activation: its code; in integers its multipliers (C,), one an output channel.
#if INTEGER
typedef const float* Ending;
__device__ __forceinline__ float finish(float x, Ending m, int channel, float most) {
    return requantize(x, m[channel], 0.f, most);
}
#else
typedef int Ending;
__device__ __forceinline__ float finish(float x, Ending act, int, float) { return activate(x, act); }
#endif

// Sum over the 32 lanes, the same in every lane.
__device__ __forceinline__ float warp_sum(float x) {
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// A row of the image table: everything of a frame that differs between calls.
struct Image {
    const unsigned char* pixels;             // (height, width, 3) u8
    long long height, width;
    const int* row_start;                    // (S,) first input row of each output row
    const float* row_weight;                 // (S, row_taps)
    long long row_taps;
    const int* col_start;
    const float* col_weight;
    long long col_taps;
    float* map;                              // (height, width), or null: no map wanted
    const int* map_row;                      // (height,) first of the two fine rows between which a row lies
    const float* map_row_share;              // (height,) of the second
    const int* map_col;
    const float* map_col_share;
    float* score;                            // one float
};
