"""Optimizers whose state is small."""

from __future__ import annotations

from itertools import chain

import torch

from memlm import dynamic_codes, ops
from memlm.dynamic_codes import BLOCK
from memlm.ops._matmul import X_DTYPES
from memlm.ops.adamw_8bit import check_hyperparameters, factors, update

MIN_8BIT_SIZE = 4096  # elements, as bitsandbytes has it


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (arXiv:1711.05101) with both moments in 8 bits (arXiv:2110.02861), in the place of
    ``torch.optim.AdamW``: 2.03 bytes of state for each parameter instead of 8.

    params: f32, bf16 or f16 tensors with gradients of their dtype, or groups of them as in torch.
    lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
    min_8bit_size: parameters of fewer elements keep f32 moments, 8 bytes for each element: norms and
        biases are few, and matter most.  A group may have its own: the paper keeps embeddings in f32.

    State of a parameter of n elements: ``step``, an int; ``exp_avg`` and ``exp_avg_sq``, uint8 of its
    shape, with ``exp_avg_absmax`` and ``exp_avg_sq_absmax``, f32 ``[ceil(n / 256)]``; or f32 of its
    shape alone.  :func:`memlm.ops.adamw_8bit` says how a step is computed: in f32 for every dtype,
    and rounded to the parameter's.

    Raises TypeError for sparse gradients and for other dtypes, ValueError for numbers out of range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        min_8bit_size: int = MIN_8BIT_SIZE,
    ):
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "min_8bit_size": min_8bit_size,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_hyperparameters(group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        for param in group["params"]:
            if param.dtype not in X_DTYPES:
                raise TypeError(f"params: got {param.dtype}, accepted are {X_DTYPES}")

    @torch.no_grad()
    def step(self, closure=None):
        """Changes all parameters that have a gradient.  Returns what ``closure()`` does, which is called
        first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, param.grad, numbers, group["min_8bit_size"])
        return loss

    def _step(self, param, grad, numbers, min_8bit_size: int) -> None:
        if grad.layout != torch.strided:
            raise TypeError(f"grad: got layout {grad.layout}, accepted are dense gradients")
        state = self.state[param]
        if not state:
            state.update(_new_state(param, min_8bit_size))
        state["step"] += 1
        dense = param.contiguous()  # param itself, unless its elements lie in another order
        if "exp_avg_absmax" in state:
            ops.adamw_8bit(
                dense, grad, state["exp_avg"], state["exp_avg_absmax"], state["exp_avg_sq"],
                state["exp_avg_sq_absmax"], *numbers, state["step"],
            )  # fmt: skip
        else:
            before = (dense.float(), grad.float(), state["exp_avg"], state["exp_avg_sq"])
            new, state["exp_avg"], state["exp_avg_sq"] = update(*before, factors(*numbers, state["step"]))
            dense.copy_(new)
        if dense is not param:
            param.copy_(dense)

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but every tensor of the state keeps its own dtype: torch casts them to that of
        their parameter."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, param in zip(numbers, params):
            if number in state_dict["state"]:
                self.state[param] = {
                    key: value.to(param.device) if isinstance(value, torch.Tensor) else value
                    for key, value in state_dict["state"][number].items()
                }


def state_bytes(numel: int, min_8bit_size: int = MIN_8BIT_SIZE) -> int:
    """Of the state of a parameter of so many elements."""
    if numel < min_8bit_size:
        return 2 * numel * 4
    return 2 * (numel + -(-numel // BLOCK) * 4)


def _new_state(param: torch.Tensor, min_8bit_size: int) -> dict:
    """Of moments of 0."""
    if param.numel() < min_8bit_size:
        like = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
        moments = (torch.zeros_like(param, **like) for _ in range(2))
        return {"step": 0, **dict(zip(("exp_avg", "exp_avg_sq"), moments))}
    like = {"dtype": torch.uint8, "memory_format": torch.contiguous_format}
    blocks = -(-param.numel() // BLOCK)
    return {
        "step": 0,
        "exp_avg": torch.full_like(param, dynamic_codes.SIGNED_ZERO, **like),
        "exp_avg_absmax": torch.zeros(blocks, dtype=torch.float32, device=param.device),
        "exp_avg_sq": torch.zeros_like(param, **like),
        "exp_avg_sq_absmax": torch.zeros(blocks, dtype=torch.float32, device=param.device),
    }
