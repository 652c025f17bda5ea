"""What pyproject.toml cannot say: that `configs/`, the one copy of the recipes, is the package sst_jax.recipes too."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sst_jax*"]), "sst_jax.recipes"],
    package_dir={"sst_jax.recipes": "configs"},
)
