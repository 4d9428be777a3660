"""Triton's interpreter, which runs kernels on CPU tensors, with bf16 put right.

Triton 3.9 keeps bf16 as the uint16 of its bits and computes with these as integers; float casts of it cut
digits off.  Here it is ml_dtypes' bfloat16, a numpy type that computes in f32 and rounds to nearest even.

Whether functions are interpreted is decided when Triton is imported: tests/conftest.py sets
TRITON_INTERPRET.  Compiled code is looked at in a process of its own:
tests/triton_code.py.
"""

import functools
import os

import ml_dtypes
import numpy as np
import torch

from . import device

BF16 = np.dtype(ml_dtypes.bfloat16)


def moved(run, written: set[int], device: str):
    """A callable that takes and gives tensors of the host, and runs on a device.  ``written``: the arguments
    that are written to, which are copied back.  Tensors of one number, as a seed, stay on the host."""

    def call(*args, **settings):
        there = [a.to(device, copy=True) if isinstance(a, torch.Tensor) and a.dim() else a for a in args]
        result = run(*there, **settings)
        for i, (mine, its) in enumerate(zip(args, there)):
            if i in written and isinstance(mine, torch.Tensor):
                mine.copy_(its)
        if isinstance(result, torch.Tensor):
            return result.cpu()
        return result and tuple(r.cpu() for r in result)

    return call


def on_device(implementation, device: str):
    """``memlm.kernels.implementation`` with operations :func:`moved`."""

    def of(name: str):
        arguments = getattr(torch.ops.memlm, name).default._schema.arguments
        written = {i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write}
        return moved(implementation(name), written, device)

    return of


def executed(run, written: set[int] = frozenset()):
    """What calls kernels and is no operation, as the tests call it: interpreted, or moved to the GPU."""
    return moved(run, written, "cuda") if device.wanted() else run


@functools.cache
def interpret() -> None:
    """Puts the interpreter right, once; with MEMLM_TEST_GPU the kernels run on the GPU instead."""
    if device.wanted():
        from memlm import kernels

        kernels.implementation = on_device(kernels.implementation, "cuda")
        return
    assert os.environ.get("TRITON_INTERPRET") == "1", "Triton's functions are compiled here"
    import triton.language as tl
    from triton.runtime import interpreter

    builder, numpy_type, Handle = (
        interpreter.InterpreterBuilder, interpreter._get_np_dtype, interpreter.TensorHandle
    )  # fmt: skip

    def with_bf16(dtype):
        element = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return BF16 if element == tl.bfloat16 else numpy_type(dtype)

    def cast(original):
        def run(self, source, target, *rest):
            types = (source.dtype.scalar, target.scalar)
            floats = (tl.float16, tl.bfloat16, tl.float32, tl.float64)
            if tl.bfloat16 in types and all(t in floats or t.is_int() for t in types):
                wide = source.data.astype(np.float32) if types[0] == tl.bfloat16 else source.data
                return Handle(wide.astype(with_bf16(target)), types[1])
            return original(self, source, target, *rest)

        return run

    def bitcast(self, source, target):
        return Handle(np.ascontiguousarray(source.data).view(with_bf16(target)), target.scalar)

    def dot(original):
        def run(self, a, b, d, *rest):
            wide = [
                Handle(t.data.astype(np.float32), tl.float32) if t.data.dtype == BF16 else t for t in (a, b)
            ]
            return original(self, *wide, d, *rest)

        return run

    def loaded(original):
        """Memory is read and written as uint16."""

        def run(self, pointers, mask, other, *rest):
            if pointers.get_element_ty() != tl.bfloat16:
                return original(self, pointers, mask, other, *rest)
            if other is not None:
                other = Handle(other.data.astype(BF16).view(np.uint16), tl.uint16)
            interpreter._get_np_dtype = numpy_type
            try:
                found = original(self, pointers, mask, other, *rest)
            finally:
                interpreter._get_np_dtype = with_bf16
            return Handle(found.data.view(BF16), tl.bfloat16)

        return run

    def stored(original):
        def run(self, pointers, value, *rest):
            if value.data.dtype == BF16:
                value = Handle(value.data.view(np.uint16), tl.bfloat16)
            return original(self, pointers, value, *rest)

        return run

    def reduced(original):
        """Of tl.sort's exclusive or, which Triton calls for each pair of elements."""

        def run(self, input):
            if self.combine_fn is not tl.standard._xor_combine:
                return original(self, input)
            data = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(data, input[0].dtype)

        return run

    interpreter.ReduceOps.apply_impl = reduced(interpreter.ReduceOps.apply_impl)
    interpreter._get_np_dtype = with_bf16
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, cast(getattr(builder, name)))
    builder.create_bitcast = bitcast
    builder.create_dot = dot(builder.create_dot)
    builder.create_masked_load = loaded(builder.create_masked_load)
    builder.create_masked_store = stored(builder.create_masked_store)
