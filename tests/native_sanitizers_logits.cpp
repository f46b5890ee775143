// Runs the CPU kernels for logits on buffers of their exact size; built with sanitizers by
// test_native_sanitizers.py.
#include <memory>

#include "native_sanitizers.h"

constexpr int kSums = 6;  // lse, target, smooth, mean, cross, top

// What both kernels take; `z` is the logits, nothing behind the last row.
struct Call {
  Call(long rows, long cols, pyft_dtype dtype, bool sane)
      : rows(rows),
        cols(cols),
        stride(cols + rng() % 4),
        dtype(dtype),
        z(size(rows, cols, stride)),
        teacher(size(rows, cols, stride)),
        weights(cols * 4),
        numbers(rows * 4 * 7),
        labels(rows * 8) {
    for (Buffer* b : {&z, &teacher}) sane ? fill(*b, dtype) : void(b->randomise());
    for (Buffer* b : {&weights, &numbers}) sane ? fill(*b, PYFT_F32) : void(b->randomise());
    for (long r = 0; r < rows; ++r) {
      const int64_t outside[] = {-1, -100, INT64_MIN, INT64_MAX, cols};
      labels.as<int64_t>()[r] = rng() % 2 ? rng() % cols : outside[rng() % 5];
    }
    const bool plain = rng() % 2, taught = rng() % 2;
    const float softcap = rng() % 2 ? 3.0f : 0.0f;
    given = {rows,
             cols,
             {z.at, stride, plain ? 1.0f : 0.7f, plain ? 0.0f : softcap},
             labels.as<int64_t>(),
             rng() % 2 ? weights.as<float>() : nullptr,
             {taught ? teacher.at : nullptr, stride, 0.5f, softcap},
             taught ? floats(0) : nullptr};
  }
  size_t size(long rows, long cols, long stride) const {
    return rows ? ((rows - 1) * stride + cols) * item_of(dtype) : 0;
  }
  float* floats(int k) { return numbers.as<float>() + k * rows; }

  long rows, cols, stride;
  pyft_dtype dtype;
  Buffer z, teacher, weights, numbers, labels;
  pyft_logits given;
};

// Of `count` elements, those where two buffers are not about the same.
static long differing(const Buffer& a, const Buffer& b, size_t count, pyft_dtype dtype) {
  const float allowed = dtype == PYFT_F32 ? 1e-4f : dtype == PYFT_F16 ? 4e-3f : 2e-2f;
  long wrong = 0;
  for (size_t i = 0; i < count; ++i) {
    const float x = value_of(a, i, dtype), y = value_of(b, i, dtype);
    wrong += !(fabsf(x - y) <= allowed * (1 + fabsf(y)));
  }
  return wrong;
}

// Every instruction set; `sane`: numbers that have an answer, which must be the scalar code's.
static void statistics(long rows, long cols, pyft_dtype dtype, int threads, bool sane) {
  Call call(rows, cols, dtype, sane);
  const unsigned there = rng();
  std::unique_ptr<Buffer> scalar[kSums];
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    std::unique_ptr<Buffer> sums[kSums];
    float* at[kSums] = {};
    for (int k = 0; k < kSums; ++k) {
      if ((k && !(there >> k & 1)) || (k == 4 && !call.given.teacher.data)) continue;
      sums[k] = std::make_unique<Buffer>(rows * 4);
      at[k] = sums[k]->as<float>();
    }
    Buffer argmax(rows * 8);
    int64_t* places = there & 1 ? argmax.as<int64_t>() : nullptr;
    const pyft_logit_statistics out = {at[0], at[1], at[2], at[3], at[4], at[5], places};
    const auto status = pyft_cpu_logit_statistics(&call.given, &out, dtype, static_cast<pyft_isa>(isa), threads);
    expect(status == PYFT_OK, "statistics", rows, cols, isa);
    for (long r = 0; places && r < rows; ++r) expect(places[r] >= 0 && places[r] < cols, "argmax", r, cols, isa);
    for (int k = 0; k < kSums; ++k) {
      if (sane && isa && sums[k]) expect(!differing(*sums[k], *scalar[k], rows, PYFT_F32), "sums", k, cols, isa);
      if (!isa) scalar[k] = std::move(sums[k]);
    }
  }
}

static void gradient(long rows, long cols, pyft_dtype dtype, int threads, bool sane) {
  Call call(rows, cols, dtype, sane);
  const bool smooth = rng() % 2, mean = rng() % 2, cross = call.given.teacher.data && rng() % 2, kept = rng() % 2;
  std::unique_ptr<Buffer> scalar;
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    auto z = std::make_unique<Buffer>(call.z);
    Buffer marks(cols);
    memset(marks.at, 0, marks.size);
    pyft_logits given = call.given;
    given.logits.data = z->at;
    const pyft_logit_gradient out = {call.floats(1),
                                     mean ? call.floats(2) : nullptr,
                                     call.floats(3),
                                     call.floats(4),
                                     smooth ? call.floats(5) : nullptr,
                                     mean ? call.floats(6) : nullptr,
                                     cross ? call.floats(5) : nullptr,
                                     0.1f,
                                     kept ? marks.as<uint8_t>() : nullptr};
    const auto status = pyft_cpu_logit_gradient(&given, &out, dtype, static_cast<pyft_isa>(isa), threads);
    expect(status == PYFT_OK, "gradient", rows, cols, isa);
    bool between = true, marked = true;
    for (long r = 0; r + 1 < rows; ++r) {
      const long at = (r * call.stride + cols) * item_of(dtype), gap = (call.stride - cols) * item_of(dtype);
      between &= memcmp(z->at + at, call.z.at + at, gap) == 0;
    }
    expect(between, "between rows", rows, cols, isa);
    for (long c = 0; c < cols; ++c) marked &= static_cast<uint8_t>(marks.at[c]) <= 1;
    expect(marked, "marks", rows, cols, isa);
    if (sane && isa) expect(!differing(*z, *scalar, z->size / item_of(dtype), dtype), "dz", rows, cols, isa);
    if (!isa) scalar = std::move(z);
  }
}

static void bad_arguments() {
  float z[16] = {}, x[2] = {};
  const int64_t labels[2] = {};
  const auto scalar = PYFT_ISA_SCALAR;
  const auto none = static_cast<pyft_dtype>(3);
  pyft_logits logits = {2, 4, {z, 4, 1.0f, 0.0f}, labels, nullptr, {nullptr, 0, 1.0f, 0.0f}, nullptr};
  const pyft_logit_statistics nothing = {};
  expect(pyft_cpu_logit_statistics(&logits, &nothing, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "no lse", 0, 0, 0);
  pyft_logit_statistics out = {};
  out.lse = out.cross = x;
  expect(pyft_cpu_logit_statistics(&logits, &out, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "no teacher", 0, 0, 0);
  out.cross = nullptr;
  expect(pyft_cpu_logit_statistics(&logits, &out, none, scalar, 1) == PYFT_BAD_ARGUMENT, "dtype", 0, 0, 0);
  pyft_logit_gradient gradient = {x, nullptr, x, x, nullptr, nullptr, nullptr, 0.0f, nullptr};
  logits.logits.stride = 3;
  expect(pyft_cpu_logit_gradient(&logits, &gradient, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "overlap", 0, 0, 0);
  logits.logits.stride = 4, gradient.g_mean = x;
  expect(pyft_cpu_logit_gradient(&logits, &gradient, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "no mean", 0, 0, 0);
  gradient.g_mean = nullptr, gradient.g_cross = x;
  expect(pyft_cpu_logit_gradient(&logits, &gradient, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "no q", 0, 0, 0);
  gradient.g_cross = nullptr, logits.cols = 0;
  expect(pyft_cpu_logit_gradient(&logits, &gradient, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "columns", 0, 0, 0);
}

int main() {
  for (pyft_dtype dtype : {PYFT_F32, PYFT_F16, PYFT_BF16}) {
    for (long cols : {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 511, 515, 1030, 2047, 2049}) {
      for (long rows : {0, 1, 3, 6}) {
        for (bool sane : {true, true, true, false}) {
          subject = sane ? "logits" : "random bits";
          statistics(rows, cols, dtype, 1 + rng() % 2, sane);
          gradient(rows, cols, dtype, 1 + rng() % 2, sane);
        }
      }
    }
    subject = "long rows";
    statistics(2, 32768 + 100, dtype, 3, true);
    gradient(2, 32768 + 100, dtype, 3, true);
    statistics(200, 515, dtype, 3, true);
    gradient(200, 515, dtype, 3, true);
  }
  subject = "arguments";
  bad_arguments();
  return report();
}
