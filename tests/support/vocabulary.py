"""Words that are no identifiers in this project, because the field has a better word for each of them.

    python -m tests.support.vocabulary

prints how often each word stands as an identifier in the code, and where. It exits with 1 where one does.
CONTRIBUTING.md says which words to use.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCES = ("*.py", "build_tasks/**/*.py", "tests/**/*.py", "benchmarks/*.py")

# Words that stand nowhere as an identifier, each line with the words to use in their place.
EVERYWHERE = {
    "format_…, message, log, emit, listener, ignore": "told said say tell hear audience nobody",
    "requested, from_command_line, options": "asked given wanted",
    "no-op cache, load, save, unselected, global_signature, stat_signatures, recently_edited": (
        "settled look note apart world stamps _young"
    ),
    "preserve_digest, copy_digest, RACY_WINDOW_NS": "followed copied TICK_NS",
    "external_inputs, missing_requirements, dependency_paths, stale_inputs, modified_outputs, tool_fingerprint": (
        "elsewhere lacking watched causes damage recipe _recipe"
    ),
    "UpToDate, imported_digests, nothing_missing, unsupported_message, spec_key_of": (
        "Current code_of LOADED nothing not_here in_spec"
    ),
    "ensemble_parts, triton_models, graph_gated_separately, graph_file, capability_suffix, artifact_task_name": (
        "around serves graph_apart graph_in variant served_as only_onnx"
    ),
    "ENSEMBLE_MODELS, REDUCED_PRECISIONS, NATIVE_PRECISIONS, STATE_DB": "AROUND CONVERTED UNCONVERTED RECORDS",
    "float_outputs, layout_dims, perturb_one_ulp, max_relative_error, session_without_optimizations": (
        "continuous arranged moved_by_an_ulp disagreement unoptimised"
    ),
    "top1_changes, top5_losses, margin, untestable_reason, gate_error, tie_tolerance": (
        "turned lost lead doubt refusal window"
    ),
    "rank_nodes, keep_qdq_for, MAX_EVALUATIONS": "by_effect stripped PROBES",
    "TaskResult, ModelRow, final_state": "Outcome Row became",
    "NullDisplay, LogDisplay, FailuresDisplay, LiveDisplay": "Nothing Lines Failures Terminal",
    "reusable_versions": "standing",
}

# Words that are right in other places: what defines them there, and the word to use in its place.
DEFINED_IN = {
    "build_tasks/runtime/atomic_files.py": {
        "scratch": "scratch_dir", "discard": "remove_tree", "update": "sync_dir",
    },
    "build_tasks/runtime/stage.py": {
        "light": "in_process", "facts": "host_fingerprint", "images": "peak_batch", "place": "install",
    },
    "build_tasks/spec/model.py": {
        "served": "served_formats", "cast": "is_cast", "compiled": "has_engine",
    },
    "build_tasks/formats/pytorch_network.py": {
        "served": "wrap_for_serving", "best": "top_k_outputs", "graph": "OnnxModule", "example": "example_input",
    },
    "build_tasks/formats/onnx_runtime.py": {"rounded": "emulate_bf16"},
    "build_tasks/verification/metrics.py": {"own": "overrides"},
    "build_tasks/verification/gate.py": {"own": "overrides"},
    "build_tasks/verification/node_sensitivity.py": {"rounding": "emulate_nodes"},
    "build_tasks/doit_plugin/dry_run.py": {"steps": "plan_steps", "judged": "predict"},
    "build_tasks/stages/publish.py": {"put": "write_version"},
    "build_tasks/stages/config.py": {"kind": "instance_kind"},
    "build_tasks/triton/derived_config.py": {"kind": "instance_kind"},
}  # fmt: skip

# Modules of the tests that have another name now.
TEST_MODULES = {
    "small": "tiny_network", "served": "specs_served", "warm": "shared_forkserver", "imported": "forkserver_preload",
    "stand_ins": "fakes",
}  # fmt: skip


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a module's code uses or defines, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.alias():
                yield from ((part, node.lineno) for part in (node.asname or node.name).split("."))


def definitions(tree: ast.Module) -> Iterator[str]:
    """The functions, classes and variables of a module, and the members of its classes."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in (*tree.body, *(member for each in classes for member in each.body)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Assign():
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


def places() -> dict[str, list[str]]:
    """Where each word stands as an identifier ("file:line"), words of one module under `module: word`."""
    files = {path.relative_to(ROOT).as_posix(): path for pattern in SOURCES for path in ROOT.glob(pattern)}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    occurrences: dict[str, list[str]] = {word: [] for words in EVERYWHERE.values() for word in words.split()}
    for name, tree in trees.items():
        for word, line in identifiers(tree):
            if word in occurrences:
                occurrences[word].append(f"{name}:{line}")
    for module, words in DEFINED_IN.items():
        defined = Counter(definitions(trees[module]) if module in trees else ())
        occurrences |= {f"{module}: {word}": [module] * defined[word] for word in words}
    modules = [name for name in trees if name.startswith("tests/")]
    for word in TEST_MODULES:
        occurrences[f"tests: {word}"] = [name for name in modules if Path(name).stem == word]
    return occurrences


if __name__ == "__main__":
    occurrences = places()
    for word, uses in occurrences.items():
        print(f"{len(uses):4} {word}  {' '.join(uses)}".rstrip())
    print(f"{sum(map(len, occurrences.values()))} in all, of {len(occurrences)} words")
    sys.exit(any(occurrences.values()))
