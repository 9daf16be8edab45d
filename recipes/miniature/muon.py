"""Muon for the matrices inside a small model: updates are the momentum with all singular values set to one.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; updates are scaled to the size
of AdamW's as in Liu et al. 2025, "Muon is scalable for LLM training". `torch.optim.Muon` computes one
matrix at a time and reads the rate on the host, which a CUDA graph would freeze: here all matrices of a shape
are one batch, and the rate is a tensor. Its bf16 arithmetic on CPUs would change the results, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Coefficients of Jordan's quintic: five rounds bring singular values near 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
UPDATE_SIZE = 0.2  # root mean square of an update of rate 1, about AdamW's
# Matrices that read inputs, write outputs or set norms: AdamW's, as is usual.
NOT_HIDDEN = ("embed", "_in.", "proj_out", "norm_out", "_mod.", "time_text", "lm_head")


def is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix between hidden states."""
    return parameter.ndim == 2 and not any(part in name for part in NOT_HIDDEN)


class Muon:
    """Momentum and updates of matrices; `rate` is a tensor on the device, nothing synchronises."""

    def __init__(
        self, parameters: list[nn.Parameter], rate: Tensor, weight_decay: float, momentum: float = 0.95
    ) -> None:
        self.parameters, self.rate = parameters, rate
        self.weight_decay, self.momentum = weight_decay, momentum
        self.moments = [torch.zeros_like(p) for p in parameters]
        self._alike: dict[tuple[int, ...], list[int]] = {}
        for index, p in enumerate(parameters):
            self._alike.setdefault(tuple(p.shape), []).append(index)

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        if not self.parameters:
            return
        gradients = [p.grad for p in self.parameters]
        torch._foreach_mul_(self.moments, self.momentum)
        torch._foreach_add_(self.moments, gradients)
        ahead = torch._foreach_add(gradients, self.moments, alpha=self.momentum)  # Nesterov's look ahead
        kept = 1 - self.rate * self.weight_decay
        for shape, indices in self._alike.items():
            size = self.rate * (UPDATE_SIZE * max(shape) ** 0.5)
            updates = orthogonal(torch.stack([ahead[index] for index in indices])) * size
            for index, update in zip(indices, updates.unbind(0), strict=True):
                self.parameters[index].mul_(kept).sub_(update)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, about: (N, R, C) float32, by Newton-Schulz."""
    a, b, c = QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    is_tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if is_tall else x
    x = x / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7).to(x.dtype)
    for _ in range(ROUNDS):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return (x.transpose(1, 2) if is_tall else x).float()
