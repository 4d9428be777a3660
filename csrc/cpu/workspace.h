// Memory of a call, for what is compiled once for all instruction sets.
#pragma once
#include <cstdlib>
#include <memory>

namespace memlm {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// `count` of T, undefined; NULL where there is no memory.
template <class T>
std::unique_ptr<T[], Free> workspace(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  return std::unique_ptr<T[], Free>(static_cast<T*>(std::aligned_alloc(64, bytes ? bytes : 64)));
}

}  // namespace memlm
