"""What a root must have before this system is switched to it."""

import subprocess
import sys
from pathlib import Path

import pytest

from guestagent.boot.switch import check_root
from tests.beds.calls import call_error
from vsock.errors import CallError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("proc", "sys", "dev", "run", "usr/sbin"):
        (tmp_path / name).mkdir(parents=True)
    init = tmp_path / "usr/sbin/init"
    init.write_text("#!/bin/sh\n")
    init.chmod(0o755)
    (tmp_path / "sbin").symlink_to("usr/sbin")
    return tmp_path


def test_the_init_may_be_behind_a_link(root: Path) -> None:
    check_root(str(root), "/sbin/init")


@pytest.mark.parametrize("name", ["proc", "sys", "dev", "run"])
@pytest.mark.parametrize("target", ["/elsewhere", "elsewhere"])
def test_nothing_is_mounted_through_a_link(root: Path, name: str, target: str) -> None:
    (root / "elsewhere").mkdir()
    (root / name).rmdir()
    (root / name).symlink_to(target)
    with call_error("invalid", match=f"'/{name}' in it", object=f"/{name}"):
        check_root(str(root), "/sbin/init")


def test_check_root_error_names_missing_path(root: Path) -> None:
    (root / "sys").rmdir()
    with pytest.raises(CallError, match=r"'/sys' in it: .*No such file"):
        check_root(str(root), "/sbin/init")
    (root / "sys").mkdir()
    with pytest.raises(CallError, match=r"'/sbin/other' in it: .*No such file"):
        check_root(str(root), "/sbin/other")
    with pytest.raises(CallError, match="is no program"):
        check_root(str(root), "/usr")


_KEEP = """
import shutil, sys
sys.path.insert(0, sys.argv[1])
import late.inner
from guestagent.boot.switch import keep_modules
sys.path = [sys.argv[1]]
keep_modules(sys.argv[2])
shutil.rmtree(sys.argv[1])
import late.inner.module
print(late.inner.module.__file__)
"""


def test_modules_of_packages_can_be_imported_when_the_boot_image_is_gone(tmp_path: Path) -> None:
    source, state = tmp_path / "boot", tmp_path / "state"
    (source / "late/inner").mkdir(parents=True)
    for name in ("late/__init__.py", "late/inner/__init__.py", "late/inner/module.py"):
        (source / name).write_text("")
    done = subprocess.run(
        [sys.executable, "-c", _KEEP, source, state], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{state}/python/late/inner/module.py"
