"""What the compiler makes of the shipped Triton kernels for a GPU that is not here.

In: nothing but triton, whose wheel carries the tools. Out: for every shipped configuration, in bf16, its
registers, spilled bytes, shared memory and matrix instructions (HGMMA on sm_90, HMMA on sm_80).

    for row in rows():
        print(row)  # {"kernel": "forward hd 64 128x64", "arch": "sm_90", "warps": 8, "registers": 128, ...}
"""
# SPDX-License-Identifier: MIT
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .choose import triton

AXES = {"sb": 3, "sl": 3, "sd": 3}  # strides in a stride tuple; 4 where the name is not here
POINTERS = {"BITS": "*i32", "KEEP": "*i1", "LSE": "*fp32", "DELTA": "*fp32"}  # others: bf16


def compile_kernel(kernel, arch: int, constants: dict, options: dict) -> tuple[bytes, int]:
    """The cubin that a launch on contiguous, aligned tensors gets, and its bytes of shared memory."""
    compiler, backends = (importlib.import_module(f"triton.{n}") for n in ("compiler", "backends.compiler"))
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[i,] = "constexpr", constants[name]
        elif name[0] == "s" and len(name) <= 3:
            last = (2 if name == "sk" and "KEEP" in kernel.arg_names else AXES.get(name, 4)) - 1
            signature[name], constexprs[i, last] = ("i32",) * last + ("constexpr",), 1
            attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(last) if last == 3}
        elif name.isupper() and name not in ("M", "N"):
            signature[name], attributes[i,] = POINTERS.get(name, "*bf16"), [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    done = compiler.compile(source, target=backends.GPUTarget("cuda", arch, 32), options=options)
    return done.asm["cubin"], done.metadata.shared


def dump(binary: bytes, tool: str, flag: str) -> str:
    """What a tool of triton's wheel says of a cubin."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([path, flag, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def jobs() -> Iterator[tuple]:
    """(name, arch, kernel, constants and launch options) of what ships."""
    names = "masked_attention", "pack_mask"
    attention, pack = (importlib.import_module(f"{__package__}.{name}") for name in names)
    for arch, family in ((90, "big"), (80, "small")):
        for size in attention.HEAD_SIZES:
            for step in attention.CONFIGS[family]:
                constants = attention.config(family, step, size)
                name = f"{step} hd {size} {constants['BM']}x{constants['BN']}"
                yield name, arch, getattr(attention, f"_{step}_kernel"), constants
        yield "pack_mask", arch, pack._pack_kernel, dict(WORDS=pack.WORDS, num_warps=4, num_stages=2)


def rows(only: str = "") -> Iterator[dict]:
    """A row for each configuration whose name holds `only`; none where triton is not installed."""
    for name, arch, kernel, constants in jobs() if triton else ():
        if only not in name:
            continue
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
        binary, shared = compile_kernel(kernel, arch, constants, options)
        usage, code = dump(binary, "cuobjdump", "-res-usage"), dump(binary, "nvdisasm", "-c")
        registers, *spills = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        yield {"kernel": name, "arch": f"sm_{arch}", "warps": options["num_warps"], "registers": registers,
               "spilled bytes": sum(spills), "shared KiB": round(shared / 1024, 1),
               "HGMMA": len(re.findall(r"\bHGMMA\b", code)), "HMMA": len(re.findall(r"\bHMMA\b", code))}
