"""The star test: edit this, and exactly these tasks run; after that, nothing does."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import OTHER, ROOT, TINY, Project

STAR = TINY.replace(
    "[accuracy]",
    'converter = "convert.py:convert"\n\n[input]\n\n[onnx]\n\n[accuracy]\nsamples = "samples"',
)
CONVERTER = "def convert(state):\n    return dict(state)\n"

SPEC = "models/tiny/model.toml"
PUBLISHED = "model_repository/tiny"
PUBLISHED_ONNX = "model_repository/tiny_onnx"

ACCURACY = ["accuracy:tiny", "accuracy:tiny_onnx"]
CONFIG = ["config:tiny", "config:tiny_onnx"]
PUBLISH = ["publish:tiny", "publish:tiny_onnx"]
NETWORK = ["weights:tiny", "reference:tiny", "torchscript:tiny", "onnx:tiny"]  # what makes the module

Edit = Callable[[Project], object]


def spec(old: str, new: str) -> Edit:
    return lambda p: p.edit(SPEC, old, new)


def key(table: str, line: str) -> Edit:
    """Add a key to a table of the spec."""
    return spec(f"[{table}]\n", f"[{table}]\n{line}\n")


def both(first: Edit, second: Edit) -> Edit:
    def edit(project: Project) -> None:
        first(project)
        second(project)

    return edit


def rename(old: str, new: str) -> Edit:
    return lambda p: (p / old).rename(p / new)


def append(path: str, text: str = "\n# edited\n") -> Edit:
    return lambda p: (p / path).write_text((p / path).read_text() + text)


def write(path: str, text: str) -> Edit:
    return lambda p: (p / path).write_text(text)


def delete(path: str) -> Edit:
    return lambda p: (p / path).unlink()


def truncate(path: str) -> Edit:
    return lambda p: os.truncate(p / path, (p / path).stat().st_size // 2)


def corrupt(path: str) -> Edit:
    """Flip a byte in the middle, in place: same size, later mtime."""

    def edit(project: Project) -> None:
        data = bytearray((project / path).read_bytes())
        data[len(data) // 2] ^= 0xFF
        (project / path).write_bytes(data)

    return edit


def replace(path: str) -> Edit:
    """Put another file of the same size, mtime and mode in its place."""

    def edit(project: Project) -> None:
        file = project / path
        status = file.stat()
        draft = file.with_suffix(".draft")
        draft.write_bytes(bytes(status.st_size))
        os.utime(draft, ns=(status.st_atime_ns, status.st_mtime_ns))
        os.replace(draft, file)
        assert file.stat().st_mtime_ns == status.st_mtime_ns

    return edit


def scale_a_weight(project: Project) -> None:
    """Change one value of the source weights: the classifier's first bias."""
    import torch
    from safetensors.torch import load_file, save_file

    path = project / "models/tiny/weights.safetensors"
    state = load_file(path)
    state["classifier.bias"] = state["classifier.bias"] + torch.eye(1000)[0]
    save_file(state, path)


def other_picture(project: Project) -> None:
    shutil.copy(ROOT / "build_tasks/samples/rocket.jpg", project / "models/tiny/samples/coffee.jpg")


def fake_version(distribution: str) -> Edit:
    """Metadata of another version, ahead of the installed one on the path."""

    def edit(project: Project) -> None:
        folder = project / f"{distribution}-99.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 99\n")

    return edit


STARS: list[tuple[str, Edit, list[str]]] = [
    # weights
    ("a value of the weights", scale_a_weight, [*NETWORK, *ACCURACY, *PUBLISH]),
    ("the weights, touched", lambda p: os.utime(p / "models/tiny/weights.safetensors"), []),
    ("weights.source, the same file elsewhere", both(
        rename("models/tiny/weights.safetensors", "models/tiny/w.safetensors"),
        spec("weights.safetensors", "w.safetensors"),
    ), ["weights:tiny"]),
    ("a comment in the converter", append("models/tiny/convert.py"), ["weights:tiny"]),
    ("what the converter does", lambda p: p.edit(
        "models/tiny/convert.py", "dict(state)", "{k: v * 2 if 'classifier' in k else v for k, v in state.items()}"
    ), [*NETWORK, *ACCURACY, *PUBLISH]),
    ("a file of the model that nothing names", write("models/tiny/notes.txt", "mine"), []),
    # labels
    ("a label", lambda p: p.edit("models/tiny/labels.txt", "class 7\n", "class seven\n"),
     ["labels:tiny", *CONFIG, *PUBLISH]),
    ("labels, the same file elsewhere", both(
        rename("models/tiny/labels.txt", "models/tiny/names.txt"), spec("labels.txt", "names.txt")
    ), ["labels:tiny"]),
    # spec
    ("a comment in the spec", append(SPEC), []),
    ("max_batch_size", spec("max_batch_size = 4", "max_batch_size = 5"),
     ["torchscript:tiny", "onnx:tiny", *CONFIG, *PUBLISH]),
    ("architecture.arguments", key("architecture", "arguments = { drop_rate = 0.5 }"), NETWORK),
    ("input.shape", key("input", "shape = [3, 128, 128]"),
     ["reference:tiny", "torchscript:tiny", "onnx:tiny", *ACCURACY, *CONFIG, *PUBLISH]),
    ("input.mean", key("input", "mean = [0.5, 0.5, 0.5]"), ["reference:tiny", *ACCURACY, *PUBLISH]),
    ("input.std", key("input", "std = [0.5, 0.5, 0.5]"), ["reference:tiny", *ACCURACY, *PUBLISH]),
    ("input.interpolation", key("input", 'interpolation = "bilinear"'), ["reference:tiny", *ACCURACY, *PUBLISH]),
    ("input.crop_pct", key("input", "crop_pct = 0.5"), ["reference:tiny", *ACCURACY, *PUBLISH]),
    ("input.crop_mode", key("input", 'crop_mode = "squash"'), ["reference:tiny", *ACCURACY, *PUBLISH]),
    ("onnx.opset", key("onnx", "opset = 16"), ["onnx:tiny", "accuracy:tiny_onnx", "publish:tiny_onnx"]),
    ("onnx.exporter, the one that had won", key("onnx", 'exporter = "torchscript"'), ["onnx:tiny"]),
    ("onnx.exporter, the other", key("onnx", 'exporter = "dynamo"\nopset = 18'),
     ["onnx:tiny", "accuracy:tiny_onnx", "publish:tiny_onnx"]),
    ("onnx.batch_size under dynamic axes", key("onnx", "batch_size = 2"), ["onnx:tiny"]),
    ("onnx.dynamic_axes", key("onnx", "dynamic_axes = false"),
     ["onnx:tiny", "accuracy:tiny_onnx", "config:tiny_onnx", "publish:tiny_onnx"]),
    ("onnx.external_data", key("onnx", "external_data = true"),
     ["onnx:tiny", "accuracy:tiny_onnx", "publish:tiny_onnx"]),
    ("accuracy.tolerance", key("accuracy", "tolerance = 1e-3"), ACCURACY),
    ("accuracy.top1", key("accuracy", "top1 = 0.5"), ACCURACY),
    ("accuracy.allow_untestable", spec("allow_untestable = true", "allow_untestable = false"), ACCURACY),
    ("accuracy.samples, one more", lambda p: shutil.copy(
        ROOT / "build_tasks/samples/rocket.jpg", p / "models/tiny/samples"
    ), ["reference:tiny", *ACCURACY, *PUBLISH]),
    ("accuracy.samples, another picture", other_picture, ["reference:tiny", *ACCURACY, *PUBLISH]),
    ("[triton]", append(SPEC, "[triton]\ninstance_group = [{ count = 2 }]\n"), [*CONFIG, *PUBLISH]),
    ("[engine] without a format that is compiled", append(SPEC, '[engine]\nprecision = "fp32"\n'), []),
    ("formats, onnx removed", spec('"torchscript", "onnx"', '"torchscript"'), ["prune"]),
    ("the spec, removed", lambda p: shutil.rmtree(p / "models/tiny"), ["prune"]),
    # recipes
    ("recipe of weights", append("build_tasks/weights.py"), ["weights:tiny", "weights:other"]),
    ("recipe of labels", append("build_tasks/labels.py"), ["labels:tiny"]),
    ("recipe of torchscript", append("build_tasks/torchscript.py"), ["torchscript:tiny", "torchscript:other"]),
    ("recipe of onnx", append("build_tasks/onnx.py"), ["onnx:tiny"]),
    ("recipe of config", append("build_tasks/config.py"), [*CONFIG, "config:other"]),
    ("recipe of publish", append("build_tasks/publish.py"), [*PUBLISH, "publish:other"]),
    ("a rule that no artifact depends on", append("build_tasks/reporter.py"), []),
    # tools
    ("version of onnxslim", fake_version("onnxslim"), ["onnx:tiny"]),
    ("version of tritonclient", fake_version("tritonclient"), [*CONFIG, "config:other"]),
    ("version of a package that no stage uses", fake_version("pytest"), []),
    # targets in build/
    ("build: weights, same size", corrupt("build/tiny/weights.safetensors"), ["weights:tiny"]),
    ("build: model.pt, deleted", delete("build/tiny/model.pt"), ["torchscript:tiny"]),
    ("build: model.pt, replaced", replace("build/tiny/model.pt"), ["torchscript:tiny"]),
    ("build: model.onnx, truncated", truncate("build/tiny/model.onnx"), ["onnx:tiny"]),
    ("build: reference, truncated", truncate("build/tiny/reference.json"), ["reference:tiny"]),
    ("build: config.pbtxt, edited", append("build/tiny/model.pt.config.pbtxt"), ["config:tiny"]),
    ("build: verdict, deleted", delete("build/tiny/model.onnx.accuracy.json"), ["accuracy:tiny_onnx"]),
    ("build: deleted as a whole", both(
        lambda p: shutil.rmtree(p / "build/tiny"), lambda p: shutil.rmtree(p / PUBLISHED)
    ), [*NETWORK, "labels:tiny", *ACCURACY, *CONFIG, "publish:tiny"]),
    # targets in model_repository/
    ("published: model.pt, deleted", delete(f"{PUBLISHED}/1/model.pt"), ["publish:tiny"]),
    ("published: model.pt, replaced", replace(f"{PUBLISHED}/1/model.pt"), ["publish:tiny"]),
    ("published: model.onnx, truncated", truncate(f"{PUBLISHED_ONNX}/1/model.onnx"), ["publish:tiny_onnx"]),
    ("published: labels.txt, same size", corrupt(f"{PUBLISHED}/labels.txt"), ["publish:tiny"]),
    ("published: config.pbtxt, edited", append(f"{PUBLISHED}/config.pbtxt"), ["publish:tiny"]),
    ("published: a file too many", write(f"{PUBLISHED}/1/model.bak", "x"), ["publish:tiny"]),
    ("published: the folder, deleted", lambda p: shutil.rmtree(p / PUBLISHED_ONNX), ["publish:tiny_onnx"]),
    ("published: a neighbour made by hand", both(
        lambda p: (p / "model_repository/mine").mkdir(), write("model_repository/mine/config.pbtxt", 'name: "mine"\n')
    ), []),
]  # fmt: skip


@pytest.fixture(scope="module")
def star(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("star") / "project")
    labels = "".join(f"class {index}\n" for index in range(1000))
    folder = project.model("tiny", STAR, convert_py=CONVERTER, labels_txt=labels)
    shutil.copy(tiny_weights, folder)
    (folder / "samples").mkdir()
    for picture in ("chelsea.jpg", "coffee.jpg"):
        shutil.copy(ROOT / f"build_tasks/samples/{picture}", folder / "samples")
    project.model("other", OTHER)
    project.built()
    return project


def test_nothing_runs_twice(star: Project) -> None:
    assert star.built().ran == []


@pytest.mark.parametrize(("edit", "expected"), [s[1:] for s in STARS], ids=[s[0] for s in STARS])
def test_an_edit_runs_exactly_the_tasks_it_touches(
    star: Project, copy_of: Callable[[Project], Project], edit: Edit, expected: list[str]
) -> None:
    project = copy_of(star)
    edit(project)
    assert project.built().ran == sorted(expected)
    assert project.built().ran == [], "the second run has nothing left to do"
