"""A DLPack producer of its own, in ctypes: can do what numpy and torch never do, and counts what
becomes of its tensors."""

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p

import numpy as np

_new = ctypes.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = ctypes.py_object, [c_void_p, c_char_p, c_void_p]
_is_valid = ctypes.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = [c_void_p, c_char_p]  # of an object that is being freed
_Deleter = ctypes.PYFUNCTYPE(None, c_void_p)

CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
READ_ONLY, IS_COPIED = 1, 2


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("device_type", c_int32), ("device_id", c_int32), ("ndim", c_int32),
        ("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16), ("shape", c_void_p),
        ("strides", c_void_p), ("byte_offset", c_uint64),
    ]  # fmt: skip


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", c_void_p), ("deleter", c_void_p)]


class _ManagedVersioned(ctypes.Structure):
    _fields_ = [
        ("major", c_uint32), ("minor", c_uint32), ("context", c_void_p), ("deleter", c_void_p),
        ("flags", c_uint64), ("tensor", _Tensor),
    ]  # fmt: skip


class Producer:
    """Shows a numpy array.  ``deleted`` counts the calls of its tensors' deleters, ``given`` its
    tensors.  ``major=None``: DLPack before versions.  What is in ``wrong`` replaces fields."""

    def __init__(self, array: np.ndarray, major=1, flags=0, device=1, strides=True, **wrong):
        self.array, self.major, self.flags, self.device = array, major, flags, device
        self.strides, self.wrong = strides, wrong
        self.given = self.deleted = 0
        self._alive = []

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self, **options):
        if self.major is None and options:
            raise TypeError("no option is known")
        a = self.array
        shape = (c_int64 * a.ndim)(*a.shape)
        strides = (c_int64 * a.ndim)(*(s // a.itemsize for s in a.strides))
        offset = 8  # of the data, said apart
        fields = dict(
            data=a.ctypes.data - offset, device_type=self.device, ndim=a.ndim, lanes=1,
            code=CODES[a.dtype.kind], bits=8 * a.itemsize, shape=ctypes.addressof(shape),
            strides=ctypes.addressof(strides) if self.strides else None, byte_offset=offset,
        )  # fmt: skip
        tensor = _Tensor(**(fields | self.wrong))
        deleter = _Deleter(self._delete)
        if self.major is None:
            name, managed = b"dltensor", _Managed(tensor=tensor)
        else:
            name, managed = b"dltensor_versioned", _ManagedVersioned(tensor=tensor)
            managed.major, managed.flags = self.major, self.flags
        managed.deleter = ctypes.cast(deleter, c_void_p)
        pointer = ctypes.addressof(managed)

        def free_capsule(capsule):
            if _is_valid(capsule, name):  # nobody has taken the tensor
                self._delete(pointer)

        destructor = _Deleter(free_capsule)
        self._alive += [shape, strides, managed, deleter, destructor, name]
        self.given += 1
        return _new(pointer, name, ctypes.cast(destructor, c_void_p))

    def _delete(self, managed):
        self.deleted += 1
