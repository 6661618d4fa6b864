"""One set of packages: pinned exactly, the same for pip and conda, and enough for what the course imports."""

import ast
import importlib.metadata
import re
import sys

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from utils.paths import ROOT
from utils.setup import environment

FILES = ("requirements.txt", "requirements-teaching.txt", "requirements-dev.txt")
CLASS = "requirements-class.txt"  # pins all that it brings along itself
BEFORE_INSTALLATION = (
    "utils/paths.py",
    "course.py",
    "utils/setup/environment.py",
    "utils/setup/workbook.py",
    "utils/setup/doctor.py",
)


def requirements(name):
    """The requirements of a file as {name: Requirement}."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def constraints():
    """The pins of constraints.txt that hold for this Python, as {name: version}."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): version_of(pin) for pin in pins if holds(pin)}


def holds(requirement, extra=""):
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def version_of(requirement):
    return str(requirement.specifier).removeprefix("==")


def closure(names):
    """What these installed packages bring along, themselves included."""
    found, todo = set(), [(name, "") for name in names]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        for text in importlib.metadata.requires(name) or ():
            inner = Requirement(text)
            if holds(inner, extra):
                todo += [(canonicalize_name(inner.name), each) for each in ("", *inner.extras)]
    return {name for name, _ in found}


def imports(path, top_only=False):
    """The packages that a Python file imports, without the standard library and the course itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module.partition(".")[0])
    return modules - sys.stdlib_module_names - {"attention", "utils", "tests", "data", "course", *neighbours(path)}


def neighbours(path):
    """The modules in the same folder, which a test may import by their bare name."""
    return {other.stem for other in path.parent.glob("*.py")}


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("name", [*FILES, CLASS])
def test_direct_requirements_are_pinned_exactly(name):
    assert requirements(name)
    for requirement in requirements(name).values():
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"{name}: {requirement} is no exact pin"


def test_constraints_agree_with_the_direct_pins():
    pinned = constraints()
    for name, requirement in (requirements(FILES[0]) | requirements(FILES[1]) | requirements(FILES[2])).items():
        if not name.startswith("nvidia-") and holds(requirement):
            assert pinned.get(name) == version_of(requirement), f"{name} in constraints.txt: {pinned.get(name)}"


def test_constraints_pin_everything_that_is_brought_along():
    direct = [name for file in FILES for name, requirement in requirements(file).items() if holds(requirement)]
    missing = {name for name in closure(direct) - set(constraints()) if not comes_with_cuda(name)}
    assert not missing


def test_constraints_say_nothing_about_the_cuda_build_of_torch():
    assert not [name for name in constraints() if comes_with_cuda(name)]


def comes_with_cuda(name):
    return name.startswith("nvidia-") or name in ("triton", "cuda-toolkit")


def test_conda_takes_its_packages_from_requirements_txt():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert conda["name"] == environment.CONDA_NAME
    assert conda["dependencies"] == ["python=3.11", "pip", {"pip": ["-r requirements.txt"]}]


def test_the_course_imports_only_what_a_learner_has_installed():
    paths = [path for path in sources("attention", "solutions", "utils") if "teaching" not in path.parts]
    check_imports(paths, closure_of=("requirements.txt",))


def test_what_a_teacher_runs_imports_only_what_a_teacher_has_installed():
    check_imports(sources("utils/teaching"), closure_of=FILES[:2])


def test_the_tests_and_scripts_import_only_what_a_contributor_has_installed():
    check_imports(sources("tests", "data") + [ROOT / "conftest.py"], closure_of=FILES)


def check_imports(paths, closure_of):
    allowed = closure([name for file in closure_of for name, each in requirements(file).items() if holds(each)])
    owners = importlib.metadata.packages_distributions()
    assert paths
    for path in paths:
        for module in imports(path):
            owner = {canonicalize_name(name) for name in owners.get(module, ())}
            assert owner & allowed, f"{path.relative_to(ROOT)} imports {module}, which {closure_of[-1]} does not bring"


@pytest.mark.parametrize("name", BEFORE_INSTALLATION)
def test_what_runs_before_the_installation_imports_the_standard_library_only(name):
    assert imports(ROOT / name, top_only=True) == set()


def test_course_py_can_be_read_by_an_older_python():
    ast.parse((ROOT / "course.py").read_text(encoding="utf-8"), feature_version=(3, 8))
