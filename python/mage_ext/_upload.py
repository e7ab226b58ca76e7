"""Numbers of the host as device tensors, without a wait for the device.

Test: pytest tests/python/test_denoise_cuda.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """torch.tensor(values) on `device`.

    torch.tensor(values, device="cuda") copies from pageable memory and returns when the device has done everything
    queued before; from pinned memory the copy is queued like a kernel.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)
