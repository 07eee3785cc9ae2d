"""What the compiler makes of the shipped Triton kernels for a GPU that is not here.

In: nothing but triton, whose wheel carries the tools. Out: for every configuration that `ahead_jobs(arch)` of
a kernel's module names, its registers, spilled bytes, shared memory and matrix instructions (HGMMA on sm_90,
HMMA on sm_80). Pointers and their strides are typed by the shape comments of the kernel's signature.

    for row in rows():
        print(row)  # {"kernel": "forward hd 64 128x64", "arch": "sm_90", "warps": 8, "registers": 128, ...}
"""
# SPDX-License-Identifier: MIT
import importlib
import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .choose import triton

KERNELS = "masked_attention", "pack_mask", "upscale", "panoptic_merge"
TYPES = {"int32": "*i32", "bool": "*i1", "fp32": "*fp32"}  # words of shape comments; none: the dtype asked
POINTER = re.compile(r"^    ([A-Z0-9_, ]+),  # (int32 |bool |fp32 |)\((.*?)\)", re.M)


def pointers(kernel) -> list[tuple[str, str, list[str]]]:
    """(argument, type word, axes) of the tensors of a kernel, as its shape comments say."""
    lines = POINTER.findall(inspect.getsource(kernel.fn))
    return [(name, word.strip(), [axis.strip() for axis in axes.split(",") if axis])
            for names, word, axes in lines for name in names.split(", ")]


def compile_kernel(kernel, arch: int, constants: dict, options: dict, dtype="bf16") -> tuple[bytes, int]:
    """The cubin that a launch on contiguous, aligned tensors gets, and its bytes of shared memory.

    Arguments of the kernel: tensors, one tuple of strides for each in the same order, numbers, constants."""
    compiler, backends = (importlib.import_module(f"triton.{n}") for n in ("compiler", "backends.compiler"))
    signature, constexprs, attributes, aligned = {}, {}, {}, [["tt.divisibility", 16]]
    tensors = pointers(kernel)
    types, ranks = {name: word for name, word, _ in tensors}, iter(tensors)
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[i,] = "constexpr", constants[name]
        elif name in types:
            signature[name], attributes[i,] = TYPES.get(types[name], f"*{dtype}"), aligned
        elif re.fullmatch("s[a-z]{0,2}", name):
            *outer, last = next(ranks)[2]
            signature[name], constexprs[i, len(outer)] = ("i32",) * len(outer) + ("constexpr",), 1
            if len(outer) >= 3 and last != "1":  # rows of a multiple of 16 numbers
                attributes |= {(i, j): aligned for j in range(len(outer))}
        else:
            signature[name] = "fp32" if name.startswith(("scale", "eps")) else "i32"
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
    for arch in (90, 80):
        for module in KERNELS:
            for name, *job in importlib.import_module(f"{__package__}.{module}").ahead_jobs(arch):
                yield name, arch, *job


def rows(only: str = "", dtype: str = "bf16", where: str = "sm_") -> Iterator[dict]:
    """A row for each configuration whose name holds `only` and architecture `where`; none without triton."""
    for name, arch, kernel, constants in jobs() if triton else ():
        if only not in name or where not in f"sm_{arch}":
            continue
        options = {key: constants.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
        binary, shared = compile_kernel(kernel, arch, constants, options, dtype)
        usage, code = dump(binary, "cuobjdump", "-res-usage"), dump(binary, "nvdisasm", "-c")
        registers, *spills = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
        yield {"kernel": name, "arch": f"sm_{arch}", "warps": options["num_warps"], "registers": registers,
               "spilled bytes": sum(spills), "shared KiB": round(shared / 1024, 1),
               "HGMMA": len(re.findall(r"\bHGMMA\b", code)), "HMMA": len(re.findall(r"\bHMMA\b", code))}
