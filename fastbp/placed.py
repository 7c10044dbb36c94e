"""A net on several devices of one process: every device has an equal share of its consecutive blocks.

Parameters stay the objects they are, their data moves. The model's own forward knows nothing of devices: while the net
is spread out it runs as a chain that hops to the next device where that changes, and `gathered` is for all else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from fastbp.chain import Chain
from fastbp.links import Carrier
from fastbp.split import even_cuts, pieces, tied_cuts


class Placement:
    """Which device each block of a chain is on; the stem is with the first block, the head with the last.

    Args:
        chain: its modules are moved.
        names: of torch devices, in the order of the forward; where the blocks cannot be dealt out equally, the later
            ones have one more. None: every block stays where it is.

    Attributes:
        devices: empty for None.

    Raises:
        ValueError: this machine does not have such a device, or they are more than the blocks.
        TypeError: a weight is shared across a cut. In both cases nothing was moved.
    """

    def __init__(self, chain: Chain, names: Sequence[str] | None) -> None:
        self.chain = chain
        self.devices = tuple(device_named(name, "HighwayBP.devices") for name in names or ())
        self._places: list[torch.device | None] = [None] * len(chain.blocks)
        self._carrier = Carrier()
        if not self.devices:
            return
        parts = pieces(chain)
        if len(self.devices) > len(parts):
            raise ValueError(
                f"HighwayBP.devices = {names!r}: {len(self.devices)} devices, but only {len(parts)} blocks; "
                "name at most as many devices as blocks"
            )
        cuts, tied = even_cuts(len(parts), len(self.devices)), tied_cuts(parts)
        for cut in cuts:
            if cut in tied:
                raise TypeError(
                    f"HighwayBP.devices: weight {tied[cut]} is shared across the cut before block {cut}, but can be on "
                    "one device alone; untie it or name fewer devices"
                )
        shares = zip(self.devices, pairwise([0, *cuts, len(parts)]), strict=True)
        self._places = [device for device, (start, stop) in shares for _ in range(start, stop)]
        for part, place in zip(parts, self._places, strict=True):
            part.to(place)

    def carry(self, tensor: Tensor, block: int) -> Tensor:
        """A tensor on the device of a block, counted from 0 or, negative, from the end; no wait between GPUs."""
        place = self._places[block]
        return tensor if place is None else self._carrier.carry(tensor, place).arrive()

    def forward(self, x: Tensor) -> Tensor:
        """The chain's output, on the last device, with one graph across all of them; x is on the first."""
        h = self.chain.stem(x)
        for block, place in zip(self.chain.blocks, self._places, strict=True):
            h = block(h if place is None else h.to(place))
        return self.chain.head(h)


@contextmanager
def gathered(model: nn.Module, devices: Sequence[torch.device]) -> Iterator[nn.Module]:
    """The complete model on the first of its devices; afterwards its tensors have the storages they had.

    Args:
        model: spread out over the devices.
        devices: none: the model stays where it is.
    """
    moved = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if devices and tensor.device != devices[0]
    ]
    for tensor, data in moved:
        tensor.data = data.to(devices[0])
    try:
        yield model
    finally:
        for tensor, data in moved:
            tensor.data = data


def device_named(name: str, setting: str) -> torch.device:
    """With its index, so that it equals the device of its tensors.

    Raises:
        ValueError: this machine does not have it; the sentence begins with the setting.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        why = str(error).partition("\n")[0]
        raise ValueError(f"{setting}: there is no device {name!r} here ({why})") from error
