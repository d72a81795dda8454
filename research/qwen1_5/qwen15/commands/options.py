"""What a command line asks for beside the configuration: the prompts, how they are asked, and where the answers go."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Optional, Tuple

from ..errors import UserError


@dataclass(frozen=True)
class PredictOptions:
    """One run of run_qwen1_5.py.

    Attributes:
        texts, file: prompts of the command line, or a file of them (`-` for stdin).
        chat, system: ask as a conversation, with this system message.
        control_tokens: whether `<|im_end|>` and the like in a text become control tokens.
        max_batch: most sequences at once, None for the default.
        output_format, output_file: `text` or `jsonl`; a file that grows line by line, None for stdout.
        echo: whether the prompt is printed before its continuation; None for the default.
        dry_run: check and stop.
        ray, ray_workers, ray_cpus: the address of a Ray cluster that does the work, None for this process; how many
            workers there, None for as many as fit; CPUs of each.
    """

    texts: Tuple[str, ...]
    file: Optional[str]
    chat: bool
    system: Optional[str]
    control_tokens: bool
    max_batch: Optional[int]
    output_format: str
    output_file: Optional[str]
    echo: Optional[bool]
    dry_run: bool
    ray: Optional[str] = None
    ray_workers: Optional[int] = None
    ray_cpus: int = 2

    @classmethod
    def of(cls, args: argparse.Namespace) -> "PredictOptions":
        """What was parsed.

        Raises:
            UserError: flags that contradict each other or would have no effect.
        """
        many = bool(args.predict_file or args.output_file)
        made = cls(tuple(args.predict_data), args.predict_file, args.chat, args.system, args.control_tokens,
                   args.max_batch, args.output_format or ("jsonl" if many else "text"), args.output_file, args.echo,
                   args.dry_run, args.ray, args.ray_workers, args.ray_cpus or cls.ray_cpus)
        made._check(args.output_format, args.logprobs, args.ray_cpus)
        if args.prompt_logprobs is not None and made.output_format == "text":
            raise UserError("log probabilities need JSON", where="--prompt_logprobs", fix="Add --output_format jsonl.")
        if args.n != 1 and made.interactive:
            raise UserError("has no effect in an interactive conversation", where="--n",
                            fix="Pass the message with --predict_data.")
        return made

    @property
    def interactive(self) -> bool:
        """A conversation at the terminal."""
        return self.chat and not self.texts and not self.file

    @property
    def many(self) -> bool:
        """A run that may be long: it shows progress, and its JSON lines come in the order in which they finish."""
        return bool(self.file or self.output_file)

    @property
    def echoes(self) -> bool:
        """Whether prompts are printed."""
        return not self.chat if self.echo is None else self.echo

    def _check(self, output_format: Optional[str], logprobs: int, ray_cpus: Optional[int]) -> None:
        if self.texts and self.file:
            raise UserError("both --predict_data and --predict_file are given", where="command line",
                            fix="Keep one of them.")
        if not (self.interactive or self.texts or self.file or self.dry_run):
            raise UserError("no text is given", where="--predict_data",
                            fix='Pass --predict_data "your text", --predict_file FILE, or --chat.')
        if self.system is not None and not self.chat:
            raise UserError("a system message needs a conversation", where="--system", fix="Add --chat.")
        self._check_ray(ray_cpus)
        if self.interactive:
            self._check_interactive(output_format, logprobs)
        elif self.output_format == "text":
            if self.output_file:
                raise UserError("an output file is always JSON lines", where="--output_format",
                                fix="Leave out --output_format text.")
            if logprobs:
                raise UserError("log probabilities need JSON", where="--logprobs", fix="Add --output_format jsonl.")
        elif self.echo is not None:
            raise UserError("has no effect on JSON: the prompt is a field of its own", where="--echo",
                            fix="Leave it out.")

    def _check_ray(self, cpus: Optional[int]) -> None:
        for flag, given in (("--ray_workers", self.ray_workers), ("--ray_cpus", cpus)):
            if given is not None and self.ray is None:
                raise UserError("has no effect without --ray", where=flag, fix="Add --ray, or leave it out.")
        if self.ray is not None and not self.many:
            raise UserError("is for files of prompts", where="--ray", fix="Pass --predict_file.")
        if self.ray is not None and self.output_format == "text":
            raise UserError("the workers of a cluster give JSON lines", where="--output_format",
                            fix="Leave out --output_format text.")

    def _check_interactive(self, output_format: Optional[str], logprobs: int) -> None:
        for flag, given in (("--output_format", output_format == "jsonl"), ("--output_file", self.output_file),
                            ("--logprobs", logprobs),
                            ("--echo", self.echo is not None), ("--max_batch", self.max_batch)):
            if given:
                raise UserError("has no effect in an interactive conversation", where=flag,
                                fix="Pass the message with --predict_data.")
