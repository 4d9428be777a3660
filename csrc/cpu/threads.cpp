#include "threads.h"

#include <atomic>

#include "../include/memlm.h"
#include "float_mode.h"
#include "pool.h"

namespace memlm {
namespace {

std::atomic<memlm_run> g_run{run_on_pool};

struct Loop {
  int64_t items, chunk;
  Body body;
  void* context;
  FloatControl mode;  // the caller's: the result must not depend on who does which piece
  std::atomic<int64_t> next;
};

void work(void* context, int64_t slot) {
  Loop& loop = *static_cast<Loop*>(context);
  const WithFloatMode mode(loop.mode);
  for (;;) {
    const int64_t begin = loop.next.fetch_add(loop.chunk, std::memory_order_relaxed);
    if (begin >= loop.items) return;
    const int64_t end = begin + loop.chunk < loop.items ? begin + loop.chunk : loop.items;
    loop.body(loop.context, begin, end, static_cast<int>(slot));
  }
}

}  // namespace

void parallel_for(int64_t items, int64_t chunk, int threads, Body body, void* context) {
  const int64_t pieces = (items + chunk - 1) / chunk;
  const int64_t count = threads < pieces ? threads : pieces;
  Loop loop{items, chunk, body, context, float_control(), {0}};
  if (count <= 1) {
    if (items > 0) work(&loop, 0);
  } else {
    g_run.load(std::memory_order_relaxed)(count, work, &loop);
  }
}

}  // namespace memlm

void memlm_set_run(memlm_run run) { memlm::g_run = run ? run : memlm::run_on_pool; }
