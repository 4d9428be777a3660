// A thread's rounding mode, and whether it flushes denormals to zero.
#pragma once
#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace memlm {

#if defined(__x86_64__)
using FloatControl = uint32_t;
constexpr FloatControl kFloatMode = 0xe040;  // MXCSR: FTZ, rounding (2 bits), DAZ
inline FloatControl float_control() { return _mm_getcsr(); }
inline void set_float_control(FloatControl control) { _mm_setcsr(control); }
#elif defined(__aarch64__)
using FloatControl = uint64_t;
constexpr FloatControl kFloatMode = 0x3c80000;  // FPCR: AHP, FZ, rounding (2 bits), FZ16
inline FloatControl float_control() {
  FloatControl control;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control));
  return control;
}
inline void set_float_control(FloatControl control) {
  __asm__ volatile("msr fpcr, %0" : : "r"(control));
}
#else
using FloatControl = uint32_t;
constexpr FloatControl kFloatMode = 0;
inline FloatControl float_control() { return 0; }
inline void set_float_control(FloatControl) {}
#endif

// The mode of `control` for this thread while it lives.
class WithFloatMode {
 public:
  explicit WithFloatMode(FloatControl control) : before_(float_control()) {
    changes_ = (before_ ^ control) & kFloatMode;
    if (changes_) set_float_control(before_ ^ changes_);
  }
  ~WithFloatMode() {
    if (changes_) set_float_control(before_);
  }
  WithFloatMode(const WithFloatMode&) = delete;
  WithFloatMode& operator=(const WithFloatMode&) = delete;

 private:
  FloatControl before_, changes_;
};

}  // namespace memlm
