"""The closures: Python modules by import, shared libraries by ELF, byte code by compiling."""

import marshal
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from rootfs.bootimage.closure import ClosureError, interpreter_path, module_closure
from rootfs.bootimage.elf import ElfError, ElfFile, library_closure, without_debug_information
from rootfs.bootimage.userland import compile_module

_SOURCES = {
    "app/__init__.py": "",
    "app/init.py": """
        import select
        from app import sub
        from app.late import helper
        """,
    "app/sub.py": """
        TYPE_CHECKING = False
        if TYPE_CHECKING:
            import decimal
            import not_there_at_all
        def run():
            import colorsys
            import thirdparty
            from otherparty import thing
        """,
    "app/late.py": """
        class helper:
            def method(self):
                from .deep import value
        """,
    "app/deep.py": "value = 1\nimport bisect\n",
    "app/unused.py": "import decimal\n",
    "site/thirdparty/__init__.py": "from thirdparty.inner import a\n",
    "site/thirdparty/inner.py": "a = 1\n",
    "site/otherparty.py": "import sched\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in _SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.splitlines()
        path.write_text("\n".join(line.removeprefix("        ") for line in lines))
    return tmp_path


def closure(project: Path, *late: str, absent: tuple[str, ...] = ()) -> set[str]:
    modules = module_closure(
        ["app.init"],
        project=project,
        packages=["app"],
        late=late,
        search=[project / "site"],
        absent=absent,
    )
    return {module.name for module in modules}


def test_own_modules_early_and_late_are_found(project: Path) -> None:
    found = closure(project)
    assert {"app", "app.init", "app.sub", "app.late", "app.deep"} <= found
    assert "app.unused" not in found


def test_standard_modules_are_taken_when_they_are_imported_late(project: Path) -> None:
    found = closure(project)
    assert {"colorsys", "bisect"} <= found
    assert "decimal" not in found  # only for the type checker, or by what is not used


def test_third_party_packages_are_taken_only_when_asked_for(project: Path) -> None:
    assert not {"thirdparty", "otherparty"} & closure(project)
    assert {"thirdparty", "thirdparty.inner"} <= closure(project, "thirdparty")
    assert "sched" in closure(project, "otherparty")


def test_absent_modules_stay_out(project: Path) -> None:
    (project / "app/init.py").write_text("import hashlib\n")
    assert "_hashlib" in closure(project)
    found = closure(project, absent=("_hashlib",))
    assert "hashlib" in found
    assert "_hashlib" not in found


def test_a_missing_entry_is_named(project: Path) -> None:
    with pytest.raises(ClosureError, match=r"app\.nothing"):
        module_closure(["app.nothing"], project=project, packages=["app"], late=[], search=[])


def test_a_module_that_fails_says_how(project: Path) -> None:
    (project / "app/deep.py").write_text("import no_such_module\n")
    with pytest.raises(ClosureError, match="no_such_module"):
        closure(project)


@pytest.mark.parametrize("alive", [False, True])
def test_byte_code_does_not_depend_on_the_compiling_process(alive: bool) -> None:
    """In another process, with other hash seeds, and with the same constants alive already.

    Reference counts of constants tell these apart, and marshal writes them down if it is let.
    """
    path = Path(shutil.__file__).with_name("ftplib.py")  # has a constant where it shows
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from rootfs.bootimage.userland import compile_module\n"
        "source = Path(sys.argv[1]).read_bytes()\n"
        f"kept = compile(source, 'x', 'exec', optimize=2) if {alive} else None\n"
        "sys.stdout.buffer.write(compile_module(source, 'ftplib.py', 2))\n"
    )
    argv = [sys.executable, "-c", script, str(path)]
    here = compile_module(path.read_bytes(), "ftplib.py", 2)
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        assert subprocess.run(argv, env=env, stdout=-1, check=True).stdout == here


def test_byte_code_runs_and_has_no_docstrings() -> None:
    data = compile_module(b'"""doc"""\nassert False\nx = 1\n', "m.py", 2)
    module = types.ModuleType("m")
    exec(marshal.loads(data[16:]), module.__dict__)
    assert module.__dict__["x"] == 1
    assert module.__doc__ is None


def test_needed_libraries_agree_with_readelf() -> None:
    program = interpreter_path()
    output = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    expected = {Path(line.split("=>")[-1].split()[0]).name for line in output.splitlines()}
    found = {path.name for path in library_closure((program,))}
    assert found == expected - {"linux-vdso.so.1"}
    interpreter = ElfFile.read(program).interpreter
    assert interpreter is not None
    assert Path(interpreter) in library_closure((program,))


def test_a_program_without_its_tail_still_runs(tmp_path: Path) -> None:
    path = tmp_path / "python"
    data = without_debug_information(interpreter_path().read_bytes() + b"debug" * 1000)
    assert len(data) < interpreter_path().stat().st_size
    assert data[0x28:0x30] == bytes(8)  # e_shoff: there is no section table any more
    path.write_bytes(data)
    path.chmod(0o755)
    argv = [path, "-I", "-S", "-c", "import zlib; print(6 * 7)"]
    assert subprocess.run(argv, capture_output=True, check=True).stdout == b"42\n"


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01" + bytes(100)])
def test_files_of_other_kinds_are_left_as_they_are(data: bytes, tmp_path: Path) -> None:
    assert without_debug_information(data) == data
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ElfError, match="not a 64-bit"):
        ElfFile.read(tmp_path / "f")


def test_a_damaged_elf_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(interpreter_path().read_bytes()[:100])
    with pytest.raises(ElfError, match="cut"):
        ElfFile.read(tmp_path / "cut")


def test_a_segment_table_outside_of_the_file_is_an_error(tmp_path: Path) -> None:
    data = bytearray(interpreter_path().read_bytes())
    data[0x20:0x28] = b"\xff" * 8  # e_phoff
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ElfError, match="bad"):
        ElfFile.read(tmp_path / "bad")
    with pytest.raises(ElfError, match="damaged"):
        without_debug_information(bytes(data))
