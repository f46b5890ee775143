// Runs the CPU optimizers on buffers of their exact size; built with sanitizers by test_native_sanitizers.py.
#include "native_sanitizers.h"

#include <math.h>

#include <algorithm>

// Heap copies of exact size of the two maps and the encoder's first look-up, by the definition in pyft/formats.py.
struct Tables {
  std::vector<float> codes;
  std::vector<uint8_t> starts;
  Tables() : codes(4 * 256), starts(3 * PYFT_OPTIM_BUCKETS) {
    for (int is_signed = 0; is_signed < 2; ++is_signed) {
      std::vector<float> map = {0.0f, 1.0f};
      double top = 1e-6;
      for (int decade = 0; decade < 7; ++decade, top *= 10) {
        const int count = 1 << (is_signed ? decade : decade + 1);
        for (int i = 0; i < count; ++i) {
          const auto value = static_cast<float>(top * (0.1 + 0.9 * (i + 0.5) / count));
          map.push_back(value);
          if (is_signed) map.push_back(-value);
        }
      }
      std::sort(map.begin(), map.end());
      float* row = codes.data() + (is_signed ? 0 : 512);
      for (int i = 0; i < 256; ++i) {
        row[i] = map[i];
        row[256 + i] = i < 255 ? (map[i] + map[i + 1]) / 2 : INFINITY;
      }
    }
    for (int i = 0; i < PYFT_OPTIM_BUCKETS; ++i) {
      const float low = i ? bucket(i) : 0.0f, high = bucket(i + 1);
      const float *positive = codes.data() + 256, *all = codes.data() + 768;
      starts[i] = static_cast<uint8_t>(std::lower_bound(positive, positive + 255, low) - positive);
      starts[PYFT_OPTIM_BUCKETS + i] =
          static_cast<uint8_t>(std::upper_bound(positive, positive + 255, -high) - positive);
      starts[2 * PYFT_OPTIM_BUCKETS + i] = static_cast<uint8_t>(std::lower_bound(all, all + 255, low) - all);
    }
  }
  static float bucket(int i) {
    const uint32_t bits = (104u << 23) + (static_cast<uint32_t>(i) << (23 - PYFT_OPTIM_MANTISSA));
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// One parameter's tensors; every pattern of bits is among the parameters and gradients.
struct Work {
  Work(long n, bool coded, bool moments, int item)
      : param(n * item),
        grad(n * item),
        first(n * (coded ? 1 : 4)),
        second(moments ? n * (coded ? 1 : 4) : 0),
        first_absmax(coded ? (n + 255) / 256 * 4 : 0),
        second_absmax(coded && moments ? (n + 255) / 256 * 4 : 0),
        n(n) {
    for (Buffer* b : {&param, &grad, &first, &second}) b->randomise();
    for (Buffer* b : {&first_absmax, &second_absmax}) floats(*b);
    if (!coded) {
      floats(first);
      floats(second);
    }
    if (n % 3 == 0) {  // finite gradients, or every block would be skipped
      for (long i = 0; i < n * item; i += 2) grad.at[i + 1] = static_cast<char>(grad.at[i + 1] & 0xBB);
    }
  }
  static void floats(Buffer& b) {
    for (size_t i = 0; i < b.size; i += 4) {
      const float x = static_cast<float>(rng() % 1000) / 100;
      memcpy(b.at + i, &x, 4);
    }
  }
  pyft_optim_tensor tensor(int64_t block) const {
    auto absmax = [](const Buffer& b) { return b.size ? reinterpret_cast<float*>(b.at) : nullptr; };
    return {param.at, grad.at, first.at, second.size ? second.at : nullptr, absmax(first_absmax), absmax(second_absmax),
            n,        block};
  }
  Buffer param, grad, first, second, first_absmax, second_absmax;
  long n;
};

static void step(const Tables& tables, const std::vector<long>& sizes, pyft_dtype dtype, pyft_optim_rule rule,
                 int threads) {
  std::vector<Work> start;
  for (long n : sizes) start.emplace_back(n, n % 2 == 0, rule.algorithm == PYFT_ADAMW, dtype == PYFT_F32 ? 4 : 2);
  const pyft_optim_maps maps = {tables.codes.data(), tables.starts.data()};
  std::vector<Work> scalar;
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    std::vector<Work> works = start;
    std::vector<pyft_optim_tensor> rows;
    int64_t block = 0;
    for (const Work& work : works) {
      rows.push_back(work.tensor(block));
      block += (work.n + 255) / 256;
    }
    const auto status = pyft_cpu_optim(rows.data(), static_cast<int64_t>(rows.size()), dtype, &rule, &maps,
                                       static_cast<pyft_isa>(isa), threads);
    expect(status == PYFT_OK, "status", sizes[0], isa, dtype);
    if (isa == 0) scalar = works;
    for (size_t i = 0; i < works.size(); ++i) {
      const Work &found = works[i], &truth = scalar[i];
      expect(same_values(found.param, truth.param, dtype), "param", found.n, isa, dtype);
      for (auto part : {&Work::first, &Work::second, &Work::first_absmax, &Work::second_absmax}) {
        expect(same_bytes(found.*part, truth.*part), "state", found.n, isa, dtype);
      }
    }
  }
}

int main() {
  const Tables tables;
  for (pyft_optimizer algorithm : {PYFT_ADAMW, PYFT_LION, PYFT_SGD}) {
    const pyft_optim_rule rule = {algorithm, 1, -1.0f, 0.9f, 0.1f, 0.99f, 0.01f, 0.999f, 0.1f, 0.01f, 1e-8f};
    for (pyft_dtype dtype : {PYFT_F32, PYFT_F16, PYFT_BF16}) {
      for (long n = 1; n < 40; ++n) step(tables, {n}, dtype, rule, 1);
      for (long n : {255, 256, 257, 258, 511, 512, 513, 600, 1024, 4096, 4101}) step(tables, {n}, dtype, rule, 2);
      step(tables, {1, 2, 256, 600000, 255, 12, 70002, 258}, dtype, rule, 3);
    }
  }
  const pyft_optim_maps maps = {tables.codes.data(), tables.starts.data()};
  pyft_optim_rule rule = {PYFT_ADAMW, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1};
  const auto scalar = PYFT_ISA_SCALAR;
  expect(pyft_cpu_optim(nullptr, 0, PYFT_F32, &rule, &maps, scalar, 1) == PYFT_OK, "no tensors", 0, 0, 0);
  expect(pyft_cpu_optim(nullptr, -1, PYFT_F32, &rule, &maps, scalar, 1) == PYFT_BAD_ARGUMENT, "count", 0, 0, 0);
  return report();
}
