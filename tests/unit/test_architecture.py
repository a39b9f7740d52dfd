"""Imports run one way, and the project speaks of itself alone."""

import ast
import re
import subprocess

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.fast
PACKAGE = ROOT / "prunadapt_ds"
# A module may import modules of lower floors, or of its own subpackage.
FLOORS = (
    {"errors", "environment", "faults", "hub", "resources"},
    {"launchers", "options", "data"},
    {
        "files",
        "weight_files",
        "watchdog",
        "pulse",
        "signals",
        "config",
        "distributed",
        "schedule",
        "reload",
        "clocks",
        "attention",
        "norms",
        "ds_fields",
    },
    {"ds_config", "models", "entry", "objective", "outline", "figures", "memory", "older_readers"},
    {"formats", "tracing", "zero3", "model_folder"},
    {"streaming"},
    {"batches", "backbone", "adapters", "gates", "latency"},
    {"importance", "logits"},
    {"budget", "tmp"},
    {"resize"},
    {"engine", "state"},
    {"inventory", "labels"},
    {
        "label_scale",
        "weight_average",
        "zero_costs",
        "export",
        "shrink",
        "board",
        "report",
        "checkpoint",
        "initial_adapter",
        "token_teacher",
    },
    {"tracking", "inputs", "proof"},
    {"card", "session", "graphs", "trained_folder", "adapter_folder", "pages"},
    {"setup", "step", "snapshot"},
    {"earlier_run"},
    {"finish", "resume", "answers", "one_shot"},
    {"keeper", "rebuild", "distillation"},
    {"progress"},
    {"train"},
    {"commands"},
    {"console"},
    {"__main__"},
)
FLOOR = {name: i for i, floor in enumerate(FLOORS) for name in floor}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name}: write imports out in full"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "prunadapt_ds":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("prunadapt_ds."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if name == "__init__":
        assert not list(imports_of(path))
        return
    assert name in FLOOR, f"{name} has no floor: give it one in FLOORS"
    for imported in imports_of(path):
        assert imported == name or FLOOR[imported] < FLOOR[name], f"{name} imports {imported}"


def test_the_exported_file_needs_torch_and_transformers_only():
    allowed = {"torch", "transformers", "typing", "dataclasses", "copy", "__future__"}
    tree = ast.parse((PACKAGE / "models" / "modeling_prunadapt.py").read_text())
    roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert roots <= allowed


def test_no_machine_paths():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        path = ROOT / name
        if not path.is_file() or path.suffix not in {".py", ".md", ".sh", ".json", ".toml", ".yaml", ".txt", ""}:
            continue
        text = path.read_text(errors="ignore")
        assert not re.search(r"(?<![\w.])/(work|root|home)/\w", text), f"{name} names a path of one machine"
