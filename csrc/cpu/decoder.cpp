// Layers of a decoder, one after the other on one team of threads.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "linear.h"
#include "threads.h"
#include "workspace.h"

namespace memlm {
namespace {

using ll = long long;

struct Shape {
  int64_t rows, hidden, heads, kv_heads, head_dim;
  int64_t q_width() const { return heads * head_dim; }
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
};

memlm_status check_part(const memlm_linear& linear, const char* name, int64_t layer, int64_t n,
                        int64_t k) {
  if (check_linear(linear)) {
    char why[200];
    std::snprintf(why, sizeof why, "%s", memlm_last_error());
    return fail(MEMLM_INVALID, "layers[%lld].%s.%s", (ll)layer, name, why);
  }
  if (linear.w.n != n || linear.w.k != k)
    return fail(MEMLM_INVALID, "layers[%lld].%s: is [%lld, %lld], expected [%lld, %lld]", (ll)layer,
                name, (ll)linear.w.n, (ll)linear.w.k, (ll)n, (ll)k);
  return MEMLM_OK;
}

memlm_status check_layer(const memlm_decoder_layer& layer, int64_t i, const Shape& shape) {
  if (!layer.input_norm || !layer.post_norm)
    return fail(MEMLM_INVALID, "layers[%lld].%s: is NULL", (ll)i,
                layer.input_norm ? "post_norm" : "input_norm");
  const int64_t hidden = shape.hidden;
  if (memlm_status s = check_part(layer.qkv, "qkv", i, shape.qkv_width(), hidden)) return s;
  if (memlm_status s = check_part(layer.o, "o", i, hidden, shape.q_width())) return s;
  const int64_t n = layer.gate_up.w.n, width = n / 2;
  if (memlm_status s = check_part(layer.gate_up, "gate_up", i, n, hidden)) return s;
  if (n % (2 * kTileRows))
    return fail(MEMLM_INVALID, "layers[%lld].gate_up: has %lld rows, accepted are multiples of %d",
                (ll)i, (ll)n, 2 * kTileRows);
  return check_part(layer.down, "down", i, hidden, std::min(layer.down.w.k, width));
}

memlm_status check(const memlm_decoder_layer* layers, int64_t count, const memlm_kv_pool* pools,
                   const memlm_sequences* sequences, const memlm_decoder_args* args, Shape& shape) {
  if (count < 0 || (count && (!layers || !pools)))
    return fail(MEMLM_INVALID, "layers, pools: got %lld layers at %p and %p", (ll)count,
                (const void*)layers, (const void*)pools);
  if (!args) return fail(MEMLM_INVALID, "args: is NULL");
  const memlm_decoder_args& a = *args;
  if (!is_dtype(a.dtype))
    return fail(MEMLM_INVALID, "dtype: got %d, accepted are f32, f16, bf16", a.dtype);
  if (a.threads < 1) return fail(MEMLM_INVALID, "threads: got %d, at least 1 is needed", a.threads);
  shape.rows = 0;
  if (count == 0) return MEMLM_OK;
  for (int64_t i = 0; i < count; ++i) {
    if (layers[i].window < 0)
      return fail(MEMLM_INVALID, "layers[%lld].window: got %lld, accepted is 0 or above", (ll)i,
                  (ll)layers[i].window);
    if (memlm_status s = check_paged(pools + i, sequences, layers[i].window)) return s;
    const memlm_kv_pool &one = pools[i], &first = pools[0];
    if (one.kv_heads != first.kv_heads || one.head_dim != first.head_dim || one.type != first.type ||
        one.block_tokens != first.block_tokens)
      return fail(MEMLM_INVALID,
                  "pools[%lld]: type %d, blocks of %lld tokens, %lld heads of %lld; the first has %d, "
                  "%lld, %lld, %lld", (ll)i, one.type, (ll)one.block_tokens, (ll)one.kv_heads,
                  (ll)one.head_dim, first.type, (ll)first.block_tokens, (ll)first.kv_heads,
                  (ll)first.head_dim);
  }
  const int64_t rows = sequences->count ? sequences->rows[sequences->count] : 0;
  shape = {rows, a.hidden, a.heads, pools[0].kv_heads, pools[0].head_dim};
  if (a.heads < 1 || a.heads > INT32_MAX || a.heads % shape.kv_heads)
    return fail(MEMLM_INVALID, "heads: got %lld, accepted are multiples of the pool's %lld",
                (ll)a.heads, (ll)shape.kv_heads);
  if (shape.head_dim % 2)
    return fail(MEMLM_INVALID, "head_dim: got %lld, accepted are even ones", (ll)shape.head_dim);
  if (a.x_stride < a.hidden)
    return fail(MEMLM_INVALID, "x_stride: got %lld, x has %lld columns", (ll)a.x_stride, (ll)a.hidden);
  if (a.angle_stride < shape.head_dim / 2)
    return fail(MEMLM_INVALID, "angle_stride: got %lld, rows have %lld", (ll)a.angle_stride,
                (ll)shape.head_dim / 2);
  if (shape.rows > 0 && (!a.x || !a.cos || !a.sin))
    return fail(MEMLM_INVALID, "%s: is NULL", !a.x ? "x" : !a.cos ? "cos" : "sin");
  for (int64_t i = 0; i < shape.rows; ++i) {
    const int64_t position = a.positions ? a.positions[i] : i;
    if (position < 0 || position >= a.angles)
      return fail(MEMLM_INVALID, "positions: got %lld for row %lld, there are %lld angles",
                  (ll)position, (ll)i, (ll)a.angles);
  }
  for (int64_t i = 0; i < count; ++i)
    if (memlm_status s = check_layer(layers[i], i, shape)) return s;
  return MEMLM_OK;
}

// The layers' own arrays: qkv and attended, or gated in their place.
struct Activations {
  char *qkv, *attended, *gated;

  static int64_t bytes(const Shape& shape, int64_t width, int64_t size) {
    return shape.rows * size * std::max(shape.qkv_width() + shape.q_width(), width);
  }
  Activations(char* room, const Shape& shape, int64_t size)
      : qkv(room), attended(room + shape.rows * shape.qkv_width() * size), gated(room) {}
};

// What is appended and attends at once: with tails, new tokens that go beyond the end of a block are
// cut there (memlm_paged_attention says why); runs of sequences that do not are one piece.
class Pieces {
 public:
  struct Piece {
    int64_t row;  // of its first token
    memlm_sequences sequences;
  };

  // False where there is no memory.
  bool cut(const memlm_sequences& all, const memlm_kv_pool& pool, int64_t rows) {
    const int64_t most = 2 * all.count + 1 + rows / pool.block_tokens;
    pieces_ = workspace<Piece>(most);
    numbers_ = workspace<int64_t>(2 * all.count + 3 * most);
    if (!pieces_ || !numbers_) return false;
    next_ = numbers_.get();
    if (!pool.tails) {
      pieces_[count_++] = {0, all};
      return true;
    }
    int64_t run = 0;  // the first sequence of the run
    for (int64_t s = 0; s < all.count; ++s) {
      const int64_t end = all.lengths[s], tokens = pool.block_tokens;
      int64_t start = end - (all.rows[s + 1] - all.rows[s]);
      if (start == end || start / tokens == (end - 1) / tokens) continue;
      add(all, run, s);
      for (int64_t row = all.rows[s]; start < end;) {
        const int64_t stop = std::min(end, (start / tokens + 1) * tokens);
        add(all, s, s + 1, row, stop, stop - start);
        row += stop - start;
        start = stop;
      }
      run = s + 1;
    }
    add(all, run, all.count);
    return true;
  }
  const Piece* begin() const { return pieces_.get(); }
  const Piece* end() const { return pieces_.get() + count_; }

 private:
  std::unique_ptr<Piece[], Free> pieces_;
  std::unique_ptr<int64_t[], Free> numbers_;
  int64_t* next_ = nullptr;
  int64_t count_ = 0;

  int64_t* numbers(int64_t count) {
    next_ += count;
    return next_ - count;
  }
  // Sequences first .. end - 1, whole.
  void add(const memlm_sequences& all, int64_t first, int64_t end) {
    if (first == end) return;
    int64_t* rows = numbers(end - first + 1);
    for (int64_t s = first; s <= end; ++s) rows[s - first] = all.rows[s] - all.rows[first];
    push(all, first, end, all.rows[first], rows, all.lengths + first);
  }
  // `count` tokens of sequence first, up to its token number `length`.
  void add(const memlm_sequences& all, int64_t first, int64_t end, int64_t row, int64_t length,
           int64_t count) {
    int64_t* own = numbers(3);
    own[0] = 0;
    own[1] = count;
    own[2] = length;
    push(all, first, end, row, own, own + 2);
  }
  void push(const memlm_sequences& all, int64_t first, int64_t end, int64_t row, const int64_t* rows,
            const int64_t* lengths) {
    pieces_[count_++] = {row, {end - first, rows, lengths, all.tables + first * all.table_stride,
                               all.table_stride, all.tails ? all.tails + first : nullptr}};
  }
};

class Runner {
 public:
  Runner(const Shape& shape, const Pieces& pieces, const memlm_decoder_args& args, char* room)
      : shape_(shape), pieces_(pieces), args_(args), size_(args.dtype == MEMLM_F32 ? 4 : 2),
        activations_(room, shape, size_) {}

  memlm_status run(const memlm_decoder_layer& layer, const memlm_kv_pool& pool) const {
    if (memlm_status s = attention(layer, pool)) return s;
    const int64_t width = layer.gate_up.w.n / 2;
    memlm_matmul_args gate_up = from_x(layer.post_norm, layer.norm_eps);
    gate_up.y = activations_.gated;
    gate_up.y_stride = width;
    gate_up.swiglu = 1;
    if (memlm_status s = multiply(layer.gate_up, gate_up)) return s;
    return multiply(layer.down, onto_x(activations_.gated, width));
  }

 private:
  const Shape shape_;
  const Pieces& pieces_;
  const memlm_decoder_args& args_;
  const int64_t size_;
  const Activations activations_;

  memlm_matmul_args rows() const {
    memlm_matmul_args args = {};
    args.m = shape_.rows;
    args.dtype = args_.dtype;
    args.threads = args_.threads;
    return args;
  }
  // norm(x) times something.
  memlm_matmul_args from_x(const void* norm, float eps) const {
    memlm_matmul_args args = rows();
    args.x = args_.x;
    args.x_stride = args_.x_stride;
    args.norm = norm;
    args.norm_eps = eps;
    return args;
  }
  // x + activations times something, in x.
  memlm_matmul_args onto_x(const char* activations, int64_t stride) const {
    memlm_matmul_args args = rows();
    args.x = activations;
    args.x_stride = stride;
    args.y = args_.x;
    args.y_stride = args_.x_stride;
    args.residual = args_.x;
    args.residual_stride = args_.x_stride;
    return args;
  }

  memlm_status attention(const memlm_decoder_layer& layer, const memlm_kv_pool& pool) const {
    const int64_t stride = shape_.qkv_width(), q_width = shape_.q_width();
    memlm_matmul_args qkv = from_x(layer.input_norm, layer.norm_eps);
    qkv.y = activations_.qkv;
    qkv.y_stride = stride;
    if (memlm_status s = multiply(layer.qkv, qkv)) return s;
    turn_heads(layer);
    memlm_paged_attention_args attend = {};
    attend.q_stride = stride;
    attend.out_stride = q_width;
    attend.heads = shape_.heads;
    attend.dtype = args_.dtype;
    attend.scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim));
    attend.window = layer.window;
    attend.threads = args_.threads;
    for (const Pieces::Piece& piece : pieces_) {
      const char* q = activations_.qkv + piece.row * stride * size_;
      const char* k = q + q_width * size_;
      const char* v = k + shape_.kv_heads * shape_.head_dim * size_;
      const memlm_sequences* sequences = &piece.sequences;
      if (memlm_status s = memlm_kv_append(&pool, sequences, k, v, stride, args_.dtype, args_.threads))
        return s;
      attend.q = q;
      attend.out = activations_.attended + piece.row * q_width * size_;
      if (memlm_status s = memlm_paged_attention(&pool, sequences, &attend)) return s;
    }
    return multiply(layer.o, onto_x(activations_.attended, q_width));
  }

  void turn_heads(const memlm_decoder_layer& layer) const {
    const Heads heads = {activations_.qkv, shape_.qkv_width(), args_.dtype, shape_.heads,
                         shape_.kv_heads,  shape_.head_dim,    layer.q_norm, layer.k_norm,
                         layer.norm_eps,   args_.cos,          args_.sin,    args_.angle_stride,
                         args_.positions};
    const int64_t numbers = shape_.rows * (shape_.heads + shape_.kv_heads) * shape_.head_dim;
    constexpr double kCost = 16;  // multiply-adds of a matmul that take as long as one number here
    const int threads = useful_threads(kCost * numbers, args_.threads);
    const Kernels& isa = kernels();
    parallel_for(shape_.rows, div_up(shape_.rows, 4 * threads), threads,
                 [&](int64_t begin, int64_t end, int) { isa.turn_heads(heads, begin, end); });
  }
};

}  // namespace
}  // namespace memlm

using namespace memlm;

memlm_status memlm_decoder_layers(const memlm_decoder_layer* layers, int64_t count,
                                  const memlm_kv_pool* pools, const memlm_sequences* sequences,
                                  const memlm_decoder_args* args) {
  Shape shape;
  if (memlm_status s = check(layers, count, pools, sequences, args, shape)) return s;
  if (shape.rows == 0) return MEMLM_OK;
  int64_t width = 0;
  for (int64_t i = 0; i < count; ++i) width = std::max(width, layers[i].gate_up.w.n / 2);
  const auto room =
      workspace<char>(Activations::bytes(shape, width, args->dtype == MEMLM_F32 ? 4 : 2));
  Pieces pieces;
  if (!room || !pieces.cut(*sequences, pools[0], shape.rows)) return said(MEMLM_NO_MEMORY);
  const Runner runner(shape, pieces, *args, room.get());
  memlm_status status = MEMLM_OK;
  with_team(args->threads, [&] {
    for (int64_t i = 0; i < count && status == MEMLM_OK; ++i) status = runner.run(layers[i], pools[i]);
  });
  return said(status);  // on this thread, whoever ran the layers
}
