// 4-bit block quantization for any CPU.
#include "quantize.h"

namespace {

template <pyft_dtype D>
float encode(const void* x, int64_t count, const float* midpoints, int zero_code, uint8_t* packed) {
  const auto* values = static_cast<const typename Dtype<D>::type*>(x);
  const float absmax = absmax_of<D>(values, count);
  encode_tail<D>(values, 0, count, absmax, midpoints, zero_code, packed);
  return absmax;
}

template <pyft_dtype D>
void decode(const uint8_t* packed, int64_t first, int64_t count, float absmax, const float* codes, void* out) {
  typename Dtype<D>::type table[16];
  scaled_codes<D>(codes, absmax, table);
  decode_tail<D>(packed, first, count, table, static_cast<typename Dtype<D>::type*>(out));
}

}  // namespace

const Quantize4 quantize4_scalar = {
    {encode<PYFT_F32>, encode<PYFT_F16>, encode<PYFT_BF16>},
    {decode<PYFT_F32>, decode<PYFT_F16>, decode<PYFT_BF16>},
};
