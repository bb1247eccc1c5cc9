"""Questions to a model behind an OpenAI-compatible endpoint."""

import json
import os
import pathlib

from livo_jax.files.directories import replacing


def client(url: str, retries: int, timeout: float):
    """The client of the endpoint with this base URL; the environment's OPENAI_API_KEY is its key, if it wants one.

    Args:
        retries: after 429, 5xx and timeouts: it waits 0.5 s, 1 s, 2 s ..., or as it is told.
        timeout: seconds for an answer.

    Raises:
        ValueError: the URL, the key, or a proxy that the environment names is of no use. The key is not told.
    """
    import httpx
    import openai

    key = os.environ.get("OPENAI_API_KEY", "").strip() or "none"  # endpoints at home want none, but the client does
    if not (key.isascii() and key.isprintable()):
        raise ValueError("OPENAI_API_KEY has a character that no header can have: set it again")
    try:
        host = httpx.URL(url).host
        here = host in ("localhost", "::1") or host.startswith("127.")  # where no proxy is asked
        http = openai.DefaultHttpxClient(trust_env=False) if here else None
        return openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=timeout, http_client=http)
    except httpx.InvalidURL as error:
        raise ValueError(f"endpoint={url!r} is no URL, where an IPv6 address stands in brackets: {error}") from error
    except ImportError as error:  # which says how to install what a SOCKS proxy wants
        raise ValueError(f"{error} Or unset the proxy in the environment") from error


def kept(file: pathlib.Path | None) -> str | None:
    """The answer that `ask` kept in a file; None where it is not there. Raises ValueError for a damaged one."""
    if not file or not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))["answer"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def ask(client, url: str, request: dict, file: pathlib.Path | None, about: dict, settings: str = "") -> str:
    """The text of a chat completion; "" where the model will not answer, which is not kept.

    Args:
        file: where the answer is kept, with what it is `about`; nowhere if None.
        settings: what the names "endpoint" and "cache" of the user's settings begin with, for errors.

    Raises:
        ConnectionError: the endpoint does not answer, or refuses.
        ValueError: what comes is no chat completion, and how it begins.
        OSError: the answer cannot be kept.
    """
    import openai

    try:
        text = client.chat.completions.with_raw_response.create(**request).http_response.text
    except openai.APIStatusError as error:
        if error.code in ("content_filter", "content_policy_violation"):
            return ""
        raise ConnectionError(f"{url} ({settings}endpoint) refuses: {str(error)[:500]}") from error
    except openai.APIConnectionError as error:
        raise ConnectionError(f"{url} ({settings}endpoint) does not answer: {error.__cause__ or error}") from error
    try:
        answer = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(f"no chat completion: {text[:200]!r}") from None
    if not isinstance(answer, str):
        return ""
    if file:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as scratch:
                scratch.write_text(json.dumps({**about, "answer": answer}) + "\n", encoding="utf-8")
        except OSError as error:
            raise OSError(f"{file} ({settings}cache) cannot be written: {error}") from error
    return answer
