//! Run a target for some time:
//!
//!     cargo run --release -p zcproto-fuzz -- body|frames|conversation [SECONDS] [SEED]
//!
//! Without a seed the run begins at the time of day. A failure prints the seed of its input, with which
//! `zcproto-fuzz TARGET 0 SEED` repeats it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use zcproto_fuzz::{Corpus, TARGETS, run_once};

/// How long one input can take before it counts as a hang.
const HANG: Duration = Duration::from_secs(20);

static SEED: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let target = arguments.first().and_then(|name| TARGETS.iter().find(|(known, _)| known == name));
    let number = |index: usize| arguments.get(index).map(|text| text.parse::<u64>());
    let (Some((name, target)), Ok(seconds), Ok(seed)) = (target, number(1).transpose(), number(2).transpose()) else {
        eprintln!("usage: zcproto-fuzz {} [SECONDS] [SEED]", TARGETS.map(|(name, _)| name).join("|"));
        return ExitCode::from(2);
    };
    let first = seed.unwrap_or_else(|| {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        time.as_secs() << 32
    });
    std::thread::spawn(watch);
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        eprintln!("the input has seed {}", SEED.load(Ordering::Relaxed));
    }));
    let corpus = Corpus::of_vectors();
    let started = Instant::now();
    let limit = Duration::from_secs(seconds.unwrap_or(10));
    let mut runs = 0_u64;
    loop {
        SEED.store(first.wrapping_add(runs), Ordering::Relaxed);
        run_once(*target, first.wrapping_add(runs), &corpus);
        runs += 1;
        if started.elapsed() >= limit {
            break;
        }
    }
    println!("{name}: {runs} inputs from seed {first} in {:.1} s, no fault", started.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}

/// Abort if an input takes too long.
fn watch() {
    let mut before = u64::MAX;
    loop {
        let seed = SEED.load(Ordering::Relaxed);
        if seed == before {
            eprintln!("the input with seed {seed} hangs");
            std::process::abort();
        }
        before = seed;
        std::thread::sleep(HANG);
    }
}
