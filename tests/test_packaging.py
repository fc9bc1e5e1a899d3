"""The wheel holds the tree, the mapping holds in every way of installing, and no mapped folder is imported twice."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

MAPPED = ("callbacks", "strategies", "recipes")


THIRD_PARTY = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]


def run(code: str, *, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, in which a path comes before what is installed; without one nothing is."""
    paths = [str(path), *THIRD_PARTY] if path else []
    header = f"import sys; sys.path += {paths};" if path is None else f"import sys; sys.path[:0] = {paths};"
    return subprocess.run([sys.executable, "-S", "-c", header + code], cwd=cwd, capture_output=True, text=True)


def expected_files(root: Path) -> set[str]:
    files = {path.relative_to(root) for path in (root / "lightning_lm").rglob("*")}
    for name in MAPPED:
        files |= {Path("lightning_lm", path.relative_to(root)) for path in (root / name).rglob("*")}
    wanted = (".py", ".yaml", ".json", ".md", ".html", ".typed")
    return {file.as_posix() for file in files if file.suffix in wanted or file.name == "py.typed"}


def test_the_wheel_from_the_sdist_holds_every_file_of_the_tree_and_no_other(root, wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == expected_files(root)


def test_nothing_but_the_package_lands_in_site_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lightning_lm"}


def test_the_wheel_knows_its_command_its_licence_and_its_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert "lightning-lm = lightning_lm.cli:main" in points
    assert "License-Expression: Apache-2.0" in metadata
    assert {"dev", "hf", "files", "sentencepiece"} <= {
        line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")
    }
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_the_version_is_written_the_same_in_both_places(root):
    import lightning_lm

    assert tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"] == lightning_lm.__version__


def test_every_dependency_has_both_bounds_and_a_version_between_that_was_tested(root):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    needed = [requirement for line in lines if (requirement := Requirement(line)).name != "lightning-lm"]
    tested = [Requirement(line) for line in (root / "requirements/tested.txt").read_text().splitlines() if "==" in line]
    versions = {requirement.name.lower(): next(iter(requirement.specifier)).version for requirement in tested}
    for requirement in needed:
        assert {bound.operator for bound in requirement.specifier} == {">=", "<"}, requirement
        if requirement.name.lower() in versions:
            assert requirement.specifier.contains(versions[requirement.name.lower()]), requirement
    print(sorted({r.name.lower() for r in needed} - set(versions)))


def test_an_installed_wheel_finds_its_mapped_folders_and_recipes(staged, tmp_path):
    code = (
        "import lightning_lm, lightning_lm.callbacks, lightning_lm.strategies;"
        "from lightning_lm.cli.recipes import recipe_names, recipes_folder;"
        "print(lightning_lm.callbacks.__file__, recipes_folder(), *recipe_names())"
    )
    result = run(code, cwd=tmp_path, path=staged)
    assert result.returncode == 0, result.stderr
    callbacks, recipes, *names = result.stdout.split()
    assert Path(callbacks) == staged / "lightning_lm" / "callbacks" / "__init__.py"
    assert Path(recipes) == staged / "lightning_lm" / "recipes"
    assert "pretrain/quickstart" in names


def test_a_checkout_works_without_an_installation(root, tmp_path):
    code = (
        "import lightning_lm.callbacks as callbacks; from lightning_lm.cli.recipes import recipes_folder;"
        "print(callbacks.__file__, recipes_folder())"
    )
    result = run(code, cwd=tmp_path, path=root)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(root / "callbacks" / "__init__.py"), str(root / "recipes")]


def test_a_new_file_in_a_mapped_folder_is_seen_at_once(root, tmp_path):
    for name in ("lightning_lm", "callbacks", "setup.py"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").touch()
    (tmp_path / "strategies" / "brand_new.py").write_text("ANSWER = 42\n")
    code = (  # the package resolves symbolic links to find its checkout, so it is told where this one is
        f"import lightning_lm; lightning_lm.__path__[:] = [{str(tmp_path / 'lightning_lm')!r}, {str(tmp_path)!r}];"
        "from lightning_lm.strategies.brand_new import ANSWER; print(ANSWER)"
    )
    result = run(code, cwd=tmp_path, path=tmp_path)
    assert result.stdout.strip() == "42", result.stderr


def test_an_editable_installation_sees_a_new_file_at_once(root, tmp_path):
    tree, site = tmp_path / "tree", tmp_path / "site"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "tests", "runs", "build")
    shutil.copytree(root, tree, ignore=ignored)
    site.mkdir()
    backend = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", backend, site], cwd=tree, check=True, capture_output=True)
    with zipfile.ZipFile(next(site.glob("*.whl"))) as archive:
        archive.extractall(site)
    (tree / "strategies" / "__init__.py").write_text("")  # the real one needs packages that are not there
    (tree / "strategies" / "brand_new.py").write_text("ANSWER = 42\n")
    code = (
        f"import site; site.addsitedir({str(site)!r}); from lightning_lm.strategies.brand_new import ANSWER;"
        "import lightning_lm; from lightning_lm.cli.recipes import recipes_folder;"
        "print(ANSWER, lightning_lm.__file__, recipes_folder())"
    )
    result = run(code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["42", str(tree / "lightning_lm" / "__init__.py"), str(tree / "recipes")]


@pytest.mark.parametrize("name", ["callbacks", "strategies"])
def test_a_mapped_folder_refuses_any_other_name(root, tmp_path, name):
    result = run(f"import {name}", cwd=tmp_path, path=root)
    assert result.returncode != 0
    assert f"lightning_lm.{name}" in result.stderr


@pytest.mark.parametrize("name", ["callbacks", "strategies"])
def test_mapped_folders_use_absolute_imports_only(root, name):
    import ast

    for file in (root / name).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} imports relatively"
                assert (node.module or "").split(".")[0] not in MAPPED, f"{file}:{node.lineno}"
