"""Files with the names of classes, one per line."""

import re

from build_tasks.errors import UserError

# Control characters, separators of lines and the byte order mark. Marks of direction belong to some languages.
UNSAFE = "[\0-\x1f\x7f-\x9f\u2028\u2029\ufeff]"  # compiled where it is used: doit imports this module in most runs
MAX_CHARACTERS = 1 << 24  # of a label file; ImageNet's 21,841 classes have a million


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
