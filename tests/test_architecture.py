"""The rules about who may import whom, read from the source files."""

import ast
import importlib
import sys
from pathlib import Path

import pytest
from detectron2.config import get_cfg

import teacher_student_mask

PACKAGE = Path(teacher_student_mask.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 520


def name_of(path):
    return str(path.relative_to(PACKAGE))


def subpackage_of(path):
    """ "data" for data/shapes.py, "config" for config.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path):
    """Absolute dotted names of all that a file imports, wherever in the file it stands."""
    package = ("teacher_student_mask", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def own_imports_of(path):
    """Subpackages and modules of ours that a file imports: "data", "class_splits", ..."""
    prefix = "teacher_student_mask."
    return {
        name[len(prefix) :].split(".")[0] for name in imports_of(path) if name.startswith(prefix)
    }


every_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


BASE = {"errors", "class_splits", "coco_json"}
DETECTOR = BASE | {"config", "data", "modeling", "evaluation", "structures"}
DETECTOR |= {"run_folder", "trained_model"}
# What each part of the package may import of the others.
ALLOWED = {
    "errors": set(),
    "class_splits": {"errors"},
    "config": set(),
    "structures": set(),
    "coco_json": BASE,
    "drawing": {"coco_json", "errors"},
    "importers": BASE,
    # The three meet in the fields of Instances alone.
    "data": BASE | {"structures"},
    "modeling": {"errors", "structures"},  # whether an instance has a mask is data: no class lists
    "evaluation": BASE,
    "run_folder": {"coco_json", "errors"},
    "trained_model": BASE | {"config", "data", "modeling", "run_folder"},
    "engine": DETECTOR,
    "analysis": DETECTOR,
    "box_prompts": {"errors"},
    "object_masks": {"coco_json", "evaluation", "modeling"},
    "completion": DETECTOR | {"box_prompts", "drawing", "object_masks"},
    "exporters": DETECTOR | {"drawing"},
    "sweep": DETECTOR | {"analysis"},
    "mask_files": BASE | {"importers"},
    "own_data": BASE | {"importers", "run_folder"},
    "judgement": DETECTOR | {"drawing", "engine", "own_data"},
    "training": DETECTOR | {"engine", "judgement", "own_data"},
    "run_onnx": set(),  # runs where this project is not installed
    "__main__": {"cli"},
}


@every_module
def test_every_part_imports_only_what_is_below_it(path):
    part, imported = subpackage_of(path), own_imports_of(path)
    assert "cli" not in imported - {part} or part == "__main__"
    if part not in ("cli", "__init__"):
        assert imported <= ALLOWED[part] | {part}


@pytest.mark.parametrize(
    "module, packages", [("class_splits", set()), ("run_onnx", {"numpy", "onnxruntime", "PIL"})]
)
def test_some_modules_need_few_packages(module, packages):
    top_level = {name.split(".")[0] for name in imports_of(PACKAGE / f"{module}.py")}
    assert top_level - {*sys.stdlib_module_names, "teacher_student_mask"} == packages


def test_config_needs_detectron2s_config_alone():
    names = imports_of(PACKAGE / "config.py")
    assert "detectron2.config.CfgNode" in names
    assert all(name.startswith(("detectron2.config.", "__future__.")) for name in names)


@pytest.mark.parametrize("name", ["mask_targets", "crf", "mask_heads", "hourglass", "grabcut"])
def test_parts_of_the_mask_branch_meet_in_roi_heads_alone(name):
    assert own_imports_of(PACKAGE / "modeling" / f"{name}.py") <= {"errors", "structures"}
    assert own_imports_of(PACKAGE / "modeling/roi_heads.py") == {"modeling"}  # ".x" is resolved


@every_module
def test_nothing_private_or_fragile_of_detectron2_is_imported(path):
    for name in imports_of(path):
        if name.split(".")[0] == "detectron2":
            assert not any(part.startswith("_") for part in name.split(".")), name
            # model_zoo needs pkg_resources, which newer setuptools lack.
            assert not name.startswith(("detectron2.model_zoo", "detectron2.projects")), name


def config_keys_set_in(path):
    """Dotted targets of assignments below a name "cfg", such as "cfg.TEST.GT_BOXES"."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            name = ast.unparse(target)
            if isinstance(target, ast.Attribute) and name.split(".")[0] in ("cfg", "_C", "_CC"):
                found.append(name)
    return found


def test_only_config_creates_keys():
    cfg = get_cfg()
    teacher_student_mask.add_teacher_student_mask_config(cfg)
    known = {f"cfg.{key}" for key in dotted_keys(cfg)}
    assert len(config_keys_set_in(PACKAGE / "config.py")) > 10
    for path in MODULES:
        if name_of(path) != "config.py":
            # Setting a key that is there, on a clone, creates none.
            assert set(config_keys_set_in(path)) <= known, name_of(path)
            assert "CfgNode(" not in path.read_text() and "CN(" not in path.read_text()


def dotted_keys(node, prefix=""):
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, type(node)):
            yield from dotted_keys(value, f"{prefix}{key}.")


@every_module
def test_every_module_says_what_is_public(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    if subpackage_of(path) == "run_onnx":
        pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert module.__all__ and all(hasattr(module, x) for x in module.__all__)
    if path.name != "__init__.py":
        tree = ast.parse(path.read_text())
        defined = {x.name for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
        assert {x for x in defined if not x.startswith("_")} <= set(module.__all__)


@every_module
def test_modules_are_short_and_do_not_print(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES
    if subpackage_of(path) in ("cli", "run_onnx"):
        return  # programs print
    calls = [x.func for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Call)]
    assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls)
