"""Copies the kernels and their tests with what g++ cannot take replaced.

    python3 translate.py REPOSITORY FOLDER FILE...

A FILE is a path in the repository; its copy has the same path in FOLDER, `.cpp` appended to `.cu`. Three things change,
within their lines: shared memory, dynamic or in variables, launches with <<<>>> (of the tests' own kernel), and PTX
outside of csrc/device, by the table below. Whatever of these is left over is an error.
"""

import re
import sys
from pathlib import Path

DYNAMIC_SHARED = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];")
SHARED = re.compile(r"(?<!extern )__shared__ (?:alignas\(\d+\) )?([^;]+);")
DIMENSIONS = r"((?:\[[^\]]*\])*)"
FIRST_DECLARATOR = re.compile(rf"(.+?) (\w+){DIMENSIONS}((?:, \w+{DIMENSIONS})*)$")
DECLARATOR = re.compile(rf", (\w+){DIMENSIONS}")
LAUNCH = re.compile(r"(\w+)<<<(.*?)>>>\(")
PTX = re.compile(r"asm(?: volatile)?\s*\((.*?)\);", re.DOTALL)
LEFT_OVER = re.compile(r"__shared__|<<<|\basm\b")

# An instruction, and C++ for the statements that have it, by the names of their operands.
INSTRUCTIONS = {
    # block_attention/merge.cu
    "mul.wide.s32": "product = int64_t{x} * y;",
    # block_attention/partial_row.cuh
    "@reads ld.global": "if (reads) memcpy(&upper, own, 8), memcpy(&bytes, own_bytes, 4);",
    "ld.shared.v2.b32": 'memcpy(&upper, emulator::settled(row + 8 * lane, 8, "ld.shared"), 8);',
    "ld.shared.b32": 'memcpy(&bytes, emulator::settled(row + 2 * head_dim + 4 * lane, 4, "ld.shared"), 4);',
    # tests/cpp/gpu.h: what a late kernel is is known by its launch
    "griddepcontrol.launch_dependents": ";",
}


def translate(name: str, text: str) -> str:
    def replace_shared(match: re.Match) -> str:
        first = FIRST_DECLARATOR.match(match[1])
        if not first:
            sys.exit(f"{name}: not translated: {match[0]}")
        variables = [(first[2], first[3]), *DECLARATOR.findall(first[4])]
        one = 'auto& {0} = emulator::shared_variable<{1}{2}>("{0}", __LINE__);'
        return " ".join(one.format(variable, first[1], dimensions) for variable, dimensions in variables)

    def replace_ptx(match: re.Match) -> str:
        for instruction, code in INSTRUCTIONS.items():
            if instruction in match[1]:
                return code
        sys.exit(f"{name}: no C++ for this PTX, add it to INSTRUCTIONS of {__file__}:\n{match[0]}")

    text = DYNAMIC_SHARED.sub(r"auto* \2 = static_cast<\1*>(emulator::dynamic_shared());", text)
    text = SHARED.sub(replace_shared, text)
    text = LAUNCH.sub(r"emulator::launch_late(\1, \2, ", text)
    text = PTX.sub(replace_ptx, text)
    for number, line in enumerate(text.splitlines(), 1):
        if LEFT_OVER.search(line.split("//")[0]):
            sys.exit(f"{name}:{number}: not translated: {line.strip()}")
    return text


def main() -> None:
    repository, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for name in sys.argv[3:]:
        source, copy = repository / name, folder / (name + ".cpp" if name.endswith(".cu") else name)
        text = f'#line 1 "{source}"\n' + translate(name, source.read_text())
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:  # else nothing is compiled again
            copy.write_text(text)


if __name__ == "__main__":
    main()
