"""Folders of quantised checkpoints, and what their packed matrices must be."""

import json

import pytest
import torch
from hypothesis import strategies as st

from memlm import formats
from memlm.errors import FormatError
from memlm.io import safetensors
from memlm.io.huggingface import Folder
from memlm.io.quantized import open_quantized


def open_folder(path, quantization_config, tensors):
    """A folder of these tensors, opened by its quantization_config."""
    path.mkdir(exist_ok=True)
    config = {"quantization_config": quantization_config}
    (path / "config.json").write_text(json.dumps(config))
    safetensors.write(path / "model.safetensors", tensors, {})
    return open_quantized(Folder(path))


def assert_refused(path, quantization_config, sound, name, tensor):
    """That a folder of ``sound`` tensors with another m.<name> (None: without it) is refused for it."""
    tensors = {**sound, f"m.{name}": tensor}
    if tensor is None:
        del tensors[f"m.{name}"]
    for read in ("tensor", "packed"):
        with pytest.raises(FormatError, match=rf"m\.{name}: "):
            getattr(open_folder(path, quantization_config, tensors), read)("m.weight")


def read_mutated(path, data):
    """Changes a few bytes of a sound folder and reads it: nothing but FormatError may escape."""
    file = path / data.draw(st.sampled_from(["model.safetensors", "config.json"]))
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.sampled_from(b'0123456789"{}[],:-.eFBIU') | st.integers(0, 255))
    file.write_bytes(raw)
    try:
        folder = open_quantized(Folder(path))
        for name in folder.names():
            folder.tensor(name), folder.packed(name)
    except FormatError:
        pass


def assert_exact(stored, codes, scales, zeros, g_idx):
    """That the packed matrix holds the codes as they are, and is s (q - z) to the bit.

    codes: integers [n, k], not negative; scales, zeros: [n, groups]; g_idx: [k].
    """
    packed, order = stored.packed, stored.order
    inverse = torch.arange(packed.k)
    if order is not None:
        assert order.dtype == torch.int32
        inverse = order.long().argsort()
    q = formats.unpack(packed)[0].int() + (128 if packed.format.bits == 8 else 0)
    assert torch.equal(q[:, inverse], codes.int())
    exact = (codes.double() - zeros.double()[:, g_idx]) * scales.double()[:, g_idx]
    assert torch.equal(formats.dequantize(packed, torch.float64)[:, inverse], exact)


def assert_dequantised(tensor, codes, scales, zeros, g_idx):
    """That the f32 tensor is s (q - z), rounded once."""
    exact = (codes.double() - zeros.double()[:, g_idx]) * scales.double()[:, g_idx]
    assert tensor.dtype == torch.float32 and torch.equal(tensor, exact.float())


def offsets_round(scales, zeros):
    """Whether some -s z is no f32 number: for f16 and bf16 scales none is."""
    exact = scales.double() * zeros.double()
    rounds = not torch.equal(exact.float().double(), exact)
    assert scales.dtype == torch.float32 or not rounds
    return rounds
