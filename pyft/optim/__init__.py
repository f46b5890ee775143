"""AdamW, Lion and SGD with momentum whose states take 8 bits an element.

States of parameters of 4096 elements and more are coded in blocks of 256 (uint8 codes and an fp32
absmax: 2.03 bytes an element for AdamW instead of 8); smaller ones stay fp32. Arithmetic is fp32.
The equations, the coding and the sources are in ``pyft.reference.optim``.

A step on a GPU is one launch for all parameters of one group, device, dtype and step count (how
often a parameter has been stepped). With ``paged=True`` those with coded states are launched apart
from the others, once for each page.

- A state that is exactly 0 stays so: a parameter that never had a gradient moves by weight decay
  only.
- A block of 256 elements (in row-major order) where a gradient is infinite or NaN, or a new state
  would be, is not stepped: its parameters and states stay as they were, the other blocks go on.
- ``paged=True`` keeps the coded states of CUDA parameters in pinned host memory and streams them
  through the GPU at each step (``pyft.optim.paging``). Parameters on a CPU have theirs in host
  memory anyway, and it changes nothing. It is a choice of the place, not part of what a state dict
  says: loading one keeps what the optimizer was made with.
"""

from typing import Any

from pyft.errors import UsageError
from pyft.ops.optim import Rule, adamw_rule, lion_rule, sgd_rule
from pyft.optim.base import Optimizer8bit, Params

__all__ = ["AdamW8bit", "Lion8bit", "SGD8bit"]


class AdamW8bit(Optimizer8bit):
    """AdamW with 8-bit states; follows ``torch.optim.AdamW`` but for the states' coding.

    Args:
        params: parameters, or dicts of groups; fp32, bf16 or fp16, gradients of the same dtype.
        lr: the learning rate, a number.
        betas: how much of the first and the second moment a step keeps.
        eps: added to the root of the second moment; above 0.
        weight_decay: decoupled from the gradient.
        maximize: step along the gradient instead of against it.
        paged: keep coded states of CUDA parameters in pinned host memory.

    Raises:
        UsageError: a hyperparameter out of range, a parameter that is not of these dtypes.

    Sources: Loshchilov and Hutter, Decoupled Weight Decay Regularization (2019); Dettmers et al.,
    8-bit Optimizers via Block-wise Quantization (2022).
    """

    STATES = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        paged: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "maximize": maximize, "paged": paged})

    def _check(self, group: dict[str, Any]) -> None:
        self._check_common(group)
        self._check_betas(group["betas"])
        self._check_range("eps", group["eps"], 1e-30, 1e30, "above 0 (1e-30 at least)")

    def _rule(self, group: dict[str, Any], step: int) -> Rule:
        names = ("lr", "betas", "eps", "weight_decay", "maximize")
        return adamw_rule(step, *(group[name] for name in names))


class Lion8bit(Optimizer8bit):
    """Lion with an 8-bit state.

    Args:
        params: parameters, or dicts of groups; fp32, bf16 or fp16, gradients of the same dtype.
        lr: the learning rate, a number; each element moves by it.
        betas: how much of the state the direction and the new state keep.
        weight_decay: decoupled from the gradient.
        maximize: step along the gradient instead of against it.
        paged: keep coded states of CUDA parameters in pinned host memory.

    Raises:
        UsageError: a hyperparameter out of range, a parameter that is not of these dtypes.

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms (2023).
    """

    STATES = ("exp_avg",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        paged: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "maximize": maximize, "paged": paged})

    def _check(self, group: dict[str, Any]) -> None:
        self._check_common(group)
        self._check_betas(group["betas"])

    def _rule(self, group: dict[str, Any], step: int) -> Rule:
        return lion_rule(group["lr"], group["betas"], group["weight_decay"], group["maximize"])


class SGD8bit(Optimizer8bit):
    """SGD with momentum in 8 bits; follows ``torch.optim.SGD`` but for the state's coding.

    Args:
        params: parameters, or dicts of groups; fp32, bf16 or fp16, gradients of the same dtype.
        lr: the learning rate, a number.
        momentum: how much of the state a step keeps; above 0, or there is no state to code.
        dampening: how much of a gradient is left out of the state, from the second step on.
        weight_decay: times the parameter, added to the gradient.
        nesterov: look ahead along the momentum; dampening is then 0.
        maximize: step along the gradient instead of against it.
        paged: keep coded states of CUDA parameters in pinned host memory.

    Raises:
        UsageError: a hyperparameter out of range, a parameter that is not of these dtypes.
    """

    STATES = ("momentum_buffer",)

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        paged: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {**defaults, "maximize": maximize, "paged": paged})

    def _check(self, group: dict[str, Any]) -> None:
        self._check_common(group)
        text = "above 0 and below 1 (without momentum use torch.optim.SGD)"
        self._check_range("momentum", group["momentum"], 1e-30, 1, text)
        self._check_range("dampening", group["dampening"], 0, 1, "from 0 to below 1")
        if group["nesterov"] and group["dampening"] != 0:
            raise UsageError("SGD8bit: nesterov needs dampening=0")

    def _rule(self, group: dict[str, Any], step: int) -> Rule:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        return sgd_rule(step, *(group[name] for name in names))
