"""MindSpore's strategy files, which say how parameters are cut over ranks: read, checked and written.

A strategy file is the protobuf message `ParallelStrategyMap` (mindspore/train/node_strategy_pb2.py):

    ParallelStrategyMap { uint32 current_stage = 1; repeated Item parallel_strategy_item = 2;
                          repeated LayoutItem parallel_layout_item = 3 }
    Item       { string node_name = 1; ParallelStrategys { uint32 stage = 1; repeated { repeated uint32 dim } } = 2 }
    LayoutItem { string param_name = 1; ParallelLayouts parallel_layouts = 2 }
    ParallelLayouts { dev_matrix = 1; tensor_map = 2; param_split_shape = 3; indices_offset = 4
                      (each { repeated dim = 1 });
                      int32 field = 5; int32 opt_weight_shard_step = 6; int32 opt_weight_shard_size = 7 }

`dev_matrix` arranges the devices in a grid, the last axis fastest. `tensor_map` gives for every axis of the tensor the
axis of that grid along which it is cut, counted from the right, and -1 for an axis that is not cut.
"""

import os
import re
from dataclasses import dataclass
from typing import Dict, List, Mapping, Optional, Sequence, Tuple, Union

from ..checkpoint import wire
from ..errors import UserError
from ..text_file import read_small
from .strips import Region, whole

_LARGEST_BYTES = 64 * 2 ** 20
_MOST_DEVICES = 2 ** 16
_MERGED = re.compile(r"^(\d+)-(.+)$")


@dataclass(frozen=True)
class Layout:
    """How one parameter is cut.

    Attributes:
        devices: the grid's sizes.
        tensor_map: for every axis of the tensor, the grid's axis from the right, or -1.
    """

    devices: Tuple[int, ...]
    tensor_map: Tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Devices in the grid."""
        count = 1
        for size in self.devices:
            count *= size
        return count

    def cuts(self, axis: int) -> int:
        """Into how many slices an axis of the tensor is cut."""
        along = self.tensor_map[axis] if axis < len(self.tensor_map) else -1
        return 1 if along < 0 else self.devices[len(self.devices) - 1 - along]

    def index(self, axis: int, rank: int) -> int:
        """Which of an axis' slices a rank has."""
        along = self.tensor_map[axis] if axis < len(self.tensor_map) else -1
        if along < 0:
            return 0
        below = 1
        for size in self.devices[len(self.devices) - along:]:
            below *= size
        return rank // below % self.devices[len(self.devices) - 1 - along]

    def slice_shape(self, shape: Sequence[int]) -> Tuple[int, ...]:
        """Shape of a slice of a tensor of `shape`.

        Raises:
            ValueError: an axis does not divide.
        """
        for axis, size in enumerate(shape):
            if size % self.cuts(axis):
                raise ValueError(f"axis {axis} of {list(shape)} is not divisible by {self.cuts(axis)}")
        return tuple(size // self.cuts(axis) for axis, size in enumerate(shape))

    def whole_shape(self, slice_shape: Sequence[int]) -> Tuple[int, ...]:
        """Shape of the tensor whose slices have `slice_shape`."""
        return tuple(size * self.cuts(axis) for axis, size in enumerate(slice_shape))

    def region(self, shape: Sequence[int], rank: int) -> Region:
        """What a rank holds of a tensor of `shape`, seen as a matrix.

        Raises:
            ValueError: an axis does not divide, or one beyond the second is cut, or both of three or more are.
        """
        part = self.slice_shape(shape)
        if any(self.cuts(axis) > 1 for axis in range(2, len(shape))):
            raise ValueError("only the first two axes of a tensor can be cut")
        full = whole(tuple(shape))
        rows = part[0] if part else 1
        columns = full.columns // (self.cuts(1) if len(shape) > 1 else 1)
        return Region(self.index(0, rank) * rows if shape else 0, rows,
                      self.index(1, rank) * columns if len(shape) > 1 else 0, columns)


def layout_of(dimensions: int, axis: Optional[int], parts: int) -> Layout:
    """The layout of a tensor cut along one axis over `parts` ranks, or not at all."""
    return Layout((parts,), tuple(0 if i == axis else -1 for i in range(dimensions)))


def read_strategy(path: str) -> Dict[str, Layout]:
    """Parameter name -> layout, from a strategy file or a folder of every rank's file.

    Raises:
        UserError: not such a file, damaged, or what this program does not slice: pipeline stages, optimizer shards.
    """
    if not os.path.isdir(path):
        return _read_file(path)
    names = sorted(name for name in os.listdir(path) if name.endswith(".ckpt"))
    if not names:
        raise UserError("holds no strategy files (*.ckpt)", path, "Give the folder that `strategy/` was copied to.")
    first = _read_file(os.path.join(path, names[0]))
    for name in names[1:]:
        if _read_file(os.path.join(path, name)) != first:
            raise UserError(f"differs from {names[0]}: stages of a pipeline, which are not sliced here",
                            os.path.join(path, name),
                            "mindspore.transform_checkpoints does that, on merged strategy files.")
    return first


def _read_file(path: str) -> Dict[str, Layout]:
    try:
        content = read_small(path, _LARGEST_BYTES, "a strategy file", "Is it a checkpoint?")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", path) from None
    try:
        layouts = _parse(content)
    except (wire.WireError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise UserError(f"not a strategy file, or damaged: {error}", path,
                        "Give the file that the training or prediction job saved.") from None
    if not layouts:
        raise UserError("says nothing about any parameter", path, "Give the file of the whole job, not of an operator.")
    return layouts


def _parse(content: bytes) -> Dict[str, Layout]:
    layouts: Dict[str, Layout] = {}
    for number, value in wire.fields(content):
        # Field 1, for all its name, counts the compilations of the job: 3 after the layout, prefill and decode graphs.
        if number == 2 and _stage(value):
            raise wire.WireError(f"it is of pipeline stage {_stage(value)}, and stages are not sliced here")
        if number == 3:
            name, layout = _layout_item(value)
            stage = _MERGED.match(name)  # MindSpore's merge of all stages puts the stage in front of the name
            if stage and stage[1] != "0":
                raise wire.WireError(f"it holds pipeline stage {stage[1]}, and stages are not sliced here")
            name = stage[2] if stage else name
            if name in layouts:
                raise wire.WireError(f"{name} appears twice")
            layouts[name] = layout
    return layouts


def _stage(item: Union[int, memoryview]) -> int:
    """The pipeline stage of an operator's strategy."""
    for number, value in wire.fields(wire.message(item)):
        if number == 2:
            return next((wire.integer(stage) for field, stage in wire.fields(wire.message(value)) if field == 1), 0)
    return 0


def _layout_item(message: Union[int, memoryview]) -> Tuple[str, Layout]:
    name, layout = None, None
    for number, value in wire.fields(wire.message(message)):
        if number == 1:
            name = bytes(wire.message(value)).decode("utf-8")
        elif number == 2:
            layout = _layouts(value)
    if not name or layout is None:
        raise wire.WireError("a layout without a name")
    return name, layout


def _layouts(message: Union[int, memoryview]) -> Layout:
    grids: List[List[int]] = []
    maps: List[List[int]] = []
    for number, value in wire.fields(wire.message(message)):
        if number == 1:
            grids.append(_dims(value))
        elif number == 2:
            maps.append([wire.signed(item) for item in _dims(value)])
        elif number == 7:
            cuts = wire.signed(wire.integer(value))
            if cuts > 1:
                raise wire.WireError(f"the optimizer's weights are cut over {cuts} ranks, not done here")
    if len(grids) != 1 or len(maps) != 1:
        raise wire.WireError(f"{len(grids)} grids and {len(maps)} maps where one of each belongs")
    layout = Layout(tuple(grids[0]), tuple(maps[0]))
    absurd = not all(0 < size <= _MOST_DEVICES for size in layout.devices)
    if not layout.devices or absurd or layout.ranks > _MOST_DEVICES:
        raise wire.WireError(f"a grid of {list(layout.devices)[:8]} devices")
    if any(not -1 <= along < len(layout.devices) for along in layout.tensor_map):
        raise wire.WireError(f"a map {list(layout.tensor_map)[:8]} that points outside the grid {list(layout.devices)}")
    return layout


def _dims(message: Union[int, memoryview]) -> List[int]:
    result: List[int] = []
    for number, value in wire.fields(wire.message(message)):
        if number == 1:
            result += wire.integers(value)
    return result


def write_strategy(layouts: Mapping[str, Layout]) -> bytes:
    """The contents of a strategy file that gives every parameter its layout."""
    # MindSpore refuses a file without any operator's strategy; parameters are what its tools read.
    strategys = wire.integer_field(1, 0) + wire.bytes_field(2, b"")
    item = wire.bytes_field(1, b"parameters") + wire.bytes_field(2, strategys)
    out = [wire.integer_field(1, 0), wire.bytes_field(2, item)]
    for name, layout in layouts.items():
        message = (wire.bytes_field(1, _repeated(layout.devices)) + wire.bytes_field(2, _repeated(layout.tensor_map))
                   + wire.bytes_field(3, b"") + wire.bytes_field(4, b"")  # only uneven slices say more here
                   + wire.integer_field(5, 0) + wire.integer_field(6, 0) + wire.integer_field(7, 0))
        out.append(wire.bytes_field(3, wire.bytes_field(1, name.encode()) + wire.bytes_field(2, message)))
    return b"".join(out)


def _repeated(values: Sequence[int]) -> bytes:
    return b"".join(wire.integer_field(1, value) for value in values)


def strategy_files(layouts: Mapping[str, Layout], parts: int) -> Dict[str, bytes]:
    """Every rank's strategy file, as MindSpore's and MindFormers' tools look for them.

    Args:
        layouts: of each parameter.
        parts: ranks.

    Returns:
        Path relative to the folder of the slices -> contents.
    """
    content = write_strategy(layouts)
    return {f"strategy/ckpt_strategy_rank_{rank}.ckpt": content for rank in range(parts)}
