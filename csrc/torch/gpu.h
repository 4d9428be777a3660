// The GPU's kernels, as dense.h and sparse.h call them: functions of libmemlm_cuda.so, which is opened where
// there is a CUDA driver.  Nothing here needs CUDA to be compiled or loaded.
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>

#include "../include/memlm_cuda.h"
#include "tensors.h"

namespace memlm_torch {

// The device, or the library, cannot do it.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The stream that torch works on, a cudaStream_t.  A libtorch without CUDA has no such function, so it is
// looked up where it is needed.
inline void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const auto get = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get, "this torch was built without CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

struct Gpu {
  static constexpr bool kUnpacks = true;  // unpacked.h
  // NULL: the library has no such function, or none is open.
  static inline decltype(&memlm_cuda_last_error) last_error;
  static inline decltype(&memlm_cuda_w2_matmul) w2_matmul;
  static inline decltype(&memlm_cuda_w4_matmul) w4_matmul;
  static inline decltype(&memlm_cuda_w8_matmul) w8_matmul;
  static inline decltype(&memlm_cuda_w8a8_matmul) w8a8_matmul;
  static inline decltype(&memlm_cuda_matmul_topk) matmul_topk;
  static inline decltype(&memlm_cuda_quantize_rows) quantize_rows;
  static inline decltype(&memlm_cuda_embedding) embedding;
  static inline decltype(&memlm_cuda_dequantize) dequantize;
  static inline decltype(&memlm_cuda_quantize_weight) quantize_weight;
  static inline decltype(&memlm_cuda_attention) attention;
  static inline decltype(&memlm_cuda_attention_backward) attention_backward;
  static inline decltype(&memlm_cuda_kv_append) kv_append;
  static inline decltype(&memlm_cuda_paged_attention) paged_attention;
  static inline decltype(&memlm_cuda_w4_sparse_matmul) w4_sparse_matmul;
  static inline decltype(&memlm_cuda_w4_sparse_dequantize) w4_sparse_dequantize;
  static inline decltype(&memlm_cuda_block_sparse_matmul) block_sparse_matmul;
  static inline decltype(&memlm_cuda_block_sparse_dequantize) block_sparse_dequantize;
  static inline decltype(&memlm_cuda_block_sparse_grad_x) block_sparse_grad_x;
  static inline decltype(&memlm_cuda_block_sparse_grad_values) block_sparse_grad_values;
  static inline decltype(&memlm_cuda_adamw_8bit) adamw_8bit;
  static inline decltype(&memlm_cuda_linear_cross_entropy) linear_cross_entropy;
  static inline decltype(&memlm_cuda_linear_cross_entropy_backward) linear_cross_entropy_backward;

  // Runs a function on the device and stream of `at`.  Its workspace is a tensor, which torch gives to
  // nobody else on this stream before the kernels are done, and takes from a graph's pool during capture.
  template <class Function, class... Arguments>
  static void call(const Tensor& at, Function function, Arguments... arguments) {
    if (!function) throw Unsupported("memlm's CUDA kernels are not loaded");
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    memlm_cuda_queue queue = {};
    if (at.is_cuda()) {  // else it is the emulator's, whose device memory is the CPU's
      guard.emplace(at.get_device_index());
      queue.stream = current_stream(at.get_device_index());
    }
    memlm_status status = function(arguments..., &queue);
    std::optional<Tensor> workspace;
    if (status == MEMLM_NO_MEMORY) {
      constexpr int64_t alignment = 256;  // torch promises none
      workspace = torch::stable::new_empty(at, {queue.workspace_bytes + alignment}, ScalarType::Byte);
      const auto begin = reinterpret_cast<uintptr_t>(workspace->mutable_data_ptr());
      queue.workspace = reinterpret_cast<void*>((begin + alignment - 1) / alignment * alignment);
      status = function(arguments..., &queue);
    }
    if (status == MEMLM_UNSUPPORTED) throw Unsupported(last_error());
    STD_TORCH_CHECK(status == MEMLM_OK, last_error());
  }
};

}  // namespace memlm_torch
