// The parallel-for under every kernel.
#pragma once
#include <stdint.h>

namespace memlm {

// Calls body(context, begin, end, slot) for consecutive pieces of 0..items-1 of at most `chunk`
// items, on up to `threads` threads; slot is 0..threads-1 and no two concurrent calls share one.
// Which thread takes which piece is left to chance (a late thread takes fewer), so a body's result
// must not depend on it.  All compute in the caller's floating-point mode (rounding, denormals).
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

// Calls f() with a team of up to `threads` threads, which the host lends once for the whole call.
// Inside, each parallel_for that f calls is handed to them within a fraction of a microsecond; the
// host's own loops take some microseconds each.  Between loops the team's threads spin, and after a
// while yield: f should compute all the time.
//
// f may run on another thread than the caller's, in the caller's floating-point mode.  Where the
// host gives fewer threads, late or none, f and its loops run on those that came.  A team within a
// team is the outer one, and one within the body of a loop is what the host makes of it.
void with_team(int threads, void (*f)(void* context), void* context);

// The same for a callable.
template <class F>
void with_team(int threads, const F& f) {
  with_team(
      threads, [](void* context) { (*static_cast<const F*>(context))(); }, const_cast<F*>(&f));
}

// On how many of `threads` threads so many multiply-adds are worth while.  A further thread costs
// about 2 us (to get it going, and the weights and results to and fro between caches), in which one
// thread does some 2^17 multiply-adds of decoding, the slowest of the matmuls per multiply-add.
inline int useful_threads(double macs, int threads) {
  constexpr double kMacsPerThread = 1 << 17;
  const double useful = macs / kMacsPerThread;
  return useful < 1 ? 1 : useful < threads ? static_cast<int>(useful) : threads;
}

}  // namespace memlm
