"""Files of the packages that a scale is made of: read where `make parts` put them, checked once per process, never imported."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from vlsafe.core.assets import Package, Packed
from vlsafe.core.writing import file_digest

DEBIAN = "debian"  # the folder below the one of Python packages where Debian's are unpacked


def root() -> Path:
    """The folder of the packages, from the environment's `VLSAFE_POCKET`; else the nearest `.pocket` upwards, for notebooks run
    below the one where `make` does."""
    here = Path.cwd()
    near = next((folder for folder in (here, *here.parents) if (folder / ".pocket").exists()), here)
    return Path(os.environ.get("VLSAFE_POCKET") or near / ".pocket").absolute()


def path(package: Package, file: str) -> Path:
    """Where a file of a package lies. What `Package.files` lists it under, a name or a pattern, is checked first.

    Raises:   KeyError for a file that the package does not list; FileNotFoundError where it is not installed; ValueError where
              its content is not the listed one
    """
    place = _base(root(), package) / file
    entries = [entry for entry, _ in package.files if entry == file or "*" in entry]
    if not any(place in _checked(root(), package, entry) for entry in sorted(entries, key=lambda entry: entry != file)):
        raise KeyError(f"{file!r} is no file of {package.name} that the scale lists")
    return place


def paths(package: Package, pattern: str) -> list[Path]:
    """The files of a package under a pattern that it lists, sorted; what is raised is as in `path`."""
    if pattern not in dict(package.files):
        raise KeyError(f"{pattern!r} is no pattern of {package.name} that the scale lists")
    return list(_checked(root(), package, pattern))


def record(packed: Packed, *names: str) -> dict[str, Any]:
    """What a manifest says of packages (all, or those named): version, licence, and the SHA-256 of what is read, checked.

    Raises:   FileNotFoundError or ValueError as in `path`
    """
    packages = {name: packed.packages[name] for name in names or packed.packages}
    for package in packages.values():
        for entry, _ in package.files:
            _checked(root(), package, entry)
    return {
        package.name: {"version": package.version, "licence": package.licence, "sha256": dict(package.files)}
        for package in packages.values()
    }


def _base(folder: Path, package: Package) -> Path:
    return folder / DEBIAN if package.kind == "debian" else folder


@cache
def _checked(folder: Path, package: Package, entry: str) -> tuple[Path, ...]:
    """The files of an entry, whose content is the listed one. Links to other files of the package are left out."""
    base, expected = _base(folder, package), dict(package.files)[entry]
    found = sorted(file for file in base.glob(entry) if file.is_file() and not file.is_symlink())
    if not found:
        raise FileNotFoundError(f"{entry} of {package.name} {package.version} is not below {folder}; run `make parts`")
    if (digest := _digest(base, found) if "*" in entry else file_digest(found[0])) != expected:
        raise ValueError(
            f"{entry} below {folder} is not that of {package.name} {package.version} (SHA-256 {digest}); `make parts`"
        )
    return tuple(found)


def _digest(base: Path, files: list[Path]) -> str:
    """One digest of several files: of the lines that `sha256sum` would write of them."""
    lines = (f"{file_digest(file)}  {file.relative_to(base).as_posix()}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
