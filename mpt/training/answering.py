"""A model that is loaded as a chat's plan says, and its answers, told while they are generated."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from mpt.errors import MptError
from mpt.planning.plan import Plan
from mpt.terms import DeviceKind
from mpt.training.adapters import load_adapters
from mpt.training.generation import generate, to_prompt
from mpt.training.precision.apply import DTYPES
from mpt.training.tasks import task_module
from mpt.training.tokenizer import load_tokenizer


class Answering:
    """The model and its tokenizer."""

    def __init__(self, plan: Plan, adapter: str | None) -> None:
        """Load both. Raises MptError for what can't be loaded."""
        kind = plan.machine.kind
        self.device = torch.device("cuda" if kind is DeviceKind.ROCM else kind.value)  # torch's word for both
        self.tokenizer = load_tokenizer(plan.recipe)
        model = task_module(plan.value("task"), plan.task_folder).build_model(plan, self.tokenizer, seed=0)
        self._model = load_adapters(model, adapter).to(self.device)
        self._model.eval()
        self._max_positions = plan.facts.max_positions
        self._dtype = DTYPES[plan.value("weights_dtype")]

    @property
    def has_template(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _autocast(self) -> AbstractContextManager[Any]:
        """Let modules that adapters train whole, which are fp32, go with 16-bit ones."""
        is_narrow = self._dtype is not torch.float32
        return torch.autocast(self.device.type, self._dtype) if is_narrow else nullcontext()

    def answer(
        self, asked: Mapping[str, Any], tell: Callable[[str], None], is_over: Callable[[], bool]
    ) -> dict[str, Any]:
        """Generate an answer to `messages` with the settings of the request; say how it ended.

        Raises MptError where the chat template refuses the conversation.
        """
        try:
            prompt = to_prompt(
                self.tokenizer,
                asked["messages"],
                max_new_tokens=asked["max_new_tokens"],
                max_positions=self._max_positions,
                is_chat=self.has_template,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise MptError(
                f"the chat template refuses the conversation: {' '.join(str(error).split())[:300]}",
                remedy="A template without a system role wants none; see chat_template in tokenizer_config.json.",
            ) from error
        if asked.get("seed") is not None:
            torch.manual_seed(asked["seed"])
        draws = asked["temperature"] > 0 and asked.get("top_p") is not None
        with self._autocast():
            tokens = generate(
                self._model,
                self.tokenizer,
                prompt,
                device=self.device,
                temperature=asked["temperature"],
                streamer=Teller(self.tokenizer, tell),
                stopping_criteria=StoppingCriteriaList([UntilOver(is_over)]),
                **({"top_p": asked["top_p"]} if draws else {}),
            )
        return {
            "tokens": len(tokens),
            "room": prompt.room,
            "interrupted": is_over(),
            "dropped": prompt.dropped,
            "cut": prompt.is_cut,
        }


class Teller(TextStreamer):
    """Hands whole words on, as transformers' streamer finds them; the prompt and special tokens are left out."""

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._tell(text)


class UntilOver(StoppingCriteria):
    """Ends every sequence once somebody says that it is enough."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: Any, **keywords: Any) -> Any:
        return torch.full((len(input_ids),), self._is_over(), device=input_ids.device)
