// Block-wise quantization for any CPU.
#include "quantize.h"

namespace {

template <pyft_dtype D>
Range range(const void* x, int64_t count) {
  return extend<D>({0.0f, 0.0f}, static_cast<const typename Dtype<D>::type*>(x), count);
}

template <pyft_dtype D, int kBits>
void encode(const void* x, int64_t count, float scale, float zero, const pyft_coding& coding, uint8_t* packed) {
  encode_tail<D, kBits>(static_cast<const typename Dtype<D>::type*>(x), 0, count, scale, zero, coding, packed);
}

template <pyft_dtype D, int kBits>
void decode(const pyft_weight& w, int64_t begin, int64_t end, void* out) {
  using T = typename Dtype<D>::type;
  for_each_block(w, begin, end, [&](int64_t first, int64_t count, float scale, float zero, int64_t offset) {
    T* values = static_cast<T*>(out) + offset;
    if (kBits == 8) return decode_tail8<D>(w.packed + first, count, w.codes, scale, zero, values);
    T table[16];
    value_table<D>(w.codes, scale, zero, table);
    decode_tail4(w.packed, first, count, table, values);
  });
}

}  // namespace

const Quantize quantize_scalar = {
    {range<PYFT_F32>, range<PYFT_F16>, range<PYFT_BF16>},
    {{encode<PYFT_F32, 4>, encode<PYFT_F32, 8>},
     {encode<PYFT_F16, 4>, encode<PYFT_F16, 8>},
     {encode<PYFT_BF16, 4>, encode<PYFT_BF16, 8>}},
    {{decode<PYFT_F32, 4>, decode<PYFT_F32, 8>},
     {decode<PYFT_F16, 4>, decode<PYFT_F16, 8>},
     {decode<PYFT_BF16, 4>, decode<PYFT_BF16, 8>}},
};
