"""The stages of the build, one module each, and the few rules that they share.

weights, labels, reference, torchscript, cast, onnx, precision, engine   the stages, up to the artifacts
onnx_only                   weights and onnx of a model that exists only as ONNX
measure, accuracy, summary, config, ensemble, client, publish          … and from there to Triton
layers, repair              stages on demand: where a graph goes wrong, and what mends it
bench, load, contexts       how fast artifacts are: closed loops of batches, on the CPU, the GPU, and engines
bench_server, perf_tools    … and running servers; NVIDIA's perf_analyzer and trtexec
bench_report, advice        … compared, told and drawn; what follows for [triton]
container                   the same build in NVIDIA's container
check, smoke, serve         what Triton's own server says of the repository, and how a running one answers
tritonserver, asking        that server on this machine, and requests to one
spec, reading, overrides    what models/<model>/model.toml may say, mistakes in it, and the command line's say
foresight, plan             what a run would do with each task; `doit plan`, which tells it
new, names                  `doit new`, which writes one; what a model cannot be called
modelconfig                 [triton] of it, by the protobuf that Triton reads
contradictions, optimisation, releases    what Triton would refuse or pass over, and what its releases can load
stage, files                what every stage obeys: fingerprints, whole-or-nothing
worker, preload, server     the child process of a stage; the beginning and the end of what it is forked from
limits, budget, threads     how `doit -n` shares memory and cores, on which no record depends; and a full disk
settled, later              what is not judged again before it changes, and not imported before it is used
digests, reporter           what doit is given: a checker of files, and a voice
report, card, since         `doit report`: a page of all of it, model by model, and what is new on it
charts, templates/          its pictures, and its markup
architecture, script, pictures    what several stages need: the network, TorchScript, samples
compare, metrics, gate      how an artifact is run, how far off it is, and how far it may be
effects, tables             what single nodes cost in a precision; tables as text
machine, compiler           what this machine has for TensorRT; TensorRT and TensorRT-RTX
sources                     where weights come from
schema                      the spec for editors and people: models/model.schema.json, docs/reference/spec.md
python_model/               published as it stands: the Python model of an ensemble, and its preprocessing
python_backends/            stand-ins for Triton's backends, in its Python backend
"""
