/* What this machine can do at most, measured: the yardstick of the benchmarks. */
#ifndef MEMLM_LIMITS_H_
#define MEMLM_LIMITS_H_

#include "memlm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes read from memory per second, in GB/s: each of `threads` threads reads its share of a buffer
 * of `bytes` bytes (far larger than the last-level cache) front to back; the best of `repeats`
 * passes.  huge_pages != 0 asks for 2 MB pages.  0 if the buffer cannot be allocated. */
MEMLM_API double memlm_limit_dram_gbps(int threads, int64_t bytes, int huge_pages, int repeats);

/* f32 multiply-adds per second, in G/s, from registers: `threads` threads of FMAs. */
MEMLM_API double memlm_limit_f32_gmacs(int threads, int repeats);

/* int8 multiply-adds per second, in G/s, from registers, by the best instructions that the kernels
 * have: tdpbssd with AMX (whose bf16, which fast mode takes for many rows, reaches half of that),
 * vpdpbusd with AVX-512 VNNI or AVX-VNNI, vpmaddubsw + vpaddw with AVX2; smmla, or else sdot, on Arm.
 * 0 where the CPU has none of them. */
MEMLM_API double memlm_limit_i8_gmacs(int threads, int repeats);

#ifdef __cplusplus
}
#endif
#endif
