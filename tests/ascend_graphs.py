"""Compile MindFormers' network for 910B on a CPU, up to kernel selection, and say what the graphs are made of.

With several ranks MindSpore's auto-parallel front end runs behind `ascend_shim.cpp`: it cuts the parameters, inserts
the communication and writes the strategy file, for one pretended rank, as it would on a card.
"""

import contextlib
import ctypes
import functools
import importlib
import io
import math
import os
import subprocess
import tempfile
from collections import Counter
from unittest import mock

import ascend_cases
import ascend_emulation
import convert_weight
import mindspore as ms
import numpy as np
from mindformers.core.context import parallel
from mindspore import context
from mindspore._c_expression import MSContext, ms_ctx_param
from mindspore.train import mind_ir_pb2
from quantised_fixtures import unpack_int4
from qwen15 import device, naming
from qwen15.ascend import check, operators
from qwen15.checkpoint.quantised import Scheme, dequantise
from qwen15.config import load as configuration
from qwen15.conversion import strategy
from qwen15.generation.engine import Engine
from qwen15.generation.request import Limits, Request
from qwen15.network import mindformers, weight_quant, weights

# Its package has a function of that name
build_context = importlib.import_module("mindformers.core.context.build_context")

DYNAMIC = ms.Tensor(shape=[None, None], dtype=ms.int32)
COUNTED = ("WeightQuantBatchMatmul", "RmsNorm", "ApplyRotaryPosEmb", "ReshapeAndCache", "FlashAttentionScore",
           "PagedAttention", "SiLU", "MatMul", "AllReduce",
           "AllGather", "Split", "Concat", "Gather", "CumsumExt", "ReduceScatter", "AlltoAll", "Broadcast")


def _executor():
    try:
        from mindspore.graph.api import _cell_graph_executor
    except ImportError:  # before MindSpore 2.9
        from mindspore.common.api import _cell_graph_executor
    return _cell_graph_executor


@functools.lru_cache(maxsize=None)
def _load_shim() -> None:
    libraries = os.path.join(os.path.dirname(ms.__file__), "lib")
    folder = tempfile.mkdtemp()
    library = os.path.join(folder, "shim.so")
    source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "ascend_shim.cpp")
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", "-D_GLIBCXX_USE_CXX11_ABI=0", source, "-o", library,
                    f"-L{libraries}", "-l:libmindspore_core.so", "-l:libmindspore_common.so"], check=True)
    ms.Tensor(np.ones(1)).asnumpy()  # the CPU's runtime exists before there seems to be another device
    ctypes.CDLL(library)
    _set_target("CPU")
    executor = _executor()
    executor._graph_executor = _OnAscend(executor._graph_executor)
    ms.Tensor.asnumpy = _on_cpu(ms.Tensor.asnumpy)


def _set_target(target: str) -> str:
    """Switch MindSpore's device target and return the one before."""
    settings = MSContext.get_instance()
    before = settings.get_param(ms_ctx_param.device_target)
    settings.set_param(ms_ctx_param.device_target, target)
    return before


class _OnAscend:
    """MindSpore's compiler, with Ascend as the target while it compiles."""

    def __init__(self, compiler):
        self._compiler = compiler

    def __getattr__(self, name):
        return getattr(self._compiler, name)

    def compile(self, *arguments):
        _set_target("Ascend")
        try:
            return self._compiler.compile(*arguments)
        finally:
            _set_target("CPU")


def _on_cpu(function):
    """Constant folding reads tensors' contents during the compilation: those are in the CPU's memory."""
    @functools.wraps(function)
    def call(*arguments):
        before = _set_target("CPU")
        try:
            return function(*arguments)
        finally:
            _set_target(before)
    return call


def pretend(ranks: int, rank: int) -> None:
    """Let this process be `rank` of `ranks` cards; MindFormers' build_context can be called once more."""
    for name, value in (("RANK_SIZE", ranks), ("RANK_ID", rank)):
        os.environ[name] = str(value)
    build_context.Context.reset_instance()
    build_context.set_ms_affinity = lambda *arguments: None  # MindSpore takes it once in a process
    context.reset_auto_parallel_context()
    if ranks == 1:
        return
    _load_shim()

    def get_rank():
        context.set_auto_parallel_context(global_rank=rank)  # what `init` does when there is a communication
        return rank

    parallel.init, parallel.get_group_size, parallel.get_rank = (lambda: None), (lambda: ranks), get_rank


def load(yaml_path: str, options=(), ranks: int = 1):
    """The configuration for `ranks` cards."""
    flags = [configuration.Flag("context.device_target", "--device_target", "CPU"),
             configuration.Flag("use_parallel", "--use_parallel", ranks > 1)]
    return configuration.load_config(yaml_path, flags, options)


def build(yaml_path: str, options=(), ranks: int = 1, quantised=None):
    """The network of a YAML with overrides, its parameters without contents; production's way, but not cut or filled.

    Args:
        yaml_path, options, ranks: the configuration.
        quantised: (bits, group) of every matrix in the layers; group 0 for whole rows.
    """
    pretend(ranks, 0)
    config = load(yaml_path, options, ranks)
    settings = mindformers.mindformers_config(config)
    assert mindformers.start(settings) == (0, ranks)
    cell = mindformers.build(settings, forms(config.model.dims, ranks, *quantised) if quantised else {}, ranks)
    # Without cards there is nobody to give 100 GB of parameters their contents for.
    object.__setattr__(cell, "init_parameters_data", lambda auto_parallel_mode=False: {})
    return cell


def forms(dims, ranks: int, bits: int, group: int) -> dict:
    """What a checkpoint with quantised layers makes of a model's matrices."""
    table = {weight.ms: weight for weight in naming.weights(dims)}
    schemes = {}
    for name, weight in table.items():
        if len(weight.shape) == 2 and weight.cut != naming.VOCAB:
            own = weight.slice_shape(ranks, True)[1]
            size = math.gcd(group, own) if group else own
            schemes[name] = Scheme(bits, own // size, size, "F16", has_zero=True)
    return weight_quant.forms(schemes, table, ranks, "checkpoint")


def compile_phase(cell, phase: str) -> dict:
    """Compile the 'prefill' or 'increment' graph with dynamic shapes, as `MindFormersNetwork` has it compiled on
    Ascend."""
    cell.add_flags_custom(is_first_iteration=phase == "prefill")
    cell.phase = f"export.{phase}"
    none = (None,)
    inputs = (DYNAMIC, *none * 6, DYNAMIC, *none * 2, DYNAMIC, ms.Tensor(shape=[None], dtype=ms.int32), *none * 7)
    full_phase, _ = _executor().compile(cell, *inputs, phase=cell.phase, do_convert=False)
    return describe(cell, full_phase)


def describe(cell, full_phase: str) -> dict:
    """What a compiled graph is made of.

    Returns:
        operators: how many of each of COUNTED the graph has.
        norm_dtypes: in which dtypes the RmsNorm operators compute, without repetition.
        output: its shape, -1 where it is dynamic.
        inputs: name -> shape.
    """
    model = mind_ir_pb2.ModelProto()
    model.ParseFromString(_executor()._get_func_graph_proto(cell, full_phase, "mind_ir"))
    names = {f"REF::{primitive.name}": primitive.op_type for primitive in model.primitives}
    found = Counter(names.get(node.op_type, node.op_type) for node in model.graph.node)
    norms = {_first_dtype(node) for node in model.graph.node if names.get(node.op_type, node.op_type) == "RmsNorm"}
    return {"operators": {name: found[name] for name in COUNTED if found[name]}, "norm_dtypes": sorted(norms),
            "output": [list(tensor.dims) for value in model.graph.output for tensor in value.tensor],
            "inputs": {value.name.rsplit(":", 1)[-1]: [list(tensor.dims) for tensor in value.tensor]
                       for value in model.graph.input}}


def _first_dtype(node) -> str:
    """The dtype of a node's first result, as MindIR names it: FLOAT, FLOAT16, BFLOAT16; RmsNorm's is that of its
    input."""
    results = next(attribute for attribute in node.attribute if attribute.name == "shape")
    tensors = results.values[0].tensors if results.values else results.tensors
    return mind_ir_pb2.TensorProto.DataType.Name(tensors[0].data_type)


def graphs(yaml_path: str, options=(), ranks: int = 1, quantised=None) -> dict:
    """Both graphs of a YAML's network, see `describe` and `build`; under left_behind the files that this wrote."""
    before = _files()
    cell = build(yaml_path, options, ranks, quantised)
    found = {phase: compile_phase(cell, phase) for phase in ("prefill", "increment")}
    return {**found, "left_behind": sorted(_files() - before)}


def refused(yaml_path: str, options=()) -> str:
    """The compiler's words about a network that it must not accept."""
    cell = build(yaml_path, options)
    try:
        compile_phase(cell, "prefill")
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    raise AssertionError("the network compiles")


def slices(yaml_path: str, checkpoint: str, options=(), ranks: int = 2, whole: bool = True, quantised=None) -> dict:
    """Make every rank's network as production does: set up, build, cut, fill; and say what the front end made of it.

    The front end gives every rank the same shapes: it runs for the last one, and the other ranks fill that network
    anew.

    Args:
        yaml_path, options: the configuration.
        checkpoint: a folder that `ascend.model.save` made, the truth about the contents.
        ranks: over how many the network is cut.
        whole: `auto_trans_ckpt`: cut the slices from `checkpoint` while loading. Otherwise they are read from rank
            folders that convert_weight.py makes.
        quantised: see `ascend_cases.quantise_file`; then the slices are cut from a file that is quantised so.

    Returns:
        shapes: parameter -> shape after the cut.
        wrong: for each rank, parameters whose contents are not its slice as NumPy cuts it.
        strategy: parameter -> (device matrix, tensor map) in the strategy file MindSpore wrote.
        prefill, increment: see `describe`.
        account: the line about the weights.
        left_behind: files that all this leaves in the working directory.
        lost: files of an earlier run under ./output, where MindFormers empties folders, that are gone or changed.
    """
    rank = ranks - 1
    pretend(ranks, rank)
    config = load(yaml_path, [*options, f"parallel_config.model_parallel={ranks}", f"auto_trans_ckpt={whole}"], ranks)
    production_cut, told, result = mindformers.cut, [], {}

    def cut(cell, model):
        context.set_auto_parallel_context(strategy_ckpt_save_file=strategy_file)
        production_cut(cell, model)
        context.set_auto_parallel_context(strategy_ckpt_save_file="")
        result["shapes"] = {parameter.name: list(parameter.shape) for parameter in cell.get_parameters()}

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(mindformers, "cut", cut):
        strategy_file, read_from = os.path.join(folder, "strategy.ckpt"), checkpoint
        if not whole:
            read_from = os.path.join(folder, "sliced")
            convert_weight.main(["--torch_ckpt_dir", checkpoint, "--mindspore_ckpt_path", read_from, "--model_parallel",
                                 str(ranks),
                                 "--vocab_emb_dp", str(config.parallel.vocab_emb_dp)])
        made = {}
        if quantised:
            read_from = os.path.join(folder, "quantised.safetensors")
            convert_weight.main(["--torch_ckpt_dir", checkpoint, "--mindspore_ckpt_path", read_from])
            made = ascend_cases.quantise_file(read_from, quantised)
        mine = _somebodys_output(rank)
        before = _files()
        network = mindformers.MindFormersNetwork(config, weights.resolve(read_from, rank, ranks, whole), told.append)
        layouts = strategy.read_strategy(strategy_file)
        result.update({phase: compile_phase(network.cell, phase) for phase in ("prefill", "increment")})
        wrong = [_compare_contents(network.cell, checkpoint, ranks, rank, made)]
        with mock.patch.multiple(mindformers, build=lambda *_: network.cell, cut=lambda cell, model: None):
            for other in range(rank):
                pretend(ranks, other)
                mindformers.MindFormersNetwork(config, weights.resolve(read_from, other, ranks, whole), told.append)
                wrong.insert(other, _compare_contents(network.cell, checkpoint, ranks, other, made))
    result["strategy"] = {name: [list(layout.devices), list(layout.tensor_map)] for name, layout in layouts.items()}
    result["wrong"] = wrong
    result["left_behind"] = sorted(_files() - before)
    result["lost"] = [path for path, text in mine.items() if not os.path.exists(path) or open(path).read() != text]
    result["account"] = told[-1]
    return result


def generations(yaml_path: str, checkpoint: str, ranks: int) -> dict:
    """Let the engine generate twice in graph mode; each call of the network is compiled up to kernel selection and
    answers zeros.

    Returns:
        compiled: [phase, whether a graph had to be compiled] of each call.
        prefill, increment: see `describe`.
    """
    pretend(ranks, 0)
    config = load(yaml_path, ranks=ranks)
    network = mindformers.MindFormersNetwork(config, checkpoint, lambda line: None)
    executor = _executor()
    compile_on, run_network = executor.compile, network._run
    found, batches = {"compiled": []}, []

    def compile_only(cell, *inputs, phase, **options):
        full_phase, new = compile_on(cell, *inputs, phase=f"export.{phase}", do_convert=False, **options)
        found["compiled"].append([phase, new])
        if new:
            found[phase] = describe(cell, full_phase)
        return full_phase, new

    def remember(phase, input_ids, lengths, *others):
        batches.append(len(lengths))
        return run_network(phase, input_ids, lengths, *others)

    network._run, network.agree = remember, lambda ids: ids  # nobody is there to agree with
    engine = Engine(network, Limits(network.vocab_size, config.model.seq_length, config.model.num_blocks,
                                    config.model.block_size))
    with mock.patch.object(executor, "compile", compile_only), mock.patch.object(
            type(executor), "__call__", lambda *_,
        **__: ms.Tensor(np.zeros((batches[-1], network.vocab_size), np.float32))):
        for lengths in ((3, 20), (7, 1, 40)):
            list(engine.generate([Request((1,) * length, config.model.seq_length, max_new_tokens=3)
                                  for length in lengths]))
    return found


def _files() -> set:
    """What lies in the working directory, but for MindFormers' logs."""
    logs = os.path.relpath(os.environ["LOG_MF_PATH"])
    found = (os.path.relpath(os.path.join(folder, name)) for folder, _, names in os.walk(".") for name in names)
    return {path for path in found if not path.startswith(logs + os.sep)}


def _somebodys_output(rank: int) -> dict:
    """Files in the folders that MindFormers' own auto_trans_ckpt empties, path -> contents."""
    mine = {path: f"somebody's {path}" for path in (f"output/strategy/ckpt_strategy_rank_{rank}.ckpt",
                                                    f"output/transformed_checkpoint/model/rank_{rank}/checkpoint.ckpt")}
    for path, text in mine.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    return mine


def _compare_contents(cell, checkpoint: str, ranks: int, rank: int, quantised: dict) -> list:
    """Names of the weights that are not this rank's slice as NumPy cuts it."""
    from safetensors.numpy import load_file

    whole = {naming.hf_to_ms(name): array for name, array in
             load_file(os.path.join(checkpoint, "model.safetensors")).items()}
    held = {parameter.name: parameter for parameter in cell.get_parameters()}
    wrong = []
    for name, parameter in held.items():
        if name in quantised and name + "_scale" in held:
            stored = quantised[name]
            expected = dequantise(stored[""], stored["_scale"], "F16", stored.get("_zero"))
            ours = _meaning(held, name)
        elif name.endswith(("_scale", "_offset")):
            continue  # part of the meaning of its weight
        elif name not in whole:
            expected, ours = np.zeros(1), parameter.asnumpy()
            if ours.any():
                wrong.append(name)
            continue
        else:
            expected, ours = whole[name], parameter.asnumpy()
        for axis, (size, part) in enumerate(zip(expected.shape, ours.shape)):
            if size != part:
                expected = np.split(expected, ranks, axis)[rank]
        if not np.array_equal(ours, expected.astype(ours.dtype)):
            wrong.append(name)
    return wrong


def _meaning(held: dict, name: str) -> np.ndarray:
    """(W + offset) scale of a quantised weight's parameters, as (O, I): x W with x the unit matrix."""
    integers, transposed = held[name].asnumpy(), held[name + "_scale"].ndim == 1
    if held[name].dtype != ms.int8:
        integers = unpack_int4(integers)
    scale, offset = (ascend_emulation.values(held[name + part]) if name + part in held else None
                     for part in ("_scale", "_offset"))
    unit = np.eye(integers.shape[1 if transposed else 0], dtype=np.float32)
    return operators.weight_quant_matmul(unit, integers, scale, offset, transposed).T


def report(ranks: int) -> list:
    """`ascend_check` on `ranks` cards of which nobody computes: its exit code and standard output, every logit 0."""
    pretend(ranks, 0)
    card = device.Ascend(tuple(f"/dev/davinci{number}" for number in range(ranks)), "/usr/local/Ascend/cann", "plugin",
                         None)
    output = io.StringIO()

    def zeros(network, phase, input_ids, lengths, block_tables, slot_mapping):
        return np.zeros((len(lengths), network.vocab_size), np.float32)

    with mock.patch.object(check, "check_network", functools.partial(check.check_network, device_target="CPU")), \
            mock.patch.object(mindformers.MindFormersNetwork, "_run", zeros), \
            mock.patch.object(device, "find_ascend", lambda *_: card), \
            mock.patch.object(device, "ask", lambda *_: device.CardAnswer(None)), \
            mock.patch.dict(os.environ, MS_WORKER_NUM=str(ranks)), contextlib.redirect_stdout(output):
        code = check.main([])
    return [code, output.getvalue()]


def check_graphs(dtype: str, head_dim: int) -> list:
    """Compile every operator graph of `ascend_check`, then let its plain definition answer: names and errors."""
    context.reset_auto_parallel_context()
    ms.set_context(mode=ms.GRAPH_MODE)
    executor = _executor()

    def prepare(cell):
        def compile_and_run(*inputs, **named):
            cell.phase = "export.operator"
            executor.compile(cell, *inputs, phase=cell.phase, do_convert=False, **named)
            ascend_emulation.emulate(cell)
            return cell.construct(*inputs, **named)
        object.__setattr__(cell, "compile_and_run", compile_and_run)

    return [[result.name, result.error] for result in check.check_operators(dtype, head_dim, prepare)]
