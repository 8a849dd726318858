"""Small tensors on their way to a device."""

from __future__ import annotations

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU on a device, where CUDA allows it without waiting.

    From memory that is not pinned, CUDA copies only after all that the device has still to
    compute, and the caller waits for it.

    Args:
        tensor: Whatever it is; the caller does not change it afterwards.
        device: Where to; the tensor itself comes back for the CPU.
    """
    if device.type != "cuda":
        return tensor.to(device)
    # torch's allocator of pinned memory gives it to nobody else before the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)
