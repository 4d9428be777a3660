// The torch ops on NVIDIA GPUs.  They are registered when Python asks for it (memlm/ops/_cuda.py), where
// there is a driver: other machines keep the plain-torch reference.
#include <dlfcn.h>

#include <cstring>
#include <list>
#include <string>

#include "attention.h"
#include "dense.h"
#include "gpu.h"
#include "paged.h"
#include "sparse.h"
#include "training.h"

namespace {

using namespace memlm_torch;
using torch::stable::detail::StableLibrary;
using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

thread_local std::string reason;  // why the reference ran last, or what went wrong

// Results on the stack.
template <class Result>
void put(StableIValue* stack, const Result& result) {
  stack[0] = torch::stable::detail::from(result);
}
template <class... Results>
void put(StableIValue* stack, const std::tuple<Results...>& results) {
  torch::stable::detail::box_from_tuple(stack, results);
}

// As TORCH_BOX, of an op that asks memlm_reference::<name> to do what the GPU's kernels do not support.
template <auto function>
struct OrReference;
template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct OrReference<function> {
  static inline std::string name;

  static void run(StableIValue* stack, uint64_t, uint64_t) {
    const auto arguments = torch::stable::detail::unbox_to_tuple<Parameters...>(stack);
    try {
      if constexpr (std::is_void_v<Result>) {
        std::apply(function, arguments);
      } else {
        put(stack, std::apply(function, arguments));
      }
    } catch (const Unsupported& error) {
      reason = error.what();
      torch::stable::detail::box_from_tuple(stack, arguments);
      STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION));
    }
  }
};

struct Operation {
  const char* name;
  void** function;  // where Gpu keeps it
  Boxed alone, or_reference;
  std::string* reference;
};

template <auto op, class Function>
Operation operation(const char* name, Function*& function) {
  return {name, reinterpret_cast<void**>(&function), TORCH_BOX(op), &OrReference<op>::run,
          &OrReference<op>::name};
}

const Operation kOperations[] = {
    operation<&w2_matmul<Gpu>>("w2_matmul", Gpu::w2_matmul),
    operation<&w4_matmul<Gpu>>("w4_matmul", Gpu::w4_matmul),
    operation<&w8_matmul<Gpu>>("w8_matmul", Gpu::w8_matmul),
    operation<&w8a8_matmul<Gpu>>("w8a8_matmul", Gpu::w8a8_matmul),
    operation<&matmul_topk<Gpu>>("matmul_topk", Gpu::matmul_topk),
    operation<&quantize_rows<Gpu>>("quantize_rows", Gpu::quantize_rows),
    operation<&embedding<Gpu>>("embedding", Gpu::embedding),
    operation<&dequantize<Gpu>>("dequantize", Gpu::dequantize),
    operation<&quantize_weight<Gpu>>("quantize_weight", Gpu::quantize_weight),
    operation<&attention<Gpu>>("attention", Gpu::attention),
    operation<&attention_backward<Gpu>>("attention_backward", Gpu::attention_backward),
    operation<&kv_append<Gpu>>("kv_append", Gpu::kv_append),
    operation<&paged_attention<Gpu>>("paged_attention", Gpu::paged_attention),
    operation<&w4_sparse_matmul<Gpu>>("w4_sparse_matmul", Gpu::w4_sparse_matmul),
    operation<&w4_sparse_dequantize<Gpu>>("w4_sparse_dequantize", Gpu::w4_sparse_dequantize),
    operation<&block_sparse_matmul<Gpu>>("block_sparse_matmul", Gpu::block_sparse_matmul),
    operation<&block_sparse_grad_x<Gpu>>("block_sparse_grad_x", Gpu::block_sparse_grad_x),
    operation<&block_sparse_grad_values<Gpu>>("block_sparse_grad_values", Gpu::block_sparse_grad_values),
    operation<&adamw_8bit<Gpu>>("adamw_8bit", Gpu::adamw_8bit),
    operation<&linear_cross_entropy<Gpu>>("linear_cross_entropy", Gpu::linear_cross_entropy),
    operation<&linear_cross_entropy_backward<Gpu>>("linear_cross_entropy_backward",
                                                   Gpu::linear_cross_entropy_backward),
};

}  // namespace

extern "C" {

// Opens libmemlm_cuda.so.  Returns NULL, or what went wrong.
MEMLM_API const char* memlm_torch_open_cuda(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    reason = dlerror();
    return reason.c_str();
  }
  const auto find = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
  };
  find("memlm_cuda_last_error", Gpu::last_error);
  find("memlm_cuda_block_sparse_dequantize", Gpu::block_sparse_dequantize);
  for (const Operation& operation : kOperations)
    *operation.function = dlsym(library, (std::string("memlm_cuda_") + operation.name).c_str());
  return nullptr;
}

// Registers operation `name`, which is to be defined in `library`, for a dispatch key: alone, or with
// memlm_reference::<name> for what it does not support.  0: the open library does not have it.
MEMLM_API int memlm_torch_register_cuda(const char* library, const char* key, const char* name,
                                        int or_reference) {
  static std::list<StableLibrary> kept;  // what is registered ends with its library
  for (const Operation& operation : kOperations) {
    if (strcmp(operation.name, name) != 0 || !*operation.function) continue;
    *operation.reference = std::string("memlm_reference::") + name;
    kept.emplace_back(StableLibrary::Kind::IMPL, library, key, __FILE__, __LINE__);
    kept.back().impl(name, or_reference ? operation.or_reference : operation.alone);
    return 1;
  }
  return 0;
}

// Why the reference ran last in this thread.
MEMLM_API const char* memlm_torch_cuda_reason(void) { return reason.c_str(); }
}
