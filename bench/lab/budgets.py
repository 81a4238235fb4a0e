"""Registers that a thread of each kernel may use, as the launch configurations state and explain them."""

from __future__ import annotations

from masked_loss_triton.kernels.operands import LossLaunch
from masked_loss_triton.kernels.weights import WeightsLaunch

REGISTERS = {
    "loss_kernel": LossLaunch.scattered,
    "weights_kernel": WeightsLaunch.registers,
    "resample_kernel": WeightsLaunch.registers,
}
