"""The whole way, from an empty cache to an answer, on this machine alone.

A local hub serves the demo model, a daemon starts with an empty cache, and `loaderctl` asks it
a question: the daemon downloads the model, loads it, and streams the answer. Each command is
shown before it runs. Nothing is left behind, whichever way it ends.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
NAME = "SmolLM2-135M-Instruct"
MODEL = f"demo/{NAME}"
FOLDER = f".cache/models/{NAME}"
QUESTION = "Why is the sky blue?"

# Slow enough to see the download.
BYTES_PER_SECOND = 60_000_000
START_SECONDS = 60
# A little more than the daemon gives running streams to finish.
STOP_SECONDS = 40


class DemoError(Exception):
    """The demo cannot go on; its text says why."""


def main() -> None:
    """Runs the demo; the exit code is 1 when a step fails, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        demo()
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def demo() -> None:
    """Runs every step.

    Raises:
        DemoError: A step failed.
    """
    with tempfile.TemporaryDirectory(prefix="loaderd-demo-") as home:
        say("A hub that has one model, and a daemon that has none")
        hub = ["python", "-m", "tests.hub", "--repo", f"{MODEL}={FOLDER}"]
        hub += ["--bytes-per-second", str(BYTES_PER_SECOND)]
        with service(hub, clean_environment(), Path(home) / "hub.log") as (url, _):
            settings = {"HF_ENDPOINT": url, "HF_HOME": home}
            environment = clean_environment() | settings
            log = Path(home) / "loaderd.log"
            with service(["loaderd", "--port", "0"], environment, log, settings) as (line, daemon):
                address = {"LOADERD_ADDRESS": line.split()[-1]}
                say("The first question downloads the model and loads it")
                run(["loaderctl", "run", MODEL, QUESTION], address)
                say("What is loaded, and what the cache holds")
                run(["loaderctl", "ps"], address)
                run(["loaderctl", "ls"], address)
                say("The daemon finishes what it does and stops")
                stop(daemon)


def say(text: str) -> None:
    """Heads the next step."""
    print(f"\n# {text}", flush=True)


def show(command: list[str], settings: dict[str, str] | None = None) -> None:
    """Shows a command as it could be typed."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in (settings or {}).items()]
    print("$", *variables, shlex.join(command), flush=True)


def run(command: list[str], settings: dict[str, str]) -> None:
    """Runs a command to its end, on this terminal.

    Raises:
        DemoError: It failed.
    """
    show(command, settings)
    done = subprocess.run(locate(command), env=clean_environment() | settings, check=False)
    if done.returncode:
        raise DemoError(f"{command[0]} ended with exit code {done.returncode}")


@contextmanager
def service(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    settings: dict[str, str] | None = None,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs a program beside this one, from its ready line to the end of the block.

    Args:
        command: What to run; it prints one line when it is ready.
        environment: All its variables.
        log: Where its standard error goes; shown when the block fails.
        settings: The variables to show with the command.

    Yields:
        The ready line, and the process.

    Raises:
        DemoError: It did not become ready.
    """
    show(command, settings)
    with log.open("w") as errors:
        process = subprocess.Popen(
            locate(command),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Ctrl-C is for this program, which then stops the services in order.
            start_new_session=True,
        )
    try:
        line = ready_line(process, command[0])
        print(line, flush=True)
        yield line, process
    except DemoError:
        sys.stderr.write(log.read_text())
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ready_line(process: subprocess.Popen[str], name: str) -> str:
    """The line that a service prints when it is ready.

    Raises:
        DemoError: It ended before, or took too long.
    """
    output = process.stdout
    if output and select.select([output], [], [], START_SECONDS)[0] and (line := output.readline()):
        return line.strip()
    raise DemoError(f"{name} did not become ready")


def stop(daemon: subprocess.Popen[str]) -> None:
    """Asks the daemon to stop, and checks that it did so in good order.

    Raises:
        DemoError: It did not.
    """
    show(["kill", "-TERM", str(daemon.pid)])
    daemon.terminate()
    try:
        code = daemon.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DemoError("the daemon did not stop") from error
    if code:
        raise DemoError(f"the daemon ended with exit code {code}")
    print("The daemon stopped with exit code 0.")


def locate(command: list[str]) -> list[str]:
    """The command with the full path of its program in this environment."""
    return [str(PROGRAMS / command[0]), *command[1:]]


def clean_environment() -> dict[str, str]:
    """This process's variables without those that would aim the demo at somebody's own setup."""
    ours = ("HF_", "HUGGINGFACE_", "LOADERD_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


if __name__ == "__main__":
    main()
