"""Compiles ``src/chainrule/csrc`` where that can be done; without it the package runs on Python alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.command.build_ext import build_ext

MODULE = "chainrule._shortcuts"


def compiled(root: Path, target: Path) -> Path:
    """Compile the extension module into a directory, and return its file."""
    extension = Extension(MODULE, [str(root / "src/chainrule/csrc/shortcuts.c")])
    command = build_ext(Distribution({"name": "chainrule", "ext_modules": [extension]}))
    command.build_lib, command.build_temp = str(target), str(target / "objects")
    command.force = True  # the parts that the source includes are not looked at otherwise
    command.ensure_finalized()
    command.run()
    return Path(command.get_ext_fullpath(MODULE))


class ShortcutsBuildHook(BuildHookInterface):
    """Adds the compiled module to a wheel, or puts it beside its source for an editable installation."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the build."""
        if self.target_name != "wheel" or os.environ.get("CHAINRULE_PURE_PYTHON", "0") not in ("", "0"):
            return
        root = Path(self.root)
        try:
            made = compiled(root, root / "build" / "shortcuts")
        except (Exception, SystemExit) as error:  # whatever a compiler may raise, the package works without
            print(f"chainrule: installed without compiled short cuts, small calls take longer ({error})", file=sys.stderr)
            return
        if version == "editable":
            (root / "src/chainrule" / made.name).write_bytes(made.read_bytes())
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"][str(made)] = f"chainrule/{made.name}"
