"""What several tests of files need."""

from __future__ import annotations

import subprocess


def namespaces(*flags: str) -> list[str] | None:
    """The beginning of a command line that runs the rest in namespaces of its own, as a container does; None where this
    machine gives none."""
    command = ["unshare", "--user", "--map-root-user", *flags]
    try:
        return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else None
    except OSError:
        return None
