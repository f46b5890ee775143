// Optimizers with 8-bit states for any CPU.
#include "optim.h"

namespace {

struct Scalar : PlainMaps {
  template <pyft_dtype D>
  static void widen(const typename Dtype<D>::type* from, float* to) {
    for (int i = 0; i < kOptimBlock; ++i) to[i] = Dtype<D>::load(from[i]);
  }

  template <pyft_dtype D>
  static void narrow(const float* from, typename Dtype<D>::type* to) {
    for (int i = 0; i < kOptimBlock; ++i) to[i] = Dtype<D>::store(from[i]);
  }

  template <bool kSigned>
  static void decode(const uint8_t* codes, float absmax, const Maps& maps, float* out) {
    const float* map = codes_of<kSigned>(maps);
    for (int i = 0; i < kOptimBlock; ++i) out[i] = map[codes[i]] * absmax;
  }

  template <bool kSigned>
  static void encode(const float* x, float absmax, const Maps& maps, uint8_t* codes) {
    const float* midpoints = midpoints_of<kSigned>(maps);
    const uint8_t* starts = starts_of<kSigned>(maps);
    for (int i = 0; i < kOptimBlock; ++i) {
      const float scaled = x[i] / absmax;
      const uint32_t magnitude = bits_of(scaled) & kMagnitude;
      const uint32_t bucket =
          ((magnitude > kSmallest ? magnitude : kSmallest) - kSmallest) >> (23 - PYFT_OPTIM_MANTISSA);
      int code = starts[bucket + (kSigned && scaled < 0.0f ? PYFT_OPTIM_BUCKETS : 0)];
      code += scaled > midpoints[code];
      if (!kSigned && code == 0 && x[i] > 0.0f) code = 1;
      codes[i] = static_cast<uint8_t>(code);
    }
  }
};

}  // namespace

const OptimKernels optim_scalar = {
    Scalar::prepare,
    {update_tensor<Scalar, PYFT_F32>, update_tensor<Scalar, PYFT_F16>, update_tensor<Scalar, PYFT_BF16>},
};
