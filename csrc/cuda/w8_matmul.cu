#include "weight_only.h"

using namespace memlm::cuda;

const Launchers memlm::cuda::kLaunchersOf8 = kLaunchers<Bytes>;

memlm_status memlm_cuda_w8_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                  memlm_cuda_queue* queue) {
  return weight_only(w, 8, args, queue, kLaunchersOf8);
}
