"""Block-diffusion attention with MAGE selection: operators under torch.ops.mage, and a small denoising loop on top.

Importing the package loads the operators into torch and initialises no device.
"""

from mage_ext import _library
from mage_ext._version import __version__

_library.load()

from mage_ext import ops  # noqa: E402  (needs the schemas that load() brings)

__all__ = ["__version__", "ops"]
