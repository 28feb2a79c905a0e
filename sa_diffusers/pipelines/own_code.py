"""Pipelines whose code is saved beside the weights, so that diffusers alone loads them."""

import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from diffusers import DiffusionPipeline


FILE = "pipeline.py"
LIBRARIES = ("diffusers", "transformers")
OWN_IMPORT = re.compile(r"^from (sa_diffusers[\w.]*) import (?:\([^)]*\)|[^\n]*)\n", re.MULTILINE)
OWN_PARTS = {"token_transformer": "sa_diffusers.models.token_transformer"}  # modules of parts by their files' names


class OwnCodePipeline(DiffusionPipeline):
    """A pipeline that is saved with its code, and with that of its parts of which neither library has the class."""

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """As diffusers does, and the code beside it, where `from_pretrained(..., trust_remote_code=True)` looks."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        folder = Path(save_directory)
        content = json.loads((folder / self.config_name).read_text())
        content["_class_name"] = [Path(FILE).stem, type(self).__name__]
        (folder / FILE).write_text(whole_source(inspect.getmodule(type(self))))
        for name, part in self.components.items():
            if part is not None and content[name][0].split(".")[0] not in LIBRARIES:
                module = inspect.getmodule(type(part))
                content[name][0] = module.__name__.rpartition(".")[2]
                (folder / name).mkdir(exist_ok=True)
                (folder / name / f"{content[name][0]}.py").write_text(whole_source(module))
        (folder / self.config_name).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict:
        """The configuration without the file to find the class in: who has this class needs no code of a folder's."""
        content = super()._dict_from_json_file(json_file)
        if isinstance(content.get("_class_name"), list):
            content["_class_name"] = content["_class_name"][1]
        return content

    @classmethod
    def load_config(cls, *args, **kwargs):
        """The same of the parts, which are downloaded by their files' names, and loaded by the class that is here."""
        found = super().load_config(*args, **kwargs)
        for entry in (found[0] if isinstance(found, tuple) else found).values():
            if isinstance(entry, list) and entry and entry[0] in OWN_PARTS:
                entry[0] = OWN_PARTS[entry[0]]
        return found


def whole_source(module: ModuleType) -> str:
    """A module's source, with that of each module of this package in the place of the imports from it."""
    sources: dict[str, str] = {}

    def add(name: str, text: str) -> None:
        if name not in sources:
            sources[name] = ""
            for other in OWN_IMPORT.findall(text):
                add(other, inspect.getsource(import_module(other)))
            del sources[name]  # behind what it needs
            sources[name] = OWN_IMPORT.sub("", text).strip() + "\n"

    add(module.__name__, inspect.getsource(module))
    return "\n\n".join(sources.values())
