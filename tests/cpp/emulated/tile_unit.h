// The tile unit that csrc/cpu/tile_unit.h describes, in plain C++.
#pragma once
#include <stdint.h>
#include <string.h>

namespace memlm {
namespace MEMLM_ISA {

constexpr int kTileBytes = 1024;

struct Tile { uint8_t bytes[16][64]; };
static thread_local Tile tiles[8];
static thread_local bool tiles_on = false;

struct TileUnit {
  TileUnit() {
    tiles_on = true;
    memset(tiles, 0xff, sizeof tiles);  // not what the unit does: it shows what nobody has loaded
  }
  ~TileUnit() { tiles_on = false; }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// Registers exist while the unit is on.
inline Tile& tile(int t) {
  if (!tiles_on) __builtin_trap();
  return tiles[t];
}
template <int T>
inline void tile_load(const void* p) {
  memcpy(&tile(T), p, sizeof(Tile));
}
template <int T>
inline void tile_stream(const void* p) { tile_load<T>(p); }
template <int T>
inline void tile_store(void* p) {
  memcpy(p, &tile(T), sizeof(Tile));
}

// Sums of products: kPer numbers of x and w stand in the four bytes of a lane.
template <class Sum, class Number, int kPer, class Convert>
inline void tile_dot(Tile& s, const Tile& x, const Tile& w, const Convert& convert) {
  for (int i = 0; i < 16; ++i)
    for (int lane = 0; lane < 16; ++lane) {
      Sum sum;
      memcpy(&sum, &s.bytes[i][4 * lane], 4);
      for (int k = 0; k < 16; ++k) {
        Number a[kPer], b[kPer];
        memcpy(a, &x.bytes[i][4 * k], 4);
        memcpy(b, &w.bytes[k][4 * lane], 4);
        for (int j = 0; j < kPer; ++j) sum += convert(a[j]) * convert(b[j]);
      }
      memcpy(&s.bytes[i][4 * lane], &sum, 4);
    }
}
template <int S, int X, int W>
inline void tile_dot_s8() {
  tile_dot<int32_t, int8_t, 4>(tile(S), tile(X), tile(W), [](int8_t v) { return int32_t{v}; });
}
template <int S, int X, int W>
inline void tile_dot_bf16() {
  const auto convert = [](uint16_t v) {
    const uint32_t bits = v & 0x7f80 ? uint32_t{v} << 16 : 0;  // denormal numbers count as zero
    float number;
    memcpy(&number, &bits, 4);
    return number;
  };
  tile_dot<float, uint16_t, 2>(tile(S), tile(X), tile(W), convert);
}

}  // namespace MEMLM_ISA
}  // namespace memlm
