"""Where the property files are, in a checkout, an editable install or a wheel."""

from __future__ import annotations

from pathlib import Path


def properties_dir() -> Path:
    """The folder with overall.yaml: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "properties", package.parent / "properties"):
        if (folder / "overall.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no properties/overall.yaml in {package} or beside it; reinstall recbole_mm")
