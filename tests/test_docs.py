"""Documentation that must not drift from the code."""

import re
from pathlib import Path
from typing import get_args

import pytest

from rbm_dist.config.fields import Section
from rbm_dist.config.run import Config
from rbm_dist.config.source import SourceConfig

ROOT = Path(__file__).parents[1]


def keys(model: type[Section], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))  # one that may be null is a union
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if inner and name != "source":
            found += keys(inner[0], f"{prefix}{name}.")
        elif name != "source":
            found.append(f"{prefix}{name}")
    return found


def test_every_key_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    documented = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
    expected = keys(Config) + [key for kind in get_args(SourceConfig) for key in keys(kind, "source.")]
    assert sorted(documented) == sorted(expected)
    for section, model in Config.model_fields.items():
        if isinstance(model.annotation, type) and issubclass(model.annotation, Section):
            for name, field in model.annotation.model_fields.items():
                if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
                    assert f"| `{section}.{name}` | {field.default} |" in text


@pytest.mark.parametrize("page", [path.name for path in sorted((ROOT / "docs").glob("*.md"))] + ["../README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / "docs" / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page}: {target}"
