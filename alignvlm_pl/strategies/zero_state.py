"""Where DeepSpeed's ZeRO keeps AdamW's float32 weights, moments and gradients, by parameter.

Each rank has some flat tensors. Of a parameter it has one stretch of the flattened values, or none; in the order of the
ranks the stretches make up the whole. Stage 2 cuts the parameters of a group laid end to end, stage 3 each by itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .sharded_checkpoint import Piece, take_values
from .zero_parameters import is_partitioned, own_piece, whole_shape

_STEP = "step"
"""The part of AdamW's state that is one number for all values."""


class Stretch(NamedTuple):
    """What this rank has of a parameter.

    Args:
        flat: (n,) float32 weights of this and other parameters.
        offset: Where those of this parameter begin in it.
        start: Where they begin in the flattened parameter.
        length: How many they are.
    """

    flat: Tensor
    offset: int
    start: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """A view of the values of this parameter in `flat` or a tensor like it."""
        return flat.detach().narrow(0, self.offset, self.length)

    def take(self, flat: Tensor, stored: Any) -> None:
        """Set them from a stored tensor, whole or in pieces."""
        self.of(flat).copy_(take_values(stored, self.start, self.start + self.length))


class ZeroState:
    """The state of DeepSpeed's optimizer as that of AdamW.

    Args:
        optimizer: DeepSpeed's, of stage 2 or 3.
        groups: The parameters of each of AdamW's groups, before DeepSpeed took them.
    """

    def __init__(self, optimizer: Any, groups: Sequence[Sequence[nn.Parameter]]) -> None:
        self.optimizer, self.groups = optimizer, groups
        self._group = {parameter: number for number, group in enumerate(groups) for parameter in group}

    def __contains__(self, parameter: Any) -> bool:
        """Whether the optimizer trains it."""
        return parameter in self._group

    def stretch(self, parameter: Any) -> Stretch:
        """What this rank has of a parameter."""
        if is_partitioned(parameter):
            number, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            values, start = own_piece(parameter)
            return Stretch(self.optimizer.fp32_partitioned_groups_flat[number], offset, start, len(values))
        flat = self.optimizer.single_partition_of_fp32_groups[self._group[parameter]]
        own = parameter._hp_mapping
        if own is None:
            return Stretch(flat, 0, 0, 0)
        place = own.get_hp_fragment_address()
        return Stretch(flat, place.start, own.lp_fragment_address.start, place.numel)

    def weights(self, parameter: nn.Parameter) -> Piece:
        """This rank's float32 values of a parameter."""
        found = self.stretch(parameter)
        return Piece(found.of(found.flat).cpu(), whole_shape(parameter))

    def set_weights(self, parameter: nn.Parameter, stored: Any) -> None:
        """Set them from a stored tensor, whole or in pieces."""
        found = self.stretch(parameter)
        found.take(found.flat, stored)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.AdamW.state_dict` without ZeRO, with a `Piece` in place of each moment."""
        adam = self.optimizer.optimizer
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        for settings, parameters in zip(adam.param_groups, self.groups, strict=True):
            indices: list[int] = []
            for parameter in parameters:
                indices.append(sum(len(group["params"]) for group in groups) + len(indices))
                own = self.stretch(parameter)
                kept = adam.state.get(own.flat, {})
                if kept:  # there is none before the first step; each parameter has its own number of steps
                    state[indices[-1]] = {
                        key: value.clone()
                        if key == _STEP
                        else Piece(own.of(value).cpu(), whole_shape(parameter))
                        for key, value in kept.items()
                    }
            groups.append({**settings, "params": indices})
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, stored: dict[str, Any]) -> None:
        """Take this rank's part of AdamW's state, written under any strategy on any number of ranks."""
        adam = self.optimizer.optimizer
        for settings, old in zip(adam.param_groups, stored["param_groups"], strict=True):
            settings.update({key: value for key, value in old.items() if key != "params"})
        for index, parameter in enumerate(self._group):
            own = self.stretch(parameter)
            for key, value in stored["state"].get(index, {}).items():
                if key == _STEP:
                    adam.state[own.flat][key] = value.to(own.flat.device, copy=True)
                else:
                    own.take(adam.state[own.flat].setdefault(key, torch.zeros_like(own.flat)), value)

    def gradient_norms(self) -> dict[str, Tensor]:
        """Norm of the gradients of each part between backward and step; all ranks must ask.

        CONTRACT: `optim.parameter_groups` names groups `<part>/...`.
        """
        parts = [group["name"].partition("/")[0] for group in self.optimizer.optimizer.param_groups]
        squares = {part: torch.zeros((), device=self.optimizer.device) for part in parts}
        of_group = getattr(self.optimizer, "sub_group_to_group_id", {})
        for number, gradients in self.optimizer.averaged_gradients.items():
            for gradient in gradients or ():
                squares[parts[of_group.get(number, number)]] += gradient.float().square().sum()
        total = torch.stack(list(squares.values()))
        dist.all_reduce(total)
        return dict(zip(squares, total.sqrt(), strict=True))
