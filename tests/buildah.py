"""The Dockerfile, built by buildah on a base image of debootstrap's: no Docker, and no registry of images.

    python tests/buildah.py [FOLDER]

As root, with Debian's buildah and debootstrap. It takes a quarter of an hour and 30 GB, in FOLDER (a temporary one by
default, which goes at the end; a FOLDER stays, and the next run over it begins with its base image and environment).
It prints the transcript of docs/how-to/docker.md: the output lines of buildah and doit that report what was done.
The whole output is in FOLDER/logs.
"""

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
SERVED = {"tiny", "tiny_onnx", SHIPPED, f"{SHIPPED}_onnx", f"{SHIPPED}_preprocess", f"{SHIPPED}_ensemble"}
WANTED = {
    *(f"{name}/config.pbtxt" for name in SERVED),
    *("tiny/1/model.pt", "tiny_onnx/1/model.onnx", f"{SHIPPED}/1/model.pt", f"{SHIPPED}_onnx/1/model.onnx"),
    *(f"{SHIPPED}_preprocess/1/model.py", f"{SHIPPED}/labels.txt", f"{SHIPPED}_onnx/labels.txt"),
}

STEP = re.compile(r"(?:\[\d/\d\] )?STEP \d+/\d+: ((?:RUN|COPY) .*)")
MOUNTS = re.compile(r"--mount=\S+")
TOLD = re.compile(
    r"(.*\s)?[✓✗–!] \w|.*\d+ (built|up to date)|.*skipped: a dependency failed: |models/\S+: triton.release|[Ee]rror: "
)
TASK = re.compile(r"([✓✗]) (\S+)(?: +([\w.]+)(?= |$))?")


@dataclass
class Build:
    """One `buildah bud`: how it ended, what it said, and which tasks of doit's did what in it."""

    code: int
    out: str
    ran: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for mark, stage, name in TASK.findall(self.out):
            (self.ran if mark == "✓" else self.failed).add(f"{stage}:{name}" if name else stage)

    def count(self, what: str) -> int:
        """The number before `what` in doit's last line, 0 where it does not say so."""
        found = re.findall(rf"(\d+) {what}", self.out)
        return int(found[-1]) if found else 0

    @property
    def doit_ran(self) -> bool:
        return bool(self.count("built") or self.count("up to date") or self.failed)


class Workshop:
    """A folder with everything in it: buildah's storage and caches, a copy of the project, logs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.project = folder / "project"
        # Cache mounts are below buildah's temporary folder.
        self.environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "BUILDAH_ISOLATION": "chroot"}
        for name in ("tmp", "logs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.project, ignore_errors=True)
        copy_project(self.project)
        self.pip, self.mounts = pip_of_this_machine(folder)
        self.builds = 0

    def buildah(self, *arguments: str) -> str:
        """Its output, of a command that must succeed."""
        run = subprocess.run(self.line(*arguments), env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
        return run.stdout.strip()

    def line(self, *arguments: str) -> list[str]:
        return ["buildah", "--root", f"{self.folder}/storage", "--runroot", f"{self.folder}/run", *arguments]

    def forget(self) -> None:
        """What an earlier run over this folder left behind, but for the base image and the environment."""
        self.buildah("rm", "--all")
        for image in ("localhost/repository", "localhost/triton"):
            if image in self.images():
                self.buildah("rmi", "--force", image)
        self.buildah("rmi", "--prune")
        shutil.rmtree(self.folder / "tmp/buildah-cache", ignore_errors=True)

    def images(self) -> list[str]:
        return self.buildah("images", "--format", "{{.Name}}").splitlines()

    def make_base(self) -> None:
        """Debian with Python, as any image of Python's has it; once."""
        if BASE in self.images():
            return
        say("debootstrap --variant=minbase --include=python3-venv,python3-pip,ca-certificates bookworm")
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

    def build(self, why: str, *arguments: str, target: str = "repository", refused: bool = False) -> Build:
        """`buildah bud` of a stage; what it said goes to a log, and in short to the transcript."""
        shown = f"buildah bud --layers --target {target} {' '.join(arguments)}".replace(f"{self.folder}/", "")
        say(f"{shown.strip()} .", why)
        line = self.line(
            *("bud", "--layers", "--network", "host", "--target", target, "--tag", f"localhost/{target}"),
            *("--build-arg", f"PYTHON_IMAGE={BASE}", "--build-arg", f"TRITON_IMAGE={BASE}"),
            *(f"--volume={source}:{target}:ro" for source, target in self.mounts.items()),
            *("--volume", f"{self.pip}:/etc/pip.conf:ro"),
            *(*arguments, "."),
        )
        started = time.monotonic()
        self.builds += 1
        process = subprocess.Popen(
            line,
            cwd=self.project,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        said = []
        step, cached = "", 0
        with (self.folder / f"logs/{self.builds}.log").open("w") as log:
            for text in process.stdout:
                said.append(text)
                log.write(text)
                log.flush()
                if text.startswith("--> Using cache"):
                    step, cached = "", cached + 1
                    continue
                if step:
                    print(shortened(f"STEP {' '.join(MOUNTS.sub('', step).split())}"), flush=True)
                found = STEP.match(text)
                step = found[1] if found else ""
                if TOLD.match(text):
                    print(shortened(text.rstrip()), flush=True)
        build = Build(process.wait(), "".join(said))
        seconds = time.monotonic() - started
        print(f"[{cached} steps from the layer cache, exit code {build.code}, {seconds:.0f} s]", flush=True)
        assert (build.code != 0) == refused, build.out[-3000:]
        return build

    def files(self, image: str, folder: str = "") -> dict[str, bytes]:
        """Every file of an image below a folder, by its path, with its content."""
        container = self.buildah("from", "--pull-never", image)
        top = Path(self.buildah("mount", container)) / folder
        found = {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}
        self.buildah("umount", container)
        self.buildah("rm", container)
        return found

    def edit(self, model: str, old: str, new: str) -> None:
        file = self.project / f"models/{model}/model.toml"
        text = file.read_text()
        assert old in text, f"{file} does not hold {old!r}"
        file.write_text(text.replace(old, new, 1))
        print(f"\n# models/{model}/model.toml: {old.strip() or 'at the end'!r} -> {new.strip()!r}", flush=True)


def copy_project(folder: Path) -> None:
    """What is under version control, or could be; with a tiny model for the one whose weights are a download."""
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


def pip_of_this_machine(folder: Path) -> tuple[Path, dict[str, str]]:
    """A pip.conf that says what this machine's pip is told, by files and variables; and what of it are paths here.

    Where pip is left to its defaults, as on most machines, both are empty.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True, check=True
    )
    sections: dict[str, dict[str, str]] = {}
    mounts: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), key=lambda line: line.startswith(":env:")):  # which pip heeds more
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        value = value.strip("'\"")
        sections.setdefault("global" if section == ":env:" else section, {})[key] = value
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index in a folder may point beside itself.
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
    """Whatever is mounted below a folder: buildah leaves its storage so, and what is mounted cannot be removed."""
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for point in reversed([point for point in points if point.startswith(f"{folder}/")]):
        subprocess.run(["umount", point], check=True)


def say(command: str, why: str = "") -> None:
    print(f"\n{f'# {why}' + chr(10) if why else ''}$ {command}", flush=True)


def main(folder: Path) -> None:
    shop = Workshop(folder)
    shop.forget()
    shop.make_base()
    shop.build("pip", target="environment")

    first = shop.build("the first build: everything")
    assert first.count("built") == len(first.ran)
    assert first.count("up to date") == 1, "there was nothing to prune, and all the rest was built"
    total = len(first.ran) + 1
    published = shop.files("localhost/repository")
    assert published.keys() >= WANTED, WANTED - published.keys()
    assert {path.partition("/")[0] for path in published} == SERVED

    again = shop.build("nothing has changed: not even doit runs")
    assert not again.doit_ran
    assert shop.files("localhost/repository") == published

    shop.edit("tiny", "opset = 17", "opset = 17  # as elsewhere")
    comment = shop.build("a comment: doit runs, and no stage does")
    assert comment.ran == set()
    assert comment.count("up to date") == total
    assert shop.files("localhost/repository") == published

    shop.edit("tiny", "opset = 17", "opset = 16")
    edited = shop.build("an edit: its stages run, and no other")
    stages = {f"{stage}:tiny_onnx" for stage in ("measure", "accuracy", "config", "client", "publish")}
    (overview,) = edited.ran - stages - {"onnx:tiny"}  # of all the model's artifacts
    assert edited.ran - {overview} == {*stages, "onnx:tiny"}
    assert overview.endswith(":tiny")
    assert edited.count("up to date") == total - len(edited.ran)
    now = shop.files("localhost/repository")
    assert {path.partition("/")[0] for path in published if now[path] != published[path]} == {"tiny_onnx"}

    gate = "[[accuracy.gate]]\nformat = 'onnx'\nrelative_l2 = 1e-9\n"
    shop.edit(SHIPPED, "[weights]", f"{gate}\n[weights]")
    failing = shop.build("a gate that does not hold: there is no image, and the log says why", refused=True)
    assert failing.failed == {f"accuracy:{SHIPPED}_onnx"}
    assert shop.files("localhost/repository") == now, "the last good image stays"
    shop.edit(SHIPPED, f"{gate}\n", "")

    other = shop.build("the image of another release", "--build-arg", "TRITON_RELEASE=25.03", refused=True)
    assert not other.doit_ran

    one = shop.build("one model of two: the other leaves the repository", "--build-arg", "MODELS=tiny")
    assert "prune" in one.ran
    assert shop.files("localhost/repository") == {
        path: content for path, content in now.items() if path.startswith("tiny")
    }

    shop.build("all, on a stand-in for Triton's image (Debian without a server)", target="triton")
    served = shop.files("localhost/triton", "models")
    assert served == now
    assert shop.buildah("inspect", "--format", "{{.OCIv1.Config.Cmd}}", "localhost/triton") == (
        "[tritonserver --model-repository=/models]"
    )
    container = shop.buildah("from", "--pull-never", "localhost/triton")
    pillow = shop.buildah("run", container, "python3", "-c", "import PIL; print(PIL.__version__)")
    assert f"pillow=={pillow} " in (ROOT / "requirements.txt").read_text()
    shop.buildah("rm", container)

    engines = shop.project / "model_repository/mine_trt"
    engines.mkdir(parents=True)
    (engines / "config.pbtxt").write_text('name: "mine_trt"\n')
    here = shop.build(
        *("the repository of this folder, with engines, say", "--build-context", "repository=model_repository"),
        target="triton",
    )
    assert not here.doit_ran
    assert "mine_trt/config.pbtxt" in shop.files("localhost/triton", "models")
    print("\nall of it as it should be")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory(prefix="buildah-") as temporary:
            try:
                main(Path(temporary))
            finally:
                unmount(Path(temporary))
