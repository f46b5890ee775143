// Philox4x32-10: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (2011).
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct Words {
  uint32_t w[4];
};

inline Words philox(uint64_t counter, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of V::kLanes counters first, first + step, ...: words[w][n] is word w of counter n. Counters are in lanes
// of 64 bits, whose upper halves nothing looks at.
template <class V>
void philox_lanes(uint64_t first, uint64_t step, uint64_t seed, uint32_t (&words)[4][V::kLanes]) {
  using Wide = typename V::Wide;
  constexpr int kHalf = V::kLanes / 2;
  uint64_t counters[V::kLanes];
  for (int n = 0; n < V::kLanes; ++n) counters[n] = first + static_cast<uint64_t>(n) * step;
  Wide c0[2], c1[2], c2[2], c3[2];
  for (int h = 0; h < 2; ++h) {
    memcpy(&c0[h], counters + h * kHalf, sizeof c0[h]);
    c1[h] = c0[h] >> 32;
    c2[h] = c3[h] = Wide{};
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int h = 0; h < 2; ++h) {
      const Wide p0 = V::multiply_words(c0[h], 0xD2511F53u), p1 = V::multiply_words(c2[h], 0xCD9E8D57u);
      c0[h] = (p1 >> 32) ^ c1[h] ^ k0;
      c2[h] = (p0 >> 32) ^ c3[h] ^ k1;
      c1[h] = p1;
      c3[h] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int h = 0; h < 2; ++h) {
    const Wide all[] = {c0[h], c1[h], c2[h], c3[h]};
    for (int w = 0; w < 4; ++w) {
      const auto narrow = __builtin_convertvector(all[w], typename V::Narrow);
      memcpy(&words[w][h * kHalf], &narrow, sizeof narrow);
    }
  }
}

}  // namespace
