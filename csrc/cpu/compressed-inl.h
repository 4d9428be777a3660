// Reading codes front to back: those of dense tiles as they are, compressed ones (memlm/sparse_formats.py
// draws them) expanded on the way, 16 rows x 4 k at a time, to the blocks of bytes that dense codes
// unpack to.
#pragma once
#include "weights-inl.h"

namespace memlm {
namespace MEMLM_ISA {

template <class W, bool kCompressed = W::kCompressed>
struct Cursor {
  const W& codec;
  const uint8_t* codes;
  explicit Cursor(const Stretch<W>& s) : codec(s.codec), codes(s.codes) {}
  void prefetch_run() { prefetch(codes, tile_bytes(W::kBits, kActGroup)); }
  // Blocks 2i and 2i + 1 of a run, as Dots with K takes them (fast-inl.h).
  template <int K>
  void load2(int i, B& b0, B& b1) {
    codec.load2(codes, i, b0, b1);
    if (K > kLaneK) b_interleave(b0, b1);
  }
  void next_run() { codes += tile_bytes(W::kBits, kActGroup); }
};

template <class W>
struct Cursor<W, true> {
  const W codec;  // a copy, which stores of bytes cannot change: it stays in registers
  const uint8_t *codes, *places, *end;
  explicit Cursor(const Stretch<W>& s)
      : codec(s.codec), codes(s.codes), places(s.places), end(s.end) {}
  void prefetch_run() {
    prefetch(codes, tile_bytes(2, kActGroup));  // half of the nibbles
    prefetch(places, kActGroup / kLaneK * kPlaceBytes);
  }
  B next() { return codec.expand(*this); }
  template <int K>
  void load2(int, B& b0, B& b1) {
    b0 = codec.dot_block(next());
    b1 = codec.dot_block(next());
    if (K > kLaneK) b_interleave(b0, b1);
  }
  void next_run() {}
};

// Two of each 4 k.
struct TwoOfFour {
  template <class C>
  B operator()(C& cursor, uint8_t absent) const {
    const B b = b_expand_pairs(cursor.codes, cursor.places, absent);
    cursor.codes += kTileRows;
    cursor.places += kPlaceBytes;
    return b;
  }
};

// Those whose bit is set.  Whatever the bits say, nothing is read beyond a tile's end but the bytes that
// the format puts there.
struct Unstructured {
  Expander expander;
  template <class C>
  B operator()(C& cursor, uint8_t absent) const {
    uint64_t bits;
    memcpy(&bits, cursor.places, kPlaceBytes);
    const uint8_t* const codes = cursor.codes < cursor.end ? cursor.codes : cursor.end;
    cursor.codes = codes + (__builtin_popcountll(bits) + 1) / 2;
    cursor.places += kPlaceBytes;
    return expander(codes, bits, absent);
  }
};

template <class W, class Use, int... J>
__attribute__((always_inline)) inline void each_expanded(const W& codec, B b, F scale, F offset,
                                                         Use&& use, Indices<J...>) {
  (use(J, f_fma(codec.template weight<J>(b), scale, offset)), ...);
}

// each_weight, of compressed codes.
template <class W, class Use>
inline const uint8_t* each_expanded(const Stretch<W>& s, Use&& use) {
  Cursor<W> cursor(s);
  int64_t k = 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    const F scale = s.scale(g), offset = s.offset(g);
    for (int64_t sub = 0; sub < s.subs; ++sub) {
      cursor.prefetch_run();
      for (int i = 0; i < kActGroup; i += kLaneK, k += kLaneK)
        each_expanded(cursor.codec, cursor.next(), scale, offset,
                      [&](int j, F w) { use(k + j, j, w); }, Indices<0, 1, 2, 3>());
    }
  }
  return cursor.codes;
}

}  // namespace MEMLM_ISA
}  // namespace memlm
