// Numbers in memory: one, and four at once.
#ifndef MEMLM_CUDA_ELEMENTS_H_
#define MEMLM_CUDA_ELEMENTS_H_

#include "../include/memlm.h"
#include "device.h"

namespace memlm::cuda {

// From an array that is aligned to all four.
template <class T>
MEMLM_DEVICE void load_four(const T* from, float (&to)[4]) {
  if constexpr (sizeof(T) == 4) {
    const Vec4 v = load<Vec4>(from);
    to[0] = as_float(v.x), to[1] = as_float(v.y), to[2] = as_float(v.z), to[3] = as_float(v.w);
  } else {
    const Vec2 v = load<Vec2>(from);
    to[0] = low<T>(v.x), to[1] = high<T>(v.x), to[2] = low<T>(v.y), to[3] = high<T>(v.y);
  }
}

// From a packed matrix's scales or offsets, of 2 (f16) or 4 bytes each, aligned to all four.
MEMLM_DEVICE void load_scales(const uint8_t* from, int bytes, float (&to)[4]) {
  if (bytes == 2) {
    load_four(reinterpret_cast<const f16*>(from), to);
  } else {
    load_four(reinterpret_cast<const float*>(from), to);
  }
}

// One of them.
MEMLM_DEVICE float scale_at(const uint8_t* array, int bytes, int64_t i) {
  return bytes == 2 ? to_float(reinterpret_cast<const f16*>(array)[i])
                    : reinterpret_cast<const float*>(array)[i];
}

// To an array that is aligned to all four.
template <class T>
MEMLM_DEVICE void store_four(T* to, const float (&v)[4]) {
  if constexpr (sizeof(T) == 4) {
    store(to, Vec4{as_bits(v[0]), as_bits(v[1]), as_bits(v[2]), as_bits(v[3])});
  } else {
    store(to, Vec2{pair<T>(v[0], v[1]), pair<T>(v[2], v[3])});
  }
}

// Arrays of T, by index.
template <class T>
struct Elements {
  static MEMLM_DEVICE float read(const void* array, int64_t i) {
    return to_float(static_cast<const T*>(array)[i]);
  }
  static MEMLM_DEVICE void write(void* array, int64_t i, float v) {
    static_cast<T*>(array)[i] = from_float<T>(v);
  }
  static MEMLM_DEVICE void write_four(void* array, int64_t i, const float (&v)[4]) {
    store_four(static_cast<T*>(array) + i, v);
  }
};

// Arrays of a type that is known when the kernel runs: for the ends of kernels that are the same for all.
struct AnyElements {
  memlm_dtype dtype;

  MEMLM_DEVICE float read(const void* array, int64_t i) const {
    if (dtype == MEMLM_F32) return Elements<float>::read(array, i);
    return dtype == MEMLM_F16 ? Elements<f16>::read(array, i) : Elements<bf16>::read(array, i);
  }
  MEMLM_DEVICE void write(void* array, int64_t i, float v) const {
    if (dtype == MEMLM_F32) {
      Elements<float>::write(array, i, v);
    } else if (dtype == MEMLM_F16) {
      Elements<f16>::write(array, i, v);
    } else {
      Elements<bf16>::write(array, i, v);
    }
  }
  MEMLM_DEVICE void write_four(void* array, int64_t i, const float (&v)[4]) const {
    if (dtype == MEMLM_F32) {
      Elements<float>::write_four(array, i, v);
    } else if (dtype == MEMLM_F16) {
      Elements<f16>::write_four(array, i, v);
    } else {
      Elements<bf16>::write_four(array, i, v);
    }
  }
};

}  // namespace memlm::cuda

#endif
