#include "array.h"

#include <algorithm>

namespace memlm {
namespace {

Dtype dtype_of(const py::dtype& dtype) {
  if (dtype.byteorder() == '>' || dtype.itemsize() > 16) return kOther;
  const auto bits = static_cast<uint8_t>(dtype.itemsize() * 8);
  switch (dtype.kind()) {
    case 'i': return {dlpack::kInt, bits};
    case 'u': return {dlpack::kUInt, bits};
    case 'f': return {dlpack::kFloat, bits};
    case 'c': return {dlpack::kComplex, bits};
    case 'b': return {dlpack::kBool, bits};
    case 'V':  // also the kind of the types that other packages add to numpy
      return py::str(dtype).cast<std::string>() == "bfloat16" ? kBF16 : kOther;
    default: return kOther;
  }
}

py::dtype numpy_dtype(Dtype dtype) {
  if (dtype != kBF16) return py::dtype(text(dtype));
  try {
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
  } catch (const py::error_already_set&) {
    throw py::import_error("out: a bfloat16 result needs the package ml_dtypes, or out");
  }
}

// Of `object`, at most version 1; of version 0 where it knows no versions.
py::object capsule_of(py::handle object) {
  const py::object method = object.attr("__dlpack__");
  try {
    return method(py::arg("max_version") = py::make_tuple(dlpack::kMajor, 0));
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return method();
}

}  // namespace

Array::Array(py::handle object, const char* name) : name(name) {
  if (py::isinstance<py::array>(object)) {
    from_numpy(py::reinterpret_borrow<py::array>(object));
  } else if (py::hasattr(object, "__dlpack__") && py::hasattr(object, "__dlpack_device__")) {
    from_dlpack(object);
  } else {
    throw py::type_error(this->name + ": got " + Py_TYPE(object.ptr())->tp_name +
                         ", accepted are numpy arrays and what has __dlpack__");
  }
}

void Array::from_numpy(const py::array& array) {
  dtype = dtype_of(array.dtype());
  writable = array.writeable();
  data = static_cast<char*>(const_cast<void*>(array.data()));
  const int64_t size = array.itemsize();
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (size && array.strides(i) % size != 0)
      throw py::value_error(name + ": the strides are not whole elements");
    shape.push_back(array.shape(i));
    strides.push_back(size ? array.strides(i) / size : 0);
  }
}

void Array::from_dlpack(py::handle object) {
  const auto device = object.attr("__dlpack_device__")().cast<py::tuple>();
  const int type = py::int_(device[0]).cast<int>();
  if (type != dlpack::kCpu)
    throw py::value_error(name + ": is on a device of DLPack's type " + std::to_string(type) +
                          ", must be on the CPU");
  py::object capsule;
  try {
    capsule = capsule_of(object);
  } catch (py::error_already_set& error) {
    py::raise_from(error, PyExc_BufferError, (name + ": the array cannot be shared").c_str());
    throw py::error_already_set();
  }
  dlpack::Tensor* tensor;
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::ManagedVersioned::kName)) {
    void* p = PyCapsule_GetPointer(capsule.ptr(), dlpack::ManagedVersioned::kName);
    const uint32_t major = static_cast<dlpack::ManagedVersioned*>(p)->major;
    if (major != dlpack::kMajor)  // the capsule, still unused, frees the tensor
      throw py::value_error(name + ": DLPack version " + std::to_string(major) + " is not known");
    auto* managed = take<dlpack::ManagedVersioned>(capsule);
    writable = !(managed->flags & (dlpack::kReadOnly | dlpack::kIsCopied));
    tensor = &managed->tensor;
  } else if (PyCapsule_IsValid(capsule.ptr(), dlpack::Managed::kName)) {
    tensor = &take<dlpack::Managed>(capsule)->tensor;  // which cannot say whether it is writable
  } else {
    throw py::type_error(name + ": __dlpack__ gave no unused DLPack capsule");
  }
  if (tensor->device_type != dlpack::kCpu) throw py::value_error(name + ": must be on the CPU");
  dtype = tensor->dtype.lanes == 1 ? Dtype{tensor->dtype.code, tensor->dtype.bits} : kOther;
  data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  shape.assign(tensor->shape, tensor->shape + tensor->ndim);
  if (tensor->strides) {
    strides.assign(tensor->strides, tensor->strides + tensor->ndim);
  } else {
    strides.resize(shape.size());
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > 0; step *= shape[i]) strides[i] = step;
  }
}

// The tensor in the capsule, which this object now has to free, once.
template <class Managed>
Managed* Array::take(py::handle capsule) {
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule.ptr(), Managed::kName));
  if (!managed || PyCapsule_SetName(capsule.ptr(), Managed::kUsed)) throw py::error_already_set();
  owner_ = {managed, [](void* p) {
              auto* tensor = static_cast<Managed*>(p);
              if (tensor->deleter) tensor->deleter(tensor);
            }};
  return managed;
}

void Array::expect(const Shape& wanted) const {
  if (shape != wanted)
    throw py::value_error(name + ": got shape " + text(shape) + ", expected " + text(wanted));
}

void Array::expect(Dtype wanted, const char* why) const {
  if (dtype != wanted)
    throw py::type_error(name + ": got " + text(dtype) + ", expected " + text(wanted) + why);
}

void Array::expect_aligned() const {
  const int size = dtype.bits / 8;
  if (size && reinterpret_cast<uintptr_t>(data) % size)
    throw py::value_error(name + ": the elements are not aligned in memory");
}

void Array::refuse_strides(const char* accepted) const {
  throw py::value_error(name + ": got strides " + text(strides) + " (elements) of shape " +
                        text(shape) + ", accepted " + accepted + "; pass a contiguous copy");
}

Rows Array::rows() const {
  expect_aligned();
  const int64_t columns = shape.back();
  const bool empty = std::count(shape.begin(), shape.end(), 0) > 0;
  Rows rows = {empty ? 0 : 1, columns};
  if (empty) return rows;
  bool good = columns == 1 || strides.back() == 1;
  for (size_t i = shape.size() - 1; i-- > 0;) {  // a dimension of one element may have any step
    if (shape[i] == 1) continue;
    if (rows.count == 1) rows.stride = strides[i];
    good = good && rows.stride >= columns && strides[i] == rows.stride * rows.count;
    rows.count *= shape[i];
  }
  if (!good) refuse_strides("are contiguous rows, apart, at one distance");
  return rows;
}

void Array::expect_contiguous() const {
  expect_aligned();
  if (shape.empty() || std::count(shape.begin(), shape.end(), 0) > 0) return;
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0; step *= shape[i])
    if (shape[i] != 1 && strides[i] != step) refuse_strides("is C order without gaps");
}

const char* Array::end() const {
  int64_t last = 0;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] == 0) return data;
    last += strides[i] * (shape[i] - 1);
  }
  return data + (last + 1) * (dtype.bits / 8);
}

py::array new_array(Dtype dtype, const Shape& shape) {
  const py::dtype type = numpy_dtype(dtype);
  constexpr size_t kAlignment = 64;  // fastest for the kernels, and what JAX takes without copying
  size_t bytes = dtype.bits / 8;
  for (int64_t size : shape) bytes *= static_cast<size_t>(size);
  void* p = std::aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
  if (!p) throw std::bad_alloc();
  const py::capsule owner(p, [](void* memory) { std::free(memory); });
  return py::array(type, shape, p, owner);
}

}  // namespace memlm
