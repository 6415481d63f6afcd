"""Adam as Apex and Transformer Engine keep it, on torch's own kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) with one `step` per parameter group.

    torch.optim.AdamW counts steps per parameter. Megatron-Core's distributed optimizer saves `exp_avg` and
    `exp_avg_sq` by parameter and `step` by group, as Apex's and Transformer Engine's FusedAdam have them, and cannot
    checkpoint anything else. The update is torch's own fused kernel, so it equals torch.optim.AdamW.

    Parameters are floating point tensors of any shape, one dtype and device per group. Raises ValueError for the
    options of Apex's FusedAdam that are not AdamW.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        if not bias_correction or not adam_w_mode or amsgrad:
            raise ValueError(
                f"FusedAdam runs AdamW only; accepted: bias_correction=True, adam_w_mode=True, amsgrad=False, got "
                f"bias_correction={bias_correction}, adam_w_mode={adam_w_mode}, amsgrad={amsgrad}."
            )
        defaults = dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update every parameter that has a gradient; returns the loss of `closure` if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param)
                    state["exp_avg_sq"] = torch.zeros_like(param)
            if params:
                _update(params, [self.state[param] for param in params], group)
        return loss


def _update(params: list[torch.Tensor], states: list[dict[str, torch.Tensor]], group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    # The kernel counts up itself, one counter per parameter.
    steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device)
    adamw(
        params,
        [param.grad for param in params],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        max_exp_avg_sqs=[],
        state_steps=list(steps.unbind()),
        foreach=False,
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
