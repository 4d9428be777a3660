// Expanding packed nibbles to bytes at given places, for x86-64 without VBMI2's vpexpandb.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace memlm {
namespace MEMLM_ISA {

// For each 8 bits, which byte of the stored ones goes where one is set; 128 and more: none does.
struct ExpandTable {
  uint8_t of[256][8];
  constexpr ExpandTable() : of() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) of[bits][i] = bits >> i & 1 ? next++ : 128;
    }
  }
};
static constexpr ExpandTable kExpandTable;

// The nibbles at codes, the low one of a byte first, to the bytes whose bit is set, in order; absent to
// the others.  Reads 32 bytes of codes.
inline void expand_nibbles(const uint8_t* codes, uint64_t bits, uint8_t absent, uint8_t* out) {
  const __m128i low = _mm_set1_epi8(15), zero = _mm_set1_epi8(static_cast<char>(absent));
  uint8_t stored[64 + 8];  // that some of the 8-byte loads below run over
  for (int i = 0; i < 2; ++i) {
    const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i));
    const __m128i first = _mm_and_si128(pairs, low);
    const __m128i second = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
    __m128i* at = reinterpret_cast<__m128i*>(stored + 32 * i);
    _mm_storeu_si128(at, _mm_xor_si128(_mm_unpacklo_epi8(first, second), zero));
    _mm_storeu_si128(at + 1, _mm_xor_si128(_mm_unpackhi_epi8(first, second), zero));
  }
  // Byte i of `before`: how many of the bits below 8 i are set.
  uint64_t counts = bits - (bits >> 1 & 0x5555555555555555);
  counts = (counts & 0x3333333333333333) + (counts >> 2 & 0x3333333333333333);
  counts = (counts + (counts >> 4)) & 0x0f0f0f0f0f0f0f0f;
  uint64_t before = counts * 0x0101010101010101 << 8;
  for (int i = 0; i < 8; ++i, before >>= 8, bits >>= 8) {
    const __m128i from = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(stored + (before & 255)));
    const __m128i order =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpandTable.of[bits & 255]));
    const __m128i placed = _mm_xor_si128(_mm_shuffle_epi8(from, order), zero);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 8 * i), placed);
  }
}

}  // namespace MEMLM_ISA
}  // namespace memlm
