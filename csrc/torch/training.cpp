// The torch ops for training on the CPU.
#include "training.h"

#include "cpu.h"

using namespace memlm_torch;

STABLE_TORCH_LIBRARY_FRAGMENT(memlm, m) {
  m.def(
      "adamw_8bit(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_absmax, "
      "Tensor(d!) exp_avg_sq, Tensor(e!) exp_avg_sq_absmax, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, int step) -> ()");
  // On the CPU these two are memlm/ops/linear_cross_entropy.py's own, over torch's products.
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, "
      "float label_smoothing) -> (Tensor losses, Tensor lse)");
  m.def(
      "linear_cross_entropy_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, "
      "Tensor lse, int ignore_index, float label_smoothing, bool want_hidden, bool want_weight, bool want_bias) "
      "-> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(memlm, CPU, m) { m.impl("adamw_8bit", TORCH_BOX(&adamw_8bit<Cpu>)); }
