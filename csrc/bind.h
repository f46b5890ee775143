// What the two Python modules share: addresses as Python has them, put into the structures of pyft.h.
#pragma once

#include "pyft.h"

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline pyft_weight weight_of(int bits, uintptr_t packed, uintptr_t scales, uintptr_t zeros, uintptr_t nested,
                             uintptr_t offset, uintptr_t codes, uintptr_t scale_codes, int64_t rows, int64_t cols,
                             int64_t block_size) {
  return {bits,
          pointer<uint8_t>(packed),
          pointer<void>(scales),
          pointer<uint8_t>(zeros),
          pointer<float>(nested),
          pointer<float>(offset),
          pointer<float>(codes),
          pointer<float>(scale_codes),
          rows,
          cols,
          block_size};
}

}  // namespace
