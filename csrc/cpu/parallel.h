// Splits a range over the threads of the process's OpenMP, or over a pool of our own.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <functional>

// Calls body(0) .. body(parts - 1), each once, on up to `threads` threads, this one included; returns when all are
// done.
//
// The threads are those of the OpenMP runtime that is loaded (torch's): its idle threads spin for milliseconds, and
// threads beside them would wait for a core. Without one, and in a forked child, which inherits no threads, a pool is
// started; where that is busy with another caller's work, this thread does it all.
void run_parts(int64_t parts, int threads, const std::function<void(int64_t)>& body);

// Calls body(begin, end) on consecutive parts of [0, n), each of at least `grain` items (but the last) and starting at
// a multiple of it. Parts are a few for each thread, so that a thread held up elsewhere delays less.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  constexpr int64_t kPartsPerThread = 4;
  const int64_t grains = (n + grain - 1) / grain;
  const int64_t parts = std::min<int64_t>(threads > 1 ? threads * kPartsPerThread : 1, grains);
  if (parts <= 1) return body(int64_t{0}, n);
  run_parts(parts, threads, [&](int64_t part) {
    body(grains * part / parts * grain, std::min(n, grains * (part + 1) / parts * grain));
  });
}

// Calls body(begin, end) on parts of `rows` rows of `cols` elements each, where every element costs a few operations:
// with fewer than 32768 of them a thread costs more than it brings.
template <class Body>
void parallel_rows(int64_t rows, int64_t cols, int threads, const Body& body) {
  parallel_for(rows, std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, cols)), threads, body);
}
