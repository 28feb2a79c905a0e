"""What a table of methods is made of: a concept, the methods that forget it, and the strengths of each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from sa_diffusers.io.configuration import config_from_dict, layered
from sa_diffusers.runs.options import ForgetConfig


LISTS = ("neighbours", "long_templates", "attack_templates", "compared")
KEYS = {"kind", "base", "options", "rows", *LISTS}


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: its key in the file, and its folder.
        overrides: options of its runs beside those of all.
        sweep: (option, values), one run a value; or ("snapshot_steps", steps), one run that is looked at on its way.
    """

    name: str
    overrides: dict[str, Any]
    sweep: tuple[str, list]

    @property
    def trains(self) -> bool:
        return self.sweep[0] == "snapshot_steps"


@dataclass(frozen=True)
class ConceptSpec:
    """A file of configs/paper/digits.

    Attributes:
        name: the file's, such as "seven".
        kind: what such a concept is called in the table: local, global or style.
        options: of every run: concept, surrogate, model, ...
        neighbours: classes of the concept's attribute that are closest to it.
        long_templates: long prompts with {} in the concept's place.
        attack_templates: short ones, in which the attack looks for what brings the concept back.
        compared: the measures that methods are compared by, of `matching.COMPARABLE`; where only the surrogate is left
            of the concept's attribute, what is retained of it says nothing of damage.
        rows: the methods; the first is ours.
    """

    name: str
    kind: str
    options: dict[str, Any]
    neighbours: list[str]
    long_templates: list[str]
    attack_templates: list[str]
    compared: list[str]
    rows: dict[str, Row]

    @property
    def ours(self) -> str:
        """The first row's name: the method that the others are compared with."""
        return next(iter(self.rows))

    def configs(self, row: Row, folder: Path, seed: int) -> Iterator[tuple[Any, ForgetConfig]]:
        """The runs of a row, each with its strength; of one that is looked at on its way, the last one."""
        options = layered(ForgetConfig, self.options, row.overrides) | {"seed": seed}
        name, values = row.sweep
        if row.trains:
            steps = {"snapshot_steps": values, "num_train_steps": max(values)}
            config = config_from_dict(ForgetConfig, options | steps | {"output_dir": str(folder)})
            yield max(values), config.resolved()
            return
        for value in values:
            own = {name: value, "output_dir": str(folder / f"{name}-{value}")}
            yield value, config_from_dict(ForgetConfig, layered(ForgetConfig, options, own)).resolved()


def read_spec(path: Path) -> ConceptSpec:
    """Read and check a concept's file, every run of it included.

    Raises:
        ValueError: keys that are unknown or missing, a row without strengths, or options that no run could have.
    """
    values = _read_yaml(path)
    missing, unknown = sorted(KEYS - set(values)), sorted(set(values) - KEYS)
    if missing or unknown:
        raise ValueError(f"{path}: missing keys: {', '.join(missing) or 'none'}; unknown ones: {unknown or 'none'}")
    for name in LISTS:
        if not isinstance(values[name], list) or not all(isinstance(one, str) for one in values[name]):
            raise ValueError(f"{path}: expected {name} to be a list of texts, got {values[name]!r}")
    if not values["rows"]:
        raise ValueError(f"{path}: expected at least one row")
    rows = {name: _read_row(path, name, dict(given)) for name, given in values["rows"].items()}
    base = layered(ForgetConfig, _read_yaml(Path(values["base"])), values["options"] or {})
    for name in ("track_steps", "num_threads", "checkpointing_steps"):
        base[name] = None  # the table looks at snapshots, and its rows are short
    base["classifier"] = []  # its own judge draws more
    texts = {name: values[name] for name in LISTS}
    spec = ConceptSpec(name=path.stem, kind=values["kind"], options=base, rows=rows, **texts)
    if wrong := [template for template in spec.long_templates + spec.attack_templates if "{}" not in template]:
        raise ValueError(f"{path}: expected {{}} in every template, got {wrong[0]!r}")
    for row in rows.values():
        try:
            list(spec.configs(row, Path(row.name), seed=0))
        except ValueError as error:
            raise ValueError(f"{path}, row {row.name}: {error}") from error
    return spec


def _read_yaml(path: Path) -> dict[str, Any]:
    """Raises ValueError: no such file, or none that holds options."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        beside = ", ".join(sorted(one.stem for one in path.parent.glob("*.yaml")))
        raise ValueError(f"{path} cannot be read ({error}); its folder has {beside or 'no YAML file'}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected options, `name: value` a line, got {values!r}")
    return values


def _read_row(path: Path, name: str, given: dict[str, Any]) -> Row:
    sweeps = [(option, given.pop(option)) for option in ("snapshot_steps",) if option in given]
    sweeps += list(given.pop("sweep", {}).items())
    if len(sweeps) != 1 or not sweeps[0][1]:
        raise ValueError(
            f"{path}, row {name}: expected the strengths of one option, by snapshot_steps: [...] or sweep: "
            f"{{option: [...]}}, got {dict(sweeps)}"
        )
    return Row(name, given, sweeps[0])


def only_rows(spec: ConceptSpec, names: list[str]) -> ConceptSpec:
    """The same with some of its rows, and ours. Raises ValueError: a name that is none."""
    if unknown := [name for name in names if name not in spec.rows]:
        raise ValueError(f"{spec.name} has no row {', '.join(unknown)}; it has {', '.join(spec.rows)}")
    return replace(spec, rows={name: row for name, row in spec.rows.items() if name in (spec.ours, *names)})
