#!/usr/bin/env python3
"""A small client of Sandbar with nothing but Python's standard library (3.9 or newer).

As a library:

    from sandbar_client import Client
    client = Client("http://127.0.0.1:7260", key)
    client.push("word-count", "word_count.wasm")
    ended = client.invoke("word-count", {"input": {"text": "a b a"}})
    print(client.result(ended["id"]).decode())

As a program (needs SANDBAR_KEY; SANDBAR_URL is http://127.0.0.1:7260 if absent):

    sandbar_client.py push TASK MODULE.wasm
    sandbar_client.py invoke TASK [--request JSON|@FILE] [--follow] > RESULT
    sandbar_client.py logs ID [--follow]

Results go to stdout, all else to stderr. Ends with 0 only if what was asked for succeeded.
"""

import argparse
import http.client
import json
import os
import random
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

ENDED = {"succeeded", "dead", "cancelled", "expired"}
# Worth another try: too slow, too much at once, and what a server in trouble says.
TRANSIENT = {408, 429, 500, 502, 503, 504}
# Tries of one request, the first included.
TRIES = 6
# Longest pause between two tries, in seconds; also of what a server asks for.
MAX_PAUSE = 30.0
# Longest silence of a server, in seconds. Streams send a sign of life every 15 s.
SILENCE = 90.0
# Seconds that one request waits for the end of an invocation.
WAIT = 30


class Problem(Exception):
    """The server said no. `code` is stable and documented under /errors/CODE."""

    def __init__(self, status, body):
        try:
            problem = json.loads(body)
        except ValueError:
            problem = {}
        self.status = status
        self.code = problem.get("code", "")
        self.problem = problem
        super().__init__("%s %s: %s" % (status, self.code, problem.get("detail") or body[:200]))


class Client:
    """Calls one server. Requests that fail for a passing reason are made again, each at most TRIES times."""

    def __init__(self, url, key):
        self.url = url.rstrip("/")
        self.key = key

    def push(self, task, path):
        """Uploads a module and waits until it is compiled; returns the version."""
        with open(path, "rb") as module:
            data = module.read()
        headers = {"content-type": "application/wasm", "prefer": "wait=60"}
        version = self._json("POST", "/v1/tasks/%s/versions" % quote(task), data, headers)
        while version["state"] == "compiling":
            time.sleep(0.5)
            version = self._json("GET", "/v1/tasks/%s/versions/%s" % (quote(task), version["version"]))
        return version

    def start(self, task, request, wait=0):
        """Makes an invocation and returns it, after its end if that comes within `wait` seconds.

        The key is made once and goes with every try: an invocation whose answer was lost is found again, not made
        twice.
        """
        headers = {"content-type": "application/json", "idempotency-key": uuid.uuid4().hex}
        if wait:
            headers["prefer"] = "wait=%d" % wait
        return self._json("POST", "/v1/tasks/%s/invocations" % quote(task), json.dumps(request).encode(), headers)

    def invoke(self, task, request, limit=600):
        """Makes an invocation and returns it when it has ended, however that went."""
        return self.wait(self.start(task, request, min(WAIT, limit))["id"], limit)

    def wait(self, id, limit=600):
        """Returns an invocation when it has ended, or raises TimeoutError after `limit` seconds."""
        deadline, pause = time.monotonic() + limit, 0.05
        while True:
            invocation = self.get(id)
            if invocation["state"] in ENDED:
                return invocation
            if time.monotonic() >= deadline:
                raise TimeoutError("%s is still %s" % (id, invocation["state"]))
            time.sleep(pause)
            pause = min(pause * 1.5, 2.0)

    def get(self, id):
        """An invocation: state, attempts, receipts."""
        return self._json("GET", "/v1/invocations/" + quote(id))

    def result(self, id):
        """The bytes that came out."""
        with self._open("GET", "/v1/invocations/%s/result" % quote(id)) as answer:
            return answer.read()

    def logs(self, id):
        """Yields the log records that there are."""
        path, after = "/v1/invocations/%s/logs" % quote(id), None
        while True:
            page = self._json("GET", path + ("?after=" + quote(after) if after else ""))
            yield from page["items"]
            after = page.get("next")
            if not after:
                return

    def follow(self, id, limit=600):
        """Yields (event, data) while an invocation runs: `log`, `progress`, `state`, and `end` as the last.

        Uses server-sent events, and goes on where it was when the connection breaks.
        """
        deadline, last, tries = time.monotonic() + limit, None, 0
        while time.monotonic() < deadline:
            headers = {"accept": "text/event-stream"}
            if last:
                headers["last-event-id"] = last
            try:
                with self._open("GET", "/v1/invocations/%s/logs" % quote(id), headers=headers) as answer:
                    for event, data, event_id in events(answer):
                        last, tries = event_id or last, 0
                        yield event, json.loads(data)
                        if event == "end":
                            return
            except (OSError, http.client.HTTPException):
                pass
            # It broke off. Whoever said nothing at all several times is not worth another try.
            tries += 1
            if tries == TRIES:
                raise TimeoutError("the stream of %s breaks off" % id)
            time.sleep(pause_before(tries, None))
        raise TimeoutError("%s goes on" % id)

    def _json(self, method, path, data=None, headers=None):
        with self._open(method, path, data, headers) as answer:
            return json.load(answer)

    def _open(self, method, path, data=None, headers=None):
        headers = {"x-api-key": self.key, **(headers or {})}
        tried = 0
        while True:
            tried += 1
            request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
            try:
                return urllib.request.urlopen(request, timeout=SILENCE)
            except urllib.error.HTTPError as error:
                body = error.read().decode("utf-8", "replace")
                # 409 with Retry-After: a version that is being compiled, for instance.
                again = error.code in TRANSIENT or (error.code == 409 and "retry-after" in error.headers)
                if not again or tried == TRIES:
                    raise Problem(error.code, body) from None
                asked = error.headers.get("retry-after")
            except (OSError, http.client.HTTPException):
                # No connection, or it broke: nobody knows whether the request arrived. All of ours may be repeated.
                if tried == TRIES:
                    raise
                asked = None
            time.sleep(pause_before(tried, asked))


def pause_before(tried, asked):
    """Seconds before the next try: what the server asks for, else twice as long each time, with some chance in it."""
    try:
        return min(max(float(asked), 0.0), MAX_PAUSE)
    except (TypeError, ValueError):
        return min(0.2 * 2**tried, MAX_PAUSE) * random.uniform(0.5, 1.0)


def events(lines):
    """Yields (event, data, id) of a stream of server-sent events."""
    event, data, event_id = "message", [], None
    for line in lines:
        line = line.decode("utf-8").rstrip("\r\n")
        if not line:
            if data:
                yield event, "\n".join(data), event_id
            event, data, event_id = "message", [], None
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if name == "event":
                event = value
            elif name == "data":
                data.append(value)
            elif name == "id":
                event_id = value


def quote(text):
    return urllib.parse.quote(text, safe="")


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def show(event, data):
    if event == "log":
        fields = " ".join("%s=%s" % pair for pair in sorted(data.get("fields", {}).items()))
        say("#%s %-5s %s %s" % (data["attempt"], data["level"], data["message"], fields))
    elif event == "progress":
        say("progress %s/%s %s" % (data["done"], data["total"], data["message"]))


def finish(client, invocation):
    """Shows how an invocation ended; returns what the program ends with."""
    for attempt in client.get(invocation["id"])["attempts"]:
        receipt = attempt.get("receipt", {})
        say(
            "#%s %s: fuel %s, CPU %.1f ms, memory %.1f MiB"
            % (
                attempt["attempt"],
                attempt.get("termination", {}).get("reason", "running"),
                receipt.get("fuel", "?"),
                receipt.get("cpu_ns", 0) / 1e6,
                receipt.get("peak_memory_bytes", 0) / 2**20,
            )
        )
    say("%s %s" % (invocation["id"], invocation["state"]))
    if invocation["state"] != "succeeded":
        return 1
    sys.stdout.buffer.write(client.result(invocation["id"]))
    return 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description="A small client of Sandbar")
    commands = parser.add_subparsers(dest="command", required=True)
    push = commands.add_parser("push", help="upload a module")
    push.add_argument("task")
    push.add_argument("module")
    invoke = commands.add_parser("invoke", help="run a task, wait for its end, print its result")
    invoke.add_argument("task")
    invoke.add_argument("--request", default="{}", help='body of the invocation, {"input": …}, or @FILE with it')
    invoke.add_argument("--follow", action="store_true", help="show log and progress while it runs")
    logs = commands.add_parser("logs", help="print the log of an invocation")
    logs.add_argument("id")
    logs.add_argument("--follow", action="store_true", help="until it has ended")
    options = parser.parse_args(arguments)

    key = os.environ.get("SANDBAR_KEY")
    if not key:
        say("set SANDBAR_KEY (sandbar dev writes one to .sandbar/admin.key)")
        return 2
    client = Client(os.environ.get("SANDBAR_URL", "http://127.0.0.1:7260"), key)
    try:
        if options.command == "push":
            version = client.push(options.task, options.module)
            say("%s version %s is %s" % (options.task, version["version"], version["state"]))
            return 0 if version["state"] == "ready" else 1
        if options.command == "logs":
            source = client.follow(options.id) if options.follow else (("log", r) for r in client.logs(options.id))
            for event, data in source:
                if event == "log":
                    print(json.dumps(data, ensure_ascii=False), flush=True)
            return 0
        text = options.request
        if text.startswith("@"):
            with open(text[1:], encoding="utf-8") as file:
                text = file.read()
        request = json.loads(text)
        if not options.follow:
            return finish(client, client.invoke(options.task, request))
        for event, data in client.follow(client.start(options.task, request)["id"]):
            show(event, data)
            if event == "end":
                return finish(client, data)
        return 1
    except (Problem, OSError, ValueError, http.client.HTTPException) as error:
        say("sandbar_client: %s" % error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
