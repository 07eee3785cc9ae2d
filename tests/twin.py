"""A second device, "twin", made of CPU tensors, which holds code without a GPU to a GPU's rules.

An operation that mixes it with the CPU fails as on CUDA, so do those in UNSTEADY when deterministic ones are
asked for, autocast follows CUDA's lists as far as they stand below. What the host waits for, copies and the
operations in WAITING, is counted by the function that asks. It has no streams and compiles nothing.

    python tests/twin.py COMMANDS.json  # in a folder of copies made by `copy`
    python tests/twin.py --memory --task coco_panoptic --encoder dinov2_large

The first runs [["train", "--data", ...], ["eval", ...]] one after another and prints a line of JSON for each.
The second takes train.py's flags and prints the bytes alive at the worst moment of a training step: its
tensors have shapes but no numbers, so any size will do. It is a program of its own because a process can be
given such a device only once, by an experimental call of torch.
"""

# SPDX-License-Identifier: MIT
import collections
import contextlib
import importlib
import json
import os
import sys
import tempfile
import traceback
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

NAME, ROOT = "twin", Path(__file__).resolve().parent.parent
READY = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
OPS = torch.ops.aten
WAITS = collections.Counter()
INSIDE = SimpleNamespace(device=torch.device("cpu"))  # where the numbers are; "meta": there are none
MOVES = {OPS.copy_.default, OPS._to_copy.default}  # the operations that may know two devices
INDEXING = {OPS.index.Tensor, OPS.index_put_.default, OPS.index_put.default, OPS._index_put_impl_.default}
WAITING = {OPS._local_scalar_dense.default, OPS.nonzero.default, OPS._unique2.default, OPS.equal.default,
           OPS.masked_select.default, OPS.unique_consecutive.default, OPS.bincount.default,
           OPS.repeat_interleave.Tensor}
# torch's documentation of use_deterministic_algorithms: on CUDA these raise then
UNSTEADY = {getattr(OPS, name).default for name in (
    "grid_sampler_2d_backward", "nll_loss2d_forward", "upsample_bilinear2d_backward", "histc", "put_",
    "upsample_bicubic2d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward")}
MAKING = ("empty.memory_format empty_strided arange arange.start arange.start_step zeros ones full rand "
          "randn scalar_tensor linspace eye _copy_from").split()
# torch's documentation of autocast on CUDA: in the lower type, in float32, in the widest of all arguments
LOWER = ("conv2d conv_transpose2d.input linear matmul mm bmm addmm baddbmm addbmm mv addmv prelu "
         "scaled_dot_product_attention").split()
FULL = ("exp log log10 log1p log2 expm1 reciprocal rsqrt pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar sum "
        "sum.dim_IntList prod prod.dim_int cumsum cumprod norm.Scalar norm.ScalarOpt_dim layer_norm "
        "group_norm cosine_similarity softmax.int log_softmax.int logsumexp mse_loss l1_loss smooth_l1_loss "
        "kl_div nll_loss nll_loss_nd cross_entropy_loss binary_cross_entropy_with_logits").split()
WIDEST = "addcdiv addcmul atan2 cross dot grid_sampler index_put scatter_add cat stack tensordot vdot".split()


def copy(folder):
    """The program's files in `folder`, with the device they call "cuda" named as this one."""
    (folder / "kernels").mkdir(parents=True)
    for file in (*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py")):
        text = file.read_text().replace('"cuda"', f'"{NAME}"').replace("torch.cuda.", f"torch.{NAME}.")
        # tensors made in inference mode have no versions, which a tensor made in Python needs
        (folder / file.relative_to(ROOT)).write_text(text.replace("torch.inference_mode", "torch.no_grad"))


def asking(kind):
    """Count a wait for the function of ours that asks for it."""
    frames, here = traceback.extract_stack(), Path.cwd()
    ours = [f for f in frames if Path(f.filename).parent == here and f.name[0] != "<"]
    WAITS[f"{Path(ours[-1].filename).stem}.{ours[-1].name}: {kind}" if ours else kind] += 1


class Alive:
    """Bytes of the storages that the device's tensors hold, in CUDA's steps of 512, and their peak."""

    now, peak, holders = 0, 0, collections.Counter()

    @classmethod
    def add(cls, tensor, storage):
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        cls.now += 0 if cls.holders[key] else size
        cls.peak = max(cls.peak, cls.now)
        cls.holders[key] += 1
        weakref.finalize(tensor, cls.drop, key, size)

    @classmethod
    def drop(cls, key, size):
        cls.holders[key] -= 1
        cls.now -= 0 if cls.holders[key] else size


class Twin(torch.Tensor):
    """A tensor of the second device; `raw` holds its numbers."""

    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, raw):
        layout = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, raw.shape, **layout, device=f"{NAME}:0")
        tensor.raw = raw
        Alive.add(tensor, raw.untyped_storage())
        return tensor

    def __init__(self, raw):
        pass

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return call(op, args, kwargs or {})

    def tolist(self):
        asking("tolist")
        return self.raw.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {NAME} device type tensor to numpy")

    __array__ = numpy

    def __format__(self, form):
        return format(self.item(), form)

    def record_stream(self, stream):
        pass


def call(op, args, kwargs):
    """`op` on the CPU tensors inside, after the checks that CUDA would make."""
    if op is OPS._copy_from.default:
        asking("upload")
        args[1].raw.copy_(args[0])
        return args[1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    twins, others = ([x for x in tensors if isinstance(x, Twin) == flag] for flag in (True, False))
    free = {id(x) for x in args[1]} if op in INDEXING else set()  # torch takes an index from the CPU
    if twins and op not in MOVES and any(x.dim() and id(x) not in free for x in others):
        raise RuntimeError(f"{op}: {NAME} and the CPU, shapes {[tuple(x.shape) for x in tensors]}")
    if op in UNSTEADY and torch.are_deterministic_algorithms_enabled():
        print(f"{op} does not have a deterministic implementation", file=sys.stderr, flush=True)
        os._exit(1)  # in a thread of autograd's an error would end the process without its words
    target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else ""
    masks = op in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
    if twins and (op in WAITING or masks):
        asking(op.name().removeprefix("aten::"))
    if op in MOVES and not kwargs.get("non_blocking") and (op is OPS._to_copy.default or len(args) < 3):
        if twins and target == "cpu":
            asking("to cpu")
        elif target == NAME and others or twins and others:
            asking("upload")
    target = target or (NAME if twins or not others else "cpu")
    here = {"device": INSIDE.device, "pin_memory": False}
    kwargs = {key: here.get(key, value) for key, value in kwargs.items()}
    known = {id(x.raw): x for x in twins}
    args, kwargs = tree_map_only(Twin, lambda x: x.raw, (args, kwargs))
    with torch._C._DisableTorchDispatch():
        out = op(*args, **kwargs)

    def give(x):
        return known[id(x)] if id(x) in known else Twin(x) if target == NAME else x

    return tree_map_only(torch.Tensor, give, out)


def autocast(op, rule):
    """`op` as autocast calls it: floats of the device in the type that `rule` makes of all their types."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    low = (torch.float32, torch.bfloat16, torch.float16)

    def cast(*args, **kwargs):
        kind = rule({x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Twin)})
        with torch._C._ExcludeDispatchKeyGuard(key):
            args, kwargs = tree_map_only(
                Twin, lambda x: x.to(kind) if kind and x.dtype in low else x, (args, kwargs))
            return op(*args, **kwargs)
    return cast


class Flash(torch.autograd.Function):
    """What flash attention keeps, and makes, of q, k, v (B,nh,N,hd)."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.transpose(1, 2).new_empty(q.transpose(1, 2).shape).transpose(1, 2)  # (B, nh, N, hd)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def flash(q, k, v):
    kind = torch.get_autocast_dtype(NAME) if torch.is_autocast_enabled(NAME) else q.dtype
    return Flash.apply(*(x.to(kind) for x in (q, k, v)))


class Generator(torch.Generator):
    """Of the CPU, whatever device is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        pass


class Moment:
    """A stream or an event: everything is done at once."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args: Moment()

    def elapsed_time(self, other):
        return 1.0


def set_up():
    """Give this process the device; the libraries returned must live on."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    module, nothing = getattr(torch, NAME), lambda *args: None
    for name in ("set_device", "synchronize", "reset_peak_memory_stats", "empty_cache"):
        setattr(module, name, nothing)
    for name in ("stream", "device_of"):
        setattr(module, name, lambda x: contextlib.nullcontext())
    for name in ("max_memory_allocated", "memory_allocated"):
        setattr(module, name, lambda *args: 0)
    module.Event = module.Stream = module.current_stream = Moment
    module.is_available, module.get_device_capability = lambda: True, lambda *args: (9, 0)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # or a weight keeps its old `raw`
    torch.Generator, torch.Tensor.pin_memory = Generator, lambda self, *args: self
    every, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda op, *args, **kwargs: call(op, args, kwargs), "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    rules = ((LOWER, lambda kinds: torch.get_autocast_dtype(NAME)), (FULL, lambda kinds: torch.float32),
             (WIDEST, lambda kinds: torch.float32 if torch.float32 in kinds else None))
    for names, rule in (*rules, (MAKING, None)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(OPS, packet), overload or "default")
            if rule:
                ours.impl(name, autocast(op, rule), "AutocastPrivateUse1")
            else:
                ours.impl(name, lambda *args, op=op, **kwargs: call(op, args, kwargs), "PrivateUse1")
    return every, ours


def memory(argv, segments=20):
    """Peak bytes of a masked step: forward, loss, backward, with all gradients and Adam's moments."""
    # the program's modules take torch's attention as a default when they are imported
    INSIDE.device, torch.nn.functional.scaled_dot_product_attention = torch.device("meta"), flash
    data, losses, train = (importlib.import_module(name) for name in ("data", "losses", "train"))
    assign = losses._assign
    losses._assign = lambda costs, *rest: assign(torch.rand(costs.shape), *rest)
    cfg, _ = train.parse(["--data", "none", "--no-compile", *argv])
    words = data.TASKS[cfg.task].vocabulary
    model = train.make_open(cfg, words, None) if cfg.stage else train.make_model(cfg, words)
    model = model.to(NAME).train()
    trainer, size, count = train.Trainer(cfg, model, torch.device(NAME)), cfg.size, cfg.device_batch_size
    pixels = torch.zeros(count, 3, size, size, dtype=torch.uint8).to(NAME)
    ids, zeros = torch.zeros(1, size, size, dtype=torch.uint8), torch.zeros(segments, dtype=torch.int64)
    target = data.Target(ids, zeros, zeros + 1, zeros, zeros.bool(), zeros.double())
    targets = [target.to(NAME) for _ in range(count)]
    part = SimpleNamespace(images=pixels, targets=targets, names=["x"] * count)
    norm = torch.full((2,), float(segments * count), dtype=torch.float64)
    trainer.backward(0, 0, part, norm)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Alive.peak + 8 * trained


def main():
    torch.set_num_threads(1)
    libraries = set_up()
    if sys.argv[1] == "--memory":
        with tempfile.TemporaryDirectory() as folder:
            copy(Path(folder))
            os.chdir(folder)
            sys.path.insert(0, folder)
            return print(memory(sys.argv[2:]))
    sys.path.insert(0, os.getcwd())
    for name, *argv in json.loads(Path(sys.argv[1]).read_text()):
        module = importlib.import_module(name)
        parse = module.parser().parse_args if name == "predict" else module.parse
        parsed = parse(argv)
        WAITS.clear()
        module.run(*parsed) if isinstance(parsed, tuple) else module.run(parsed)
        print(json.dumps({"command": [name, *argv], "waits": WAITS}), flush=True)
    del libraries


if __name__ == "__main__":
    main()
