"""Prints, as one CMake list, what the build needs to know of the installed torch and of Python. Imports no torch."""

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path


def find_torch() -> Path | None:
    """The torch that Python would import; in an isolated build, the one of the environment that is installed into."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    installed = Path(sysconfig.get_paths()["purelib"]) / "torch"
    return installed if (installed / "include").exists() else None


def main() -> int:
    torch = find_torch()
    if torch is None:
        sys.stderr.write(f"mage: {sys.executable} must have torch (pip install 'torch>=2.11'), found none\n")
        return 1
    version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text()).group(1)
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 11):
        sys.stderr.write(f"mage: torch must be 2.11 or newer, got {version}\n")
        return 1
    python_include = Path(sysconfig.get_paths()["include"])
    pybind_include = ""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        pybind_include = pybind11.get_include()
    facts = [
        version,
        torch / "include",
        torch / "lib",
        python_include if (python_include / "Python.h").exists() else "",
        pybind_include,
        sysconfig.get_config_var("EXT_SUFFIX"),
    ]
    sys.stdout.write(";".join(str(fact) for fact in facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
