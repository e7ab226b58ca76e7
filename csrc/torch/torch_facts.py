"""Prints, as one CMake list, what the build needs to know of the installed torch and Python."""

import importlib.util
import os
import sys
import sysconfig


def main() -> int:
    try:
        import torch
    except ImportError as error:
        sys.stderr.write(f"torch cannot be imported by {sys.executable}: {error}\n")
        return 1
    version = torch.__version__
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < (2, 11):
        sys.stderr.write(f"torch must be 2.11 or newer, got {version}\n")
        return 1
    root = os.path.dirname(torch.__file__)
    python_include = sysconfig.get_paths()["include"]
    if not os.path.exists(os.path.join(python_include, "Python.h")):
        python_include = ""
    pybind_include = ""
    if importlib.util.find_spec("pybind11"):
        import pybind11

        pybind_include = pybind11.get_include()
    facts = [version, f"{root}/include", f"{root}/lib", python_include, pybind_include]
    facts.append(sysconfig.get_config_var("EXT_SUFFIX"))
    sys.stdout.write(";".join(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
