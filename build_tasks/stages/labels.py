"""labels: the names of the classes -> labels.txt, one per line, as Triton's classification extension reads them"""

from typing import Any

from build_tasks.errors import UserError
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model

IMAGENET = "imagenet-1k"  # the only list of classes that a spec can name; it comes from timm


def task(model: Model) -> dict[str, Any]:
    labels = model.spec.labels
    assert labels is not None
    stage = Stage(
        name=f"labels:{model.name}",
        model=model,
        build=build,
        inputs={} if labels == IMAGENET else {"labels": model.source(labels)},
        outputs={"labels": model.artifact("labels.txt")},
        settings={"labels": labels},
        tools=("timm",) if labels == IMAGENET else (),
        modules=(__name__,),
        in_process=labels != IMAGENET,
    )
    return stage.task(doc=f"labels.txt from {labels}")


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    names = read_labels(inputs["labels"]) if "labels" in inputs else imagenet_labels()
    with open(outputs["labels"], "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    return {"classes": len(names)}


def read_labels(path: str) -> list[str]:
    """The lines of a label file. Empty lines at its end are ignored.

    Raises:
        UserError: If the file is empty or not UTF-8, or if a line before the last one is empty.
    """
    try:
        with open(path, encoding="utf-8") as file:
            names = file.read().rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if names == [""]:
        raise UserError(f"{path} is empty")
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty; every line names a class")
    return names


def imagenet_labels() -> list[str]:
    """The 1000 classes of ImageNet, in the order of the network's outputs."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(info.num_classes())]
