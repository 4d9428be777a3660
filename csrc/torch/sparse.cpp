// The torch ops over sparse matrices on the CPU.
#include "cpu.h"
#include "sparse.h"

using namespace memlm_torch;

STABLE_TORCH_LIBRARY_FRAGMENT(memlm, m) {
  m.def(
      "block_sparse_matmul(Tensor x, Tensor starts, Tensor places, Tensor codes, Tensor? scales, "
      "Tensor? offsets, int bits, int codebook, int n, int k, Tensor? bias, bool fast, Tensor? norm, "
      "float eps, bool swiglu, Tensor? residual) -> Tensor");
  m.def(
      "w4_sparse_matmul(Tensor x, Tensor codes, Tensor places, Tensor? starts, Tensor scales, "
      "int pattern, int codebook, int n, int k, int group, Tensor? bias, bool fast, Tensor? norm, "
      "float eps, bool swiglu, Tensor? residual) -> Tensor");
  m.def(
      "w4_sparse_dequantize(Tensor codes, Tensor places, Tensor? starts, Tensor scales, int pattern, "
      "int codebook, int n, int k, int group, int row, int rows, ScalarType dtype) -> Tensor");
  m.def(
      "block_sparse_grad_x(Tensor grad, Tensor starts, Tensor places, Tensor codes, Tensor? scales, "
      "Tensor? offsets, int bits, int codebook, int n, int k) -> Tensor");
  m.def(
      "block_sparse_grad_values(Tensor grad, Tensor x, Tensor starts, Tensor places, int n, int k) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(memlm, CPU, m) {
  m.impl("block_sparse_matmul", TORCH_BOX(&block_sparse_matmul<Cpu>));
  m.impl("w4_sparse_matmul", TORCH_BOX(&w4_sparse_matmul<Cpu>));
  m.impl("w4_sparse_dequantize", TORCH_BOX(&w4_sparse_dequantize<Cpu>));
  m.impl("block_sparse_grad_x", TORCH_BOX(&block_sparse_grad_x<Cpu>));
  m.impl("block_sparse_grad_values", TORCH_BOX(&block_sparse_grad_values<Cpu>));
}
