"""Short training of what pruning left, on text or towards the model as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from memlm.models.decoder import Decoder
from memlm.prune.masks import Masks

BLOCK = 64  # positions whose logits are held at once: 12 MB for a vocabulary of 49,152
LARGEST = 1.0  # norm of all gradients together, beyond which they are scaled down


def recover_(
    model: Decoder,
    ids: Sequence[int],
    teacher: Decoder | None = None,
    *,
    steps: int,
    batch: int = 4,
    window: int = 256,
    lr: float = 1e-4,
    warmup: int | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[float]:
    """Trains the layers of ``model``, in place, on text whose token ids are ``ids``; zeros of its
    float linear layers stay zero, and so does what sparse layers do not store.

    teacher: the model before it was pruned, which stays as it is.  The loss is then the divergence
        KL(teacher || model) of the next token's probabilities (distillation, arXiv:1503.02531, at
        temperature 1), in nats per token; without a teacher the text's cross entropy.
    steps, batch, window: optimizer steps (AdamW), of so many windows of so many consecutive tokens
        each, from anywhere in the text.
    lr: the learning rate's highest value, after ``warmup`` steps (None: a tenth of all); it falls
        to 0 along a cosine.
    progress: called with (done, steps, loss) after each step; the model may be evaluated then.

    What is trained are the parameters of the layers that require gradients: those of float linear
    layers, of block-sparse ones with f32 or bf16 values, and norms.  Embedding and head stay, and
    may be packed.  Memory beyond the models, gradients and AdamW's two moments is that of one
    window's activations and 64 positions' logits, whatever the batch.

    Returns the loss of each step.  Raises TypeError for models that are no decoders, ValueError for
    a model with nothing to train, a teacher of another vocabulary, or a number out of range; the
    model is then unchanged.
    """
    for name, given in (("model", model), ("teacher", teacher)):
        if not isinstance(given, Decoder) and (name == "model" or given is not None):
            raise TypeError(f"{name}: got {type(given).__name__}, expected a Decoder")
    if teacher is model:
        raise ValueError("teacher: is the model itself")
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError("teacher: has another vocabulary than the model")
    longest = min(m.config.max_positions for m in (model, teacher) if m is not None)
    if not 2 <= window <= min(longest, len(ids)):
        raise ValueError(
            f"window: got {window}, accepted is 2 to {longest} and no more than the text's "
            f"{len(ids)} tokens"
        )
    warmup = max(1, steps // 10) if warmup is None else warmup
    for name, value in (("steps", steps), ("batch", batch), ("warmup", warmup)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, accepted are integers from 1 on")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: got {lr!r}, accepted is a positive number")
    trained = [p for p in model.layers.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("model: no parameter of its layers requires gradients")

    optimizer = torch.optim.AdamW(trained, lr, weight_decay=weight_decay, fused=True)
    masks = _hold_zeros(model, optimizer)
    others = [p for p in model.parameters() if p.requires_grad and all(p is not t for t in trained)]
    text = torch.as_tensor(ids)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * _share(step, steps, warmup)
            starts = torch.randint(len(text) - window + 1, (batch,), generator=generator).tolist()
            loss = 0.0
            for start in starts:
                loss += _backward(model, teacher, text[None, start : start + window], batch)
            nn.utils.clip_grad_norm_(trained, LARGEST)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
            if progress:
                progress(step + 1, steps, f"loss {loss:.4f}")
    finally:
        masks.remove()
        optimizer.zero_grad()
        for parameter in others:
            parameter.requires_grad_(True)
    return losses


def _share(step: int, steps: int, warmup: int) -> float:
    """Of the highest learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup + 1) / (steps - warmup + 1)))


def _hold_zeros(model: Decoder, optimizer: torch.optim.Optimizer) -> Masks:
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.layers.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    }
    pruned = {name: weight.detach() == 0 for name, weight in weights.items()}
    masks = Masks(optimizer, {name: weights[name] for name, zero in pruned.items() if zero.any()})
    for name in masks.weights:
        masks.hold(name, pruned[name])
    return masks


def _backward(model: Decoder, teacher: Decoder | None, ids: torch.Tensor, batch: int) -> float:
    """Adds the gradient of one window ``[1, length]`` of a batch; returns its part of the loss.

    The head goes through the positions BLOCK at a time, forward and backward; the layers' graph is
    gone through once, when the gradient of what left them is complete.
    """
    hidden = model.hidden(ids)[0]
    leaf, targets = hidden.detach().requires_grad_(), ids[0, 1:]
    known = None
    if teacher is not None:
        with torch.no_grad():
            known = teacher.hidden(ids)[0]
    positions = len(leaf) if teacher is not None else len(targets)
    loss = 0.0
    for start in range(0, positions, BLOCK):
        rows = slice(start, min(start + BLOCK, positions))
        logits = model.logits(leaf[rows])
        if known is None:
            part = F.cross_entropy(logits, targets[rows], reduction="sum")
        else:
            with torch.no_grad():
                wanted = teacher.logits(known[rows]).log_softmax(-1)
            found = logits.log_softmax(-1)
            part = F.kl_div(found, wanted, reduction="sum", log_target=True)
        part = part / (positions * batch)
        part.backward()
        loss += float(part.detach())
    hidden.backward(leaf.grad)
    return loss
