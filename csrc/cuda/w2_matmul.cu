#include "weight_only.h"

using namespace memlm::cuda;

template <class T>
using Fields = Integers<T, 2>;

const Launchers memlm::cuda::kLaunchersOf2 = kLaunchers<Fields>;

memlm_status memlm_cuda_w2_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                  memlm_cuda_queue* queue) {
  return weight_only(w, 2, args, queue, kLaunchersOf2);
}
