// The registers and instructions of AMX's tile unit, in assembly: no compiler flag is needed.
#pragma once
#include <stdint.h>

namespace memlm {
namespace MEMLM_ISA {

// One tile register: 16 rows of 64 bytes.  A product adds x [16][64 bytes] times w to 16 x 16 sums,
// where row i of w holds 4 bytes of each of 16 rows of W: a block as memlm/formats.py draws it, or
// two bf16.  It takes 16 cycles: 1,024 multiply-adds per cycle of int8, 512 of bf16.
constexpr int kTileBytes = 1024;

// The tile registers are switched on while a TileUnit lives, all eight with 16 rows of 64 bytes.
class TileUnit {
 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64, "the layout that LDTILECFG reads");
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  ~TileUnit() { __asm__ volatile("tilerelease"); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// In assembly, because GCC 12's intrinsics do not say which memory they read.
template <int T>
inline void tile_load(const void* p) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(int64_t{64}), "i"(T) : "memory");
}
template <int T>
inline void tile_stream(const void* p) {  // what will not be needed soon, past the L1
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(int64_t{64}), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* p) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(int64_t{64}), "i"(T) : "memory");
}
template <int S, int X, int W>
inline void tile_dot_s8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(X), "i"(W));
}
// Denormal numbers count as zero, in the sums as well.
template <int S, int X, int W>
inline void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(S), "i"(X), "i"(W));
}

}  // namespace MEMLM_ISA
}  // namespace memlm
