"""A language model's endpoint on loopback, which answers as a test says."""

import abc
import http.server
import json
import threading


def completion(content) -> str:
    """The body of a chat completion."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


class Endpoint(abc.ABC, http.server.ThreadingHTTPServer):
    """Answers requests as its `answer` says.

    requests: the bodies that came. keys: the Authorization of each.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.keys, self.url = [], [], f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @abc.abstractmethod
    def answer(self, body: dict):
        """What a request's body is answered: a text, which is completed, or a status and a body, text or bytes."""

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Replying(Endpoint):
    """Answers with reply(prompt), of the prompt that a message has as JSON."""

    def answer(self, body):
        return self.reply(json.loads(body["messages"][-1]["content"])["prompt"])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        answer = self.server.answer(body)
        status, content = answer if isinstance(answer, tuple) else (200, completion(answer))
        content = content if isinstance(content, bytes) else content.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "text/html" if content.startswith(b"<") else "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("retry-after-ms", "5")  # soon, for the test's sake
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):  # it did not wait
            pass

    def log_message(self, *_):
        pass
