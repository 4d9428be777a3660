#include "weight_only.h"

using namespace memlm::cuda;

template <class T>
using Nibbles = Integers<T, 4>;

const Launchers memlm::cuda::kLaunchersOf4 = kLaunchers<Nibbles>;
const Launchers memlm::cuda::kLaunchersOfLevels = kLaunchers<Lookup>;

memlm_status memlm_cuda_w4_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                  memlm_cuda_queue* queue) {
  return weight_only(w, 4, args, queue, w && w->levels ? kLaunchersOfLevels : kLaunchersOf4);
}
