"""What a stored tensor is: its name, dtype and shape, and which bytes of a file hold it."""

from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Tuple, Union

import numpy as np

# Safetensors' names are the project's names for dtypes. NumPy has no bfloat16 and no 8-bit floats: their bits travel as
# unsigned integers of the same width, and the name beside them says what they are.
NUMPY_DTYPES: Dict[str, type] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": np.uint8, "F8_E5M2": np.uint8,
}

LONG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes a network can have, in the words of configurations and flags."""
SHORT_NAMES = {long: short for short, long in LONG_NAMES.items()}

MOST_TENSORS = 1_000_000
MOST_DIMENSIONS = 32
LONGEST_NAME_BYTES = 4096
"""More than these is a damaged file, not a model; they bound what reading a header can allocate."""


def itemsize(dtype: str) -> int:
    """Bytes of one element of a dtype in `NUMPY_DTYPES`."""
    return np.dtype(NUMPY_DTYPES[dtype]).itemsize


def element_count(shape: Tuple[int, ...]) -> int:
    """Product of the sizes, in Python's own integers (NumPy's wrap around)."""
    count = 1
    for size in shape:
        count *= size
    return count


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a file declares it.

    Attributes:
        name: its key in the file.
        dtype: 'F32', 'F16', 'BF16', ...; a key of `NUMPY_DTYPES`.
        shape: its sizes; empty for a scalar.
        nbytes: bytes of its contents, row-major and little-endian.
    """

    name: str
    dtype: str
    shape: Tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, name: str, dtype: str, shape: Tuple[int, ...]) -> "TensorInfo":
        """The info of a tensor that is yet to be written."""
        return cls(name, dtype, shape, element_count(shape) * itemsize(dtype))

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Stored:
    """A tensor and the byte ranges `(offset, nbytes)` of its file that hold its contents, in order."""

    info: TensorInfo
    segments: Tuple[Tuple[int, int], ...]


@dataclass
class Scan:
    """What reading a file's headers found.

    Attributes:
        tensors: by name, in the file's order.
        others: name -> what it is, in the plural, for entries that are no tensors (strings, hash maps).
        metadata: the format's free text, if it has any.
    """

    tensors: Dict[str, Stored]
    others: Dict[str, str]
    metadata: Dict[str, str]


@dataclass(frozen=True)
class Body:
    """A step of writing a file: the next `nbytes` of this tensor's contents go here."""

    name: str
    nbytes: int


@dataclass(frozen=True)
class Tail:
    """A step of writing a file: `nbytes` that depend on the contents, made from the CRC-32 of every tensor so far."""

    nbytes: int
    make: Callable[[Mapping[str, int]], bytes]


Step = Union[bytes, Body, Tail]


def total_bytes(steps: List[Step]) -> int:
    """Size of the file that the steps make."""
    return sum(len(step) if isinstance(step, bytes) else step.nbytes for step in steps)
