//! Random input for the decoders and the conversation of the crate `zcproto`, without the tools of a nightly compiler.
//!
//! A target runs on one input and panics if an invariant is broken. Inputs are mutations of the bytes in `spec/vectors`, all
//! from one seed: a run with the same seed has the same inputs. Each target also counts what it allocates, so that a bound
//! on memory and the absence of leaks are invariants, too.

pub mod memory;
pub mod random;
pub mod targets;

use random::Random;
use std::path::Path;

/// A target: runs on random input made from a corpus.
pub type Target = fn(&mut Random, &Corpus);

/// The targets by name.
pub const TARGETS: [(&str, Target); 3] =
    [("body", targets::body), ("frames", targets::frames), ("conversation", targets::conversation)];

/// Inputs to begin with.
pub struct Corpus {
    /// Frames, one or more in each.
    pub frames: Vec<Vec<u8>>,
    /// Bodies of frames.
    pub bodies: Vec<Vec<u8>>,
}

impl Corpus {
    /// Read the vectors of the specification.
    ///
    /// # Panics
    ///
    /// If they cannot be read.
    #[must_use]
    pub fn of_vectors() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../spec/vectors");
        let mut frames = Vec::new();
        for name in ["frames", "bodies", "bodies-invalid", "streams", "segments", "streaming/items", "streaming/calls"]
        {
            let text = std::fs::read_to_string(folder.join(format!("{name}.json"))).expect("the vectors can be read");
            let file: serde_json::Value = serde_json::from_str(&text).expect("the vectors are JSON");
            let vectors = file["vectors"].as_array().expect("the file has vectors");
            frames.extend(vectors.iter().filter_map(|vector| from_hex(vector["bytes"].as_str()?)));
        }
        let bodies = frames.iter().filter_map(|frame| frame.get(68..)).filter(|body| body.len() < 4096);
        Self { bodies: bodies.map(<[u8]>::to_vec).collect(), frames }
    }
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

/// Run a target on one input. After it, all memory that it has allocated must be free again.
///
/// # Panics
///
/// If an invariant is broken.
pub fn run_once(target: Target, seed: u64, corpus: &Corpus) {
    let before = memory::live();
    target(&mut Random::new(seed), corpus);
    assert_eq!(memory::live(), before, "memory leaks");
}
