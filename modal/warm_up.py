"""Starts the server once while the image is built, asks it for a few tokens, and stops it.

FlashInfer 0.2.0 compiles the kernels it needs when they are first called, which takes minutes. Done
here, they lie in the image, and a cold start finds them. What does not start here would not have
started in production, and ends the build.

    python warm_up.py --url http://127.0.0.1:10210 --patience 1200 -- toka model=... port=10210

Standard library only: it runs before this project is in the image.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

# Long enough for several pages of 16 tokens in prefill.
PROMPT = "The quick brown fox jumps over the lazy dog. " * 20


class _Refuse(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer that is not wanted: the server on this machine is what is asked."""

    def redirect_request(self, *_: object) -> None:
        return None


_HTTP = urllib.request.build_opener(_Refuse, urllib.request.ProxyHandler({}))


def _request(url: str, body: dict[str, object] | None, timeout: float) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with _HTTP.open(request, timeout=timeout) as response:
        answer: bytes = response.read()
    return answer


def wait_until_ready(url: str, server: subprocess.Popen[bytes], patience_s: float) -> None:
    """Polls ``/ping``, with a line every half minute.

    Raises:
        SystemExit: the server ended, or did not answer in time.
    """
    start = last_word = time.monotonic()
    while True:
        code = server.poll()
        if code is not None:
            sys.exit(f"the server ended with code {code} while starting; its log is above")
        try:
            _request(f"{url}/ping", None, timeout=5.0)
            return
        except OSError as error:  # not listening yet, or not answering yet
            cause = error
        now = time.monotonic()
        if now - start > patience_s:
            sys.exit(f"no answer from {url}/ping after {patience_s:.0f} s: {cause}")
        if now - last_word > 30:
            print(f"waiting for the server: {now - start:.0f} s", flush=True)
            last_word = now
        time.sleep(1.0)


def warm_up(command: list[str], url: str, patience_s: float) -> None:
    """Runs the command as a server, has it generate, and ends it and all its processes.

    Raises:
        SystemExit: it did not start, or refused the request.
    """
    # A session of its own, so that the worker processes can be ended with it.
    server = subprocess.Popen(command, start_new_session=True)
    try:
        wait_until_ready(url, server, patience_s)
        for temperature in (0.0, 0.7):
            body: dict[str, object] = {
                "model": "",
                "prompt": PROMPT,
                "max_tokens": 32,
                "temperature": temperature,
            }
            _request(f"{url}/v1/completions", body, timeout=patience_s)
        print("the server generates; its kernels are compiled", flush=True)
    except urllib.error.HTTPError as error:
        sys.exit(f"the server refused the request with HTTP {error.code}: {error.read()!r}")
    except OSError as error:
        sys.exit(f"the server gave no answer to a request: {error}")
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--patience", type=float, default=1200.0, help="seconds")
    parser.add_argument("command", nargs="+", help="the server, after --")
    given = parser.parse_args(arguments)
    warm_up(given.command, given.url.rstrip("/"), given.patience)


if __name__ == "__main__":
    main()
