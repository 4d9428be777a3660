// Every operation of the C ABI on every instruction set that runs here, against reference.h.
// Prints the instruction set in use and all that run here, then how many results of each operation
// were compared; stops at the first wrong one.
// usage: check [isas]      isas: the first line only
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <tuple>

#include "reference.h"
#include "reference_adamw.h"
#include "reference_paged.h"
#include "reference_sparse.h"

using namespace reference;

namespace {

std::mt19937 random_bits(1);

double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}
double normal() { return std::normal_distribution<double>()(random_bits); }
int integer(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random_bits);
}

template <class T = double, class Next>
std::vector<T> filled(int64_t count, const Next& next) {
  std::vector<T> values(count);
  for (T& value : values) value = next();
  return values;
}

[[noreturn]] void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fputc('\n', stderr);
  std::exit(1);
}

void require(memlm_status status) {
  if (status != MEMLM_OK) fail("%s: status %d: %s", memlm_isa(), status, memlm_last_error());
}

std::map<std::string, int64_t> compared;  // "isa operation" -> results
int64_t telling = 0, bounded = 0;         // results that a zero would fail, of all within bounds

std::string describe(const Weights& w) {
  const char* const kinds[] = {"symmetric", "asymmetric", "table"};
  char text[100];
  std::snprintf(text, sizeof text, "%s, %s %d bits, group %d, %dx%d", memlm_isa(),
                kinds[static_cast<int>(w.format.kind)], w.format.bits,
                static_cast<int>(w.format.group), static_cast<int>(w.n), static_cast<int>(w.k));
  return text;
}

template <class F>
void on_every_isa(const F& f) {
  for (const char* const* isa = memlm_isas(); *isa; ++isa) {
    require(memlm_set_isa(*isa));
    f();
  }
}

const Format kFormats[] = {
    {Kind::kSymmetric, 2, 32},  {Kind::kSymmetric, 2, 128}, {Kind::kAsymmetric, 2, 64},
    {Kind::kSymmetric, 4, 32},  {Kind::kSymmetric, 4, 64},  {Kind::kSymmetric, 4, 128},
    {Kind::kAsymmetric, 4, 32}, {Kind::kAsymmetric, 4, 128}, {Kind::kTable, 4, 32},
    {Kind::kTable, 4, 64},      {Kind::kSymmetric, 8, 0},   {Kind::kSymmetric, 8, 32},
    {Kind::kSymmetric, 8, 128}};
// n, k: one of each, tails in both, several groups, several stretches of k, more tiles than a
// block.
const int64_t kShapes[][2] = {{1, 1},    {32, 32},   {17, 33}, {5, 129},
                              {64, 300}, {19, 1111}, {70, 260}};
// Both sides of every register tile, several of them, tails.
const int64_t kRows[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 35};
// The most for a matrix: fewer for large ones, which would take long in an emulator.
int64_t most_rows(const Weights& w) { return w.n * w.k > 5000 ? 13 : 35; }
const memlm_dtype kDtypes[] = {MEMLM_F32, MEMLM_F16, MEMLM_BF16};

Weights random_weights(Format format, int64_t n, int64_t k, memlm_dtype scale_dtype, double size) {
  const int64_t groups = format.groups(k);
  const double most = format.kind == Kind::kTable ? 1 : (format.high() - format.low() + 1) / 2;
  const auto code = [&] { return integer(format.low(), format.high()); };
  const auto scale = [&] { return size * uniform(0.5, 1.5) / most; };
  const auto offset = [&] { return -size * uniform(0.5, 1.5); };
  return Weights(format, n, k, filled<int>(n * k, code), scale_dtype,
                 filled(n * groups, scale), filled(n * groups, offset));
}

// A product, by the function and mode that compute it.
enum class Product { kAccurate, kFast, kW8A8Groups, kW8A8Rows };

std::vector<Product> products(const Format& format) {
  if (format.bits < 8) return {Product::kAccurate, Product::kFast};
  return {Product::kAccurate, Product::kFast, Product::kW8A8Groups, Product::kW8A8Rows};
}

bool is_w8a8(Product product) {
  return product == Product::kW8A8Groups || product == Product::kW8A8Rows;
}

std::string name(const Weights& w, Product product) {
  if (product == Product::kW8A8Groups) return "w8a8_matmul groups";
  if (product == Product::kW8A8Rows) return "w8a8_matmul rows";
  return "w" + std::to_string(w.format.bits) + "_matmul " +
         (product == Product::kFast ? "fast" : "accurate");
}

int64_t x_group(Product product) { return product == Product::kW8A8Rows ? 0 : kSub; }

// What the product of m rows makes of activations; on_tiles: on the CPU's tile unit.
Rounding rounding(Product product, bool on_tiles) {
  if (product == Product::kW8A8Rows) return Rounding::kInt8PerRow;
  if (product == Product::kW8A8Groups) return Rounding::kInt8Per32;
  if (product == Product::kAccurate) return Rounding::kNone;
  return on_tiles ? Rounding::kBf16 : Rounding::kInt8Per32;
}

bool on_tiles(Product product, int64_t m) {
  const int64_t from = memlm_tile_rows(product == Product::kFast);
  return from && m >= from;
}

// x as int8, with its scales.
struct Codes {
  std::vector<int8_t> x;
  std::vector<float> scales;
};

struct Call {
  Product product;
  int threads;
  Around around;
  const Codes* codes;  // instead of numbers; NULL: none
  const Sparse* sparse = nullptr;  // W's storage; NULL: it is dense
};

std::string name(const Weights& w, const Call& call) {
  if (!call.sparse) return name(w, call.product);
  const char* const mode = call.product == Product::kFast ? " fast" : " accurate";
  return (call.sparse->pattern == MEMLM_BLOCKS ? "block_sparse_matmul" : "w4_sparse_matmul") +
         std::string(mode);
}

memlm_status multiply(const Weights& w, const Call& call, const memlm_matmul_args& args) {
  const memlm_packed packed = call.sparse ? call.sparse->packed() : w.packed();
  if (call.sparse)
    return packed.pattern == MEMLM_BLOCKS
               ? memlm_block_sparse_matmul(&packed, call.sparse->bits, &args)
               : memlm_w4_sparse_matmul(&packed, &args);
  if (is_w8a8(call.product))
    return memlm_w8a8_matmul(&packed, &args, call.codes ? call.codes->scales.data() : nullptr,
                             x_group(call.product));
  return (w.format.bits == 2   ? memlm_w2_matmul
          : w.format.bits == 4 ? memlm_w4_matmul
                               : memlm_w8_matmul)(&packed, &args);
}

int64_t columns(const Weights& w, const Around& around) { return around.swiglu ? w.n / 2 : w.n; }

// The bytes of y [m, columns].  Rows lie further apart than they are long; what lies between stays
// as it is.
std::vector<uint8_t> run(const Weights& w, const Array& x, int64_t x_stride, int64_t m,
                         const Call& call) {
  constexpr int64_t kGap = 3;
  constexpr uint8_t kPoison = 0xff;  // NaN in every format
  const int64_t n = columns(w, call.around), size = Float(x.dtype).bytes;
  const int64_t row = n * size, stride = (n + kGap) * size;
  std::vector<uint8_t> y(m * stride + size, kPoison);
  memlm_matmul_args args{};
  args.m = m;
  args.x = call.codes ? call.codes->x.data() : x.data();
  args.x_stride = call.codes ? w.k : x_stride;
  args.y = y.data() + size;
  args.y_stride = n + kGap;
  args.dtype = x.dtype;
  args.fast = call.product == Product::kFast;
  args.threads = call.threads;
  if (call.around.bias) args.bias = call.around.bias->data();
  if (call.around.norm) args.norm = call.around.norm->data(), args.norm_eps = kEps;
  if (call.around.residual) args.residual = call.around.residual->data();
  args.residual_stride = n;
  args.swiglu = call.around.swiglu;
  require(multiply(w, call, args));

  std::vector<uint8_t> result;
  for (int64_t i = 0; i < m; ++i) {
    const uint8_t* start = y.data() + size + i * stride;
    result.insert(result.end(), start, start + row);
    for (int64_t j = row; j < stride; ++j)
      if (start[j] != kPoison) fail("%s: wrote beyond a row of y", describe(w).c_str());
  }
  return result;
}

Values decode(memlm_dtype dtype, const std::vector<uint8_t>& bytes) {
  const Float format(dtype);
  Values values(bytes.size() / format.bytes);
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, &bytes[i * format.bytes], format.bytes);
    values[i] = format.decode(bits);
  }
  return values;
}

void count(const std::string& operation, int64_t results) {
  compared[std::string(memlm_isa()) + " " + operation] += results;
}

void check_run(const Weights& w, const Array& x, int64_t x_stride, int64_t m, const Call& call,
               const Expected& expected) {
  const Values y = decode(x.dtype, run(w, x, x_stride, m, call));
  for (size_t i = 0; i < y.size(); ++i) {
    if (!(std::fabs(y[i] - expected.y[i]) <= expected.bound[i]))
      fail("%s: %s, m=%d, dtype %d%s%s%s%s: y[%d] is %.9g, should be %.9g within %.3g",
           name(w, call).c_str(), describe(w).c_str(), static_cast<int>(m), x.dtype,
           call.around.bias ? ", bias" : "", call.around.norm ? ", norm" : "",
           call.around.residual ? ", residual" : "", call.around.swiglu ? ", swiglu" : "",
           static_cast<int>(i), y[i], expected.y[i], expected.bound[i]);
    telling += std::fabs(expected.y[i]) > expected.bound[i];
  }
  bounded += static_cast<int64_t>(y.size());
  count(name(w, call), static_cast<int64_t>(y.size()));
}

// Any number of threads gives the same bits.
void check_threads(const Weights& w, const Array& x, int64_t x_stride, Call call) {
  for (int64_t m : {int64_t{1}, most_rows(w)}) {
    call.threads = 1;
    const std::vector<uint8_t> one = run(w, x, x_stride, m, call);
    for (int threads : {2, 3, 8}) {
      call.threads = threads;
      if (run(w, x, x_stride, m, call) != one)
        fail("%s: %s, m=%d: %d threads give other bits than one", name(w, call).c_str(),
             describe(w).c_str(), static_cast<int>(m), threads);
    }
  }
}

// memlm_quantize_rows rounds as specified, and a product of what it gives is that of the numbers.
void check_codes(const Weights& w, const Array& x, int64_t x_stride, const Call& call) {
  const int64_t m = most_rows(w), k = w.k, group = x_group(call.product), span = group ? group : k;
  const int64_t groups = (k + span - 1) / span;
  Codes codes = {std::vector<int8_t>(m * k), std::vector<float>(m * groups)};
  require(memlm_quantize_rows(m, k, x.data(), x_stride, x.dtype,
                              call.around.norm ? call.around.norm->data() : nullptr, kEps, group,
                              codes.x.data(), codes.scales.data(), 2));
  if (!call.around.norm) {
    Codes expected = codes;
    for (int64_t i = 0; i < m; ++i)
      quantize(&x.values[i * x_stride], k, span, &expected.x[i * k], &expected.scales[i * groups]);
    if (codes.x != expected.x || codes.scales != expected.scales)
      fail("quantize_rows: %s, group %d, dtype %d: other codes or scales", describe(w).c_str(),
           static_cast<int>(group), x.dtype);
    count("quantize_rows", m * k);
  }
  Call given = call;
  given.codes = &codes;
  given.around.norm = nullptr;
  if (run(w, x, x_stride, m, given) != run(w, x, x_stride, m, call))
    fail("%s: %s, dtype %d: codes give other bits than the numbers they are of",
         name(w, call.product).c_str(), describe(w).c_str(), x.dtype);
}

// Every format on every shape; the formats of x, of scales and what stands around take turns.
void check_products() {
  int turn = 0;
  bool tiles = false;
  on_every_isa([&] { tiles |= memlm_tile_rows(1) > 0; });
  for (const Format& format : kFormats)
    for (const auto& [n, k] : kShapes) {
      const memlm_dtype dtype = kDtypes[turn % 3], scale_dtype = turn % 2 ? MEMLM_F32 : MEMLM_F16;
      // Weights far outside f16's range keep f32 scales.
      const bool wide = scale_dtype == MEMLM_F32 && dtype == MEMLM_F32;
      const double size = wide ? std::pow(10, 4 * (turn % 7) - 12) : 0.1;
      const Weights w = random_weights(format, n, k, scale_dtype, size);
      // Columns of very different size, as activations have; what lies between rows is NaN.
      const int64_t stride = k + turn % 3, most = most_rows(w);
      Values numbers(most * stride, NAN);
      const Values spread = filled(k, [] { return std::exp(normal()); });
      for (int64_t i = 0; i < most; ++i)
        for (int64_t j = 0; j < k; ++j) numbers[i * stride + j] = normal() * spread[j];
      for (int64_t j = 0; j < k && j < kSub; ++j) numbers[stride + j] = 0;  // a group of zeros
      for (int64_t j = 0; j < k; ++j)  // scales of 1, and halves to round
        numbers[2 * stride + j] = j % kSub == 0 ? 127 : integer(-127, 126) + 0.5;
      const Array x(dtype, numbers);
      const Array bias(dtype, filled(n, [&] { return size * normal(); }));
      const Array norm(dtype, filled(k, [] { return 1 + 0.3 * normal(); }));
      const Array residual(dtype, filled(most * n, [&] { return size * normal(); }));
      const bool swiglu = n % (2 * kTile) == 0 && !wide && turn % 2;
      const Around kinds[] = {{nullptr, nullptr, nullptr, swiglu},
                              {&bias, nullptr, nullptr, swiglu},
                              {&bias, &norm, nullptr, swiglu},
                              {nullptr, nullptr, &residual, swiglu},
                              {&bias, &norm, &residual, swiglu}};
      const Around& around = kinds[turn % 5];
      for (Product product : products(format)) {
        const auto expect = [&](bool tile_unit) {
          return matmul(w, x, stride, most, rounding(product, tile_unit), around);
        };
        const Expected plain = expect(false);
        const Expected on_tile_unit = tiles ? expect(true) : Expected{};
        const Call call = {product, 1, around, nullptr};
        on_every_isa([&] {
          for (int64_t m : kRows)
            if (m <= most) check_run(w, x, stride, m, call, on_tiles(product, m) ? on_tile_unit : plain);
          check_threads(w, x, stride, call);
          if (is_w8a8(product)) check_codes(w, x, stride, call);
        });
      }
      ++turn;
    }
}

// With scales of 1 and activations that are integers, 127 the largest of every group, integer
// products are exact: at the extremes of codes and activations too, where sums are fullest.
void check_integers() {
  constexpr int64_t n = 35, k = 384, m = 9;
  Values random = filled(m * k, [] { return integer(-127, 127); }), alternating(m * k);
  for (int64_t i = 0; i < m * k; ++i) {
    if (i % kSub == 0) random[i] = 127;
    alternating[i] = i % 2 ? -127 : 127;
  }
  const Values activations[] = {random, Values(m * k, 127), Values(m * k, -127), alternating};
  for (const Format& format : kFormats) {
    if (format.kind == Kind::kTable) continue;  // its levels are no integers
    const auto random_code = [&] { return integer(format.low(), format.high()); };
    const std::vector<int> codes[] = {filled<int>(n * k, random_code),
                                      std::vector<int>(n * k, format.low()),
                                      std::vector<int>(n * k, format.high())};
    const Values ones(n * format.groups(k), 1), offset(n * format.groups(k), -3);
    for (const auto& q : codes) {
      const Weights w(format, n, k, q, MEMLM_F16, ones, offset);
      for (const Values& numbers : activations) {
        const Array x(MEMLM_F32, numbers);
        Values exact(m * n);  // below 2^24: f32 holds them all
        for (int64_t i = 0; i < m; ++i)
          for (int64_t r = 0; r < n; ++r)
            for (int64_t j = 0; j < k; ++j)
              exact[i * n + r] += numbers[i * k + j] * (w.product(r, j) + w.offset(r, j));
        on_every_isa([&] {
          for (Product product : products(format)) {
            if (product == Product::kAccurate) continue;
            for (int64_t rows = 1; rows <= m; ++rows) {
              const Values y = decode(MEMLM_F32, run(w, x, k, rows, {product, 1, {}, nullptr}));
              for (size_t i = 0; i < y.size(); ++i)
                if (y[i] != exact[i])
                  fail("%s: %s, m=%d: y[%d] is %.9g, should be exactly %.9g",
                       name(w, product).c_str(), describe(w).c_str(), static_cast<int>(rows),
                       static_cast<int>(i), y[i], exact[i]);
              count(name(w, product), static_cast<int64_t>(y.size()));
            }
          }
        });
      }
    }
  }
}

// What is not finite reaches its own row of y and no other.
void check_not_finite() {
  constexpr int64_t n = 20, k = 64, m = 15;
  for (const Format& format : kFormats)
    for (double value : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
      const memlm_dtype dtype = kDtypes[format.group % 3];
      const Weights w = random_weights(format, n, k, MEMLM_F16, 1);
      Values numbers = filled(m * k, normal);
      numbers[3 * k + 5] = value;
      const Array x(dtype, numbers);
      on_every_isa([&] {
        for (Product product : products(format))
          for (int64_t rows : {int64_t{4}, m}) {
            const Values y = decode(dtype, run(w, x, k, rows, {product, 2, {}, nullptr}));
            for (int64_t i = 0; i < rows * n; ++i)
              if (std::isfinite(y[i]) == (i / n == 3))  // Inf times a weight of zero is NaN
                fail("%s: %s, dtype %d: y[%d] is %g", name(w, product).c_str(), describe(w).c_str(),
                     dtype, static_cast<int>(i), y[i]);
            count(name(w, product), rows * n);
          }
      });
    }
}

// Activations too small for a scale, and denormal ones.
void check_tiny() {
  constexpr int64_t n = 18, k = 96, m = 26;
  for (const Format& format : kFormats)
    for (double size : {1e-40, 3e-37, 1e-30}) {
      const Weights w = random_weights(format, n, k, MEMLM_F32, 1);
      const Array x(MEMLM_F32, filled(m * k, [&] { return size * normal(); }));
      for (Product product : products(format))
        on_every_isa([&] {
          for (int64_t rows : {int64_t{5}, m}) {
            Expected expected = matmul(w, x, k, rows, rounding(product, on_tiles(product, rows)), {});
            // Products below the normal numbers are off by up to half of the smallest number each;
            // those of two scales, by as much times the integers; a tile unit takes denormal
            // numbers, and the parts that it cuts others into, for zero.
            const double smallest = Float(MEMLM_F32).smallest();
            const double each = product == Product::kW8A8Rows ? smallest * 127 * 128
                                : on_tiles(product, rows) ? 16 * std::ldexp(1, -126)
                                                          : smallest;
            for (double& bound : expected.bound) bound += k * each;
            check_run(w, x, k, rows, {product, 1, {}, nullptr}, expected);
          }
        });
    }
}

// Gates at which exp over- or underflows: row r of the gate picks x[r], and all of up picks x[0].
void check_gates() {
  constexpr int64_t n = 32, k = 32;
  std::vector<int> q(2 * n * k);
  for (int64_t r = 0; r < n; ++r) q[r * k + r] = 1, q[(n + r) * k] = 1;
  const Weights w({Kind::kSymmetric, 8, 0}, 2 * n, k, q, MEMLM_F32, Values(2 * n, 1), {});
  Values gates = {1, 1e4, 88, 87, 1, 1e-3, 0, -1e-3, -1, -87, -88, -1e4};
  gates.resize(k);
  const Array x(MEMLM_F32, gates);
  const Around around = {nullptr, nullptr, nullptr, true};
  const Expected expected = matmul(w, x, k, 1, Rounding::kNone, around);
  on_every_isa([&] { check_run(w, x, k, 1, {Product::kAccurate, 1, around, nullptr}, expected); });
}

// dequantize and embedding give the same rows.
// Rows of W from number `first` on.  shifted: zero is taken off in scales, after the product, as in the
// matmuls; without an FMA what is taken off rounds, too.
void check_floats(const Weights& w, int64_t first, memlm_dtype dtype, const std::vector<uint8_t>& rows,
                  bool shifted) {
  const double u = Float(MEMLM_F32).roundoff();
  const Float out(dtype);
  const Values y = decode(dtype, rows);
  for (int64_t i = 0; i < static_cast<int64_t>(y.size()); ++i) {
    const int64_t r = first + i / w.k, c = i % w.k;
    const double product = w.product(r, c), value = product + w.offset(r, c);
    // The product and the sum round once each in f32, and the result to its format.
    const double shift = shifted ? w.format.zero() * std::fabs(w.scale(r, c)) : 0;
    const double f32 = u * (std::fabs(product) + shift + std::fabs(value));
    const double bound = f32 + out.roundoff() * (std::fabs(value) + f32) + out.smallest();
    if (!(std::fabs(y[i] - value) <= bound))
      fail("dequantize, %s, dtype %d: [%d, %d] is %.9g, should be %.9g within %.3g",
           describe(w).c_str(), dtype, static_cast<int>(r), static_cast<int>(c), y[i], value, bound);
  }
  count("dequantize", static_cast<int64_t>(y.size()));
}

void check_rows() {
  int turn = 0;
  for (const Format& format : kFormats)
    for (const auto& [n, k] : kShapes) {
      const memlm_dtype dtype = kDtypes[turn % 3], scale_dtype = turn % 2 ? MEMLM_F32 : MEMLM_F16;
      ++turn;
      const Float out(dtype);
      const Weights w = random_weights(format, n, k, scale_dtype, 1);
      const memlm_packed packed = w.packed();
      const int64_t first = n / 3, rows = n - first, row_bytes = k * out.bytes;
      const std::vector<int64_t> ids = filled<int64_t>(
          9, [last = static_cast<int>(n) - 1] { return integer(0, last); });
      on_every_isa([&] {
        std::vector<uint8_t> all(rows * row_bytes, 0xff), some(ids.size() * row_bytes, 0xff);
        require(memlm_dequantize(&packed, format.bits, first, rows, dtype, all.data(), 3));
        check_floats(w, first, dtype, all, false);
        const auto number = static_cast<int64_t>(ids.size());
        require(memlm_embedding(&packed, format.bits, ids.data(), number, dtype, some.data(), 2));
        for (int64_t i = 0; i < number; ++i) {
          std::vector<uint8_t> row(row_bytes);
          require(memlm_dequantize(&packed, format.bits, ids[i], 1, dtype, row.data(), 1));
          if (std::memcmp(row.data(), &some[i * row_bytes], row_bytes) != 0)
            fail("embedding, %s, dtype %d: row %d differs from dequantize's", describe(w).c_str(),
                 dtype, static_cast<int>(ids[i]));
        }
        count("embedding", number * k);
      });
    }
}

memlm_linear linear_of(const Weights& w, Product product, const Array* bias) {
  const memlm_mode mode = product == Product::kAccurate ? MEMLM_ACCURATE
                          : product == Product::kFast   ? MEMLM_FAST
                                                        : MEMLM_W8A8;
  return {w.packed(), w.format.bits, mode, bias ? bias->data() : nullptr};
}

// The largest logits are those of the whole product, in order.
void check_topk(const Weights& w, const Array& x, const Array& bias, const Array& norm, int64_t m,
                int64_t top, Product product, const Sparse* sparse = nullptr) {
  const int64_t n = w.n, k = w.k;
  const Array x32(MEMLM_F32, x.values), bias32(MEMLM_F32, bias.values), norm32(MEMLM_F32, norm.values);
  const Call call = {product, 1, {&bias32, &norm32, nullptr, false}, nullptr, sparse};
  const Values logits = decode(MEMLM_F32, run(w, x32, k, m, call));
  memlm_linear linear = linear_of(w, product, &bias);
  if (sparse) linear.w = sparse->packed(), linear.bits = sparse->bits;
  memlm_matmul_args args{};
  args.m = m;
  args.x = x.data();
  args.x_stride = k;
  args.dtype = x.dtype;
  args.norm = norm.data();
  args.norm_eps = kEps;
  args.threads = 3;
  std::vector<float> values(m * top, NAN);
  std::vector<int64_t> indices(m * top, -1);
  require(memlm_matmul_topk(&linear, &args, top, values.data(), indices.data()));
  for (int64_t row = 0; row < m; ++row) {
    std::vector<int64_t> order(n);
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    const double* y = &logits[row * n];
    std::stable_sort(order.begin(), order.end(), [y](int64_t a, int64_t b) { return y[a] > y[b]; });
    for (int64_t i = 0; i < top; ++i)
      if (indices[row * top + i] != order[i] || values[row * top + i] != y[order[i]])
        fail("matmul_topk, %s: number %d of row %d is %d", describe(w).c_str(),
             static_cast<int>(i), static_cast<int>(row), static_cast<int>(indices[row * top + i]));
  }
  count("matmul_topk", m * top);
}

void check_topk() {
  int turn = 0;
  for (const Format& format : kFormats)
    for (const auto& [n, k] : {std::pair<int64_t, int64_t>{1, 1}, {17, 33}, {300, 96}}) {
      const Weights w = random_weights(format, n, k, turn++ % 2 ? MEMLM_F32 : MEMLM_F16, 1);
      const int64_t m = turn % 3 ? 1 : 7, top = std::min<int64_t>(n, 150);
      const Array x(kDtypes[turn % 3], filled(m * k, normal)), bias(x.dtype, filled(n, normal));
      const Array norm(x.dtype, filled(k, [] { return uniform(0.5, 1.5); }));
      for (Product product : products(format))
        if (product != Product::kW8A8Groups)
          on_every_isa([&] { check_topk(w, x, bias, norm, m, top, product); });
    }
}

// The gradients of a block-sparse product, which are sums over n and over m.
void check_sparse_gradients(const Sparse& s) {
  constexpr int64_t m = 9;
  const Weights& w = s.dense;
  const int64_t n = w.n, k = w.k, runs = round_up(k, kSub) / kSub;
  const double u = Float(MEMLM_F32).roundoff();
  const std::vector<float> grad = filled<float>(m * n, normal), x = filled<float>(m * k, normal);
  // A sum of products of pairs(i), i below terms, and its bound.
  const auto add = [u](Expected& to, int64_t terms, const auto& pair) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < terms; ++i) {
      const auto [a, b] = pair(i);
      sum += a * b, size += std::fabs(a * b);
    }
    to.y.push_back(sum);
    to.bound.push_back((4 + 5 * std::sqrt(static_cast<double>(terms))) * u * size);
  };
  Expected to_x, to_values;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t c = 0; c < k; ++c)  // both parts of a weight: they may cancel
      add(to_x, 2 * n, [&](int64_t r) {
        const double part = r % 2 ? w.offset(r / 2, c) : w.product(r / 2, c);
        return std::pair<double, double>(grad[i * n + r / 2], part);
      });
  for (int64_t t = 0; t * kTile < n; ++t)
    for (int64_t b = s.starts[t]; b < s.starts[t + 1]; ++b) {
      int32_t run = 0;
      std::memcpy(&run, &s.places[4 * b], 4);
      if (run >= runs) fail("block_sparse_grad_values: a place that is none");
      for (int64_t c = run * kSub; c < (run + 1) * kSub; ++c)
        for (int64_t r = t * kTile; r < (t + 1) * kTile; ++r)
          add(to_values, c < k && r < n ? m : 0, [&](int64_t i) {
            return std::pair<double, double>(grad[i * n + r], x[i * k + c]);
          });
    }
  const auto compare = [&](const char* operation, const std::vector<float>& got, const Expected& wanted) {
    for (size_t i = 0; i < got.size(); ++i)
      if (!(std::fabs(got[i] - wanted.y[i]) <= wanted.bound[i]))
        fail("%s: %s, %d-bit values: number %d is %.9g, should be %.9g within %.3g", operation,
             describe(w).c_str(), s.bits, static_cast<int>(i), got[i], wanted.y[i], wanted.bound[i]);
    count(operation, static_cast<int64_t>(got.size()));
  };
  on_every_isa([&] {
    const memlm_packed packed = s.packed();
    std::vector<float> mine(m * k, NAN), values(to_values.y.size(), NAN);
    require(memlm_block_sparse_grad_x(&packed, s.bits, m, grad.data(), mine.data(), 2));
    compare("block_sparse_grad_x", mine, to_x);
    if (s.bits != 32) return;
    require(memlm_block_sparse_grad_values(&packed, m, grad.data(), x.data(), values.data(), 2));
    compare("block_sparse_grad_values", values, to_values);
  });
}

// Every pattern and type of values; of blocks and of weights some are kept, none, or all.
void check_sparse() {
  struct Case {
    memlm_pattern pattern;
    Format format;
    int bits;
  };
  const Format floats = {Kind::kSymmetric, 8, 32};
  const Case cases[] = {
      {MEMLM_BLOCKS, {Kind::kSymmetric, 2, 32}, 2},  {MEMLM_BLOCKS, {Kind::kAsymmetric, 4, 32}, 4},
      {MEMLM_BLOCKS, {Kind::kTable, 4, 32}, 4},      {MEMLM_BLOCKS, {Kind::kSymmetric, 8, 32}, 8},
      {MEMLM_BLOCKS, floats, 16},                    {MEMLM_BLOCKS, floats, 32},
      {MEMLM_TWO_OF_FOUR, {Kind::kSymmetric, 4, 32}, 4}, {MEMLM_TWO_OF_FOUR, {Kind::kTable, 4, 64}, 4},
      {MEMLM_UNSTRUCTURED, {Kind::kSymmetric, 4, 128}, 4}, {MEMLM_UNSTRUCTURED, {Kind::kTable, 4, 32}, 4}};
  int turn = 0;
  for (const Case& c : cases)
    for (const auto& [n, k, share] : {std::tuple<int64_t, int64_t, double>{1, 1, 1.0}, {17, 33, 0.0},
                                      {64, 300, 0.5}, {130, 129, 0.2}, {40, 1111, 0.5}}) {
      const memlm_dtype dtype = kDtypes[turn % 3], scale_dtype = turn % 2 ? MEMLM_F32 : MEMLM_F16;
      Weights full = random_weights(c.format, n, k, scale_dtype, 1);
      if (c.bits > 8) {  // scales that keep all numbers exact in bf16
        const Values ones(n * c.format.groups(k), 1.0 / 64);
        full = Weights(c.format, n, k, filled<int>(n * k, [] { return integer(-127, 127); }), MEMLM_F32,
                       ones, {});
      }
      std::vector<double> chance = filled(round_up(n, kTile) * round_up(k, 128),
                                          [] { return uniform(0, 1); });
      const int64_t stride = round_up(k, 128);
      const Kept kept = [&, share = share](int64_t row, int64_t at) {
        if (c.pattern != MEMLM_TWO_OF_FOUR) return chance[row * stride + at] < share;
        const double* four = &chance[row * stride + at / 4 * 4];
        return share > 0 && std::count_if(four, four + 4, [&](double x) { return x < four[at % 4]; }) < 2;
      };
      const Sparse sparse = c.pattern == MEMLM_BLOCKS ? blocks(full, c.bits, kept)
                                                       : compressed(full, c.pattern, kept);
      const Weights& w = sparse.dense;
      constexpr int64_t kMost = 14;
      const Array x(dtype, filled(kMost * k, normal)), bias(dtype, filled(n, normal));
      const Array norm(dtype, filled(k, [] { return uniform(0.5, 1.5); }));
      const Array residual(dtype, filled(kMost * n, normal));
      const bool swiglu = n % (2 * kTile) == 0;
      const Around around = {&bias, turn % 2 ? &norm : nullptr, turn % 3 ? &residual : nullptr, swiglu};
      for (Product product : {Product::kAccurate, Product::kFast}) {
        if (c.bits > 8 && product == Product::kFast) continue;
        const auto expect = [&](bool tiles) {
          return matmul(w, x, k, kMost, rounding(product, tiles), around);
        };
        const Expected plain = expect(false), on_tile_unit = expect(true);
        const Call call = {product, 1, around, nullptr, &sparse};
        on_every_isa([&] {
          for (int64_t m : {1, 5, 8, 14}) {
            const bool tiles = c.pattern != MEMLM_BLOCKS && on_tiles(product, m);
            check_run(w, x, k, m, call, tiles ? on_tile_unit : plain);
          }
          Call threads = call;
          threads.threads = 3;
          if (run(w, x, k, kMost, threads) != run(w, x, k, kMost, call))
            fail("%s: %s: threads give other bits", name(w, call).c_str(), describe(w).c_str());
          check_topk(w, x, bias, norm, 2, std::min<int64_t>(n, 100), product, &sparse);
        });
      }
      on_every_isa([&] {
        const memlm_packed packed = sparse.packed();
        const int64_t first = n / 3;
        std::vector<uint8_t> rows((n - first) * k * Float(dtype).bytes, 0xff);
        require(memlm_dequantize(&packed, c.bits, first, n - first, dtype, rows.data(), 3));
        check_floats(w, first, dtype, rows, true);
      });
      if (c.pattern == MEMLM_BLOCKS) check_sparse_gradients(sparse);
      ++turn;
    }
}

// A layer is its operations one after the other, with queries and keys normalised and turned as the
// papers have it, in double precision.  All of it in f32: what differs is how those two are rounded.
struct LayerCase {
  int64_t hidden, heads, kv_heads, dim, width;
  bool normed;
};

void check_layer(const LayerCase& c, const std::vector<int64_t>& lengths) {
  const int64_t q_width = c.heads * c.dim, kv_width = c.kv_heads * c.dim, stride = q_width + 2 * kv_width;
  const int64_t half = c.dim / 2, count_ = static_cast<int64_t>(lengths.size()), most = 80;
  const Format format = {Kind::kSymmetric, 4, 32};
  const Weights qkv = random_weights(format, stride, c.hidden, MEMLM_F32, 0.2);
  const Weights o = random_weights(format, c.hidden, q_width, MEMLM_F32, 0.2);
  const Weights gate_up = random_weights(format, 2 * c.width, c.hidden, MEMLM_F32, 0.2);
  const Weights down = random_weights(format, c.hidden, c.width, MEMLM_F32, 0.2);
  const auto norm_of = [](int64_t n) {
    return Array(MEMLM_F32, filled(n, [] { return uniform(0.5, 1.5); }));
  };
  const Array input_norm = norm_of(c.hidden), post_norm = norm_of(c.hidden);
  const Array q_norm = norm_of(c.dim), k_norm = norm_of(c.dim);
  const Array cosines(MEMLM_F32, filled(most * half, [] { return uniform(-1, 1); }));
  const Array sines(MEMLM_F32, filled(most * half, [] { return uniform(-1, 1); }));
  std::vector<int64_t> rows = {0}, positions;
  for (int64_t length : lengths) {
    rows.push_back(rows.back() + length);
    for (int64_t i = 0; i < length; ++i) positions.push_back(i);
  }
  const int64_t m = rows.back(), blocks = 2 * count_;
  std::vector<int32_t> tables;
  for (int64_t i = 0; i < blocks; ++i) tables.push_back(static_cast<int32_t>(blocks - 1 - i));
  const memlm_sequences sequences = {count_, rows.data(), lengths.data(), tables.data(), 2, nullptr};
  const Array x(MEMLM_F32, filled(m * c.hidden, normal));

  on_every_isa([&] {
    std::vector<float> stored(c.kv_heads * blocks * memlm_kv_block_bytes(MEMLM_KV_F32, 64, c.dim) / 4, 0);
    const memlm_kv_pool pool = {stored.data(), blocks, 64, c.kv_heads, c.dim, MEMLM_KV_F32, nullptr, 0};
    const auto copy_x = [&] { return std::vector<float>(x.values.begin(), x.values.end()); };

    std::vector<float> y = copy_x(), projected(m * stride), attended(m * q_width), gated(m * c.width);
    const auto multiply = [&](const Weights& w, const void* from, int64_t from_stride, float* to,
                              int64_t to_stride, const Array* norm, bool swiglu, bool add) {
      memlm_matmul_args args{};
      args.m = m;
      args.x = from;
      args.x_stride = from_stride;
      args.y = to;
      args.y_stride = to_stride;
      args.threads = 1;
      if (norm) args.norm = norm->data(), args.norm_eps = kEps;
      args.swiglu = swiglu;
      if (add) args.residual = to, args.residual_stride = to_stride;
      const memlm_packed packed = w.packed();
      require(memlm_w4_matmul(&packed, &args));
    };
    multiply(qkv, y.data(), c.hidden, projected.data(), stride, &input_norm, false, false);
    for (int64_t row = 0; row < m; ++row)
      for (int64_t head = 0; head < c.heads + c.kv_heads; ++head) {
        float* v = &projected[row * stride + head * c.dim];
        const Array& weights = head < c.heads ? q_norm : k_norm;
        Values values(v, v + c.dim);
        double squares = 0;
        for (double value : values) squares += value * value;
        for (int64_t i = 0; c.normed && i < c.dim; ++i)
          values[i] *= weights.values[i] / std::sqrt(squares / static_cast<double>(c.dim) + kEps);
        for (int64_t i = 0; i < half; ++i) {
          const double cosine = cosines.values[positions[row] * half + i];
          const double sine = sines.values[positions[row] * half + i];
          v[i] = static_cast<float>(values[i] * cosine - values[i + half] * sine);
          v[i + half] = static_cast<float>(values[i + half] * cosine + values[i] * sine);
        }
      }
    require(memlm_kv_append(&pool, &sequences, &projected[q_width], &projected[q_width + kv_width], stride,
                            MEMLM_F32, 1));
    memlm_paged_attention_args attend{};
    attend.q = projected.data();
    attend.q_stride = stride;
    attend.out = attended.data();
    attend.out_stride = q_width;
    attend.heads = c.heads;
    attend.scale = 1 / std::sqrt(static_cast<float>(c.dim));
    attend.window = 3;
    attend.threads = 1;
    require(memlm_paged_attention(&pool, &sequences, &attend));
    multiply(o, attended.data(), q_width, y.data(), c.hidden, nullptr, false, true);
    multiply(gate_up, y.data(), c.hidden, gated.data(), c.width, &post_norm, true, false);
    multiply(down, gated.data(), c.width, y.data(), c.hidden, nullptr, false, true);

    const auto linear = [](const Weights& w) { return linear_of(w, Product::kAccurate, nullptr); };
    const memlm_decoder_layer layer = {input_norm.data(), post_norm.data(),
                                       c.normed ? q_norm.data() : nullptr,
                                       c.normed ? k_norm.data() : nullptr,
                                       kEps, linear(qkv), linear(o), linear(gate_up), linear(down), 3};
    memlm_decoder_args args{};
    args.hidden = c.hidden;
    args.heads = c.heads;
    args.x_stride = c.hidden;
    args.cos = static_cast<const float*>(cosines.data());
    args.sin = static_cast<const float*>(sines.data());
    args.angles = most;
    args.angle_stride = half;
    args.positions = positions.data();
    for (int threads : {1, 3}) {
      std::vector<float> mine = copy_x();
      std::fill(stored.begin(), stored.end(), NAN);
      args.x = mine.data();
      args.threads = threads;
      require(memlm_decoder_layers(&layer, 1, &pool, &sequences, &args));
      // Queries and keys differ by some units in the last place of numbers of order 1, of which sums
      // of `dim` make scores; scores' differences pass through products with weights of order 0.1.
      for (int64_t i = 0; i < m * c.hidden; ++i)
        if (!(std::fabs(mine[i] - y[i]) <= 2e-5 * (1 + std::fabs(y[i]))))
          fail("decoder_layers on %s: x[%d] is %.9g, should be %.9g", memlm_isa(), static_cast<int>(i),
               mine[i], y[i]);
      count("decoder_layers", m * c.hidden);
    }
  });
}

void check_layers() {
  for (const bool normed : {false, true})
    for (const LayerCase& c : {LayerCase{48, 4, 2, 24, 32, normed}, LayerCase{70, 3, 3, 80, 48, normed}}) {
      check_layer(c, {1});
      check_layer(c, {7, 1, 66});
    }
}

memlm_quantize_args quantize_args(const Weights& like, bool ternary, const Array& w, int64_t stride) {
  memlm_quantize_args args{};
  args.n = like.n;
  args.k = like.k;
  args.w = w.data();
  args.w_stride = stride;
  args.dtype = w.dtype;
  args.bits = like.format.bits;
  args.ternary = ternary;
  args.group = like.format.group;
  args.levels = like.format.kind == Kind::kTable ? memlm_nf4_levels : nullptr;
  args.scale_dtype = like.scales.dtype;
  return args;
}

// Rounds w as `expected` is, and compares all that is written, padding included, bit for bit.
void check_quantized(const Weights& expected, bool ternary, const Array& w, int64_t stride) {
  const int64_t element = Float(expected.scales.dtype).bytes;
  for (int threads : {1, 3}) {
    std::vector<uint8_t> codes(expected.codes.size(), 0xff);
    std::vector<uint8_t> scales(expected.scales.bytes.size(), 0xff);
    std::vector<uint8_t> offsets(expected.offsets.bytes.size(), 0xff);
    memlm_quantize_args args = quantize_args(expected, ternary, w, stride);
    args.codes = codes.data() + 1;
    args.scales = scales.data() + element;
    args.offsets = expected.format.offsets() ? offsets.data() + element : nullptr;
    args.threads = threads;
    require(memlm_quantize_weight(&args));
    const auto same = [](const auto& a, const auto& b, int64_t from) {
      return std::equal(a.begin() + from, a.end(), b.begin() + from, b.end());
    };
    if (!same(codes, expected.codes, 1) || !same(scales, expected.scales.bytes, element) ||
        !same(offsets, expected.offsets.bytes, element))
      fail("quantize_weight: %s, dtype %d: other bits", describe(expected).c_str(), w.dtype);
  }
  count("quantize_weight", expected.n * expected.k);
}

// Weights of all kinds, in every format and size.
void check_quantize_weight() {
  int turn = 0;
  std::vector<std::pair<Format, bool>> formats;  // and whether ternary
  for (const Format& format : kFormats) formats.emplace_back(format, false);
  formats.emplace_back(Format{Kind::kSymmetric, 2, 64}, true);
  for (const auto& [format, ternary] : formats)
    for (const auto& [n, k] : kShapes) {
      const memlm_dtype dtype = kDtypes[turn % 3], scale_dtype = turn % 2 ? MEMLM_F32 : MEMLM_F16;
      const bool wide = scale_dtype == MEMLM_F32 && dtype != MEMLM_F16;
      const double size = wide ? std::pow(10, turn % 76 - 39) : 0.1;
      const int64_t stride = k + turn % 3;
      ++turn;
      Values numbers(n * stride, NAN);  // between rows
      for (int64_t r = 0; r < n; ++r)
        for (int64_t c = 0; c < k; ++c) {
          const double kinds[] = {size * normal(), c % 50 < 40 ? -0.0 : 0.0,
                                  size * static_cast<double>(1 + c / 32),  // constants
                                  size * integer(-9, 9) / 4};              // ties
          numbers[r * stride + c] = c == k / 2 && r % 8 == 0 ? 20 * size : kinds[r % 4];
        }
      const Array w(dtype, numbers);
      const Weights expected = quantized(format, ternary, scale_dtype, n, k, w, stride);
      on_every_isa([&, ternary = ternary] { check_quantized(expected, ternary, w, stride); });
    }
}

// What memlm_quantize_weight refuses, by the argument that it names.
void check_refusals() {
  const Array w(MEMLM_F32, Values(20 * 40, 1));
  const Weights like = quantized({Kind::kTable, 4, 32}, false, MEMLM_F16, 20, 40, w, 40);
  std::vector<uint8_t> untouched(4096, 0xff), memory = untouched;
  float levels[16] = {};
  memlm_quantize_args good = quantize_args(like, false, w, 40);
  good.codes = good.scales = memory.data();
  good.threads = 1;
  const auto refuse = [&](const char* name, const auto& change) {
    memlm_quantize_args args = good;
    change(args);
    const std::string start = std::string(name) + ":";
    const bool refused = memlm_quantize_weight(&args) == MEMLM_INVALID;
    if (!refused || std::string(memlm_last_error()).compare(0, start.size(), start))
      fail("quantize_weight: %s: got %s", name, memlm_last_error());
  };
  using Args = memlm_quantize_args;
  refuse("n", [](Args& a) { a.n = 0; });
  refuse("k", [](Args& a) { a.k = int64_t{1} << 31; });
  refuse("w", [](Args& a) { a.w = nullptr; });
  refuse("w_stride", [](Args& a) { a.w_stride = 39; });
  refuse("dtype", [](Args& a) { a.dtype = static_cast<memlm_dtype>(3); });
  refuse("bits", [](Args& a) { a.bits = 3; });
  refuse("group", [](Args& a) { a.group = 0; });
  refuse("codes", [](Args& a) { a.codes = nullptr; });
  refuse("scales", [](Args& a) { a.scales = nullptr; });
  refuse("scale_dtype", [](Args& a) { a.scale_dtype = MEMLM_BF16; });
  refuse("levels", [&](Args& a) { a.levels = levels; });
  refuse("levels", [&](Args& a) { a.offsets = memory.data(); });
  refuse("ternary", [](Args& a) { a.ternary = 1; });
  refuse("threads", [](Args& a) { a.threads = 0; });
  if (memlm_quantize_weight(nullptr) != MEMLM_INVALID) fail("quantize_weight: NULL");
  if (memory != untouched) fail("quantize_weight: wrote before it refused");
}

// The largest magnitude is found wherever it stands.
void check_largest_magnitude() {
  for (memlm_dtype dtype : kDtypes)
    for (const auto& [n, k] : kShapes) {
      const int64_t stride = k + 1;
      Values numbers(n * stride, INFINITY);  // between rows
      for (int64_t i = 0; i < n * k; ++i) numbers[i / k * stride + i % k] = uniform(-1, 1);
      const int64_t at = integer(0, static_cast<int>(n * k) - 1);
      for (double value : {-2.0, 3.0, static_cast<double>(INFINITY), static_cast<double>(NAN)}) {
        numbers[at / k * stride + at % k] = value;
        const Array w(dtype, numbers);
        const memlm_status wanted = std::isfinite(value) ? MEMLM_OK : MEMLM_INVALID;
        on_every_isa([&, n = n, k = k] {
          float largest = -1;
          const memlm_status status =
              memlm_largest_magnitude(n, k, w.data(), stride, dtype, &largest, 3);
          if (status != wanted || (status == MEMLM_OK && largest != std::fabs(value)))
            fail("largest_magnitude: %s, dtype %d: status %d, got %g, should be %g", memlm_isa(),
                 dtype, status, largest, value);
          count("largest_magnitude", n * k);
        });
      }
    }
}

void check_values(const char* operation, const char* what, const AttentionCase& c, const Values& got,
                  const Bounded& wanted) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double value = wanted.value[i];
    if (!(got[i] == value || std::fabs(got[i] - value) <= wanted.bound[i]))
      fail("%s: %s, %dx%dx%d heads of %d, %d keys, dtype %d: %s[%d] is %.9g, should be %.9g within %.3g",
           operation, memlm_isa(), static_cast<int>(c.batch), static_cast<int>(c.heads),
           static_cast<int>(c.q_len), static_cast<int>(c.dim), static_cast<int>(c.k_len), c.dtype, what,
           static_cast<int>(i), got[i], value, wanted.bound[i]);
    telling += std::fabs(value) > wanted.bound[i];
    bounded += value != 0;  // as of what no query sees
  }
  count(operation, static_cast<int64_t>(got.size()));
}

// Attention of random numbers, forward and backward, on every instruction set.
void check_attention_case(const AttentionCase& c) {
  const auto random = [&](int64_t numbers) { return Array(c.dtype, filled(numbers, normal)); };
  const Array q = random(c.q_rows() * c.dim), k = random(c.k_rows() * c.dim);
  const Array v = random(c.k_rows() * c.v_dim), grad = random(c.q_rows() * c.v_dim);
  const bool is_bool = c.mask == 1;
  const Array mask(c.dtype, filled(c.batch * c.q_len * c.k_len, [&] {
                     return integer(0, 4) == 0 ? (is_bool ? 0 : -INFINITY) : is_bool ? 1 : normal();
                   }));
  const std::vector<uint8_t> seen(mask.values.begin(), is_bool ? mask.values.end() : mask.values.begin());
  const Array slopes(MEMLM_F32, filled(c.heads, [] { return uniform(0, 0.5); }));
  const Array sinks(MEMLM_F32, filled(c.heads, normal));
  const AttentionResults wanted = reference::attention(c, q.values, k.values, v.values, mask.values,
                                                       slopes.values, sinks.values, grad.values);
  const int64_t size = Float(c.dtype).bytes;

  memlm_attention_args args{};
  args.batch = c.batch, args.heads = c.heads, args.kv_heads = c.kv_heads;
  args.q_len = c.q_len, args.k_len = c.k_len, args.head_dim = c.dim, args.v_dim = c.v_dim;
  args.q = q.data(), args.k = k.data(), args.v = v.data();
  const auto dense = [](int64_t* strides, int64_t heads, int64_t rows, int64_t columns) {
    strides[0] = heads * rows * columns, strides[1] = rows * columns, strides[2] = columns;
  };
  dense(args.q_strides, c.heads, c.q_len, c.dim);
  dense(args.k_strides, c.kv_heads, c.k_len, c.dim);
  dense(args.v_strides, c.kv_heads, c.k_len, c.v_dim);
  dense(args.out_strides, c.heads, c.q_len, c.v_dim);
  args.dtype = c.dtype, args.scale = c.scale, args.left = c.left, args.right = c.right;
  args.to_end = c.to_end, args.softcap = c.softcap, args.dropout = c.dropout, args.seed = c.seed;
  if (c.mask) args.mask = is_bool ? seen.data() : mask.data();
  args.mask_is_bool = is_bool;
  args.mask_strides[0] = c.q_len * c.k_len, args.mask_strides[2] = c.k_len, args.mask_strides[3] = 1;
  if (c.slopes) args.slopes = static_cast<const float*>(slopes.data());
  if (c.sinks) args.sinks = static_cast<const float*>(sinks.data());
  std::vector<uint8_t> shown;  // block by block
  if (c.mask_block) {
    const int64_t size = c.mask_block;
    const int64_t rows = (c.q_len + size - 1) / size, columns = (c.k_len + size - 1) / size;
    for (int64_t h = 0; h < c.heads; ++h)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) shown.push_back(!c.hidden(h, i * size, j * size));
    args.block_mask = shown.data();
    args.mask_block = size;
    args.block_mask_strides[1] = rows * columns, args.block_mask_strides[2] = columns;
    args.block_mask_strides[3] = 1;
  }

  on_every_isa([&] {
    std::vector<std::vector<uint8_t>> first;
    for (int threads : {1, 3}) {
      args.threads = threads;
      const int64_t sizes[] = {c.q_rows() * c.v_dim * size, c.q_rows() * 4, c.q_rows() * c.dim * size,
                               c.k_rows() * c.dim * size, c.k_rows() * c.v_dim * size,
                               c.q_rows() * c.k_len * 4, c.heads * 4};
      std::vector<std::vector<uint8_t>> results;
      for (int64_t bytes : sizes) results.emplace_back(bytes, 0xff);
      args.out = results[0].data();
      args.lse = reinterpret_cast<float*>(results[1].data());
      require(memlm_attention(&args));
      memlm_attention_grads grads{};
      grads.grad_out = grad.data();
      grads.grad_q = results[2].data(), grads.grad_k = results[3].data(), grads.grad_v = results[4].data();
      dense(grads.grad_out_strides, c.heads, c.q_len, c.v_dim);
      dense(grads.grad_q_strides, c.heads, c.q_len, c.dim);
      dense(grads.grad_k_strides, c.kv_heads, c.k_len, c.dim);
      dense(grads.grad_v_strides, c.kv_heads, c.k_len, c.v_dim);
      grads.grad_mask = reinterpret_cast<float*>(results[5].data());
      if (c.sinks) grads.grad_sinks = reinterpret_cast<float*>(results[6].data());
      require(memlm_attention_backward(&args, &grads));
      if (threads > 1) {
        if (results != first) fail("attention: %s: 3 threads give other bits than one", memlm_isa());
        return;
      }
      first = results;
      const char* const backward = "attention_backward";
      check_values("attention", "out", c, decode(c.dtype, results[0]), wanted.out);
      check_values("attention", "lse", c, decode(MEMLM_F32, results[1]), wanted.lse);
      check_values(backward, "grad_q", c, decode(c.dtype, results[2]), wanted.q);
      check_values(backward, "grad_k", c, decode(c.dtype, results[3]), wanted.k);
      check_values(backward, "grad_v", c, decode(c.dtype, results[4]), wanted.v);
      check_values(backward, "grad_mask", c, decode(MEMLM_F32, results[5]), wanted.mask);
      if (c.sinks) check_values(backward, "grad_sinks", c, decode(MEMLM_F32, results[6]), wanted.sinks);
    }
  });
}

void check_attention() {
  const memlm_dtype f32 = MEMLM_F32, f16 = MEMLM_F16, bf16 = MEMLM_BF16;
  const AttentionCase cases[] = {
      // batch, heads, kv, q, k, dim, v_dim, dtype, scale, left, right, end, cap, mask, slopes, sinks, drop
      {2, 2, 2, 13, 29, 32, 32, f32, 0.2f, -1, -1, 0, 0, 0, false, false, 0, 0},
      {1, 4, 2, 30, 50, 40, 24, bf16, 0.2f, -1, 0, 1, 0, 0, false, false, 0, 0},
      {1, 3, 1, 40, 150, 16, 7, f16, 0.3f, 20, 5, 0, 0, 0, true, false, 0, 0},
      {2, 2, 1, 9, 33, 5, 16, f32, 1, -1, -1, 0, 1.5f, 2, false, true, 0, 0},
      {1, 2, 2, 17, 17, 80, 72, f32, 0.1f, -1, 0, 0, 0, 1, false, false, 0.3f, 0x123456789abull},
      {2, 2, 1, 12, 40, 24, 24, bf16, -0.5f, 8, 3, 1, 2, 2, true, true, 0.2f, 7},
      {1, 1, 1, 210, 131, 8, 8, f32, 0.4f, -1, 0, 1, 0, 0, false, false, 0, 0},  // rows before all keys
      {1, 6, 2, 1, 300, 16, 16, f32, 0.3f, -1, 0, 1, 0, 0, false, true, 0, 0},
      {1, 2, 2, 3, 1, 1, 1, f16, 1, -1, -1, 0, 0, 0, false, false, 0, 0},
      {2, 4, 2, 70, 100, 16, 24, f32, 0.3f, -1, 0, 1, 0, 0, false, false, 0, 0, 32},
      {1, 2, 1, 5, 200, 16, 16, bf16, 0.3f, -1, -1, 0, 2, 2, true, true, 0.2f, 7, 64},
  };
  for (const AttentionCase& c : cases) check_attention_case(c);
}

struct PagedCase {
  memlm_kv_type type;
  int64_t tokens, dim, kv_heads, group;
  memlm_dtype dtype;
  int64_t window;
  float softcap;
  bool slopes, sinks;
  std::vector<int64_t> lengths, news;
};

// Sequences stored at once, byte by byte, and their last tokens' attention.
void check_paged_case(const PagedCase& c) {
  const KvFormat f = {c.type, c.tokens, c.dim};
  const int64_t count_ = static_cast<int64_t>(c.lengths.size()), heads = c.kv_heads * c.group;
  const int64_t width = f.width(), key_width = f.key_width(), kv_width = c.kv_heads * c.dim;
  std::vector<int64_t> all = {0}, rows = {0};
  int64_t most = 0, blocks = 1;
  for (int64_t i = 0; i < count_; ++i) {
    all.push_back(all.back() + c.lengths[i]);
    rows.push_back(rows.back() + c.news[i]);
    most = std::max(most, (c.lengths[i] + c.tokens - 1) / c.tokens);
    blocks += (c.lengths[i] + c.tokens - 1) / c.tokens;
  }
  std::vector<int32_t> tables(count_ * most, -1), tail_of;
  int32_t block = 0;
  for (int64_t i = 0; i < count_; ++i) {
    for (int64_t j = 0; j * c.tokens < c.lengths[i]; ++j) tables[i * most + j] = ++block;
    tail_of.push_back(static_cast<int32_t>(count_ - 1 - i));
  }
  const Array k(c.dtype, filled(all.back() * kv_width, normal));
  const Array v(c.dtype, filled(all.back() * kv_width, normal));
  const Array q(c.dtype, filled(rows.back() * heads * c.dim, normal));
  const Array slopes(MEMLM_F32, filled(heads, [] { return uniform(0, 0.3); }));
  const Array sinks(MEMLM_F32, filled(heads, normal));
  const float scale = 1 / std::sqrt(static_cast<float>(c.dim));

  const int64_t tail_bytes = f.tails() ? f.tail().bytes() : 0;
  const std::vector<uint8_t> unwritten(c.kv_heads * blocks * f.bytes(), 0xff);
  const std::vector<uint8_t> no_tails(c.kv_heads * count_ * tail_bytes, 0xff);
  std::vector<uint8_t> stored = unwritten, tails = no_tails;
  Bounded wanted(rows.back() * heads * c.dim);
  for (int64_t i = 0; i < count_; ++i) {
    const int64_t length = c.lengths[i], n = c.news[i], wide = key_width * (f.tails() ? 2 : 1);
    const int64_t newest = f.tails() ? (length - 1) / c.tokens * c.tokens : length;
    // Of each head: what attention finds, and steps and codes of values apart.
    Values keys(c.kv_heads * length * wide), values(c.kv_heads * length * width), parts = values;
    for (int64_t h = 0; h < c.kv_heads; ++h)
      for (int64_t t = 0; t < length; ++t) {
        const int64_t from = (all[i] + t) * kv_width + h * c.dim, at = h * length + t;
        uint8_t* to = &stored[(h * blocks + tables[i * most + t / c.tokens]) * f.bytes()];
        Values key = store(f, to, false, t % c.tokens, &k.values[from]);
        Values value = store(f, to, true, t % c.tokens, &v.values[from]);
        std::copy(value.begin(), value.end(), &parts[at * width]);
        if (f.tails()) {
          to = &tails[(h * count_ + tail_of[i]) * tail_bytes];
          Values unrounded[2];
          for (bool is_value : {false, true}) {
            std::vector<float> x(width);
            for (int64_t d = 0; d < c.dim; ++d)
              x[d] = static_cast<float>((is_value ? v : k).values[from + d]);
            hadamard(x.data(), width);
            const Values numbers(x.begin(), x.end());
            unrounded[is_value] = store(f.tail(), to, is_value, t % c.tokens, numbers.data());
          }
          if (t >= newest) key = unrounded[0], value = unrounded[1];
        }
        std::copy(key.begin(), key.end(), &keys[at * wide + (t >= newest ? key_width : 0)]);
        std::copy(value.begin(), value.end(), &values[at * width]);
      }
    if (n == 0) continue;
    Values queries(heads * n * wide);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < n; ++r) {
        const Query query(f, &q.values[((rows[i] + r) * heads + h) * c.dim], scale);
        double* const to = &queries[(h * n + r) * wide];
        std::copy(query.rounded.begin(), query.rounded.end(), to);
        if (f.tails()) std::copy(query.exact.begin(), query.exact.end(), to + key_width);
      }
    AttentionCase dense = {1, heads, c.kv_heads, n, length, wide, width, MEMLM_F32, 1,
                           c.window ? c.window - 1 : -1, 0, 1, c.softcap, 0, c.slopes, c.sinks, 0, 0};
    const auto attend = [&](const Values& of) {
      return reference::attention(dense, queries, keys, of, {}, slopes.values, sinks.values,
                                  Values(heads * n * dense.v_dim)).out;
    };
    Bounded out = attend(values);
    // The weights themselves.
    dense.v_dim = length;
    Values each(c.kv_heads * length * length);
    for (int64_t t = 0; t < c.kv_heads * length; ++t) each[t * length + t % length] = 1;
    const Values p = f.quantized() ? attend(each).value : Values();
    const int64_t size = f.quantized() ? width & -width : 1;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row = h * n + r;
        double* const y = &out.value[row * width];
        double* const off = &out.bound[row * width];
        Values variance(width);
        for (int64_t g = 0; f.quantized() && g < f.groups(); ++g)
          for (int64_t start = 0; start < newest; start += c.tokens) {
            // Weights times the values' scales are rounded to 1/127 of the largest of a block.
            const int64_t end = std::min(start + c.tokens, newest), kv = h / c.group;
            std::vector<float> scales;
            double largest = 0;
            for (int64_t t = start; t < end; ++t) {
              const uint8_t* at = &stored[(kv * blocks + tables[i * most + t / c.tokens]) * f.bytes()];
              uint32_t half = 0;
              std::memcpy(&half, at + f.value_scales() + 2 * (g * c.tokens + t % c.tokens), 2);
              scales.push_back(static_cast<float>(std::fabs(Float(MEMLM_F16).decode(half))));
              largest = std::max(largest, p[row * length + t] * scales.back());
            }
            for (int64_t t = start; t < end; ++t) {
              if (scales[t - start] == 0) continue;
              std::vector<float> codes(width);
              for (int64_t d = g * f.group(); d < (g + 1) * f.group(); ++d)
                codes[d] = static_cast<float>(parts[(kv * length + t) * width + d] / scales[t - start]);
              hadamard(codes.data(), width);
              for (int64_t d = 0; d < width; ++d)
                variance[d] += largest / 127 * largest / 127 / 12 * codes[d] * codes[d];
            }
          }
        if (f.quantized()) {
          std::vector<float> turned(y, y + width);
          hadamard(turned.data(), width);
          for (int64_t piece = 0; piece < width; piece += size) {
            double sum = 0;
            for (int64_t d = piece; d < piece + size; ++d)
              sum += off[d] + 16 * Float(MEMLM_F32).roundoff() * std::fabs(y[d]);
            std::fill(off + piece, off + piece + size, sum / std::sqrt(static_cast<double>(size)));
          }
          std::copy(turned.begin(), turned.end(), y);
        }
        const Float result(c.dtype);
        for (int64_t d = 0; d < c.dim; ++d) {
          const double bound = off[d] + 7 * std::sqrt(variance[d]);
          wanted.add(((rows[i] + r) * heads + h) * c.dim + d, y[d],
                     bound + result.roundoff() * (std::fabs(y[d]) + bound) + result.smallest());
        }
      }
  }

  on_every_isa([&] {
    for (int threads : {1, 3}) {
      std::vector<uint8_t> mine = unwritten, my_tails = no_tails;
      const memlm_kv_pool pool = {mine.data(), blocks, c.tokens, c.kv_heads, c.dim, c.type,
                                  f.tails() ? my_tails.data() : nullptr, f.tails() ? count_ : 0};
      memlm_sequences sequences = {count_, all.data(), c.lengths.data(), tables.data(), most,
                                   tail_of.data()};
      require(memlm_kv_append(&pool, &sequences, k.data(), v.data(), kv_width, c.dtype, threads));
      if (mine != stored || my_tails != tails)
        fail("kv_append on %s: type %d, heads of %d, dtype %d: other bytes", memlm_isa(), c.type,
             static_cast<int>(c.dim), c.dtype);
      count("kv_append", all.back() * kv_width);
      sequences.rows = rows.data();
      std::vector<uint8_t> y(rows.back() * heads * c.dim * Float(c.dtype).bytes, 0xff);
      memlm_paged_attention_args args{};
      args.q = q.data(), args.out = y.data();
      args.q_stride = args.out_stride = heads * c.dim;
      args.heads = heads, args.dtype = c.dtype, args.scale = scale;
      args.window = c.window, args.softcap = c.softcap;
      if (c.slopes) args.slopes = static_cast<const float*>(slopes.data());
      if (c.sinks) args.sinks = static_cast<const float*>(sinks.data());
      args.threads = threads;
      require(memlm_paged_attention(&pool, &sequences, &args));
      const Values got = decode(c.dtype, y);
      for (size_t i = 0; i < got.size(); ++i) {
        if (!(std::fabs(got[i] - wanted.value[i]) <= wanted.bound[i]))
          fail("paged_attention on %s: type %d, heads of %d, dtype %d: y[%d] is %.9g, should be %.9g "
               "within %.3g", memlm_isa(), c.type, static_cast<int>(c.dim), c.dtype, static_cast<int>(i),
               got[i], wanted.value[i], wanted.bound[i]);
        telling += std::fabs(wanted.value[i]) > wanted.bound[i];
      }
      bounded += static_cast<int64_t>(got.size());
      count("paged_attention", static_cast<int64_t>(got.size()));
    }
  });
}

void check_paged() {
  for (const memlm_kv_type type : {MEMLM_KV_F32, MEMLM_KV_BF16, MEMLM_KV_INT8, MEMLM_KV_INT4})
    for (const PagedCase& c : {
             PagedCase{type, 64, 64, 2, 3, MEMLM_F32, 0, 0, false, false, {130, 1, 64, 5}, {1, 1, 3, 0}},
             PagedCase{type, 32, 33, 1, 2, MEMLM_F16, 20, 0, false, true, {70, 40}, {9, 1}},
             PagedCase{type, 32, 96, 1, 1, MEMLM_BF16, 0, 2, true, false, {33, 66}, {33, 2}}})
      check_paged_case(c);
}

// The step against f64, and all instruction sets against the first, bit by bit.
void check_adamw() {
  const Values levels[] = {moment_levels(true), moment_levels(false)};
  const double u = std::ldexp(1.0, -24);
  for (const memlm_dtype dtype : kDtypes)
    for (const int64_t count : {1, 300, 13 * 256, 9000}) {
      const auto spread = [] { return normal() * std::pow(10, uniform(-4, 0)); };
      const Array param(dtype, filled(count, normal)), grad(dtype, filled(count, spread));
      const int64_t blocks = (count + kMomentBlock - 1) / kMomentBlock;
      Moment before[2];
      for (int i = 0; i < 2; ++i) {
        before[i].codes = filled<uint8_t>(count, [] { return static_cast<uint8_t>(integer(0, 255)); });
        before[i].absmax = filled<float>(blocks, [&] { return static_cast<float>(uniform(0.1, 2)); });
      }
      memlm_adamw_8bit_args args{};
      args.count = count, args.dtype = dtype, args.grad = grad.data();
      args.lr = 0.01, args.beta1 = 0.9, args.beta2 = 0.99, args.eps = 1e-8, args.weight_decay = 0.1,
      args.step = 7;
      Values exact[2] = {Values(count), Values(count)}, off[2] = {Values(count), Values(count)};
      Values result(count), bound(count);
      for (int64_t i = 0; i < count; ++i) {
        const double g = grad.values[i], m = before[0].at(levels[0], i), v = before[1].at(levels[1], i);
        exact[0][i] = args.beta1 * m + (1 - args.beta1) * g;
        exact[1][i] = args.beta2 * v + (1 - args.beta2) * g * g;
        const double size = args.beta1 * std::fabs(m) + (1 - args.beta1) * std::fabs(g);
        off[0][i] = 8 * u * size;
        off[1][i] = 8 * u * exact[1][i];
        const double root = std::sqrt(exact[1][i] / (1 - std::pow(args.beta2, 7))) + args.eps;
        const double of = args.lr / (1 - std::pow(args.beta1, 7)) / root;
        const double decayed = param.values[i] * (1 - args.lr * args.weight_decay);
        result[i] = decayed - of * exact[0][i];
        bound[i] = 6 * u * std::fabs(decayed) + 40 * u * of * size;
        const Float out(dtype);
        bound[i] += out.roundoff() * (std::fabs(result[i]) + bound[i]) + out.smallest();
      }
      std::vector<uint8_t> first;
      Moment first_moments[2];
      on_every_isa([&] {
        for (const int threads : {1, 3}) {
          std::vector<uint8_t> got = param.bytes;
          Moment moments[2] = {before[0], before[1]};
          args.param = got.data() + Float(dtype).bytes;
          args.exp_avg = moments[0].codes.data(), args.exp_avg_absmax = moments[0].absmax.data();
          args.exp_avg_sq = moments[1].codes.data(), args.exp_avg_sq_absmax = moments[1].absmax.data();
          args.threads = threads;
          require(memlm_adamw_8bit(&args));
          if (first.empty()) {
            const Values y = decode(dtype, std::vector<uint8_t>(got.begin() + Float(dtype).bytes, got.end()));
            for (int64_t i = 0; i < count; ++i)
              if (!(std::fabs(y[i] - result[i]) <= bound[i]))
                fail("adamw_8bit on %s: dtype %d: param[%d] is %.9g, should be %.9g within %.3g", memlm_isa(),
                     dtype, static_cast<int>(i), y[i], result[i], bound[i]);
            for (int i = 0; i < 2; ++i)
              if (!holds(moments[i], levels[i], i == 0, exact[i], off[i]))
                fail("adamw_8bit on %s: dtype %d: other codes of moment %d", memlm_isa(), dtype, i + 1);
            first = got;
            first_moments[0] = moments[0], first_moments[1] = moments[1];
          }
          bool same = got == first;
          for (int i = 0; i < 2; ++i)
            same = same && moments[i].codes == first_moments[i].codes &&
                   moments[i].absmax == first_moments[i].absmax;
          if (!same) fail("adamw_8bit on %s: dtype %d: other bits", memlm_isa(), dtype);
          ::count("adamw_8bit", count);
        }
      });
    }
}

}  // namespace

int main(int argc, char**) {
  std::printf("%s:", memlm_isa());
  for (const char* const* isa = memlm_isas(); *isa; ++isa) std::printf(" %s", *isa);
  std::printf("\n");
  if (argc > 1) return 0;
  check_products();
  check_integers();
  check_not_finite();
  check_tiny();
  check_gates();
  check_rows();
  check_topk();
  check_sparse();
  check_layers();
  check_quantize_weight();
  check_refusals();
  check_largest_magnitude();
  check_attention();
  check_paged();
  check_adamw();
  if (telling < 0.8 * static_cast<double>(bounded)) fail("the bounds are so wide that zeros pass");
  for (const auto& [name, results] : compared)
    std::printf("%s: %lld\n", name.c_str(), static_cast<long long>(results));
}
