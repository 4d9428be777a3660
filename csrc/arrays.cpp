// The kernels over arrays, for memlm/arrays.py, which documents them.  Every argument is checked
// before any memory is read or written; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "packed_array.h"

namespace memlm {
namespace {

Dtype named_dtype(const std::string& name) {
  for (Dtype dtype : {kF32, kF16, kBF16})
    if (name == text(dtype)) return dtype;
  throw py::type_error("dtype: got " + name + ", accepted are float32, float16, bfloat16");
}

void expect_threads(int threads) {
  if (threads < 1)
    throw py::value_error("threads: got " + std::to_string(threads) + ", at least 1 is needed");
}

// Runs a kernel without the GIL.
template <class Call>
void run(const Call& call) {
  memlm_status status;
  {
    const py::gil_scoped_release release;
    status = call();
  }
  if (status == MEMLM_NO_MEMORY) throw std::bad_alloc();
  if (status != MEMLM_OK) throw py::value_error(memlm_last_error());
}

// Where a result goes: into `given`, or, where that is None, into a new numpy array.
struct Output {
  py::object object;
  Array array;
  Rows rows;

  Output(py::handle given, const Shape& shape, Dtype dtype)
      : object(given.is_none() ? new_array(dtype, shape)
                               : py::reinterpret_borrow<py::object>(given)),
        array(object, "out") {
    array.expect(dtype, ", as the result");
    array.expect(shape);
    rows = array.rows();
    if (!array.writable) throw py::value_error("out: is read-only");
  }

  void expect_apart(const Array& input) const {
    if (array.overlaps(input))
      throw py::value_error("out: shares memory with " + input.name);
  }
  void expect_apart(const OptionalArray& input) const {
    if (input) expect_apart(*input);
  }
  void expect_apart(const Packed& w) const {
    expect_apart(w.codes);
    for (const OptionalArray* part : {&w.scales, &w.offsets, &w.starts, &w.places})
      expect_apart(*part);
  }
};

Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

// What all matmuls take beside x and W.
struct Around {
  py::handle bias, norm;
  double eps;
  bool swiglu;
  py::handle residual, out;
  int threads;

  explicit Around(const py::tuple& t)
      : bias(t[0]),
        norm(t[1]),
        eps(t[2].cast<double>()),
        swiglu(t[3].cast<bool>()),
        residual(t[4]),
        out(t[5]),
        threads(t[6].cast<int>()) {}
};

// y, of y_dtype, by kernel(w, args).
template <class Kernel>
py::object matmul(const Array& x, const OptionalArray& x_scales, const Packed& w,
                  const Around& around, bool fast, Dtype y_dtype, const Kernel& kernel) {
  const int64_t n = w.c.n, k = w.c.k, columns = around.swiglu ? n / 2 : n;
  const OptionalArray bias(around.bias, "bias"), norm(around.norm, "norm");
  const OptionalArray residual(around.residual, "residual");
  if (x.shape.empty() || x.shape.back() != k)
    throw py::value_error("x: got shape " + text(x.shape) + ", expected [..., " +
                          std::to_string(k) + "]");
  if (around.swiglu && n % (2 * kTileRows))
    throw py::value_error("swiglu: W has " + std::to_string(n) +
                          " rows, accepted are multiples of " + std::to_string(2 * kTileRows));
  const Shape shape = with_last(x.shape, columns);
  const auto check = [&](const OptionalArray& array, const Shape& wanted) {
    if (!array) return;
    array->expect(y_dtype, ", as x or the result");
    array->expect(wanted);
  };
  check(bias, {n});
  check(norm, {k});
  check(residual, shape);
  if (bias) bias->expect_contiguous();
  if (norm) norm->expect_contiguous();
  const Rows x_rows = x.rows();
  const Rows residual_rows = residual ? residual->rows() : Rows{0, columns};
  expect_threads(around.threads);

  const Output out(around.out, shape, y_dtype);
  out.expect_apart(x);
  out.expect_apart(x_scales);
  out.expect_apart(w);
  out.expect_apart(bias);
  out.expect_apart(norm);
  // A residual may be updated in place: each element is read before it is written.
  const bool in_place = residual && residual->data == out.array.data &&
                        residual_rows.stride == out.rows.stride;
  if (!in_place) out.expect_apart(residual);

  memlm_matmul_args args = {};
  args.m = x_rows.count;
  args.x = x.data;
  args.x_stride = x_rows.stride;
  args.bias = bias.data();
  args.y = out.array.data;
  args.y_stride = out.rows.stride;
  args.dtype = float_dtype(out.array);
  args.fast = fast;
  args.threads = around.threads;
  args.norm = norm.data();
  args.norm_eps = static_cast<float>(around.eps);
  args.swiglu = around.swiglu;
  args.residual = residual.data();
  args.residual_stride = residual_rows.stride;
  run([&] { return kernel(&w.c, &args); });
  return out.object;
}

// A packed matrix that is not sparse.
Packed dense(const py::tuple& packed) {
  if (packed.size() > 6) throw py::value_error("packed: is sparse, accepted here are dense ones");
  return Packed(packed);
}

using WeightOnly = memlm_status (*)(const memlm_packed*, const memlm_matmul_args*);

py::object weight_only(int bits, WeightOnly kernel, py::handle x_in, const py::tuple& packed,
                       bool fast, const py::tuple& around) {
  const Array x(x_in, "x");
  const OptionalArray no_scales(py::none(), "x_scales");
  const Packed w = dense(packed);
  w.expect_bits(bits);
  float_dtype(x);
  return matmul(x, no_scales, w, Around(around), fast, x.dtype, kernel);
}

py::object sparse_matmul(bool blocks, py::handle x_in, const py::tuple& packed, bool fast,
                         const py::tuple& around) {
  const Array x(x_in, "x");
  const OptionalArray no_scales(py::none(), "x_scales");
  const Packed w(packed);
  if (w.c.pattern == MEMLM_DENSE || (w.c.pattern == MEMLM_BLOCKS) != blocks)
    throw py::value_error(std::string("packed: accepted are ") +
                          (blocks ? "blocks" : "2:4 and unstructured"));
  float_dtype(x);
  const auto kernel = [&](const memlm_packed* weights, const memlm_matmul_args* args) {
    return blocks ? memlm_block_sparse_matmul(weights, w.bits, args)
                  : memlm_w4_sparse_matmul(weights, args);
  };
  return matmul(x, no_scales, w, Around(around), fast, x.dtype, kernel);
}

Shape x_scales_shape(const Shape& x, int64_t x_group) {
  if (x_group != 0 && x_group != kActGroup)
    throw py::value_error("x_group: got " + std::to_string(x_group) +
                          ", accepted are 0 (the whole row) and " + std::to_string(kActGroup));
  return with_last(x, x_group ? div_up(x.back(), x_group) : 1);
}

py::object w8a8_matmul(py::handle x_in, py::handle x_scales_in, const py::tuple& packed,
                       int64_t x_group, const std::string& dtype, const py::tuple& around_in) {
  const Array x(x_in, "x");
  const OptionalArray x_scales(x_scales_in, "x_scales");
  const Packed w = dense(packed);
  const Around around(around_in);
  w.expect_bits(8);
  Dtype y_dtype = x.dtype;
  if (x.shape.empty()) throw py::value_error("x: got shape [], expected [..., k]");
  const Shape scales_shape = x_scales_shape(x.shape, x_group);
  if (x_scales) {
    x.expect(kI8, " beside x_scales");
    x_scales->expect(kF32, "");
    x_scales->expect(scales_shape);
    x_scales->expect_contiguous();
    if (!around.norm.is_none())
      throw py::value_error(
          "norm: got an array, but x is int8, and only numbers can be normalised");
    y_dtype = named_dtype(dtype.empty() ? "float32" : dtype);
  } else {
    float_dtype(x);
    if (!dtype.empty() && named_dtype(dtype) != y_dtype)
      throw py::type_error("dtype: got " + dtype + ", the result has x's, " + text(y_dtype));
  }
  const auto* scales = static_cast<const float*>(x_scales.data());
  return matmul(x, x_scales, w, around, true, y_dtype, [=](const auto* weights, const auto* args) {
    return memlm_w8a8_matmul(weights, args, scales, x_group);
  });
}

py::tuple quantize_rows(py::handle x_in, int64_t x_group, py::handle norm_in, double eps,
                        int threads) {
  const Array x(x_in, "x");
  const OptionalArray norm(norm_in, "norm");
  const memlm_dtype dtype = float_dtype(x);
  if (x.shape.empty() || x.shape.back() < 1)
    throw py::value_error("x: got shape " + text(x.shape) + ", expected [..., k], k at least 1");
  const int64_t k = x.shape.back();
  if (norm) {
    norm->expect(x.dtype, ", as x");
    norm->expect(Shape{k});
    norm->expect_contiguous();
  }
  const Rows rows = x.rows();
  expect_threads(threads);
  const py::array codes = new_array(kI8, x.shape);
  const py::array scales = new_array(kF32, x_scales_shape(x.shape, x_group));
  auto* q = static_cast<int8_t*>(const_cast<void*>(codes.data()));
  auto* s = static_cast<float*>(const_cast<void*>(scales.data()));
  run([&] {
    return memlm_quantize_rows(rows.count, k, x.data, rows.stride, dtype, norm.data(),
                               static_cast<float>(eps), x_group, q, s, threads);
  });
  return py::make_tuple(codes, scales);
}

py::object embedding(py::handle ids_in, const py::tuple& packed, const std::string& dtype,
                     py::handle out_in, int threads) {
  const Packed w = dense(packed);
  const Array ids(ids_in, "ids");
  if (ids.dtype != kI64 && ids.dtype != kI32)
    throw py::type_error("ids: got " + text(ids.dtype) + ", accepted are int64, int32");
  ids.expect_contiguous();
  expect_threads(threads);
  Shape shape = ids.shape;
  shape.push_back(w.c.k);
  const Output out(out_in, shape, named_dtype(dtype));
  out.array.expect_contiguous();
  out.expect_apart(w);
  out.expect_apart(ids);
  int64_t count = 1;
  for (int64_t size : ids.shape) count *= size;
  std::vector<int64_t> wide;
  const auto* indices = reinterpret_cast<const int64_t*>(ids.data);
  if (ids.dtype == kI32) {
    const auto* narrow = reinterpret_cast<const int32_t*>(ids.data);
    wide.assign(narrow, narrow + count);
    indices = wide.data();
  }
  const memlm_dtype type = float_dtype(out.array);
  run([&] {
    return memlm_embedding(&w.c, w.bits, indices, count, type, out.array.data, threads);
  });
  return out.object;
}

py::object dequantize(const py::tuple& packed, const std::string& dtype, py::handle out_in,
                      int threads) {
  const Packed w = dense(packed);
  expect_threads(threads);
  const Output out(out_in, {w.c.n, w.c.k}, named_dtype(dtype));
  out.array.expect_contiguous();
  out.expect_apart(w);
  const memlm_dtype type = float_dtype(out.array);
  run([&] { return memlm_dequantize(&w.c, w.bits, 0, w.c.n, type, out.array.data, threads); });
  return out.object;
}

// Codes, scales and offsets of w [n, k], in the layout that Packed checks.
py::tuple quantize_weight(py::handle w_in, py::handle format, const std::string& scale_dtype,
                          int threads) {
  const Array w(w_in, "w");
  memlm_quantize_args args = {};
  args.dtype = float_dtype(w);
  const Rows rows = w.rows();
  expect_threads(threads);
  args.n = w.shape[0];
  args.k = w.shape[1];
  args.w = w.data;
  args.w_stride = rows.stride;
  args.bits = format.attr("bits").cast<int>();
  args.group = format.attr("group").cast<int64_t>();
  args.threads = threads;
  const auto codebook = format.attr("codebook").cast<std::string>();
  args.ternary = codebook == "ternary";
  args.levels = codebook == "nf" ? memlm_nf4_levels : nullptr;
  const int64_t tiles = div_up(args.n, kTileRows), padded = padded_k(args.k, args.group);
  const Dtype scale_type = named_dtype(scale_dtype);
  args.scale_dtype = scale_type == kF16 ? MEMLM_F16 : MEMLM_F32;
  const Shape shape = {tiles, args.group ? padded / args.group : 1, kTileRows};
  const py::array codes =
      new_array(args.bits == 8 ? kI8 : kU8,
                {tiles, tile_bytes(args.bits, padded) / kBlock, kTileRows, kLaneK});
  const py::array scales = new_array(scale_type, shape);
  py::object offsets = py::none();
  if (!format.attr("symmetric").cast<bool>()) {
    const py::array array = new_array(scale_type, shape);
    args.offsets = const_cast<void*>(array.data());
    offsets = array;
  }
  args.codes = const_cast<void*>(codes.data());
  args.scales = const_cast<void*>(scales.data());
  run([&] { return memlm_quantize_weight(&args); });
  return py::make_tuple(codes, scales, offsets);
}

float largest_magnitude(py::handle w_in, int threads) {
  const Array w(w_in, "w");
  const memlm_dtype dtype = float_dtype(w);
  const Rows rows = w.rows();
  expect_threads(threads);
  float largest = 0;
  run([&] {
    return memlm_largest_magnitude(rows.count, w.shape[1], w.data, rows.stride, dtype, &largest,
                                   threads);
  });
  return largest;
}

}  // namespace

void bind_arrays(py::module_& m) {
  const struct {
    const char* name;
    int bits;
    WeightOnly kernel;
  } matmuls[] = {{"w2_matmul", 2, memlm_w2_matmul},
                 {"w4_matmul", 4, memlm_w4_matmul},
                 {"w8_matmul", 8, memlm_w8_matmul}};
  for (const auto& op : matmuls) {
    m.def(op.name, [op](py::handle x, const py::tuple& packed, bool fast, const py::tuple& around) {
      return weight_only(op.bits, op.kernel, x, packed, fast, around);
    });
  }
  m.def("block_sparse_matmul", [](py::handle x, const py::tuple& packed, bool fast,
                                  const py::tuple& around) {
    return sparse_matmul(true, x, packed, fast, around);
  });
  m.def("w4_sparse_matmul", [](py::handle x, const py::tuple& packed, bool fast,
                               const py::tuple& around) {
    return sparse_matmul(false, x, packed, fast, around);
  });
  m.def("w8a8_matmul", w8a8_matmul);
  m.def("quantize_rows", quantize_rows);
  m.def("embedding", embedding);
  m.def("dequantize", dequantize);
  m.def("largest_magnitude", largest_magnitude);
  m.def("quantize_weight", quantize_weight);
  m.def("check_packed", [](const py::tuple& packed) { Packed w(packed); });
}

}  // namespace memlm
