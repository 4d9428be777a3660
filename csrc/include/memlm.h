/* memlm's C ABI: plain pointers, shapes and status codes.  No torch, no Python, no C++ in it.
 *
 * All matrices are row-major.  Pointers need no alignment beyond their element's; 64-byte alignment
 * is fastest.  No function keeps a pointer after it returns, and all may be called from several
 * threads at once.
 */
#ifndef MEMLM_H_
#define MEMLM_H_

#include <stdint.h>

#if defined(__GNUC__)
#define MEMLM_API __attribute__((visibility("default")))
#else
#define MEMLM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  MEMLM_OK = 0,
  MEMLM_INVALID = 1,    /* an argument does not fit; nothing was read or written */
  MEMLM_NO_MEMORY = 2,  /* the workspace could not be allocated; nothing was written */
  MEMLM_UNSUPPORTED = 3 /* this CPU, or this build, cannot do it */
} memlm_status;

/* What went wrong in this thread's last call that did not return MEMLM_OK: names the argument. */
MEMLM_API const char* memlm_last_error(void);

typedef enum { MEMLM_F32 = 0, MEMLM_F16 = 1, MEMLM_BF16 = 2 } memlm_dtype;

/* Which weights of a matrix are stored; the others are 0. */
typedef enum {
  MEMLM_DENSE = 0,
  MEMLM_TWO_OF_FOUR = 1, /* two of each 4 consecutive k of a row; 4 bits */
  MEMLM_UNSTRUCTURED = 2, /* any; 4 bits */
  MEMLM_BLOCKS = 3        /* blocks of 16 rows and 32 k */
} memlm_pattern;

/* A packed weight matrix W[n, k]; memlm/formats.py specifies and draws the layout, and of sparse ones
 * memlm/sparse_formats.py. */
typedef struct {
  const void* codes;
  const void* scales;
  const void* offsets;     /* NULL: symmetric */
  memlm_dtype scale_dtype; /* of scales and offsets: MEMLM_F16 or MEMLM_F32 */
  int64_t n, k;
  int64_t group; /* k per scale: 32, 64, 128, or 0 for one scale per row (8 bits only) */
  const float* levels; /* [16]: a 4-bit code q stands for levels[q], as in NF4; no offsets then.
                          NULL: codes are numbers */
  memlm_pattern pattern;
  const int64_t* starts; /* [tiles + 1], tiles = ceil(n / 16).  BLOCKS: tile t has the blocks
                            starts[t] .. starts[t + 1] - 1.  UNSTRUCTURED: the byte of codes where it
                            begins; codes have 64 bytes beyond the last */
  const void* places;    /* BLOCKS: int32, the k of each block in units of 32, ascending within a tile.
                            The others: bytes, 64 bits for each 16 rows and 4 k */
} memlm_packed;

/* The levels of NormalFloat, 4 bits (arXiv:2305.14314). */
MEMLM_API extern const float memlm_nf4_levels[16];

typedef struct {
  int64_t m;
  const void* x;     /* [m, k] */
  int64_t x_stride;  /* elements from one row to the next, at least k */
  const void* bias;  /* [n], or NULL */
  void* y;           /* [m, n], or [m, n / 2] with swiglu; must not overlap x */
  int64_t y_stride;  /* elements from one row to the next, at least the above */
  memlm_dtype dtype; /* of all these arrays, and of norm and residual */
  int fast;          /* 0: accurate, f32 arithmetic.  1: activations rounded to int8 per 32 k, integer
                        products, f32 sums; where the CPU has AMX, for many rows activations and
                        weights rounded to bf16, f32 sums */
  int threads;       /* at most this many; the result does not depend on it */
  /* The steps beside the product, in f32. */
  const void* norm; /* [k], or NULL: x <- x / sqrt(mean(x^2) + norm_eps) * norm, each row */
  float norm_eps;
  int swiglu; /* y <- silu(y[:, :n/2]) * y[:, n/2:]: W holds gate above up; n / 2 is a multiple of 16 */
  const void* residual;    /* shaped as y, added to it last, or NULL; may be y */
  int64_t residual_stride; /* elements from one row to the next, at least y's columns */
} memlm_matmul_args;

/* y = x W^T + bias, then swiglu, then + residual */
MEMLM_API memlm_status memlm_w2_matmul(const memlm_packed* w, const memlm_matmul_args* args);
MEMLM_API memlm_status memlm_w4_matmul(const memlm_packed* w, const memlm_matmul_args* args);
MEMLM_API memlm_status memlm_w8_matmul(const memlm_packed* w, const memlm_matmul_args* args);

/* The same for 8-bit weights and int8 activations; products are exact integers, and with one scale
 * per row on both sides so is the whole sum.
 *
 * x_scales NULL: args->x holds numbers of args->dtype and is rounded to int8 on the way, one scale
 * for each x_group k: 0 (the whole row) or 32.
 * Otherwise args->x is int8 [m, k], -127..127, and x_scales its scales: [m], or [m, ceil(k / 32)].
 * norm is for numbers only; args->fast is not looked at; k is at most 65,536 (sums are int32). */
MEMLM_API memlm_status memlm_w8a8_matmul(const memlm_packed* w, const memlm_matmul_args* args,
                                         const float* x_scales, int64_t x_group);

/* The same for a sparse W of MEMLM_BLOCKS; bits is 2, 4, 8, or 16 and 32 for weights that are bf16 and
 * f32 themselves (no scales; accurate only).  group is 32. */
MEMLM_API memlm_status memlm_block_sparse_matmul(const memlm_packed* w, int bits,
                                                 const memlm_matmul_args* args);

/* The same for MEMLM_TWO_OF_FOUR and MEMLM_UNSTRUCTURED: 4 bits without offsets; one of the levels, if
 * there are some, is 0. */
MEMLM_API memlm_status memlm_w4_sparse_matmul(const memlm_packed* w, const memlm_matmul_args* args);

/* The gradients of y = x W^T, for a W of MEMLM_BLOCKS: grad_x [m, k] = grad [m, n] W, and, of f32
 * values, the products of grad^T x at the stored places, [blocks, 32, 16]: the sampled dense-dense
 * product.  All arrays but codes are f32; rows are dense. */
MEMLM_API memlm_status memlm_block_sparse_grad_x(const memlm_packed* w, int bits, int64_t m,
                                                 const float* grad, float* grad_x, int threads);
MEMLM_API memlm_status memlm_block_sparse_grad_values(const memlm_packed* w, int64_t m,
                                                      const float* grad, const float* x,
                                                      float* grad_values, int threads);

/* Rounds the rows of x [m, k] to int8 as memlm_w8a8_matmul does, once for several products:
 * codes [m, k], scales [m] or [m, ceil(k / 32)].  norm as above, or NULL. */
MEMLM_API memlm_status memlm_quantize_rows(int64_t m, int64_t k, const void* x, int64_t x_stride,
                                           memlm_dtype dtype, const void* norm, float norm_eps,
                                           int64_t x_group, int8_t* codes, float* scales,
                                           int threads);

/* out[i, :] = W[ids[i], :], for count ids in 0..n-1; bits is 2, 4 or 8; out is [count, k]. */
MEMLM_API memlm_status memlm_embedding(const memlm_packed* w, int bits, const int64_t* ids,
                                       int64_t count, memlm_dtype dtype, void* out, int threads);

/* out[i, :] = W[row + i, :] for rows rows; out is [rows, k].  W may be sparse: bits as it has them. */
MEMLM_API memlm_status memlm_dequantize(const memlm_packed* w, int bits, int64_t row, int64_t rows,
                                        memlm_dtype dtype, void* out, int threads);

/* The largest magnitude in w [n, k], to choose scale_dtype by.  MEMLM_INVALID where w holds NaN or
 * Inf. */
MEMLM_API memlm_status memlm_largest_magnitude(int64_t n, int64_t k, const void* w, int64_t w_stride,
                                               memlm_dtype dtype, float* largest, int threads);

typedef struct {
  int64_t n, k;
  const void* w;     /* [n, k], finite: the codes of other numbers are not specified */
  int64_t w_stride;  /* elements from one row to the next, at least k */
  memlm_dtype dtype; /* of w */
  int bits;          /* per code: 2, 4, 8 */
  int ternary;       /* 2 bits: the codes 0, 1, 2 only */
  int64_t group;     /* as in memlm_packed, as are the next four */
  const float* levels;     /* ascending */
  memlm_dtype scale_dtype; /* F16 for matrices whose largest scale it can hold as a normal number */
  void* codes;
  void* scales;
  void* offsets;
  int threads; /* at most this many; the result does not depend on it */
} memlm_quantize_args;

/* Rounds w to a packed matrix, padding included; memlm/quantize.py says how. */
MEMLM_API memlm_status memlm_quantize_weight(const memlm_quantize_args* args);

/* softmax(scale * q k^T + bias) v over the keys that each query sees, in one pass over tiles with a
 * running maximum (arXiv:2112.05682, arXiv:2205.14135): memory O(q_len + k_len).
 *
 * Query i and key j of a batch entry stand at positions i + d and j, where d is 0, or, with to_end,
 * what puts the last query beside the last key.  The query sees the keys from i + d - left to
 * i + d + right.  A query that sees no key gives zeros. */
typedef struct {
  int64_t batch, heads, kv_heads; /* query head h reads key-value head h / (heads / kv_heads) */
  int64_t q_len, k_len;
  int64_t head_dim, v_dim; /* of q and k; of v and out: 1 to 512 */
  const void* q;           /* [batch, heads, q_len, head_dim] */
  const void* k;           /* [batch, kv_heads, k_len, head_dim] */
  const void* v;           /* [batch, kv_heads, k_len, v_dim] */
  void* out;               /* [batch, heads, q_len, v_dim] */
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3]; /* in elements, of the first three
                              dimensions; the last is dense */
  memlm_dtype dtype; /* of q, k, v, out; sums are f32 */
  float* lse; /* [batch, heads, q_len], dense: log of the sum of exponentials; -Inf where a query sees
                 no key */
  /* Sequences of unequal length, one after the other in one batch entry: batch is their number,
   * sequence b has the rows q_offsets[b] .. q_offsets[b + 1] - 1 and keys likewise, q_len and k_len
   * are the totals, lse is [heads, q_len], the strides of dimension 0 are not used.  NULL: none. */
  const int64_t *q_offsets, *k_offsets;
  float scale;
  int64_t left, right; /* negative: no limit */
  int to_end;
  const void* mask;        /* added to the scores, or NULL: [batch, heads, q_len, k_len] */
  int64_t mask_strides[4]; /* in elements; 0 repeats */
  int mask_is_bool;        /* its elements are bytes, 0: not seen; else of dtype */
  /* Bytes [batch, heads, ceil(q_len / mask_block), ceil(k_len / mask_block)], or NULL.  0: none of these
   * mask_block queries sees any of these mask_block keys: nothing of the block is computed, its keys and
   * values are not read.  Not with offsets. */
  const uint8_t* block_mask;
  int64_t block_mask_strides[4]; /* 0 repeats */
  int64_t mask_block;            /* a multiple of 32; not read without block_mask */
  float softcap;           /* above 0: scores s become softcap * tanh(s / softcap), before any bias */
  const float* slopes;     /* [heads], or NULL: score += -slope * |distance| (arXiv:2108.12409) */
  const float* sinks;      /* [heads], or NULL: a further score, of a key without value */
  float dropout;           /* 0 to below 1: share of the probabilities set to zero, the rest grows */
  uint64_t seed;           /* memlm/ops/attention.py says which */
  int threads;             /* at most this many; the result does not depend on it */
} memlm_attention_args;

MEMLM_API memlm_status memlm_attention(const memlm_attention_args* args);

/* Gradients of out = memlm_attention(args), which has been computed: args->out and args->lse are read.
 * Shapes, dtype and the meaning of strides are those of what they are gradients of. */
typedef struct {
  const void* grad_out;
  void *grad_q, *grad_k, *grad_v;
  int64_t grad_out_strides[3], grad_q_strides[3], grad_k_strides[3], grad_v_strides[3];
  float* grad_mask;  /* [batch, heads, q_len, k_len], dense, of each score's own mask; NULL: not wanted;
                        not with offsets */
  float* grad_sinks; /* [heads], or NULL */
} memlm_attention_grads;

MEMLM_API memlm_status memlm_attention_backward(const memlm_attention_args* args,
                                                const memlm_attention_grads* grads);

/* Keys and values of one layer, in blocks of block_tokens tokens; csrc/kv_blocks.h draws a
 * block, of which each key-value head has memlm_kv_block_bytes. */
typedef enum { MEMLM_KV_F32 = 0, MEMLM_KV_BF16 = 1, MEMLM_KV_INT8 = 2, MEMLM_KV_INT4 = 3 } memlm_kv_type;

typedef struct {
  void* blocks; /* [kv_heads, count, memlm_kv_block_bytes]: consecutive blocks are read in one stream */
  int64_t count;
  int64_t block_tokens; /* a multiple of 32, at most 256 */
  int64_t kv_heads, head_dim; /* head_dim 1 to 512 */
  memlm_kv_type type;
  /* INT4 only, else NULL: the newest block of each sequence, unrounded.  A query in it reads it instead
   * of the rounded one, which quality asks for: the nearest tokens matter most. */
  void* tails; /* [kv_heads, tail_count, memlm_kv_tail_bytes] */
  int64_t tail_count;
} memlm_kv_pool;

/* Bytes of a block of one key-value head; 0 for what memlm_kv_pool does not accept. */
MEMLM_API int64_t memlm_kv_block_bytes(memlm_kv_type type, int64_t block_tokens, int64_t head_dim);
/* The same of a tail; 0 for types that have none. */
MEMLM_API int64_t memlm_kv_tail_bytes(memlm_kv_type type, int64_t block_tokens, int64_t head_dim);

/* The sequences of one step: new tokens, one after the other, and where their tokens are stored. */
typedef struct {
  int64_t count;
  const int64_t* rows;    /* [count + 1]: new tokens rows[s] .. rows[s + 1] - 1 are of sequence s */
  const int64_t* lengths; /* [count]: tokens of each, the new ones included */
  const int32_t* tables;  /* [count, table_stride]: token t is in block tables[s][t / block_tokens] of
                             the pool, as its token t % block_tokens */
  int64_t table_stride;
  const int32_t* tails; /* [count]: the tail of each; not looked at where the pool has none */
} memlm_sequences;

/* Stores the keys and values [rows, kv_heads, head_dim] of the new tokens, quantised one by one; rows
 * of k and v are `stride` elements apart. */
MEMLM_API memlm_status memlm_kv_append(const memlm_kv_pool* pool, const memlm_sequences* sequences,
                                       const void* k, const void* v, int64_t stride,
                                       memlm_dtype dtype, int threads);

/* Causal attention of the new tokens over what is stored of their sequences, themselves included;
 * blocks are read as they are.  With tails, a sequence whose new tokens go beyond the end of a block is
 * better passed block by block: those before its last block would read their own rounded. */
typedef struct {
  const void* q; /* [rows, heads, head_dim] */
  int64_t q_stride, out_stride; /* elements from one row to the next */
  void* out; /* as q */
  int64_t heads;
  memlm_dtype dtype; /* of q and out */
  float scale;
  int64_t window;      /* tokens that a query sees, itself included; 0: all before it.  Blocks outside
                          are not looked at: their places in the table may hold anything */
  float softcap;       /* as in memlm_attention_args, as are the next two */
  const float* slopes;
  const float* sinks;
  int threads; /* at most this many; the result does not depend on it */
} memlm_paged_attention_args;

MEMLM_API memlm_status memlm_paged_attention(const memlm_kv_pool* pool,
                                             const memlm_sequences* sequences,
                                             const memlm_paged_attention_args* args);

typedef enum {
  MEMLM_ACCURATE = 0, /* memlm_matmul_args: fast 0 */
  MEMLM_FAST = 1,     /* fast 1 */
  MEMLM_W8A8 = 2      /* memlm_w8a8_matmul of numbers, x_group 0; 8 bits, dense only */
} memlm_mode;

/* A linear layer. */
typedef struct {
  memlm_packed w; /* of any pattern */
  int bits;       /* 2, 4, 8; of MEMLM_BLOCKS 16 and 32, too */
  memlm_mode mode;
  const void* bias; /* [n], or NULL */
} memlm_linear;

/* The k largest logits of each row, largest first, without storing the others:
 * values, indices [m, k] of y = x W^T + bias.  Of equal ones the lowest index comes first, and NaN is
 * larger than all numbers.  Of args m, x, x_stride, dtype, norm, norm_eps and threads are looked at;
 * y is f32 whatever dtype is. */
MEMLM_API memlm_status memlm_matmul_topk(const memlm_linear* linear, const memlm_matmul_args* args,
                                         int64_t k, float* values, int64_t* indices);

/* A layer of a decoder of the Llama family (arXiv:2302.13971):
 *
 *   q, k, v <- qkv(norm(x));  q, k <- their own norms, if any;  q, k <- turned to their positions
 *   x <- x + o(attention(q, keys so far, values so far))
 *   x <- x + down(silu(gate) * up),  gate, up <- gate_up(norm(x)) */
typedef struct {
  const void *input_norm, *post_norm; /* [hidden]: RMSNorm's weights before attention and after */
  const void *q_norm, *k_norm;        /* [head_dim]: RMSNorm of each head, as in Qwen3, or NULL */
  float norm_eps;
  memlm_linear qkv;     /* [(heads + 2 kv_heads) head_dim, hidden]: query above key above value */
  memlm_linear o;       /* [hidden, heads * head_dim] */
  memlm_linear gate_up; /* [2 width, hidden], gate above up; width is a multiple of 16 */
  memlm_linear down;    /* [hidden, k], k at most width */
  int64_t window;       /* as in memlm_paged_attention_args */
} memlm_decoder_layer;

typedef struct {
  void* x;           /* [rows, hidden]: the first layer's input, and then the last one's result */
  int64_t x_stride;  /* elements from one row to the next, at least hidden */
  memlm_dtype dtype; /* of x, and of the layers' norms and biases */
  int64_t hidden, heads; /* query heads, a multiple of the pools' kv_heads */
  /* The pair (i, i + head_dim / 2) of a head turns by an angle: (a, b) -> (a cos - b sin, b cos + a sin)
   * (arXiv:2104.09864).  head_dim is even. */
  const float *cos, *sin;    /* [angles, head_dim / 2] */
  int64_t angles;
  int64_t angle_stride;      /* elements from one row of both to the next, at least head_dim / 2 */
  const int64_t* positions;  /* [rows]: which row of cos and sin each token takes; NULL: 0, 1, ... */
  int threads;               /* at most this many; the result does not depend on it */
} memlm_decoder_args;

/* Runs the new tokens of some sequences through `count` layers, appending their keys and values to
 * pools [count], one for each layer, of one shape; new tokens may go beyond the end of a block.  rows is
 * sequences->rows[sequences->count].  The workspace grows with rows: long inputs go in several calls. After
 * MEMLM_NO_MEMORY x and the new tokens' places in the pools hold anything. */
MEMLM_API memlm_status memlm_decoder_layers(const memlm_decoder_layer* layers, int64_t count,
                                            const memlm_kv_pool* pools,
                                            const memlm_sequences* sequences,
                                            const memlm_decoder_args* args);

/* A step of AdamW (arXiv:1711.05101) with both moments in 8 bits, a scale for each 256 numbers
 * (arXiv:2110.02861), in place.  memlm/dynamic_codes.py specifies the codes; moments of 0 are codes of 127
 * and 0 with magnitudes of 0.  All arithmetic is f32, with the new moments before they are rounded. */
typedef struct {
  int64_t count;
  void* param;             /* [count] */
  const void* grad;        /* [count] */
  memlm_dtype dtype;       /* of both */
  uint8_t* exp_avg;        /* [count]: signed codes */
  float* exp_avg_absmax;   /* [ceil(count / 256)]: the largest magnitude of each 256 */
  uint8_t* exp_avg_sq;     /* [count]: unsigned codes */
  float* exp_avg_sq_absmax;
  double lr, beta1, beta2, eps, weight_decay; /* not negative and finite; betas below 1 */
  int64_t step;            /* from 1 on */
  int threads;             /* at most this many; the result does not depend on it */
} memlm_adamw_8bit_args;

MEMLM_API memlm_status memlm_adamw_8bit(const memlm_adamw_8bit_args* args);

/* The instruction set in use.  The best that the CPU has is taken, or the one named by the
 * environment variable MEMLM_CPU_ISA. */
MEMLM_API const char* memlm_isa(void);
/* Names of all that this CPU can run, best first; NULL ends the list. */
MEMLM_API const char* const* memlm_isas(void);
/* From how many rows on the matmuls of numbers run on the CPU's tile unit, with its arithmetic, in
 * either mode; 0 where the instruction set in use has none. */
MEMLM_API int64_t memlm_tile_rows(int fast);
/* Switches to one of them.  For tests and benchmarks: not while other calls are under way. */
MEMLM_API memlm_status memlm_set_isa(const char* name);

/* Hands the work to a host's thread pool instead of memlm's own threads.  run must call
 * task(context, i) once for each i in 0..count-1, on at most count threads, and return when all are
 * done.  NULL goes back to memlm's own: one pool for the process, started when first needed, whose
 * threads spin for 50 us after their work and then sleep.  It works for one call at a time; calls
 * from other threads meanwhile run on those threads alone.  It survives fork: a child starts its own.
 * Whoever runs a task, it computes in the floating-point mode (rounding, denormals) of the caller. */
typedef void (*memlm_task)(void* context, int64_t i);
typedef void (*memlm_run)(int64_t count, memlm_task task, void* context);
MEMLM_API void memlm_set_run(memlm_run run);

#ifdef __cplusplus
}
#endif
#endif
