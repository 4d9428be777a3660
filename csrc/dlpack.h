// The part of DLPack's binary interface that a consumer needs (https://dmlc.github.io/dlpack):
// tensors of another library in a Python capsule, "dltensor" or, from version 1.0 on,
// "dltensor_versioned".
#pragma once
#include <stdint.h>

namespace memlm::dlpack {

enum DeviceType : int32_t { kCpu = 1 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;  // of a vector element; 1: numbers
};

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; NULL: C order
  uint64_t byte_offset;
};

struct Managed {
  static constexpr const char *kName = "dltensor", *kUsed = "used_dltensor";
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

constexpr uint32_t kMajor = 1;  // the version of the layout below
constexpr uint64_t kReadOnly = 1, kIsCopied = 2;

struct ManagedVersioned {
  static constexpr const char *kName = "dltensor_versioned", *kUsed = "used_dltensor_versioned";
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

static_assert(sizeof(Tensor) == 48 && sizeof(Managed) == 64 && sizeof(ManagedVersioned) == 80,
              "the layout on 64-bit systems");

}  // namespace memlm::dlpack
