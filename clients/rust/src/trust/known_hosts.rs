//! Hosts with an `sts` policy, which must not be connected to without verification until it ends (zcp1.md, section 6.2; RFC
//! 6797 for native clients).
//!
//! Rules: only verified connections set a policy; `max_age` 0 removes it; `include_subdomains` extends it to subdomains;
//! addresses have no policy. The file is JSON with mode 0600, shared with the clients in other languages and replaced
//! atomically. Its size is limited: the policies that end first are dropped. A file that cannot be parsed is an error, never
//! treated as empty.

use crate::error::{Error, Result, TlsError, TlsFailure};
use crate::message::StsPolicy;
use crate::text;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

pub(crate) const FILE_NAME: &str = "known_hosts.json";
pub(crate) const MAX_HOSTS: usize = 1_000;
const MAX_FILE_SIZE: u64 = 1_048_576;
const MAX_AGE_S: u64 = 10 * 365 * 86_400;
/// Each connection extends a policy; write the file only for larger changes.
const REWRITE_AFTER_S: i64 = 86_400;
/// The largest end of a policy, which clients in JavaScript share.
const MAX_UNTIL: i64 = (1 << 53) - 1;
/// Another process may overwrite an entry between reading and writing: read the file after writing it.
const MAX_WRITES: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Policy {
    /// The end in seconds since the Unix epoch.
    until: i64,
    include_subdomains: bool,
}

type Hosts = BTreeMap<String, Policy>;

/// The policies in one file. All methods access the disk. Times are in milliseconds since the Unix epoch.
#[derive(Clone, Debug)]
pub(crate) struct KnownHosts {
    path: PathBuf,
}

impl KnownHosts {
    pub(crate) fn new(home: &Path) -> Self {
        Self { path: home.join(FILE_NAME) }
    }

    /// Store the policy of a host with a verified connection.
    pub(crate) fn learn(&self, host: &str, sts: StsPolicy, wall: i64) -> Result<()> {
        if is_ip(host) {
            return Ok(());
        }
        let now = wall.div_euclid(1_000);
        let max_age = i64::try_from(sts.max_age.min(MAX_AGE_S)).unwrap_or(0);
        let policy = Policy { until: now.saturating_add(max_age), include_subdomains: sts.include_subdomains };
        for _ in 0..MAX_WRITES {
            let mut hosts = self.read()?;
            if is_known(hosts.get(host), policy, max_age, now) {
                return Ok(());
            }
            hosts.retain(|_, known| known.until > now);
            if max_age > 0 {
                hosts.insert(host.to_owned(), policy);
            } else {
                hosts.remove(host);
            }
            while hosts.len() > MAX_HOSTS {
                let first = hosts.iter().min_by_key(|(_, known)| known.until).map(|(name, _)| name.clone());
                first.and_then(|name| hosts.remove(&name));
            }
            self.write(&hosts).map_err(|error| self.unreadable(&error.kind().to_string()))?;
        }
        Ok(())
    }

    /// Refuse a connection without verification if a policy of the host forbids it.
    pub(crate) fn require(&self, host: &str, wall: i64) -> Result<()> {
        if is_ip(host) {
            return Ok(());
        }
        let refused = |detail: String| Error::Tls(TlsError::new(TlsFailure::StsPolicy, detail));
        let hosts = self.read().map_err(|error| refused(format!("verification cannot be disabled: {error}")))?;
        let now = wall.div_euclid(1_000);
        let mut name = host;
        loop {
            let is_host = name.len() == host.len();
            if let Some(known) =
                hosts.get(name).filter(|known| known.until > now && (is_host || known.include_subdomains))
            {
                let days = (known.until - now) / 86_400 + 1;
                return Err(refused(format!(
                    "{name} requires verified connections for {days} more days; enable verification (policy stored in {})",
                    text::path(&self.path)
                )));
            }
            match name.split_once('.') {
                Some((_, parent)) => name = parent,
                None => return Ok(()),
            }
        }
    }

    fn read(&self) -> Result<Hosts> {
        let mut content = Vec::new();
        let found = File::open(&self.path).and_then(|file| file.take(MAX_FILE_SIZE + 1).read_to_end(&mut content));
        match found {
            Ok(size) if size as u64 > MAX_FILE_SIZE => Err(self.unreadable("the file is too large")),
            Ok(_) => parse(&content).ok_or_else(|| self.unreadable("invalid content")),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Hosts::new()),
            Err(error) => Err(self.unreadable(&error.kind().to_string())),
        }
    }

    fn unreadable(&self, what: &str) -> Error {
        let path = text::path(&self.path);
        Error::Config(format!("{path}: {what}; repair the file, or remove it to forget its hosts"))
    }

    fn write(&self, hosts: &Hosts) -> std::io::Result<()> {
        let entry = |known: &Policy| json!({"until": known.until, "include_subdomains": known.include_subdomains});
        let entries: Map<String, Value> = hosts.iter().map(|(name, known)| (name.clone(), entry(known))).collect();
        let mut content = serde_json::to_vec_pretty(&json!({"hosts": entries}))?;
        content.push(b'\n');
        let folder = self.path.parent().unwrap_or(Path::new("."));
        create_folder(folder)?;
        let temporary = folder.join(format!(".{FILE_NAME}.{:016x}", crate::random::number()));
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        super::private_file::private(&mut options);
        let mut file = options.open(&temporary)?;
        file.write_all(&content)
            .and_then(|()| file.sync_all())
            .and_then(|()| std::fs::rename(&temporary, &self.path))
            .inspect_err(|_| drop(std::fs::remove_file(&temporary)))
    }
}

fn create_folder(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

fn is_ip(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok()
}

/// Return whether the stored policy is close enough to skip a write.
fn is_known(known: Option<&Policy>, policy: Policy, max_age: i64, now: i64) -> bool {
    let Some(known) = known else {
        return max_age == 0;
    };
    let is_near = (known.until - policy.until).abs() < REWRITE_AFTER_S.min((max_age / 2).max(1));
    max_age > 0 && is_near && known.until > now && known.include_subdomains == policy.include_subdomains
}

fn parse(content: &[u8]) -> Option<Hosts> {
    let file: Value = serde_json::from_slice(content).ok()?;
    let policy = |entry: &Value| {
        let until = entry.get("until")?.as_i64().filter(|until| until.abs() <= MAX_UNTIL)?;
        Some(Policy { until, include_subdomains: entry.get("include_subdomains")?.as_bool()? })
    };
    file.get("hosts")?.as_object()?.iter().map(|(name, entry)| Some((name.clone(), policy(entry)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WALL: i64 = 1_767_225_600_000;

    fn folder() -> PathBuf {
        std::env::temp_dir().join(format!("zcproto-known-hosts-{:016x}", crate::random::number()))
    }

    fn sts(max_age: u64, include_subdomains: bool) -> StsPolicy {
        StsPolicy { max_age, include_subdomains }
    }

    fn is_refused(hosts: &KnownHosts, host: &str, wall: i64) -> bool {
        matches!(hosts.require(host, wall), Err(Error::Tls(TlsError { failure: TlsFailure::StsPolicy, .. })))
    }

    #[test]
    fn a_policy_forbids_unverified_connections_until_it_ends() {
        let home = folder();
        let hosts = KnownHosts::new(&home);
        hosts.learn("example.com", sts(60, true), WALL).unwrap();
        hosts.learn("plain.test", sts(60, false), WALL).unwrap();
        hosts.learn("127.0.0.1", sts(60, true), WALL).unwrap();
        assert!(is_refused(&hosts, "example.com", WALL));
        assert!(is_refused(&hosts, "a.b.example.com", WALL + 59_000));
        assert!(!is_refused(&hosts, "example.com", WALL + 60_000));
        assert!(is_refused(&hosts, "plain.test", WALL));
        assert!(!is_refused(&hosts, "a.plain.test", WALL));
        assert!(!is_refused(&hosts, "127.0.0.1", WALL));
        hosts.learn("example.com", sts(0, true), WALL).unwrap();
        assert!(!is_refused(&hosts, "example.com", WALL));
        std::fs::remove_dir_all(home).unwrap();
    }

    #[test]
    fn a_damaged_file_is_an_error_and_never_empty() {
        let home = folder();
        let hosts = KnownHosts::new(&home);
        hosts.learn("example.com", sts(60, true), WALL).unwrap();
        for content in ["", "{}", "{\"hosts\": {\"a\": {\"until\": 1.5, \"include_subdomains\": true}}}", "[]"] {
            std::fs::write(home.join(FILE_NAME), content).unwrap();
            assert!(is_refused(&hosts, "other.test", WALL), "{content}");
            assert!(matches!(hosts.learn("other.test", sts(60, true), WALL), Err(Error::Config(_))));
        }
        std::fs::remove_dir_all(home).unwrap();
    }

    #[test]
    fn the_number_of_hosts_is_limited() {
        let home = folder();
        let hosts = KnownHosts::new(&home);
        let many: Hosts = (0..1_000i64)
            .map(|index| {
                (format!("h{index}"), Policy { until: WALL / 1_000 + 1_000 + index, include_subdomains: false })
            })
            .collect();
        create_folder(&home).unwrap();
        hosts.write(&many).unwrap();
        hosts.learn("example.com", sts(1_000_000, true), WALL).unwrap();
        let kept = hosts.read().unwrap();
        assert_eq!(kept.len(), MAX_HOSTS);
        assert!(!kept.contains_key("h0") && kept.contains_key("h1") && kept.contains_key("example.com"));
        std::fs::remove_dir_all(home).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn the_file_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let home = folder();
        KnownHosts::new(&home).learn("example.com", sts(60, true), WALL).unwrap();
        let mode = std::fs::metadata(home.join(FILE_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::remove_dir_all(home).unwrap();
    }
}
