// The torch ops for training on the CPU.
#include "training.h"

#include "cpu.h"

using namespace memlm_torch;

STABLE_TORCH_LIBRARY_FRAGMENT(memlm, m) {
  m.def(
      "adamw_8bit(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_absmax, "
      "Tensor(d!) exp_avg_sq, Tensor(e!) exp_avg_sq_absmax, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(memlm, CPU, m) { m.impl("adamw_8bit", TORCH_BOX(&adamw_8bit<Cpu>)); }
