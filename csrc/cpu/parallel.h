// Splits a range over threads that live for one call: no runtime of its own, nothing left behind, safe after fork().
#pragma once

#include <stdint.h>

#include <algorithm>
#include <thread>
#include <vector>

// Calls body(begin, end) on up to `threads` consecutive parts of [0, n), each of at least `grain` items (but the last)
// and starting at a multiple of it.
template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, const Body& body) {
  const int64_t grains = (n + grain - 1) / grain;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, grains));
  auto part_begin = [&](int64_t part) { return std::min(n, grains * part / parts * grain); };
  std::vector<std::thread> workers;
  workers.reserve(parts - 1);
  for (int64_t part = 1; part < parts; ++part) {
    workers.emplace_back([&body, begin = part_begin(part), end = part_begin(part + 1)] { body(begin, end); });
  }
  body(part_begin(0), part_begin(1));
  for (auto& worker : workers) worker.join();
}
