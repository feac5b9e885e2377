// Runs a CUDA kernel as C++: the same .cu text, compiled by g++ with this header before it.
//
// Every thread of a block is a fiber. A fiber runs until it meets a barrier or a warp intrinsic, then the next
// one runs; nothing happens at a barrier that the text does not ask for, so a missing one shows as a wrong
// result under at least one schedule: ascending threads (0), descending (1), shuffled (any other number).
// Shared memory is filled with NaN before each block. Reported as errors: a barrier or warp intrinsic that some
// threads never reach, and vector accesses that are not aligned.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define CUDA_EMULATOR
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))
#define __syncthreads() emulator::barrier(__LINE__)
#define CHECK_ALIGNED(address, bytes) emulator::check_aligned(address, bytes)

using std::max;
using std::min;

struct dim3 { unsigned x, y, z; };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));

namespace emulator {

enum State { READY, AT_BARRIER, AT_WARP, DONE };

struct Fiber {
    ucontext_t context;
    jmp_buf resume;
    std::unique_ptr<char[]> stack;
    dim3 index;
    State state;
    int line = 0;
    bool started = false;
};

struct Warp {
    char slot[2][32][64];  // two rounds, so that a fast lane cannot overwrite what a slow one still reads
    int arrived, round;
};

constexpr int STACK = 256 << 10;
static std::vector<std::unique_ptr<Fiber>> fibers;
static std::vector<Warp> warps;
static Fiber* current;
static int current_id;
static jmp_buf scheduler;
static void (*body)(void*);
static void* body_argument;
static char message[200];

inline void fail(const char* text, int line) {
    if (!message[0]) std::snprintf(message, sizeof message, "%s (line %d, block %u %u %u, thread %u %u %u)", text, line,
                                   blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
}

__attribute__((noinline)) static void suspend() {
    if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

static void fiber_main() {
    for (;;) {  // a fiber serves one thread of every block
        body(body_argument);
        current->state = DONE;
        suspend();
    }
}

__attribute__((noinline)) static void resume(int id) {
    current_id = id;
    current = fibers[id].get();
    threadIdx = current->index;
    if (_setjmp(scheduler)) return;
    if (current->started) _longjmp(current->resume, 1);
    current->started = true;
    getcontext(&current->context);
    current->stack.reset(new char[STACK]);
    current->context.uc_stack.ss_sp = current->stack.get();
    current->context.uc_stack.ss_size = STACK;
    current->context.uc_link = nullptr;
    makecontext(&current->context, fiber_main, 0);
    setcontext(&current->context);
}

__attribute__((noinline)) static void barrier(int line) {
    current->state = AT_BARRIER;
    current->line = line;
    suspend();
}

// What every lane of the warp hands in, 64 bytes a lane; all 32 lanes must come.
__attribute__((noinline)) static const char (*exchange(const void* mine, size_t size))[64] {
    Warp& warp = warps[current_id / 32];
    const int round = warp.round & 1;
    std::memcpy(warp.slot[round][current_id % 32], mine, size);
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        warp.round++;
        for (int lane = 0; lane < 32; lane++) {
            Fiber& fiber = *fibers[current_id / 32 * 32 + lane];
            if (fiber.state == AT_WARP) fiber.state = READY;
        }
    } else {
        current->state = AT_WARP;
        suspend();
    }
    return warp.slot[round];
}

inline void check_aligned(const void* address, int bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) fail("access is not aligned", 0);
}

static void run_block(int threads, unsigned schedule) {
    const size_t shared = __start_emulated_shared ? __stop_emulated_shared - __start_emulated_shared : 0;
    if (shared) std::memset(__start_emulated_shared, 0xff, shared);
    while ((int)fibers.size() < threads) fibers.emplace_back(new Fiber);
    warps.resize((threads + 31) / 32);
    for (Warp& warp : warps) warp.arrived = warp.round = 0;
    std::vector<int> order(threads);
    for (int i = 0; i < threads; i++) {
        const unsigned t = i;
        fibers[i]->index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
        fibers[i]->state = READY;
        order[i] = schedule == 1 ? threads - 1 - i : i;
    }
    for (;;) {
        if (schedule > 1)
            for (int i = threads - 1; i > 0; i--) {
                schedule = schedule * 1664525u + 1013904223u;
                std::swap(order[i], order[(schedule >> 8) % (i + 1)]);
            }
        bool progress = false;
        int waiting = 0, done = 0, line = 0;
        for (int id : order)
            if (fibers[id]->state == READY) {
                resume(id);
                progress = true;
            }
        for (int id = 0; id < threads; id++) {
            done += fibers[id]->state == DONE;
            waiting += fibers[id]->state == AT_BARRIER;
            if (fibers[id]->state == AT_BARRIER) line = fibers[id]->line;
        }
        if (done == threads) return;
        if (waiting == threads) {
            for (int id = 0; id < threads; id++) {
                if (fibers[id]->line != line) fail("threads wait at different barriers", line);
                fibers[id]->state = READY;
            }
        } else if (!progress) {
            fail(waiting ? "a barrier is not reached by all threads" : "a warp intrinsic is not reached by all lanes", line);
            for (auto& fiber : fibers) fiber->started = false;  // abandoned where they stand
            return;
        }
    }
}

template <class... P, size_t... I>
static void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<P>*>(arguments[I])...);
}

// dims: grid x y z, block x y z. Returns null or what went wrong.
template <class... P>
static const char* launch(void (*kernel)(P...), const unsigned* dims, void** arguments, unsigned schedule) {
    struct Task { void (*kernel)(P...); void** arguments; } task = {kernel, arguments};
    body_argument = &task;
    body = [](void* p) {
        Task* t = static_cast<Task*>(p);
        call(t->kernel, t->arguments, std::index_sequence_for<P...>());
    };
    message[0] = 0;
    gridDim = {dims[0], dims[1], dims[2]};
    blockDim = {dims[3], dims[4], dims[5]};
    const long long blocks = 1ll * dims[0] * dims[1] * dims[2];
    for (long long i = 0; i < blocks && !message[0]; i++) {
        const unsigned b = schedule == 1 ? blocks - 1 - i : i;
        blockIdx = {b % dims[0], b / dims[0] % dims[1], b / dims[0] / dims[1]};
        run_block(dims[3] * dims[4] * dims[5], schedule);
    }
    return message[0] ? message : nullptr;
}

// One letter a parameter: p pointer, i int32, l int64, f float32.
template <class P>
constexpr char kind() {
    return std::is_pointer_v<P> ? 'p' : std::is_same_v<P, float> ? 'f' : sizeof(P) == 8 ? 'l' : 'i';
}
template <class... P>
static const char* kinds(void (*)(P...)) {
    static const char text[] = {kind<std::remove_const_t<P>>()..., 0};
    return text;
}

}  // namespace emulator

#define EMULATE(name)                                                                                            \
    extern "C" const char* launch_##name(const unsigned* dims, void** arguments, unsigned schedule) {            \
        return emulator::launch(name, dims, arguments, schedule);                                                \
    }                                                                                                            \
    extern "C" const char* kinds_##name() { return emulator::kinds(name); }

template <class T>
static T __shfl_xor_sync(unsigned, T value, int lane) {
    T other;
    std::memcpy(&other, emulator::exchange(&value, sizeof value)[(emulator::current_id % 32) ^ lane], sizeof other);
    return other;
}

static inline float __fmul_rn(float x, float y) { return x * y; }

static inline float float_from_half(unsigned short bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return (float)half;
}

static inline unsigned short half_from_float(float x) {
    const _Float16 half = (_Float16)x;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

static void __syncwarp() { emulator::exchange("", 1); }

static inline void allow_next_launch() {}
static inline void await_launch() {}

static inline void halves_from_bytes(unsigned two[2], unsigned four, unsigned zero = 128) {
    for (int i = 0; i < 4; i++) {
        const unsigned short bits = half_from_float((float)(four >> 8 * i & 255) - (float)zero);
        std::memcpy(reinterpret_cast<char*>(two) + 2 * i, &bits, 2);
    }
}

// mma.sync, with the fragment layout of the PTX manual.
static void multiply_add(float c[4], const unsigned a[4], const unsigned b[2]) {
    struct Operands { unsigned a[4], b[2]; } mine;
    std::memcpy(mine.a, a, sizeof mine.a);
    std::memcpy(mine.b, b, sizeof mine.b);
    const auto all = emulator::exchange(&mine, sizeof mine);
    const int lane = emulator::current_id % 32;
    auto element = [&](int owner, int reg, int half) {  // registers 0-3 hold a, 4 and 5 hold b
        unsigned short bits;
        std::memcpy(&bits, all[owner] + 4 * reg + 2 * half, 2);
        return float_from_half(bits);
    };
    for (int k = 0; k < 16; k++) {
        float left[2], right[2];
        for (int h = 0; h < 2; h++) {
            left[h] = element(lane / 4 * 4 + k % 8 / 2, h + k / 8 * 2, k % 2);
            right[h] = element((lane % 4 * 2 + h) * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
        for (int i = 0; i < 4; i++) c[i] += left[i / 2] * right[i % 2];
    }
}
