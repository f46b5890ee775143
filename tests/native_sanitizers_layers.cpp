// Runs the CPU kernels of norms, rotary embedding and activations on buffers of their exact size; built with
// sanitizers by test_native_sanitizers.py.
#include "native_sanitizers.h"

#include <math.h>

#include <functional>
#include <memory>

// [rows, cols] of a dtype, rows `gap` elements further apart than they need be; nothing behind the last row.
struct Matrix {
  Matrix(long rows, long cols, long gap, pyft_dtype dtype)
      : memory(rows ? ((rows - 1) * (cols + gap) + cols) * item_of(dtype) : 0),
        rows(rows),
        cols(cols),
        stride(cols + gap),
        dtype(dtype) {}
  Matrix& filled() {
    fill(memory, dtype);
    return *this;
  }
  Buffer memory;
  long rows, cols, stride;
  pyft_dtype dtype;
};

using Outputs = std::vector<std::unique_ptr<Matrix>>;

// Close to what the scalar code wrote, and nothing between the rows.
static void compare(const Matrix& found, const Matrix& scalar, int isa) {
  const float allowed = found.dtype == PYFT_F32 ? 1e-4f : found.dtype == PYFT_F16 ? 4e-3f : 2e-2f;
  bool close = true, kept = true;
  for (long r = 0; r < found.rows; ++r) {
    for (long c = 0; c < found.cols; ++c) {
      const float a = value_of(found.memory, r * found.stride + c, found.dtype);
      const float b = value_of(scalar.memory, r * found.stride + c, found.dtype);
      close &= fabsf(a - b) <= allowed * (1 + fabsf(b));
    }
    const long item = item_of(found.dtype), gap = r + 1 < found.rows ? found.stride - found.cols : 0;
    for (long j = 0; j < gap * item; ++j) {
      kept &= static_cast<uint8_t>(found.memory.at[(r * found.stride + found.cols) * item + j]) == 0xA5;
    }
  }
  expect(close, "values", found.rows, found.cols, isa);
  expect(kept, "between rows", found.rows, found.cols, isa);
}

// `call` fills the outputs that `make` gives, on each instruction set.
static void every_isa(const std::function<Outputs()>& make,
                      const std::function<pyft_status(Outputs&, pyft_isa)>& call) {
  Outputs scalar;
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    Outputs outputs = make();
    expect(call(outputs, static_cast<pyft_isa>(isa)) == PYFT_OK, "status", isa, 0, 0);
    if (isa == 0) scalar = std::move(outputs);
    const Outputs& found = isa == 0 ? scalar : outputs;
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i]) compare(*found[i], *scalar[i], isa);
    }
  }
}

template <class T = void>
static T* address(const std::unique_ptr<Matrix>& m) {
  return m ? reinterpret_cast<T*>(m->memory.at) : nullptr;
}
static long stride(const std::unique_ptr<Matrix>& m) { return m ? m->stride : 0; }

static void norm(long rows, long cols, long gap, pyft_dtype dtype, int threads) {
  auto matrix = [&](bool there) {
    return there ? std::make_unique<Matrix>(rows, cols, gap, dtype) : std::unique_ptr<Matrix>();
  };
  auto floats = [&](bool there, long n, long m) {
    return there ? std::make_unique<Matrix>(n, m, 0, PYFT_F32) : std::unique_ptr<Matrix>();
  };
  const bool residual = rng() % 2, centered = rng() % 2, trained = rng() % 2;
  const long parts = 1 + rng() % 3;
  Matrix x = Matrix(rows, cols, gap, dtype).filled(), more = Matrix(rows, cols, gap, dtype).filled();
  Matrix weight = Matrix(1, cols, 0, dtype).filled(), bias = Matrix(1, cols, 0, dtype).filled();
  const void* scale = rng() % 2 ? weight.memory.at : nullptr;
  every_isa(
      [&] {
        Outputs outputs;
        for (bool there : {true, residual}) outputs.push_back(matrix(there));
        for (bool there : {centered, true}) outputs.push_back(floats(there, 1, rows));
        return outputs;
      },
      [&](Outputs& o, pyft_isa isa) {
        const pyft_norm norm = {rows,
                                cols,
                                x.memory.at,
                                residual ? more.memory.at : nullptr,
                                scale,
                                centered ? bias.memory.at : nullptr,
                                address(o[0]),
                                address(o[1]),
                                address<float>(o[2]),
                                address<float>(o[3]),
                                x.stride,
                                more.stride,
                                stride(o[0]),
                                stride(o[1]),
                                1e-6f,
                                1.0f};
        return pyft_cpu_norm(&norm, dtype, isa, threads);
      });
  Matrix mean = Matrix(1, rows, 0, PYFT_F32).filled(), rstd = Matrix(1, rows, 0, PYFT_F32).filled();
  every_isa(
      [&] {
        Outputs outputs;
        outputs.push_back(matrix(true));
        for (int i = 0; i < 2; ++i) outputs.push_back(floats(trained, parts, cols));
        return outputs;
      },
      [&](Outputs& o, pyft_isa isa) {
        const pyft_norm_backward norm = {rows,
                                         cols,
                                         parts,
                                         more.memory.at,
                                         x.memory.at,
                                         scale,
                                         residual ? more.memory.at : nullptr,
                                         centered ? reinterpret_cast<float*>(mean.memory.at) : nullptr,
                                         reinterpret_cast<float*>(rstd.memory.at),
                                         address(o[0]),
                                         address<float>(o[1]),
                                         address<float>(o[2]),
                                         more.stride,
                                         x.stride,
                                         more.stride,
                                         stride(o[0]),
                                         1.0f};
        return pyft_cpu_norm_backward(&norm, dtype, isa, threads);
      });
}

static void glu(long rows, long cols, long gap, pyft_activation activation, pyft_dtype dtype, int threads) {
  const bool gated = rng() % 2, again = rng() % 2;
  Matrix dy = Matrix(rows, cols, gap, dtype).filled(), gate = Matrix(rows, cols, gap, dtype).filled();
  Matrix up = Matrix(rows, cols, gap, dtype).filled();
  const void* factor = gated ? up.memory.at : nullptr;
  auto outputs_of = [&](std::vector<bool> there) {
    return [&, there] {
      Outputs outputs;
      for (bool one : there) outputs.push_back(one ? std::make_unique<Matrix>(rows, cols, gap, dtype) : nullptr);
      return outputs;
    };
  };
  every_isa(outputs_of({true}), [&](Outputs& o, pyft_isa isa) {
    const pyft_glu glu = {rows,          cols,        activation, gate.memory.at, factor,
                          address(o[0]), gate.stride, up.stride,  stride(o[0])};
    return pyft_cpu_glu(&glu, dtype, isa, threads);
  });
  every_isa(outputs_of({true, gated, again}), [&](Outputs& o, pyft_isa isa) {
    const pyft_glu_backward glu = {rows,        cols,          activation,    dy.memory.at,  gate.memory.at,
                                   factor,      address(o[0]), address(o[1]), address(o[2]), dy.stride,
                                   gate.stride, up.stride,     stride(o[0]),  stride(o[1]),  stride(o[2])};
    return pyft_cpu_glu_backward(&glu, dtype, isa, threads);
  });
  gate.memory.randomise(), up.memory.randomise();  // no pattern of bits is undefined behaviour
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    Matrix out(rows, cols, 0, dtype);
    const pyft_glu glu = {rows,          cols,        activation, gate.memory.at, factor,
                          out.memory.at, gate.stride, up.stride,  out.stride};
    expect(pyft_cpu_glu(&glu, dtype, static_cast<pyft_isa>(isa), threads) == PYFT_OK, "status", rows, cols, isa);
  }
}

static void rope(long batch, long heads, long seq, long dim, long half, bool heads_first, pyft_dtype dtype,
                 int threads) {
  const long gap = rng() % 4, rows = batch * seq;
  const bool named = rng() % 2, wide = rng() % 2;
  const pyft_dtype table_dtype = wide ? PYFT_F32 : dtype;
  const long table_rows = named ? 5 : rows;
  Matrix cos = Matrix(table_rows, half, gap, table_dtype).filled();
  Matrix sin = Matrix(table_rows, half, gap, table_dtype).filled();
  std::vector<int64_t> places(rows);
  for (auto& place : places) place = rng() % table_rows;
  Buffer positions(places);
  const long count = heads_first ? rows * heads : rows, width = heads_first ? dim : heads * dim;
  Matrix x = Matrix(count, width, gap, dtype).filled();
  const int interleaved = rng() % 2, inverse = rng() % 2;
  every_isa(
      [&] {
        Outputs outputs;
        for (int i = 0; i < 2; ++i) outputs.push_back(std::make_unique<Matrix>(count, width, gap, dtype));
        return outputs;
      },
      [&](Outputs& o, pyft_isa isa) {
        const pyft_rope rope = {batch,         seq,
                                dim,           half,
                                cos.memory.at, sin.memory.at,
                                table_dtype,   named ? 0 : seq * cos.stride,
                                cos.stride,    named ? 0 : seq * sin.stride,
                                sin.stride,    named ? positions.as<int64_t>() : nullptr,
                                seq,           1,
                                interleaved,   inverse};
        const long s = x.stride, a = heads_first ? heads * seq * s : seq * s, b = heads_first ? seq * s : dim;
        const pyft_heads q = {x.memory.at, address(o[0]), heads, a, b, s, a, b, s};
        const pyft_heads k = {x.memory.at, address(o[1]), heads, a, b, s, a, b, s};
        return pyft_cpu_rope(&rope, &q, heads > 1 ? &k : nullptr, dtype, isa, threads);
      });
}

static void bad_arguments() {
  const auto scalar = PYFT_ISA_SCALAR;
  const auto none = static_cast<pyft_dtype>(3);
  float a[16] = {}, b[16] = {}, c[16] = {};
  pyft_norm norm = {2, 4, a, nullptr, nullptr, nullptr, b, nullptr, nullptr, c, 4, 0, 3, 0, 1e-6f, 0};
  expect(pyft_cpu_norm(&norm, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "rows that overlap", 0, 0, 0);
  norm.y_stride = 4, norm.residual = a, norm.residual_stride = 4;
  expect(pyft_cpu_norm(&norm, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "no h", 0, 0, 0);
  norm.residual = nullptr;
  expect(pyft_cpu_norm(&norm, none, scalar, 1) == PYFT_BAD_ARGUMENT, "dtype", 0, 0, 0);
  norm.rows = -1;
  expect(pyft_cpu_norm(&norm, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "rows", 0, 0, 0);
  const pyft_norm_backward no_parts = {2, 4, 0, a, a, nullptr, nullptr, nullptr, c, b, c, nullptr, 4, 4, 0, 4, 0};
  expect(pyft_cpu_norm_backward(&no_parts, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "no parts", 0, 0, 0);

  const pyft_glu glu = {2, 4, PYFT_SILU, a, a, b, 4, 4, 3};
  expect(pyft_cpu_glu(&glu, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "rows that overlap", 0, 0, 0);

  pyft_rope rope = {1, 1, 4, 3, a, a, PYFT_F32, 0, 0, 0, 0, nullptr, 0, 0, 0, 0};
  const pyft_heads q = {a, b, 1, 4, 4, 4, 4, 4, 4};
  expect(pyft_cpu_rope(&rope, &q, nullptr, PYFT_F32, scalar, 1) == PYFT_BAD_ARGUMENT, "half", 0, 0, 0);
  rope.half = 2, rope.table_dtype = PYFT_BF16;
  expect(pyft_cpu_rope(&rope, &q, nullptr, PYFT_F16, scalar, 1) == PYFT_BAD_ARGUMENT, "tables", 0, 0, 0);
}

int main() {
  for (pyft_dtype dtype : {PYFT_F32, PYFT_F16, PYFT_BF16}) {
    for (long cols : {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100, 511, 515, 2051}) {
      for (long rows : {0, 1, 3, 6}) {
        const long gap = rng() % 4;
        subject = "norm";
        norm(rows, cols, gap, dtype, 1 + rng() % 2);
        subject = "glu";
        for (auto activation : {PYFT_SILU, PYFT_GELU, PYFT_GELU_TANH, PYFT_RELU2}) {
          glu(rows, cols, gap, activation, dtype, 1 + rng() % 2);
        }
      }
    }
    subject = "norm";
    norm(200, 515, 1, dtype, 3);
    subject = "glu";
    glu(200, 515, 1, PYFT_SILU, dtype, 3);
    subject = "rope";
    for (long dim : {2, 5, 16, 33, 64, 130, 300}) {
      for (long half : {0L, 1L, dim / 4, dim / 2}) {
        for (bool heads_first : {false, true}) {
          rope(2, 1 + rng() % 3, 11, dim, half, heads_first, dtype, 1);
          rope(rng() % 2, 2, rng() % 2, dim, half, heads_first, dtype, 1);
        }
      }
    }
    for (bool heads_first : {false, true}) rope(3, 4, 200, 70, 35, heads_first, dtype, 3);
  }
  subject = "arguments";
  bad_arguments();
  return report();
}
