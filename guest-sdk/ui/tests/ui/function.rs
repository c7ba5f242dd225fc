//! What a task function must not be.
#![allow(unused)]

use sandbar_guest::{Context, TaskError, task};

#[task]
async fn waits(text: String) -> Result<String, TaskError> {
    Ok(text)
}

#[task]
fn generic<T>(value: T) {}

struct Counter;

impl Counter {
    #[task]
    fn method(&self, text: String) {}
}

#[task]
fn two_inputs(left: u32, right: u32) -> u32 {
    left + right
}

#[task]
fn three(ctx: &Context, left: u32, right: u32) -> u32 {
    left + right
}

#[task]
fn borrows(text: &str) {}

#[task]
fn picture(bytes: Vec<u8>) -> usize {
    bytes.len()
}

#[task]
fn draws() -> Result<Vec<u8>, TaskError> {
    Ok(Vec::new())
}

#[task]
fn Shouting() {}

fn main() {}
