"""MindFormers' own LlamaForCausalLM behind the seam: context, building, strict loading, prefill and decode."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any, Callable, Dict, Mapping, Optional, Set, Tuple

import numpy as np

from .. import device, interrupts, machine, naming
from ..checkpoint import casting
from ..checkpoint.tensors import LONG_NAMES
from ..config.schema import Config, ModelConfig
from ..errors import EXIT_FAILED, UserError
from ..reporting import stdout_to_stderr
from . import weight_quant, weights
from .base import Network
from .mindformers_import import import_mindformers

SEMI_AUTO_PARALLEL = (1, "SEMI_AUTO_PARALLEL")
"""MindFormers' two spellings of the parallel mode in which MindSpore cuts the weights by the network's strategies."""

HEAD_DIMS = (64, 80, 96, 120, 128, 256)
"""Head sizes that the fused attention on Ascend takes."""

_CACHE = re.compile(r"\.(key_cache|value_cache)$")
_DTYPES = {"Float32": "F32", "Float16": "F16", "BFloat16": "BF16"}
_OUT_OF_MEMORY = re.compile(r"out of memory|memory (is not|isn't|not) enough|alloc\w* .*memory failed|device memory",
                            re.IGNORECASE)
_LIBRARY_FAILED = re.compile(r"^Load dynamic library: (\S+) failed\. (.+)$", re.MULTILINE)


class MindFormersNetwork(Network):
    """LlamaForCausalLM from MindFormers, unchanged, with its fused operators, on one card or cut over several.

    Prefill always runs whole prompts: MindFormers' prefill graph attends to the tokens it is given, not to the cache.

    Args:
        config: the whole configuration; `config.effective` is what MindFormers is given.
        checkpoint: what `weights.resolve` found.
        tell: receives one line for each thing worth knowing.

    Attributes:
        cell: MindFormers' network itself.

    Raises:
        UserError: no card, MindFormers missing, a configuration or checkpoint that does not fit.
    """

    supports_cached_prefill = False

    def __init__(self, config: Config, checkpoint: str, tell: Callable[[str], None]):
        device.require(config.device_target, card=config.device_id)
        check(config.model, config.device_target)
        self.vocab_size = config.model.dims.vocab_size
        self.rank, self.ranks = weights.this_rank(config), config.parallel.model_parallel
        self._source = weights.Loader.of(config, checkpoint, self.rank)
        table = {weight.ms: weight for weight in naming.weights(config.model.dims)}
        # A checkpoint that the operators cannot take is refused here, before there is a device.
        quantised = weight_quant.forms(self._source.schemes, table, self.ranks, checkpoint)
        with stdout_to_stderr():
            settings = mindformers_config(config)
            _match_ranks(start(settings), (self.rank, self.ranks), config.parallel.use_parallel)
            self.cell = build(settings, quantised, self.ranks)
            if self.ranks > 1:
                cut(self.cell, config.model)
            fill(self.cell, self._source, config, self.ranks, tell, quantised)
            self.cell.set_dynamic_inputs()
        self._phase: Optional[str] = None
        self._compiled: Set[str] = set()
        self._table_width = -(-config.model.seq_length // config.model.block_size)
        held = sorted({f"int{form.bits}" for form in quantised.values()})
        self.note = (f"{config.device_target}, MindFormers' LlamaForCausalLM on {self.ranks} card(s), weights "
                     f"{' and '.join([*held, config.model.param_init_type])}, KV cache {config.model.compute_dtype}")

    def prefill(self, input_ids, query_lens, context_lens, block_tables, slot_mapping):
        if not np.array_equal(query_lens, context_lens):
            raise ValueError("this network cannot prefill sequences that are partly in the cache")
        return self._run("prefill", input_ids[None, :], context_lens, block_tables, slot_mapping)

    def decode(self, input_ids, context_lens, block_tables, slot_mapping):
        with interrupts.held():
            return self._run("increment", input_ids[:, None], context_lens, block_tables, slot_mapping)

    def _run(self, phase: str, input_ids: np.ndarray, lengths: np.ndarray, block_tables: np.ndarray,
             slot_mapping: np.ndarray) -> np.ndarray:
        """One call in the predict contract: ids (1, T) or (B, 1), lengths (1, B), tables (B, M), slots (T,)."""
        import mindspore as ms

        if phase != self._phase:
            # A flag selects which of its two graphs is traced, a phase which compiled graph MindSpore runs.
            self.cell.add_flags_custom(is_first_iteration=phase == "prefill")
            self._phase = phase
        self.cell.phase = phase
        tables = np.full((len(block_tables), self._table_width), -1, np.int32)
        tables[:, :block_tables.shape[1]] = block_tables
        inputs = {"input_ids": input_ids, "batch_valid_length": lengths[None, :], "block_tables": tables,
                  "slot_mapping": slot_mapping}
        tensors = {name: ms.Tensor.from_numpy(np.ascontiguousarray(array, np.int32)) for name, array in inputs.items()}
        with contextlib.ExitStack() as stack:
            if phase not in self._compiled:
                stack.enter_context(stdout_to_stderr())
            try:
                logits = self.cell(**tensors).asnumpy()
            except RuntimeError as error:
                raise _explain(error) from error
        self._compiled.add(phase)
        return logits

    def agree(self, ids):
        if self.ranks == 1:
            return ids
        return broadcast(ids)

    def likeness(self):
        return self._source.likeness()

    def find_non_finite(self):
        return self._source.find_non_finite()


def _match_ranks(found: Tuple[int, int], wanted: Tuple[int, int], use_parallel: bool) -> None:
    """Refuse a cluster of another size, or one that takes this process for another rank: (rank, ranks) of both."""
    if use_parallel and found[1] != wanted[1]:
        raise UserError(f"{found[1]} workers are running, model_parallel is {wanted[1]}",
                        fix=f"Start {wanted[1]} workers.")
    if found != wanted:
        raise UserError(f"MindSpore takes this process for rank {found[0]}, RANK_ID says {wanted[0]}",
                        fix="Start the workers by scripts/msrun_launcher.sh, and unset RANK_TABLE_FILE.")


def check(model: ModelConfig, device_target: str) -> None:
    """Refuse what MindFormers' network or the Ascend operators cannot do, before anything is imported.

    Raises:
        UserError: names the key and the value to set.
    """
    where = "model.model_config"
    for name in ("use_past", "is_dynamic"):
        if not getattr(model, name):
            raise UserError(f"{name} is False; on Ascend the engine needs the paged KV cache and prompts without "
                            "padding", f"{where}.{name}", f"Set {name}: True.")
    if model.qkv_concat:
        raise UserError("qkv_concat is True; this module's checkpoints hold wq, wk, wv, w1 and w3 apart",
                        f"{where}.qkv_concat", "Set qkv_concat: False.")
    dims = model.dims
    if dims.hidden_size != dims.num_heads * dims.head_dim:
        raise UserError(f"head size {dims.head_dim} x {dims.num_heads} heads is not hidden_size {dims.hidden_size}; "
                        "MindFormers' LlamaForCausalLM has no head size of its own", where, "Use --device_target CPU.")
    if device_target == device.ASCEND:
        if dims.head_dim not in HEAD_DIMS:
            raise UserError(f"heads of {dims.head_dim} (hidden_size / num_heads); the fused attention on Ascend takes "
                            f"{', '.join(map(str, HEAD_DIMS))}", where, "Use --device_target CPU.")
        for name in ("compute_dtype", "rotary_dtype"):
            if getattr(model, name) == "float32":
                raise UserError(f"{name} is float32; the fused operators on Ascend take float16 and bfloat16 only",
                                f"{where}.{name}", f"Set {name}: bfloat16.")


def mindformers_config(config: Config) -> Any:
    """`config.effective` as a MindFormerConfig, its own weight loading switched off and its mode made explicit.

    Raises:
        UserError: MindFormers is not installed, or the YAML asks for what prediction cannot do.
    """
    if config.effective.get("only_save_strategy"):
        raise UserError("a prediction run saves no strategy", "only_save_strategy",
                        "Remove it: convert_weight.py --model_parallel N writes strategy files beside the slices, "
                        "without a card.")
    MindFormerConfig = import_mindformers().MindFormerConfig

    settings = MindFormerConfig(**config.effective)
    settings.use_legacy = True
    settings.load_checkpoint = ""  # loaded by `fill`: MindFormers goes on with random weights where one is missing
    settings.auto_trans_ckpt = False
    settings.model.model_config.checkpoint_name_or_path = ""
    settings.context = settings.context or MindFormerConfig()
    settings.context.device_target = config.device_target
    settings.parallel = settings.parallel or MindFormerConfig()
    if config.parallel.use_parallel:
        mode = settings.parallel.setdefault("parallel_mode", SEMI_AUTO_PARALLEL[0])
        if mode not in SEMI_AUTO_PARALLEL:
            raise UserError(f"parallel_mode {mode} cannot cut the weights", "parallel.parallel_mode",
                            "Set parallel_mode: 1.")
        if settings.context.mode == 1:
            raise UserError("mode 1 (PyNative) cannot cut the weights over cards", "context.mode", "Set mode: 0.")
        settings.parallel.setdefault("full_batch", True)
    return settings


def start(settings: Any) -> Tuple[int, int]:
    """Set up MindSpore's context and the communication between cards through MindFormers' build_context.

    Returns:
        (rank, ranks).
    """
    from mindformers import build_context

    if len(machine.allowed_cpus()) < (os.cpu_count() or 1):
        # MindFormers counts all processors of the machine and pins ranks to numbers that a cpuset may not hold.
        os.environ.setdefault("CPU_AFFINITY", "False")
    try:
        context = build_context(settings)
    except (OSError, RuntimeError, ValueError) as error:
        raise _not_set_up(error) from error
    if settings.use_parallel:
        import mindspore as ms

        # build_context told the next compilation to overwrite a file under ./output/strategy, which nobody asked for.
        ms.context.set_auto_parallel_context(strategy_ckpt_save_file="")
        return context.rank_id, context.device_num
    return 0, 1


def _not_set_up(error: BaseException) -> UserError:
    """Why there is no device, in one line: MindSpore's first line does not name the library that failed to load."""
    failed = _LIBRARY_FAILED.search(str(error))
    if failed is None:
        return UserError(f"the device cannot be set up: {_first_line(error)}", fix="`qwen15 ascend-check` examines it.",
                         exit_code=EXIT_FAILED)
    cann = device.find_ascend().cann or ""
    return UserError(f"the device cannot be set up: {failed[2].strip()} ({failed[1]})", exit_code=EXIT_FAILED,
                     fix=f"source {device.set_env(cann)}; `qwen15 doctor` says what is installed.")


def build(settings: Any, quantised: Optional[Mapping[str, weight_quant.Form]] = None, ranks: int = 1):
    """The network, through MindFormers' registry, with parameters that hold no memory yet.

    Args:
        settings: from `mindformers_config`.
        quantised: matrices whose Linears are replaced by cells for quantised ones.
        ranks: cards that the network will be cut over.
    """
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models import build_network
    from mindspore.nn.utils import no_init_parameters

    build_parallel_config(settings)
    defaults = {"parallel_config": settings.parallel_config, "moe_config": settings.moe_config}
    # Besides time and memory saved: only parameters without contents let the compiler set a slice's shape and no more.
    with no_init_parameters():
        cell = build_network(settings.model, default_args=defaults)
        weight_quant.place(cell, quantised or {}, ranks)
    cell.set_train(False)
    return cell


def cut(cell, model: ModelConfig) -> None:
    """Give every parameter the shape of this rank's slice: MindSpore compiles the front end, no device code."""
    from mindspore import Model

    ids = np.ones((model.batch_size, model.seq_length), np.int32)
    Model(cell).infer_predict_layout(*cell.prepare_inputs_for_predict_layout(ids), skip_backend_compile=True)


def fill(cell, source: weights.Loader, config: Config, ranks: int, tell: Callable[[str], None],
         quantised: Optional[Mapping[str, weight_quant.Form]] = None) -> None:
    """Put this rank's slice of every weight into its Parameter, and zeros into the KV caches; strictly.

    Args:
        cell: MindFormers' network, cut for this rank.
        source: of the weights.
        config: the whole configuration.
        ranks: cards.
        tell: receives the account.
        quantised: matrices that the network holds quantised.

    Raises:
        UserError: the network has other parameters, or other slices, than the table of weights says.
    """
    quantised = quantised or {}
    parameters = {parameter.name: parameter for parameter in cell.get_parameters()}
    expected = {weight.ms: weight for weight in naming.weights(config.model.dims)}
    shapes = {name: weight.slice_shape(ranks, config.parallel.vocab_emb_dp) for name, weight in expected.items()}
    for name, form in quantised.items():
        path, _, _ = name.rpartition(".")
        shapes.update({f"{path}.{part}": shape for part, shape in form.shapes(ranks).items()})
    _match(parameters, shapes)
    casts: Dict[Tuple[str, str, str], casting.Count] = {}

    def put(name: str, array: np.ndarray, held: str, what: str) -> None:
        parameter = parameters[name]
        dtype = _DTYPES[str(parameter.dtype)]
        if held != dtype:
            array, count = casting.cast(np.ascontiguousarray(array), held, dtype)
            if dtype != "F32" and what != "offset":
                casts[what, held, dtype] = casts.get((what, held, dtype), casting.Count()) + count
        parameter.set_data(casting.to_tensor(array, dtype), slice_shape=ranks > 1)

    for name in expected:
        if name in quantised:
            path, _, _ = name.rpartition(".")
            arrays = weight_quant.operator_arrays(source.read_quantised(name), quantised[name])
            _put_integers(parameters[name], arrays.pop("weight")[0], ranks)
            for part, (array, held) in arrays.items():
                put(f"{path}.{part}", array, held, part.replace("weight_", ""))
        elif name in source.schemes:
            dtype = _DTYPES[str(parameters[name].dtype)]
            array, count = weight_quant.dequantised(source.read_quantised(name), dtype)
            key = "embedding and head", str(source.schemes[name]), dtype
            casts[key] = casts.get(key, casting.Count()) + count
            put(name, array, dtype, "embedding and head")
        else:
            array, held = source.read(name)  # its matrices are cast already, except those beside quantised ones
            put(name, array, held, "norms and biases" if array.ndim == 1 else "embedding and head")
    cell.init_parameters_data()  # what still has no contents is a cache: zeros
    empty = [parameter.name for parameter in cell.get_parameters() if parameter.has_init]
    if empty:
        raise UserError(f"{len(empty)} parameters got no value, the first is {empty[0]}",
                        fix="Use the MindFormers version named in the guide.")
    told = "".join(f"; {what} {LONG_NAMES.get(a, a)} -> {LONG_NAMES[b]}: {count}"
                   for (what, a, b), count in casts.items())
    tell(source.account() + told)


def _match(parameters: Mapping[str, Any], shapes: Mapping[str, Tuple[int, ...]]) -> None:
    """Refuse a network whose parameters are not those of the table, in name and in shape."""
    unknown = [name for name in parameters if name not in shapes and not _CACHE.search(name)]
    absent = [name for name in shapes if name not in parameters]
    if unknown or absent:
        raise UserError(f"MindFormers' network has {len(unknown)} parameters this module does not know and lacks "
                        f"{len(absent)}: {(unknown + absent)[0]}",
                        fix="Use the MindFormers version named in the guide.")
    for name, shape in shapes.items():
        if tuple(parameters[name].shape) != shape:
            raise UserError(f"a rank's slice of {name} is {list(shape)}, in MindFormers' network it is "
                            f"{list(parameters[name].shape)}", fix="Use the MindFormers version named in the guide.")


def _put_integers(parameter: Any, array: np.ndarray, ranks: int) -> None:
    """A quantised matrix's integers into its Parameter, int8 or qint4x2."""
    import mindspore as ms

    parameter.set_data(ms.Tensor(np.ascontiguousarray(array), dtype=parameter.dtype), slice_shape=ranks > 1)


def broadcast(ids: np.ndarray) -> np.ndarray:
    """Rank 0's `ids` (N,) int32 on every rank."""
    import mindspore as ms
    from mindspore.communication import GlobalComm, comm_func

    tensor = ms.Tensor.from_numpy(np.ascontiguousarray(ids, np.int32))
    return comm_func.broadcast(tensor, src=0, group=GlobalComm.WORLD_COMM_GROUP).asnumpy()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _explain(error: RuntimeError) -> Exception:
    """A card that is full, as a user can mend it; anything else as it is."""
    if _OUT_OF_MEMORY.search(str(error)):
        return UserError(f"the card is out of memory: {_first_line(error)}", exit_code=EXIT_FAILED,
                         fix="Lower model.model_config.num_blocks or the batch, or raise context.max_device_memory "
                             "or model_parallel.")
    return error
