// Products of many rows on a GPU.  The kernels of csrc/cuda are for few: they read W as it is stored, which
// is what takes time then.  With many rows the multiplications do, and torch's are those of each device's own
// instructions: W is unpacked to x's type, a panel of features at a time, and multiplied by torch.  A panel
// is all the memory that is needed; a weight is rounded once more, and so are a norm before the product, and
// gate and up and the product itself before what comes after it.
#pragma once
#include <array>

#include "../formats.h"
#include "tensors.h"

namespace memlm_torch {

// Reckoned, not measured, from runs of 16 and 512 rows on an H200: unpacking and torch's product take some 33
// us for 4096 x 4096 and 86 us for 14336 x 4096, the kernel 0.26 and 0.65 us a row, as long for 127 and 133
// rows.
constexpr int64_t kManyRows = 128;
// Enough features to keep a GPU busy, and whole tiles of torch's product.
constexpr int64_t kPanelBytes = int64_t{128} << 20, kPanelUnit = 256;

// Whether the product is for unpacked_matmul: of numbers of 16 bits, which hold the weights too.
template <class On>
bool is_unpacked(const Tensor& x, const memlm_packed& w) {
  if constexpr (!On::kUnpacks) return false;
  const ScalarType type = x.scalar_type();
  const bool fits = type == ScalarType::BFloat16 || (type == ScalarType::Half && w.scale_dtype == MEMLM_F16);
  return fits && x.numel() / w.k >= kManyRows;
}

// One of torch's operations.
template <class... Arguments>
Tensor dispatched(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack = {torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// y of matmul(); dequantize(first, rows, dtype, out) unpacks rows of W.
template <class Dequantize>
Tensor unpacked_matmul(const Tensor& x, const memlm_packed& w, Around& around, const Dequantize& dequantize) {
  namespace stable = torch::stable;
  check_operands(x, w, around, x.scalar_type());
  STD_TORCH_CHECK(!around.swiglu || w.n % (2 * memlm::kTileRows) == 0,
                  "swiglu: n / 2 must be a multiple of 16, n is ", w.n);
  const int64_t columns = around.swiglu ? w.n / 2 : w.n, rows = x.numel() / w.k;
  const std::vector<int64_t> shape = with_last(x, true, columns);
  if (around.residual) check_residual(*around.residual, x, shape);
  const int64_t units = std::max<int64_t>(kPanelBytes / 2 / w.k / kPanelUnit, 1);
  const int64_t panel = std::min(w.n, units * kPanelUnit);
  const std::vector<int64_t> dense = {rows, w.n}, none = {0}, one = {w.k};
  Tensor flat = stable::reshape(x, {rows, w.k});
  if (around.norm) {
    flat = dispatched("aten::rms_norm", "", flat, one, around.norm, std::optional<double>(around.eps));
  }
  Tensor weights = stable::new_empty(x, {panel, w.k});
  Tensor y = stable::new_empty(x, panel < w.n ? dense : none);
  for (int64_t first = 0; first < w.n; first += panel) {
    const int64_t here = std::min(panel, w.n - first);
    dequantize(first, here, dtype_of(x.scalar_type(), "x"), weights.mutable_data_ptr());
    OptionalTensor bias = around.bias;
    if (bias) bias = stable::narrow(*bias, 0, first, here);
    const Tensor part = dispatched("aten::linear", "", flat, stable::narrow(weights, 0, 0, here), bias);
    if (panel >= w.n) {
      y = part;
    } else {
      Tensor to = stable::narrow(y, 1, first, here);
      stable::copy_(to, part);
    }
  }
  if (around.swiglu) {
    const Tensor gate = dispatched("aten::silu", "", stable::narrow(y, 1, 0, columns));
    y = dispatched("aten::mul", "Tensor", gate, stable::narrow(y, 1, columns, columns));
  }
  // The sum: there is no stable add.
  if (around.residual) y = stable::subtract(y, stable::reshape(*around.residual, {rows, columns}), -1);
  return stable::reshape(y, shape);
}

}  // namespace memlm_torch
