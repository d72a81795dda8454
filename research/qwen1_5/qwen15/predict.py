"""What run_qwen1_5.py does: configuration, prompts, checkpoint, engine, and the answer on stdout."""

import argparse
import json
import os
import sys
import time
from typing import IO, Dict, List, Optional, Sequence

from . import config as configuration
from . import device, memory, sampling, weights
from .config import Config
from .engine import CANCELLED, STOP, Engine, Limits, Request, Step, Usage
from .errors import UserError
from .network import Network, build_network
from .sampling import SamplingParams, Selection
from .stream import TextStream


def parser() -> argparse.ArgumentParser:
    """Every flag of run_qwen1_5.py."""
    made = argparse.ArgumentParser(
        prog="run_qwen1_5.py", description="Continue texts with Qwen1.5 on MindSpore: on the CPU, or on Ascend cards.",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog="exit codes: 0 fine, 1 failed, 2 usage or bad input, 130 interrupted")
    configuration.add_flags(made)
    group = made.add_argument_group("input and output")
    group.add_argument("--predict_data", nargs="+", default=[], metavar="TEXT", help="one or more texts to continue")
    group.add_argument("--output_format", choices=("text", "jsonl"), default="text",
                       help="text streams to stdout; jsonl prints one object per prompt")
    group.add_argument("--control_tokens", type=configuration.boolean, default=True, metavar="True|False",
                       help="whether <|im_start|> and the like in a text become control tokens (default True)")
    group.add_argument("--stop", nargs="+", default=[], metavar="TEXT", help="end an answer before any of these strings")
    group.add_argument("--logprobs", type=int, default=0, metavar="N", help="with jsonl: log probabilities of the N likeliest tokens")
    group.add_argument("--task", default="text_generation", choices=("text_generation",), help="accepted for the original's sake")
    group.add_argument("--debug", action="store_true", help="show tracebacks and MindSpore's own log")
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        UserError: whatever the user can mend.
    """
    args = parser().parse_args(argv)
    if not args.config:
        raise UserError("no configuration is given", where="--config", fix="Pass one of the predict_qwen1_5_*.yaml beside this script.")
    config = configuration.load_config(args.config, configuration.flags_from(args), args.options)
    if args.print_config:
        print(configuration.describe(config))
        return 0
    report = Reporter()
    for note in config.notes:
        report(note)
    if not args.predict_data:
        raise UserError("no text is given", where="--predict_data", fix='Pass --predict_data "your text".')
    _quiet_frameworks(args.debug)
    session = Session.prepare(config)
    requests = session.requests(_repeat(args.predict_data, config), args)
    session.open(report)
    return session.answer(requests, args)


class Reporter:
    """Says things on stderr, on rank 0 only: the other ranks would say the same."""

    def __init__(self):
        self._quiet = os.environ.get("RANK_ID", "0") not in ("", "0")

    def __call__(self, line: str) -> None:
        if not self._quiet:
            print(line, file=sys.stderr, flush=True)


def _quiet_frameworks(debug: bool) -> None:
    """Keep MindSpore's warnings off the terminal unless they are asked for."""
    if not debug:
        os.environ.setdefault("GLOG_v", "3")


def _repeat(prompts: Sequence[str], config: Config) -> List[str]:
    """The original's --batch_size: a single prompt is run that many times side by side."""
    return list(prompts) * config.model.batch_size if len(prompts) == 1 else list(prompts)


class Session:
    """A configuration with its tokenizer, and, once open, its network and engine.

    Attributes:
        config, tokenizer, limits: known before anything big is loaded.
        engine: None until `open`.
    """

    def __init__(self, config: Config, tokenizer, checkpoint: str):
        self.config = config
        self.tokenizer = tokenizer
        self.checkpoint = checkpoint
        model = config.model
        self.limits = Limits(model.dims.vocab_size, model.seq_length, model.num_blocks, model.block_size)
        self.engine: Optional[Engine] = None

    @classmethod
    def prepare(cls, config: Config) -> "Session":
        """Find the checkpoint's files and read the tokenizer.

        Raises:
            UserError: files are missing or do not belong together, or the number of workers contradicts the configuration.
        """
        _check_launch(config)
        rank = int(os.environ.get("RANK_ID") or 0) if config.parallel.use_parallel else 0
        checkpoint = weights.resolve(config.load_checkpoint, rank, config.parallel.model_parallel, config.auto_trans_ckpt)
        return cls(config, load_tokenizer(config), checkpoint)

    def open(self, report) -> None:
        """Load the network. Raises a UserError when it does not fit in memory or the checkpoint does not fit it."""
        start_s = time.perf_counter()
        memory.check(self.config)
        if self.config.threads:
            os.environ["QWEN15_THREADS"] = str(self.config.threads)
        network = build_network(self.config, self.checkpoint, report)
        self.engine = Engine(network, self.limits, selection=selection())
        report(f"{network.note}; ready in {time.perf_counter() - start_s:.1f} s")

    def requests(self, prompts: Sequence[str], args: argparse.Namespace) -> List[Request]:
        """Encode the prompts and check that each can run.

        Raises:
            UserError: an empty or too long prompt, with the numbers.
        """
        generation = self.config.generation
        seed = sampling.pick_seed(generation.seed)
        copies: Dict[str, int] = {}
        made = []
        for number, prompt in enumerate(prompts, 1):
            stream = copies.get(prompt, 0)  # equal prompts of one run get different random numbers
            copies[prompt] = stream + 1
            params = SamplingParams(generation.do_sample, generation.temperature, generation.top_k, generation.top_p,
                                    generation.repetition_penalty, seed, stream)
            ids = self.tokenizer.encode(prompt, control_tokens=args.control_tokens)
            made.append(Request(tuple(ids), generation.max_length, generation.max_new_tokens,
                                frozenset(self.config.model.eos_token_id), params, args.logprobs,
                                label="the prompt" if len(prompts) == 1 else f"prompt {number}"))
            self.limits.check(made[-1])
        self._prompts = list(prompts)
        return made

    def answer(self, requests: Sequence[Request], args: argparse.Namespace) -> int:
        """Generate, print on rank 0, and return the exit code."""
        assert self.engine is not None
        writer_class = JsonLines if args.output_format == "jsonl" else Text
        printing = self.engine.network.rank == 0
        writer = writer_class(sys.stdout if printing else None, self._prompts)
        answers = [Answer(self.tokenizer, args.stop) for _ in requests]
        start_s = time.perf_counter()
        usages: List[Usage] = []
        for step in self.engine.generate(requests):
            answer = answers[step.request]
            piece = answer.take(step, self.config.model.eos_token_id)
            if answer.stopped and step.finish_reason is None:
                self.engine.cancel(step.request)
            writer.piece(step.request, piece)
            if step.finish_reason is not None:
                usages.append(step.usage)
                writer.finish(step.request, answer, step.usage)
        if printing:
            print(summary(usages, time.perf_counter() - start_s), file=sys.stderr)
        return 0


class Answer:
    """One request's continuation as it grows: text and token ids, and why it ended."""

    def __init__(self, tokenizer, stop_strings: Sequence[str]):
        self._stream = TextStream(tokenizer.token_bytes, tokenizer.control_token_ids, stop_strings)
        self.pieces: List[str] = []
        self.token_ids: List[int] = []
        self.logprobs: List[dict] = []
        self.finish_reason = ""

    @property
    def stopped(self) -> bool:
        """A stop string was met."""
        return self._stream.stopped

    @property
    def text(self) -> str:
        """The continuation so far."""
        return "".join(self.pieces)

    def take(self, step: Step, eos: Sequence[int]) -> str:
        """Add a step and return the text that has become certain."""
        piece = ""
        if step.token is not None and not self.stopped:
            self.token_ids.append(step.token)
            if step.token not in eos:
                piece = self._stream.feed(step.token)
            if step.logprobs is not None:
                self.logprobs.append({"token_id": step.token, "logprob": step.logprobs.chosen, "top": [
                    {"token_id": token, "logprob": value} for token, value in step.logprobs.top]})
        if step.finish_reason is not None:
            piece += self._stream.end()
            self.finish_reason = STOP if step.finish_reason == CANCELLED else step.finish_reason
        self.pieces.append(piece)
        return piece


class Text:
    """Prompt and continuation, streamed. One prompt's text is never mixed with another's: the others wait their turn."""

    def __init__(self, out: Optional[IO[str]], prompts: Sequence[str]):
        self._out, self._prompts = out, prompts
        self._waiting = [prompt for prompt in prompts]
        self._finished = [False] * len(prompts)
        self._turn = 0
        self._write()

    def piece(self, request: int, text: str) -> None:
        """More of a request's continuation."""
        self._waiting[request] += text
        if request == self._turn and text:
            self._write()

    def finish(self, request: int, answer: Answer, usage: Usage) -> None:
        """A request has ended."""
        self._waiting[request] += "\n"
        self._finished[request] = True
        while self._turn < len(self._prompts):
            self._write()
            if not self._finished[self._turn]:
                break
            self._turn += 1

    def _write(self) -> None:
        if self._out is not None:
            self._out.write(self._waiting[self._turn])
            self._out.flush()
        self._waiting[self._turn] = ""


class JsonLines:
    """One JSON object per prompt, in the order of the prompts; text and token_ids are the continuation's."""

    def __init__(self, out: Optional[IO[str]], prompts: Sequence[str]):
        self._out, self._prompts = out, prompts
        self._ready: Dict[int, str] = {}
        self._turn = 0

    def piece(self, request: int, text: str) -> None:
        """Nothing is printed before a request has ended."""

    def finish(self, request: int, answer: Answer, usage: Usage) -> None:
        """Print the request's object, and those that waited for it."""
        record = {"prompt": self._prompts[request], "text": answer.text, "token_ids": answer.token_ids,
                  "prompt_tokens": usage.prompt_tokens, "generated_tokens": len(answer.token_ids),
                  "finish_reason": answer.finish_reason, "prefill_s": round(usage.prefill_s, 6),
                  "decode_s": round(usage.decode_s, 6)}
        if answer.logprobs:
            record["logprobs"] = answer.logprobs
        # A lone surrogate in a prompt has no UTF-8 form; \u escapes carry it.
        line = json.dumps(record, ensure_ascii=False)
        self._ready[request] = line if line.isprintable() or _encodable(line) else json.dumps(record)
        while self._turn in self._ready:
            if self._out is not None:
                self._out.write(self._ready.pop(self._turn) + "\n")
                self._out.flush()
            self._turn += 1


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def summary(usages: Sequence[Usage], total_s: float) -> str:
    """The timing line. Requests of a batch share their calls, so the longest times are those of the calls."""
    prompt = sum(u.prompt_tokens - u.cached_tokens for u in usages)
    # The first token comes out of prefill; decode makes the rest.
    decoded = sum(u.generated_tokens - 1 for u in usages)
    prefill_s = max(u.prefill_s for u in usages)
    decode_s = max(u.decode_s for u in usages)
    line = f"prefill {prompt} tokens in {prefill_s:.2f} s ({prompt / max(prefill_s, 1e-9):.1f} tokens/s)"
    if decoded:
        line += f", decode {decoded} tokens in {decode_s:.2f} s ({decoded / max(decode_s, 1e-9):.1f} tokens/s)"
    return f"{line}, {total_s:.2f} s in all"


def selection() -> Selection:
    """The searches over the vocabulary: the kernel library's where it can be used, NumPy's otherwise."""
    from .kernels import library

    if os.environ.get("QWEN15_KERNELS") == "reference":
        return sampling.PLAIN
    try:
        return sampling.accelerated(library.load())
    except UserError:  # not built; the network's note has said so
        return sampling.PLAIN


def load_tokenizer(config: Config):
    """The tokenizer of the configuration's vocab.json and merges.txt.

    Raises:
        UserError: the files are not given, damaged, or not of this model.
    """
    files = config.tokenizer
    for name, path in (("vocab_file", files.vocab_file), ("merges_file", files.merges_file)):
        if path is None:
            raise UserError("is not set and there is no such file beside the checkpoint", where=f"processor.tokenizer.{name}",
                            fix=f"Pass --{name}, or set it in the YAML.")
    from qwen1_5_tokenizer import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_files(files.vocab_file, files.merges_file, files.options)
    if len(tokenizer) > config.model.dims.vocab_size:
        raise UserError(f"has {len(tokenizer)} tokens, the model's vocabulary only {config.model.dims.vocab_size}",
                        where=files.vocab_file, fix="Use the tokenizer files of this checkpoint.")
    return tokenizer


def _check_launch(config: Config) -> None:
    parallel = config.parallel
    if parallel.use_parallel and parallel.model_parallel > 1 and not os.environ.get("MS_ROLE"):
        raise UserError(f"model_parallel {parallel.model_parallel} needs {parallel.model_parallel} workers and this is one process",
                        where="use_parallel", fix=f'Start them: bash scripts/msrun_launcher.sh "python run_qwen1_5.py ..." '
                        f"{parallel.model_parallel}, or pass --use_parallel False.")
