"""The text of `doit help`: everything that a person can type, in groups, on 80 columns."""

USAGE = """\
doit builds a Triton model repository from the specs in models/.

Start here
  doit                    build all models that this machine can build
  doit NAME               build one model, all its formats
  doit plan               what would run, why, and how long; builds nothing
  doit list               the models and the stages
  doit new NAME …         write the spec of a new model, models/NAME/model.toml
  doit adopt PATH         bring in a model repository that exists already
  doit serve              serve model_repository/ with Triton, until Ctrl-C

Build
  doit STAGE:NAME         one stage, and the stages that it depends on; STAGE is
                          weights, labels, reference, torchscript, cast, onnx,
                          precision, engine, rtx, aoti, measure, accuracy,
                          summary, preprocess, python_model, ensemble, config,
                          client or publish
  doit -n 2               two stages at a time
  doit container          the TensorRT engines, in NVIDIA's container
  doit prune              remove published models that have no spec any more
  doit run …              the same as doit …

Look
  doit report             the state of the build as one page, build/report.html
  doit compare:NAME       the accuracy of fp16, bf16, int8 and fp8, side by side
  doit layers:NAME        the error after each node of the graph for engines
  doit bench:NAME         latency and throughput, and suggested [triton] values
  doit info TASK          files of a task, and the reasons why it would run
  doit help NAME          the options of a command, a stage or a task

Serve and test
  doit tritonserver       fetch Triton's server core, for check and serve
  doit check              load every model in Triton's own server, strictly
  doit smoke              compare a running server with the reference samples
  doit upgrade 26.11      what another release of Triton would mean

Change
  doit repair:NAME        find the nodes to exclude from a precision
  doit clean TASK         remove the files of a task
  doit forget TASK        build a task again, whatever its record says
  doit ignore TASK        leave a task out, until doit forget
  doit sweep              remove folders of removed models, and the trash

Prove and deliver (docs/how-to/prove.md)
  doit verify             read every byte, compare it with the records; --heal
  doit sign --key FILE    sign the published models
  doit push URL           copy them to a bucket or a folder; --oci FOLDER

Share (docs/how-to/build-cache.md, docs/how-to/farm.md)
  doit farm               build on the workers of a Dask cluster
  doit worker ADDRESS     offer this machine to a farm, until Ctrl-C
  doit cache              what the build cache BUILD_CACHE holds; prune, verify
  doit rebuild NAME       build again without the cache, and compare every byte

Of doit itself: dumpdb, reset-dep, strace, and tabcompletion for bash and zsh

Options of the spec for one run: doit onnx:NAME --opset_version 17, see
doit help onnx and doit help engine. Everything else: docs/reference/commands.md
"""
