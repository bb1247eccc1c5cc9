"""What pip install . brings, outside a checkout."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("benchmarks", "configs", "data_tools", "livo_jax")
FILES = ("LICENSE", "README.md", "pyproject.toml", "requirements.txt", "setup.py")


def test_the_wheel_has_all_of_it_under_one_name(tmp_path):
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / "source")
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"livo_jax"}
    for folder in ("configs", "data_tools", "livo_jax"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                assert f"livo_jax/{name.removeprefix('livo_jax/')}" in names
    assert "livo_jax/benchmarks/sdxl_small/unet/config.json" in names, "configs/sdxl.py:smoke"
