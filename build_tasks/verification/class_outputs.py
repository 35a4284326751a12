"""Which outputs of a model hold a score for each class.

Only they have figures of classes (top-1, top-5), with limits on them. The shape (batch, n) does not show it: the scores
of a detector's boxes and an embedding have it, too.
"""

from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Model
from build_tasks.spec.tables import Architecture
from build_tasks.tensors import OUTPUT


def class_outputs(model: Model) -> list[str] | None:
    """Return the names of the outputs that hold classes; None for the first output of shape (batch, n).

    - Outputs of [[outputs]] with classes or labels hold classes.
    - The first output holds classes with labels, output.softmax or output.top_k, and if timm's network is a classifier.
    - A gate rule with top1 or top5 names further outputs by its key `output`.
    - If nothing of this names an output, accuracy.truth or a rule without `output` mean the first one of that shape.
    """
    spec = model.spec
    rules = [rule for rule in spec.accuracy.gate if (rule.top1, rule.top5) != (None, None)]
    names = {rule.output for rule in rules if rule.output}
    outputs = interface_of(spec)["outputs"]
    names |= {output["name"] for output in outputs if output["classes"] or output["labels"]}
    if spec.labels or spec.output.softmax or spec.output.top_k or _is_classifier(spec.architecture):
        names.add(outputs[0]["name"] if outputs else OUTPUT.format(0))
    return sorted(names) if names or not (rules or spec.accuracy.truth) else None


def _is_classifier(architecture: Architecture) -> bool:
    """Whether timm builds the network with its classifier. The arguments can leave it out."""
    arguments = architecture.arguments
    return (
        architecture.timm is not None
        and not arguments.get("features_only")
        and not ("num_classes" in arguments and arguments["num_classes"] == 0)
    )
