"""The documentation's pages of methods and families, made of the registries while the site is built (mkdocs.yml)."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from sa_diffusers import methods
from sa_diffusers.families import CAPABILITIES, Family
from sa_diffusers.families.base import registry
from sa_diffusers.report.tables import markdown_table
from sa_diffusers.runs.options import ForgetConfig


if TYPE_CHECKING:  # tests read the pages where mkdocs is absent
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def families() -> list[type[Family]]:
    return list(dict.fromkeys(registry().values()))


def title(family: type[Family]) -> str:
    return family.name.replace("_", " ").capitalize()


def serves(method: methods.Method, family: type[Family]) -> bool:
    return method.requires <= family.capabilities and method.completes == ("completion" in family.capabilities)


def values(given: dict[str, Any]) -> str:
    """Options and their values, as the command line has them."""
    rows = [[f"`--{name}`", f"`{'null' if value is None else value}`"] for name, value in given.items()]
    return markdown_table(["option", "value"], rows)


def method_page(method: methods.Method) -> str:
    named = [f"[{title(f)}](../families/{f.name}.md)" for f in families() if serves(method, f)]
    parts = [f"# {method.name}\n\n{method.title}: {method.summary}.", inspect.getdoc(type(method))]
    parts.append(f"For: {', '.join(named)}." + (" Also in a LoRA." if method.takes_lora and method.trains else ""))
    what = "--config bundled/digits_inpaint" if method.completes else '--concept "Brad Pitt"'
    parts.append(f"```bash\nsa-diffusers forget {what} --method {method.name}\n```")
    if method.fixes:
        parts.append(f"## What it settles\n\nAnother value of these is refused.\n\n{values(method.fixes)}")
    own = dataclasses.fields(method.Options) if method.Options else ()
    if own:
        rows = [[f"`--{f.name}`", f"`{f.default}`", f.metadata["help"]] for f in own]
        parts.append("## Its own options\n\n" + markdown_table(["option", "default", "what it is"], rows))
    return "\n\n".join(parts) + "\n"


def family_page(family: type[Family]) -> str:
    able = [f"- {CAPABILITIES[name]}" for name in CAPABILITIES if name in family.capabilities]
    named = [f"[{m.name}](../methods/{m.name}.md)" for m in methods.registry().values() if serves(m, family)]
    scopes = ", ".join(f"`{name}`" for name in family.scopes)
    parts = [
        f"# {title(family)}\n\n{inspect.getdoc(family).partition('Raises:')[0].strip()}",
        f"Pipelines: {', '.join(f'`{name}`' for name in family.pipelines)}. Trained: `{family.component}`, of it "
        f"`--train_scope` {scopes}.",
        "A model that\n\n" + "\n".join(able),
        f"## Methods\n\n{', '.join(named)}",
    ]
    if family.defaults:
        default = ForgetConfig()
        changed = {name: value for name, value in family.defaults.items() if value != getattr(default, name)}
        parts.append(f"## Defaults of its own\n\n{values(changed)}")
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, tuple[str, str]]:
    """{path: (title in the navigation, text)} of every page."""
    rows = [[f"[{m.name}]({m.name}.md)", m.title, m.summary] for m in methods.registry().values()]
    found = {
        "methods/index.md": ("Methods", "# Methods\n\n" + markdown_table(["--method", "name", "what"], rows) + "\n")
    }
    found |= {f"methods/{name}.md": (name, method_page(method)) for name, method in methods.registry().items()}
    rows = [[f"[{title(f)}]({f.name}.md)", ", ".join(f.pipelines), f.component] for f in families()]
    listed = "# Families\n\n" + markdown_table(["family", "pipelines", "trained"], rows) + "\n"
    found["families/index.md"] = ("Families", listed)
    return found | {f"families/{f.name}.md": (title(f), family_page(f)) for f in families()}


def on_config(config: MkDocsConfig) -> None:
    """Fill the empty sections of the navigation."""
    for section in config.nav:
        for name in section:
            if section[name] == []:
                folder = f"{name.lower()}/"
                section[name] = [
                    path if path.endswith("index.md") else {title: path}
                    for path, (title, _) in pages().items()
                    if path.startswith(folder)
                ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    from mkdocs.structure.files import File

    for path, (_, text) in pages().items():
        files.append(File.generated(config, path, content=text))
