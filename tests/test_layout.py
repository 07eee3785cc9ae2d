"""The shape of the house: files, layers, line budgets, modules that survive copying, flags that are read."""

# SPDX-License-Identifier: MIT
import ast
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .test_tasks import make_own_masks
from .test_train import shapes, short_run  # noqa: F401 (fixtures)

ROOT = Path(__file__).resolve().parents[1]
# Most budgets are above the first plan (at most 700): the list of files is fixed, and the readers of five
# official formats, every checkpoint dialect and the open-vocabulary stages need the room. What is over must
# shrink; it grew once, for profiles, recomputation, CUDA graphs, fp8, two kernels, a faster loader.
# file: (third party, ours, line budget); "+" third party only inside functions, "?" ours only behind a guard
HOUSE = {
    "vocab.py": ("", "", 700),
    "eomt.py": ("torch +safetensors +huggingface_hub +numpy +PIL", "?kernels", 1215),
    "siglip2.py": ("torch +safetensors +tokenizers +sentencepiece +huggingface_hub", "?kernels", 530),
    "lora.py": ("torch", "", 200),
    "losses.py": ("torch scipy", "?kernels", 450),
    "metrics.py": ("numpy", "", 500),
    "data.py": ("torch numpy PIL", "vocab +metrics", 1516),
    "eval.py": ("torch numpy tqdm PIL", "data eomt metrics siglip2 lora losses vocab", 593),
    "predict.py": ("torch numpy PIL tqdm +onnxruntime", "data eomt metrics siglip2 lora losses vocab", 371),
    "train.py": ("torch numpy +wandb +tokenizers", "data eomt eval predict losses siglip2 lora vocab", 1229),
    "bench.py": ("torch numpy PIL", "data eomt eval predict losses metrics siglip2 lora vocab kernels", 633),
}
KERNEL_LINES = 450
FOLDERS = {"kernels", "tests", "assets"}
OTHER = {"README.md", "requirements.txt", "LICENSE", "pyproject.toml", "inference.ipynb"}
OURS = {name.removesuffix(".py") for name in HOUSE} | {"kernels"}
MODULES = sorted(name for name in HOUSE if (ROOT / name).exists())


def imports(path):
    """(module, where) of every import: "top", "guarded" by except ImportError, or "inside" a function."""
    found = []

    def visit(node, where):
        if isinstance(node, ast.Import):
            found.extend((alias.name.split(".")[0], where) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module.split(".")[0], where))
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guards = isinstance(child, ast.Try) and any("ImportError" in ast.dump(h) for h in child.handlers)
            visit(child, "inside" if inside or where == "inside" else "guarded" if guards else where)

    visit(ast.parse(path.read_text()), "top")
    return found


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in listed.stdout.splitlines()]


def test_house_top_level():
    top = {path.parts[0] for path in tracked() if not path.parts[0].startswith(".")}
    assert top <= set(HOUSE) | FOLDERS | OTHER, top - set(HOUSE) - FOLDERS - OTHER


@pytest.mark.parametrize("name", MODULES)
def test_house_layers(name):
    third, ours, _ = HOUSE[name]
    third, ours = third.split(), ours.split()
    for module, where in imports(ROOT / name):
        if module in sys.stdlib_module_names and module not in OURS:
            continue
        allowed = ours if module in OURS else third
        fine = (
            module in allowed
            or where == "inside"
            and f"+{module}" in allowed
            or where != "top"
            and f"?{module}" in allowed
            or name == "eomt.py"
            and where == "inside"
            and module in ("siglip2", "lora", "vocab")
        )  # DESIGN's one exception: what open classes need
        assert fine, f"{name} imports {module} ({where})"


def test_house_kernels_import_torch_and_themselves():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for module, where in imports(path):
            assert (
                module in sys.stdlib_module_names
                or module == "torch"
                or (module == "triton" and where != "top")
            ), f"{path.name} imports {module} ({where})"


def test_house_line_budgets():
    over = {
        name: count
        for name in MODULES
        if (count := len((ROOT / name).read_text().splitlines())) > HOUSE[name][2]
    }
    over |= {
        path.name: count
        for path in (ROOT / "kernels").glob("*.py")
        if (count := len(path.read_text().splitlines())) > KERNEL_LINES
    }
    assert not over, over


@pytest.mark.parametrize("name", MODULES)
def test_house_module_head(name):
    text = (ROOT / name).read_text()
    assert ast.get_docstring(ast.parse(text)), f"{name} has no docstring"
    assert "# SPDX-License-Identifier: MIT" in text.split('"""', 2)[2][:60]


def test_house_no_dangerous_calls():
    """No pickle, eval, exec or shell, and torch.load only with weights_only=True."""
    for path in [*(ROOT / n for n in MODULES), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "os.system", "pickle.load", "pickle.loads"), (
                f"{path.name}: {name}"
            )
            assert not any(k.arg == "shell" for k in node.keywords), f"{path.name}: shell"
            if name == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), (
                    path.name
                )


@pytest.mark.parametrize("name", ["vocab", "eomt", "siglip2", "lora", "losses", "metrics"])
def test_module_imports_alone(name, tmp_path):
    """Copied into an empty folder, with other third-party packages and our other files out of reach."""
    source = ROOT / f"{name}.py"
    if not source.exists():
        pytest.skip(f"{name}.py is not here yet")
    (tmp_path / f"{name}.py").write_text(source.read_text())
    allowed = [word for word in HOUSE[f"{name}.py"][0].split() if not word.startswith("+")]
    blocked = {
        "numpy",
        "PIL",
        "scipy",
        "tqdm",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "triton",
        "torch",
    } - set(allowed)
    blocked -= (
        {"numpy", "tqdm"} if {"torch", "scipy"} & set(allowed) else set()
    )  # torch and scipy import numpy
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(ROOT)!r})]; "
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"class Block:\n"
        f"    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {sorted(blocked | OURS - {name})!r} "
        f"and 'torch' not in (sys._getframe(5).f_globals.get('__name__') or ''):\n"
        f"            raise ImportError(name)\n"
        f"sys.meta_path.insert(0, Block())\n"
        f"import {name}; print({name}.__file__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / f"{name}.py")


def test_config_every_field_is_read():
    import train

    text = (ROOT / "train.py").read_text()
    read = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name | ast.Attribute)
        and ast.unparse(node.value).endswith("cfg")
    }
    options = ast.walk(ast.parse((ROOT / "eval.py").read_text()))  # calibrate() reads the ov_ fields
    read |= {n.attr for n in options if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "options"}
    read |= {"debug", "config"}  # read before a Config exists: by data.command and in parse()
    assert "--debug" in (ROOT / "data.py").read_text() and 'given["config"]' in text
    unread = {field.name for field in dataclasses.fields(train.Config)} - read
    assert not unread, unread
    assert all(field.metadata.get("help") for field in dataclasses.fields(train.Config))


def readme_commands():
    text = (ROOT / "README.md").read_text()
    lines = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [
        part.strip()
        for line in lines
        for part in line.split("&&")
        if re.search(r"\b(train|eval|predict)\.py\b", part)
    ]


def test_readme_commands_parse(tmp_path, monkeypatch):
    """Every command the README shows is accepted: train.py resolves it, eval.py and predict.py parse it."""
    import eval as evaluation
    import predict
    import train

    (tmp_path / "my_data").mkdir()
    make_own_masks(tmp_path / "my_data")  # --task auto looks at the data
    monkeypatch.chdir(tmp_path)
    commands = readme_commands()
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command)
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        argv = words[script + 1 :]
        if words[script] == "train.py":
            cfg, origin = train.parse([*argv, "--dry-run"])
            assert cfg.dry_run, command
        else:
            (evaluation if words[script] == "eval.py" else predict).parser().parse_args(argv)


def test_readme_quick_start_comes_first():
    head = (ROOT / "README.md").read_text().splitlines()[:15]
    assert any(line.startswith("![") for line in head) and any("train.py --quick" in line for line in head)


def test_notebook_is_small_and_runs(short_run, monkeypatch):  # noqa: F811
    """No outputs, under 10 kB, and its cells run as a script on a checkpoint."""
    path = ROOT / "inference.ipynb"
    cells = json.loads(path.read_text())["cells"]
    assert path.stat().st_size < 10_000 and not any(cell.get("outputs") for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = code.replace('"runs/quick"', repr(str(short_run[0])))
    monkeypatch.chdir(ROOT)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
