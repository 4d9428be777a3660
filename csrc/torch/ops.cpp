// The torch ops: tensors to pointers, nothing else.  Built against libtorch's stable ABI, so that
// one binary serves torch 2.10 and every later release.
#include <pthread.h>

#include "attention.h"
#include "cpu.h"
#include "dense.h"
#include "paged.h"

namespace {

using namespace memlm_torch;

// torch's own thread pool runs the kernels: one pool, which follows torch.set_num_threads.  A second
// one beside it would find the CPUs taken by torch's threads, which spin for milliseconds after each
// of torch's operations.
void run_on_torch_threads(int64_t count, memlm_task task, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

const bool g_run_is_set = (memlm_set_run(run_on_torch_threads), true);

// A forked child of a process that has used the pool hangs in it (in torch.mm too): OpenMP waits for
// threads that the child does not have.  memlm's own start anew there.
const int g_at_fork = pthread_atfork(nullptr, nullptr, [] { memlm_set_run(nullptr); });

}  // namespace

// memlm/ops/<op>.py documents each op and adds what torch needs beside the kernel.
STABLE_TORCH_LIBRARY(memlm, m) {
  m.def(
      "w2_matmul(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, int n, int k, int group, "
      "Tensor? bias, bool fast, Tensor? norm, float eps, bool swiglu, Tensor? residual) -> Tensor");
  m.def(
      "w4_matmul(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, int codebook, int n, int k, "
      "int group, Tensor? bias, bool fast, Tensor? norm, float eps, bool swiglu, Tensor? residual) "
      "-> Tensor");
  m.def(
      "w8_matmul(Tensor x, Tensor codes, Tensor scales, int n, int k, int group, Tensor? bias, "
      "bool fast, Tensor? norm, float eps, bool swiglu, Tensor? residual) -> Tensor");
  m.def(
      "w8a8_matmul(Tensor x, Tensor? x_scales, Tensor codes, Tensor scales, int n, int k, int group, "
      "Tensor? bias, int x_group, Tensor? norm, float eps, bool swiglu, Tensor? residual, "
      "ScalarType? dtype) -> Tensor");
  m.def(
      "matmul_topk(Tensor x, Tensor codes, Tensor scales, Tensor? offsets, int bits, int codebook, "
      "int n, int k, int group, Tensor? bias, int mode, Tensor? norm, float eps, int top) -> "
      "(Tensor values, Tensor indices)");
  m.def(
      "quantize_rows(Tensor x, int x_group, Tensor? norm, float eps) -> (Tensor codes, Tensor scales)");
  m.def(
      "embedding(Tensor ids, Tensor codes, Tensor scales, Tensor? offsets, int bits, int codebook, "
      "int n, int k, int group, ScalarType dtype) -> Tensor");
  m.def(
      "dequantize(Tensor codes, Tensor scales, Tensor? offsets, int bits, int codebook, int n, int k, "
      "int group, int row, int rows, ScalarType dtype) -> Tensor");
  m.def(
      "quantize_weight(Tensor w, int bits, int codebook, int group, bool has_offsets, "
      "ScalarType scale_dtype) -> (Tensor codes, Tensor scales, Tensor offsets)");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? block_mask, int mask_block, "
      "Tensor? q_offsets, Tensor? k_offsets, float scale, int left, int right, bool to_end, "
      "float softcap, Tensor? slopes, Tensor? sinks, float dropout, Tensor? seed) "
      "-> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? mask, Tensor? block_mask, int mask_block, Tensor? q_offsets, Tensor? k_offsets, "
      "float scale, int left, int right, bool to_end, float softcap, Tensor? slopes, Tensor? sinks, "
      "float dropout, Tensor? seed, bool want_mask) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)");
  m.def(
      "kv_append(Tensor(a!) pool, Tensor(b!)? tails, Tensor k, Tensor v, Tensor rows, Tensor lengths, "
      "Tensor tables, Tensor? tail_of, int type, int block_tokens) -> ()");
  m.def(
      "paged_attention(Tensor q, Tensor pool, Tensor? tails, Tensor rows, Tensor lengths, "
      "Tensor tables, Tensor? tail_of, int type, int block_tokens, float scale, int window, "
      "float softcap, Tensor? slopes, Tensor? sinks) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(memlm, CPU, m) {
  m.impl("w2_matmul", TORCH_BOX(&w2_matmul<Cpu>));
  m.impl("w4_matmul", TORCH_BOX(&w4_matmul<Cpu>));
  m.impl("w8_matmul", TORCH_BOX(&w8_matmul<Cpu>));
  m.impl("w8a8_matmul", TORCH_BOX(&w8a8_matmul<Cpu>));
  m.impl("matmul_topk", TORCH_BOX(&matmul_topk<Cpu>));
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows<Cpu>));
  m.impl("embedding", TORCH_BOX(&embedding<Cpu>));
  m.impl("dequantize", TORCH_BOX(&dequantize<Cpu>));
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight<Cpu>));
  m.impl("attention", TORCH_BOX(&attention<Cpu>));
  m.impl("attention_backward", TORCH_BOX(&attention_backward<Cpu>));
  m.impl("kv_append", TORCH_BOX(&kv_append<Cpu>));
  m.impl("paged_attention", TORCH_BOX(&paged_attention<Cpu>));
}
