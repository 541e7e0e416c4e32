"""Who may import whom, how long a file may be, and habits that the code keeps."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tfmq_exp"

# A package imports only those that stand before it.
ORDER = (
    ("core",),
    ("quant", "denoisers", "data", "report", "loggers"),
    ("sampling",),
    ("calibration", "surgery", "evaluation"),
    ("reconstruction",),
    ("qat",),
    ("methods", "diagnostics", "deploy"),
    ("pipeline",),
    ("cli",),
    ("api",),
)
# Siblings of one level never import each other, but for what is listed here.
ALSO = {"surgery": {"quant", "denoisers"}, "evaluation": {"surgery"}}
THIRD_PARTY = {
    "hydra": {"cli", "api"},
    "omegaconf": {"cli", "api"},
    "wandb": {"loggers"},
    "tensorboard": {"loggers"},
    "rich": {"cli", "api"},
    "filelock": {"cli", "pipeline", "report"},
    "pytorch_lightning": {"reconstruction", "qat"},
    "torchmetrics": {"evaluation"},
    "torch_fidelity": {"evaluation"},
    "transformers": {"denoisers", "evaluation"},
    "matplotlib": {"report"},
    "plotly": {"report"},
    "jinja2": {"report"},
    "sklearn": {"data"},
    "lmdb": {"data"},
    "torchao": {"deploy"},
    "PIL": {"data", "report", "loggers"},
    "diffusers": {"denoisers", "sampling", "surgery"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def package_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    own = package_of(path)
    if not own:
        return
    level = next(i for i, names in enumerate(ORDER) if own in names)
    below = {name for names in ORDER[:level] for name in names} | {own} | ALSO.get(own, set())
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "tfmq_exp":
            assert rest.split(".")[0] in below, f"{own} must not import {name}"
        elif top in THIRD_PARTY:
            assert own in THIRD_PARTY[top], f"{own} must not import {top}"


def test_the_table_of_packages_is_complete() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    packages |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert packages == {name for names in ORDER for name in names}


def test_arithmetic_needs_torch_alone() -> None:
    allowed = {"torch", "jaxtyping", "tfmq_exp"}
    for path in (PACKAGE / "quant").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - allowed
        assert all(name in __import__("sys").stdlib_module_names for name in outside), (path, outside)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_name_no_device(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 250
    assert ".cuda(" not in text
    assert not re.search(r"(?<!\.)(?<!def )\bprint\(", text), "a Terminal prints"


def is_text(call: ast.Call) -> bool:
    """Whether a call reads or writes a file as text."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    given = call.args[1:2] if isinstance(call.func, ast.Name) else call.args[:1]  # open(path, mode), path.open(mode)
    mode = [argument.value for argument in given if isinstance(argument, ast.Constant)]
    keywords = {keyword.arg for keyword in call.keywords}
    return name == "open" and (not call.args or "newline" in keywords or mode in (["r"], ["w"], ["a"]))


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "scripts").rglob("*.py"))], ids=lambda p: p.name)
def test_text_files_are_utf_8_whatever_the_locale(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and is_text(node):
            named = "encoding" in {keyword.arg for keyword in node.keywords}
            assert named or "/proc/" in ast.unparse(node), f"{path}:{node.lineno} says no encoding"


def test_no_code_asks_which_method_runs() -> None:
    """A method is data: no comparison with its name, and no test for a class of one of its choices."""
    names = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    choices = {
        node.name
        for path in (PACKAGE / "methods").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert len(names) >= 12
    assert {"LearnRanges", "Reconstruct", "NoiseCorrection"} <= choices
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant)}
                assert not constants & names, f"{path}:{node.lineno} compares with the name of a method"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                classes = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                assert not classes & choices, f"{path}:{node.lineno} asks for a choice of a method"
