"""Small models with random weights, made and saved by transformers: the oracle."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

transformers.logging.disable_progress_bar()

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def save(model, folder, **settings):
    """Random weights of order 1 (transformers' own are so small that errors hide), eval, saved."""
    generator = torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = parameter.shape[1] ** -0.5 if "embed" not in name else 1.0
                parameter.normal_(0, scale, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    model = model.eval()
    model.save_pretrained(folder, **settings)
    return model


def llama(folder, cls=LlamaForCausalLM, config=LlamaConfig, **settings):
    return save(cls(config(**{**SIZES, **settings})), folder)


def bert(folder, cls=BertModel, **settings):
    sizes = {**SIZES, "type_vocab_size": 2, **settings}
    del sizes["num_key_value_heads"]
    return save(cls(BertConfig(**sizes)), folder)


def tokenizer(folder=None):
    """A byte-level tokenizer of 256 tokens: a token is a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if folder is not None:
        backend.save(str(folder / "tokenizer.json"))
    return backend


def edit_config(folder, **changes):
    """Changes config.json; None removes a key."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits
