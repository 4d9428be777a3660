// The kernels over arrays, for memlm/arrays.py, which documents them.  Every argument is checked
// before any memory is read or written; the GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include "array.h"
#include "formats.h"
#include "include/memlm.h"

namespace memlm {
namespace {

using Matmul = memlm_status (*)(const memlm_packed*, const memlm_matmul_args*);

memlm_dtype float_dtype(const Array& array) {
  if (array.dtype == kF32) return MEMLM_F32;
  if (array.dtype == kF16) return MEMLM_F16;
  if (array.dtype == kBF16) return MEMLM_BF16;
  throw py::type_error(array.name + ": got " + text(array.dtype) +
                       ", accepted are float32, float16, bfloat16");
}

Dtype named_dtype(const std::string& name) {
  for (Dtype dtype : {kF32, kF16, kBF16})
    if (name == text(dtype)) return dtype;
  throw py::type_error("dtype: got " + name + ", accepted are float32, float16, bfloat16");
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

// A packed W[n, k], checked against the layout that memlm/formats.py draws.
struct Packed {
  Array codes, scales;
  OptionalArray offsets;
  memlm_packed c = {};

  Packed(int bits, py::handle codes_in, py::handle scales_in, py::handle offsets_in, int64_t n,
         int64_t k, int64_t group)
      : codes(codes_in, "codes"), scales(scales_in, "scales"), offsets(offsets_in, "offsets") {
    if (n < 1 || n > INT32_MAX || k < 1 || k > INT32_MAX)
      throw py::value_error("n, k: got " + text(Shape{n, k}) + ", accepted is 1 to 2^31-1");
    if (!(group == 32 || group == 64 || group == 128 || (group == 0 && bits == 8)))
      throw py::value_error("group: got " + std::to_string(group) +
                            ", accepted are 32, 64, 128, and 0 for 8 bits");
    const int64_t tiles = div_up(n, kTileRows), padded = padded_k(k, group);
    codes.expect(bits == 8 ? kI8 : kU8, bits == 8 ? " for 8 bits" : " for less than 8 bits");
    codes.expect(Shape{tiles, tile_bytes(bits, padded) / kBlock, kTileRows, kLaneK});
    codes.expect_contiguous();
    c.scale_dtype = float_dtype(scales);
    if (c.scale_dtype == MEMLM_BF16)
      throw py::type_error("scales: got bfloat16, accepted are float16, float32");
    const Shape shape = {tiles, group ? padded / group : 1, kTileRows};
    scales.expect(shape);
    scales.expect_contiguous();
    if (offsets) {
      if (bits == 8) throw py::value_error("offsets: 8-bit weights are symmetric only");
      offsets->expect(scales.dtype, ", as scales");
      offsets->expect(shape);
      offsets->expect_contiguous();
    }
    c.codes = codes.data;
    c.scales = scales.data;
    c.offsets = offsets.data();
    c.n = n;
    c.k = k;
    c.group = group;
  }
};

// Where a result goes: into `given`, or, where that is None, into a new numpy array.
struct Output {
  py::object object;
  Array array;
  Rows rows;

  Output(py::object given, const Shape& shape, Dtype dtype)
      : object(given.is_none() ? new_array(dtype, shape) : given), array(object, "out") {
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
    expect_apart(w.scales);
    expect_apart(w.offsets);
  }
};

Shape with_last(Shape shape, int64_t last) {
  shape.back() = last;
  return shape;
}

py::object matmul(Matmul kernel, int bits, py::handle x_in, py::handle codes, py::handle scales,
                  py::handle offsets, int64_t n, int64_t k, int64_t group, py::handle bias_in,
                  bool fast, py::handle norm_in, double eps, py::handle residual_in,
                  py::object out_in, int threads) {
  const Array x(x_in, "x");
  const Packed w(bits, codes, scales, offsets, n, k, group);
  const OptionalArray bias(bias_in, "bias"), norm(norm_in, "norm");
  const OptionalArray residual(residual_in, "residual");
  memlm_matmul_args args = {};
  args.dtype = float_dtype(x);
  if (x.shape.empty() || x.shape.back() != k)
    throw py::value_error("x: got shape " + text(x.shape) + ", expected [..., " +
                          std::to_string(k) + "]");
  const Shape shape = with_last(x.shape, n);
  const auto check = [&](const OptionalArray& array, const Shape& wanted) {
    if (!array) return;
    array->expect(x.dtype, ", as x");
    array->expect(wanted);
  };
  check(bias, {n});
  check(norm, {k});
  check(residual, shape);
  if (bias) bias->expect_contiguous();
  if (norm) norm->expect_contiguous();
  const Rows x_rows = x.rows();
  const Rows residual_rows = residual ? residual->rows() : Rows{0, n};
  if (threads < 1)
    throw py::value_error("threads: got " + std::to_string(threads) + ", at least 1 is needed");

  const Output out(std::move(out_in), shape, x.dtype);
  out.expect_apart(x);
  out.expect_apart(w);
  out.expect_apart(bias);
  out.expect_apart(norm);
  // A residual may be updated in place: each element is read before it is written.
  const bool in_place = residual && residual->data == out.array.data &&
                        residual_rows.stride == out.rows.stride;
  if (!in_place) out.expect_apart(residual);

  args.m = x_rows.count;
  args.x = x.data;
  args.x_stride = x_rows.stride;
  args.bias = bias.data();
  args.y = out.array.data;
  args.y_stride = out.rows.stride;
  args.fast = fast;
  args.threads = threads;
  args.norm = norm.data();
  args.norm_eps = static_cast<float>(eps);
  args.residual = residual.data();
  args.residual_stride = residual_rows.stride;
  run([&] { return kernel(&w.c, &args); });
  return out.object;
}

py::object embedding(py::handle ids_in, int bits, py::handle codes, py::handle scales,
                     py::handle offsets, int64_t n, int64_t k, int64_t group,
                     const std::string& dtype, py::object out_in, int threads) {
  const Packed w(bits, codes, scales, offsets, n, k, group);
  const Array ids(ids_in, "ids");
  if (ids.dtype != kI64 && ids.dtype != kI32)
    throw py::type_error("ids: got " + text(ids.dtype) + ", accepted are int64, int32");
  ids.expect_contiguous();
  Shape shape = ids.shape;
  shape.push_back(k);
  const Output out(std::move(out_in), shape, named_dtype(dtype));
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
    return memlm_embedding(&w.c, bits, indices, count, type, out.array.data, threads);
  });
  return out.object;
}

py::object dequantize(int bits, py::handle codes, py::handle scales, py::handle offsets, int64_t n,
                      int64_t k, int64_t group, const std::string& dtype, py::object out_in,
                      int threads) {
  const Packed w(bits, codes, scales, offsets, n, k, group);
  const Output out(std::move(out_in), {n, k}, named_dtype(dtype));
  out.array.expect_contiguous();
  out.expect_apart(w);
  const memlm_dtype type = float_dtype(out.array);
  run([&] { return memlm_dequantize(&w.c, bits, 0, n, type, out.array.data, threads); });
  return out.object;
}

}  // namespace

void bind_arrays(py::module_& m) {
  const struct {
    const char* name;
    int bits;
    Matmul kernel;
  } matmuls[] = {{"w4_matmul", 4, memlm_w4_matmul}, {"w8_matmul", 8, memlm_w8_matmul}};
  for (const auto& op : matmuls) {
    m.def(op.name, [kernel = op.kernel, bits = op.bits](
                       py::handle x, py::handle codes, py::handle scales, py::handle offsets,
                       int64_t n, int64_t k, int64_t group, py::handle bias, bool fast,
                       py::handle norm, double eps, py::handle residual, py::object out,
                       int threads) {
      return matmul(kernel, bits, x, codes, scales, offsets, n, k, group, bias, fast, norm, eps,
                    residual, std::move(out), threads);
    });
  }
  m.def("embedding", embedding);
  m.def("dequantize", dequantize);
  m.def("check_packed", [](int bits, py::handle codes, py::handle scales, py::handle offsets,
                           int64_t n, int64_t k, int64_t group) {
    Packed(bits, codes, scales, offsets, n, k, group);
  });
}

}  // namespace memlm
