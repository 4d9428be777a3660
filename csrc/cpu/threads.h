// The parallel-for under every kernel.
#pragma once
#include <stdint.h>

namespace memlm {

// Calls body(context, begin, end, slot) for consecutive pieces of 0..items-1 of at most `chunk`
// items, on up to `threads` threads; slot is 0..threads-1 and no two concurrent calls share one.
// Which thread takes which piece is left to chance (a late thread takes fewer), so a body's result
// must not depend on it.
using Body = void (*)(void* context, int64_t begin, int64_t end, int slot);
void parallel_for(int64_t items, int64_t chunk, int threads, Body body, void* context);

// The same for a callable.
template <class F>
void parallel_for(int64_t items, int64_t chunk, int threads, const F& f) {
  parallel_for(
      items, chunk, threads,
      [](void* context, int64_t begin, int64_t end, int slot) {
        (*static_cast<const F*>(context))(begin, end, slot);
      },
      const_cast<F*>(&f));
}

}  // namespace memlm
