"""Packed models through transformers' from_pretrained and save_pretrained."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BertModel,
    GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM,
)  # fmt: skip

import memlm
from memlm import FormatError, QuantConfig, formats
from memlm.layers import Embedding, Linear, PackedModule
from memlm.memory import file_mapping
from tests import tiny

ROOT = Path(__file__).parent.parent
IDS = torch.arange(18).reshape(2, 9)
CONFIG = QuantConfig("int4", embedding="int8", head="int8")
SETTINGS = {"linear": "int4", "embedding": "int8", "head": "int8"}


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def packed_parts(model) -> dict[str, torch.Tensor]:
    return {
        name: t for name, t in model.state_dict().items() if name.endswith((".codes", ".scales"))
    }


def edit(folder: Path, change) -> None:
    """Changes the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def llama(tmp_path):
    """A packed tiny Llama with a tied head, and its folder."""
    model = tiny.llama(tmp_path / "float", tie_word_embeddings=True)
    memlm.quantize_(model, CONFIG)
    model.save_pretrained(tmp_path / "packed")
    return model, tmp_path / "packed"


@pytest.mark.parametrize("tied", [True, False])
def test_from_pretrained_gives_packed_layers_and_save_pretrained_the_same_files(tmp_path, tied):
    model = memlm.quantize_(tiny.llama(tmp_path / "float", tie_word_embeddings=tied), CONFIG)
    model.save_pretrained(tmp_path / "packed")
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info.values())
    head, embedding = back.lm_head, back.model.embed_tokens
    assert isinstance(head, Linear) and isinstance(embedding, Embedding)
    assert (head.codes is embedding.codes) is tied
    assert torch.equal(tiny.logits(back, IDS), tiny.logits(model, IDS))
    assert back.generate(IDS, max_new_tokens=3).shape == (2, 12)
    back.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "packed")
    back.tie_weights()
    assert (head.codes is embedding.codes) is tied


def test_the_files_names_shapes_and_types(llama):
    model, folder = llama
    tensors = load_file(folder / "model.safetensors")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    specs = memlm.layer_specs(model)
    assert quantization == {"quant_method": "memlm", "version": 2, "layers": specs}
    assert specs["lm_head"]["tied_to"] == "model.embed_tokens"
    wanted = {name for name in model.state_dict() if "norm" in name}
    for name, spec in specs.items():
        if "tied_to" in spec:
            continue
        parts = formats.layout(memlm.Format.parse(spec["format"]), spec["n"], spec["k"])
        for part, (shape, dtype) in parts.items():
            stored = tensors[f"{name}.{'weight' if part == 'codes' else part}"]
            assert (tuple(stored.shape), stored.dtype) == (shape, dtype)
            assert torch.equal(stored, getattr(model.get_submodule(name), part))
            wanted.add(f"{name}.{'weight' if part == 'codes' else part}")
    assert set(tensors) == wanted


def test_other_architectures_biases_and_formats(tmp_path):
    bert = memlm.quantize_(tiny.bert(tmp_path / "bert"), QuantConfig("nf4", embedding="int8-row"))
    bert.save_pretrained(tmp_path / "packed")
    back = AutoModel.from_pretrained(tmp_path / "packed")
    assert isinstance(back, BertModel)
    assert back.encoder.layer[0].output.dense.bias.abs().sum() > 0
    assert torch.equal(back(IDS).pooler_output, bert(IDS).pooler_output)

    sizes = dict(vocab_size=256, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    gpt2 = tiny.save(GPT2LMHeadModel(GPT2Config(**sizes)), tmp_path / "gpt2")
    memlm.quantize_(gpt2, QuantConfig("int2-g64", embedding="int4a-g64", mode="accurate"))
    gpt2.save_pretrained(tmp_path / "packed2")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "packed2")
    layer = back.transformer.h[0].mlp.c_fc  # was a Conv1D
    assert isinstance(layer, Linear) and layer.mode == "accurate"
    assert torch.equal(tiny.logits(back, IDS), tiny.logits(gpt2, IDS))


def test_shards(llama, tmp_path):
    model, _ = llama
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(tiny.logits(back, IDS), tiny.logits(model, IDS))
    assert torch.equal(memlm.load(tmp_path / "shards").lm_head.codes, model.lm_head.codes)


def test_columns_in_an_order_of_their_own(llama, tmp_path):
    model, _ = llama
    mlp = model.model.layers[0].mlp
    order = torch.randperm(64, generator=torch.manual_seed(0)).int()
    mlp.up_proj = Linear(mlp.up_proj.packed, order=order)
    model.save_pretrained(tmp_path / "ordered")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ordered")
    assert torch.equal(back.model.layers[0].mlp.up_proj.order, order)
    assert torch.equal(tiny.logits(back, IDS), tiny.logits(model, IDS))
    edit(tmp_path / "ordered", lambda t: t["model.layers.0.mlp.up_proj.order"].fill_(3))
    with pytest.raises(FormatError, match="up_proj: order"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "ordered")


@pytest.mark.parametrize("tied", [True, False])
def test_memlm_and_transformers_read_each_others_folders(tmp_path, tied):
    tiny.llama(tmp_path / "float", tie_word_embeddings=tied)
    ours = memlm.quantize_(memlm.load(tmp_path / "float"), CONFIG)
    memlm.save(ours, tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert memlm.layer_specs(theirs).keys() >= {"lm_head", "model.layers.1.mlp.down_proj"}
    torch.testing.assert_close(tiny.logits(theirs, IDS), ours(IDS), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(memlm.load(tmp_path / "theirs")(IDS), ours(IDS))


def test_the_base_model_of_a_folder_and_a_head_on_one(tmp_path, llama):
    model, folder = llama
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base.layers[0].mlp.up_proj, Linear)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)

    memlm.quantize_(tiny.bert(tmp_path / "bert"), CONFIG).save_pretrained(tmp_path / "base")
    bert = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert isinstance(bert.bert.encoder.layer[0].attention.self.query, Linear)
    assert type(bert.classifier) is nn.Linear and torch.isfinite(bert.classifier.weight).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "auto", None])
def test_dtype_is_that_of_everything_but_the_packed_tensors(llama, dtype):
    model, folder = llama
    options = {} if dtype is None else {"dtype": dtype}
    back = AutoModelForCausalLM.from_pretrained(folder, **options)
    expected = dtype if isinstance(dtype, torch.dtype) else torch.float32
    assert back.dtype is expected and back.model.embed_tokens.dtype is expected
    assert back.lm_head.weight.dtype is expected and tiny.logits(back, IDS).dtype is expected
    for name, tensor in packed_parts(model).items():
        assert torch.equal(back.get_buffer(name), tensor)


def test_weights_are_used_where_the_file_is_mapped(llama):
    _, folder = llama
    model = AutoModelForCausalLM.from_pretrained(folder)
    tiny.logits(model, IDS)
    file = folder / "model.safetensors"
    mapping, (start, end) = file_mapping(file), _range_of(file)
    assert mapping.size >= file.stat().st_size and mapping.private == 0
    for tensor in packed_parts(model).values():
        assert start <= tensor.data_ptr() < end


def _range_of(file: Path) -> tuple[int, int]:
    """Addresses at which the process has mapped a file."""
    lines = [x for x in Path("/proc/self/maps").read_text().splitlines() if str(file) in x]
    ends = [int(end, 16) for line in lines for end in line.split()[0].split("-")]
    return min(ends), max(ends)


@pytest.mark.parametrize("settings", [SETTINGS, {"linear": "int8", "targets": {"re:.*up": "int2"}}])
@pytest.mark.parametrize("tied", [True, False])
def test_a_float_folder_is_quantised_while_it_loads(tmp_path, tied, settings):
    model = tiny.llama(tmp_path / "float", tie_word_embeddings=tied)
    config = memlm.hf.MemlmConfig(**settings)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, output_loading_info=True
    )
    assert not any(info.values())
    memlm.quantize_(model, QuantConfig(**settings))
    part = "codes" if isinstance(loaded.lm_head, Linear) else "weight"
    head, embedding = loaded.lm_head, loaded.model.embed_tokens
    assert (getattr(head, part) is getattr(embedding, part)) is tied
    assert torch.equal(tiny.logits(loaded, IDS), tiny.logits(model, IDS))
    loaded.save_pretrained(tmp_path / "loaded")
    model.save_pretrained(tmp_path / "packed")
    assert files(tmp_path / "loaded") == files(tmp_path / "packed")


def test_no_float_weight_waits_while_others_are_quantised(tmp_path, monkeypatch):
    tiny.llama(tmp_path, tie_word_embeddings=True)
    waiting = []

    class Counting(memlm.hf._Quantize):
        def convert(self, input_dict, model=None, **kwargs):
            rest = super().convert(input_dict, model=model, **kwargs)
            layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Embedding)]
            waiting.append(sum(not m.weight.is_meta for m in layers))
            return rest

    monkeypatch.setattr(memlm.hf, "_Quantize", Counting)
    config = memlm.hf.MemlmConfig(**SETTINGS)
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert waiting == [0] * (2 * 7 + 1)


def test_pages_of_weights_that_were_quantised_are_given_back(tmp_path):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    tiny.llama(tmp_path, tie_word_embeddings=True, **sizes)
    config = memlm.hf.MemlmConfig(**SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    mapping = file_mapping(tmp_path / "model.safetensors")  # the norms are still used there
    assert model.model.norm.weight.numel() == 512 and mapping.resident < mapping.size / 4


def test_a_state_dict_to_quantise_stays_as_it_is(tmp_path):
    model = tiny.llama(tmp_path, hidden_size=256)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = LlamaForCausalLM.from_pretrained(
        None, config=model.config, state_dict=state,
        quantization_config=memlm.hf.MemlmConfig(**SETTINGS),
    )  # fmt: skip
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(tiny.logits(loaded, IDS), tiny.logits(memlm.quantize_(model, CONFIG), IDS))


def test_what_is_not_to_be_quantised_stays_while_loading(tmp_path):
    tiny.bert(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, quantization_config={"quant_method": "memlm", "linear": "int8"}
    )
    assert isinstance(model.bert.encoder.layer[0].output.dense, Linear)
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding
    assert type(model.classifier) is nn.Linear  # new: there was no weight to quantise
    assert "embedding=None" in str(memlm.explain(model))


def test_bad_weights_are_refused_while_loading(tmp_path):
    tiny.llama(tmp_path, tie_word_embeddings=True)
    config = memlm.hf.MemlmConfig(**SETTINGS)
    edit(tmp_path, lambda t: t["model.layers.1.mlp.up_proj.weight"][3].fill_(torch.nan))
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    name = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path, lambda t: t.update({name: torch.ones(112, 32)}))
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, ignore_mismatched_sizes=True
        )
    edit(tmp_path, lambda t: t.update({name: torch.ones(112, 64)}))
    same = {
        "lm_head.weight": load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    }
    edit(tmp_path, lambda t: t.update(same))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert model.lm_head.codes is model.model.embed_tokens.codes
    edit(tmp_path, lambda t: t["lm_head.weight"].mul_(2).neg_())
    with pytest.raises(RuntimeError, match="conversion"):  # tied, and yet another weight
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("part", ["weight", "scales", "offsets"])
def test_a_missing_or_wrong_tensor_is_an_error(llama, part, ignore):
    _, folder = llama
    name = f"model.layers.1.mlp.up_proj.{part}"
    original = load_file(folder / "model.safetensors")[name]
    edit(folder, lambda t: t.pop(name))
    with pytest.raises(FormatError, match=f"up_proj: the file has no {part}"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=ignore)
    edit(folder, lambda t: t.update({name: original[:3].clone()}))
    error, match = (FormatError, "up_proj") if ignore else (RuntimeError, "ignore_mismatched_sizes")
    with pytest.raises(error, match=match):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=ignore)
    edit(folder, lambda t: t.update({name: original.float()}))
    with pytest.raises(FormatError, match="up_proj"):
        AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"version": 1}, "version 1"),
        ({"layers": [1]}, "layers is malformed"),
        ({"layers": {"lm_head": {"type": "Linear"}}}, "lm_head: malformed"),
        ({"layers": {"model.norm": {"n": 1, "k": 1}}}, "no such layer"),
    ],
)
def test_a_malformed_config_is_refused(llama, change, match):
    _, folder = llama
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tiny.edit_config(folder, quantization_config=config | change)
    with pytest.raises(FormatError, match=match):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_left_out_of_the_config_does_not_load(llama):
    _, folder = llama
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    del config["layers"]["model.layers.0.self_attn.q_proj"]
    tiny.edit_config(folder, quantization_config=config)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_model_may_be_saved_where_it_is_mapped_from(llama):
    model, folder = llama
    before = files(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.save_pretrained(folder)
    assert files(folder) == before
    assert torch.equal(tiny.logits(loaded, IDS), tiny.logits(model, IDS))


def test_dequantised_models_are_transformers_own_again(llama, tmp_path):
    model, folder = llama
    expected = memlm.dequantize_(model)
    assert not hasattr(expected, "hf_quantizer") and not hasattr(
        expected.config, "quantization_config"
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.dequantize()
    assert not any(isinstance(module, PackedModule) for module in loaded.modules())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(tiny.logits(again, IDS), tiny.logits(expected, IDS))


def run(script: str, *args) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True,
                          text=True, cwd=ROOT)  # fmt: skip


@pytest.mark.parametrize("first, second", [
    ("memlm", "transformers.quantizers"), ("memlm", "transformers.core_model_loading"),
    ("transformers.quantizers", "memlm"),
])  # fmt: skip
def test_the_order_of_imports_does_not_matter(first, second):
    script = f"""
import sys, warnings
warnings.simplefilter("error")
import {first}
heavy = {{"transformers", "torch", "memlm.hf"}} & set(sys.modules)
assert not heavy if {first == "memlm"} else True, heavy
import {second}
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known
assert known["memlm"] is sys.modules["memlm.hf"].MemlmQuantizer
"""
    done = run(script)
    assert done.returncode == 0, done.stderr


def test_a_version_that_is_too_old_goes_on_by_itself(tmp_path):
    package = tmp_path / "peft"
    (package / "tuners" / "lora").mkdir(parents=True)
    for folder in (package, package / "tuners", package / "tuners" / "lora"):
        (folder / "__init__.py").touch()
    (package / "tuners" / "lora" / "model.py").write_text("LoraModel = 1")
    script = """
import sys; sys.path.insert(0, sys.argv[1])
import memlm
from peft.tuners.lora.model import LoraModel
"""
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "memlm does not know this version of peft" in done.stderr


@pytest.mark.models
def test_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["Call me Ishmael.", "The sea was calm, and the ship lay still.", "A recipe for soup."]

    def encode(folder, **options):
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu", **options)
        return model, model.encode(texts, convert_to_tensor=True, batch_size=3)

    model, original = encode(memlm.data.minilm())  # bare: takes mean pooling by default
    model.save(str(tmp_path / "float"))
    memlm.quantize_(model, QuantConfig("int8", embedding="int8")).save(str(tmp_path / "packed"))
    loaded, embeddings = encode(tmp_path / "packed")
    assert sum(isinstance(module, PackedModule) for module in loaded.modules()) == 40
    config = memlm.hf.MemlmConfig(linear="int8", embedding="int8")
    _, quantised = encode(tmp_path / "float", model_kwargs={"quantization_config": config})
    assert torch.equal(embeddings, quantised)

    tokens = AutoTokenizer.from_pretrained(tmp_path / "packed")(
        texts, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        states = AutoModel.from_pretrained(tmp_path / "packed")(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    torch.testing.assert_close(embeddings, (states * mask).sum(1) / mask.sum(1))
    assert torch.cosine_similarity(embeddings, original).min() > 0.999


WITHOUT_MEMLM = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

OPTIONS = {}, {"dtype": "auto"}, {"dtype": torch.float16}, {"device_map": None}, \
    {"tie_word_embeddings": False}, {"disable_mmap": True}, {"use_safetensors": True}


def attempts(folder):
    auto = AutoModel if folder.name == "bert" else AutoModelForCausalLM
    for options in OPTIONS:
        yield options, lambda: auto.from_pretrained(folder, **options)
    config, state = AutoConfig.from_pretrained(folder), load_file(folder / "model.safetensors")
    model = auto.from_config(config)
    yield "state_dict", lambda: model.from_pretrained(None, config=config, state_dict=state)
    yield "strict", lambda: model.load_state_dict(state)
    yield "not strict", lambda: model.load_state_dict(state, strict=False)
    yield "assign", lambda: model.load_state_dict(state, strict=False, assign=True)


for folder in map(Path, sys.argv[1:]):
    for what, attempt in attempts(folder):
        try:
            attempt()
        except RuntimeError as error:
            assert "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error), error
            print(folder.name, what)
        else:
            raise SystemExit(f"{folder.name}: {what}: loaded")
assert "memlm" not in sys.modules
"""
# Whichever single layer is packed: no other's failure hides that it would have loaded.
ONLY = {
    "all": "", "linear": "q_proj", "narrow": "k_proj", "embedding": "embed_tokens",
    "tied": ("embed_tokens", "lm_head"), "head": "lm_head",
}  # fmt: skip


def test_a_process_without_memlm_fails_loudly(tmp_path):
    for name, ending in ONLY.items():
        tied = name in ("all", "tied")
        sizes = {**tiny.SIZES, "num_hidden_layers": 1, "tie_word_embeddings": tied}
        model = LlamaForCausalLM(LlamaConfig(**sizes))
        memlm.quantize_(model, CONFIG, lambda _, layer: layer.endswith(ending))
        assert len(memlm.layer_specs(model)) == {"all": 9, "tied": 2}.get(name, 1)
        model.save_pretrained(tmp_path / name)
    bert = tiny.bert(tmp_path / "float")
    memlm.quantize_(bert, CONFIG).save_pretrained(tmp_path / "bert")
    done = run(WITHOUT_MEMLM, *(tmp_path / name for name in (*ONLY, "bert")))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 7 * 11
