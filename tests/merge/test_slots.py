"""The tensors of a merge by columns: the same as a list of them."""

from __future__ import annotations

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.merge.slots import Slot, Slots


def test_slots_are_the_sequence_of_what_was_added() -> None:
    infos = [TensorInfo(f"t{i}", BY_NAME["F32"], (i,)) for i in range(8)]
    slots = [
        Slot(infos[0], (infos[1],), infos[2], (1,)),
        Slot(infos[3], (infos[4], infos[5], infos[6]), infos[7]),
        Slot(infos[1], (infos[2], infos[3]), infos[4], (0, 2)),
    ]
    found = Slots(slots)
    assert list(found) == slots and [found[i] for i in (-1, 0, 1)] == [slots[i] for i in (-1, 0, 1)]
    assert list(found[1:]) == slots[1:] and len(found) == 3 and not Slots()
    assert list(found.outputs) == [slot.info for slot in slots] and list(found.bases) == [slot.base for slot in slots]
    assert found[2].task(1) == 2 and found[0].of(0) is None and found[1].of(2) is infos[6]
