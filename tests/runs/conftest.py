"""A disk that is soon full."""

import shutil
import subprocess

import pytest


@pytest.fixture
def tiny_disk(tmp_path):
    """A mounted file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)
