"""Every command and Python block of README and docs is one that the package takes."""

import ast
import re
import runpy
import sys
from contextlib import suppress
from importlib import import_module

import pytest
from accelerate.commands.launch import launch_command_parser
from snippets import PAGES, ROOT, Block, blocks, inline

import sa_diffusers
from sa_diffusers.__main__ import main
from sa_diffusers.cli.parse import parse_config
from sa_diffusers.runs.options import ForgetConfig


UNKNOWN = "--such_an_option_there_is_not"
MAKE = (ROOT / "Makefile").read_text()
EXTRAS = (ROOT / "setup.py").read_text()
OWN = {page.stem for page in PAGES}  # walkthroughs, which import one another


def check(words: list[str]) -> None:
    """Raise for a command that is none of ours or accelerate's, and for an option that it does not take.

    An option that does not exist is added, so that nothing starts: it must be all that is complained of.
    """
    match words:
        case [script, *rest] if script.startswith("scripts/"):
            check(["python", script, *rest])
        case ["pip", "install", "-c", "constraints.txt", "-e", what]:
            assert what == "." or f'"{what[2:-1]}":' in EXTRAS
        case ["make", target]:
            assert f"\n{target}:" in MAKE
        case ["pytest", *_]:
            return
        case ["accelerate", "launch", *rest]:
            args = launch_command_parser().parse_args(rest)
            launched = ["-m"] * bool(args.module) + [args.training_script, *args.training_script_args]
            check(["python", *launched])
        case ["torchrun", "--nproc_per_node", _, *rest]:
            check(["python", *rest])
        case ["python", "-m", "sa_diffusers.cli.forget", *rest]:
            check(["sa-diffusers", "forget", *rest])
        case ["sa-diffusers", *rest] if {"--help", "--version"} & set(rest[-2:]):
            with suppress(SystemExit):
                main(rest)
        case ["python", "tests/golden/record.py"]:
            return
        case ["python", script, *rest] if script.startswith("scripts/"):
            refuse(lambda: runpy.run_path(script, run_name="__main__"), [script, *rest])
            if script == "scripts/forget.py":
                parse_config(ForgetConfig, rest)
        case ["sa-diffusers", *rest]:
            refuse(main, ["sa-diffusers", *rest])
        case _:
            raise AssertionError(f"not a command of this package: {words}")


def refuse(run, argv: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*argv, UNKNOWN])
        with pytest.raises(SystemExit) as ended:
            run()
    assert ended.value.code == 2


@pytest.mark.parametrize("block", [*blocks("bash"), *inline()], ids=str)
def test_shell_commands_are_taken(block: Block, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert block.commands
    for words in block.commands:
        check(words)
        said = capsys.readouterr().err
        if said:
            assert said.count("error:") == 1 and UNKNOWN in said.splitlines()[-1], said


@pytest.mark.parametrize("block", list(blocks("python")), ids=str)
def test_python_blocks_compile_and_what_they_import_exists(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module not in OWN:
            module = import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "sa_diffusers":
            assert hasattr(import_module("sa_diffusers"), node.attr)


def test_the_reference_has_all_that_the_package_offers() -> None:
    named = set(re.findall(r"sa_diffusers\.(?:\w+\.)*(\w+)", (ROOT / "docs" / "reference.md").read_text()))
    assert set(sa_diffusers.__all__) - named == {"__version__"}


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"(?:configs|scripts|tests)/[\w./*-]*[\w*/]", text)
        missing = [name for name in named if not any(ROOT.glob(name))]
        assert missing == [], page
