// Runs the CPU kernels of attention on buffers of their exact size; built with sanitizers by test_native_sanitizers.py.
#include <functional>
#include <memory>

#include "native_sanitizers.h"

// [batch, heads, seq, dim], or with seq before heads, rows `gap` elements further apart than they need be.
struct Heads {
  Heads(long batch, long heads, long seq, long dim, long gap, bool heads_first, pyft_dtype dtype)
      : batch(batch),
        heads(heads),
        seq(seq),
        dim(dim),
        row(heads_first ? dim + gap : heads * dim + gap),
        head(heads_first ? seq * row : dim),
        all(heads_first ? heads * head : seq * row),
        dtype(dtype),
        memory(count() * item_of(dtype)) {}
  long count() const {
    return batch * heads * seq ? (batch - 1) * all + (heads - 1) * head + (seq - 1) * row + dim : 0;
  }
  Heads& filled() {
    fill(memory, dtype);
    return *this;
  }
  pyft_head_view view() const { return {memory.at, all, head, row}; }
  long batch, heads, seq, dim, row, head, all;
  pyft_dtype dtype;
  Buffer memory;
};

using Outputs = std::vector<std::unique_ptr<Heads>>;

// Close to what the scalar code wrote, and nothing between the rows.
static void compare(const Heads& found, const Heads& scalar, float allowed, int isa) {
  std::vector<bool> written(found.count());
  for (long b = 0; b < found.batch; ++b) {
    for (long h = 0; h < found.heads; ++h) {
      for (long s = 0; s < found.seq; ++s) {
        const long first = b * found.all + h * found.head + s * found.row;
        for (long d = 0; d < found.dim; ++d) written[first + d] = true;
      }
    }
  }
  float largest = 1, error = 0;
  bool kept = true;
  for (long i = 0; i < found.count(); ++i) {
    const float a = value_of(found.memory, i, found.dtype), b = value_of(scalar.memory, i, found.dtype);
    if (written[i] && a != b) {
      largest = fmaxf(largest, fabsf(b));
      error = fabsf(a - b) <= error ? error : fabsf(a - b);  // NaN too
    }
    const long item = item_of(found.dtype);
    for (long k = 0; !written[i] && k < item; ++k) {
      kept &= static_cast<uint8_t>(found.memory.at[i * item + k]) == 0xA5;
    }
  }
  expect(error <= allowed * largest, "values", found.seq, found.dim, isa);
  expect(kept, "between rows", found.seq, found.dim, isa);
}

static void every_isa(pyft_dtype dtype, const std::function<Outputs()>& make,
                      const std::function<pyft_status(Outputs&, pyft_isa)>& call) {
  const float allowed = dtype == PYFT_F32 ? 1e-4f : dtype == PYFT_F16 ? 4e-3f : 4e-2f;
  Outputs scalar;
  for (int isa = 0; isa <= pyft_cpu_best_isa(); ++isa) {
    Outputs outputs = make();
    expect(call(outputs, static_cast<pyft_isa>(isa)) == PYFT_OK, "status", isa, 0, 0);
    if (isa == 0) scalar = std::move(outputs);
    const Outputs& found = isa == 0 ? scalar : outputs;
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i]) compare(*found[i], *scalar[i], allowed, isa);
    }
  }
}

static pyft_head_view view_of(const std::unique_ptr<Heads>& x) { return x ? x->view() : pyft_head_view{}; }
static bool coin() { return rng() % 2; }
static std::vector<float> numbers(long n) {
  std::vector<float> x(n);
  for (float& value : x) value = static_cast<float>(rng() % 1000) / 1000;
  return x;
}

struct Sizes {
  long batch, q_heads, group, q_len, k_len, dim, v_dim;
};

static void run(const Sizes& n, std::vector<int32_t> cu_q, std::vector<int32_t> cu_k, pyft_dtype dtype, bool any_bits) {
  const bool packed = !cu_q.empty();
  const int threads = 1 + rng() % 4;
  auto heads = [&](long heads, long seq, long dim) {
    return Heads(n.batch, heads, seq, dim, rng() % 4, coin(), dtype).filled();
  };
  const long kv_heads = n.q_heads / n.group;
  Heads q = heads(n.q_heads, n.q_len, n.dim), k = heads(kv_heads, n.k_len, n.dim),
        v = heads(kv_heads, n.k_len, n.v_dim);
  Heads d_o = heads(n.q_heads, n.q_len, n.v_dim), o = heads(n.q_heads, n.q_len, n.v_dim);
  if (any_bits) q.memory.randomise(), k.memory.randomise(), v.memory.randomise(), d_o.memory.randomise();
  Buffer sinks(numbers(n.q_heads)), slopes(numbers(n.batch * n.q_heads)), starts_q(cu_q), starts_k(cu_k);
  const bool biased = !packed && coin();
  const auto bias_dtype = static_cast<pyft_dtype>(rng() % 3);
  long kept[4], strides[4], sizes[4] = {n.batch, n.q_heads, n.q_len, n.k_len}, count = 1;
  for (int i = 3; i >= 0; --i) {
    kept[i] = coin() ? sizes[i] : 1;
    strides[i] = kept[i] == sizes[i] && (sizes[i] > 1 || coin()) ? count : 0;
    if (!strides[i]) kept[i] = 1;
    count *= kept[i];
  }
  Heads bias(kept[0], kept[1], kept[2], kept[3], 0, true, bias_dtype);
  bias.filled();

  pyft_attention a = {n.batch, n.q_heads, kv_heads, n.q_len, n.k_len, n.dim, n.v_dim, q.view(), k.view(), v.view()};
  a.sinks = coin() ? sinks.as<float>() : nullptr;
  a.slopes = coin() ? slopes.as<float>() : nullptr;
  a.bias = biased ? bias.memory.at : nullptr;
  a.bias_dtype = bias_dtype;
  for (int i = 0; i < 4; ++i) a.bias_strides[i] = strides[i];
  if (packed) {
    a.cu_seqlens_q = starts_q.as<int32_t>(), a.cu_seqlens_k = starts_k.as<int32_t>();
    a.sequences = static_cast<int64_t>(cu_q.size()) - 1;
  }
  a.scale = 0.1f;
  a.softcap = coin() ? 2.0f : 0.0f;
  a.left = coin() ? rng() % 100 : PYFT_UNBOUNDED;
  a.right = coin() ? static_cast<long>(rng() % 50) - 10 : PYFT_UNBOUNDED;
  a.shift = static_cast<long>(rng() % 20) - 10;
  a.threshold = coin() ? 1u << 30 : 0;
  a.seed = 77, a.keep = 4.0f / 3;

  every_isa(
      dtype,
      [&] {
        Outputs outputs;
        outputs.push_back(std::make_unique<Heads>(n.batch, n.q_heads, n.q_len, n.v_dim, 3, false, dtype));
        outputs.push_back(std::make_unique<Heads>(n.batch, n.q_heads, n.q_len, 1, 0, true, PYFT_F32));
        return outputs;
      },
      [&](Outputs& out, pyft_isa isa) {
        const pyft_head_view view = view_of(out[0]);
        const pyft_status status = pyft_cpu_attention(&a, &view, out[1]->memory.as<float>(), dtype, isa, threads);
        if (any_bits) out.clear();
        return status;
      });
  Heads lse(n.batch, n.q_heads, n.q_len, 1, 0, true, PYFT_F32), delta = lse;
  const pyft_head_view o_view = o.view(), d_o_view = d_o.view();
  expect(pyft_cpu_attention(&a, &o_view, lse.memory.as<float>(), dtype, PYFT_ISA_SCALAR, 1) == PYFT_OK, "o", 0, 0, 0);
  Buffer d_lse(numbers(1));
  const int64_t none[3] = {};
  every_isa(
      PYFT_F32,
      [&] {
        Outputs outputs;
        outputs.push_back(std::make_unique<Heads>(n.batch, n.q_heads, n.q_len, 1, 0, true, PYFT_F32));
        return outputs;
      },
      [&](Outputs& out, pyft_isa isa) {
        float* sums = out[0]->memory.as<float>();
        const pyft_status status = pyft_cpu_attention_delta(n.batch, n.q_heads, n.q_len, n.v_dim, &o_view, &d_o_view,
                                                            d_lse.as<float>(), none, sums, dtype, isa, threads);
        if (isa == PYFT_ISA_SCALAR) memcpy(delta.memory.at, sums, delta.memory.size);
        if (any_bits) out.clear();
        return status;
      });
  pyft_attention_backward b = {d_o_view, lse.memory.as<float>(), delta.memory.as<float>(), {}, {}, {}};
  const bool wanted[3] = {coin() || coin(), coin() || coin(), coin() || coin()};
  every_isa(
      dtype,
      [&] {
        Outputs outputs;
        for (int i = 0; i < 3; ++i) {
          const Heads& like = i == 0 ? q : i == 1 ? k : v;
          outputs.push_back(wanted[i] ? std::make_unique<Heads>(n.batch, like.heads, like.seq, like.dim, 2, true, dtype)
                                      : nullptr);
        }
        return outputs;
      },
      [&](Outputs& out, pyft_isa isa) {
        b.dq = view_of(out[0]), b.dk = view_of(out[1]), b.dv = view_of(out[2]);
        const pyft_status status = pyft_cpu_attention_backward(&a, &b, dtype, isa, threads);
        if (any_bits) out.clear();
        return status;
      });
  if (!biased) return;
  every_isa(
      dtype == PYFT_F32 ? bias_dtype : dtype,
      [&] {
        Outputs outputs;
        outputs.push_back(std::make_unique<Heads>(kept[0], kept[1], kept[2], kept[3], 0, true, bias_dtype));
        return outputs;
      },
      [&](Outputs& out, pyft_isa isa) {
        const pyft_status status = pyft_cpu_attention_bias_backward(&a, &b, out[0]->memory.at, dtype, isa, threads);
        if (any_bits) out.clear();
        return status;
      });
}

static void bad_arguments() {
  float x[8] = {};
  pyft_attention a = {1, 1, 1, 1, 1, 4, 4, {x, 4, 4, 4}, {x, 4, 4, 4}, {x, 4, 4, 4}};
  const pyft_head_view o = {x, 4, 4, 4};
  auto status = [&](pyft_dtype dtype) { return pyft_cpu_attention(&a, &o, x, dtype, PYFT_ISA_SCALAR, 1); };
  expect(status(static_cast<pyft_dtype>(3)) == PYFT_BAD_ARGUMENT, "dtype", 0, 0, 0);
  a.q_heads = 3, a.kv_heads = 2;
  expect(status(PYFT_F32) == PYFT_BAD_ARGUMENT, "heads", 0, 0, 0);
  a.q_heads = 2, a.dim = 0;
  expect(status(PYFT_F32) == PYFT_BAD_ARGUMENT, "dim", 0, 0, 0);
  const int32_t starts[2] = {0, 1};
  a.dim = 4, a.cu_seqlens_q = starts;
  expect(status(PYFT_F32) == PYFT_BAD_ARGUMENT, "sequences of keys", 0, 0, 0);
}

int main() {
  const long lengths[] = {0, 1, 2, 5, 16, 31, 63, 64, 65, 130}, widths[] = {1, 2, 7, 16, 17, 33, 40, 64, 97};
  auto length = [&] { return lengths[rng() % 10]; };
  auto width = [&] { return widths[rng() % 9]; };
  for (pyft_dtype dtype : {PYFT_F32, PYFT_F16, PYFT_BF16}) {
    for (int i = 0; i < 110; ++i) {
      subject = "attention";
      const long group = 1 + rng() % 3, q_heads = group * (1 + rng() % 2);
      run({1 + static_cast<long>(rng() % 2), q_heads, group, length(), length(), width(), width()}, {}, {}, dtype,
          false);
      subject = "packed attention";
      std::vector<int32_t> q = {0}, k = {0};
      for (int s = rng() % 4; s >= 0; --s) q.push_back(q.back() + length()), k.push_back(k.back() + length());
      run({1, q_heads, group, q.back(), k.back(), width(), width()}, q, k, dtype, false);
    }
    subject = "attention of any bits";  // no pattern of bits is undefined behaviour
    for (int i = 0; i < 20; ++i) run({1, 2, 1, length(), length(), width(), width()}, {}, {}, dtype, true);
    subject = "long attention";
    run({1, 2, 2, 300, 300, 24, 40}, {}, {}, dtype, false);
  }
  subject = "arguments";
  bad_arguments();
  return report();
}
