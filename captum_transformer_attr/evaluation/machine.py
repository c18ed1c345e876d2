"""Where and with what a result was made."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "captum", "timm", "transformers", "torchvision", "numpy", "scikit-learn", "torchmetrics")


def circumstances(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine, versions, commit, command and date, as JSON."""
    return {
        "machine": _machine(torch.device(device)),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def described(how: Mapping[str, Any]) -> str:
    """``circumstances`` as a Markdown paragraph of two lines: the command; machine, versions, commit and date."""
    versions = ", ".join(f"{name} {number}" for name, number in how["versions"].items())
    return f"`{how['command']}`\n\n{how['machine']}; {versions}; commit {how['commit'] or 'unknown'}; {how['date']}."


def commit(folder: Path | None = None) -> str:
    """The commit the source lies at, with "+ changes" if the package differs from it; empty outside a repository."""
    package = folder or Path(__file__).resolve().parents[1]
    try:
        run = {"cwd": package, "capture_output": True, "text": True, "timeout": 10, "check": True}
        # Installed into an environment inside another project's repository, the package is not of that commit.
        subprocess.run(["git", "ls-files", "--error-unmatch", "__init__.py"], **run)  # type: ignore[call-overload]
        name = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "--", "."], **run).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{name} + changes" if changed else name


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {platform.system()} {platform.machine()}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        model = next(named, f": {model}").split(":", 1)[1].strip()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
