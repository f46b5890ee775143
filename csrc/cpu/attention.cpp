// Attention on CPU: choice of the instruction set, sequences, and how their work is divided over threads.
#include "attention.h"

#include <stdlib.h>

#include <atomic>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace {

constexpr int64_t kFar = int64_t{1} << 60;
// Multiplications below which a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 20;
// What dk and dv of whole kv heads may take in fp32, of all threads: half of the gradients, or this for each thread.
constexpr int64_t kSums = 2 << 20;

const AttentionKernels::Passes* passes_of(pyft_dtype dtype, pyft_isa isa) {
#ifdef PYFT_X86
  if (isa > pyft_cpu_best_isa()) return nullptr;
  if (isa == PYFT_ISA_AVX512 && dtype == PYFT_BF16 && __builtin_cpu_supports("avx512bf16")) {
    return &attention_avx512bf16.of[dtype];
  }
  if (isa == PYFT_ISA_AVX512) return &attention_avx512.of[dtype];
  if (isa == PYFT_ISA_AVX2) return &attention_avx2.of[dtype];
#endif
  return isa == PYFT_ISA_SCALAR ? &attention_scalar.of[dtype] : nullptr;
}

bool is_bad(const pyft_attention& a, pyft_dtype dtype) {
  const bool packed = a.cu_seqlens_q;
  return dtype < PYFT_F32 || dtype > PYFT_BF16 || a.batch < 0 || a.q_len < 0 || a.k_len < 0 || a.dim < 1 ||
         a.v_dim < 1 || a.q_heads < 0 || a.kv_heads < 0 || (a.kv_heads ? a.q_heads % a.kv_heads : a.q_heads) ||
         (a.bias && (a.bias_dtype < PYFT_F32 || a.bias_dtype > PYFT_BF16)) ||
         (packed && (!a.cu_seqlens_k || a.sequences < 0 || a.batch > 1 || a.bias));
}

int64_t clamp(int64_t x) { return std::clamp(x, -kFar, kFar); }

std::vector<Sequence> sequences_of(const pyft_attention& a) {
  std::vector<Sequence> all;
  auto add = [&](int64_t batch, int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end) {
    const int64_t queries = q_end - q_begin, keys = k_end - k_begin, offset = clamp(keys - queries + clamp(a.shift));
    const int64_t low = clamp(offset - clamp(a.left)), high = clamp(offset + clamp(a.right));
    all.push_back({batch, q_begin, queries, k_begin, keys, offset, low, high});
  };
  if (!a.cu_seqlens_q) {
    for (int64_t b = 0; b < a.batch; ++b) add(b, 0, a.q_len, 0, a.k_len);
  } else if (a.batch) {
    const int32_t *q = a.cu_seqlens_q, *k = a.cu_seqlens_k;
    for (int64_t n = 0; n < a.sequences; ++n) add(0, q[n], q[n + 1], k[n], k[n + 1]);
  }
  return all;
}

// How many of [0, n) are in [first, last].
int64_t overlap(int64_t first, int64_t last, int64_t n) {
  return std::max<int64_t>(0, std::min(last, n - 1) - std::max<int64_t>(first, 0) + 1);
}

// A kind of work: the items of one head, and how many heads there are.
struct Work {
  const AttentionPass& pass;
  int64_t heads;
  std::vector<AttentionItem> items;
  std::vector<int64_t> rows;  // of each item, how many rows of the other side it goes over, times rows of its own
  int64_t most_keys = 0;

  void add(const AttentionItem& item, int64_t cost) {
    items.push_back(item);
    rows.push_back(cost);
    most_keys = std::max(most_keys, item.sequence->keys);
  }

  // The longest first, that threads end together; of one head after the other, whose keys stay in the cache.
  void run(const AttentionCall& call, int threads) {
    const pyft_attention& a = call.attention;
    std::vector<size_t> order(items.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return rows[x] > rows[y]; });
    const int64_t count = static_cast<int64_t>(items.size()) * heads, bytes = pass.scratch(call, most_keys);
    const double pairs = static_cast<double>(std::accumulate(rows.begin(), rows.end(), int64_t{0}) * heads);
    const double shares = pairs * static_cast<double>(a.dim + a.v_dim) / kGrain;
    const int64_t parts = std::min(count, shares < threads ? static_cast<int64_t>(shares) + 1 : threads);
    if (parts == 0) return;
    const std::unique_ptr<void, void (*)(void*)> scratch(aligned_alloc(64, static_cast<size_t>(parts * bytes)), free);
    if (!scratch) throw std::bad_alloc();
    std::atomic<int64_t> next{0};
    const auto body = [&](int64_t part) {
      for (int64_t i; (i = next.fetch_add(1)) < count;) {
        AttentionItem item = items[order[static_cast<size_t>(i) % items.size()]];
        item.head = i / static_cast<int64_t>(items.size());
        pass.run(call, item, static_cast<char*>(scratch.get()) + part * bytes);
      }
    };
    if (parts == 1) return body(0);
    run_parts(parts, static_cast<int>(parts), body);
  }
};

void run_by_query(const AttentionCall& call, const AttentionPass& pass, const std::vector<Sequence>& sequences,
                  int threads) {
  Work work = {pass, call.attention.q_heads, {}, {}};
  for (const Sequence& s : sequences) {
    for (int64_t tile = 0; tile * kQueries < s.queries; ++tile) {
      const int64_t begin = tile * kQueries, end = std::min(s.queries, begin + kQueries);
      work.add({&s, 0, tile, 0}, (end - begin) * overlap(begin + s.low, end - 1 + s.high, s.keys));
    }
  }
  work.run(call, threads);
}

void run_by_key(const AttentionCall& call, const AttentionPass& pass, const std::vector<Sequence>& sequences,
                int threads) {
  const pyft_attention& a = call.attention;
  Work work = {pass, a.kv_heads, {}, {}};
  for (const Sequence& s : sequences) {
    for (int64_t tile = 0; tile * kKeys < s.keys; ++tile) {
      const int64_t begin = tile * kKeys, end = std::min(s.keys, begin + kKeys), group = a.q_heads / a.kv_heads;
      work.add({&s, 0, tile, 0}, (end - begin) * group * overlap(begin - s.high, end - 1 - s.low, s.queries));
    }
  }
  work.run(call, threads);
}

// Whether five products of whole kv heads take less time than seven in parts that divide evenly, and little memory.
bool whole_heads(const pyft_attention& a, const Work& work, pyft_dtype dtype, int threads) {
  const int64_t count = static_cast<int64_t>(work.items.size()) * work.heads;
  const int64_t parts = std::min<int64_t>(threads, count), item = dtype == PYFT_F32 ? 4 : 2;
  const int64_t q_elements = a.batch * a.q_heads * a.q_len * a.dim;
  const int64_t kv_elements = a.batch * a.kv_heads * a.k_len * (a.dim + a.v_dim);
  const int64_t sums = parts * work.most_keys * (a.dim + a.v_dim) * 4;
  if (sums > std::max(parts * kSums, (q_elements + kv_elements) * item / 2)) return false;
  std::vector<int64_t> busy(static_cast<size_t>(parts));
  int64_t total = 0;
  for (int64_t i = 0; i < count && count < 64 * parts; ++i) {
    const int64_t cost = work.rows[static_cast<size_t>(i) % work.rows.size()];
    *std::min_element(busy.begin(), busy.end()) += cost;
    total += cost;
  }
  return busy.empty() || 5 * *std::max_element(busy.begin(), busy.end()) * threads <= 7 * total;
}

}  // namespace

pyft_status pyft_cpu_attention(const pyft_attention* attention, const pyft_head_view* o, float* lse, pyft_dtype dtype,
                               pyft_isa isa, int threads) {
  if (is_bad(*attention, dtype)) return PYFT_BAD_ARGUMENT;
  const AttentionKernels::Passes* passes = passes_of(dtype, isa);
  if (!passes) return PYFT_BAD_ISA;
  const AttentionCall call = {*attention, o, lse, nullptr, nullptr};
  run_by_query(call, passes->forward, sequences_of(*attention), threads);
  return PYFT_OK;
}

pyft_status pyft_cpu_attention_delta(int64_t batch, int64_t heads, int64_t seq, int64_t dim, const pyft_head_view* o,
                                     const pyft_head_view* d_o, const float* d_lse, const int64_t d_lse_strides[3],
                                     float* delta, pyft_dtype dtype, pyft_isa isa, int threads) {
  if (batch < 0 || heads < 0 || seq < 0 || dim < 0 || dtype < PYFT_F32 || dtype > PYFT_BF16) return PYFT_BAD_ARGUMENT;
  const AttentionKernels::Passes* passes = passes_of(dtype, isa);
  if (!passes) return PYFT_BAD_ISA;
  parallel_rows(batch * heads * seq, dim, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / seq, first = begin % seq, last = std::min(seq, first + end - begin);
      const int64_t b = row / heads, h = row % heads;
      const float* d_row = d_lse ? d_lse + b * d_lse_strides[0] + h * d_lse_strides[1] : nullptr;
      passes->delta(*o, *d_o, b, h, first, last, dim, d_row, d_lse ? d_lse_strides[2] : 0, delta + row * seq);
      begin += last - first;
    }
  });
  return PYFT_OK;
}

pyft_status pyft_cpu_attention_backward(const pyft_attention* attention, const pyft_attention_backward* backward,
                                        pyft_dtype dtype, pyft_isa isa, int threads) {
  if (is_bad(*attention, dtype)) return PYFT_BAD_ARGUMENT;
  const AttentionKernels::Passes* passes = passes_of(dtype, isa);
  if (!passes) return PYFT_BAD_ISA;
  const AttentionCall call = {*attention, nullptr, nullptr, backward, nullptr};
  const std::vector<Sequence> sequences = sequences_of(*attention);
  const bool to_queries = backward->dq.data, to_keys = backward->dk.data || backward->dv.data;
  if (to_queries && to_keys) {
    Work whole = {passes->whole, attention->kv_heads, {}, {}};
    for (const Sequence& s : sequences) whole.add({&s, 0, 0, 0}, std::max<int64_t>(1, s.queries * s.keys));
    if (whole_heads(*attention, whole, dtype, threads)) {
      whole.run(call, threads);
      return PYFT_OK;
    }
  }
  if (to_queries) run_by_query(call, passes->by_query, sequences, threads);
  if (to_keys) run_by_key(call, passes->by_key, sequences, threads);
  return PYFT_OK;
}

pyft_status pyft_cpu_attention_bias_backward(const pyft_attention* attention, const pyft_attention_backward* backward,
                                             void* d_bias, pyft_dtype dtype, pyft_isa isa, int threads) {
  const pyft_attention& a = *attention;
  const bool scores = a.batch && a.q_heads && a.q_len && a.k_len;
  if (is_bad(a, dtype) || (scores && !a.bias)) return PYFT_BAD_ARGUMENT;
  const AttentionKernels::Passes* passes = passes_of(dtype, isa);
  if (!passes) return PYFT_BAD_ISA;
  const int64_t* strides = a.bias_strides;
  pyft_attention one = a;  // a row for each that the bias has
  if (!strides[0]) one.batch = 1;
  const std::vector<Sequence> sequences = sequences_of(one);
  const int64_t q_tiles = strides[2] ? tiles_of(a.q_len, kQueries) : 1;
  const int64_t k_tiles = strides[3] ? tiles_of(a.k_len, kKeys) : 1;
  Work work = {passes->bias, strides[1] ? a.q_heads : 1, {}, {}};
  for (const Sequence& s : sequences) {
    for (int64_t i = 0; i < q_tiles * k_tiles; ++i) {
      work.add({&s, 0, i / k_tiles, i % k_tiles}, std::max<int64_t>(1, a.q_len * a.k_len / (q_tiles * k_tiles)));
    }
  }
  pyft_attention_backward gradients = *backward;
  gradients.dq.data = gradients.dk.data = gradients.dv.data = nullptr;
  const AttentionCall call = {a, nullptr, nullptr, &gradients, d_bias};
  work.run(call, threads);
  return PYFT_OK;
}
