"""Model families: configuration, one transformer, readers of weights and tokenizers.

Test: pytest tests/python/test_huggingface.py
"""

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from mage_ext.models.huggingface import LoadedModel


def load(
    path: "str | PathLike[str]",
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str" = "cpu",
    **overrides: Any,
) -> "LoadedModel":
    """A model in the box by its name, or the one in a Hugging Face folder.

    Args:
        path: of `models.builtin.names()`, or a folder; a folder of that name counts as a folder.
        dtype: torch dtype or its name; None: for those in the box float32, on CUDA bfloat16, else what config.json
            names. Generation on CUDA takes bfloat16 and float16.
        device: where the weights go.
        overrides: fields of ModelConfig, for folders; see `models.huggingface.load`.
    Raises:
        FileNotFoundError, ValueError: naming what is missing or wrong.
    """
    import os

    from mage_ext._arguments import check_device
    from mage_ext.models import builtin, huggingface

    is_path = isinstance(path, (str, PathLike))
    if is_path and str(path) not in builtin.names() and not os.path.exists(path):
        names = ", ".join(builtin.names())
        raise FileNotFoundError(
            f"load: path must be a folder with config.json or a model in the box ({names}), got {path}"
        )
    if not is_path or str(path) not in builtin.names() or os.path.exists(path):
        return huggingface.load(path, dtype, device, **overrides)
    if overrides:
        raise ValueError(f"load: overrides must not be given for {path}, got {', '.join(sorted(overrides))}")
    device = check_device("load", device)
    return builtin.load_builtin(None if dtype is None else huggingface.resolve_dtype(dtype), device, str(path))
