//! Runs `zcproto serve` of this repository as a process.
#![allow(dead_code, reason = "each program of tests uses a part of it")]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use zcproto::{Client, ConnectOptions, Result};

/// The timeout of clients, which no test waits for: a busy machine may take long.
pub const TIMEOUT: Duration = Duration::from_secs(300);

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A server with a home folder of its own, which is removed with it.
pub struct Server {
    pub home: PathBuf,
    process: Option<Child>,
    port: u16,
}

/// Return the folder of the repository.
pub fn root() -> PathBuf {
    let mut folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    folders.find(|folder| folder.join("spec/zcp1.md").exists()).expect("these tests run in a clone").to_owned()
}

/// Return a command of the Python that has zcproto: ZCPROTO_PYTHON, that of the repository's environment, or the system's.
fn python(home: &Path) -> Command {
    let local = root().join(".venv/bin/python");
    let configured = std::env::var_os("ZCPROTO_PYTHON").map(PathBuf::from);
    let python = configured.unwrap_or_else(|| if local.exists() { local } else { "python3".into() });
    let mut command = Command::new(python);
    command.env("PYTHONPATH", root()).args(["-m", "zcproto", "--home"]).arg(home).current_dir(home);
    command
}

impl Server {
    /// Make a server with more settings, which is not started.
    pub fn new(config: &str) -> Self {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let home = std::env::temp_dir().join(format!("zcproto-rust-{}-{number}", std::process::id()));
        std::fs::create_dir(&home).unwrap();
        let server = Self { home, process: None, port: 0 };
        // RSA keys take seconds to generate.
        server.write("config.toml", &format!("[certificates]\nkey_types = [\"ecdsa-p256\"]\n{config}"));
        server
    }

    /// Write a private file into the home folder.
    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.home.join(name);
        std::fs::write(&path, content).unwrap();
        set_mode(&path, 0o600);
        path
    }

    /// Run a command and return its output.
    pub fn run(&self, command: &[&str]) -> String {
        let output = python(&self.home).args(command).output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Add a user and return its key.
    pub fn add_user(&self, name: &str) -> String {
        self.run(&["user", "add", name])
    }

    /// Start the server, on the same port as before.
    pub fn start(&mut self, app: Option<&str>) {
        let mut command = python(&self.home);
        command.args(["serve", "--port", &self.port.to_string()]).args(app);
        let log = std::fs::OpenOptions::new().append(true).create(true).open(self.home.join("log")).unwrap();
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        let port = line.trim().strip_prefix("zcproto: listening on ").and_then(|text| text.rsplit(':').next());
        self.port = port.and_then(|port| port.parse().ok()).unwrap_or_else(|| {
            panic!("the server did not start: {line}\n{}", self.log());
        });
        std::thread::spawn(move || lines.read_to_end(&mut Vec::new()));
        self.process = Some(child);
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.home.join("log")).unwrap_or_default()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn address(&self) -> String {
        format!("localhost:{}", self.port)
    }

    pub fn ca_file(&self) -> PathBuf {
        self.home.join("certs/ca.crt")
    }

    /// Return options with an address and a home folder for clients, without trust.
    pub fn options_at(&self, address: impl Into<String>) -> ConnectOptions {
        ConnectOptions::new(address).home(self.home.join("client")).timeout(TIMEOUT).connect_timeout(TIMEOUT)
    }

    /// Return options with the address of the server, without trust.
    pub fn untrusted(&self) -> ConnectOptions {
        self.options_at(self.address())
    }

    /// Return options that trust the server's CA.
    pub fn options(&self) -> ConnectOptions {
        self.untrusted().ca_file(self.ca_file())
    }

    pub async fn connect(&self, user: &str, key: &str) -> Result<Client> {
        Client::connect(self.options().api_key(user, key)).await
    }

    /// Stop the server by SIGTERM, and return a function that waits for its exit.
    pub fn stop(&mut self) -> impl FnOnce() + Send + 'static {
        let mut child = self.process.take().unwrap();
        Command::new("kill").arg(child.id().to_string()).status().unwrap();
        move || drop(child.wait())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(child) = &mut self.process {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.home);
    }
}

/// Change the mode of a file.
pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}
