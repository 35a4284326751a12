"""reference: the fp32 PyTorch network on the accuracy samples -> samples.json, reference.json

    images ─► timm's transform ─► samples.json ─► eager network ─► reference.json

Both are Polygraphy's own files, so that any artifact can be compared on any machine, without torch.
"""

import glob
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks import architecture
from build_tasks.compare import INPUT, OUTPUT
from build_tasks.errors import UserError
from build_tasks.spec import Model
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

SHIPPED = "build_tasks/samples"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def task(model: Model) -> dict[str, Any]:
    folder = model.source(model.spec.accuracy.samples) if model.spec.accuracy.samples else SHIPPED
    stage = Stage(
        name=f"reference:{model.name}",
        model=model,
        build=build,
        inputs={"weights": model.artifact("weights.safetensors"), **{path: path for path in images(folder)}},
        outputs={"samples": model.artifact("samples.json"), "reference": model.artifact("reference.json")},
        settings={
            **architecture.settings_of(model),
            "input": architecture.input_settings_of(model),
            "samples": folder,
        },
        tools=("torch", "timm", "torchvision", "pillow", "polygraphy"),
        code=(*code_of("reference", "architecture", "compare"), *architecture.code_of(model)),
    )
    return stage.task(doc="reference.json: what PyTorch answers to the accuracy samples")


def images(folder: str) -> list[str]:
    """The pictures of a folder, by name."""
    return sorted(path for path in glob.glob(f"{glob.escape(folder)}/*") if path.lower().endswith(SUFFIXES))


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    paths = [path for name, path in inputs.items() if name != "weights"]
    if not paths:
        raise UserError(f"{settings['samples']}: no pictures here ({', '.join(SUFFIXES)}); accuracy needs some")
    module = architecture.create(settings, inputs["weights"])
    batch = preprocessed(paths, architecture.transform(module, settings["input"]))
    answers = architecture.forward(module, batch)
    save_json([{INPUT: batch.numpy()}], outputs["samples"])
    results = RunResults()
    results.add(
        [{OUTPUT.format(index): answer.numpy() for index, answer in enumerate(answers)}], runner_name="pytorch-fp32"
    )
    results.save(outputs["reference"])
    return {"samples": len(paths), "outputs": [list(answer.shape[1:]) for answer in answers]}


def preprocessed(paths: list[str], transform: "Callable[[Image], torch.Tensor]") -> "torch.Tensor":
    """The pictures as the network wants them: float32 (samples, channels, height, width)."""
    import torch
    from PIL import UnidentifiedImageError
    from PIL.Image import open as open_image

    tensors = []
    for path in paths:
        try:
            with open_image(path) as image:
                tensors.append(transform(image.convert("RGB")))
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{path} cannot be read as a picture ({os.path.basename(path)}: {error})") from error
    return torch.stack(tensors)
