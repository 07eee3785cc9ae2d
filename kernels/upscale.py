"""Twice the resolution (EoMT's ScaleBlock), channels last: a GEMM, and all that follows it in one pass.

    y = GELU(ConvTranspose2d(x, 2 x 2, stride 2))     d = depthwise 3 x 3 of y, zero padding 1, no bias
    out = LayerNorm(d) over the channels

Patches of a ConvTranspose2d with stride 2 do not overlap: it is the GEMM (B*h*w, C) @ (C, 4C). Its output is
read where it lies, as cells (B, h, w, 2, 2, C): pixel (2r + i, 2s + j) is place (i, j) of cell (r, s). A
program walks along two rows of pixels; a column it reads completes the one before it.

In: x (B, h, w, C), any strides; the parameters as nn.ConvTranspose2d, nn.Conv2d and nn.LayerNorm keep them.
Out: (B, 2h, 2w, C), contiguous. Triton: C a multiple of 16 up to 1536; fp32 accumulation, no atomics:
bitwise repeatable.

    out = upscale(x, conv1.weight, conv1.bias, conv2.weight, norm.weight, norm.bias, norm.eps)
"""
# SPDX-License-Identifier: MIT
import torch
import torch.nn.functional as F
from torch import Tensor

from .choose import cast, jit, tl, triton, use_triton

COLUMNS = 16  # pixels of a row that a program does before its next tile; it reads two more
PROGRAMS = 512  # of a backward pass: each sums over its tiles, torch over the programs


# ---- plain torch ----

def upscale_ref(x, weight1, bias1, weight2, gain, shift, eps):
    """The formula above in torch. The permutes are views: the convolutions run in channels-last memory.

    On CPU the ConvTranspose is a GEMM too, and places its output: all four take 0.6 to 0.9 of the time with
    F.linear and a copy, 1.1 of it with backward (one core, C = 384, 14 to 80 cells a side, batch 1 to 8)."""
    y = F.gelu(F.conv_transpose2d(x.permute(0, 3, 1, 2), weight1, bias1, stride=2))  # (B, C, 2h, 2w)
    y = F.conv2d(y, weight2, padding=1, groups=y.shape[1]).permute(0, 2, 3, 1)  # (B, 2h, 2w, C)
    return F.layer_norm(y, gain.shape, gain, shift, eps)


# ---- Triton: pieces. Images are cells (h, w, 2, 2, C) with strides s; `row` is a row of cells ----

@jit
def _tile(tile, h, w, COLUMNS: tl.constexpr):
    """Image (64 bits: a batch may pass 2^31 elements), row of cells and first column of a tile."""
    across = tl.cdiv(2 * w, COLUMNS)
    line = tile // across
    return (line // h).to(tl.int64), line % h, tile % across * COLUMNS


@jit
def _pixel(at, s, row, i, x, c):
    """Where the channels of pixel (2 row + i, x) lie."""
    return at + row * s[1] + x // 2 * s[2] + i * s[3] + x % 2 * s[4] + c * s[5]


@jit
def _read(at, mask):
    """fp32 of what lies there, 0 where the mask is off."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@jit
def _column(at, s, row, x, h, w, c, C):
    """Pixel rows 2 row - 1 to 2 row + 2 of column x: four fp32 (BC,), 0 outside the image."""
    inside = tl.where((x >= 0) & (x < 2 * w), c < C, False)
    return (_read(_pixel(at, s, row - 1, 1, x, c), tl.where(row > 0, inside, False)),
            _read(_pixel(at, s, row, 0, x, c), inside), _read(_pixel(at, s, row, 1, x, c), inside),
            _read(_pixel(at, s, row + 1, 0, x, c), tl.where(row < h - 1, inside, False)))


@jit
def _normal(x):
    """The normal distribution function: GELU(x) = x * _normal(x)."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # sqrt(1/2)


@jit
def _weights(W, sw, c, C):
    """The 3 x 3 weights of channels c, row by row: nine fp32 (BC,), 0 past C."""
    a, m = W + c * sw[0], c < C
    b, d, x, y = a + sw[2], a + 2 * sw[2], sw[3], 2 * sw[3]
    return (_read(a, m), _read(a + x, m), _read(a + y, m), _read(b, m), _read(b + x, m), _read(b + y, m),
            _read(d, m), _read(d + x, m), _read(d + y, m))


@jit
def _taps(v, weights, L: tl.constexpr):
    """What column v gives to both rows of pixels through column L of the weights."""
    return (v[0] * weights[L] + v[1] * weights[3 + L] + v[2] * weights[6 + L],
            v[1] * weights[L] + v[2] * weights[3 + L] + v[3] * weights[6 + L])


@jit
def _step(Y, sy, row, x, h, w, c, C, weights, last, here):
    """Take column x in: `last` (column x - 1, both rows) gets complete. Returns it and the next two."""
    v = _column(Y, sy, row, x, h, w, c, C)
    v = v[0] * _normal(v[0]), v[1] * _normal(v[1]), v[2] * _normal(v[2]), v[3] * _normal(v[3])
    right, middle, left = _taps(v, weights, 2), _taps(v, weights, 1), _taps(v, weights, 0)
    return (last[0] + right[0], last[1] + right[1]), (here[0] + middle[0], here[1] + middle[1]), left


# ---- Triton: forward ----

@jit
def _store_norm(d, at, MEAN, RSTD, gain, shift, c, C, eps, ours):
    """Normalise a pixel d (BC,) and, where it is `ours`, store it."""
    mean = tl.sum(d, 0) / C
    centred = tl.where(c < C, d - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    tl.store(at, cast(centred * rstd * gain + shift, at.dtype.element_ty), mask=tl.where(ours, c < C, False))
    tl.store(MEAN, mean, mask=ours)
    tl.store(RSTD, rstd, mask=ours)


@jit
def _forward_kernel(
    Y,  # (B, h, w, 2, 2, C), the GEMM's output
    W,  # (C, 1, 3, 3)
    GAIN, SHIFT,  # (C,) of the LayerNorm
    OUT,  # (B, h, w, 2, 2, C), written
    MEAN, RSTD,  # fp32 (B, h, w, 2, 2, 1), written
    sy, sw, sa, sc, so, sm, sr,  # strides
    eps, h, w, C,
    BC: tl.constexpr, COLUMNS: tl.constexpr,
):
    b, row, first = _tile(tl.program_id(0), h, w, COLUMNS)
    c = tl.arange(0, BC)
    Y, OUT, MEAN, RSTD = Y + b * sy[0], OUT + b * so[0], MEAN + b * sm[0], RSTD + b * sr[0]
    weights = _weights(W, sw, c, C)
    gain = _read(GAIN + c * sa[0], c < C)
    shift = _read(SHIFT + c * sc[0], c < C)
    none = tl.zeros((BC,), tl.float32)
    last, here = (none, none), (none, none)
    for x in range(first - 1, tl.minimum(first + COLUMNS, 2 * w) + 1):
        d, last, here = _step(Y, sy, row, x, h, w, c, C, weights, last, here)
        ours = x > first  # the first two columns only prepare the next
        _store_norm(d[0], _pixel(OUT, so, row, 0, x - 1, c), _pixel(MEAN, sm, row, 0, x - 1, 0),
                    _pixel(RSTD, sr, row, 0, x - 1, 0), gain, shift, c, C, eps, ours)
        _store_norm(d[1], _pixel(OUT, so, row, 1, x - 1, c), _pixel(MEAN, sm, row, 1, x - 1, 0),
                    _pixel(RSTD, sr, row, 1, x - 1, 0), gain, shift, c, C, eps, ours)


# ---- Triton: backward ----

@jit
def _grad_pixel(d, GRAD, MEAN, RSTD, DD, gain, c, C, ours):
    """LayerNorm's backward of a pixel d (BC,): stores the gradient of d, returns those of gain and shift."""
    inside = tl.where(ours, c < C, False)
    mean = _read(MEAN, ours)
    rstd = _read(RSTD, ours)
    normed = tl.where(inside, (d - mean) * rstd, 0.0)
    grad = _read(GRAD, inside)
    scaled = grad * gain
    dd = rstd * (scaled - tl.sum(scaled, 0) / C - normed * (tl.sum(scaled * normed, 0) / C))
    tl.store(DD, cast(dd, DD.dtype.element_ty), mask=inside)
    return grad * normed, grad


@jit
def _grad_norm_kernel(
    Y,  # (B, h, w, 2, 2, C)
    W,  # (C, 1, 3, 3)
    GAIN,  # (C,)
    MEAN, RSTD,  # fp32 (B, h, w, 2, 2, 1)
    GRAD,  # (B, h, w, 2, 2, C), gradient of the output
    DD,  # (B, h, w, 2, 2, C), written: gradient of the depthwise convolution's output
    PART,  # fp32 (programs, 2, C), written: gradients of gain and shift
    sy, sw, sa, sm, sr, sg, sd, sp,  # strides
    h, w, C, tiles,
    BC: tl.constexpr, COLUMNS: tl.constexpr,
):
    c = tl.arange(0, BC)
    weights = _weights(W, sw, c, C)
    gain = _read(GAIN + c * sa[0], c < C)
    none = tl.zeros((BC,), tl.float32)
    dgain, dshift = none, none
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        b, row, first = _tile(tile, h, w, COLUMNS)
        last, here = (none, none), (none, none)
        for x in range(first - 1, tl.minimum(first + COLUMNS, 2 * w) + 1):
            d, last, here = _step(Y + b * sy[0], sy, row, x, h, w, c, C, weights, last, here)
            for i in tl.static_range(2):
                g, s = _grad_pixel(d[i], _pixel(GRAD + b * sg[0], sg, row, i, x - 1, c),
                                   _pixel(MEAN + b * sm[0], sm, row, i, x - 1, 0),
                                   _pixel(RSTD + b * sr[0], sr, row, i, x - 1, 0),
                                   _pixel(DD + b * sd[0], sd, row, i, x - 1, c), gain, c, C, x > first)
                dgain += g
                dshift += s
    at = PART + tl.program_id(0) * sp[0] + c * sp[2]
    tl.store(at, dgain, mask=c < C)
    tl.store(at + sp[1], dshift, mask=c < C)


@jit
def _add_taps(acc, v, left, middle, right):
    """Add to the gradients of the 3 x 3 weights: v = GELU of both pixels, the columns are DD around them."""
    return (acc[0] + v[0] * right[2] + v[1] * right[3], acc[1] + v[0] * middle[2] + v[1] * middle[3],
            acc[2] + v[0] * left[2] + v[1] * left[3],
            acc[3] + v[0] * right[1] + v[1] * right[2], acc[4] + v[0] * middle[1] + v[1] * middle[2],
            acc[5] + v[0] * left[1] + v[1] * left[2],
            acc[6] + v[0] * right[0] + v[1] * right[1], acc[7] + v[0] * middle[0] + v[1] * middle[1],
            acc[8] + v[0] * left[0] + v[1] * left[1])


@jit
def _grad_conv_kernel(
    Y,  # (B, h, w, 2, 2, C)
    W,  # (C, 1, 3, 3)
    DD,  # (B, h, w, 2, 2, C)
    DY,  # (B, h, w, 2, 2, C), written
    PART,  # fp32 (programs, 9, C), written: gradients of W
    sy, sw, sd, sq, sp,  # strides
    h, w, C, tiles,
    BC: tl.constexpr, COLUMNS: tl.constexpr,
):
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    weights = _weights(W, sw, c, C)
    # A gradient flows back through the weights turned by half a turn.
    turned = (weights[8], weights[7], weights[6], weights[5], weights[4], weights[3], weights[2], weights[1],
              weights[0])
    none = tl.zeros((BC,), tl.float32)
    acc = none, none, none, none, none, none, none, none, none
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        b, row, first = _tile(tile, h, w, COLUMNS)
        at = DD + b * sd[0]
        left = _column(at, sd, row, first - 1, h, w, c, C)
        middle = _column(at, sd, row, first, h, w, c, C)
        for x in range(first, tl.minimum(first + COLUMNS, 2 * w)):
            right = _column(at, sd, row, x + 1, h, w, c, C)
            one, two, three = _taps(left, turned, 0), _taps(middle, turned, 1), _taps(right, turned, 2)
            y0 = _read(_pixel(Y + b * sy[0], sy, row, 0, x, c), c < C)
            y1 = _read(_pixel(Y + b * sy[0], sy, row, 1, x, c), c < C)
            p0, p1 = _normal(y0), _normal(y1)
            acc = _add_taps(acc, (y0 * p0, y1 * p1), left, middle, right)
            slope0 = p0 + y0 * 0.3989422804014327 * tl.exp(-0.5 * y0 * y0)  # 1 / sqrt(2 pi)
            slope1 = p1 + y1 * 0.3989422804014327 * tl.exp(-0.5 * y1 * y1)
            at0, at1 = _pixel(DY + b * sq[0], sq, row, 0, x, c), _pixel(DY + b * sq[0], sq, row, 1, x, c)
            tl.store(at0, cast((one[0] + two[0] + three[0]) * slope0, DY.dtype.element_ty), mask=c < C)
            tl.store(at1, cast((one[1] + two[1] + three[1]) * slope1, DY.dtype.element_ty), mask=c < C)
            left, middle = middle, right
    at = PART + tl.program_id(0) * sp[0] + c * sp[2]
    for k in tl.static_range(9):
        tl.store(at + k * sp[1], acc[k], mask=c < C)


# ---- launchers ----

def config(step, channels):
    """Keyword arguments of one kernel's launch: the LayerNorm wants all channels in one program."""
    block = triton.next_power_of_2(channels)
    if step == "grad_conv":
        block = min(128, channels & -channels)  # the largest power of two that divides C
    return dict(BC=block, COLUMNS=COLUMNS, num_warps=max(1, block // 128), num_stages=1,
                enable_fp_fusion=True)


def ahead_jobs(arch):
    """(name, kernel, constants and launch options) for the models' widths, the same on every architecture."""
    for step, kernel in dict(forward=_forward_kernel, grad_norm=_grad_norm_kernel,
                             grad_conv=_grad_conv_kernel).items():
        for channels in (96, 384, 768, 1024, 1536):
            yield f"upscale {step} C {channels}", kernel, config(step, channels)


def cells(image):
    """(B, 2h, 2w, C) -> (B, h, w, 2, 2, C), a view."""
    _, height, width, _ = image.shape
    return image.unflatten(2, (width // 2, 2)).unflatten(1, (height // 2, 2)).transpose(2, 3)


def _launch(kernel, step, tensors, *numbers, part=None):
    """Run a kernel over the tiles of y = tensors[0], one program each or, given part, len(part) programs."""
    _, h, w, _, _, channels = tensors[0].shape
    tiles = tensors[0].shape[0] * h * triton.cdiv(2 * w, COLUMNS)
    tensors, numbers, grid = list(tensors), [*numbers, h, w, channels], tiles
    options = config(step, channels)
    if part is not None:
        tensors, numbers, grid = [*tensors, part], [*numbers, tiles], len(part)
    chunks = triton.cdiv(channels, options["BC"])
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device, which may be another
        kernel[(grid, chunks)](*tensors, *(t.stride() for t in tensors), *numbers, **options)


def launch_forward(y, weight2, gain, shift, eps, out, mean, rstd):
    """y (B, h, w, 2, 2, C): fill out (B, 2h, 2w, C), mean and rstd fp32 (B, 2h, 2w, 1)."""
    _launch(_forward_kernel, "forward", (y, weight2, gain, shift, *map(cells, (out, mean, rstd))), eps)


def launch_backward(grad, y, weight2, gain, mean, rstd, dd, dy, part_norm, part_conv):
    """Fill dd (B, 2h, 2w, C), dy like y, fp32 part_norm (programs, 2, C) and part_conv (.., 9, C)."""
    mean, rstd, grad, dd = map(cells, (mean, rstd, grad, dd))
    _launch(_grad_norm_kernel, "grad_norm", (y, weight2, gain, mean, rstd, grad, dd), part=part_norm)
    _launch(_grad_conv_kernel, "grad_conv", (y, weight2, dd, dy), part=part_conv)


# ---- library ops ----

def _outputs(y):
    """Empty (B, 2h, 2w, C) of y's dtype, mean and rstd fp32 (B, 2h, 2w, 1)."""
    batch, h, w, _, _, channels = y.shape
    mean, rstd = (y.new_empty(batch, 2 * h, 2 * w, 1, dtype=torch.float32) for _ in range(2))
    return y.new_empty(batch, 2 * h, 2 * w, channels), mean, rstd


@torch.library.custom_op("nanoeomt::upscale", mutates_args=())
def upscale_op(y: Tensor, weight2: Tensor, gain: Tensor, shift: Tensor,
               eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the GEMM: out (B, 2h, 2w, C) and, for backward, mean and rstd."""
    out, mean, rstd = _outputs(y)
    launch_forward(y, weight2, gain, shift, eps, out, mean, rstd)
    return out, mean, rstd


@upscale_op.register_fake
def _(y, weight2, gain, shift, eps):
    return _outputs(y)


@torch.library.custom_op("nanoeomt::upscale_backward", mutates_args=())
def upscale_backward_op(grad: Tensor, y: Tensor, weight2: Tensor, gain: Tensor, mean: Tensor,
                        rstd: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, weight2, gain and shift."""
    dd, dy = _outputs(y)[0], torch.empty_like(y, memory_format=torch.contiguous_format)
    programs = max(1, min(PROGRAMS, y.shape[0] * y.shape[1] * triton.cdiv(2 * y.shape[2], COLUMNS)))
    part_norm, part_conv = (y.new_empty(programs, n, y.shape[-1], dtype=torch.float32) for n in (2, 9))
    launch_backward(grad, y, weight2, gain, mean, rstd, dd, dy, part_norm, part_conv)
    dgain, dshift = part_norm.sum(0).to(gain.dtype).unbind(0)  # 2 x (C,)
    dweight2 = part_conv.sum(0).T.contiguous().view(weight2.shape).to(weight2.dtype)  # (C, 1, 3, 3)
    return dy, dweight2, dgain.clone(), dshift.clone()


@upscale_backward_op.register_fake
def _(grad, y, weight2, gain, mean, rstd):
    return (torch.empty_like(y, memory_format=torch.contiguous_format),
            torch.empty_like(weight2, memory_format=torch.contiguous_format), gain.new_empty(gain.shape),
            gain.new_empty(gain.shape))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _backward(ctx, grad, grad_mean, grad_rstd):
    return *upscale_backward_op(grad, *ctx.saved_tensors), None


upscale_op.register_autograd(_backward, setup_context=_save)


# ---- the public function ----

def _check(x, weight1, bias1, weight2, gain, shift):
    """Raise ValueError when shapes or dtypes do not fit each other."""
    C = x.shape[-1]
    found = [tuple(t.shape) for t in (weight1, bias1, weight2, gain, shift)]
    wanted = [(C, C, 2, 2), (C,), (C, 1, 3, 3), (C,), (C,)]
    if x.dim() != 4 or found != wanted:
        raise ValueError(f"kernels/upscale.py!shape: x {tuple(x.shape)} with {found}; pass (B, h, w, C) with "
                         "(C, C, 2, 2), (C,), (C, 1, 3, 3), (C,), (C,)")
    dtypes = {t.dtype for t in (x, weight1, bias1, weight2, gain, shift)}
    if not all(dtype.is_floating_point for dtype in dtypes) or (
            len(dtypes) > 1 and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"kernels/upscale.py!dtype: {', '.join(sorted(map(str, dtypes)))}; "
                         "cast all to one floating dtype")


def _against(x):
    """Why Triton cannot take x, or ""."""
    if x.shape[-1] % 16 or x.shape[-1] > 1536:
        return f"{x.shape[-1]} channels are no multiple of 16 up to 1536"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {x.dtype} is none of float32, float16, bfloat16"
    return ""


def upscale(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, gain: Tensor, shift: Tensor,
            eps: float = 1e-6) -> Tensor:
    """x (B, h, w, C), weight1 (C, C, 2, 2), bias1 (C,), weight2 (C, 1, 3, 3), gain and shift (C,) of the
    LayerNorm -> (B, 2h, 2w, C). One floating dtype, or autocast; differentiable. Raises ValueError."""
    _check(x, weight1, bias1, weight2, gain, shift)
    if not use_triton("upscale", x, _against(x)):
        return upscale_ref(x, weight1, bias1, weight2, gain, shift, eps)
    B, h, w, C = x.shape
    weight = weight1.permute(2, 3, 1, 0).reshape(4 * C, C)  # (2 * 2 * C, C), a copy of 4 C^2 numbers
    y = F.linear(x.reshape(B * h * w, C), weight, bias1.repeat(4)).view(B, h, w, 2, 2, C)
    # In y's dtype, also where autocast on CUDA would leave a LayerNorm's output in fp32: products follow.
    return upscale_op(y, weight2, gain, shift, eps)[0]


# ---- what reads its output ----

class _MaskProduct(torch.autograd.Function):
    """queries (B, Q, C) @ features (B, N, C).mT.

    The gradient of the features is (B, N, C) in memory too. Torch's own is (B, C, N), and the kernels above
    would find each channel of a pixel in a cache line of its own."""

    @staticmethod
    def forward(ctx, queries, features):
        ctx.save_for_backward(queries, features)
        return queries @ features.mT  # (B, Q, N)

    @staticmethod
    def backward(ctx, grad):
        queries, features = ctx.saved_tensors
        grad = grad.to(queries.dtype)  # autocast may have made a product of fp32 a lower one
        return grad @ features, grad.mT @ queries  # (B, Q, C), (B, N, C)


def mask_product(queries: Tensor, features: Tensor) -> Tensor:
    """Mask logits (B, Q, H, W) of queries (B, Q, C) . features (B, H, W, C) in the dtype of the queries."""
    flat = features.flatten(1, 2).to(queries.dtype)  # (B, H*W, C); upscale_ref leaves fp32 under autocast
    return _MaskProduct.apply(queries, flat).unflatten(2, features.shape[1:3])
