"""labels: the names of the classes -> labels.txt, one per line, as Triton's classification extension reads them

An output of [[outputs]] may have labels of its own, labels.<output>.txt.
"""

import re
from collections.abc import Iterator
from typing import Any

from build_tasks.errors import UserError
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.interface import label_files
from build_tasks.spec.model import Model
from build_tasks.spec.source_checks import IMAGENET

# Control characters, separators of lines and the byte order mark. Marks of direction belong to some languages.
UNSAFE = "[\0-\x1f\x7f-\x9f\u2028\u2029\ufeff]"  # compiled where it is used: doit imports this module in most runs
MAX_CHARACTERS = 1 << 24  # of a label file; ImageNet's 21,841 classes have a million


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
            modules=(__name__,),
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


def read_labels(path: str) -> list[str]:
    """The lines of a label file. Empty lines at its end are ignored.

    A byte order mark at the beginning is dropped, other ends of lines (CR LF, CR) become "\\n", and tabs become spaces.
    Readers of labels.txt, Triton's among them, disagree on where other separators end a line: they would give all later
    classes another name.

    Raises:
        UserError: If the file is empty, too large or not UTF-8, if a line before the last one is empty, or if a line
            contains a control character, another separator of lines or a byte order mark.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{path}: expected at most {MAX_CHARACTERS} characters, found more")
    names = text.rstrip("\n").replace("\t", " ").split("\n")
    if names == [""]:
        raise UserError(f"{path} is empty")
    if "" in names:
        raise UserError(f"{path}: line {names.index('') + 1} is empty; every line names a class")
    for number, name in enumerate(names, 1):
        if unsafe := re.search(UNSAFE, name):
            code = f"U+{ord(unsafe[0]):04X}"
            raise UserError(
                f"{path}: line {number} contains {code}, a control character or a separator of lines; remove it"
            )
    return names


def imagenet_labels() -> list[str]:
    """The 1000 classes of ImageNet, in the order of the network's outputs."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index) for index in range(info.num_classes())]
