"""The words of the code: the field's terms as identifiers, docstrings that begin with what a thing is, described arguments."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("tfmq_exp", "scripts") for path in (ROOT / folder).rglob("*.py"))
PACKAGE = sorted((ROOT / "tfmq_exp").rglob("*.py"))
MANY = 5  # parameters, from which on each needs a description

# A private word of this project once, and the field's word for it.
PRIVATE = {
    "told": "broadcast, logged",
    "telling": "condition dropout",
    "untold": "condition_dropout",
    "fed": "inputs",
    "wanted": "targets, expected",
    "judge": "evaluator, metric",
    "judged": "evaluated",
    "keeper": "checkpointer",
    "watcher": "callback",
    "lesson": "module",
    "course": "estimate",
    "twin": "quantized layer",
    "twins": "quantized layers",
    "anatomy": "structure",
    "yardstick": "probe",
    "shelf": "store",
    "farewell": "timeout",
    "patience": "timeout",
    "mirror": "logger",
}
QUESTION = re.compile(r"(What|Who|Whoever|Where|Which|Whose|How|When|Why)\b")
FILLER = re.compile(r"(Nothing|None|To each|As ever|The same|JSON|A picture|The network)\.?$")
PHRASES = re.compile(r"\b(as ever|whoever|who (is told|judges|says)|is told|of its own accord)\b")


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a module gives to something, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every docstring with the line of what it belongs to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def signatures(node: ast.Module | ast.ClassDef) -> Iterator[tuple[ast.FunctionDef, int, str]]:
    """Public functions and methods, their number of parameters besides self, and docstring (a constructor's: its class's)."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from signatures(child)
        elif isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name.endswith("__")):
            named = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            named = [one for one in named if one.arg not in ("self", "cls")]
            count = len([*named, *filter(None, (child.args.vararg, child.args.kwarg))])
            yield child, count, ast.get_docstring(node if child.name == "__init__" else child) or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_of_the_field(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = [
        f"{path.name}:{line} {name}: {PRIVATE[word]}"
        for line, name in identifiers(tree)
        for word in re.findall(r"[a-z]+", re.sub(r"([A-Z])", r"_\1", name).lower())
        if word in PRIVATE
    ]
    assert not words, "\n".join(words)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_what_a_thing_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"{path.name}:{line} {text.splitlines()[0]}"
        for line, text in docstrings(tree)
        if QUESTION.match(text) or FILLER.match(text.splitlines()[0]) or PHRASES.search(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_arguments_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [
        f"{path.name}:{function.lineno} {function.name} has {count} parameters and no Args:"
        for function, count, text in signatures(tree)
        if count >= MANY and "Args:" not in text
    ]
    assert not wrong, "\n".join(wrong)


def test_the_guide_says_the_rule() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "the paper's word, else torch's, diffusers' or Lightning's, else the plainest English noun" in guide.replace(
        "\n", " "
    )
