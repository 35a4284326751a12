"""What `doit new NAME … --weights FILE` finds in a checkpoint: keys of the spec, lines for the user.

FILE ─► checkpoint_facts ─► architecture.arguments, weights.prefix, input.shape
                         └► "found: 10 classes, 1 channel, …"
"""

import glob
import os

from build_tasks.doit_plugin.new_from_file import sample_keys
from build_tasks.doit_plugin.spec_template import Key
from build_tasks.errors import UserError, listed
from build_tasks.formats.checkpoint_facts import CheckpointFacts
from build_tasks.paths import MODELS
from build_tasks.spec import model_files
from build_tasks.spec.model import split_source

SUFFIXES = (*model_files.INDEX, ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".npz", ".tar")  # of checkpoints


def check_weights(source: str) -> None:
    """Check that a path of --weights leads to a file. A name alone may be that of a file which the user adds later.

    Raises:
        UserError: If it does not exist, or is something else. Of a folder the message lists the checkpoints in it.
    """
    scheme, path = split_source(source)
    if scheme != "file" or (os.path.basename(path) == path and not os.path.lexists(path)):
        return
    if not os.path.exists(path):
        target = f" is a link to {os.path.realpath(path)}, which" if os.path.islink(path) else ""
        raise UserError(f"--weights: {path}{target} does not exist")
    if (kind := model_files.kind_of(os.stat(path).st_mode)) == "a file":
        return
    advice = ""
    if kind == "a folder":
        names = checkpoints_in(path)
        advice = f": name one of the checkpoints in it: {listed(names)}" if names else ", and has no checkpoint in it"
    raise UserError(f"--weights: expected a file, found {path}, which is {kind}{advice}")


def is_here(source: str) -> bool:
    """Return whether weights.source is a file on this machine, which can be looked into."""
    return split_source(source)[0] == "file" and os.path.isfile(source)


def checkpoints_in(folder: str) -> list[str]:
    """Return the names of checkpoints in a folder, or else in its folders, without the shards that an index lists."""
    for pattern in ("*", "*/*"):
        names = sorted(name for name in glob.glob(pattern, root_dir=folder) if name.endswith(SUFFIXES))
        shards = {
            os.path.join(os.path.dirname(name), shard)
            for name in names
            for shard in model_files.shards(os.path.join(folder, name))
        }
        if found := [name for name in names if name not in shards]:
            return found
    return []


def copied_files(path: str) -> dict[str, str]:
    """Return the files to copy beside the spec, by their new name: the checkpoint, and the shards that an index lists.

    A file in one of the folders of BUILD_DATA_FOLDERS stays where it is.
    """
    if model_files.is_below(os.path.realpath(path), model_files.data_folders()):
        return {}
    folder, name = os.path.split(path)
    return {file: os.path.join(folder, file) for file in (name, *model_files.shards(path))}


def weights_source(path: str) -> str:
    """Return weights.source of a checkpoint on this machine."""
    return os.path.basename(path) if copied_files(path) else os.path.realpath(path)


def checkpoint_keys(facts: CheckpointFacts) -> list[Key]:
    """Return the keys that a checkpoint adds to those of its architecture."""
    keys = []
    if facts.arguments:
        keys.append(Key("architecture", "arguments", facts.arguments, "as the checkpoint has it"))
    if facts.prefix:
        keys.append(Key("weights", "prefix", facts.prefix, "before the names of the network's tensors"))
    return keys + sample_keys(facts.arguments.get("in_chans", 3))


def found_lines(name: str, path: str, facts: CheckpointFacts, classes: int) -> list[str]:
    """Return the lines that say what was found in the checkpoint, and what it cannot say.

    Args:
        name: Of the model.
        classes: The number of classes of the architecture without arguments.
    """
    if facts.mismatch:
        return [found_line(path, facts)]
    own_classes, channels = facts.arguments.get("num_classes", classes), facts.arguments.get("in_chans", 3)
    kinds = (
        f"{own_classes} classes" if own_classes else "no classifier",
        f"{channels} channel{'s' if channels > 1 else ''}",
    )
    lines = [found_line(path, facts, *kinds)]
    if own_classes not in (0, classes):
        lines.append(
            f"fill in: {MODELS}/{name}/labels.txt with the names of the {own_classes} classes, one a line, and "
            'labels = "labels.txt" in the spec'
        )
    return [*lines, "check: [input] has the values of timm's own weights; set those of your training"]


def found_line(path: str, facts: CheckpointFacts, *kinds: str) -> str:
    """Return the line on what was found in the checkpoint, first `kinds`; or why it does not fit the network."""
    if facts.mismatch:
        return f"{facts.mismatch}; weights.converter can rename and convert tensors"
    prefix = [f"the prefix {facts.prefix}"] if facts.prefix else []
    notes = (f"{kind}: {what}" for kind, what in facts.notes.items())
    return f"found in {os.path.basename(path)}: {', '.join([*kinds, *prefix, *notes])}"
