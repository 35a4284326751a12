"""What a model cannot be called: the words that doit knows."""

from doit.doit_cmd import DoitMain

STAGES = (
    *("weights", "labels", "reference", "torchscript", "cast", "onnx", "repair", "precision", "engine", "rtx"),
    *("measure", "accuracy", "summary", "preprocess", "config", "client", "publish", "prune"),
    *("container", "layers", "compare", "bench", "check", "smoke", "serve", "tritonserver"),
)
COMMANDS = (*(command.get_name() for command in DoitMain.DOIT_CMDS), "plan", "new", "report")
RESERVED = (*STAGES, *COMMANDS)
