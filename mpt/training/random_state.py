"""The state of the generators that a step's dropout draws from: torch's on the CPU, and the device's own."""

import torch

RandomState = dict[str, torch.Tensor]
"""By kind of device: "cpu" always, "cuda" where that computes."""


def random_state(device: torch.device) -> RandomState:
    """Read the state; both are small tensors in the host's memory, and no kernel is waited for."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Let the generators go on from a state that was read on the same kind of device."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
