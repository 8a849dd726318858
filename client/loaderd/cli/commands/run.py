"""The command run: one answer, or a chat."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from loaderd.cli.session import session_of

if TYPE_CHECKING:
    from loaderd.client import GenerationParameters


def run(  # noqa: PLR0917 - an argument for each option
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="As for `loaderctl load`, or the id of a loaded model.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT",
            help="What to say. -: read it from stdin, as without it when stdin is piped; "
            "on a terminal, without it, a chat begins.",
            show_default=False,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message, before all others.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy, 1 the model's own distribution.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among tokens that make up this probability.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample among this many most probable tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text. May be given again.")
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print token counts and speed to stderr.")
    ] = False,
) -> None:
    """Load a model if need be and stream its answer; without a prompt, chat with it.

    In a chat /clear forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops the answer.
    """
    from loaderd.cli.chat import Chat
    from loaderd.cli.speaker import Speaker

    if raw and system is not None:
        raise typer.BadParameter("a chat message does not go with --raw", param_hint="--system")
    parameters: GenerationParameters = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
    }
    session = session_of(context)
    text = _prompt(prompt)
    with session.connect() as client:
        speaker = Speaker(client, model, parameters, session.timeout, stats=stats)
        chat = Chat(speaker, system=system, raw=raw)
        if text is None:
            chat.loop()
        else:
            chat.answer(text)


def _prompt(argument: str | None) -> str | None:
    """The prompt; None when there shall be a chat.

    Raises:
        InvalidArgumentError: It is not valid Unicode text.
    """
    from loaderd.client.errors import InvalidArgumentError

    if argument is None and sys.stdin.isatty():
        return None
    try:
        text = sys.stdin.read().removesuffix("\n") if argument in {None, "-"} else argument
        text.encode()  # bytes that could not be decoded are lone surrogates in arguments
    except UnicodeError as error:
        raise InvalidArgumentError.of("PROMPT", "is not valid Unicode text") from error
    return text
