"""What a run of tests/cpp/check.cpp must have printed."""

OPERATIONS = (
    "adamw_8bit", "attention", "attention_backward", "block_sparse_grad_values",
    "block_sparse_grad_x",
    "block_sparse_matmul accurate", "block_sparse_matmul fast", "decoder_layers", "dequantize",
    "embedding", "kv_append", "largest_magnitude", "matmul_topk", "paged_attention",
    "quantize_rows", "quantize_weight", "w2_matmul accurate", "w2_matmul fast",
    "w4_matmul accurate", "w4_matmul fast", "w4_sparse_matmul accurate", "w4_sparse_matmul fast",
    "w8_matmul accurate", "w8_matmul fast", "w8a8_matmul groups", "w8a8_matmul rows",
)  # fmt: skip


def assert_all_checked(output: str, isas: list[str]) -> None:
    """The best of ``isas`` was chosen, and every operation was compared on each of them."""
    first, *lines = output.splitlines()
    assert first == f"{isas[0]}: {' '.join(isas)}"
    compared = {name: int(results) for name, results in (line.split(": ") for line in lines)}
    assert set(compared) == {f"{isa} {operation}" for isa in isas for operation in OPERATIONS}
    assert min(compared.values()) > 10_000
