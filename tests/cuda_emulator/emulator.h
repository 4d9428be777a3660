// Runs a CUDA kernel's source on a CPU, as the CUDA execution model says and no better.
//
// The threads of a block are fibers; blocks run one after the other, in random order.  One random warp runs
// as far as it can before another does ("greedy"), its lanes in random order: that is what brings out
// missing barriers.  A warp's collectives (shuffles, matrix products) wait for all lanes.  Kernels are
// compiled with -fsanitize=thread, and hooks.cpp supplies what that calls at each access to memory:
//
//   an access outside of the arrays that were registered, or of shared memory        out of bounds
//   an address that is no multiple of the access's size                              misaligned
//   a read of shared memory that nothing has been written to in this block           uninitialised
//   two accesses to a byte of shared or global memory by threads of a block, one of
//   them a write, without a barrier between                                          race
//   a read or write of what cp.async is still to bring, before its wait              too early
//   threads that wait at different barriers or collectives, or have left             divergent
//
// The first error ends the launch; error() tells what and where.
#ifndef MEMLM_CUDA_EMULATOR_H_
#define MEMLM_CUDA_EMULATOR_H_

#include <stddef.h>
#include <stdint.h>

namespace emulator {

constexpr int kWarp = 32;

struct Fiber {
  void* stack_pointer;
  int thread;  // in the block
};

struct Place {
  int64_t x, y, z;
};

// Of the launch that is under way.
extern Fiber* current;
extern int block_threads;
extern Place block, grid;
extern unsigned char* shared_memory;

// What the lanes of a warp do together.
enum class Kind {
  kNone,
  kSyncThreads,
  kSyncWarp,
  kShuffle,
  kBallot,
  kLoadMatrices,
  kMma,
  kMmaInt8,
  kMmaSparse
};
// Waits for the whole warp.  The last lane to come calls run(operands of the lanes, in their order) for all.
// `site` tells apart what stands at different places of the source.
void collective(Kind kind, const void* site, void* operands, void (*run)(void* const* lanes));
// Waits for the whole block.
void sync_threads(const char* file, int line);
void sync_warp(const char* file, int line);

// Accesses of one instruction, checked and counted as one; `where` is its return address.
void read(const void* address, size_t size, const void* where);
void write(const void* address, size_t size, const void* where);
// An atomic operation races with none.
void atomic(const void* address, size_t size, const void* where);
// cp.async: from is read, and to written, at the wait.
void copy_async(void* to, const void* from, bool valid, const void* where);
void commit_copies();
void wait_copies(int pending);

struct Device {
  int arch, processors, shared_bytes;
};
Device current_device();

// While launches are logged they are not run: true.
bool logged(const void* kernel, Place blocks, int threads, int shared_bytes);

// Runs kernel(parameters) over a grid; false after an error.  Threads may read the parameters.
bool launch(void (*kernel)(const void* parameters), const void* parameters, size_t parameter_bytes,
            Place blocks, int threads, int shared_bytes);

}  // namespace emulator

// Of the library that the emulator is linked into; for the tests.
extern "C" {
#pragma GCC visibility push(default)
// Device memory: what a kernel may read and, if writable, write.
void emulator_register(const void* begin, size_t bytes, int writable);
void emulator_forget();  // all of it
void emulator_seed(uint64_t seed);
// The device that current_gpu tells of.
void emulator_device(int arch, int processors, int shared_bytes);
// What went wrong in the last launches, or "": the first error, then "+OFFSET" of the instruction in the
// library's file.
const char* emulator_error();

// Counts of the launches since emulator_count(1).  A request is one instruction of one warp.
struct emulator_counts {
  int64_t read_requests, read_sectors;      // of global memory; a sector is 32 bytes
  int64_t write_requests, write_sectors;
  int64_t distinct_read, distinct_written;  // sectors that were touched at all
  int64_t shared_requests, shared_passes;   // passes: how often shared memory was busy; more than the
                                            // least is a bank conflict
  int64_t shared_least;
  int64_t mmas, barriers, blocks;
};
void emulator_count(int on);

// From emulator_log(1) to emulator_log(0) launches are written down instead of run.
struct emulator_launch {
  int64_t kernel;  // its offset in the library's file
  int64_t blocks;
  int32_t threads, shared_bytes;
};
void emulator_log(int on);
int64_t emulator_logged(const emulator_launch** launches);  // how many
void emulator_get(emulator_counts* counts);
#pragma GCC visibility pop
}

#endif
