// What the CUDA kernels use of the device, and all of it: fragments of matrices and the instructions that
// multiply them, asynchronous copies, shuffles, conversions.  Kernels are written over these names alone,
// so that tests/cuda_emulator runs the same kernel sources on a CPU: it has another implementation of this
// file's functions, which also checks what is done with memory.
//
// Instructions are those of the PTX ISA 8.7; the drawings follow its section 9.7.14.  g = lane / 4,
// c = lane % 4.
#ifndef MEMLM_CUDA_DEVICE_H_
#define MEMLM_CUDA_DEVICE_H_

#include <stddef.h>
#include <stdint.h>

namespace memlm {

// 16-bit floats as they lie in memory.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};
template <class T>
constexpr bool is_bf16 = false;
template <>
constexpr bool is_bf16<bf16> = true;

// 16 bytes in four registers; an array of them is loaded and stored whole.
struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Vec2 {
  uint32_t x, y;
};

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffffu;  // of a warp's lanes

}  // namespace memlm

#ifndef __CUDACC__
#include "emulated_device.h"
#else

#include <cuda_runtime.h>

#define MEMLM_DEVICE __device__ __forceinline__

namespace memlm {

// The compute capability that is compiled for, times 10; 0 in host code.
#ifdef __CUDA_ARCH__
constexpr int kArch = __CUDA_ARCH__;
#else
constexpr int kArch = 0;
#endif

// ---- Where a thread stands ----

MEMLM_DEVICE int thread() { return threadIdx.x; }
MEMLM_DEVICE int threads() { return blockDim.x; }
MEMLM_DEVICE int lane() { return threadIdx.x % kWarp; }
MEMLM_DEVICE int warp() { return threadIdx.x / kWarp; }
MEMLM_DEVICE int block_x() { return blockIdx.x; }
MEMLM_DEVICE int block_y() { return blockIdx.y; }
MEMLM_DEVICE int block_z() { return blockIdx.z; }
MEMLM_DEVICE int blocks_x() { return gridDim.x; }
MEMLM_DEVICE int blocks_y() { return gridDim.y; }
MEMLM_DEVICE int blocks_z() { return gridDim.z; }

// Waits for all threads of the block.
#define MEMLM_SYNC_THREADS() __syncthreads()
// Waits for the lanes of the warp, and orders what they do in memory.
#define MEMLM_SYNC_WARP() __syncwarp()

// The block's shared memory, of the size given at launch.
template <class T>
MEMLM_DEVICE T* shared() {
  extern __shared__ Vec4 memory[];
  return reinterpret_cast<T*>(memory);
}

// ---- Memory ----

// 16, 8 or 4 bytes in one instruction, aligned to their size.
template <class V>
MEMLM_DEVICE V load(const void* from) {
  return *static_cast<const V*>(from);
}
template <class V>
MEMLM_DEVICE void store(void* to, V value) {
  *static_cast<V*>(to) = value;
}
// Global memory that is read once: it goes past the L1 cache.
MEMLM_DEVICE Vec4 load_once(const void* from) {
  Vec4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

MEMLM_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Begins to copy 16 aligned bytes from global to shared memory, past L1; where not `valid`, zeros.  What
// is copied is there once wait_copies says so, and for other threads after a barrier behind that.
MEMLM_DEVICE void copy_async(void* to, const void* from, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  Vec4 v = {0, 0, 0, 0};
  if (valid) v = load<Vec4>(from);
  store(to, v);
#endif
}
// The copies since the last call are a group.
MEMLM_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the `pending` newest of the thread's groups are under way.
template <int pending>
MEMLM_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

MEMLM_DEVICE int atomic_add(int* where, int value) { return atomicAdd(where, value); }
MEMLM_DEVICE float atomic_add(float* where, float value) { return atomicAdd(where, value); }
// What the thread wrote before is seen by others before what it writes behind.
MEMLM_DEVICE void fence() { __threadfence(); }

// ---- Exchange within a warp ----

template <class T>
MEMLM_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(kAll, value, from);
}
template <class T>
MEMLM_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAll, value, mask);
}
template <class T>
MEMLM_DEVICE T shuffle_up(T value, int by) {
  return __shfl_up_sync(kAll, value, by);
}
MEMLM_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(kAll, vote); }

// ---- Bits ----

// Bytes 0-3 are a's, 4-7 b's; nibble i of `select` says which becomes byte i.
MEMLM_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t select) {
  return __byte_perm(a, b, select);
}
// value & mask | others, of constants: one instruction, where the compiler makes two.
template <uint32_t mask, uint32_t others>
MEMLM_DEVICE uint32_t select_bits(uint32_t value) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(value), "n"(mask), "r"(others));
  return d;
}
MEMLM_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
MEMLM_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }
MEMLM_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
MEMLM_DEVICE int count_bits(uint64_t bits) { return __popcll(bits); }

// ---- Numbers: conversions round to nearest even ----

MEMLM_DEVICE float to_float(float x) { return x; }
MEMLM_DEVICE float to_float(f16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
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
  f16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
}
template <>
MEMLM_DEVICE bf16 from_float<bf16>(float x) {
  bf16 h;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
#else
  const uint32_t bits = as_bits(x);
  h.bits = static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  return h;
}

// Two numbers in a register, the first in the low half.
template <class T>
MEMLM_DEVICE uint32_t pair(float low, float high);
template <>
MEMLM_DEVICE uint32_t pair<f16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  return from_float<f16>(low).bits | static_cast<uint32_t>(from_float<f16>(high).bits) << 16;
#endif
}
template <>
MEMLM_DEVICE uint32_t pair<bf16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
#else
  return from_float<bf16>(low).bits | static_cast<uint32_t>(from_float<bf16>(high).bits) << 16;
#endif
}
template <class T>
MEMLM_DEVICE float low(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
MEMLM_DEVICE float high(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// a * b + c of pairs, rounded once.
template <class T>
MEMLM_DEVICE uint32_t fma_pair(uint32_t a, uint32_t b, uint32_t c);
template <>
MEMLM_DEVICE uint32_t fma_pair<f16>(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
template <>
MEMLM_DEVICE uint32_t fma_pair<bf16>(uint32_t a, uint32_t b, uint32_t c) {
#if __CUDA_ARCH__ >= 800
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
#else
  return pair<bf16>(fmaf(low<bf16>(a), low<bf16>(b), low<bf16>(c)),
                    fmaf(high<bf16>(a), high<bf16>(b), high<bf16>(c)));
#endif
}

MEMLM_DEVICE float exp2_approx(float x) {  // 2 ulp
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MEMLM_DEVICE float log2_approx(float x) {  // off by 2^-22 from 0.5 to 2, else 1 ulp
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
MEMLM_DEVICE float rsqrt_approx(float x) { return rsqrtf(x); }  // 2 ulp
MEMLM_DEVICE float square_root(float x) { return __fsqrt_rn(x); }  // rounded to nearest
MEMLM_DEVICE float fma_f32(float a, float b, float c) { return fmaf(a, b, c); }
MEMLM_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the other, where one is NaN
// The product rounded to f32, whatever is done with it: the compiler makes no FMA of it.
MEMLM_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
MEMLM_DEVICE int round_int(float x) { return __float2int_rn(x); }

// ---- Matrices ----

// Four 8 x 8 matrices of 16 bits: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes.  Lane
// (g, c) receives in d[i] the elements (g, 2c), (g, 2c + 1) of matrix i; transposed: (2c, g), (2c + 1, g).
MEMLM_DEVICE void load_matrices(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
MEMLM_DEVICE void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], T in, f32 sums: m16n8k16.
//
//   a: register i, halves j   row g + 8 (i % 2), column 2c + j + 8 (i / 2)
//   b: register i, halves j   row 2c + j + 8 i, column g
//   d: register i             row g + 8 (i / 2), column 2c + i % 2
//
//        columns 0 1 | 2 3 | 4 5 | 6 7 | 8 9 | ...          columns 0   1   2   3 ...
//   a  row 0   lane 0 | 1   | 2   | 3   | 0   | ...     b  row 0   lane 0   4   8  12 ...
//      row 1   lane 4 | 5   | 6   | 7   | 4   | ...        row 1        0   4   8  12 ...
//      ...                                                 row 2        1   5   9  13 ...
template <class T>
MEMLM_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
MEMLM_DEVICE void mma<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // m16n8k8 twice: a's registers 0, 1 and b's 0 are the first 8 k
  for (int i = 0; i < 2; i++) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
  }
#endif
}
template <>
MEMLM_DEVICE void mma<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();  // no such unit: the launchers refuse bf16
#endif
}

// d [16, 8] += a [16, 32] b [32, 8], int8 in, int32 sums: m16n8k32.
//
//   a: register i, byte j   row g + 8 (i % 2), column 4c + j + 16 (i / 2)
//   b: register i, byte j   row 4c + j + 16 i, column g
//   d: as above
MEMLM_DEVICE void mma_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // m8n8k16 four times: the rows 0-7 are registers 0 and 2, 8-15 are 1 and 3
  for (int i = 0; i < 4; i++) {
    const int half = i % 2, k = i / 2;
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+r"(d[2 * half]), "+r"(d[2 * half + 1])
                 : "r"(a[half + 2 * k]), "r"(b[k]));
  }
#endif
}

// d [16, 8] += a [16, 32] b [32, 8], where a has two of each 4 columns: m16n8k32, sparse.
//
//   a: register i, halves j   row g + 8 (i % 2), the (2c + j + 8 (i / 2))-th stored of the row: the 4
//                             columns they stand among are 4 (c + 4 (i / 2)) to + 3
//   b: register i, halves j   row 2c + j + 8 i, column g
//   places: 2 bits for each stored element of a row, p0 | p1 << 2 for each 4 columns, p0 < p1, in the lanes
//           c = 2 selector and c = 2 selector + 1; those of others are not looked at
//
//                      bits 0-15                     bits 16-31
//     c % 2 = 0        row g, columns 0-15           row g + 8, columns 0-15
//     c % 2 = 1        row g, columns 16-31          row g + 8, columns 16-31
//   d: as above
//
// PTX ISA, section 9.7.14.6.2.2, the figure of the metadata of m16n8k32 with 16-bit floats.
// From sm_80 on.
template <class T, int selector>
MEMLM_DEVICE void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
#if __CUDA_ARCH__ >= 800
  if constexpr (is_bf16<T>) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places),
          "n"(selector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places),
          "n"(selector));
  }
#else
  __trap();
#endif
}

// ---- The host's side ----

struct Grid {
  int64_t x, y = 1, z = 1;
};

// What a launcher chooses tiles by.
struct Gpu {
  int arch;             // as kArch
  int processors;       // streaming multiprocessors
  int shared_bytes;     // that a block may have
};

// The current device.  False where there is none.
bool current_gpu(Gpu* gpu);

// Begins a kernel of `threads` threads a block on a stream.  False where it cannot be begun: last_failure.
template <class... Parameters, class... Arguments>
bool launch(void (*kernel)(Parameters...), Grid grid, int threads, int shared_bytes, void* stream,
            Arguments... arguments) {
  const auto where = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024 &&
      cudaFuncSetAttribute(where, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes) != cudaSuccess) {
    return false;
  }
  kernel<<<dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)),
           threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError() == cudaSuccess;
}

// Sets bytes of device memory to 0 on a stream.
inline bool clear(void* where, int64_t bytes, void* stream) {
  return cudaMemsetAsync(where, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)) ==
         cudaSuccess;
}

}  // namespace memlm

#endif  // __CUDACC__
#endif
