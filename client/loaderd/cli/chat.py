"""Asking a model: once, or in a loop that remembers."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from loaderd.cli import output
from loaderd.client.errors import LoaderdError, UnsupportedOptionError
from loaderd.client.types import Message

if TYPE_CHECKING:
    from loaderd.cli.speaker import Speaker

_PROMPT = ">>> "
_COMMAND = re.compile(r"/\w*(\s|$)")  # a path is none


class Chat:
    """What was said so far.

    Args:
        speaker: Who answers.
        system: The system message, if any.
        raw: Whether each prompt is continued as it is. So it is for a model without a chat
            template; what was said before then plays no part.
    """

    def __init__(self, speaker: Speaker, *, system: str | None, raw: bool) -> None:
        self._speaker = speaker
        self._raw = raw
        self._beginning = [] if system is None else [Message("system", system)]
        self._said: list[Message] = []

    def loop(self) -> None:
        """Reads and answers until /exit or the end of the input."""
        self._check_system()
        with suppress(ImportError):  # not every Python has it
            import readline  # noqa: F401 - gives input() its line editing
        output.message("/clear forgets what was said, /exit or Ctrl-D leaves, Ctrl-C interrupts")
        while True:
            try:
                text = _read_line()
            except EOFError:
                output.result("")
                return
            except KeyboardInterrupt:
                output.result("")
                continue
            except UnicodeDecodeError:
                output.message("that is not valid Unicode text")
                continue
            match text.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/clear":
                    self._said.clear()
                case command if _COMMAND.match(command):
                    output.message(f"there is no {command}; the commands are /clear and /exit")
                case _:
                    self._answer_and_go_on(text)

    def answer(self, text: str) -> None:
        """Answers one prompt.

        Raises:
            LoaderdError: The model could not be loaded, or did not answer.
        """
        self._check_system()
        self._speaker.say(self._prompt(text), [])

    def _answer_and_go_on(self, text: str) -> None:
        """Answers; a failure or interruption is told, and what came until then is remembered."""
        spoken: list[str] = []
        try:
            self._speaker.say(self._prompt(text), spoken)
        except KeyboardInterrupt:
            if not spoken:
                output.result("")
            output.message("stopped")
        except LoaderdError as error:
            output.message(str(error))
        if spoken:
            self._said += [Message("user", text), Message("assistant", "".join(spoken))]

    def _prompt(self, text: str) -> str | list[Message]:
        if self._raw or not self._speaker.has_chat_template():
            return text
        return [*self._beginning, *self._said, Message("user", text)]

    def _check_system(self) -> None:
        has_chat_template = self._speaker.has_chat_template()  # loads it, before the first answer
        if self._beginning and not has_chat_template:
            raise UnsupportedOptionError.of(
                "--system", "the model has no chat template; put it into the prompt"
            )


def _read_line() -> str:
    if sys.stdout.isatty():
        return input(_PROMPT)
    print(_PROMPT, end="", file=sys.stderr, flush=True)  # stdout is for answers alone
    return input()
