"""memlm.arrays with sparse matrices: the same bits as the torch ops, without torch; what it refuses."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import memlm
from memlm import FormatError, arrays, ops
from memlm.quantize import sparse_quantize

from . import tiny
from .sparse import prune_, random_weights
from .test_arrays import same
from .test_packaging import ROOT

# bf16 values need ml_dtypes in numpy; torch's tensors are taken where they lie.
FORMATS = ["block/int4a-g32", "block/int8-g32", "block/f32", "block/bf16", "2:4/int4-g32",
           "2:4/nf4-g64", "unstructured/int4-g64"]  # fmt: skip
formats = pytest.mark.parametrize("format", FORMATS)

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
from memlm import arrays
found = arrays.load(sys.argv[1])
up = found["model.layers.0.mlp.up_proj"]
assert isinstance(up, arrays.SparsePacked)
np.save(sys.argv[2], arrays.matmul(np.ones((3, 64), "f4"), up))
"""


def packed_of(format, n=40, k=72, density=0.5, seed=0):
    format = memlm.SparseFormat.parse(format)
    return sparse_quantize(random_weights(format, n, k, density, seed), format)


def as_arrays(packed):
    """Of numpy where numpy has the type, else of torch's tensors."""
    parts = {n: t if t.dtype == torch.bfloat16 else t.numpy() for n, t in packed.tensors().items()}
    return arrays.SparsePacked(packed.format, packed.n, packed.k, **parts)


@formats
@pytest.mark.parametrize("mode", ["fast", "accurate"])
def test_same_as_the_torch_op(format, mode):
    for m, n, k, density in ((1, 40, 72, 0.5), (5, 33, 129, 0.2), (0, 16, 32, 1.0), (3, 48, 64, 0.0)):
        packed, g = packed_of(format, n, k, density), torch.Generator().manual_seed(1)
        x, bias, norm, residual = (
            torch.randn(*shape, generator=g) for shape in ((m, k), (n,), (k,), (m, n))
        )
        expected = ops.matmul(x, packed, bias, mode, norm, 1e-5, residual=residual)
        around = {"norm": norm.numpy(), "eps": 1e-5, "residual": residual.numpy()}
        for given in (packed, as_arrays(packed)):
            assert same(arrays.matmul(x.numpy(), given, bias.numpy(), mode, **around), expected)
        assert same(arrays.matmul(x.numpy(), packed), ops.matmul(x, packed))
        out = residual.clone()
        assert arrays.matmul(x, packed, bias, mode, norm=norm, eps=1e-5, residual=out, out=out) is out
        assert torch.equal(out, expected)


def test_a_pruned_model_is_loaded_without_torch(tmp_path):
    prune_(tiny.llama(tmp_path / "float"), "block/int4").save_pretrained(tmp_path / "float")
    targets = {"re:.*down_proj": None, "re:.*up_proj": "block/f32"}
    memlm.quantize_files(tmp_path / "float", tmp_path / "packed",
                         memlm.QuantConfig("block/int4", "int8", targets=targets))  # fmt: skip
    found, file = arrays.load(tmp_path / "packed"), tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    gate = found["model.layers.1.mlp.gate_proj"]
    for part, name in (("codes", "weight"), ("places", "places"), ("starts", "starts")):
        array = getattr(gate, part)
        assert same(array.copy(), tensors[f"model.layers.1.mlp.gate_proj.{name}"])
        while not isinstance(array, np.memmap):
            array = array.base
        assert array.filename == file
    down = "model.layers.0.mlp.down_proj.weight"
    assert same(found[down].copy(), tensors[down]) and f"{down[:-7]}.places" not in found
    run = [sys.executable, "-c", WITHOUT_TORCH, tmp_path / "packed", tmp_path / "y.npy"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    up = memlm.load(tmp_path / "float").layers[0].mlp.gate_up_proj.weight[112:]
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "y.npy")), up.sum(1).expand(3, -1))


def test_folders_that_lie_are_refused(tmp_path):
    prune_(tiny.llama(tmp_path / "float"), "block/f32").save_pretrained(tmp_path / "float")
    memlm.quantize_files(tmp_path / "float", tmp_path / "packed", "block/f32")
    config, file = (tmp_path / "packed" / name for name in ("config.json", "model.safetensors"))
    text, name = config.read_text(), "model.layers.0.mlp.down_proj"
    settings = json.loads(text)
    settings["quantization_config"]["layers"][name]["format"] = "block/f16"
    config.write_text(json.dumps(settings))
    with pytest.raises(FormatError, match="layers are malformed.*block/f16|f16"):
        arrays.load(tmp_path / "packed")
    config.write_text(text)
    tensors = load_file(file)
    tensors[f"{name}.places"] += 4
    save_file(tensors, file)
    with pytest.raises(FormatError, match=f"{name}: places: of tile 0 do not ascend within 0 to 3"):
        arrays.load(tmp_path / "packed")


# Part, how it is changed, format, what is said.
LIES = [
    ("places", lambda a: a + 3, "block/int4", "places: of tile"),
    ("places", lambda a: a * 0, "block/f32", "places: of tile"),
    ("places", lambda a: a.astype(np.int64), "block/f32", "places: got int64, expected int32"),
    ("places", lambda a: None, "block/f32", "places: got None"),
    ("places", lambda a: a[:-1], "block/f32", "codes: got shape"),
    ("places", lambda a: a * 0, "2:4/int4", "places: must have p0 < p1"),
    ("places", lambda a: a | 255, "unstructured/int4", "places: has weights beyond the 40x72"),
    ("places", lambda a: a * 0, "unstructured/int4", "starts: must be the bytes"),
    ("places", lambda a: a[:, :-1], "unstructured/int4", "places: got shape"),
    ("starts", lambda a: a[::-1].copy(), "block/int4", "starts: must ascend from 0 to"),
    ("starts", lambda a: np.where(a == a[1], 2**60, a), "block/f32", "starts: number 1 is"),
    ("starts", lambda a: a + 1, "unstructured/int4", "starts: must ascend from 0 to"),
    ("starts", lambda a: a[1:], "unstructured/int4", "starts: got shape"),
    ("starts", lambda a: a.astype(np.int32), "block/f32", "starts: got int32"),
    ("codes", lambda a: a[:10], "unstructured/int4", "codes: got shape"),
    ("codes", lambda a: a[1:], "unstructured/int4", "starts: must ascend"),
    ("codes", lambda a: a.astype(np.float64), "block/f32", "codes: got float64"),
    ("scales", lambda a: None, "block/int4", "scales, offsets: are not those of"),
    ("offsets", lambda a: None, "block/int4", "scales, offsets: are not those of"),
    ("starts", lambda a: np.zeros(4, np.int64), "2:4/int4", "starts: got an array"),
]


@pytest.mark.parametrize("part, change, format, message", LIES)
def test_matrices_that_lie_are_refused(part, change, format, message):
    packed = packed_of(format)
    parts = {name: tensor.numpy() for name, tensor in packed.tensors().items()}
    with pytest.raises(FormatError, match=message):
        arrays.SparsePacked(packed.format, 40, 72, **parts | {part: change(parts.get(part))})


def test_operations_that_do_not_fit():
    blocks, pairs = packed_of("block/int4"), packed_of("2:4/int4")
    x = np.ones((2, 72), np.float32)
    for call, message in (
        (lambda: arrays.w4_matmul(x, blocks), "packed: is sparse"),
        (lambda: arrays.w8a8_matmul(x, None, blocks), "packed: is sparse"),
        (lambda: arrays.dequantize(pairs), "packed: is sparse"),
        (lambda: arrays.embedding(np.arange(2), pairs), "packed: is sparse"),
        (lambda: arrays.block_sparse_matmul(x, pairs), "packed: accepted are blocks"),
        (lambda: arrays.w4_sparse_matmul(x, blocks), "packed: accepted are 2:4 and unstructured"),
        (lambda: arrays.matmul(x, blocks, mode="w8a8"), "mode: got 'w8a8'"),
        (lambda: arrays.matmul(x[:, :71], blocks), "x: got shape"),
        (lambda: arrays.matmul(x, blocks, out=blocks.starts.numpy()[:2]), "out: got int64|out: got"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    dense = memlm.quantize_weight(torch.ones(40, 72), "int4")
    with pytest.raises(ValueError, match="packed: accepted are blocks"):
        arrays.block_sparse_matmul(x, dense)
