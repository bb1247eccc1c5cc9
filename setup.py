"""Which packages the wheel has; all else is in pyproject.toml.

The folders beside livo_jax lie under it in the wheel, so that it takes no other name: livo_jax.configs is configs.
"""

from setuptools import find_packages, setup

BESIDE = ("benchmarks", "configs", "configs.baselines", "data_tools")

setup(
    packages=[*find_packages(include=["livo_jax*"]), *(f"livo_jax.{name}" for name in BESIDE)],
    package_dir={f"livo_jax.{name}": name.replace(".", "/") for name in BESIDE},
)
