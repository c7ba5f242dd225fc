// graphile-worker does what Sandbar does in the same table: `drain`, `single`, `batch`, `start`.
// Reaches Postgres by the PG* variables. Prints one JSON object.
import { run, makeWorkerUtils } from "graphile-worker";
import pg from "pg";

const [what, ...numbers] = process.argv.slice(2);
const quiet = () => () => {};
const { Logger } = await import("graphile-worker");
const logger = new Logger(quiet);
const payload = (n) => ({ n, pad: "x".repeat(80) });
const say = (object) => console.log(JSON.stringify(object));
const pool = (max) => {
  const made = new pg.Pool({ max });
  made.on("error", () => {});
  return made;
};
const utils = async (max) => {
  const made = await makeWorkerUtils({ pgPool: pool(max), preset: { worker: { logger } } });
  await made.migrate();
  return made;
};

/** Adds in batches of a thousand, two at a time, as fast as it goes. */
async function preload(total, made) {
  let left = total;
  const lane = async () => {
    while (left > 0) {
      const size = Math.min(1000, left);
      left -= size;
      await made.addJobs(Array.from({ length: size }, (_, n) => ({ identifier: "noop", payload: payload(n) })));
    }
  };
  const began = performance.now();
  await Promise.all([lane(), lane()]);
  return (performance.now() - began) / 1e3;
}

async function drain(total, localQueue, concurrentJobs) {
  const made = await utils(4);
  await preload(total, made);
  const client = pool(1);
  await client.query("CHECKPOINT");
  let first = 0;
  const runner = await run({
    pgPool: pool(20),
    preset: {
      worker: {
        logger,
        concurrentJobs,
        localQueue: { size: localQueue },
        completeJobBatchDelay: 0,
        failJobBatchDelay: 0,
      },
    },
    noHandleSignals: true,
    taskList: { noop: () => { first ||= performance.now(); } },
  });
  for (;;) {
    const { rows } = await client.query("SELECT EXISTS (SELECT 1 FROM graphile_worker._private_jobs) AS more");
    if (!rows[0].more) break;
    await new Promise((done) => setTimeout(done, 10));
  }
  const seconds = (performance.now() - first) / 1e3;
  say({ rate: total / seconds });
  await runner.stop();
}

/** Callers that each add one job at a time. */
async function single(callers, seconds) {
  const made = await utils(callers);
  const until = performance.now() + seconds * 1e3;
  let count = 0;
  const caller = async () => {
    while (performance.now() < until) {
      await made.addJob("noop", payload(count));
      count += 1;
    }
  };
  const began = performance.now();
  await Promise.all(Array.from({ length: callers }, caller));
  say({ rate: count / ((performance.now() - began) / 1e3) });
}

async function batch(total) {
  const made = await utils(4);
  say({ rate: total / (await preload(total, made)) });
}

/** From the call that adds a job to the first line of its task, unbatched: its quickest way. */
async function start(rate, seconds) {
  const made = await utils(8);
  const taken = [];
  const runner = await run({
    pgPool: pool(20),
    preset: { worker: { logger, concurrentJobs: 24 } },
    noHandleSignals: true,
    taskList: { noop: (input) => { taken.push(performance.now() - input.at); } },
  });
  const total = rate * seconds;
  const began = performance.now();
  for (let n = 0; n < total; ) {
    while (n < total && performance.now() >= began + (n * 1e3) / rate) {
      made.addJob("noop", { at: performance.now() });
      n += 1;
    }
    await new Promise((done) => setTimeout(done, 1));
  }
  const deadline = performance.now() + 20_000;
  while (taken.length < total && performance.now() < deadline) await new Promise((done) => setTimeout(done, 20));
  taken.sort((a, b) => a - b);
  const at = (share) => taken[Math.floor((taken.length - 1) * share)];
  say({ p50: at(0.5), p99: at(0.99), started: taken.length, of: total });
  await runner.stop();
}

await { drain, single, batch, start }[what](...numbers.map(Number));
process.exit(0);
