// What a thread does between two looks at a number that it waits for.
#pragma once

namespace memlm {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace memlm
