// An argument of a Python function that is an array: a numpy array, or of any library that speaks
// DLPack.  Borrowed where it lies, for as long as the object below lives.
#pragma once
#include <pybind11/numpy.h>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dlpack.h"

namespace memlm {

namespace py = pybind11;
using Shape = std::vector<int64_t>;

struct Dtype {
  uint8_t code, bits;  // dlpack.h
  bool operator==(Dtype other) const { return code == other.code && bits == other.bits; }
  bool operator!=(Dtype other) const { return !(*this == other); }
};

constexpr Dtype kF32 = {dlpack::kFloat, 32}, kF16 = {dlpack::kFloat, 16};
constexpr Dtype kBF16 = {dlpack::kBfloat, 16};
constexpr Dtype kI8 = {dlpack::kInt, 8}, kU8 = {dlpack::kUInt, 8};
constexpr Dtype kI32 = {dlpack::kInt, 32}, kI64 = {dlpack::kInt, 64};
constexpr Dtype kOther = {255, 8};

inline std::string text(Dtype dtype) {
  static const char* const kNames[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
  if (dtype.code == dlpack::kBool) return "bool";
  if (dtype.code > dlpack::kComplex) return "an unknown dtype";
  return kNames[dtype.code] + std::to_string(dtype.bits);
}

inline std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// Rows of a matrix, or of an array of more dimensions whose leading ones have one step in common.
struct Rows {
  int64_t count, stride;  // elements from one row to the next
};

class Array {
 public:
  const std::string name;  // of the argument, for errors
  Dtype dtype = kOther;
  Shape shape, strides;  // strides in elements
  char* data = nullptr;
  bool writable = false;

  // Raises TypeError, ValueError, or what the array's own library raises.
  Array(py::handle object, const char* name);
  Array(const Array&) = delete;

  // ValueError unless the array has this shape, TypeError unless it has this dtype.
  void expect(const Shape& wanted) const;
  void expect(Dtype wanted, const char* why) const;
  // ValueError unless the last dimension is contiguous and the rows lie apart, at one distance; and
  // unless the elements are aligned.
  Rows rows() const;
  // ValueError unless it is in C order without gaps, and aligned.
  void expect_contiguous() const;
  // Whether the memory from the first to the last element meets other's; strides must be positive.
  bool overlaps(const Array& other) const { return data < other.end() && other.data < end(); }

 private:
  std::unique_ptr<void, void (*)(void*)> owner_{nullptr, [](void*) {}};  // a DLPack tensor

  void from_numpy(const py::array& array);
  void from_dlpack(py::handle object);
  template <class Managed>
  Managed* take(py::handle capsule);
  const char* end() const;
  void expect_aligned() const;
  [[noreturn]] void refuse_strides(const char* accepted) const;
};

// An argument that may be None.
class OptionalArray : public std::optional<Array> {
 public:
  OptionalArray(py::handle object, const char* name) {
    if (!object.is_none()) emplace(object, name);
  }
  const void* data() const { return has_value() ? (*this)->data : nullptr; }
};

// A numpy array of undefined contents.  Raises ImportError for bfloat16 without ml_dtypes.
py::array new_array(Dtype dtype, const Shape& shape);

}  // namespace memlm
