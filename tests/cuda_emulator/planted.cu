// Kernels with mistakes, for tests of the emulator; and the products by themselves, for tests of layouts.
#include "device.h"

using namespace memlm;

namespace {

constexpr int kThreads = 64;

enum Mistake {
  kNone,
  kNoBarrier,
  kNoSecondBarrier,
  kUninitialised,
  kNoWait,
  kNoBarrierAfterWait,
  kReadBeyond,
  kWriteBeyond,
  kMisaligned,
  kHalfAtBarrier,
  kHalfWarpShuffles,
  kSharedBeyond,
  kWriteToInput,
  kGlobalRace,
  kLeaves,
  kNoWarpBarrier,
  kEarlyOverwrite,
  kTwoBarriers,
};

// out[i] = in[63 - i] + in[i], twice over, through shared memory.
__global__ void planted_kernel(int mistake, const float* in, float* out) {
  float* const memory = shared<float>();
  const int i = thread();
  if (mistake == kLeaves && i == 5) return;
  if (mistake == kNoWait || mistake == kNoBarrierAfterWait || mistake == kEarlyOverwrite) {
    if (i < kThreads / 4) copy_async(memory + 4 * i, in + 4 * i);
    commit_copies();
    if (mistake == kEarlyOverwrite && i == 0) memory[1] = 0;
    if (mistake != kNoWait) wait_copies<0>();
    if (mistake != kNoBarrierAfterWait) MEMLM_SYNC_THREADS();
  } else if (mistake != kUninitialised || i) {
    memory[i] = in[i];
  }
  if (mistake == kHalfAtBarrier) {
    MEMLM_SYNC_THREADS();
    if (i < kWarp) MEMLM_SYNC_THREADS();
  } else if (mistake == kTwoBarriers) {
    if (i < kWarp) {
      MEMLM_SYNC_THREADS();
    } else {
      MEMLM_SYNC_THREADS();
    }
  } else if (mistake != kNoBarrier && mistake != kNoBarrierAfterWait) {
    MEMLM_SYNC_THREADS();
  }
  float value = memory[kThreads - 1 - i];
  if (mistake != kNoSecondBarrier) MEMLM_SYNC_THREADS();
  memory[i] = value;
  MEMLM_SYNC_THREADS();
  value = memory[i];
  if (mistake == kReadBeyond) value += in[i + 1];
  if (mistake == kMisaligned) value += as_float(load<Vec2>(in + 1).x);
  if (mistake == kSharedBeyond && i == 7) memory[kThreads] = 0;
  if (mistake == kHalfWarpShuffles && i % kWarp < 16) value += shuffle_xor(value, 1);
  if (mistake == kWriteToInput && i == 3) const_cast<float*>(in)[3] = 0;
  if (mistake == kNoWarpBarrier) {
    memory[i] = value;
    value = memory[i ^ 1];
  }
  out[mistake == kGlobalRace ? i / 2 : mistake == kWriteBeyond ? i + 1 : i] = value + in[i];
}

template <class Sum, void (*product)(Sum (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, Sum* d) {
  uint32_t as[4], bs[2];
  Sum sums[4];
  for (int i = 0; i < 4; i++) as[i] = a[lane() * 4 + i], sums[i] = d[lane() * 4 + i];
  for (int i = 0; i < 2; i++) bs[i] = b[lane() * 2 + i];
  product(sums, as, bs);
  for (int i = 0; i < 4; i++) d[lane() * 4 + i] = sums[i];
}

template <class T, int selector>
__global__ void mma_sparse_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* places, float* d) {
  uint32_t as[4], bs[4];
  float sums[4] = {};
  for (int i = 0; i < 4; i++) as[i] = a[lane() * 4 + i], bs[i] = b[lane() * 4 + i];
  mma_sparse<T, selector>(sums, as, bs, places[lane()]);
  for (int i = 0; i < 4; i++) d[lane() * 4 + i] = sums[i];
}

template <bool transposed>
__global__ void load_matrices_kernel(const uint16_t* in, uint32_t* out) {
  uint16_t* const memory = shared<uint16_t>();
  for (int i = 0; i < 8; i++) memory[lane() * 8 + i] = in[lane() * 8 + i];
  MEMLM_SYNC_THREADS();
  uint32_t d[4];
  if (transposed) {
    load_matrices_transposed(d, memory + lane() * 8);
  } else {
    load_matrices(d, memory + lane() * 8);
  }
  for (int i = 0; i < 4; i++) out[lane() * 4 + i] = d[i];
}

}  // namespace

#define MEMLM_EXPORT extern "C" __attribute__((visibility("default")))

MEMLM_EXPORT int run_planted(int mistake, const float* in, float* out) {
  return launch(&planted_kernel, {2}, kThreads, kThreads * 4, nullptr, mistake, in, out);
}
MEMLM_EXPORT int run_mma_f16(const uint32_t* a, const uint32_t* b, float* d) {
  return launch(&mma_kernel<float, mma<f16>>, {1}, kWarp, 0, nullptr, a, b, d);
}
MEMLM_EXPORT int run_mma_bf16(const uint32_t* a, const uint32_t* b, float* d) {
  return launch(&mma_kernel<float, mma<bf16>>, {1}, kWarp, 0, nullptr, a, b, d);
}
MEMLM_EXPORT int run_mma_int8(const uint32_t* a, const uint32_t* b, int* d) {
  return launch(&mma_kernel<int, mma_int8>, {1}, kWarp, 0, nullptr, a, b, d);
}
MEMLM_EXPORT int run_mma_sparse(int selector, const uint32_t* a, const uint32_t* b, const uint32_t* places,
                                float* d) {
  return launch(selector ? &mma_sparse_kernel<bf16, 1> : &mma_sparse_kernel<f16, 0>, {1}, kWarp, 0, nullptr,
                a, b, places, d);
}
MEMLM_EXPORT int run_load_matrices(int transposed, const uint16_t* in, uint32_t* out) {
  return transposed ? launch(&load_matrices_kernel<true>, {1}, kWarp, 512, nullptr, in, out)
                    : launch(&load_matrices_kernel<false>, {1}, kWarp, 512, nullptr, in, out);
}
