#include "emulator.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace emulator {

Fiber* current;
int block_threads;
Place block, grid;
unsigned char* shared_memory;

namespace {

constexpr size_t kStack = 128 << 10, kShared = 256 << 10;
constexpr int kMostThreads = 1024, kBanks = 32, kSector = 32;

// ---- What is known of a byte: who wrote it and who read it, and when ----

// A thread's time: how many barriers of its block, and of its warp, it has passed.
struct Access {
  int16_t thread = -1;  // -1: none
  int32_t block_time = 0, warp_time = 0;
};

struct Byte {
  Access writer, reader;
  bool readers_of_many_warps = false, readers_of_many_lanes = false;  // in reader's times
  bool pending = false;  // cp.async brings it
  bool written = false;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  bool valid;
};

struct Thread : Fiber {
  bool done = false;
  Kind waiting = Kind::kNone;
  const void* site = nullptr;
  void* operands = nullptr;
  int32_t block_time = 0, warp_time = 0;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> open;
};

struct Array {
  uintptr_t begin, end;
  bool writable;
};

std::vector<Array> arrays;
std::vector<Thread> fibers;
Byte* shadow;  // of shared memory
// Of what the block has touched of global memory, by lines: an access, which is aligned, is in one.
constexpr uintptr_t kLine = 64;
std::unordered_map<uintptr_t, std::array<Byte, kLine>> global_shadow;
size_t shared_size;
unsigned char* stacks;
void* scheduler_stack;
void (*kernel_of_launch)(const void*);
Array parameters_of_launch;
std::mt19937_64 random_numbers(0);
std::string message;
bool failed, counting;
emulator_counts counted;
bool logging = false;
std::vector<emulator_launch> launches;
std::unordered_set<uintptr_t> sectors_read, sectors_written;
Device device = {800, 108, 163 << 10};

// One instruction of one warp, for the counts: the accesses of its lanes, which come one by one.
struct Touched {
  int lane;
  uintptr_t address;
  int size;
};
struct Request {
  bool write, shared;
  std::vector<Touched> lanes;  // as they ran
};
struct Instruction {
  const void* where;
  int warp;
  bool shared;  // cp.async reads one memory, or nothing, and writes the other
  bool operator<(const Instruction& other) const {
    return std::tie(where, warp, shared) < std::tie(other.where, other.warp, other.shared);
  }
};
struct Executed {
  std::vector<Request> requests;  // the n-th time
  int times[kWarp] = {};          // that each lane was here
};
std::map<Instruction, Executed> executed;

// ---- Fibers ----

// Saves what a call must leave as it was, and goes on with another stack.
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

Thread& self() { return static_cast<Thread&>(*current); }

void to_scheduler() { emulator_switch(&current->stack_pointer, scheduler_stack); }

void run_fiber() {
  kernel_of_launch(reinterpret_cast<const void*>(parameters_of_launch.begin));
  self().done = true;
  to_scheduler();
  __builtin_unreachable();
}

void prepare(Thread* fiber, int thread) {
  *fiber = Thread();
  fiber->thread = thread;
  auto top = reinterpret_cast<void**>(stacks + (thread + 1) * kStack);
  *--top = nullptr;  // keeps the stack as aligned as behind a call
  *--top = reinterpret_cast<void*>(&run_fiber);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber->stack_pointer = top;
}

// The first error counts; the fiber that makes it never goes on.
[[noreturn]] void fail(const std::string& what, const void* where) {
  if (!failed) {
    char text[200];
    snprintf(text, sizeof text, " (block %ld, %ld, %ld, thread %d)", block.x, block.y, block.z,
             current ? current->thread : -1);
    message = what + text;
    Dl_info info;
    if (where && dladdr(where, &info)) {
      snprintf(text, sizeof text, " +%#lx",
               reinterpret_cast<uintptr_t>(where) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1);
      message += text;
    }
    failed = true;
  }
  to_scheduler();
  __builtin_unreachable();
}

// ---- Memory ----

bool ordered(const Access& earlier, const Thread& now) {
  if (earlier.thread < 0 || earlier.thread == now.thread || earlier.block_time < now.block_time) return true;
  return earlier.thread / kWarp == now.thread / kWarp && earlier.warp_time < now.warp_time;
}

Access access_of(const Thread& now) {
  return {static_cast<int16_t>(now.thread), now.block_time, now.warp_time};
}

bool shared_has(const void* address) {
  return address >= shared_memory && address < shared_memory + kShared;
}

void note_read(Byte& byte, const Thread& now) {
  const Access& last = byte.reader;
  if (last.thread < 0 || last.block_time < now.block_time) {
    byte.readers_of_many_warps = byte.readers_of_many_lanes = false;
  } else if (last.thread / kWarp != now.thread / kWarp) {
    byte.readers_of_many_warps = true;
  } else if (last.warp_time < now.warp_time) {
    byte.readers_of_many_lanes = false;
  } else if (last.thread != now.thread) {
    byte.readers_of_many_lanes = true;
  }
  byte.reader = access_of(now);
}

void check_read(Byte& byte, const Thread& now, bool shared, const void* where) {
  if (byte.pending) fail("read of what cp.async has not brought yet", where);
  if (shared && !byte.written) fail("read of uninitialised shared memory", where);
  if (!ordered(byte.writer, now)) fail("race: read of what another thread wrote, no barrier between", where);
  note_read(byte, now);
}

void check_write(Byte& byte, const Thread& now, const void* where) {
  if (byte.pending) fail("write to where cp.async is to write", where);
  if (!ordered(byte.writer, now))
    fail("race: write over what another thread wrote, no barrier between", where);
  const Access& r = byte.reader;
  const bool same_time = r.thread >= 0 && r.block_time == now.block_time;
  if (same_time && (byte.readers_of_many_warps || !ordered(r, now) ||
                    (byte.readers_of_many_lanes && r.warp_time == now.warp_time))) {
    fail("race: write over what another thread read, no barrier between", where);
  }
  byte.writer = access_of(now);
  byte.written = true;
}

void count(const void* address, size_t size, bool write, bool shared, const void* where) {
  Executed& instruction = executed[{where, current->thread / kWarp, shared}];
  const size_t time = instruction.times[current->thread % kWarp]++;
  if (time >= instruction.requests.size()) instruction.requests.push_back({write, shared, {}});
  instruction.requests[time].lanes.push_back(
      {current->thread % kWarp, reinterpret_cast<uintptr_t>(address), static_cast<int>(size)});
}

bool contains(const Array& array, uintptr_t first, size_t size) {
  return first >= array.begin && first + size <= array.end;
}

// The kernels' own library, where their constants are.
Array find_library() {
  Array found = {reinterpret_cast<uintptr_t>(&launch), 0, false};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Array& library = *static_cast<Array*>(data);
        uintptr_t begin = UINTPTR_MAX, end = 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& part = info->dlpi_phdr[i];
          if (part.p_type != PT_LOAD) continue;
          begin = std::min<uintptr_t>(begin, info->dlpi_addr + part.p_vaddr);
          end = std::max<uintptr_t>(end, info->dlpi_addr + part.p_vaddr + part.p_memsz);
        }
        if (library.begin < begin || library.begin >= end) return 0;
        library = {begin, end, false};
        return 1;
      },
      &found);
  return found;
}

// Threads ask it which they are.
Array fibers_array() {
  const auto begin = reinterpret_cast<uintptr_t>(fibers.data());
  return {begin, begin + fibers.size() * sizeof fibers[0], false};
}

void access(const void* address, size_t size, bool write, const void* where) {
  if (!current || (address >= stacks && address < stacks + kMostThreads * kStack)) return;
  Thread& now = self();
  const auto first = reinterpret_cast<uintptr_t>(address);
  if (!write && (contains(parameters_of_launch, first, size) || contains(fibers_array(), first, size)))
    return;
  if (first % size) fail("misaligned access", where);
  static const Array library = find_library();
  if (!write && contains(library, first, size)) return;
  if (shared_has(address)) {
    const size_t offset = static_cast<const unsigned char*>(address) - shared_memory;
    if (offset + size > shared_size) fail("access outside of the block's shared memory", where);
    for (size_t i = offset; i < offset + size; i++) {
      write ? check_write(shadow[i], now, where) : check_read(shadow[i], now, true, where);
    }
    if (counting) count(address, size, write, true, where);
    return;
  }
  const auto array = std::find_if(arrays.begin(), arrays.end(),
                                  [&](const Array& a) { return contains(a, first, size); });
  if (array == arrays.end()) fail(write ? "write out of bounds" : "read out of bounds", where);
  if (write && !array->writable) fail("write to an array that is only read", where);
  if (array->writable) {  // what nobody writes, nobody has to wait for
    auto& line = global_shadow[first / kLine];
    for (uintptr_t i = first % kLine; i < first % kLine + size; i++) {
      write ? check_write(line[i], now, where) : check_read(line[i], now, false, where);
    }
  }
  if (counting) count(address, size, write, false, where);
}

void add_counts() {
  for (const auto& [instruction, all] : executed) {
    for (const Request& request : all.requests) {
      if (request.shared) {
        // A pass serves 128 bytes: of 16-byte accesses those of 8 lanes, of 8-byte ones those of 16.
        // Within it a bank gives one word of 4 bytes, to all who want it.
        const int size = request.lanes.front().size,
                  lanes = std::max(1, std::min(kWarp, 128 / std::max(4, size)));
        counted.shared_requests++;
        for (int from = 0; from < kWarp; from += lanes) {
          std::unordered_set<uintptr_t> words[kBanks];
          bool any = false;
          for (const auto& [lane, address, bytes] : request.lanes) {
            if (lane < from || lane >= from + lanes) continue;
            any = true;
            for (uintptr_t w = address / 4; w <= (address + bytes - 1) / 4; w++) words[w % kBanks].insert(w);
          }
          if (!any) continue;
          size_t busy = 1;
          for (const auto& bank : words) busy = std::max(busy, bank.size());
          counted.shared_passes += static_cast<int64_t>(busy);
          counted.shared_least++;
        }
        continue;
      }
      // Pieces of 16 bytes are asked for 4 lanes at a time, as ncu counts asynchronous copies on compute
      // capability 9.0: a sector of which other lanes want the rest is asked for again.
      const int lanes = !request.write && request.lanes.front().size == 16 ? 4 : kWarp;
      (request.write ? counted.write_requests : counted.read_requests)++;
      for (int from = 0; from < kWarp; from += lanes) {
        std::unordered_set<uintptr_t> sectors;
        for (const auto& [lane, address, bytes] : request.lanes) {
          if (lane < from || lane >= from + lanes) continue;
          for (uintptr_t s = address / kSector; s <= (address + bytes - 1) / kSector; s++) sectors.insert(s);
        }
        (request.write ? counted.write_sectors : counted.read_sectors) += static_cast<int64_t>(sectors.size());
        (request.write ? sectors_written : sectors_read).insert(sectors.begin(), sectors.end());
      }
    }
  }
  executed.clear();
}

// ---- Running ----

// Runs a fiber until it waits or ends.
void step(Thread& fiber) {
  current = &fiber;
  emulator_switch(&scheduler_stack, fiber.stack_pointer);
  current = nullptr;
}

// Runs the warp's lanes as long as one can run.
void run_warp(int warp) {
  const int begin = warp * kWarp, end = std::min(begin + kWarp, block_threads);
  std::vector<int> order;
  for (int i = begin; i < end; i++) order.push_back(i);
  for (bool any = true; any && !failed;) {
    any = false;
    std::shuffle(order.begin(), order.end(), random_numbers);
    for (int i : order) {
      if (fibers[i].done || fibers[i].waiting != Kind::kNone) continue;
      step(fibers[i]);
      any = true;
      if (failed) return;
    }
  }
}

const char* name_of(Kind kind) {
  static const char* const names[] = {"none",   "__syncthreads", "__syncwarp", "shuffle", "ballot",
                                      "ldmatrix", "mma",           "mma int8",   "mma sparse"};
  return names[static_cast<int>(kind)];
}

// All threads wait or are done: lets them pass the barrier where they all stand.
void pass_barrier() {
  const Thread* first = nullptr;
  for (const Thread& fiber : fibers) {
    if (!fiber.done && !first) first = &fiber;
  }
  for (Thread& fiber : fibers) {
    if (fiber.done || fiber.waiting != Kind::kSyncThreads || fiber.site != first->site) {
      current = &fiber;
      message = std::string("divergent: a thread ") +
                (fiber.done ? "has left" : std::string("waits at ") + name_of(fiber.waiting)) +
                " while another waits at " + name_of(first->waiting);
      failed = true;
      return;
    }
  }
  for (Thread& fiber : fibers) {
    fiber.waiting = Kind::kNone;
    fiber.block_time++;
  }
  counted.barriers++;
}

void run_block() {
  for (int i = 0; i < block_threads; i++) prepare(&fibers[i], i);
  std::fill(shadow, shadow + shared_size, Byte());
  memset(shared_memory, 0xff, shared_size);  // NaN, as f16, bf16 and f32
  global_shadow.clear();
  std::vector<int> warps;
  for (int i = 0; i < (block_threads + kWarp - 1) / kWarp; i++) warps.push_back(i);
  while (!failed) {
    std::shuffle(warps.begin(), warps.end(), random_numbers);
    for (int warp : warps) {
      run_warp(warp);
      if (failed) return;
    }
    if (std::all_of(fibers.begin(), fibers.end(), [](const Thread& f) { return f.done; })) break;
    pass_barrier();
  }
  counted.blocks++;
  if (counting) add_counts();
}

void wait_at(Kind kind, const void* site, void* operands) {
  Thread& now = self();
  now.waiting = kind;
  now.site = site;
  now.operands = operands;
}

}  // namespace

void collective(Kind kind, const void* site, void* operands, void (*run)(void* const* lanes)) {
  const int begin = current->thread / kWarp * kWarp;
  wait_at(kind, site, operands);
  void* lanes[kWarp];
  for (int i = 0; i < kWarp; i++) {
    if (begin + i >= block_threads || fibers[begin + i].waiting != kind || fibers[begin + i].site != site) {
      to_scheduler();
      return;
    }
    lanes[i] = fibers[begin + i].operands;
  }
  if (run) run(lanes);
  if (kind == Kind::kMma || kind == Kind::kMmaInt8 || kind == Kind::kMmaSparse) counted.mmas++;
  for (int i = 0; i < kWarp; i++) {
    fibers[begin + i].waiting = Kind::kNone;
    if (kind == Kind::kSyncWarp) fibers[begin + i].warp_time++;
  }
}

namespace {

// A place in the source, as one pointer.
const void* site_of(const char* file, int line) {
  static std::map<std::pair<std::string, int>, int> sites;
  return &sites[{file, line}];
}

}  // namespace

void sync_threads(const char* file, int line) {
  wait_at(Kind::kSyncThreads, site_of(file, line), nullptr);
  to_scheduler();
}

void sync_warp(const char* file, int line) {
  collective(Kind::kSyncWarp, site_of(file, line), nullptr, nullptr);
}

void read(const void* address, size_t size, const void* where) { access(address, size, false, where); }
void write(const void* address, size_t size, const void* where) { access(address, size, true, where); }

void atomic(const void* address, size_t size, const void* where) {
  if (reinterpret_cast<uintptr_t>(address) % size) fail("misaligned access", where);
  if (shared_has(address)) return;
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (const Array& array : arrays) {
    if (array.writable && contains(array, first, size)) return;
  }
  fail("atomic operation out of bounds", where);
}

Device current_device() { return device; }

void copy_async(void* to, const void* from, bool valid, const void* where) {
  constexpr size_t size = 16;
  if (reinterpret_cast<uintptr_t>(from) % size) fail("misaligned access", where);
  if (valid) access(from, size, false, where);
  access(to, size, true, where);
  if (!shared_has(to)) fail("cp.async to what is no shared memory", where);
  const size_t offset = static_cast<unsigned char*>(to) - shared_memory;
  for (size_t i = offset; i < offset + size; i++) shadow[i].pending = true;
  memset(to, 0xff, size);
  self().open.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), valid});
}

void commit_copies() {
  Thread& now = self();
  now.groups.push_back(std::move(now.open));
  now.open.clear();
}

void wait_copies(int pending) {
  Thread& now = self();
  while (now.groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : now.groups.front()) {
      if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
      const size_t offset = copy.to - shared_memory;
      for (size_t i = offset; i < offset + 16; i++) {
        shadow[i].pending = false;
        shadow[i].writer = access_of(now);
      }
    }
    now.groups.erase(now.groups.begin());
  }
}

bool logged(const void* kernel, Place blocks, int threads, int shared_bytes) {
  if (!logging) return false;
  Dl_info library;
  dladdr(kernel, &library);
  const int64_t offset = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
  launches.push_back({offset, blocks.x * blocks.y * blocks.z, threads, shared_bytes});
  return true;
}

bool launch(void (*kernel)(const void* parameters), const void* parameters, size_t parameter_bytes,
            Place blocks, int threads, int shared_bytes) {
  if (failed) return false;
  if (!stacks) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<unsigned char*>(
        mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
    shared_memory = static_cast<unsigned char*>(mmap(nullptr, kShared, PROT_READ | PROT_WRITE, flags, -1, 0));
    shadow = new Byte[kShared];
  }
  if (threads < 1 || threads > kMostThreads || threads % kWarp || shared_bytes > device.shared_bytes ||
      blocks.x < 1 || blocks.y < 1 || blocks.z < 1 || blocks.x > 0x7fffffff || blocks.y > 65535 ||
      blocks.z > 65535) {
    message = "launch of a grid, block or shared memory that the device does not have";
    failed = true;
    return false;
  }
  block_threads = threads;
  shared_size = shared_bytes;
  grid = blocks;
  kernel_of_launch = kernel;
  const auto first = reinterpret_cast<uintptr_t>(parameters);
  parameters_of_launch = {first, first + parameter_bytes, false};
  fibers.resize(threads);
  std::vector<int64_t> order(blocks.x * blocks.y * blocks.z);
  for (size_t i = 0; i < order.size(); i++) order[i] = static_cast<int64_t>(i);
  std::shuffle(order.begin(), order.end(), random_numbers);
  for (int64_t i : order) {
    block = {i % blocks.x, i / blocks.x % blocks.y, i / (blocks.x * blocks.y)};
    run_block();
    if (failed) break;
  }
  current = nullptr;
  return !failed;
}

}  // namespace emulator

using namespace emulator;

extern "C" {
void emulator_register(const void* begin, size_t bytes, int writable) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  arrays.push_back({first, first + bytes, writable != 0});
}
void emulator_forget() { arrays.clear(); }
void emulator_seed(uint64_t seed) {
  random_numbers.seed(seed);
  failed = false;
  message.clear();
}
void emulator_device(int arch, int processors, int shared_bytes) {
  device = {arch, processors, shared_bytes};
}
const char* emulator_error() { return message.c_str(); }
void emulator_log(int on) {
  logging = on;
  if (on) launches.clear();
}
int64_t emulator_logged(const emulator_launch** to) {
  *to = launches.data();
  return static_cast<int64_t>(launches.size());
}
void emulator_count(int on) {
  counting = on;
  counted = {};
  executed.clear();
  sectors_read.clear();
  sectors_written.clear();
}
void emulator_get(emulator_counts* counts) {
  *counts = counted;
  counts->distinct_read = static_cast<int64_t>(sectors_read.size());
  counts->distinct_written = static_cast<int64_t>(sectors_written.size());
}

// ---- What -fsanitize=thread calls ----

#define MEMLM_HOOKS(size)                                                                             \
  void __tsan_read##size(void* p) { access(p, size, false, __builtin_return_address(0)); }            \
  void __tsan_write##size(void* p) { access(p, size, true, __builtin_return_address(0)); }            \
  void __tsan_unaligned_read##size(void* p) { access(p, size, false, __builtin_return_address(0)); }  \
  void __tsan_unaligned_write##size(void* p) { access(p, size, true, __builtin_return_address(0)); }  \
  void __tsan_volatile_read##size(void* p) { access(p, size, false, __builtin_return_address(0)); }   \
  void __tsan_volatile_write##size(void* p) { access(p, size, true, __builtin_return_address(0)); }
MEMLM_HOOKS(1)
MEMLM_HOOKS(2)
MEMLM_HOOKS(4)
MEMLM_HOOKS(8)
MEMLM_HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  for (size_t i = 0; i < n; i++) access(static_cast<char*>(p) + i, 1, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  for (size_t i = 0; i < n; i++) access(static_cast<char*>(p) + i, 1, true, __builtin_return_address(0));
}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
