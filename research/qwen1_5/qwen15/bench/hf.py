"""transformers + torch on the same checkpoint: prefill and decode through `generate`, with their times."""

from __future__ import annotations

import time
from typing import Any, List, Sequence

import numpy as np

from ..errors import UserError
from .options import BenchCheckpoint
from .rounds import Timing


def check_installed(where: str = "--against hf") -> None:
    """Raises UserError when torch or transformers, which `where` needs, is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", where=where,
                        fix="Run: pip install torch transformers") from None


def greedy(model: Any, ids: Any, new_tokens: int, **options: Any) -> Any:
    """ids (B, N) of a model of transformers, and exactly `new_tokens` greedy tokens after them."""
    import torch

    with torch.inference_mode():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
                              min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options)


class HuggingFace:
    """The model as transformers runs it on this CPU, greedy, on `threads` threads."""

    def __init__(self, checkpoint: BenchCheckpoint, threads: int):
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.path, torch_dtype=getattr(torch, checkpoint.dtype)).eval()
        self.model.generation_config.eos_token_id = None
        self.vocab_size = self.model.config.vocab_size
        self.note = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def prefill(self, prompt: Sequence[int]) -> Timing:
        """Seconds from a prompt to its first token."""
        import torch

        ids = torch.tensor([list(prompt)])
        start_s = time.perf_counter()
        greedy(self.model, ids, 1)
        return Timing(time.perf_counter() - start_s)

    def decode(self, prompts: np.ndarray, new_tokens: int) -> HuggingFaceDecode:
        """Greedy decoding, see `HuggingFaceDecode`."""
        return HuggingFaceDecode(self, prompts, new_tokens)


class HuggingFaceDecode:
    """Greedy decoding of prompts whose keys and values stay in the cache from run to run; see `ours.Decode`."""

    def __init__(self, hf: HuggingFace, prompts: np.ndarray, new_tokens: int):
        import torch

        self._hf, self._new_tokens = hf, new_tokens
        self._ids = torch.from_numpy(prompts)
        self._cache: Any = None

    def run(self) -> Timing:
        """Seconds per step."""
        clock = _Clock()
        keep = self._ids.shape[1] - 1
        if self._cache is None:
            import torch
            from transformers import DynamicCache

            self._cache = DynamicCache()
            with torch.inference_mode():
                self._hf.model(self._ids[:, :-1], past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        greedy(self._hf.model, self._ids, self._new_tokens, past_key_values=self._cache, streamer=clock)
        self._cache.crop(keep)
        counted = self._new_tokens - 1
        assert len(clock.times_s) == self._new_tokens
        return Timing((clock.times_s[-1] - clock.times_s[0]) / counted)


class _Clock:
    """A streamer that notes when each step's tokens come."""

    def __init__(self):
        self.times_s: List[float] = []
        self._prompt_seen = False

    def put(self, value) -> None:
        """transformers hands over the prompt first, then every step's tokens."""
        if self._prompt_seen:
            self.times_s.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """The last step has been handed over."""
