//! What the attribute refuses.

use sandbar_guest::task;

#[task(nam = "resize")]
fn unknown() {}

#[task(name = "a", name = "b")]
fn twice() {}

#[task(limits(memory = "64 potatoes"))]
fn unit() {}

#[task(limits(timeout = 30))]
fn no_unit() {}

#[task(limits(fuel = 0))]
fn nothing() {}

#[task(limits(cpu = 1))]
fn no_such_limit() {}

#[task(retry(max_attempts = 0))]
fn never() {}

#[task(retry(jitter = 2))]
fn jitter() {}

#[task(grants(disk))]
fn no_such_grant() {}

#[task(grants(http = ["https://example.com/path"]))]
fn path() {}

#[task(log = "loud")]
fn loud() {}

fn main() {}
