"""Names that a model cannot have, because doit uses them for a command or a stage."""

from doit.doit_cmd import DoitMain

STAGES = (
    *("weights", "labels", "reference", "torchscript", "cast", "onnx", "repair", "precision", "engine", "rtx", "aoti"),
    *(
        "measure",
        "accuracy",
        "summary",
        "preprocess",
        "python_model",
        "ensemble",
        "config",
        "client",
        "publish",
        "prune",
    ),
    *("container", "layers", "compare", "bench", "check", "smoke", "serve", "sweep", "tritonserver", "upgrade"),
)
OWN_COMMANDS = ("plan", "new", "adopt", "report", "cache", "rebuild", "verify", "sign", "push", "farm", "worker")
COMMANDS = (*(command.get_name() for command in DoitMain.DOIT_CMDS), *OWN_COMMANDS)
RESERVED = (*STAGES, *COMMANDS)
