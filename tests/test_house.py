"""The house keeps its shape: folders, sizes, and who may name whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from sa_diffusers import methods
from sa_diffusers.families import family_class


PACKAGE = Path(__file__).parents[1] / "sa_diffusers"
MODULES = sorted(PACKAGE.rglob("*.py"))
DISPATCH = ("families", "pipelines")  # folders that may name a kind of pipeline


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    return [(path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES]


def docstrings(tree: ast.Module) -> set[int]:
    """ids of the nodes that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, owners)]
    return {id(body[0].value) for body in bodies if body and isinstance(body[0], ast.Expr)}


def literals() -> Iterator[tuple[Path, int, str]]:
    """Every string in the package's code that is no docstring: file, line, text."""
    for path, tree in trees():
        skipped = docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                yield path, node.lineno, node.value


def test_few_folders_and_few_modules_in_each():
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    files = [path for path in PACKAGE.iterdir() if path.is_file()]
    assert len(folders) <= 14 and len(files) <= 4, (folders, files)
    modules = {folder: len(list(folder.glob("*.py"))) for folder in {path.parent for path in MODULES}}
    assert {folder.name: count for folder, count in modules.items() if count > 12} == {}


def test_modules_and_functions_are_short():
    long_modules = {path: len((PACKAGE / path).read_text().splitlines()) for path, _ in trees()}
    assert {path: count for path, count in long_modules.items() if count > 300} == {}
    functions = {
        f"{path}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    assert {name: count for name, count in functions.items() if count > 60} == {}


def test_no_function_takes_more_than_eight_parameters():
    """Constructors, calls and keyword-only options of public functions apart."""
    found = {}
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name in ("__init__", "__call__"):
                continue
            positional = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "cls")]
            count = len(positional) + (len(node.args.kwonlyargs) if node.name.startswith("_") else 0)
            if count > 8:
                found[f"{path}:{node.name}"] = count
    assert found == {}


def test_only_methods_name_methods():
    names = set(methods.registry()) - {"encoder"}  # a word that scopes and latents are named by, too
    assert [f"{p}:{line}: {text}" for p, line, text in literals() if text in names and p.parts[0] != "methods"] == []


def test_only_families_and_pipelines_name_kinds_of_pipelines():
    kinds = [
        f"{path}:{line}: {text}"
        for path, line, text in literals()
        if (text == "unet" or family_class(text)) and path.parts[0] not in DISPATCH and path.name != "__init__.py"
    ]
    assert kinds == []
    for path, tree in trees():
        if path.parts[0] in DISPATCH:
            continue
        named = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        named += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        wrong = [name for name in named if name == "unet" or (family_class(name) and name != "DiffusionPipeline")]
        assert wrong == [], path


@pytest.mark.slow
def test_core_imports_without_what_it_must_not_know():
    """Not even by a string: the blocked packages cannot be imported at all."""
    core = sorted(path.stem for path in (PACKAGE / "core").rglob("*.py") if path.stem != "__init__")
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in (PACKAGE / "core").rglob("*.py")
        if path.stem in core
    ]
    code = f"""
import sys
for blocked in ("diffusers", "accelerate", "transformers", "huggingface_hub"):
    sys.modules[blocked] = None
import importlib
for name in {sorted(names)!r}:
    importlib.import_module(name)
from sa_diffusers.core.fisher_file import Fisher
assert not hasattr(Fisher, "push_to_hub") and not hasattr(Fisher, "from_pretrained")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
