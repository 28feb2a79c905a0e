"""Pages from the templates of this folder: everything here that is HTML or a card goes through `render`."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from sa_diffusers.io.atomic_files import write_text
from sa_diffusers.report.tables import cell, markdown_table


TEMPLATES = Path(__file__).parent / "templates"


@lru_cache
def _environment() -> jinja2.Environment:
    """The one environment: a name that no value was given for is an error, and HTML escapes what it is given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is None or name.endswith(".html.j2"),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = cell
    environment.globals["markdown_table"] = markdown_table
    return environment


def render(template: str | Path, **values: Any) -> str:
    """Fill a template.

    Args:
        template: its file name, such as "report.html.j2", or the Path of a page's that lies elsewhere and may extend
            those here. Values are escaped, but where a name does not end in .html.j2.
        values: whatever the template names. The filter `cell` and the function `markdown_table` are always there.

    Raises:
        jinja2.TemplateNotFound: no such file among the templates.
        jinja2.UndefinedError: the template names a value that was not given.
    """
    if isinstance(template, Path):
        return _environment().from_string(template.read_text(encoding="utf-8")).render(**values)
    return _environment().get_template(template).render(**values)


def write_page(path: str | Path, template: str | Path, **values: Any) -> None:
    """Write what `render` makes of a template, atomically, as UTF-8."""
    write_text(render(template, **values), path)
