//! A short run of each target, always with the same inputs.

use zcproto_fuzz::{Corpus, TARGETS, run_once};

#[test]
fn targets_hold_their_invariants() {
    let corpus = Corpus::of_vectors();
    for (name, target) in TARGETS {
        let runs = if name == "conversation" { 3_000 } else { 20_000 };
        for seed in 0..runs {
            run_once(target, seed, &corpus);
        }
    }
}
