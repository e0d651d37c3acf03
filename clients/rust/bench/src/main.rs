//! Compares the CPU that a call costs this client and tonic: the same echo over TLS 1.3 and one connection.
//!
//! ```sh
//! cargo run --release            # starts `zcproto serve` and a server of tonic, and prints a table
//! ```
//!
//! Each client is a process of its own with one thread, so that its CPU time can be read apart from that of its server. The time
//! in the kernel is shown apart: both clients make the same three system calls for a call with one in flight, which no library
//! can spare, so only the user time compares what the libraries do.

mod grpc;

use serde::{Deserialize, Serialize};
use std::future::Future;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use zcproto::{Client, ConnectOptions};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const CONCURRENT: [usize; 2] = [1, 16];
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(3);
const TEXT: &str = "a text of some length, as in many calls";

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments[..] {
        [] => compare(),
        ["zcproto", address, ca, key, concurrent] => {
            runtime.block_on(zcproto_client(address, ca, key, concurrent.parse()?))
        }
        ["tonic", address, ca, concurrent] => runtime.block_on(tonic_client(address, ca, concurrent.parse()?)),
        ["tonic-server", certificate, key] => runtime.block_on(grpc::serve(certificate, key)),
        _ => Err("usage: zcproto-bench".into()),
    }
}

/// The message, as tonic's in `grpc.rs`.
#[derive(Serialize, Deserialize)]
struct Echo {
    text: String,
}

// --- clients -------------------------------------------------------------------------------------

async fn zcproto_client(address: &str, ca: &str, key: &str, concurrent: usize) -> Result<(), Failure> {
    let client = Client::connect(ConnectOptions::new(address).ca_file(ca).api_key("ada", key)).await?;
    let caller = client.clone();
    let measured = measure(concurrent, move || {
        let client = caller.clone();
        async move {
            let answer: Echo = client.call("echo", &Echo { text: TEXT.to_owned() }).await?;
            assert_eq!(answer.text, TEXT);
            Ok(())
        }
    });
    println!("{}", measured.await?);
    client.close().await;
    Ok(())
}

async fn tonic_client(address: &str, ca: &str, concurrent: usize) -> Result<(), Failure> {
    let channel = grpc::connect(address, ca).await?;
    let measured = measure(concurrent, move || {
        let channel = channel.clone();
        async move {
            assert_eq!(grpc::echo(channel, TEXT).await?, TEXT);
            Ok(())
        }
    });
    println!("{}", measured.await?);
    Ok(())
}

/// Make calls for a time, some at once, each in a task of its own. Return calls per second, and the microseconds of user and of
/// system time per call.
async fn measure<F, R>(concurrent: usize, call: F) -> Result<String, Failure>
where
    F: Fn() -> R + Clone + Send + 'static,
    R: Future<Output = Result<(), Failure>> + Send,
{
    let run = async |time: Duration| -> Result<u64, Failure> {
        let end = Instant::now() + time;
        let tasks: Vec<_> = (0..concurrent)
            .map(|_| {
                let call = call.clone();
                tokio::spawn(async move {
                    let mut calls = 0;
                    while Instant::now() < end {
                        call().await?;
                        calls += 1;
                    }
                    Ok::<u64, Failure>(calls)
                })
            })
            .collect();
        let mut calls = 0;
        for task in tasks {
            calls += task.await??;
        }
        Ok(calls)
    };
    run(Duration::from_millis(500)).await?; // warm
    let (started, [user, system]) = (Instant::now(), cpu_times());
    let calls = run(ROUND).await?;
    #[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
    let count = calls as f64;
    let rate = count / started.elapsed().as_secs_f64();
    let [user_now, system_now] = cpu_times();
    let per_call = |ticks: u64| to_microseconds(ticks) / count;
    Ok(format!("{rate:.0} {:.2} {:.2}", per_call(user_now - user), per_call(system_now - system)))
}

/// Return the user and the system time of this process, in ticks of the clock: `utime` and `stime` of proc(5).
fn cpu_times() -> [u64; 2] {
    let text = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let (_, fields) = text.rsplit_once(") ").expect("the name of the program in parentheses");
    let mut fields = fields.split(' ').skip(11).map(|field| field.parse().expect("a number"));
    [fields.next().expect("utime"), fields.next().expect("stime")]
}

/// Linux reports times in ticks of 10 ms on all usual platforms: a hundredth of what a round takes.
#[allow(clippy::cast_precision_loss, reason = "far below 2^53")]
fn to_microseconds(ticks: u64) -> f64 {
    ticks as f64 * 10_000.0
}

// --- the comparison ------------------------------------------------------------------------------

/// A process that is killed with it.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Start a server, and return its first line, which names its address.
fn start(command: &mut Command) -> Result<(Server, String), Failure> {
    let mut server = Server(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?);
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let port = line.trim().rsplit(':').next().unwrap_or_default();
    Ok((server, format!("localhost:{port}")))
}

fn python(home: &Path) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..");
    let local = root.join(".venv/bin/python");
    let configured = std::env::var_os("ZCPROTO_PYTHON").map(PathBuf::from);
    let mut command = Command::new(configured.unwrap_or_else(|| if local.exists() { local } else { "python3".into() }));
    command.env("PYTHONPATH", root).args(["-m", "zcproto", "--home"]).arg(home);
    command
}

fn compare() -> Result<(), Failure> {
    let home = std::env::temp_dir().join(format!("zcproto-bench-{}", std::process::id()));
    std::fs::create_dir(&home)?;
    let result = compare_in(&home);
    std::fs::remove_dir_all(&home)?;
    result
}

fn compare_in(home: &Path) -> Result<(), Failure> {
    std::fs::write(home.join("config.toml"), "[certificates]\nkey_types = [\"ecdsa-p256\"]\n")?;
    let key = String::from_utf8(python(home).args(["user", "add", "ada"]).output()?.stdout)?;
    let (_zcproto, address) = start(python(home).args(["serve", "--port", "0"]))?;
    let me = std::env::current_exe()?;
    let certs = home.join("certs");
    let [certificate, private_key] = server_files(&certs)?;
    let (_tonic, grpc_address) = start(Command::new(&me).arg("tonic-server").args([&certificate, &private_key]))?;
    let ca = certs.join("ca.crt");
    println!("| calls at once | client | calls/s | CPU per call | user | system |\n|---|---|---|---|---|---|");
    for concurrent in CONCURRENT {
        let mut rounds = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            let concurrent = concurrent.to_string();
            let mut mine = Command::new(&me);
            mine.args(["zcproto", &address]).arg(&ca).args([key.trim(), &concurrent]);
            let mut other = Command::new(&me);
            other.args(["tonic", &grpc_address]).arg(&ca).arg(&concurrent);
            for (command, found) in [mine, other].iter_mut().zip(&mut rounds) {
                found.push(figures(command)?);
            }
        }
        let [mine, other] = rounds.map(median);
        for (name, Figures { rate, user, system }) in [("zcproto", mine), ("tonic", other)] {
            let cpu = user + system;
            println!("| {concurrent} | {name} | {rate:.0} | {cpu:.1} µs | {user:.1} µs | {system:.1} µs |");
        }
        let [rate, user, system] = [mine.rate / other.rate, mine.user / other.user, mine.system / other.system];
        let cpu = (mine.user + mine.system) / (other.user + other.system);
        println!("| {concurrent} | ratio | {rate:.2} | {cpu:.2} | {user:.2} | {system:.2} |");
    }
    Ok(())
}

/// Return the chain and the key that `zcproto serve` has made for itself.
fn server_files(certs: &Path) -> Result<[PathBuf; 2], Failure> {
    let mut found = [None, None];
    for entry in std::fs::read_dir(certs)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("server") && name.ends_with(".crt") {
            found[0] = Some(path);
        } else if name.starts_with("server") && name.ends_with(".key") {
            found[1] = Some(path);
        }
    }
    match found {
        [Some(certificate), Some(key)] => Ok([certificate, key]),
        _ => Err(format!("{} has no certificate of the server", certs.display()).into()),
    }
}

/// Calls per second, and the microseconds of user and of system time per call.
#[derive(Clone, Copy)]
struct Figures {
    rate: f64,
    user: f64,
    system: f64,
}

fn figures(command: &mut Command) -> Result<Figures, Failure> {
    let output = command.stderr(Stdio::inherit()).output()?;
    let text = String::from_utf8(output.stdout)?;
    let numbers: Vec<f64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [rate, user, system] = numbers[..] else { return Err("a client failed".into()) };
    Ok(Figures { rate, user, system })
}

fn median(rounds: Vec<Figures>) -> Figures {
    let middle = |of: fn(&Figures) -> f64| {
        let mut numbers: Vec<_> = rounds.iter().map(of).collect();
        numbers.sort_by(f64::total_cmp);
        numbers[numbers.len() / 2]
    };
    Figures { rate: middle(|each| each.rate), user: middle(|each| each.user), system: middle(|each| each.system) }
}
