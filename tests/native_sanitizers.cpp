// Runs the CPU kernels on buffers of their exact size; built with sanitizers by test_native_sanitizers.py, which
// writes formats.h: the tables of pyft/formats.py.
#include "native_sanitizers.h"

#include <math.h>

#include <array>
#include <memory>

struct Format {
  const char* name;
  int bits, zero_code;
  float top;
  int e8m0, zero_points;
  std::vector<float> codes, thresholds;
  std::vector<uint8_t> order;
};

#include "formats.h"  // const std::vector<Format> formats; const std::vector<float> scale_codes, e8m0_codes;

static long bytes_for(long n, int bits) { return (n * bits + 7) / 8; }
static long blocks_for(long n, long block) { return (n + block - 1) / block; }

// A format's tables in heap blocks of their own size.
struct Tables {
  explicit Tables(const Format& f) : codes(f.codes), thresholds(f.thresholds), order(f.order) {
    coding = {f.bits, f.zero_code, f.top, f.e8m0, thresholds.as<float>(), order.as<uint8_t>()};
  }
  Buffer codes, thresholds, order;
  pyft_coding coding;
};

static void quantize(const Format& f, Tables& tables, long n, long block, pyft_dtype dtype, int threads) {
  const long blocks = blocks_for(n, block);
  Buffer x(n * item_of(dtype));
  x.randomise();
  std::array<std::unique_ptr<Buffer>, 3> first;
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    auto p = std::make_unique<Buffer>(bytes_for(n, f.bits));
    auto s = std::make_unique<Buffer>(blocks * (f.e8m0 ? 1 : 4));
    auto z = std::make_unique<Buffer>(f.zero_points ? blocks : 0);
    uint8_t* zeros = f.zero_points ? z->as<uint8_t>() : nullptr;
    const auto status = pyft_cpu_quantize(x.at, dtype, n, block, &tables.coding, p->as<uint8_t>(), s->at, zeros,
                                          static_cast<pyft_isa>(isa), threads);
    expect(status == PYFT_OK, "quantize status", n, block, isa);
    if (isa == 0) {
      first = {std::move(p), std::move(s), std::move(z)};
      continue;
    }
    expect(same_bytes(*p, *first[0]), "codes", n, block, isa);
    expect(f.e8m0 ? same_bytes(*s, *first[1]) : same_values(*s, *first[1], PYFT_F32), "scales", n, block, isa);
    expect(same_bytes(*z, *first[2]), "zero points", n, block, isa);
  }
}

// A weight of random bytes; `sane`: with scales that a product can be told the error of.
struct Weight {
  Weight(const Format& f, Tables& tables, long rows, long cols, long block, bool nest, bool sane = false)
      : packed(bytes_for(rows * cols, f.bits)),
        scales(blocks_for(rows * cols, block) * (nest || f.e8m0 ? 1 : 4)),
        zeros(f.zero_points ? blocks_for(rows * cols, block) : 0),
        nested(nest ? blocks_for(blocks_for(rows * cols, block), 256) * 4 : 0),
        offset(4),
        scale_table(f.e8m0 ? e8m0_codes : scale_codes) {
    for (Buffer* part : {&packed, &scales, &zeros, &nested, &offset}) part->randomise();
    for (size_t i = 0; i < zeros.size; ++i) zeros.at[i] &= 15;
    if (sane) {
      if (f.bits == 8) {
        for (size_t i = 0; i < packed.size; ++i) packed.at[i] = static_cast<char>(f.order[rng() % 200]);
      }
      for (size_t i = 0; i < scales.size && f.e8m0; ++i) scales.at[i] = static_cast<char>(120 + rng() % 5);
      for (size_t i = 0; i < scales.size / 4 && !f.e8m0 && !nest; ++i) scales.as<float>()[i] = (rng() % 100) / 100.0f;
      for (size_t i = 0; i < nested.size / 4; ++i) nested.as<float>()[i] = 0.5f;
      *offset.as<float>() = 1.0f;
    }
    weight = {f.bits,
              packed.as<uint8_t>(),
              scales.at,
              f.zero_points ? zeros.as<uint8_t>() : nullptr,
              nest ? nested.as<float>() : nullptr,
              nest ? offset.as<float>() : nullptr,
              tables.codes.as<float>(),
              nest || f.e8m0 ? scale_table.as<float>() : nullptr,
              rows,
              cols,
              block};
  }
  Buffer packed, scales, zeros, nested, offset, scale_table;
  pyft_weight weight;
};

static void dequantize(Weight& w, const pyft_slab& slab, long gap, pyft_dtype dtype, int threads, long shift = 0) {
  const long rows = slab.row_end - slab.row_begin, cols = slab.col_end - slab.col_begin, stride = cols + gap;
  const size_t size = rows ? ((rows - 1) * stride + cols + shift) * item_of(dtype) : 0;  // the last row has no tail
  Buffer first(size);
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    Buffer out(size);
    const auto status = pyft_cpu_dequantize(&w.weight, &slab, out.at + shift * item_of(dtype), stride, dtype,
                                            static_cast<pyft_isa>(isa), threads);
    expect(status == PYFT_OK, "dequantize status", rows, cols, isa);
    if (isa == 0) {
      memcpy(first.at, out.at, size);
    } else {
      expect(same_values(out, first, dtype), "values", rows, cols, isa);
    }
  }
}

static void qlinear(Weight& w, long m, long gap, bool with_bias, pyft_dtype dtype, int threads) {
  const long n = w.weight.rows, k = w.weight.cols, item = item_of(dtype);
  Buffer x(m ? ((m - 1) * (k + gap) + k) * item : 0), bias(with_bias ? n * item : 0);
  fill(x, dtype), fill(bias, dtype);
  const size_t size = m ? ((m - 1) * (n + gap) + n) * item : 0;
  Buffer first(size);
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    Buffer y(size);
    const auto status = pyft_cpu_qlinear(x.at, m, k + gap, &w.weight, with_bias ? bias.at : nullptr, y.at, n + gap,
                                         dtype, static_cast<pyft_isa>(isa), threads);
    expect(status == PYFT_OK, "qlinear status", m, n, k);
    if (isa == 0) memcpy(first.at, y.at, size);
    bool close = true, kept = true;
    for (long i = 0; i < m; ++i) {
      for (long r = 0; r < n; ++r) {
        const float a = value_of(y, i * (n + gap) + r, dtype), b = value_of(first, i * (n + gap) + r, dtype);
        close &= fabsf(a - b) <= 0.02f * (fabsf(b) + sqrtf(static_cast<float>(k) + 1)) || (isinf(a) && isinf(b));
      }
      const long tail = i + 1 < m ? gap * item : 0;
      for (long j = 0; j < tail; ++j) kept &= static_cast<uint8_t>(y.at[(i * (n + gap) + n) * item + j]) == 0xA5;
    }
    expect(close, "product", m, n, k);
    expect(kept, "tail of a row", m, n, k);
  }
}

static void dropout(long n, pyft_dtype dtype, int threads) {
  Buffer x(n * item_of(dtype)), out(x.size);
  x.randomise();
  expect(pyft_cpu_dropout(x.at, dtype, n, rng() * 0x100000001ull, 1u << 30, 1.5f, out.at, threads) == PYFT_OK,
         "dropout status", n, dtype, threads);
}

static void every_size(const Format& f, pyft_dtype dtype) {
  Tables tables(f);
  const long rows_of = f.bits == 4 ? 2 : 1;  // rows as blocks have whole bytes
  for (long n = 0; n < 140; ++n) quantize(f, tables, n, n % 2 ? 32 : 64, dtype, 1);
  for (long block = 32; block <= 4096; block *= 2) {
    for (long n : {block - 1, block, block + 1, 3 * block + 17}) quantize(f, tables, n, block, dtype, 2);
  }
  for (long row : {1, 3, 17, 33, 50, 129, 777}) quantize(f, tables, 5 * row * rows_of, row * rows_of, dtype, 1);
  quantize(f, tables, 40 * 4304 + 33, 64, dtype, 3);

  for (long cols : {0, 1, 2, 7, 31, 32, 33, 64, 97, 100, 257, 2152}) {
    for (long block : {32L, 64L, cols}) {
      if (block == 0 || (block == cols && (cols * f.bits % 8 || f.e8m0))) continue;
      Weight w(f, tables, 5, cols, block, !f.e8m0 && cols % 2);
      for (long begin : {0, 3}) {
        for (long gap : {0, 1, 16}) dequantize(w, {begin, 5, 0, cols}, gap, dtype, 2);
        dequantize(w, {begin, 5, cols / 3, cols - cols / 4}, 3, dtype, 1);
        dequantize(w, {begin, begin, 0, cols}, 1, dtype, 1);
      }
      for (long m : {0, 1, 3, 4, 6}) {
        Weight sane(f, tables, 5, cols, block, !f.e8m0 && m % 2, true);
        qlinear(sane, m, m % 3, cols % 2, dtype, 2);
      }
    }
  }
  for (long block = 32; block <= 4096; block *= 2) {
    Weight w(f, tables, 3, 777, block, !f.e8m0 && block % 3 == 1);
    dequantize(w, {1, 3, 0, 777}, 3, dtype, 1);
    dequantize(w, {0, 3, 5, 700}, 0, dtype, 1);
  }
  Weight wide(f, tables, 301, 1030, 128, !f.e8m0);
  for (long gap : {0, 5}) dequantize(wide, {1, 301, 0, 1030}, gap, dtype, 3);
  Weight product(f, tables, 70, 1061, 64, false, true);
  for (long m : {1, 9}) qlinear(product, m, 1, true, dtype, 3);
}

// Outputs no cache holds, at any address, and the advice to put them in large pages.
static void large_outputs(const Format& f, pyft_dtype dtype) {
  Tables tables(f);
  const long rows = (33 << 20) / item_of(dtype) / 4096;
  Weight w(f, tables, rows, 4096, 64, false);
  dequantize(w, {0, rows, 0, 4096}, 0, dtype, 3);
  dequantize(w, {0, rows, 0, 4096}, 0, dtype, 2, 1);
  dequantize(w, {0, rows, 0, 4096}, 32, dtype, 2);
}

static void huge_pages() {
  for (long bytes : {0L, 1L, 4096L, (2L << 20) - 1, 2L << 20, 5L << 20, (9L << 20) + 3}) {
    Buffer memory(bytes), before(bytes);
    expect(pyft_cpu_use_huge_pages(memory.at, bytes) == PYFT_OK, "huge pages status", bytes, 0, 0);
    expect(same_bytes(memory, before), "huge pages content", bytes, 0, 0);
  }
}

static void bad_arguments() {
  const Format& f = formats[0];
  Tables tables(f);
  uint8_t byte = 0;
  float value = 0;
  const auto scalar = PYFT_ISA_SCALAR;
  auto encode = [&](long n, long block, pyft_dtype dtype, int bits) {
    pyft_coding coding = tables.coding;
    coding.bits = bits;
    return pyft_cpu_quantize(&value, dtype, n, block, &coding, &byte, &value, nullptr, scalar, 1);
  };
  for (long block : {0, -64, 33}) expect(encode(1, block, PYFT_F32, 4) == PYFT_BAD_ARGUMENT, "bad block", block, 0, 0);
  for (int bits : {0, 3, 16}) expect(encode(1, 64, PYFT_F32, bits) == PYFT_BAD_ARGUMENT, "bad bits", bits, 0, 0);
  expect(encode(-1, 64, PYFT_F32, 4) == PYFT_BAD_ARGUMENT, "negative n", 0, 0, 0);
  expect(encode(1, 64, static_cast<pyft_dtype>(3), 4) == PYFT_BAD_ARGUMENT, "bad dtype", 0, 0, 0);

  Weight w(f, tables, 1, 1, 64, false);
  auto decode = [&](pyft_slab slab, long stride, long block, int bits) {
    pyft_weight weight = w.weight;
    weight.block_size = block, weight.bits = bits;
    return pyft_cpu_dequantize(&weight, &slab, &value, stride, PYFT_F32, scalar, 1);
  };
  const pyft_slab bad[] = {{-1, 1, 0, 1}, {0, 2, 0, 1}, {1, 0, 0, 1}, {0, 1, -1, 1}, {0, 1, 0, 2}, {0, 1, 1, 0}};
  for (const auto& slab : bad) expect(decode(slab, 4, 64, 4) == PYFT_BAD_ARGUMENT, "bad slab", 0, 0, 0);
  for (long block : {0, -64, 16, 48, 8192}) {
    expect(decode({0, 1, 0, 1}, 1, block, 4) == PYFT_BAD_ARGUMENT, "bad block", block, 0, 0);
  }
  expect(decode({0, 1, 0, 1}, 1, 64, 5) == PYFT_BAD_ARGUMENT, "bad bits", 0, 0, 0);
  Weight rows(f, tables, 3, 8, 64, false);
  Buffer out(96);
  const pyft_slab all = {0, 3, 0, 8};
  const auto near = pyft_cpu_dequantize(&rows.weight, &all, out.at, 7, PYFT_F32, scalar, 1);
  expect(near == PYFT_BAD_ARGUMENT, "rows that overlap", 0, 0, 0);
  expect(pyft_cpu_qlinear(&value, -1, 1, &w.weight, nullptr, &value, 1, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT,
         "negative m", 0, 0, 0);
  expect(pyft_cpu_dropout(&value, PYFT_F32, -1, 0, 0, 1, &value, 1) == PYFT_BAD_ARGUMENT, "negative n", 1, 0, 0);
  const auto isa = static_cast<pyft_isa>(9);
  expect(pyft_cpu_quantize(&value, PYFT_F32, 1, 64, &tables.coding, &byte, &value, nullptr, isa, 1) == PYFT_BAD_ISA,
         "bad isa", 0, 0, 0);
}

int main() {
  const pyft_dtype dtypes[] = {PYFT_F32, PYFT_F16, PYFT_BF16};
  for (const Format& f : formats) {
    subject = f.name;
    for (pyft_dtype dtype : dtypes) every_size(f, dtype);
  }
  for (const Format& f : formats) {
    subject = f.name;
    if (!strcmp(f.name, "nf4") || !strcmp(f.name, "int8")) large_outputs(f, f.bits == 4 ? PYFT_BF16 : PYFT_F32);
  }
  subject = "dropout";
  for (pyft_dtype dtype : dtypes) {
    for (long n : {0, 1, 3, 4, 5, 1001, 40003}) dropout(n, dtype, 3);
  }
  subject = "memory";
  huge_pages();
  subject = "arguments";
  bad_arguments();
  return report();
}
