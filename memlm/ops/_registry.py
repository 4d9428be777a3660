"""Loading the native ops and listing what can execute them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from memlm.cpu import lib_path

torch.ops.load_library(str(lib_path().with_name("_torch.so")))

# op name -> plain-torch implementation with the op's signature
_references: dict[str, Callable] = {}


def define(name: str, reference: Callable, fake: Callable, backward=None, setup_context=None):
    """Adds to the C++ op ``memlm::<name>`` what torch needs beside a kernel: the shape function,
    the gradient, autocast, and the reference on devices that have no kernel."""
    qualified = f"memlm::{name}"
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    _references[name] = reference

    def slow(*args, **kwargs):
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        _warn_once(name, device.type)
        return reference(*args, **kwargs)

    torch.library.impl(qualified, ("CUDA", "XPU", "MPS"), slow)
    return getattr(torch.ops.memlm, name).default


_warned = set()


def _warn_once(name: str, device: str) -> None:
    if (name, device) not in _warned:
        _warned.add((name, device))
        warnings.warn(
            f"memlm.{name} has no kernel for {device}: running the slow reference in plain torch",
            stacklevel=3,
        )


def implementations(name: str, device: str = "cpu") -> dict[str, Callable]:
    """Every callable that executes op ``name`` on ``device``, by name: the plain-torch
    ``reference``, and the kernels.  All take the arguments of ``torch.ops.memlm.<name>``."""
    if name not in _references:
        raise ValueError(f"name: got {name!r}, the operations are {sorted(_references)}")
    found = {"reference": _references[name]}
    if device == "cpu":
        found["cpp"] = getattr(torch.ops.memlm, name).default
    return found
