"""Loading the native ops and listing what can execute them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from memlm.cpu import lib_path
from memlm.ops import _cuda

torch.ops.load_library(str(lib_path().with_name("_torch.so")))

# op name -> plain-torch implementation with the op's signature
_references: dict[str, Callable] = {}
# op name -> what executes it on a CUDA device, by name; the first is what the op runs
_cuda_kernels: dict[str, dict[str, Callable]] = {}


def define(name: str, reference: Callable, fake: Callable, backward=None, setup_context=None):
    """Adds to the C++ op ``memlm::<name>`` what torch needs beside a kernel: the shape function,
    the gradient, autocast, the kernel on CUDA devices, and the reference where there is none."""
    qualified = f"memlm::{name}"
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    _references[name] = reference

    def slow(*args, **kwargs):
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        _warn_once(name, device.type)
        return reference(*args, **kwargs)

    torch.library.impl(qualified, ("XPU", "MPS"), slow)
    _cuda_kernels[name] = {}
    for define_kernel in (_define_cuda, _define_triton):
        define_kernel(name)
    if not _cuda_kernels[name]:
        torch.library.impl(qualified, "CUDA", slow)
    return getattr(torch.ops.memlm, name).default


def _define_cuda(name: str) -> None:
    """Has ``memlm::<name>`` run the CUDA C++ kernel, and ``memlm_cuda::<name>`` nothing else, where
    there is one."""
    if _cuda.unavailable() or not _cuda.register("memlm", "CUDA", name, or_reference=True):
        return

    def slow(*args):
        _warn_once(name, "this call", _cuda.reason())
        return _references[name](*args)

    schema = str(getattr(torch.ops.memlm, name).default._schema).removeprefix(f"memlm::{name}")
    for namespace in ("memlm_reference", "memlm_cuda"):
        torch.library.define(f"{namespace}::{name}", schema)
    torch.library.impl(f"memlm_reference::{name}", "CompositeExplicitAutograd", slow)
    _cuda.register("memlm_cuda", "CUDA", name, or_reference=False)
    _cuda_kernels[name]["cuda"] = getattr(torch.ops.memlm_cuda, name).default


def _define_triton(name: str) -> None:
    """Adds the Triton kernel, if there is one; ``memlm::<name>`` runs it where there is none in C++."""
    if not (torch.version.cuda or torch.version.hip):
        return
    from memlm import kernels  # which needs the operations that are being defined

    if name not in kernels.OPERATIONS or not kernels.available():
        return

    def alone(*args):
        return kernels.implementation(name)(*args)

    def run(*args):
        try:
            return alone(*args)
        except kernels.UnsupportedError as error:
            _warn_once(name, "this call", str(error))
            return _references[name](*args)

    if not _cuda_kernels[name]:
        torch.library.impl(f"memlm::{name}", "CUDA", run)
    _cuda_kernels[name]["triton"] = alone


_warned = set()


def _warn_once(name: str, what: str, why: str = "") -> None:
    if (name, what, why) not in _warned:
        _warned.add((name, what, why))
        because = f" ({why})" if why else ""
        warnings.warn(
            f"memlm.{name} has no kernel for {what}{because}: running the slow reference in plain torch",
            stacklevel=3,
        )


def selected(name: str, device: str) -> tuple[str, str]:
    """Which of :func:`implementations` ``torch.ops.memlm.<name>`` runs on a type of device; and why it
    is the reference, if it is."""
    if device == "cpu":
        return "cpp", ""
    if device != "cuda":
        return "reference", f"memlm has no kernels for {device}"
    kernel = next(iter(_cuda_kernels[name]), None)
    return (kernel, "") if kernel else ("reference", _cuda.unavailable() or f"{name} has no CUDA kernel")


def implementations(name: str, device: str = "cpu") -> dict[str, Callable]:
    """Every callable that executes op ``name`` on ``device``, by name: the plain-torch
    ``reference``, and the kernels that can run in this process, of which ``torch.ops.memlm.<name>``
    takes the first.  All take its arguments."""
    if name not in _references:
        raise ValueError(f"name: got {name!r}, the operations are {sorted(_references)}")
    found = {"reference": _references[name]}
    if device == "cpu":
        found["cpp"] = getattr(torch.ops.memlm, name).default
    if device == "cuda":
        found |= _cuda_kernels[name]
    return found
