"""Map the three top-level folders to sub-packages of ``lightning_lm``; everything else is in pyproject.toml."""

from setuptools import find_namespace_packages, find_packages, setup

MAPPED = ("callbacks", "strategies", "recipes")


def mapped_packages() -> list[str]:
    """Return the dotted names that the top-level folders have once installed."""
    folders = [[name, *(f"{name}.{sub}" for sub in find_namespace_packages(name))] for name in MAPPED]
    return [f"lightning_lm.{package}" for packages in folders for package in packages]


setup(
    packages=find_packages(include=["lightning_lm", "lightning_lm.*"]) + mapped_packages(),
    package_dir={f"lightning_lm.{name}": name for name in MAPPED},
    package_data={
        "lightning_lm": ["py.typed"],
        "lightning_lm.kernels.runtime": ["*.json"],
        "lightning_lm.serving": ["*.html"],
        **{name: ["*.yaml", "*.md"] for name in mapped_packages()},
    },
)
