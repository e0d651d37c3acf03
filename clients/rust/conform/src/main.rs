//! The program through which the conformance kit drives this client:
//!
//!     zcproto-conformance target/debug/zcproto-conform

use serde_json::Value as Json;
use std::io::{self, BufRead, Write};
use std::sync::Arc;
use tokio::sync::mpsc;
use zcproto_conform::steps::Conform;

const MAX_LINE: usize = 8 * 1024 * 1024; // bytes

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let (lines, mut steps) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            assert!(line.len() <= MAX_LINE, "a line has more than 8 MiB");
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let conform = Arc::new(Conform::default());
    while let Some(line) = steps.recv().await {
        let step: Json = serde_json::from_str(&line).expect("a line is JSON");
        let conform = Arc::clone(&conform);
        tokio::spawn(async move {
            let mut answer = conform.run(&step).await;
            answer["id"] = step["id"].clone();
            let mut output = io::stdout().lock();
            writeln!(output, "{answer}").and_then(|()| output.flush()).expect("standard output is open");
        });
    }
    conform.close().await;
}
