//! All integration tests in one binary, so that they link once and share one Postgres.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod api;
mod capabilities;
mod cells;
mod cli;
mod dev_command;
mod dev_postgres;
mod drain;
mod duties;
mod edge;
mod egress;
mod examples;
mod faults;
mod floods;
mod guests;
mod hostile;
mod house;
mod isolation;
mod languages;
mod placement;
mod programs;
mod queue;
mod sandbox;
mod sealed;
mod sim;
mod soak;
mod start;
mod support;
