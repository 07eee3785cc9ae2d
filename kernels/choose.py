"""Which path a fused op takes: its Triton kernel or its plain-torch reference.

In: the op's name, the tensor whose device decides, and what speaks against Triton. Out: True for Triton.
The environment variable EOMT_KERNELS=torch|triton forces a path; unset, CUDA takes Triton and the rest torch.
TRITON_INTERPRET=1, set before the first import of triton, lets forced kernels run on CPU tensors (tests do).

    if use_triton("pack_mask", logits, against=""): ...
"""
# SPDX-License-Identifier: MIT
import os
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
    INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
except ImportError:  # wheels for CPU may carry no triton: the torch paths remain
    triton, INTERPRET = None, False
    tl = SimpleNamespace(constexpr=None)  # the kernels' signatures name it


def jit(body):
    """`triton.jit`, or the bare function where triton is missing (it is never launched then)."""
    return body if triton is None else triton.jit(body)


@jit
def cast(x, dtype: tl.constexpr):
    """fp32 to dtype, to nearest even; the interpreter cuts bf16 off, so there the bits are rounded first."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            whole = x.to(tl.int32, bitcast=True)
            x = (whole + 0x7FFF + ((whole >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


def use_triton(name, tensor, against):
    """True when op `name` runs its Triton kernel; `against` says why these inputs cannot, "" when they can.

    Raises ValueError when EOMT_KERNELS=triton asks for what cannot be done, or holds another word."""
    mode = os.environ.get("EOMT_KERNELS", "")
    if mode not in ("", "torch", "triton"):
        raise ValueError(f"kernels/{name}.py!EOMT_KERNELS: {mode!r} is no path; say torch, triton or nothing")
    if mode == "torch" or (mode == "" and not tensor.is_cuda):
        return False
    if triton is None:
        against = "triton is not installed"
    elif not tensor.is_cuda and not INTERPRET:
        against = f"the kernel wants cuda tensors, found {tensor.device.type}"
    if against and mode == "triton":
        raise ValueError(f"kernels/{name}.py!EOMT_KERNELS: {against}; unset EOMT_KERNELS and torch does it")
    return not against
