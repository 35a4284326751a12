"""Builds the Dockerfile with buildah on a base image made by debootstrap: without Docker and without image registries.

    python tests/buildah.py [FOLDER]

Run it as root, with Debian's buildah and debootstrap. It takes a quarter of an hour, and 30 GB in FOLDER. Without
FOLDER it uses a temporary folder and removes it at the end. A FOLDER that is given stays, and the next run reuses its
base image and environment.
It prints the transcript of docs/how-to/docker.md: the output lines of buildah and doit that report what was done.
The whole output is in FOLDER/logs.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASE = "localhost/python"

TINY = """\
formats = ["torchscript", "onnx"]
max_batch_size = 4

[architecture]
timm = "test_efficientnet"

[weights]
source = "random://0"

[onnx]
opset = 17
"""

SHIPPED = "efficientnet_lite0"
VERSION_COMPATIBLE = "tensorrt,version-compatible=true"
MODELS = {"tiny", "tiny_onnx", SHIPPED, f"{SHIPPED}_onnx", f"{SHIPPED}_preprocess", f"{SHIPPED}_ensemble"}
EXPECTED = {
    *(f"{name}/config.pbtxt" for name in MODELS),
    *("tiny/1/model.pt", "tiny_onnx/1/model.onnx", f"{SHIPPED}/1/model.pt", f"{SHIPPED}_onnx/1/model.onnx"),
    *(f"{SHIPPED}_preprocess/1/model.py", f"{SHIPPED}/labels.txt", f"{SHIPPED}_onnx/labels.txt"),
}

STEP = re.compile(r"(?:\[\d/\d\] )?STEP \d+/\d+: ((?:RUN|COPY) .*)")
IMAGE_PYTHON = "3.11"  # of bookworm, which stands in for Triton's image
MOUNTS = re.compile(r"--mount=\S+")
REPORTED = re.compile(
    r"(.*\s)?[✓✗–!] \w|.*\d+ (built|up to date)|.*skipped: a dependency failed|"
    r"models/\S+: triton.release|not built for Triton|[Ee]rror: "
)
TASK = re.compile(r"([✓✗]) (\S+)(?: +([\w.]+)(?= |$))?")


@dataclass
class Build:
    """The result of one `buildah bud`: exit code, output, and the doit tasks that ran or failed in it."""

    code: int
    output: str
    ran: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for mark, stage, name in TASK.findall(self.output):
            (self.ran if mark == "✓" else self.failed).add(f"{stage}:{name}" if name else stage)

    def count(self, state: str) -> int:
        """The number of tasks in this state according to doit's last line; 0 if the line does not name the state."""
        counts = re.findall(rf"(\d+) {state}", self.output)
        return int(counts[-1]) if counts else 0

    @property
    def doit_ran(self) -> bool:
        return bool(self.count("built") or self.count("up to date") or self.failed)


class Workspace:
    """A folder that holds buildah's storage and caches, a copy of the project, and the logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.project = folder / "project"
        # buildah keeps cache mounts below its temporary folder.
        self.environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "BUILDAH_ISOLATION": "chroot"}
        for name in ("tmp", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.project, ignore_errors=True)
        copy_project(self.project)
        self.pip_config, self.mounts = copy_pip_config(folder)
        self.builds = 0

    def buildah(self, *arguments: str) -> str:
        """Run a buildah command that must succeed, and return its output."""
        run = subprocess.run(
            self.command_line(*arguments), env=self.environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return run.stdout.strip()

    def command_line(self, *arguments: str) -> list[str]:
        return ["buildah", "--root", f"{self.folder}/storage", "--runroot", f"{self.folder}/run", *arguments]

    def remove_earlier_results(self) -> None:
        """Remove what an earlier run left in this folder, except the base image and the environment."""
        self.buildah("rm", "--all")
        for image in ("localhost/repository", "localhost/triton"):
            if image in self.images():
                self.buildah("rmi", "--force", image)
        self.buildah("rmi", "--prune")
        shutil.rmtree(self.folder / "tmp/buildah-cache", ignore_errors=True)

    def images(self) -> list[str]:
        return self.buildah("images", "--format", "{{.Name}}").splitlines()

    def make_base(self) -> None:
        """Make an image of Debian with Python, if there is none yet."""
        if BASE in self.images():
            return
        print_command("debootstrap --variant=minbase --include=python3-venv,python3-pip,ca-certificates bookworm")
        container = self.buildah("from", "scratch")
        root = self.buildah("mount", container)
        with (self.folder / "logs/debootstrap.log").open("w") as log:
            include = "--include=python3-venv,python3-pip,ca-certificates"
            subprocess.run(
                ["debootstrap", "--variant=minbase", include, "bookworm", root], stdout=log, stderr=log, check=True
            )
        self.buildah("umount", container)
        self.buildah("commit", "--quiet", container, BASE)
        self.buildah("rm", container)

    def build(self, title: str, *arguments: str, target: str = "repository", must_fail: bool = False) -> Build:
        """Build a stage with `buildah bud`. The output goes to a log, and its important lines to the transcript."""
        transcript = f"buildah bud --layers --target {target} {' '.join(arguments)}".replace(f"{self.folder}/", "")
        print_command(f"{transcript.strip()} .", title)
        command = self.command_line(
            *("bud", "--layers", "--network", "host", "--target", target, "--tag", f"localhost/{target}"),
            *("--format", "docker"),  # the OCI format has no health check
            *("--build-arg", f"PYTHON_IMAGE={BASE}", "--build-arg", f"TRITON_IMAGE={BASE}"),
            *("--build-arg", f"TRITON_PYTHON={IMAGE_PYTHON}"),
            *(f"--volume={source}:{target}:ro" for source, target in self.mounts.items()),
            *("--volume", f"{self.pip_config}:/etc/pip.conf:ro"),
            *(*arguments, "."),
        )
        started = time.monotonic()
        self.builds += 1
        process = subprocess.Popen(
            command,
            cwd=self.project,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        output = []
        step, cached = "", 0
        with (self.folder / f"logs/{self.builds}.log").open("w") as log:
            for text in process.stdout:
                output.append(text)
                log.write(text)
                log.flush()
                if text.startswith("--> Using cache"):
                    step, cached = "", cached + 1
                    continue
                if step:
                    print(shortened(f"STEP {' '.join(MOUNTS.sub('', step).split())}"), flush=True)
                match = STEP.match(text)
                step = match[1] if match else ""
                if REPORTED.match(text):
                    print(shortened(text.rstrip()), flush=True)
        build = Build(process.wait(), "".join(output))
        seconds = time.monotonic() - started
        print(f"[{cached} steps from the layer cache, exit code {build.code}, {seconds:.0f} s]", flush=True)
        assert (build.code != 0) == must_fail, build.output[-3000:]
        return build

    def files(self, image: str, folder: str = "") -> dict[str, bytes]:
        """The content of every file of an image below a folder, by path."""
        container = self.buildah("from", "--pull-never", image)
        top = Path(self.buildah("mount", container)) / folder
        files = {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        self.buildah("umount", container)
        self.buildah("rm", container)
        return files

    def edit(self, model: str, old: str, new: str) -> None:
        file = self.project / f"models/{model}/model.toml"
        text = file.read_text()
        assert old in text, f"{file} does not hold {old!r}"
        file.write_text(text.replace(old, new, 1))
        print(f"\n# models/{model}/model.toml: {old.strip() or 'at the end'!r} -> {new.strip()!r}", flush=True)


def copy_project(folder: Path) -> None:
    """Copy the tracked and the new files; a tiny model replaces the one whose weights are a download."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.rmtree(folder / "models/efficientnet_b3")
    (folder / "models/tiny").mkdir()
    (folder / "models/tiny/model.toml").write_text(TINY)


def copy_pip_config(folder: Path) -> tuple[Path, dict[str, str]]:
    """Write a pip.conf with the settings of this machine's pip, and return it with the local paths that it names.

    The settings come from files and environment variables. Both results are empty if pip has its defaults, as on most
    machines.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True, check=True
    )
    sections: dict[str, dict[str, str]] = {}
    mounts: dict[str, str] = {}
    for line in sorted(
        listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")
    ):  # variables win, as in pip
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        value = value.strip("'\"")
        sections.setdefault("global" if section == ":env:" else section, {})[key] = value
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index in a folder may refer to files in its parent folder.
                path = path.parent if word.startswith("file://") else path
                mounts[str(path)] = str(path)
    config = folder / "pip.conf"
    config.write_text(
        "".join(
            f"[{section}]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items())
            for section, keys in sections.items()
        )
    )
    return config, mounts


def shortened(line: str, width: int = 130) -> str:
    return line if len(line) <= width else f"{line[:width]} …"


def unmount(folder: Path) -> None:
    """Unmount everything below a folder: buildah leaves its storage mounted, and so it cannot be removed."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for point in reversed([point for point in points if point.startswith(f"{folder}/")]):
        subprocess.run(["umount", point], check=True)


def print_command(command: str, title: str = "") -> None:
    print(f"\n{f'# {title}' + chr(10) if title else ''}$ {command}", flush=True)


def main(folder: Path) -> None:
    workspace = Workspace(folder)
    workspace.remove_earlier_results()
    workspace.make_base()
    workspace.build("pip", target="environment")

    first = workspace.build("the first build: everything")
    assert first.count("built") == len(first.ran)
    assert first.count("up to date") == 1, "prune had nothing to do, and everything else was built"
    total = len(first.ran) + 1
    published = workspace.files("localhost/repository")
    assert published.keys() >= EXPECTED, EXPECTED - published.keys()
    assert {path.partition("/")[0] for path in published} == MODELS

    again = workspace.build("nothing has changed: not even doit runs")
    assert not again.doit_ran
    assert workspace.files("localhost/repository") == published

    workspace.edit("tiny", "opset = 17", "opset = 17  # a comment")
    comment = workspace.build("a comment: doit runs, and no stage does")
    assert comment.ran == set()
    assert comment.count("up to date") == total
    assert workspace.files("localhost/repository") == published

    workspace.edit("tiny", "opset = 17", "opset = 16")
    edited = workspace.build("an edit: its stages run, and no other")
    stages = {f"{stage}:tiny_onnx" for stage in ("measure", "accuracy", "config", "client", "publish")}
    (overview,) = edited.ran - stages - {"onnx:tiny"}  # of all the model's artifacts
    assert edited.ran - {overview} == {*stages, "onnx:tiny"}
    assert overview.endswith(":tiny")
    assert edited.count("up to date") == total - len(edited.ran)
    changed = workspace.files("localhost/repository")
    assert {path.partition("/")[0] for path in published if changed[path] != published[path]} == {"tiny_onnx"}

    gate = "[[accuracy.gate]]\nformat = 'onnx'\nrelative_l2 = 1e-9\n"
    workspace.edit(SHIPPED, "[weights]", f"{gate}\n[weights]")
    failing = workspace.build("a gate that fails: there is no image, and the log says why", must_fail=True)
    assert failing.failed == {f"accuracy:{SHIPPED}_onnx"}
    assert workspace.files("localhost/repository") == changed, "the last good image stays"
    workspace.edit(SHIPPED, f"{gate}\n", "")

    other = workspace.build("the image of another release", "--build-arg", "TRITON_RELEASE=25.03", must_fail=True)
    assert not other.doit_ran

    one = workspace.build("one model of two: the other leaves the repository", "--build-arg", "MODELS=tiny")
    assert "prune" in one.ran
    assert workspace.files("localhost/repository") == {
        path: content for path, content in changed.items() if path.startswith("tiny")
    }

    workspace.build("all, on a stand-in for Triton's image (Debian without a server)", target="triton")
    models = workspace.files("localhost/triton", "models")
    assert models == changed
    config = json.loads(workspace.buildah("inspect", "localhost/triton"))["Docker"]["config"]
    assert config["Cmd"] == ["tritonserver", "--model-repository=/models", f"--backend-config={VERSION_COMPATIBLE}"]
    assert config["User"] == "1000:1000"
    assert config["Healthcheck"]["Test"][-1] == "http://localhost:8000/v2/health/ready"
    container = workspace.buildah("from", "--pull-never", "localhost/triton")
    pillow = workspace.buildah("run", container, "python3", "-c", "import PIL; print(PIL.__version__)")
    assert f"pillow=={pillow} " in (ROOT / "requirements.txt").read_text()
    # The user of the server can read every file, and can change none.
    program = (
        "import os; print(os.getuid(), sum(not os.access(os.path.join(p, f), os.R_OK) or os.access(os.path.join(p, f), "
        "os.W_OK) for p, _, names in os.walk('/models') for f in names))"
    )
    assert workspace.buildah("run", container, "python3", "-c", program) == "1000 0"
    workspace.buildah("rm", container)

    repository = workspace.project / "model_repository"
    (repository / "mine_trt").mkdir(parents=True)
    (repository / "mine_trt/config.pbtxt").write_text('name: "mine_trt"\n')
    (repository / ".incoming-1").mkdir()
    (repository / ".incoming-1/leftover").write_text("of a killed run")
    (repository / "mine_trt").chmod(0o700)
    context = ("--build-context", "repository=model_repository")
    prebuilt = workspace.build("the repository of this folder, for example with engines", *context, target="triton")
    assert not prebuilt.doit_ran
    assert workspace.files("localhost/triton", "models").keys() == {"mine_trt/config.pbtxt"}
    old = repository / "old/config.pbtxt"
    old.parent.mkdir()
    old.write_text('# Generated by doit: old, signature 0 from models/old/model.toml, for Triton 25.03\nname: "old"\n')
    workspace.build("a model of another release in that folder", *context, target="triton", must_fail=True)
    print("\nall checks passed")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory(prefix="buildah-") as temporary:
            try:
                main(Path(temporary))
            finally:
                unmount(Path(temporary))
