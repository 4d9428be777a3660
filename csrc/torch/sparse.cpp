// The torch ops over sparse matrices on the CPU, and their gradients.
#include "cpu.h"
#include "sparse.h"

namespace {

using namespace memlm_torch;

// f32 [m, columns], dense.
const float* rows_of(Tensor& t, const char* name, int64_t columns) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 2 &&
                      t.size(1) == columns,
                  name, ": expected float32 [m, ", columns, "] on the CPU");
  make_contiguous(t);
  return static_cast<const float*>(t.const_data_ptr());
}

Tensor block_sparse_grad_x(Tensor grad, Tensor starts, Tensor places, Tensor codes,
                           OptionalTensor scales, OptionalTensor offsets, int64_t bits,
                           int64_t codebook, int64_t n, int64_t k) {
  const memlm_packed w = blocks(grad, starts, places, codes, scales, offsets, bits, codebook, n, k);
  const float* g = rows_of(grad, "grad", n);
  Tensor out = torch::stable::new_empty(grad, {grad.size(0), k}, ScalarType::Float);
  check_status(memlm_block_sparse_grad_x(&w, static_cast<int>(bits), grad.size(0), g,
                                         static_cast<float*>(out.mutable_data_ptr()), threads()));
  return out;
}

Tensor block_sparse_grad_values(Tensor grad, Tensor x, Tensor starts, Tensor places, int64_t n,
                                int64_t k) {
  const float* g = rows_of(grad, "grad", n);
  const float* rows = rows_of(x, "x", k);
  STD_TORCH_CHECK(x.size(0) == grad.size(0), "x: expected as many rows as grad has");
  STD_TORCH_CHECK(places.dim() == 1, "places: expected one dimension");
  Tensor out = torch::stable::new_empty(grad, {places.size(0), kActGroup, kTileRows}, ScalarType::Float);
  // The result stands for the values, of which only the places are looked at.
  const memlm_packed w = blocks(grad, starts, places, out, {}, {}, 32, 0, n, k);
  check_status(memlm_block_sparse_grad_values(&w, grad.size(0), g, rows,
                                              static_cast<float*>(out.mutable_data_ptr()), threads()));
  return out;
}

}  // namespace

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
  m.impl("block_sparse_grad_x", TORCH_BOX(&block_sparse_grad_x));
  m.impl("block_sparse_grad_values", TORCH_BOX(&block_sparse_grad_values));
}
