//! What the derive refuses.

use sandbar_guest::Schema;

#[derive(Schema)]
struct Flat {
    #[serde(flatten)]
    rest: Vec<u8>,
}

#[derive(Schema)]
struct With {
    #[serde(with = "elsewhere")]
    date: u64,
}

#[derive(Schema)]
#[schema(like = u8)]
struct Like(u8);

#[derive(Schema)]
enum Nothing {}

fn main() {}
