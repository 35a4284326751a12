"""labels: the names of the classes -> labels.txt, one per line, as Triton's classification extension reads it."""

from typing import Any

from build_tasks.errors import UserError
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model

IMAGENET = "imagenet-1k"  # the only list that timm and this project both know by name


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
    names = read(inputs["labels"]) if "labels" in inputs else imagenet()
    with open(outputs["labels"], "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    return {"classes": len(names)}


def read(path: str) -> list[str]:
    """The lines of a label file. UserError for an empty one, or for an empty line before the last."""
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


def imagenet() -> list[str]:
    """The 1000 classes in the order of the network's outputs."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(info.num_classes())]
