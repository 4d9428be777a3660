"""The planner: each term against what torch really holds, the whole against measured peaks."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import memlm
from benchmarks.bench_plan import SYNTHETIC, Case, compare, infer, largest, random, train
from memlm import cli, data, picture, plan, workload
from memlm.kv_cache import PagedKVCache
from memlm.models.decoder import Decoder
from memlm.models.load import build
from memlm.plan import Settings

from . import sparse

DECODER = {
    "model_type": "qwen2", "vocab_size": 1001, "hidden_size": 96, "intermediate_size": 200,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 1500, "tie_word_embeddings": True,
}  # fmt: skip
ENCODER = {
    "model_type": "bert", "vocab_size": 1001, "hidden_size": 96, "intermediate_size": 200,
    "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 500,
    "type_vocab_size": 2,
}  # fmt: skip
UNTIED = {**DECODER, "tie_word_embeddings": False}
CONFIGS = {"decoder": DECODER, "encoder": ENCODER, "untied": UNTIED}
BATCH, CONTEXT = 4, 64


def made(config, settings):
    model = random(config).to(torch.float32 if settings.packed else settings.floats)
    if settings.packed:
        memlm.quantize_(model, workload.quantization(settings), strict=True)
        model.to(settings.floats)
    return workload.prepare_(model, settings)


def memory_of(config, settings):
    model = build(config)
    kind = plan._DecoderMemory if isinstance(model, Decoder) else plan._EncoderMemory
    return kind(model, settings)


def nbytes(tensors):
    """Each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("format", ["block/int4", "block/f32", "2:4/int4", "unstructured/nf4"])
def test_weights_of_pruned_layers(format):
    for sparsity in (0.5,) if "2:4" in format else (0.3, 0.9):
        settings = Settings(8, format=format, sparsity=sparsity)
        model = sparse.prune_(random(DECODER), format, 1 if "2:4" in format else 1 - sparsity)
        memlm.quantize_(model, workload.quantization(settings), strict=True)
        found = nbytes([*model.parameters(), *model.buffers()])
        # Which blocks are zero is drawn, of some 20 or 50 for each matrix, or which weights.
        within = 0.15 if "block" in format else 0.01
        assert abs(memory_of(DECODER, settings).weights - found) <= within * found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        Settings(8),
        Settings(8, format="bfloat16"),
        Settings(8, format="int4"),
        Settings(8, format="int2a-g128", embedding="int8-row"),
        Settings(8, format="ternary", embedding="float", dtype="bfloat16"),
        Settings(8, format="int4-g64", train="lora", rank=5),
    ],
    ids=lambda s: s.format,
)
def test_weights_to_the_byte(config, settings):
    model = made(config, settings)
    assert memory_of(config, settings).weights == nbytes([*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("optimizer", plan.OPTIMIZERS)
@pytest.mark.parametrize("how", plan.TRAIN)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_and_optimizer_states_to_the_byte(config, how, optimizer):
    settings = Settings(8, 2, "float32", train=how, optimizer=optimizer)
    model = made(config, settings)
    stepper = workload.run(model, settings)
    states = [t for state in stepper.state.values() for t in state.values() if torch.is_tensor(t)]
    expected = memory_of(config, settings)
    assert expected.optimizer == nbytes(states)
    assert expected.gradients == nbytes(p.grad for p in model.parameters() if p.grad is not None)


TRAININGS = [
    Settings(CONTEXT, BATCH, format, train=how, checkpoint=checkpoint, **others)
    for format, how, others in (
        ("float32", "full", {}),
        ("bfloat16", "full", {}),
        ("float32", "lora", {}),
        ("int8", "lora", {}),
        ("int4", "lora", {"dtype": "bfloat16", "embedding": "float"}),
    )
    for checkpoint in (False, True)
]


@pytest.mark.parametrize(
    "settings", TRAININGS, ids=lambda s: f"{s.format}-{s.train}{'-checkpoint' * s.checkpoint}"
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_activations_are_what_autograd_saves(config, settings):
    model = made(config, settings)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept, saved = [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    ids = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        workload.loss(model, ids)
    m = memory_of(config, settings)
    rows, layers = BATCH * CONTEXT, config["num_hidden_layers"]
    each = rows * m.config.hidden_size * m.e if settings.checkpoint else m.saved_by_layer()
    expected = layers * each + m.saved_outside()
    extra = 3 * 8 * rows  # token ids, their types and labels
    if isinstance(model, Decoder):
        expected += rows * m.vocab * 4  # log-probabilities
        # Of a bf16 model the tables' slices are kept, converted; otherwise the tables.
        extra += m.rotary(CONTEXT)
    else:
        extra += 4 * (rows * 4 + 3 * BATCH * m.config.hidden_size)  # the first norm's; the vectors
    assert expected <= sum(saved.values()) <= expected + extra
    assert extra < 0.2 * m.saved_by_layer() * layers


@pytest.mark.parametrize("prompt, context", [(1, 1), (5, 300), (256, 257), (700, 701), (300, 1500)])
def test_the_cache_grows_as_predicted(prompt, context, monkeypatch):
    full, grow = [0], PagedKVCache._grow

    def counted(cache, count):
        full.append(cache.count)
        grow(cache, count)

    monkeypatch.setattr(PagedKVCache, "_grow", counted)
    settings = Settings(context, 2, "bfloat16", prompt=prompt)
    cache = workload.run(made(DECODER, settings), settings)
    expected = memory_of(DECODER, settings)
    assert cache.used_blocks == expected.blocks(context) and full[-1] == expected.growth()
    predicted = largest(plan.predict(DECODER, settings), "kv_cache")
    runs = 3 * 2  # layers, key-value heads
    assert cache.used_bytes <= predicted <= cache.used_bytes + runs * 4096


PEAKS = {
    "f32": infer("llama-768", 4, 512, "float32"),
    "int4, one by one": infer("llama-768", 8, 530, "int4", prompt=500),
    "encoder": infer("bert-512", 16, 256, "float32"),
    "full": train("llama-768", 2, 256, "float32"),
    "8-bit moments": train("llama-768", 2, 256, "float32", optimizer="adamw_8bit"),
    "bf16, checkpointed": train("llama-768", 4, 256, "bfloat16", checkpoint=True),
    "lora": train("llama-768", 2, 256, "int4", "lora"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def check(case: Case, work):
    predicted, found = compare(case, work)
    for part in ("weights", "kv_cache", "gradients", "optimizer"):
        expected = largest(predicted, part)
        assert abs(expected - found[part]) <= 0.05 * found[part], part
    grown = found["peak"] - found["base"]
    assert 0.9 * grown <= predicted.total <= 1.1 * grown, predicted.to_dict()
    return found["base"]


@pytest.mark.parametrize("case", PEAKS.values(), ids=PEAKS)
def test_peaks(case, work):
    check(case, work)


@pytest.mark.models
def test_peak_of_smollm2_and_base(work):
    case = infer("SmolLM2", 2, 512, "int4")
    measured, base = check(case, work), plan.base(DECODER, case.settings)
    # Two processes differ by what their libraries find in memory, and where.
    assert abs(base - measured) < 0.03 * measured
    assert plan.predict(DECODER, case.settings, base).parts["base"] == base


def total(settings, config=SYNTHETIC["llama-768"]):
    return plan.predict(config, settings).total


def test_what_is_given_up_first():
    config, asked = SYNTHETIC["llama-768"], Settings(2048, 8, train="lora")

    def best(ram):
        chosen = plan.recommend(config, asked, ram).chosen
        return chosen and chosen.settings

    assert best(10**12) == asked
    checkpointed = replace(asked, checkpoint=True)
    assert best(total(asked) - 1) == checkpointed
    bf16 = replace(asked, format="bfloat16")
    assert total(bf16) > total(checkpointed)  # so that it is skipped
    last = min(
        (replace(asked, format=f, checkpoint=c) for f in plan.FORMATS for c in (False, True)),
        key=total,
    )
    found = best(total(last) - 1)
    assert (found.context, found.batch) == (2048, 4)
    least = plan.recommend(config, asked, 1)
    assert least.chosen is None
    assert (least.smallest.settings.context, least.smallest.settings.batch) == (plan.MIN_CONTEXT, 1)
    assert best(least.smallest.total) == least.smallest.settings
    assert "nothing fits" in picture.conclusion(least)


def test_parts_follow_the_settings():
    one, four = (plan.predict(DECODER, Settings(512, batch)) for batch in (1, 4))
    assert four.parts["kv_cache"] == 4 * one.parts["kv_cache"]
    assert four.parts["weights"] == one.parts["weights"]
    assert one.total == max(sum(moment.values()) for moment in one.moments.values())


@pytest.mark.parametrize(
    "text, value",
    [("8GB", 8e9), ("8 GiB", 2**33), ("512MB", 512e6), ("1.5g", 1.5e9), ("1e9", 1e9), ("7", 7)],
)
def test_parse_bytes(text, value):
    assert plan.parse_bytes(text) == value


REFUSED = {
    "ram": (lambda: plan.parse_bytes("much"), ValueError, "ram: got 'much'"),
    "context": (lambda: Settings(0), ValueError, "context: got 0"),
    "prompt": (lambda: Settings(8, prompt=9), ValueError, "prompt: got 9"),
    "train": (lambda: Settings(8, train="half"), ValueError, "train: got 'half'"),
    "optimizer": (lambda: Settings(8, optimizer="lion"), ValueError, "optimizer: got 'lion'"),
    "format": (lambda: Settings(8, format="int3"), ValueError, "format: got 'int3'"),
    "dtype": (lambda: Settings(8, dtype="int8"), ValueError, "dtype: got 'int8'"),
    "frozen": (lambda: Settings(8, format="int4", train="full"), ValueError, "packed weights"),
    "sparsity": (lambda: Settings(8, sparsity=1.5), ValueError, "sparsity: got 1.5"),
    "sparse, trained": (lambda: Settings(8, format="block/int4", train="lora"), ValueError, "for dense ones"),
    "sparse embedding": (lambda: Settings(8, format="int4", embedding="2:4/int4"), ValueError, "format: got"),
    "positions": (lambda: plan.predict(DECODER, Settings(9999)), ValueError, "context: got 9999"),
    "config": (lambda: plan.predict({"model_type": "x"}, Settings(8)), memlm.FormatError, "'x'"),
    "nowhere": (lambda: plan.read_config("nowhere"), FileNotFoundError, "nowhere"),
}


@pytest.mark.parametrize("call, error, message", REFUSED.values(), ids=REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_configs_from_everywhere(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DECODER))
    assert plan.read_config(tmp_path) == plan.read_config(tmp_path / "config.json") == DECODER
    text = ",".join(f"{key}={value}" for key, value in ENCODER.items())
    assert plan.read_config(text) == ENCODER


@pytest.mark.models
def test_config_of_a_gguf_file():
    config = plan.read_config(data.smollm2_gguf())
    assert plan.predict(config, Settings(512)).parts["weights"] == 538_060_032


def test_command(tmp_path, monkeypatch):
    from matplotlib.image import imread

    monkeypatch.setattr(plan, "base", lambda config, settings: 100_000_000)
    (tmp_path / "config.json").write_text(json.dumps(SYNTHETIC["llama-768"]))
    arguments = ["plan", str(tmp_path), "--ram", "250MB", "--context", "1024", "--batch", "2"]
    plot = tmp_path / "plan.png"
    done = CliRunner().invoke(cli.app, [*arguments, "--plot", str(plot), "--json", "-"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert [x["settings"]["format"] for x in result["tried"]] == list(plan.FORMATS)
    fits = [x for x in result["tried"] if x["total"] <= 250e6]
    assert result["chosen"] == fits[0] and len(fits) < len(result["tried"])
    for x in result["tried"]:
        assert x["total"] == sum(x["parts"].values()) and x["parts"]["base"] == 100_000_000
    image = imread(plot)
    blue = abs(image[:, :, :3] - torch.tensor([0x1F, 0x77, 0xB4]).numpy() / 255).max(-1) < 0.01
    assert image.shape[1] > 800 and blue.sum() > 1000  # the weights' bars
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert "KV cache" in done.stdout and "recommended: bfloat16" in done.stdout, done.stdout
