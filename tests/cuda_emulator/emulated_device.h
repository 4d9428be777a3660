// csrc/cuda/device.h for the emulator: the same functions, which say what they do to memory and to other
// lanes.  How fragments lie in lanes is written here a second time, in C++, from the same drawings;
// tests/test_cuda_emulator.py compares it with PTX's tables.
#ifndef MEMLM_CUDA_EMULATED_DEVICE_H_
#define MEMLM_CUDA_EMULATED_DEVICE_H_

#include <math.h>
#include <string.h>

#include <tuple>

#include "emulator.h"

// Kernels are instrumented; these are not, and call the emulator where memory is touched.
#define MEMLM_DEVICE __attribute__((no_sanitize("thread"), always_inline)) inline
#define MEMLM_EMULATED __attribute__((no_sanitize("thread"), noinline)) inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define MEMLM_HERE __builtin_return_address(0)

#ifndef MEMLM_EMULATED_ARCH
#define MEMLM_EMULATED_ARCH 800
#endif

namespace memlm {

constexpr int kArch = MEMLM_EMULATED_ARCH;

MEMLM_DEVICE int thread() { return emulator::current->thread; }
MEMLM_DEVICE int threads() { return emulator::block_threads; }
MEMLM_DEVICE int lane() { return thread() % kWarp; }
MEMLM_DEVICE int warp() { return thread() / kWarp; }
MEMLM_DEVICE int block_x() { return static_cast<int>(emulator::block.x); }
MEMLM_DEVICE int block_y() { return static_cast<int>(emulator::block.y); }
MEMLM_DEVICE int block_z() { return static_cast<int>(emulator::block.z); }
MEMLM_DEVICE int blocks_x() { return static_cast<int>(emulator::grid.x); }
MEMLM_DEVICE int blocks_y() { return static_cast<int>(emulator::grid.y); }
MEMLM_DEVICE int blocks_z() { return static_cast<int>(emulator::grid.z); }

#define MEMLM_SYNC_THREADS() ::emulator::sync_threads(__FILE__, __LINE__)
#define MEMLM_SYNC_WARP() ::emulator::sync_warp(__FILE__, __LINE__)

template <class T>
MEMLM_DEVICE T* shared() {
  return reinterpret_cast<T*>(emulator::shared_memory);
}

// ---- Memory ----

template <class V>
MEMLM_EMULATED V load(const void* from) {
  emulator::read(from, sizeof(V), MEMLM_HERE);
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
MEMLM_EMULATED void store(void* to, V value) {
  emulator::write(to, sizeof(V), MEMLM_HERE);
  memcpy(to, &value, sizeof value);
}
MEMLM_EMULATED Vec4 load_once(const void* from) {
  emulator::read(from, sizeof(Vec4), MEMLM_HERE);
  Vec4 value;
  memcpy(&value, from, sizeof value);
  return value;
}

MEMLM_EMULATED void copy_async(void* to, const void* from, bool valid = true) {
  emulator::copy_async(to, from, valid, MEMLM_HERE);
  if (kArch < 800) {  // which has no asynchronous copies
    emulator::commit_copies();
    emulator::wait_copies(0);
  }
}
MEMLM_DEVICE void commit_copies() { emulator::commit_copies(); }
template <int pending>
MEMLM_DEVICE void wait_copies() {
  emulator::wait_copies(pending);
}

template <class T>
MEMLM_EMULATED T atomic_add(T* where, T value) {
  emulator::atomic(where, sizeof(T), MEMLM_HERE);
  const T old = *where;
  *where = old + value;
  return old;
}
MEMLM_DEVICE void fence() {}

// ---- Exchange within a warp ----

namespace emulated {

template <class T>
struct Shuffle {
  T value, result;
  int from;
};

template <class T>
MEMLM_EMULATED T shuffle(T value, int from, const void* where) {
  Shuffle<T> mine = {value, value, from};
  emulator::collective(emulator::Kind::kShuffle, where, &mine, [](void* const* lanes) {
    for (int i = 0; i < kWarp; i++) {
      auto one = static_cast<Shuffle<T>*>(lanes[i]);
      one->result = static_cast<Shuffle<T>*>(lanes[one->from])->value;
    }
  });
  return mine.result;
}

}  // namespace emulated

template <class T>
MEMLM_EMULATED T shuffle(T value, int from) {
  return emulated::shuffle(value, from & (kWarp - 1), MEMLM_HERE);
}
template <class T>
MEMLM_EMULATED T shuffle_xor(T value, int mask) {
  return emulated::shuffle(value, lane() ^ mask, MEMLM_HERE);
}
template <class T>
MEMLM_EMULATED T shuffle_up(T value, int by) {
  return emulated::shuffle(value, lane() < by ? lane() : lane() - by, MEMLM_HERE);
}
MEMLM_EMULATED uint32_t ballot(bool vote) {
  struct Vote {
    bool vote;
    uint32_t all;
  } mine = {vote, 0};
  emulator::collective(emulator::Kind::kBallot, MEMLM_HERE, &mine, [](void* const* lanes) {
    uint32_t all = 0;
    for (int i = 0; i < kWarp; i++) all |= static_cast<uint32_t>(static_cast<Vote*>(lanes[i])->vote) << i;
    for (int i = 0; i < kWarp; i++) static_cast<Vote*>(lanes[i])->all = all;
  });
  return mine.all;
}

// ---- Bits ----

template <uint32_t mask, uint32_t others>
MEMLM_DEVICE uint32_t select_bits(uint32_t value) {
  return (value & mask) | others;
}
MEMLM_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t d = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t which = select >> 4 * i & 7;  // bit 3, which repeats the sign, is not used
    d |= static_cast<uint32_t>(bytes >> 8 * which & 0xff) << 8 * i;
  }
  return d;
}
MEMLM_DEVICE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
MEMLM_DEVICE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
MEMLM_DEVICE int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
MEMLM_DEVICE int count_bits(uint64_t bits) { return __builtin_popcountll(bits); }

// ---- Numbers ----

MEMLM_DEVICE float to_float(float x) { return x; }
MEMLM_DEVICE float to_float(f16 x) {
  _Float16 value;
  memcpy(&value, &x, 2);
  return static_cast<float>(value);
}
MEMLM_DEVICE float to_float(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
MEMLM_DEVICE T from_float(float x);
template <>
MEMLM_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
MEMLM_DEVICE f16 from_float<f16>(float x) {
  const _Float16 value = static_cast<_Float16>(x);
  f16 h;
  memcpy(&h, &value, 2);
  return h;
}
template <>
MEMLM_DEVICE bf16 from_float<bf16>(float x) {
  const uint32_t bits = as_bits(x);
  return {static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T>
MEMLM_DEVICE uint32_t pair(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
MEMLM_DEVICE float low(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
MEMLM_DEVICE float high(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}
// Products of two such numbers are exact in f64, and a sum there is so long that rounding twice is
// rounding once but for numbers 2^29 apart.
template <class T>
MEMLM_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c) {
  return pair<T>(static_cast<float>(static_cast<double>(low<T>(a)) * low<T>(b) + low<T>(c)),
                 static_cast<float>(static_cast<double>(high<T>(a)) * high<T>(b) + high<T>(c)));
}

MEMLM_DEVICE float exp2_approx(float x) { return exp2f(x); }
MEMLM_DEVICE float log2_approx(float x) { return log2f(x); }
MEMLM_DEVICE float rsqrt_approx(float x) { return 1 / sqrtf(x); }
MEMLM_DEVICE float square_root(float x) { return sqrtf(x); }
MEMLM_DEVICE float fma_f32(float a, float b, float c) { return fmaf(a, b, c); }
MEMLM_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
MEMLM_DEVICE float multiply(float a, float b) { return a * b; }
MEMLM_DEVICE int round_int(float x) { return static_cast<int>(nearbyintf(x)); }

// ---- Matrices ----

namespace emulated {

template <class T>
MEMLM_DEVICE float half_of(uint32_t pair, int j) {
  return j ? high<T>(pair) : low<T>(pair);
}
MEMLM_DEVICE int byte_of(uint32_t word, int j) { return static_cast<int8_t>(word >> 8 * j); }

// Where the halves and bytes of fragments stand.
struct Position {
  int row, column;
};
MEMLM_DEVICE Position a16(int lane, int i, int j) {
  return {lane / 4 + 8 * (i % 2), 2 * (lane % 4) + j + 8 * (i / 2)};
}
MEMLM_DEVICE Position b16(int lane, int i, int j) { return {2 * (lane % 4) + j + 8 * i, lane / 4}; }
MEMLM_DEVICE Position a8(int lane, int i, int j) {
  return {lane / 4 + 8 * (i % 2), 4 * (lane % 4) + j + 16 * (i / 2)};
}
MEMLM_DEVICE Position b8(int lane, int i, int j) { return {4 * (lane % 4) + j + 16 * i, lane / 4}; }
MEMLM_DEVICE Position d32(int lane, int i) { return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2}; }

template <class Sum>
struct Operands {
  Sum* d;
  const uint32_t *a, *b;
  uint32_t places;
};

// d += a b over K columns, sums in f32 (or int32) of exact products.
template <class Sum, int K>
MEMLM_DEVICE void multiply(void* const* lanes, const float (&a)[16][K], const float (&b)[K][8]) {
  for (int l = 0; l < kWarp; l++) {
    auto one = static_cast<Operands<Sum>*>(lanes[l]);
    for (int i = 0; i < 4; i++) {
      const Position p = d32(l, i);
      Sum sum = 0;
      for (int k = 0; k < K; k++) sum += static_cast<Sum>(a[p.row][k]) * static_cast<Sum>(b[k][p.column]);
      one->d[i] += sum;
    }
  }
}

template <class T>
MEMLM_EMULATED void run_mma(void* const* lanes) {
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarp; l++) {
    const auto one = static_cast<const Operands<float>*>(lanes[l]);
    for (int j = 0; j < 2; j++) {
      for (int i = 0; i < 4; i++) {
        const Position p = a16(l, i, j);
        a[p.row][p.column] = half_of<T>(one->a[i], j);
      }
      for (int i = 0; i < 2; i++) {
        const Position p = b16(l, i, j);
        b[p.row][p.column] = half_of<T>(one->b[i], j);
      }
    }
  }
  multiply<float, 16>(lanes, a, b);
}

MEMLM_EMULATED void run_mma_int8(void* const* lanes) {
  float a[16][32], b[32][8];  // which hold int8
  for (int l = 0; l < kWarp; l++) {
    const auto one = static_cast<const Operands<int>*>(lanes[l]);
    for (int j = 0; j < 4; j++) {
      for (int i = 0; i < 4; i++) {
        const Position p = a8(l, i, j);
        a[p.row][p.column] = static_cast<float>(byte_of(one->a[i], j));
      }
      for (int i = 0; i < 2; i++) {
        const Position p = b8(l, i, j);
        b[p.row][p.column] = static_cast<float>(byte_of(one->b[i], j));
      }
    }
  }
  multiply<int, 32>(lanes, a, b);
}

// The bits of a sparse operand's places that tell of a row's column-th stored element.
MEMLM_DEVICE uint32_t place_of(void* const* lanes, int selector, Position stored) {
  const int keeper = stored.row % 8 * 4 + 2 * selector + stored.column / 8;
  const uint32_t places = static_cast<const Operands<float>*>(lanes[keeper])->places;
  return places >> (stored.row / 8 * 16 + stored.column % 8 * 2) & 3;
}

template <class T, int selector>
MEMLM_EMULATED void run_mma_sparse(void* const* lanes) {
  float a[16][32] = {}, b[32][8];
  for (int l = 0; l < kWarp; l++) {
    const auto one = static_cast<const Operands<float>*>(lanes[l]);
    for (int j = 0; j < 2; j++) {
      for (int i = 0; i < 4; i++) {
        const Position p = a16(l, i, j);  // the column-th of the row's 16 stored ones
        a[p.row][p.column / 2 * 4 + place_of(lanes, selector, p)] = half_of<T>(one->a[i], j);
      }
      for (int i = 0; i < 4; i++) {
        const Position p = b16(l, i, j);
        b[p.row][p.column] = half_of<T>(one->b[i], j);
      }
    }
  }
  multiply<float, 32>(lanes, a, b);
}

struct Rows {
  uint32_t* d;
  const void* row;
};

template <bool transposed>
MEMLM_EMULATED void run_load_matrices(void* const* lanes) {
  for (int l = 0; l < kWarp; l++) {
    for (int i = 0; i < 4; i++) {
      uint16_t halves[2];
      for (int j = 0; j < 2; j++) {
        const int across = 2 * (l % 4) + j, row = transposed ? across : l / 4;
        const auto from = static_cast<const Rows*>(lanes[8 * i + row])->row;
        memcpy(&halves[j], static_cast<const uint16_t*>(from) + (transposed ? l / 4 : across), 2);
      }
      static_cast<Rows*>(lanes[l])->d[i] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
  }
}

}  // namespace emulated

MEMLM_EMULATED void load_matrices(uint32_t (&d)[4], const void* row) {
  emulator::read(row, 16, MEMLM_HERE);
  emulated::Rows mine = {d, row};
  emulator::collective(emulator::Kind::kLoadMatrices, MEMLM_HERE, &mine, emulated::run_load_matrices<false>);
}
MEMLM_EMULATED void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
  emulator::read(row, 16, MEMLM_HERE);
  emulated::Rows mine = {d, row};
  emulator::collective(emulator::Kind::kLoadMatrices, MEMLM_HERE, &mine, emulated::run_load_matrices<true>);
}
template <class T>
MEMLM_EMULATED void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Operands<float> mine = {d, a, b, 0};
  emulator::collective(emulator::Kind::kMma, MEMLM_HERE, &mine, emulated::run_mma<T>);
}
MEMLM_EMULATED void mma_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Operands<int> mine = {d, a, b, 0};
  emulator::collective(emulator::Kind::kMmaInt8, MEMLM_HERE, &mine, emulated::run_mma_int8);
}
template <class T, int selector>
MEMLM_EMULATED void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                               uint32_t places) {
  emulated::Operands<float> mine = {d, a, b, places};
  emulator::collective(emulator::Kind::kMmaSparse, MEMLM_HERE, &mine, emulated::run_mma_sparse<T, selector>);
}

// ---- The host's side ----

struct Grid {
  int64_t x, y = 1, z = 1;
};

struct Gpu {
  int arch, processors, shared_bytes;
};

inline bool current_gpu(Gpu* gpu) {
  const emulator::Device device = emulator::current_device();
  *gpu = {device.arch, device.processors, device.shared_bytes};
  return true;
}

template <class... Parameters, class... Arguments>
bool launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void*,
            Arguments... arguments) {
  using Values = std::tuple<void (*)(Parameters...), Parameters...>;
  if (emulator::logged(reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, threads,
                       shared_bytes))
    return true;
  const Values values(kernel, static_cast<Parameters>(arguments)...);
  const auto run = [](const void* given) {
    std::apply([](auto kernel, auto... each) { kernel(each...); }, *static_cast<const Values*>(given));
  };
  return emulator::launch(run, &values, sizeof values, {grid.x, grid.y, grid.z}, threads, shared_bytes);
}

inline bool clear(void* where, int64_t bytes, void*) {
  memset(where, 0, static_cast<size_t>(bytes));
  return true;
}

}  // namespace memlm

#endif
