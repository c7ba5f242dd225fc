"""pgqueuer does what Sandbar does in the same table: drain, single, batch, start.

Reaches Postgres by the PG* variables. Prints one JSON object.
"""

import asyncio
import json
import logging
import sys
import time

import asyncpg
import uvloop
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.models import Job
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries

PAYLOAD = json.dumps({"n": 1, "pad": "x" * 80}).encode()


async def connect(size: int) -> tuple[asyncpg.Pool, Queries]:
    pool = await asyncpg.create_pool(min_size=2, max_size=size)
    queries = Queries(AsyncpgPoolDriver(pool))
    if not await queries.has_table("pgqueuer"):
        await queries.install()
    return pool, queries


async def preload(queries: Queries, total: int) -> float:
    """Adds in batches of a thousand, two at a time, as fast as it goes."""
    left = total

    async def lane() -> None:
        nonlocal left
        while left > 0:
            size = min(1000, left)
            left -= size
            await queries.enqueue(["noop"] * size, [PAYLOAD] * size, [0] * size)

    began = time.perf_counter()
    await asyncio.gather(lane(), lane())
    return time.perf_counter() - began


async def drain(total: int, batch_size: int) -> None:
    pool, queries = await connect(20)
    await preload(queries, total)
    await pool.execute("CHECKPOINT")
    first = 0.0
    manager = QueueManager(queries)

    @manager.entrypoint("noop")
    async def noop(job: Job) -> None:
        nonlocal first
        first = first or time.perf_counter()

    running = asyncio.create_task(manager.run(batch_size=batch_size))
    while await pool.fetchval("SELECT EXISTS (SELECT 1 FROM pgqueuer)"):
        if running.done():
            running.result()
        await asyncio.sleep(0.01)
    print(json.dumps({"rate": total / (time.perf_counter() - first)}))
    manager.shutdown.set()
    await running


async def single(callers: int, seconds: int) -> None:
    _, queries = await connect(callers)
    count = 0
    began = time.perf_counter()

    async def caller() -> None:
        nonlocal count
        while time.perf_counter() < began + seconds:
            await queries.enqueue("noop", PAYLOAD)
            count += 1

    await asyncio.gather(*(caller() for _ in range(callers)))
    print(json.dumps({"rate": count / (time.perf_counter() - began)}))


async def batch(total: int) -> None:
    _, queries = await connect(4)
    print(json.dumps({"rate": total / await preload(queries, total)}))


async def start(rate: int, seconds: int) -> None:
    """From the call that adds a job to the first line of its entrypoint."""
    _, queries = await connect(20)
    taken: list[float] = []
    manager = QueueManager(queries)

    @manager.entrypoint("noop")
    async def noop(job: Job) -> None:
        taken.append(time.perf_counter() - float(job.payload or b"0"))

    running = asyncio.create_task(manager.run(batch_size=100))
    await asyncio.sleep(1)
    total, sending = rate * seconds, set()
    began = time.perf_counter()
    for n in range(total):
        await asyncio.sleep(max(0.0, began + n / rate - time.perf_counter()))
        task = asyncio.create_task(queries.enqueue("noop", str(time.perf_counter()).encode()))
        sending.add(task)
        task.add_done_callback(sending.discard)
    deadline = time.perf_counter() + 20
    while len(taken) < total and time.perf_counter() < deadline:
        await asyncio.sleep(0.02)
    taken.sort()
    at = lambda share: taken[int((len(taken) - 1) * share)] * 1e3
    print(json.dumps({"p50": at(0.5), "p99": at(0.99), "started": len(taken), "of": total}))
    manager.shutdown.set()
    await running


logging.disable(logging.WARNING)
what, *numbers = sys.argv[1:]
uvloop.run({"drain": drain, "single": single, "batch": batch, "start": start}[what](*map(int, numbers)))
