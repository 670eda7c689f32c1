"""Which parameters have had a gradient: an expert that never gets one is not being trained."""

from typing import Any

import torch

from align.learner.expert_parallel import placement


def shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter as the model was loaded: that of one which ZeRO-3 has partitioned is (0,) itself."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class GradientCensus:
    """Watches a module's trainable parameters until each, and each expert of a fused one, had a non-zero gradient."""

    def __init__(self, module: torch.nn.Module):
        self._waiting: dict[str, torch.Tensor] = {}
        self._handles: dict[str, Any] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                sizes = shape(parameter)
                parts = sizes[0] if ".experts." in name and len(sizes) == 3 else 1
                # Of experts that are spread over ranks, those of others are waited for too, and seen there.
                total, here = placement(parameter) or (parts, slice(parts))
                self._waiting[name] = torch.ones(total, dtype=torch.bool)
                self._handles[name] = parameter.register_hook(self._watch(name, here))

    def _watch(self, name: str, here: slice) -> Any:
        def seen(gradient: torch.Tensor) -> None:
            if name not in self._waiting:
                return
            waiting = self._waiting[name][here]
            waiting &= ~(gradient.detach().reshape(len(waiting), -1) != 0).any(dim=1).cpu()
            if not self._waiting[name].any():
                del self._waiting[name]
                self._handles.pop(name).remove()

        return seen

    def state(self) -> dict[str, torch.Tensor]:
        """What is still waited for, to be given to `restore`."""
        return dict(self._waiting)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on where a census of the same module was."""
        for name in self._waiting.keys() - state.keys():
            del self._waiting[name]
            self._handles.pop(name).remove()
        self._waiting |= state

    def missing(self) -> list[str]:
        """Names still without a gradient; a fused expert is named `...experts.gate_up_proj[3]`."""
        names = []
        for name, waiting in self._waiting.items():
            if len(waiting) == 1:
                names.append(name)
            else:
                names += [f"{name}[{i}]" for i in waiting.nonzero().flatten().tolist()]
        return names
