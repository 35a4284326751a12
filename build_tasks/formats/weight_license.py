"""The license of weights, as the source of the weights states it -> weights.license.json

    timm://NAME                 the license in timm's table of pretrained weights
    hf://OWNER/REPOSITORY/FILE  the license in the metadata at the top of the repository's README.md

Source: the field `license` of timm.models.PretrainedCfg; "Model cards" in the documentation of the Hugging Face hub.
"""

from build_tasks.formats.weight_sources import download_from_hub, hub_file
from build_tasks.json_files import write_json
from build_tasks.runtime.stage import Paths
from build_tasks.spec.model import split_source


def write_license(source: str, inputs: Paths, outputs: Paths) -> None:
    """Write the license that a source states, null if it states none. For other sources there is nothing to write.

    The hub is not asked about a file that the user has put into its place, since it may be out of reach.
    """
    if "license" in outputs:
        write_json(outputs["license"], {"license": stated_license(source, ask_hub="source" not in inputs)})


def stated_license(source: str, *, ask_hub: bool) -> str | None:
    """Return the license of a source on the hub or of timm; None if it names none, or its README cannot be read."""
    scheme, rest = split_source(source)
    if scheme == "timm":
        from timm.models import get_pretrained_cfg

        try:
            config = get_pretrained_cfg(rest)
        except RuntimeError:  # timm has no such weights: the user has put a file into its place
            return None
        return config.license if config else None
    return license_of_repository(source) if ask_hub else None


def license_of_repository(source: str) -> str | None:
    """Return the license of a repository on the hub: its identifier, or the name of a license that has none."""
    from huggingface_hub import metadata_load

    repository, _, revision = hub_file(source)
    try:
        metadata = metadata_load(download_from_hub(repository, "README.md", revision)) or {}
    except (OSError, ValueError):  # no README, no answer, or metadata that is no YAML
        return None
    identifier = metadata.get("license")
    if identifier == "other":
        identifier = metadata.get("license_name", identifier)
    return identifier if isinstance(identifier, str) else None
