"""A Sandbar task in Python: the world is a class to fill in."""

import json
import re

import wit_world
from componentize_py_types import Err
from wit_world.imports import context, log
from wit_world.imports.types import Failure, FailureKind, Output


class WitWorld(wit_world.WitWorld):
    def run(self, input: bytes) -> Output:
        try:
            text = json.loads(input)["text"]
        except (ValueError, KeyError, TypeError) as error:
            # It will be refused another time too: fatal, so that nobody tries again.
            raise Err(Failure(FailureKind.FATAL, f"input: {error!r}", None)) from error
        if not isinstance(text, str):
            raise Err(Failure(FailureKind.FATAL, "input: `text` must be a string", None))

        words = [word for word in re.split(r"[ \t\r\n]+", text) if word]
        stats = {
            # The last line counts whether or not it ends with a line feed.
            "lines": text.count("\n") + (not text.endswith("\n") and text != ""),
            "words": len(words),
            # By bytes, like the other languages; the first of equals.
            "longest": max(words, key=lambda word: len(word.encode()), default=""),
        }
        context.progress(1, 1, "counted")
        fields = [("words", str(len(words))), ("attempt", str(context.get().attempt))]
        log.emit(log.Level.INFO, "text-stats", "counted the words", fields)
        return Output("application/json", json.dumps(stats, ensure_ascii=False).encode())
