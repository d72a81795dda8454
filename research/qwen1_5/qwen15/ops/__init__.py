"""The operators our network is made of, behind one interface: fused C++ kernels, or plain MindSpore.

An operator set is a module with one `nn.Cell` class per operator. Activations between operators are float32; T is the
number of tokens in the flat batch (all sequences' new tokens one after another, without padding), B the number of
sequences.

A matrix (table, wq, wk, wv, w, w1, w3) is a tuple of Parameters: `(weight,)`, or where it is quantised
`(integers, scale)` with `zero` and then `order` after them where it has them; `checkpoint/quantised.py` says what each
holds. Matrices of one network may be quantised each in its own way, or not. A table has 8 bits and no order.

| class | construct | result |
|---|---|---|
| `Embed()` | ids (T,) int32, table (V, E) | (T, E) |
| `Qkv(eps, num_heads, num_kv_heads, head_dim)` | x (T, E), norm (E,), wq, bq, wk, bk, wv, bv, and \
cos (P, D), sin (P, D), positions (T,), slots (T,), key_cache, value_cache \
| q (T, H*D); keys and values are written to the caches |
| `Attention(num_heads, num_kv_heads, head_dim)` | q (T, H*D), key_cache, value_cache, query_lens (B,), \
context_lens (B,), block_tables (B, M) | (T, H*D) |
| `Project()` | x (T, I), w (O, I) | (T, O) |
| `ProjectAdd()` | x (T, I), w (O, I), residual (T, O) | (T, O) |
| `GateUp(eps)` | x (T, E), norm (E,), w1 (F, E), w3 (F, E) | (T, F) |
| `Head(eps)` | x (T, E), query_lens (B,), norm (E,), w (V, E) | logits (B, V) of each sequence's last token |

and four functions: `weight_dtype(param_init_type)` and `cache_dtype(compute_dtype)` give the dtype in which this set
keeps weights and the KV cache, `compute_in(compute_dtype)` is told what accuracy is wanted, and `together(rank, ranks)`
lets `Decoder` add over the ranks of this machine, or says why it cannot. A set may also offer `Decoder`, the whole
stack as one operator, its plain twin being the composition in model.py; with it come `Decode`, the same for one new
token of each sequence without passing the parameters again, and the `Binding` between the two.

The KV cache of a layer is two Parameters [num_blocks, block_size, K, D]; slot = block * block_size + offset. All int
inputs are int32; block tables are padded with -1.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Tuple

from ..errors import UserError
from ..kernels.library import KERNELS
from ..machine import MOST_THREADS

CHOICES = (*KERNELS, "reference")
"""Values of the environment variable QWEN15_KERNELS; unset chooses the best this machine runs."""


def decide() -> Tuple[str, str]:
    """The operator set for this process, 'cpu' or 'reference', and one line on why; without importing MindSpore.

    Raises:
        UserError: QWEN15_KERNELS names a path that does not exist or that this machine cannot run, QWEN15_THREADS is
            no number of threads, or QWEN15_READING no way of reading.
    """
    from ..kernels import reading

    _check_threads(os.environ.get("QWEN15_THREADS", ""))
    reading.forced()
    forced = os.environ.get("QWEN15_KERNELS", "")
    if forced and forced not in CHOICES:
        raise UserError(f"{forced!r} is not a kernel path", where="QWEN15_KERNELS",
                        fix=f"Choose one of {', '.join(CHOICES)}.")
    if forced == "reference":
        return "reference", "reference operators (QWEN15_KERNELS=reference)"
    available, why = kernels_available()
    if available:
        return "cpu", f"fused kernels, {why}"
    if forced:
        raise UserError(f"{forced} kernels cannot be used: {why}", where="QWEN15_KERNELS")
    return "reference", f"reference operators, slow ({why})"


def _check_threads(text: str) -> None:
    if text and not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= MOST_THREADS):
        raise UserError(f"wants a number of threads from 1 to {MOST_THREADS}, not {text[:40]!r}", "QWEN15_THREADS",
                        "Unset it to use this machine's cores.")


def use_threads(count: int) -> None:
    """Let the kernels run on so many threads from now on; without kernels there is nothing to do."""
    from ..kernels import library

    try:
        library.load().threads = count
    except UserError:  # not built; `decide` says so
        pass


def select() -> Tuple[ModuleType, str]:
    """The operator set that `decide` names, imported, and its line. How this machine is read best is measured where
    that is not known yet."""
    from ..kernels import library, reading

    name, note = decide()
    if name == "cpu":
        reading.use(library.load())
    return importlib.import_module(f".{name}", __name__), note


def kernels_available() -> Tuple[bool, str]:
    """Whether the kernel library can be used here, and one line on which kernels it runs or why not."""
    from ..kernels import library

    forced = os.environ.get("QWEN15_KERNELS", "")
    try:
        kernels = library.load()
    except UserError as error:
        return False, str(error)
    if forced:
        if not kernels.can_run(forced):
            return False, f"this CPU cannot run {forced}"
        kernels.use_kernels(forced)
    return True, f"{kernels.kernels}, {kernels.threads} threads"
