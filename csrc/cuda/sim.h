// CUDA C++ on the CPU, for tests: a kernel file built by g++ with -DPYFT_CPU_SIM runs here, without the CUDA toolkit.
//
// Thread blocks run one after another. Each thread of a block is a fiber; a warp runs until all of its threads wait at
// a __syncthreads or have returned, then the next warp does, in ascending or descending order (pyft_sim_reverse_warps).
// Warps so far apart, and shared memory that is poisoned before each thread block, make a missing __syncthreads a wrong
// answer in one of the two orders. A barrier that not all threads reach, and a wide access at an unaligned address, end
// the launch with an error, as on a GPU. Where a warp acts as one (shuffles, ldmatrix, mma) its lanes show each other
// what they have and meet.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

// A function that returns after others ran on other stacks: its caller must take every register for changed.
#ifdef __clang__
#define PYFT_SWITCHES __attribute__((noinline))
#else
#define PYFT_SWITCHES __attribute__((noipa))
#endif

struct uint3 {
  unsigned x, y, z;
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };

namespace sim {

constexpr unsigned kWarp = 32, kMaxWarps = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int kMaxShared = 48 * 1024;  // bytes a thread block may have without asking for more

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kReturned };

struct Fiber {
  ucontext_t context;   // where it starts
  void* place[5] = {};  // where it goes on; a switch through a context would be two system calls
  bool started = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::kReady;
  unsigned meetings = 0;  // of its warp it has been to
  uint3 index = {};
};

struct alignas(128) Line {
  uint8_t bytes[128];
};

// What a lane shows to its warp.
union Shown {
  uint64_t word;
  const void* address;
  struct {
    float a[8], b[4];
  } fragment;
};

inline std::vector<Fiber> fibers;
inline unsigned current = 0;
inline void* scheduler[5];
inline std::function<void()> body;
inline std::string failure;  // of the launch; empty while all is well
inline cudaError_t pending = cudaSuccess;
inline bool reverse_warps = false;
inline int capability = 8;  // of the GPU this would be, the major number
inline uint3 block_index;
inline dim3 block_dim, grid_dim;
inline std::map<const void*, std::vector<Line>> shared;  // by declaration
inline Shown exchange[2][kMaxWarps][kWarp];              // of this meeting and of the one before

// A function that saves a place must not itself go to one.
PYFT_SWITCHES inline void go_to(void** place) { __builtin_longjmp(place, 1); }

PYFT_SWITCHES inline void wait(State state) {
  fibers[current].state = state;
  if (__builtin_setjmp(fibers[current].place) == 0) go_to(scheduler);
}

// Runs the current fiber until it waits.
PYFT_SWITCHES inline void go_on() {
  if (__builtin_setjmp(scheduler) != 0) return;
  Fiber& fiber = fibers[current];
  if (fiber.started) go_to(fiber.place);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void fiber_main() {
  try {
    body();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  wait(State::kReturned);
}

inline void start_fibers(unsigned threads) {
  while (fibers.size() < threads) fibers.emplace_back();
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.meetings = 0;
    fiber.index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y)};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

inline unsigned count(unsigned begin, unsigned end, State state) {
  unsigned n = 0;
  for (unsigned i = begin; i < end; ++i) n += fibers[i].state == state;
  return n;
}

inline void release(unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) fibers[i].state = State::kReady;
}

// Runs the warp of threads [begin, end) until none of them can go on alone.
inline void run_warp(unsigned begin, unsigned end) {
  while (count(begin, end, State::kReady) > 0) {
    for (unsigned i = begin; i < end; ++i) {
      if (fibers[i].state != State::kReady) continue;
      current = i;
      go_on();
      if (!failure.empty()) throw std::runtime_error(failure);
    }
    if (count(begin, end, State::kAtWarpBarrier) == end - begin) release(begin, end);
  }
}

inline void run_block() {
  const unsigned threads = block_dim.x * block_dim.y * block_dim.z;
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  start_fibers(threads);
  shared.clear();
  for (;;) {
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned begin = (reverse_warps ? warps - 1 - i : i) * kWarp;
      run_warp(begin, std::min(threads, begin + kWarp));
    }
    if (count(0, threads, State::kReturned) == threads) return;
    if (count(0, threads, State::kAtBlockBarrier) != threads) {
      throw std::runtime_error("divergent barrier: some threads wait, others returned or wait elsewhere");
    }
    release(0, threads);
  }
}

inline void launch(dim3 grid, dim3 block, std::function<void()> kernel) {
  grid_dim = grid;
  block_dim = block;
  body = std::move(kernel);
  failure.clear();
  try {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > kWarp * kMaxWarps || grid.x == 0) throw std::runtime_error("invalid launch shape");
    for (unsigned z = 0; z < grid.z; ++z)
      for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
          block_index = {x, y, z};
          run_block();
        }
  } catch (const std::exception& error) {
    failure = error.what();
    pending = cudaErrorLaunchFailure;
  }
}

// What each lane of the warp shows, once all do; until this lane shows something the next time but one.
inline const Shown* show(const Shown& shown) {
  Shown* slots = exchange[fibers[current].meetings++ % 2][current / kWarp];
  slots[current % kWarp] = shown;
  wait(State::kAtWarpBarrier);
  return slots;
}

template <class T>
T shuffle(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a word a lane");
  Shown shown;
  memcpy(&shown.word, &value, sizeof value);
  memcpy(&value, &show(shown)[source_lane % kWarp].word, sizeof value);
  return value;
}

// The thread block's `bytes` of shared memory for one declaration, poisoned when the first thread gets there.
inline void* shared_memory(const void* declaration, size_t bytes) {
  std::vector<Line>& memory = shared[declaration];
  if (memory.empty()) {
    if (bytes > kMaxShared) throw std::runtime_error("too much shared memory");
    memory.resize((bytes + sizeof(Line) - 1) / sizeof(Line));
    memset(memory.data(), 0xff, memory.size() * sizeof(Line));
  }
  return memory.data();
}

inline void check_alignment(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) throw std::runtime_error("misaligned address");
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace sim

#define threadIdx (sim::fibers[sim::current].index)
#define blockIdx sim::block_index
#define blockDim sim::block_dim
#define gridDim sim::grid_dim
#define PYFT_SHARED(type, name, n) \
  static char name##_declaration;  \
  type(&name)[n] = *static_cast<type(*)[n]>(sim::shared_memory(&name##_declaration, sizeof(type) * (n)))
#define PYFT_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), sim::launch(grid, block, [=] { kernel(__VA_ARGS__); }))

extern "C" __attribute__((used, visibility("default"))) inline void pyft_sim_reverse_warps(int reverse) {
  sim::reverse_warps = reverse != 0;
}

extern "C" __attribute__((used, visibility("default"))) inline void pyft_sim_capability(int major) {
  sim::capability = major;
}

inline cudaError_t cudaGetLastError() { return std::exchange(sim::pending, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : sim::failure.c_str();
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = sim::capability;
  return cudaSuccess;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

inline void __syncthreads() { sim::wait(sim::State::kAtBlockBarrier); }
inline void __syncwarp() { sim::wait(sim::State::kAtWarpBarrier); }

template <class T>
T __shfl_sync(unsigned, T value, int source_lane) {
  return sim::shuffle(value, static_cast<unsigned>(source_lane));
}

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned lane_mask) {
  return sim::shuffle(value, (sim::current % sim::kWarp) ^ lane_mask);
}

inline int __any_sync(unsigned, int predicate) {
  const sim::Shown* lanes = sim::show({predicate != 0});
  return std::any_of(lanes, lanes + sim::kWarp, [](const sim::Shown& lane) { return lane.word != 0; });
}

inline float __uint_as_float(unsigned bits) { return sim::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float x) { return sim::bit_cast<unsigned>(x); }

// Exact IEEE operations, given -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::lrint(x)); }

struct __nv_bfloat16 {
  uint16_t bits;
};

struct __half {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | magnitude << 13);  // inf and NaN
  // fp16's exponent read as fp32's is 112 too small; a power of two repairs it exactly, subnormals included.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};                                 // NaN
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                                // subnormal in fp16
    const float shifted = __uint_as_float(magnitude) + 0.5f;                   // its last bit is worth 2^-24
    return {static_cast<uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

struct __half2 {
  __half x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

namespace pyft {

template <class V>
V load_wide(const void* from) {
  sim::check_alignment(from, sizeof(V));
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

template <class V>
void store_wide(void* to, V value) {
  sim::check_alignment(to, sizeof(V));
  memcpy(to, &value, sizeof value);
}

}  // namespace pyft
