//! Every example does what its README says: built from its own sources, pushed and invoked through HTTP on a real
//! deployment, on a real input, and judged by somebody else (another program, or another library than the example's).

mod clients;
mod documents;
mod tables;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::support::{self, Client, Deployment};

/// Longest compilation of an example, on a machine with much else to do.
const COMPILE: Duration = Duration::from_secs(300);
/// Longest way of an invocation to its end, in addition to the 30 s of one answer.
const RUN: Duration = Duration::from_secs(120);

/// A pseudo-random sequence, the same on every machine.
struct Sequence(u64);

impl Sequence {
    /// A number below `end`, equally often each.
    fn below(&mut self, end: u64) -> u64 {
        // Knuth's MMIX; the high bits are the good ones.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// A file of an example.
fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(path)
}

/// A server and a worker that leave compilations more time than the default: other tests may keep the processors busy.
/// Their limit of CPU time stays as it is.
async fn patient(settings: &[(&'static str, String)]) -> Deployment {
    let mut all = vec![("SANDBAR_COMPILE__WALL_MS", COMPILE.as_millis().to_string())];
    all.extend_from_slice(settings);
    Deployment::on(support::database().await, 1, &all).await
}

/// Uploads a module and waits until it can run; returns the version.
async fn push(client: &Client, task: &str, module: &Path) -> Value {
    let uploaded = client.upload(task, module).await.expect(201).json();
    let path = format!("/v1/tasks/{task}/versions/{}", uploaded["version"]);
    support::eventually(COMPILE, "a module to be compiled", async || {
        let version = client.get(&path).await.expect(200).json();
        assert_ne!(version["state"], "rejected", "{version:#}");
        (version["state"] == "ready").then_some(version)
    })
    .await
}

/// A deployment with one example on it, by the name of its directory.
async fn deployed(example: &str) -> (Deployment, Client) {
    let deployment = patient(&[]).await;
    let client = deployment.client();
    push(&client, example, &support::guest(example)).await;
    (deployment, client)
}

/// The end of an invocation, however it went. On a busy machine it may take longer than one answer waits.
async fn end(client: &Client, task: &str, body: &Value) -> Value {
    let answer = client.invoke(task, body).await;
    assert!([200, 202].contains(&answer.status.as_u16()), "{}", answer.text());
    let path = answer.json()["links"]["self"].as_str().unwrap().to_owned();
    support::eventually(RUN, "an invocation to end", async || {
        let invocation = client.get(&path).await.expect(200).json();
        let open = ["scheduled", "queued", "running"].iter().any(|state| invocation["state"] == **state);
        (!open).then_some(invocation)
    })
    .await
}

/// Invokes, waits for success, and returns the invocation and its result with the media type.
async fn succeed(client: &Client, task: &str, body: &Value) -> (Value, String, Vec<u8>) {
    let ended = end(client, task, body).await;
    assert_eq!(ended["state"], "succeeded", "{ended:#}");
    let result = client.get(ended["links"]["result"].as_str().unwrap()).await.expect(200);
    let media_type = result.headers["content-type"].to_str().unwrap().to_owned();
    (ended, media_type, result.body)
}

/// The output of another program on `stdin`.
fn program(command: &mut Command, stdin: &[u8]) -> Vec<u8> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut pipe = child.stdin.take().unwrap();
    let input = stdin.to_vec();
    // Beside reading, or both sides may wait for the other.
    let writer = std::thread::spawn(move || pipe.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// What the independent judgement in `oracle.py` says of `stdin`.
fn oracle(what: &str, stdin: &[u8]) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/examples/oracle.py");
    let output = program(Command::new("python3").arg(script).arg(what), stdin);
    serde_json::from_slice(&output).unwrap()
}

/// Several megabytes of sentences: some words often, most of them rarely, as in any language.
fn text(bytes: usize) -> String {
    const SYLLABLES: [&str; 16] =
        ["ba", "co", "de", "fi", "gu", "ha", "li", "mo", "nu", "pe", "ra", "si", "to", "va", "we", "yo"];
    let mut random = Sequence(1);
    let mut text = String::with_capacity(bytes + 100);
    let mut words = 0_u64;
    while text.len() < bytes {
        // The lower of several draws: the first words of the vocabulary come most often.
        let mut word = (0..4).map(|_| random.below(40_000)).min().unwrap();
        let start = words.is_multiple_of(11);
        let from = text.len();
        loop {
            text.push_str(SYLLABLES[usize::try_from(word % 16).unwrap()]);
            word /= 16;
            if word == 0 {
                break;
            }
        }
        if start {
            text[from..=from].make_ascii_uppercase();
        }
        text.push_str(match (words % 11, random.below(40)) {
            (10, 0..10) => ".\n\n",
            (10, 10..20) => "!\n",
            (10, _) => ". ",
            (_, 0) => "'s ",
            (_, 1) => ", ",
            (_, 2) => " -- ",
            (_, 3) => " 1984 ",
            _ => " ",
        });
        words += 1;
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn word_count_agrees_with_grep_sort_and_uniq_on_four_megabytes() {
    const TOP: usize = 500;
    let (_deployment, client) = deployed("word-count").await;
    // In JSON every line break takes a byte more; together they stay below the default limit of 4 MiB.
    let text = text(4_000_000);
    let body = json!({"input": {"text": text, "top": TOP}});
    let (ended, media_type, result) = succeed(&client, "word-count", &body).await;
    assert_eq!(media_type, "application/json");
    assert!(ended["attempts"][0]["receipt"]["input_bytes"].as_u64().unwrap() > 4_000_000, "{ended:#}");

    let script = r#"set -o pipefail; grep -oE "[[:alnum:]]+('[[:alnum:]]+)*" | tr '[:upper:]' '[:lower:]' | sort | uniq -c | sort -k1,1nr -k2,2"#;
    let counted = program(Command::new("bash").args(["-c", script]).env("LC_ALL", "C"), text.as_bytes());
    let counted = String::from_utf8(counted).unwrap();
    let counted: Vec<(u64, &str)> = counted
        .lines()
        .map(|line| line.trim().split_once(' ').unwrap())
        .map(|(count, word)| (count.parse().unwrap(), word))
        .collect();
    assert!(counted.len() > 10_000, "a text of few words proves little");

    let result: Value = serde_json::from_slice(&result).unwrap();
    assert_eq!(result["total"], counted.iter().map(|(count, _)| count).sum::<u64>());
    assert_eq!(result["distinct"], counted.len());
    let top: Vec<Value> =
        counted[..TOP].iter().map(|(count, word)| json!({"word": word, "count": count})).collect();
    assert_eq!(result["top"], json!(top));
}

/// A decoded picture in RGB.
struct Picture {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Picture {
    /// Decoded by another library than the one in the example.
    fn of(jpeg: &[u8]) -> Self {
        let mut decoder = jpeg_decoder::Decoder::new(jpeg);
        let pixels = decoder.decode().expect("a JPEG");
        let info = decoder.info().unwrap();
        assert_eq!(info.pixel_format, jpeg_decoder::PixelFormat::RGB24);
        Self { width: info.width.into(), height: info.height.into(), pixels }
    }

    fn at(&self, x: usize, y: usize, channel: usize) -> u8 {
        self.pixels[(y * self.width + x) * 3 + channel]
    }

    /// Scaled down by the mean of what each new pixel covers, and turned so that the top becomes the right edge.
    fn thumbnail(&self, width: usize, height: usize, turned: bool) -> Self {
        let (w, h) = if turned { (height, width) } else { (width, height) };
        let mean = |x: usize, y: usize, channel: usize| {
            let (from_x, to_x) = (x * self.width / w, ((x + 1) * self.width).div_ceil(w));
            let (from_y, to_y) = (y * self.height / h, ((y + 1) * self.height).div_ceil(h));
            let covered = (from_y..to_y).flat_map(|y| (from_x..to_x).map(move |x| (x, y)));
            let (sum, n) = covered
                .fold((0_usize, 0), |(sum, n), (x, y)| (sum + usize::from(self.at(x, y, channel)), n + 1));
            u8::try_from(sum / n).unwrap()
        };
        let mut pixels = Vec::new();
        for y in 0..height {
            for x in 0..width {
                let (from_x, from_y) = if turned { (y, h - 1 - x) } else { (x, y) };
                pixels.extend((0..3).map(|channel| mean(from_x, from_y, channel)));
            }
        }
        Self { width, height, pixels }
    }

    /// The mean difference of two pictures of one size, of 255.
    fn difference(&self, other: &Self) -> f64 {
        assert_eq!((self.width, self.height), (other.width, other.height));
        let sum: u64 = self.pixels.iter().zip(&other.pixels).map(|(a, b)| u64::from(a.abs_diff(*b))).sum();
        sum as f64 / self.pixels.len() as f64
    }
}

/// The same JPEG with an EXIF block that says how the camera was held.
fn with_orientation(jpeg: &[u8], orientation: u8) -> Vec<u8> {
    let mut exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0".to_vec();
    exif.extend_from_slice(&[0x12, 0x01, 3, 0, 1, 0, 0, 0, orientation, 0, 0, 0, 0, 0, 0, 0]);
    let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
    [&jpeg[..2], &[0xff, 0xe1], &length[..], &exif, &jpeg[2..]].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thumbnail_is_the_photograph_only_smaller_and_upright() {
    let (_deployment, client) = deployed("thumbnail").await;
    let photo = std::fs::read(file("thumbnail/photo.jpg")).unwrap();
    let original = Picture::of(&photo);
    assert_eq!((original.width, original.height), (640, 427));
    for (file, edge, width, height, turned) in [
        (photo.clone(), 160, 160, 107, false),
        (photo.clone(), 320, 320, 214, false),
        (with_orientation(&photo, 6), 160, 107, 160, true),
    ] {
        let body = json!({"input": {"photo": STANDARD.encode(&file), "edge": edge}});
        let (_, media_type, jpeg) = succeed(&client, "thumbnail", &body).await;
        assert_eq!(media_type, "image/jpeg");
        let thumbnail = Picture::of(&jpeg);
        assert_eq!((thumbnail.width, thumbnail.height), (width, height));
        let expected = original.thumbnail(width, height, turned);
        let difference = thumbnail.difference(&expected);
        assert!(difference < 5.0, "{difference} of 255 at {edge}");
        // Upside down it would be another picture.
        let mut wrong = expected;
        wrong.pixels.reverse();
        assert!(thumbnail.difference(&wrong) > 20.0, "the measure sees no difference");
    }

    let cut = STANDARD.encode(&photo[..300]);
    let ended = end(&client, "thumbnail", &json!({"input": {"photo": cut}})).await;
    assert_eq!(ended["state"], "dead", "{ended:#}");
    assert_eq!(ended["attempts"][0]["termination"]["retryable"], false, "{ended:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_import_fails_twice_succeeds_and_says_what_it_did() {
    let (_deployment, client) = deployed("order-import").await;
    let orders: Vec<Value> = (1..=20).map(|n| json!({"id": format!("A-{n:03}"), "cents": n * 250})).collect();
    let body = json!({"input": {"orders": orders, "outage": {"attempts": 2, "retry_after_ms": 50}}});
    let (ended, _, result) = succeed(&client, "order-import", &body).await;
    let attempts = ended["attempts"].as_array().unwrap();
    let ends: Vec<Value> = attempts.iter().map(|attempt| attempt["termination"].clone()).collect();
    let down = json!({"reason": "guest-error", "retryable": true, "message": "the supplier answered 503", "retry_after_ms": 50});
    assert_eq!(ends, [down.clone(), down, json!({"reason": "succeeded"})]);

    let result: Value = serde_json::from_slice(&result).unwrap();
    assert_eq!(result["cents"], (1..=20).map(|n| n * 250).sum::<i32>());
    assert_eq!(result["attempt"], 3);
    assert_eq!(result["keys"][19], format!("{}/A-020", ended["id"].as_str().unwrap()));

    // What it reported last stays; of an attempt this short it may come just after the end.
    let this = ended["links"]["self"].as_str().unwrap();
    support::eventually(Duration::from_secs(30), "the last report", async || {
        let now = client.get(this).await.expect(200).json();
        let progress = &now["progress"];
        let reported = [&progress["attempt"], &progress["done"], &progress["total"], &progress["message"]];
        (reported == [&json!(3), &json!(20), &json!(20), &json!("A-020")]).then_some(())
    })
    .await;

    let log = client.get(ended["links"]["logs"].as_str().unwrap()).await.expect(200).json();
    let said: Vec<(i64, &str)> = log["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|record| (record["attempt"].as_i64().unwrap(), record["message"].as_str().unwrap()))
        .collect();
    let mut expected = vec![
        (1, "asking the supplier"),
        (1, "the supplier is down"),
        (2, "asking the supplier"),
        (2, "the supplier is down"),
        (3, "asking the supplier"),
    ];
    expected.extend([(3, "booked")].repeat(20));
    expected.push((3, "imported"));
    assert_eq!(said, expected);

    let free = json!({"input": {"orders": [{"id": "B-1", "cents": 0}]}});
    let ended = end(&client, "order-import", &free).await;
    assert_eq!(
        (&ended["state"], ended["attempts"].as_array().unwrap().len()),
        (&json!("dead"), 1),
        "{ended:#}"
    );
}
