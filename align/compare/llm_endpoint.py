"""A judge behind an OpenAI-compatible endpoint: several questions at a time, patient with a server's bad days.

What passes by itself (timeouts, broken connections, HTTP 408, 425, 429 and 5xx) and what the judge did wrong (no
verdict, no JSON) is tried again after a pause; what the user must mend (HTTP 401, 404, ...) stops the comparison with
the endpoint's own words. The key is read from the environment and goes into one header and nowhere else.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from align.compare.llm_judge import Shown, Told, exhibits, task
from align.config import LlmJudgeSection
from labeling_ui.render import visible
from reward.records import InputError

# A verdict with its reasons is some hundred tokens; a reasoning model thinks before it in several thousand.
MOST_TOKENS = 8192
# Bytes of a reply that are read: the tokens above and what is wrapped around them, with much to spare.
LARGEST_REPLY = 2**20
# So many questions in a row without any answer, all retries spent: nobody is there.
SILENT_QUESTIONS = 8
AGAIN = (408, 425, 429)

FORMAT = (
    "Give your reasons in a few sentences. Then end with one line of its own, one of these three and nothing else:\n"
    "VERDICT: A\nVERDICT: B\nVERDICT: TIE\n"
    "TIE is for answers that are equally good."
)
NUDGE = "\n\nAn earlier reply had no such line. Write no reasons now: reply with that one line alone."

_VERDICT = re.compile(r"VERDICT:\s*(A|B|TIE)")
_VERDICTS = {"A": 1.0, "TIE": 0.5, "B": 0.0}
# How endpoints say that a question has more tokens than their model has places for.
_TOO_LONG = re.compile(r"context[ _-]?(length|size|window)", re.IGNORECASE)


class _Failed(Exception):
    """An attempt without a verdict.

    Attributes:
        why: for people.
        wait: seconds the endpoint asked us to wait.
        silent: the endpoint gave no answer, not even a bad one.
        absent: nobody could be connected to.
        final: it would fail again.
    """

    def __init__(
        self, why: str, wait: float = 0.0, *, silent: bool = False, absent: bool = False, final: bool = False
    ) -> None:
        super().__init__(why)
        self.why, self.wait, self.silent, self.absent, self.final = why, wait, silent or absent, absent, final


class Endpoint:
    """Puts questions to `{base_url}/chat/completions`.

    Raises:
        InputError: the address is none, or the environment variable of the key is not set.
    """

    def __init__(self, section: LlmJudgeSection, guidelines: str, seed: int) -> None:
        assert section.base_url is not None
        self._section, self._seed = section, seed
        self._url = _address(section.base_url)
        self._place = str(self._url.copy_with(query=None))
        self._key = _key(section.api_key_env)
        self._system = f"{task(guidelines)}\n\n{FORMAT}"
        self.identity = [section.model, section.base_url.rstrip("/")]
        # What an endpoint may refuse and we can do without (`_without`).
        self._settings: dict[str, Any] = {"temperature": 0, "max_tokens": MOST_TOKENS, "seed": seed}
        self._lock = threading.Lock()
        self._silent, self._present = 0, False  # questions without any answer in a row; it was ever connected to
        self._pause, self._longest_pause = 1.0, 60.0  # seconds: before the first repeat, and at most

    def ask(
        self, questions: Sequence[Shown], tell: Callable[[int, Told], None], on_progress: Callable[[int], object]
    ) -> None:
        """Put all questions, `parallel` at a time; `tell` is called from their threads, `on_progress` from this one.

        Where this is interrupted, questions on their way are waited for, and told.

        Raises:
            InputError: the endpoint refuses us, or answers nothing at all.
        """
        stop = threading.Event()

        def one(index: int) -> None:
            try:
                told = self._question(client, questions[index], stop)
            except BaseException:
                stop.set()  # here, for the main thread may come to it late
                raise
            if told is not None:
                tell(index, told)

        parallel = self._section.parallel
        client = httpx.Client(
            timeout=self._section.timeout,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            # A proxy of the environment is for addresses elsewhere.
            trust_env=self._url.host not in ("localhost", "127.0.0.1", "::1"),
        )
        with client, ThreadPoolExecutor(parallel) as pool:
            futures: list[Future[None]] = []
            try:
                futures += (pool.submit(one, index) for index in range(len(questions)))
                for done, future in enumerate(as_completed(futures), start=1):
                    future.result()
                    on_progress(done)
            except BaseException:
                stop.set()  # what has not begun ends at once
                raise

    def close(self) -> None:
        """Nothing is held between two calls."""

    def _question(self, client: httpx.Client, shown: Shown, stop: threading.Event) -> Told | None:
        """What came of a question; None where the comparison was stopped before that was known."""
        chance = random.Random(f"{self._seed} {shown}")
        nudge, wait, failure = False, 0.0, _Failed("it was not asked")
        attempts = 0
        while attempts <= self._section.retries and not stop.wait(wait):
            attempts += 1
            try:
                verdict = read_verdict(self._reply(client, shown, nudge))
                if verdict is not None:
                    return Told(verdict, attempts)
                raise _Failed("the reply has no line VERDICT: A, VERDICT: B or VERDICT: TIE")
            except _Failed as error:
                failure = error
                nudge = nudge or not error.silent
                backoff = self._pause * 2 ** (attempts - 1) * chance.uniform(0.5, 1.5)
                wait = min(max(backoff, error.wait), self._longest_pause)
                if error.final:
                    break
        if stop.is_set():
            return None
        self._count(failure)
        return Told(None, attempts, failure.why)

    def _count(self, failure: _Failed) -> None:
        """Stop where nobody is there: each further question would cost all its retries, and be lost."""
        with self._lock:
            if not failure.silent:
                return
            self._silent += 1
            gone = self._silent >= SILENT_QUESTIONS or (failure.absent and not self._present)
        if gone:
            raise InputError(
                f"the endpoint {self._place} does not answer ({failure.why}): start it, or check compare.llm.base_url, "
                "timeout and parallel. Verdicts until now are kept; start again to go on."
            )

    def _reply(self, client: httpx.Client, shown: Shown, nudge: bool) -> str:
        """The judge's own words."""
        messages = [
            {"role": "system", "content": self._system},
            {"role": "user", "content": f"{exhibits(shown, self._seed)}\n\n{FORMAT}{NUDGE if nudge else ''}"},
        ]
        while True:
            settings = self._settings
            status, headers, raw = self._post(client, {"model": self._section.model, "messages": messages, **settings})
            text = raw.decode("utf-8", "replace")
            if status == 200:
                with self._lock:
                    self._silent = 0
                return _content(text)
            if status not in AGAIN and 400 <= status < 500:
                refused = _refused_setting(text)
                if refused in settings:
                    self._settings = _without(self._settings, refused)
                    continue
            raise self._failure(status, headers, text)

    def _post(self, client: httpx.Client, body: dict[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        """(status, headers, body) of a reply, no more than LARGEST_REPLY bytes of it, within `timeout`."""
        timeout = self._section.timeout
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        late = f"no whole answer within {timeout:g} s"
        deadline, read = time.monotonic() + timeout, bytearray()
        try:
            with client.stream("POST", self._url, content=json.dumps(body).encode(), headers=headers) as response:
                self._present = True
                for chunk in response.iter_raw():
                    read += chunk
                    if len(read) > LARGEST_REPLY:
                        raise _Failed(f"the reply is larger than {LARGEST_REPLY} bytes")
                    if time.monotonic() > deadline:
                        raise _Failed(late, silent=True)
                return response.status_code, response.headers, bytes(read)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Failed(self._quoted(str(error) or "no connection"), absent=True) from None
        except httpx.TimeoutException:
            self._present = True
            raise _Failed(late, silent=True) from None
        except httpx.RequestError as error:
            self._present = True
            raise _Failed(self._quoted(str(error) or type(error).__name__), silent=True) from None

    def _failure(self, status: int, headers: httpx.Headers, text: str) -> _Failed | InputError:
        said = self._quoted(_error_message(text))
        heard = f'HTTP {status}, "{said}"' if said else f"HTTP {status}"
        if status in AGAIN or status >= 500:
            return _Failed(heard, retry_after(headers.get("retry-after")), silent=True)
        if status == 413 or (status == 400 and _TOO_LONG.search(text)):
            with self._lock:
                self._silent = 0
            return _Failed(f"the question is too long for the model ({heard})", final=True)
        env, what = self._section.api_key_env, f"the endpoint {self._place} refused a question ({heard})"
        if status in (401, 403):
            fix = f"check the key in {env}" if env else "set compare.llm.api_key_env to the variable that holds a key"
        elif status == 404:
            fix = "check compare.llm.model, and compare.llm.base_url, which mostly ends in /v1"
        elif 300 <= status < 400:
            place = self._quoted(headers.get("location", ""))
            what = f"the endpoint {self._place} sends us elsewhere (HTTP {status}, to {place or 'no address'})"
            fix = "give the address itself as compare.llm.base_url"
        else:
            fix = "check compare.llm.model and compare.llm.base_url"
        return InputError(f"{what}: {fix}. Verdicts until now are kept; start again to go on.")

    def _quoted(self, text: str) -> str:
        """Somebody else's words on one short line that can neither drive a terminal nor tell the key."""
        if self._key is not None:
            text = text.replace(self._key, "[key]")
        line = " ".join(visible(text).split())
        return line if len(line) <= 300 else f"{line[:299]}…"


def read_verdict(reply: str) -> float | None:
    """1 for A, 0.5 for a tie, 0 for B: the last line of the reply that is a verdict; None without one.

    Thoughts between <think> and </think> are no part of the reply; nor are those that were never closed. A line may be
    set in bold or as code, as models like to; anything else on it makes it prose.
    """
    spoken = reply.rpartition("</think>")[2].partition("<think>")[0]
    lines = [line.strip().strip("*_`").strip() for line in spoken.splitlines()]
    found = [match[1] for line in lines if (match := _VERDICT.fullmatch(line.replace("**", "")))]
    return _VERDICTS[found[-1]] if found else None


def retry_after(header: str | None, now: datetime | None = None) -> float:
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 without one that can be read."""
    try:
        if header is None:
            return 0.0
        if header.strip().isdigit():
            return float(header)
        return max(0.0, (parsedate_to_datetime(header) - (now or datetime.now(UTC))).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _address(base_url: str) -> httpx.URL:
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.userinfo:
        raise InputError(
            "compare.llm.base_url holds a name or a password, which would be written down: put a key into an "
            "environment variable and name that in compare.llm.api_key_env."
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(
            f"compare.llm.base_url is {visible(base_url)!r}: an address like http://127.0.0.1:8000/v1 is wanted."
        )
    return url.copy_with(path=f"{url.path.rstrip('/')}/chat/completions")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable}, which compare.llm.api_key_env names, is not set: put the endpoint's "
            "key into it."
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"the environment variable {variable} holds characters that no key has: set it again.")
    return key


def _content(text: str) -> str:
    """The reply's text in a body of /chat/completions."""
    try:
        choice = json.loads(text)["choices"][0]
        content, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Failed("the reply is not the JSON of a chat completion") from None
    if not isinstance(content, str):
        raise _Failed("the reply has no text")
    if reason == "length":  # what stands last was not meant to
        raise _Failed("the reply was cut off at its longest length")
    return content


def _error_of(text: str) -> Any:
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return body.get("error", body) if isinstance(body, dict) else None


def _error_message(text: str) -> str:
    """An endpoint's own words: the message of its error, or whatever it sent."""
    error = _error_of(text)
    if isinstance(error, dict):
        return str(error.get("message") or error.get("detail") or text)
    return error if isinstance(error, str) else text


def _refused_setting(text: str) -> str:
    """The setting that this model does not take, as OpenAI's reasoning models do not; empty for other errors."""
    error = _error_of(text)
    if not isinstance(error, dict) or error.get("code") not in ("unsupported_parameter", "unsupported_value"):
        return ""
    return str(error.get("param"))


def _without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key != name}
    return kept | ({"max_completion_tokens": settings[name]} if name == "max_tokens" and name in settings else {})
