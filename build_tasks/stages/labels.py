"""labels: the names of the classes -> labels.txt, one per line, as Triton's classification extension reads them

An output of [[outputs]] may have labels of its own, labels.<output>.txt.
"""

from collections.abc import Iterator
from typing import Any

from build_tasks.formats.label_file import read_labels
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import label_files
from build_tasks.spec.model import Model
from build_tasks.spec.source_checks import IMAGENET


def tasks(model: Model) -> Iterator[dict[str, Any]]:
    """Yield the doit tasks of a model: one for its labels, and one for each output that has labels of its own."""
    for output, (file, labels) in label_files(model.spec).items():
        stage = Stage(
            name=task_name(model, output),
            model=model,
            build=build,
            inputs={} if labels == IMAGENET else {"labels": model.source(labels)},
            outputs={"labels": model.artifact(file)},
            settings={"labels": labels},
            tools=("timm",) if labels == IMAGENET else (),
            modules=(__name__, "build_tasks.formats.label_file"),
            in_process=labels != IMAGENET,
        )
        yield stage.task(doc=f"{file} from {labels}")


def task_name(model: Model, output: str) -> str:
    """Return the name of the task that writes the labels of an output; empty: the labels of the spec itself.

    Names of models contain no dot.
    """
    return f"labels:{model.name}.{output}" if output else f"labels:{model.name}"


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    names = read_labels(inputs["labels"]) if "labels" in inputs else imagenet_labels()
    with open(outputs["labels"], "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    return {"classes": len(names)}


def imagenet_labels() -> list[str]:
    """The 1000 classes of ImageNet, in the order of the network's outputs."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(info.num_classes())]
