"""Many callers at once: does each get exactly what it would have got alone, and does the server end as it began?

1. A server with the bundled model starts in a process of its own. Requests are made up: different prompts, hooks,
   interventions, seeds, encodings, streamed and whole. Each is sent alone once; a digest of its answer is kept.
2. For a while, as many callers as asked for send them at the same time, again and again. Every answer must have the
   digest of its request alone. Callers beside them hang up early, read slowly, send half a body, send rubbish.
3. A refusal must be 503 with Retry-After. In the end nothing runs or waits, and memory is what it was after the first
   third (before it, pools are still growing).

python benchmarks/many_callers.py --callers 32 --seconds 180
"""

import argparse
import hashlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests
from page import environment, write_section

CAPTURE = "/v1/completions/with_activations"
COMPONENTS = ["residual", "attention", "mlp", "query", "key", "value", "attention_scores", "attention_pattern"]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "when",
    "Mary",
    "and",
    "John",
    "went",
    "to",
    "store",
    "gave",
    "drink",
    "capital",
    "of",
    "France",
    "is",
    "Italy",
]


MOST_GROWTH = 1.1
"""Of resident memory, from the second third of a run to its end."""


@dataclass
class Outcome:
    """What came of it: counts by kind, seconds per answered request, faults in words, and memory in bytes."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    left: list[dict[str, Any]] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Memory of the last tenth over that of the second third's beginning."""
        third, tenth = len(self.memory) // 3, max(1, len(self.memory) // 10)
        return statistics.median(self.memory[-tenth:]) / statistics.median(self.memory[third : third + tenth])


def make_request(number: int) -> dict[str, Any]:
    """A request that is the same each time it is made from the same number."""
    chance = random.Random(number)
    words = [chance.choice(WORDS) for _ in range(chance.randint(1, 40))]
    hooks = [
        {"layer_name": str(layer), "component": component, "hook_id": f"{component}{layer}"}
        for layer in range(4)
        for component in COMPONENTS
    ]
    request: dict[str, Any] = {
        "prompt": " ".join(words),
        "max_tokens": chance.randint(0, 24),
        "temperature": chance.choice([0.0, 0.7, 1.5]),
        "top_p": chance.choice([1.0, 0.9]),
        "seed": number,
        "activation_hooks": chance.sample(hooks, chance.randint(1, 5)),
        "activation_encoding": chance.choice(["json", "base64", "base64"]),
        "activation_dtype": chance.choice(["float32", "float32", "float16"]),
        "stream": chance.random() < 0.4,
    }
    if chance.random() < 0.4:
        layer = chance.randint(0, 3)
        request["interventions"] = [
            {"hook_point": f"blocks.{layer}.attn.hook_z", "type": "scale", "factor": 0.5, "heads": [layer]}
        ]
    return request


def digest(reply: requests.Response) -> str:
    """What was computed for a request: everything in the answer but its id and time."""
    seen = hashlib.sha256()
    if reply.headers["Content-Type"].startswith("text/event-stream"):
        lines = [line for line in reply.iter_lines() if line.startswith(b"data: ")]
        if lines[-1] != b"data: [DONE]":
            raise ValueError(f"a stream ended in {lines[-1][:300]!r}")
        bodies = [json.loads(line[6:]) for line in lines[:-1]]
    else:
        bodies = [reply.json()]
    for body in bodies:
        told = {key: value for key, value in body.items() if key not in ("id", "created")}
        seen.update(json.dumps(told, sort_keys=True).encode())
    return seen.hexdigest()


def run(url: str, pid: int, callers: int, seconds: float, variety: int, vandals: bool = True) -> Outcome:
    """Load the server at ``url``, process ``pid``, for a while.

    Args:
        callers: how many ask at the same time.
        variety: how many different requests there are.
        vandals: others hang up, dawdle and send rubbish meanwhile.
    """
    wanted = [make_request(number) for number in range(variety)]
    alone = [digest(requests.post(url + CAPTURE, json=request, timeout=60)) for request in wanted]
    outcome, lock, until = Outcome(), threading.Lock(), time.monotonic() + seconds

    def call(caller: int) -> None:
        chance, session = random.Random(caller), requests.Session()
        while time.monotonic() < until:
            number = chance.randrange(variety)
            began = time.monotonic()
            try:
                with session.post(url + CAPTURE, json=wanted[number], timeout=120, stream=True) as reply:
                    kind, wait = judge(reply, alone[number])
            except Exception as error:  # every fault is counted, whatever it is
                kind, wait = f"{type(error).__name__}: {error}", 0.0
            with lock:
                outcome.counts[kind if kind in ("right", "refused") else "fault"] += 1
                if kind == "right":
                    outcome.seconds.append(time.monotonic() - began)
                elif kind != "refused":
                    outcome.faults.append(kind)
            time.sleep(wait * chance.random())

    def vandalise(mischief: int) -> None:
        chance = random.Random(1000 + mischief)
        while time.monotonic() < until:
            try:
                MISCHIEF[mischief](url, wanted[chance.randrange(variety)], chance)
            except (OSError, requests.RequestException):
                # The server may close a connection on such a caller.
                time.sleep(0.01)
            except AssertionError as error:
                with lock:
                    outcome.faults.append(str(error))
            with lock:
                outcome.counts[MISCHIEF[mischief].__name__] += 1

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(callers)]
    if vandals:
        threads += [threading.Thread(target=vandalise, args=(i,), daemon=True) for i in range(len(MISCHIEF))]
    process = psutil.Process(pid)
    for thread in threads:
        thread.start()
    while time.monotonic() < until:
        outcome.memory.append(process.memory_info().rss)
        time.sleep(min(0.5, seconds / 50))
    for thread in threads:
        thread.join(180)
        if thread.is_alive():
            outcome.faults.append("a caller never got an answer")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        jobs = requests.get(f"{url}/v1/jobs", timeout=10).json()["data"]
        outcome.left = [job for job in jobs if job["finished"] is None]
        if not outcome.left:
            break
        time.sleep(0.1)
    outcome.memory.append(process.memory_info().rss)
    # And each still answers as it did.
    for request, expected in list(zip(wanted, alone, strict=True))[:8]:
        if digest(requests.post(url + CAPTURE, json=request, timeout=60)) != expected:
            outcome.faults.append("an answer changed after the load")
    return outcome


def judge(reply: requests.Response, expected: str) -> tuple[str, float]:
    """``right``, ``refused`` and for how long, or what is wrong."""
    if reply.status_code == 503 and "Retry-After" in reply.headers:
        return "refused", float(reply.headers["Retry-After"])
    if reply.status_code != 200:
        return f"status {reply.status_code}: {reply.text[:300]}", 0.0
    return ("right" if digest(reply) == expected else "not what it was alone"), 0.0


def hang_up(url: str, request: dict[str, Any], chance: random.Random) -> None:
    """Ask for much and leave after the first bytes."""
    body = request | {"max_tokens": 60, "stream": True}
    with requests.post(url + CAPTURE, json=body, stream=True, timeout=30) as reply:
        next(reply.iter_content(10), None)


def dawdle(url: str, request: dict[str, Any], chance: random.Random) -> None:
    """Take a stream in small bites, with pauses."""
    with requests.post(url + CAPTURE, json=request | {"stream": True}, stream=True, timeout=30) as reply:
        for _ in range(20):
            reply.raw.read(500)
            time.sleep(0.05)


def send_half(url: str, request: dict[str, Any], chance: random.Random) -> None:
    """Announce a body, send half of it, wait, leave."""
    body = json.dumps(request).encode()
    parts = urlsplit(url)
    head = f"POST {CAPTURE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
        time.sleep(chance.random() / 5)


def send_rubbish(url: str, request: dict[str, Any], chance: random.Random) -> None:
    """Send what is no request: a damaged body, which must be refused and nothing else."""
    reply = requests.post(
        url + CAPTURE, data=damaged(request, chance), headers={"Content-Type": "application/json"}, timeout=30
    )
    if reply.status_code >= 500 and reply.status_code != 503:
        raise AssertionError(f"rubbish was answered with {reply.status_code}: {reply.text[:300]}")


MISCHIEF = [hang_up, dawdle, send_half, send_rubbish]


def damaged(request: dict[str, Any], chance: random.Random) -> bytes:
    """A request's body with a few bytes changed, cut, doubled, or a value replaced by one of another kind."""
    if chance.random() < 0.5:
        wrong: list[Any] = [None, True, -1, 1e308, 2**70, "", "\x00", [], {}, [[]], {"a": {}}, "x" * 5000, float("nan")]
        changed: Any = json.loads(json.dumps(request))
        place = changed
        for _ in range(3):
            key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
            if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.7:
                place = place[key]
                continue
            place[key] = chance.choice(wrong)
            break
        return json.dumps(changed).encode()
    body = bytearray(json.dumps(request).encode())
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(body))
        kind = chance.randrange(4)
        if kind == 0:
            body[at] = chance.randrange(256)
        elif kind == 1:
            del body[at:]
            body += b"{"
        elif kind == 2:
            body[at:at] = body[max(0, at - 20) : at]
        else:
            body[at:at] = bytes(chance.randrange(256) for _ in range(3))
    return bytes(body)


@contextmanager
def own_server(*arguments: str) -> Iterator[tuple[str, int]]:
    """The URL and process id of a server of its own with the bundled model, ended afterwards."""
    command = [sys.executable, "-m", "api_server", "--port", "0", "--model", "neuroscope-tiny", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1], process.pid
        finally:
            process.terminate()
            process.wait(30)


def report(outcome: Outcome, callers: int, seconds: float, variety: int) -> str:
    """The section of the page."""
    right, refused, faults = (outcome.counts[kind] for kind in ("right", "refused", "fault"))
    took = sorted(1000 * s for s in outcome.seconds)
    mischief = ", ".join(f"{outcome.counts[one.__name__]} times {one.__name__.replace('_', ' ')}" for one in MISCHIEF)
    third = outcome.memory[len(outcome.memory) // 3] / 1e6
    return f"""`python benchmarks/many_callers.py --callers {callers} --seconds {seconds:.0f}`

{environment("mlx", "mlx-lm", "waitress")}
{callers} callers with {variety} different requests (prompts, hooks, interventions, seeds, encodings, streamed and
whole) on one server with the bundled model. Each answer is compared, bit for bit, with that of the request alone.
Meanwhile others misbehave: {mischief}.

| | |
| --- | --- |
| answers equal to those of the request alone | {right} |
| refused with 503 and Retry-After | {refused} |
| anything else | {faults} |
| requests per second | {right / seconds:.1f} |
| ms per request, median and 95% | {took[len(took) // 2]:.0f}, {took[int(0.95 * len(took))]:.0f} |
| MB resident after a third, at the end | {third:.0f}, {outcome.memory[-1] / 1e6:.0f} |
| jobs left over | {len(outcome.left)} |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--variety", type=int, default=200)
    parser.add_argument("--dry", action="store_true", help="print the section and leave docs/benchmarks.md alone")
    options = parser.parse_args()
    with own_server("--max-queued", "24") as (url, pid):
        outcome = run(url, pid, options.callers, options.seconds, options.variety)
    text = report(outcome, options.callers, options.seconds, options.variety)
    print(text)
    for fault in outcome.faults[:20]:
        print(fault)
    if not options.dry:
        write_section("Many callers", text)
    if outcome.growth > MOST_GROWTH:
        print(f"memory grew by a factor of {outcome.growth:.2f}; at most {MOST_GROWTH} is allowed")
    return 1 if outcome.faults or outcome.left or outcome.growth > MOST_GROWTH else 0


if __name__ == "__main__":
    sys.exit(main())
