"""Generation: Hugging Face's own loop, hooks live at every step, and what was computed kept as it happens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import HookRegistry, InputError, LensError
from ..hooks.registry import Selection
from .architecture import Architecture
from .cache import ActivationCache
from .config import BridgeConfig
from .inputs import Inputs, is_text
from .live import LiveRecorder, Sink, record_generation, unchanged
from .record import is_explicit
from .request import Request, check_room, prompt_of, set_ends, set_sampling
from .run import Stack
from .sampling import Progress
from .slicing import SliceInput
from .steps import Steps
from .stream import in_turns, pieces_of_text
from .tokens import PaddingSide, Tokens

_PLAIN = ("greedy_search", "sample")


class Generation:
    """Continuing a text."""

    architecture: Architecture
    cfg: BridgeConfig
    registry: HookRegistry
    original_model: nn.Module
    _inner: nn.Module
    _stack: Stack
    _tokens: Tokens

    @property
    def device(self) -> torch.device | None:
        """Where the model takes its input."""
        raise NotImplementedError

    def _explain(self, error: Exception, inputs: Inputs) -> None:
        raise NotImplementedError

    def generate(
        self,
        input: Any = None,
        max_new_tokens: int | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | list[int] | None = None,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | int | None = None,
        freq_penalty: float | int = 0.0,
        repetition_penalty: float | int | None = None,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        return_type: str = "input",
        verbose: bool = True,
        output_logits: bool = False,
        return_cache: bool = False,
        return_input_tokens: bool = False,
        names_filter: Selection = None,
        device: torch.device | str | None = None,
        pixel_values: Tensor | None = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: Any = None,
        *,
        pos_slice: SliceInput = None,
        sink: Sink | None = None,
        **hf_kwargs: Any,
    ) -> Any:
        """Continue a text with Hugging Face's ``generate``, hooks live at every step.

        In a hook function, ``hook.step`` says where the tensor belongs: prefill or decode, the number of the
        step, the positions.

        Args:
            input: A string, a list of strings, token ids ([pos] or [batch, pos]), embeddings
                ([batch, pos, d_model]), or None when the keywords bring the input.
            max_new_tokens: How many tokens at most; 10 unless ``max_length`` or ``generation_config`` says.
            stop_at_eos: Whether a row ends at an end-of-sequence token.
            eos_token_id: Which that is, or which those are; the model's own unless given.
            do_sample: Draw the next token instead of taking the likeliest. None draws, as in TransformerLens,
                unless a ``generation_config`` is given, which then decides.
            top_k: Draw among the k likeliest; None does not cut, unless the checkpoint's own settings do.
            top_p: Draw among the likeliest that have this probability together; None as above.
            temperature: Divides the logits; 0 takes the likeliest; None is the checkpoint's, or 1.
            freq_penalty: Subtracted from a token's logit for each time the row has it already.
            repetition_penalty: Divides positive and multiplies negative logits of tokens already there.
            use_past_kv_cache: False reads the whole text again at every step.
            prepend_bos: As in `forward`.
            padding_side: Prompts are padded in front, because new tokens go behind; ``"right"`` is refused
                where it would matter.
            return_type: ``"tokens"`` [batch, pos], ``"str"`` (a list for several rows), or ``"input"``: the
                kind of the input. Prompt and new tokens; for an encoder-decoder, what the decoder wrote.
            verbose: Show a progress bar when run in a terminal.
            output_logits: Return Hugging Face's output object, with ``sequences`` and each step's ``logits``.
            return_cache: Also return an `ActivationCache` recorded while generating: one row per sequence,
                positions those of the returned tokens. The last token, which no step of the loop reads, is
                read once more, hooks live. Padding is marked by ``cache.mask``.
            return_input_tokens: Also return the prompt's ids.
            names_filter: What to keep, as in `run_with_cache`.
            device: Where to keep it; copies from a GPU to ``"cpu"`` do not make the GPU wait.
            pixel_values: Images, for a model that takes them.
            stop_strings: End at these; needs a tokenizer.
            stopping_criteria: A function (ids, scores) -> bool [batch], or a list of them.
            pos_slice: Positions to keep, counted over prompt and new tokens.
            sink: ``sink(name, tensor, positions)`` takes each piece as soon as it is there; the cache stays
                empty. ``positions`` is None for what another tower shows at once.
            **hf_kwargs: Anything Hugging Face's ``generate`` or the model's forward takes.
        Returns:
            What ``return_type`` says (or, with ``output_logits`` or ``return_dict_in_generate``, the output
            object); with ``return_cache`` and ``return_input_tokens`` a tuple of it, the cache, the ids.
        Raises:
            InputError: An input or option that cannot be used; beams or assisted decoding with a cache.
            HookNotFiredError: A point asked for by name that no step passed.
        """
        request = self._request(
            input,
            max_new_tokens=max_new_tokens,
            stop_at_eos=stop_at_eos,
            eos_token_id=eos_token_id,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            use_past_kv_cache=use_past_kv_cache,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            return_type=return_type,
            output_logits=output_logits,
            pixel_values=pixel_values,
            stop_strings=stop_strings,
            stopping_criteria=stopping_criteria,
            is_cached=return_cache or sink is not None,
            **hf_kwargs,
        )
        recorder = None
        if not return_cache and sink is None:
            unused = {"names_filter": names_filter, "device": device, "pos_slice": pos_slice}
            given = [name for name, value in unused.items() if value is not None]
            if given:
                raise InputError(
                    f"{', '.join(given)} says what to keep: pass return_cache=True (or sink=)"
                )
        else:
            recorder = self._recorder(request, names_filter, device, pos_slice, sink)
        with Progress(request.options, request.length if verbose else None) as options:
            request.options = options
            out, cache = self._generated(request, recorder, must_fire=is_explicit(names_filter))
        extras: list[Any] = [cache] if return_cache else []
        if return_input_tokens:
            extras.append(request.prompt)
        answer = self._returned(out, request)
        return (answer, *extras) if extras else answer

    def generate_stream(
        self,
        input: Any = None,
        max_new_tokens: int | None = None,
        max_tokens_per_yield: int = 1,
        *,
        skip_prompt: bool = False,
        return_type: str = "input",
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Continue a text and yield it as it comes, hooks live.

        The model runs only while the next piece is waited for. Hooks are those set while it runs; leaving the
        loop early ends the generation and leaves nothing behind.

        Args:
            input: As in `generate`.
            max_new_tokens: As in `generate`.
            max_tokens_per_yield: How many tokens to wait for.
            skip_prompt: Leave out the prompt, which the first piece starts with otherwise.
            return_type: As in `generate`; text comes in pieces that join to what `generate` returns.
            **kwargs: As in `generate`.
        Yields:
            Token ids [batch, at most max_tokens_per_yield], or text (a list for several rows).
        Raises:
            InputError: As in `generate`, here and now and not when the first piece is asked for.
        """
        if max_tokens_per_yield < 1:
            raise InputError(f"max_tokens_per_yield is at least 1, got {max_tokens_per_yield}")
        taken = {"return_cache", "sink", "streamer", "output_logits", "return_input_tokens"} & set(
            kwargs
        )
        if taken:
            raise InputError(
                f"generate_stream takes no {', '.join(sorted(taken))}: what it yields is the answer; "
                "use generate"
            )
        kwargs.pop("verbose", None)
        request = self._request(
            input, max_new_tokens=max_new_tokens, return_type=return_type, **kwargs
        )
        if request.length == 0:
            raise InputError("max_new_tokens=0: there is nothing to stream")

        def run(streamer: Any) -> Any:
            request.options["streamer"] = streamer
            return self._generated(request, None, follows=True)

        steps = in_turns(run, max_tokens_per_yield, skip_prompt)
        if request.returns == "tokens":
            return steps
        return pieces_of_text(steps, self._text, as_list=request.returns == "texts")

    def hf_generate(
        self,
        input: Any = None,
        *,
        prepend_bos: bool | None = None,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Hugging Face's ``generate`` on text or ids, its own defaults, hooks live at every step.

        Args:
            input: Text, a list of texts, token ids or embeddings; None when the keywords bring the input.
            prepend_bos: As in `forward`.
            attention_mask: 1 at real tokens, for token ids.
            **kwargs: Passed straight to ``generate``.
        Returns:
            What ``generate`` returns.
        """
        request = prompt_of(
            self._inner,
            self._tokens,
            input,
            kwargs,
            device=self.device,
            prepend_bos=prepend_bos,
            attention_mask=attention_mask,
        )
        return self._generated(request, None)[0]

    # --- what is asked for -----------------------------------------------------------------------

    def _request(
        self,
        input: Any,
        *,
        return_type: str = "input",
        max_new_tokens: int | None = None,
        stop_at_eos: bool = True,
        eos_token_id: int | list[int] | None = None,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | int | None = None,
        freq_penalty: float | int = 0.0,
        repetition_penalty: float | int | None = None,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        output_logits: bool = False,
        pixel_values: Tensor | None = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: Any = None,
        attention_mask: Any = None,
        is_cached: bool = False,
        **options: Any,
    ) -> Request:
        if return_type not in ("input", "str", "tokens"):
            raise InputError(f"return_type must be 'input', 'str' or 'tokens', got {return_type!r}")
        model = self._inner
        request = prompt_of(
            model,
            self._tokens,
            input,
            options,
            device=self.device,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            attention_mask=attention_mask,
        )
        set_sampling(
            request,
            model,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            freq_penalty=freq_penalty,
            repetition_penalty=repetition_penalty,
            stopping_criteria=stopping_criteria,
            pixel_values=pixel_values,
            stop_strings=stop_strings,
            tokenizer=self._tokens.need("stop_strings") if stop_strings else None,
            use_cache=None if use_past_kv_cache else False,
            output_logits=output_logits or None,
            return_dict_in_generate=output_logits or None,
        )
        set_ends(request, model, self._tokens, stop_at_eos, eos_token_id)
        if self.cfg.n_ctx is not None and self.architecture.main.pos_embed is not None:
            check_room(request, self.cfg.n_ctx, reads_last=is_cached)
        if return_type == "str" or (return_type == "input" and is_text(input)):
            self._tokens.need("text")
            is_list = is_text(input) and not isinstance(input, str)
            request.returns = "texts" if is_list else "str"
        return request

    # --- running ---------------------------------------------------------------------------------

    def _recorder(
        self,
        request: Request,
        names_filter: Selection,
        device: torch.device | str | None,
        pos_slice: SliceInput,
        sink: Sink | None,
    ) -> LiveRecorder:
        steps, config, mode = self._steps(request, reads_last=True)
        if mode not in _PLAIN:
            raise InputError(
                f"a cache cannot be recorded during {mode.replace('_', ' ')}: rows are reordered, or tokens "
                "taken back, after they were computed; generate without return_cache and run the returned "
                "tokens through run_with_cache, or generate with num_beams=1 and without an assistant"
            )
        if (
            isinstance(pos_slice, int)
            and request.continued is not None
            and request.length is not None
        ):
            most = request.continued + request.length
            if not -most <= pos_slice < most:
                raise InputError(
                    f"pos_slice={pos_slice} is outside a text of at most {most} positions"
                )
        is_empty = isinstance(names_filter, (list, tuple)) and not names_filter
        edited = any(not x.observes for point in self.registry.live for x in point.fwd)
        return LiveRecorder(
            self.registry,
            steps,
            config,
            [] if is_empty else self.registry.select(names_filter),
            device=device,
            pos_slice=pos_slice,
            sink=sink,
            copies=edited,
        )

    def _steps(self, request: Request, *, reads_last: bool = False) -> tuple[Steps, Any, str]:
        """What follows the loop, the settings in force, and the way the next token is chosen."""
        config, mode = self._settings(request)
        is_plain = mode in _PLAIN or mode.startswith("beam")
        clock, loops = self.registry.clock, self._stack.loops
        steps = Steps(
            loops,
            self.architecture,
            clock,
            request.continued,
            is_plain,
            self._stack.level,
            reads_last=reads_last,
        )
        return steps, config, mode

    def _settings(self, request: Request) -> tuple[Any, str]:
        """The settings in force, and the name of the way the next token is chosen."""
        model: Any = self._inner
        # transformers does not settle for no new tokens.
        settled = {"generation_config"} | ({"max_new_tokens"} if request.length == 0 else set())
        rest = {name: x for name, x in request.options.items() if name not in settled}
        config, _ = model._prepare_generation_config(
            request.options.get("generation_config"), **rest
        )
        if request.options.get("custom_generate") is not None:
            return config, "custom_generate"
        return config, config.get_generation_mode(request.options.get("assistant_model")).value

    def _generated(
        self,
        request: Request,
        recorder: LiveRecorder | None,
        *,
        must_fire: bool = False,
        follows: bool = False,
    ) -> tuple[Any, ActivationCache | None]:
        """Run it; gives what Hugging Face returns, and the cache.

        Args:
            request: What to run.
            recorder: Keeps what the points show.
            must_fire: Whether a point that stays silent is an error.
            follows: Follow the loop though nobody listens yet.
        """
        if recorder is None and request.length == 0:
            return unchanged(request), None
        try:
            if recorder is None and not (follows or self.registry.live):
                return self._stack.generate(request.options), None
            if recorder is None:
                return self._stack.generate(request.options, self._steps(request)[0]), None
            return record_generation(self._stack, request, recorder, must_fire=must_fire)
        except ValueError as error:
            if "model_kwargs" in str(error) and not isinstance(error, LensError):
                raise InputError(f"generate: {error}{_meant(str(error))}") from error
            raise
        except (IndexError, RuntimeError) as error:
            self._explain(error, Inputs(request.options, request.prompt, request.mask))
            raise

    # --- what comes back -------------------------------------------------------------------------

    def _returned(self, out: Any, request: Request) -> Any:
        if not isinstance(out, Tensor) or request.returns == "tokens":
            return out
        texts = self._text(out)
        return texts if request.returns == "texts" or len(texts) > 1 else texts[0]

    def _text(self, tokens: Tensor) -> list[str]:
        """Text of rows, without special tokens."""
        decode = self._tokens.need("text").decode
        return [
            decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for row in tokens.tolist()
        ]


def _meant(message: str) -> str:
    """Names like those that transformers did not know."""
    from transformers import GenerationConfig

    known = [*GenerationConfig().to_dict(), *signature(Generation.generate).parameters]
    wrong = re.findall(r"'(\w+)'", message)
    near = [name for word in wrong for name in get_close_matches(word, known, n=2)]
    return f"; did you mean {', '.join(near)}?" if near else ""
