// What a block of paged_attention.cu does with the tokens of a sequence: scores, softmax, sums.
#ifndef MEMLM_CUDA_PAGED_ATTEND_H_
#define MEMLM_CUDA_PAGED_ATTEND_H_

#include "paged_softmax.h"

namespace memlm::cuda::paged {

// Of the warp's tile of keys, as codes.
template <class K, class V, int tiles, int columns>
MEMLM_DEVICE void score_codes(const Stages<K, V, tiles>& s, const Room& room, float (&scores)[columns][4]) {
  const uint8_t* const tile = s.keys + warp() * s.key_pitch;
  const Vec4* codes = room.codes + lane();
  for (int of = 0, k0 = 0; of < s.groups; of++) {
    int high[columns][4] = {}, low[columns][4] = {};
    const auto multiply = [&] {
      uint32_t keys[4];
      K::load32(tile, k0, keys);
#pragma unroll
      for (int n = 0; n < columns; n++) {
        add_product(high[n], low[n], keys, load<Vec4>(codes + n * kWarp));
      }
      k0 += 32, codes += columns * kWarp;
    };
    multiply();
    if (s.f.group == 64) multiply();
    const uint32_t both =
        load<uint32_t>(s.key_scales + (warp() * s.groups + of) * kKvTile + 2 * (lane() / 4));
    const float scales[2] = {to_float(f16{static_cast<uint16_t>(both)}),
                             to_float(f16{static_cast<uint16_t>(both >> 16)})};
#pragma unroll
    for (int n = 0; n < columns; n++) {
      for (int j = 0; j < 4; j++) {
        scores[n][j] = fma_f32(sum_of(high[n][j], low[n][j]), scales[j / 2], scores[n][j]);
      }
    }
  }
}

// As floats.
template <class K, class V, int query_parts, int tiles, int columns>
MEMLM_DEVICE void score_floats(const Stages<K, V, tiles>& s, const Room& room, float (&scores)[columns][4]) {
  const uint8_t* const tile = s.keys + warp() * s.key_pitch;
#pragma unroll 4
  for (int k0 = 0; k0 < s.f.channels; k0 += 16) {
#pragma unroll
    for (int part = 0; part < K::kParts; part++) {
      uint32_t keys[4];
      K::load16(tile, k0, part, keys);
#pragma unroll
      for (int n = 0; n < columns; n++) {
        const auto x = load<Pairs<query_parts>>(
            room.pairs + ((k0 / 16 * columns + n) * kWarp + lane()) * sizeof(Pairs<query_parts>));
#pragma unroll
        for (int q = 0; q < query_parts; q++) mma<M>(scores[n], keys, x.of[q]);
      }
    }
  }
}

// Scores go to their rows' lines, each of a lane's rows to other banks.
template <bool coded, int columns>
MEMLM_DEVICE void store_scores(const float (&scores)[columns][4], float* lines, int pitch) {
  const int g = lane() / 4, c = lane() % 4;
#pragma unroll
  for (int n = 0; n < columns; n++) {
    for (int j = 0; j < 2; j++) {
      float* const to = lines + (n * 8 + 2 * c + j) * pitch;
      if (coded) {
        store(to + ((warp() * kKvTile + 2 * g) ^ 8 * c),
              Vec2{as_bits(scores[n][j]), as_bits(scores[n][j + 2])});
      } else {
        to[(warp() * kKvTile + g) ^ 8 * c] = scores[n][j];
        to[(warp() * kKvTile + g + 8) ^ 8 * c] = scores[n][j + 2];
      }
    }
  }
}

// Weights times the warp's tiles of values, as codes: `factors` are of the sums till now.
template <class K, class V, int columns, int tiles>
MEMLM_DEVICE void add_codes(const Stages<K, V, tiles>& s, const Room& room, const float* lines,
                            const float (&factors)[columns][2], State<columns, tiles>& state) {
  const int c = lane() % 4;
  const float* const weights = lines + lane() / 4 * room.pitch;
#pragma unroll
  for (int j = 0; j < tiles; j++) {
    const int tile = warp() + j * kWarps, of = tile >> (s.f.group == 64 ? 2 : 1);
    if (tile >= s.f.width / kKvTile) continue;
    int high[columns][4] = {}, low[columns][4] = {};
#pragma unroll
    for (int k0 = 0; k0 < K::kStage; k0 += 32) {
      uint32_t values[4];
      V::load32(s.values + tile * s.value_pitch, k0, values);
#pragma unroll
      for (int n = 0; n < columns; n++) {
        add_product(high[n], low[n], values,
                    load<Vec4>(weights + n * 8 * room.pitch + of * 32 + k0 / 2 + 4 * c));
      }
    }
#pragma unroll
    for (int n = 0; n < columns; n++) {
      const Vec2 two = load<Vec2>(room.weight_steps + (of * columns + n) * 8 + 2 * c);
      for (int r = 0; r < 4; r++) {
        const float step = as_float(r % 2 ? two.y : two.x);
        state.sums[j][n][r] =
            fma_f32(sum_of(high[n][r], low[n][r]), step, state.sums[j][n][r] * factors[n][r % 2]);
      }
    }
  }
}

// As floats.
template <class K, class V, int weight_parts, int columns, int tiles>
MEMLM_DEVICE void add_floats(const Stages<K, V, tiles>& s, const Room& room, const float* lines,
                             const float (&factors)[columns][2], State<columns, tiles>& state) {
  const int g = lane() / 4, c = lane() % 4;
  const float* const weights = lines + g * room.pitch;
#pragma unroll
  for (int n = 0; n < columns; n++) {
    for (int j = 0; j < tiles; j++) {
      for (int r = 0; r < 4; r++) state.sums[j][n][r] *= factors[n][r % 2];
    }
  }
#pragma unroll
  for (int k0 = 0; k0 < K::kStage; k0 += 16) {
    Pairs<weight_parts> p[columns];
#pragma unroll
    for (int n = 0; n < columns; n++) {
      const int unit = (k0 / 4 + c) ^ (g >> 1 & 1) * 4;
      p[n] = load<Pairs<weight_parts>>(weights + n * 8 * room.pitch + unit * 2 * weight_parts);
    }
#pragma unroll
    for (int j = 0; j < tiles; j++) {
      const int tile = warp() + j * kWarps;
      if (tile >= s.f.width / kKvTile) continue;
#pragma unroll
      for (int part = 0; part < V::kParts; part++) {
        uint32_t values[4];
        V::load16(s.values + tile * s.value_pitch, k0, part, values);
#pragma unroll
        for (int n = 0; n < columns; n++) {
#pragma unroll
          for (int q = 0; q < weight_parts; q++) mma<M>(state.sums[j][n], values, p[n].of[q]);
        }
      }
    }
  }
}

// Sums of codes from rows 2g and 2g + 1 to g and g + 8, as floats have them.
template <int columns, int tiles>
MEMLM_DEVICE void order_rows(State<columns, tiles>& state) {
  const int g = lane() / 4, c = lane() % 4;
#pragma unroll
  for (int j = 0; j < tiles; j++) {
#pragma unroll
    for (int n = 0; n < columns; n++) {
      float(&sums)[4] = state.sums[j][n];
      float moved[4];
      for (int r = 0; r < 4; r++) {
        const int from = (g / 2 + r / 2 * 4) * 4 + c;
        const float even = shuffle(sums[r % 2], from), odd = shuffle(sums[2 + r % 2], from);
        moved[r] = g % 2 ? odd : even;
      }
      for (int r = 0; r < 4; r++) sums[r] = moved[r];
    }
  }
}

// All tokens from lo to hi - 1: into `state`.  `prepare` is called once the first keys are on their way.
template <class K, class V, int query_parts, int weight_parts, int columns, int tiles, class Prepare>
MEMLM_DEVICE void attend(const PagedAttention& a, const Work& w, const Room& room, const KvLayout& f,
                         const uint8_t* tail, int lo, int hi, State<columns, tiles>& state,
                         const Prepare& prepare) {
  constexpr int kStage = K::kStage, kRows = 8 * columns;
  Stages<K, V, tiles> stages(a, w, room, f, tail, lo, hi);
  const Softmax<K, V, weight_parts, columns> softmax(a, w, room, lo, hi);
  stages.clear_padding();
  const int first = lo / kStage * kStage;
  stages.look_up(first);
  stages.copy_keys(0);
  commit_copies();
  prepare();
  MEMLM_SYNC_THREADS();
  for (int start = first, turn = 0; start < hi; start += kStage, turn ^= 1) {
    MEMLM_SYNC_WARP();  // the last stage's values are not needed any more
    stages.copy_values(start);
    commit_copies();
    wait_copies<1>();
    MEMLM_SYNC_WARP();  // the keys are there
    float* const lines = room.lines + (lines_of(kRows) == 2 ? turn * kRows * room.pitch : 0);
    if (lines_of(kRows) == 1) MEMLM_SYNC_THREADS();  // the last weights are not needed any more

    if (stages.has_keys()) {
      float scores[columns][4] = {};
      if constexpr (K::kCoded) {
        score_codes(stages, room, scores);
      } else {
        score_floats<K, V, query_parts>(stages, room, scores);
      }
      store_scores<K::kCoded>(scores, lines, room.pitch);
    }
    MEMLM_SYNC_WARP();  // the keys are not needed any more
    if (start + kStage < hi) {
      stages.look_up(start + kStage);
      stages.copy_keys(turn ^ 1);
    }
    commit_copies();
    MEMLM_SYNC_THREADS();  // the scores are there

    if (softmax.has_rows) {
      float* const line = lines + softmax.row * room.pitch;
      float weights[softmax.kPieces][4] = {};
      softmax.weigh(line, start, state, weights);
      MEMLM_SYNC_WARP();  // the row's scores are read
      if constexpr (K::kCoded) {
        softmax.store_digits(weights, line, stages.value_scales + turn * stages.groups * kStage,
                             stages.groups);
      } else {
        softmax.store_pairs(weights, line);
      }
    }
    wait_copies<1>();
    MEMLM_SYNC_THREADS();  // weights, factors and values are there

    float factors[columns][2];
#pragma unroll
    for (int n = 0; n < columns; n++) {
      const Vec2 two = load<Vec2>(room.factors + n * 8 + 2 * (lane() % 4));
      factors[n][0] = as_float(two.x), factors[n][1] = as_float(two.y);
    }
    if constexpr (K::kCoded) {
      add_codes(stages, room, lines, factors, state);
    } else {
      add_floats<K, V, weight_parts>(stages, room, lines, factors, state);
    }
  }
  if constexpr (K::kCoded) order_rows(state);
  MEMLM_SYNC_THREADS();
}

}  // namespace memlm::cuda::paged

#endif
